//! The end of a compute.

use std::{io, path::Path, time::Duration};

use page_cache::Page;
use types::{ForkNumber, Lsn, PageTag};
use wal::{
    encode::{BlockToWrite, RecordToWrite},
    v15::{rmgr, xlog},
};

use crate::{
    AgentError,
    kept_files::KeptFiles,
    shipper::ShipError,
    start::{Compute, cached_as_of},
};

/// Longest time for the HTTP server to send what it owes.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// Longest time for Postgres's fast shutdown, its checkpoint included. Its WAL is safe without one.
const FAST_LIMIT: Duration = Duration::from_secs(30);

/// From then on a page that storage does not give is an error for the backend that waits for it, so that it can leave.
const READS_LIMIT: Duration = Duration::from_secs(5);

/// Time between SIGQUIT and SIGKILL.
const QUIT_LIMIT: Duration = Duration::from_secs(5);

/// Longest wait for a quorum to hold the last WAL.
const LAST_WAL_LIMIT: Duration = Duration::from_secs(10);

/// Where Postgres leaves its cumulative statistics at a shutdown (`PGSTAT_STAT_PERMANENT_FILENAME` in `pgstat.h`), and
/// `pg_stat_statements` its own (`PGSS_DUMP_FILE`).
const STATISTICS_FILES: &[&str] = &["pg_stat/pgstat.stat", "pg_stat/pg_stat_statements.stat"];

/// A file of statistics over this size is not kept: they are worth less than the WAL they take.
const MAX_STATISTICS_BYTES: u64 = 4 * 1024 * 1024;

/// Most sequences that are kept exactly; others have gaps, as after a crash.
const MAX_SEQUENCES: usize = 1024;

/// Most pages of free space maps that are kept: each tells of 32 MiB of a table. Others are made anew by the next vacuum.
const MAX_FREE_SPACE_PAGES: usize = 4096;

/// Stops Postgres, ships all it has written and its statistics. Returns the end of the branch's WAL, which a quorum holds.
pub async fn stop(compute: Compute) -> Result<Lsn, AgentError> {
    tracing::info!("stopping");
    compute.shipper.backpressure().lift();
    compute.postgres.stop_fast();
    let mut stopped = tokio::time::timeout(READS_LIMIT, compute.postgres.wait_exit()).await;
    if stopped.is_err() {
        compute.backend.give_up_reads.cancel();
        stopped = tokio::time::timeout(FAST_LIMIT - READS_LIMIT, compute.postgres.wait_exit()).await;
    }
    if stopped.is_err() {
        tracing::warn!("postgres did not stop within {} s: ending it without a checkpoint", FAST_LIMIT.as_secs());
        compute.postgres.stop_now(QUIT_LIMIT).await;
    }
    let last = match tokio::time::timeout(LAST_WAL_LIMIT, ship_last(&compute)).await {
        Ok(Ok(lsn)) => Ok(lsn),
        Ok(Err(error)) => Err(AgentError::Stop(error.to_string())),
        Err(_) => Err(AgentError::Stop(format!("no quorum held the last WAL within {} s", LAST_WAL_LIMIT.as_secs()))),
    };
    if let Ok(end) = last
        && compute.postgres.ended_well()
    {
        leave_cache_asleep(&compute, end).await;
    }
    close(compute).await;
    last
}

/// Leaves the page cache to the next compute of this endpoint. Failing to costs that one's warmth only.
async fn leave_cache_asleep(compute: &Compute, end: Lsn) {
    if compute.sleeping_caches_bytes == 0 {
        return;
    }
    let cache = compute.cache.clone();
    let as_of = cached_as_of(&compute.backend.branch, end);
    let asleep = tokio::task::spawn_blocking(move || cache.fall_asleep(end, &as_of)).await;
    let left = asleep.map_err(io::Error::other).flatten();
    if let Err(error) = left.and_then(|list| compute.page_file.leave_asleep(&list, compute.sleeping_caches_bytes)) {
        tracing::warn!(%error, "the page cache is thrown away");
    }
}

