//! Ships the WAL that Postgres writes to the safekeepers, and says when a quorum holds it.

use std::sync::Arc;

use bytes::Bytes;
use page_cache::PageCache;
use parking_lot::Mutex as SyncMutex;
use safekeeper_client::WalProposer;
use tokio::{sync::Mutex, task::yield_now, time::Instant};
use types::Lsn;
use wal::encode::{RecordToWrite, encode_record};

use crate::{
    backpressure::Backpressure,
    kept_files::KeptFiles,
    local_wal::{LocalWal, LocalWalError},
};

/// WAL cannot be made durable by waiting.
#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    /// A newer compute has the branch.
    #[error("fenced by a newer term: {0}")]
    Fenced(String),
    /// The local files.
    #[error(transparent)]
    Local(#[from] LocalWalError),
}

/// Ships WAL. Calls may come from many backends at once.
pub struct WalShipper {
    local: Mutex<Source>,
    proposer: WalProposer,
    cache: PageCache,
    waits: SyncMutex<Waits>,
    backpressure: Backpressure,
}

/// Where WAL comes from.
struct Source {
    wal: LocalWal,
    /// Set once something was read that the proposer did not take: nothing may be shipped behind that.
    over: Option<String>,
}

/// Who waits for a quorum, and since when.
#[derive(Debug, Default)]
struct Waits {
    count: usize,
    since: Option<Instant>,
}

impl WalShipper {
    /// Ships what `local` reads, behind what `proposer` already has.
    pub fn new(local: LocalWal, proposer: WalProposer, cache: PageCache) -> Arc<Self> {
        Arc::new(Self {
            backpressure: Backpressure::new(local.position()),
            local: Mutex::new(Source { wal: local, over: None }),
            proposer,
            cache,
            waits: SyncMutex::default(),
        })
    }

    /// What holds WAL back when the pageserver is behind.
    pub fn backpressure(&self) -> &Backpressure {
        &self.backpressure
    }

    /// Returns when a quorum holds every whole record in the local files: its end.
    pub async fn sync(&self) -> Result<Lsn, ShipError> {
        self.backpressure.wait().await;
        let (end, horizon) = self.ship().await?;
        self.wait(end).await?;
        self.cache.set_shipped(end);
        self.cache.set_horizon(horizon);
        self.backpressure.note_committed(end);
        tracing::trace!(lsn = %end, %horizon, "WAL is committed");
        Ok(end)
    }

    /// Sends on what is in the local files, ahead of the sync that will wait for it; not while WAL is held back.
    pub async fn ship_ahead(&self) -> Result<(), ShipError> {
        if self.backpressure.holds_back() {
            return Ok(());
        }
        self.ship().await.map(drop)
    }

    /// Hands every whole record in the local files to the proposer: their end, and the horizon there.
    async fn ship(&self) -> Result<(Lsn, Lsn), ShipError> {
        let mut local = self.local.lock().await;
        self.check(&local)?;
        // Postgres has written what it wants synced before it asks: where there was no more, nothing can have been missed.
        let mut more = true;
        while more && let Some(batch) = local.wal.read_new()? {
            more = batch.more;
            self.append(&mut local, batch.begin, batch.bytes)?;
            if more {
                // A MiB takes some milliseconds, in which nobody else's page is read.
                yield_now().await;
            }
        }
        Ok((local.wal.position(), local.wal.horizon()))
    }

    /// Writes records of the agent's own behind everything that Postgres, which has ended, has written. Returns their end
    /// when a quorum holds them. Nothing can be shipped after this.
    pub async fn append_last(&self, records: &[RecordToWrite<'_>], system_identifier: u64) -> Result<Lsn, ShipError> {
        // The local files have nothing behind this position any more, so nothing is shipped from them after this.
        let mut local = self.local.lock().await;
        self.check(&local)?;
        let (mut end, mut last_record) = (local.wal.position(), local.wal.last_record());
        for record in records {
            let encoded = encode_record(end, last_record, system_identifier, record);
            (end, last_record) = (encoded.end_lsn, encoded.start_lsn);
            self.append(&mut local, encoded.begin, encoded.bytes)?;
        }
        local.over = Some("the compute is stopping".to_owned());
        self.wait(end).await?;
        Ok(end)
    }

    /// The files that the WAL shipped so far keeps.
    pub async fn kept_files(&self) -> KeptFiles {
        self.local.lock().await.wal.kept_files().clone()
    }

    /// How long the longest-waiting caller has been waiting for a quorum, in milliseconds; 0 when nobody waits.
    pub fn waiting_ms(&self) -> u64 {
        self.waits.lock().since.map_or(0, |since| since.elapsed().as_millis() as u64)
    }

    fn check(&self, source: &Source) -> Result<(), ShipError> {
        source.over.clone().or_else(|| self.proposer.fenced()).map_or(Ok(()), |reason| Err(ShipError::Fenced(reason)))
    }

    fn append(&self, source: &mut Source, begin: Lsn, wal: Bytes) -> Result<(), ShipError> {
        self.proposer.append(begin, wal).map_err(|fenced| {
            source.over = Some(fenced.0.clone());
            ShipError::Fenced(fenced.0)
        })
    }

    async fn wait(&self, end: Lsn) -> Result<(), ShipError> {
        if self.proposer.commit_lsn() >= end {
            return Ok(());
        }
        let _waiting = Waiting::new(&self.waits);
        self.proposer.wait_committed(end).await.map_err(|fenced| ShipError::Fenced(fenced.0))
    }
}

/// Counts one caller as waiting as long as it lives.
struct Waiting<'a>(&'a SyncMutex<Waits>);

impl<'a> Waiting<'a> {
    fn new(waits: &'a SyncMutex<Waits>) -> Self {
        let mut now = waits.lock();
        now.count += 1;
        now.since.get_or_insert_with(Instant::now);
        Self(waits)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut now = self.0.lock();
        now.count -= 1;
        // Something was committed (or given up): the others' wait counts from here.
        now.since = (now.count > 0).then(Instant::now);
    }
}