/// Ends Postgres at once; what it has not shipped is given up.
pub async fn abandon(compute: Compute) {
    compute.backend.give_up_reads.cancel();
    compute.shipper.backpressure().lift();
    if !compute.postgres.is_running() {
        tracing::error!(log = %compute.postgres.last_words(), "postgres ended by itself");
    }
    compute.postgres.stop_now(QUIT_LIMIT).await;
    close(compute).await;
}

async fn ship_last(compute: &Compute) -> Result<Lsn, ShipError> {
    let end = compute.shipper.sync().await?;
    if !compute.postgres.ended_well() {
        return Ok(end);
    }
    let kept = compute.shipper.kept_files().await;
    let farewell = Farewell::collect(compute, &kept);
    compute.shipper.append_last(&farewell.records(), compute.system_identifier).await
}

/// What WAL does not tell and is worth keeping over a sleep. What can't be had is left out, with a warning.
#[derive(Default)]
struct Farewell {
    /// Sequences, which WAL is up to 32 values ahead of, and free space maps, which it says nothing of.
    pages: Vec<(PageTag, Page)>,
    /// Logical messages with small files: the statistics, without which autovacuum is blind, and replication slots.
    files: Vec<Vec<u8>>,
}

impl Farewell {
    fn collect(compute: &Compute, kept: &KeptFiles) -> Farewell {
        let mut farewell = Farewell::default();
        for (fork, limit) in [(ForkNumber::Main, MAX_SEQUENCES), (ForkNumber::Fsm, MAX_FREE_SPACE_PAGES)] {
            match compute.cache.soft_pages(fork, limit) {
                Ok(pages) => farewell.pages.extend(pages),
                Err(error) => {
                    tracing::warn!(%error, ?fork, "sequences will have gaps, or free space is to be found again")
                }
            }
        }
        for path in STATISTICS_FILES {
            match read_statistics(&compute.dir.pgdata().join(path)) {
                Ok(Some(content)) => farewell.keep_file(path, &content),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, path, "statistics are lost"),
            }
        }
        match kept.differences(&compute.dir.pgdata()) {
            Ok(different) => different.iter().for_each(|(path, content)| farewell.keep_file(path, content)),
            Err(error) => {
                tracing::warn!(%error, "replication slots are kept as of their last change, as after a crash")
            }
        }
        farewell
    }

    fn keep_file(&mut self, path: &str, content: &[u8]) {
        match wal_redo::aux_file_main_data(path, content) {
            Ok(message) => self.files.push(message),
            Err(error) => tracing::warn!(%error, path, "a file is not kept"),
        }
    }

    fn records(&self) -> Vec<RecordToWrite<'_>> {
        let pages = self.pages.iter().map(|(tag, page)| RecordToWrite {
            xid: 0,
            rmgr: rmgr::XLOG,
            info: xlog::FPI,
            main_data: &[],
            blocks: vec![BlockToWrite { tag: *tag, page }],
        });
        pages.chain(self.files.iter().map(|message| wal_redo::aux_file_record(message))).collect()
    }
}

fn read_statistics(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match std::fs::metadata(path) {
        Ok(file) if file.len() > MAX_STATISTICS_BYTES => {
            Err(io::Error::other(format!("{} bytes are too many to keep", file.len())))
        }
        Ok(_) => std::fs::read(path).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Lets everything go. The directory and the page cache's file, unless it was left asleep, are removed as they are dropped.
async fn close(compute: Compute) {
    let Compute { postgres, backend, shim_server, proposer, dir, page_file, .. } = compute;
    backend.stopping.cancel();
    if tokio::time::timeout(ANSWER_LIMIT, shim_server).await.is_err() {
        tracing::debug!("the shim's server is still busy");
    }
    proposer.finish().await;
    drop((postgres, page_file, dir));
}
