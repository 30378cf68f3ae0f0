//! WAL redo: the library on one core, in turn with a stock `postgres` in crash recovery over the same WAL; and the time to
//! rebuild one page from an image and a chain of records.

mod replay;

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use e2e::stock::{SUPERUSER, StockServer, as_postgres, run as succeed};
use memmap2::{Advice, MmapMut};
use redo_oracle::control_file;
use types::{Lsn, WAL_SEGMENT_BYTES};
use wal::CheckPoint;

use self::replay::{Replay, Spare, each_record};

const CONTROL_FILE: &str = "global/pg_control";
/// The control file from before the load, beside the cluster.
const CONTROL_BEFORE: &str = "pg_control.before";
/// As much WAL as a safekeeper sends at a time.
const WAL_PIECE_BYTES: u64 = 128 << 10;

/// As a Dormouse compute writes it: no full-page images. Nothing but the first checkpoint, so that all of it is replayed.
const SETTINGS: &[(&str, &str)] = &[
    ("full_page_writes", "off"),
    ("shared_buffers", "2GB"),
    ("checkpoint_timeout", "1d"),
    ("max_wal_size", "50GB"),
    ("autovacuum", "off"),
    ("fsync", "off"),
    ("maintenance_work_mem", "512MB"),
];

/// Prints `redo_mrec_s= redo_mb_s= postgres_mb_s= redo_ratio= warm_ratio= chain_us= chain_max_us=`, and the ratio of each load by itself; the warm
/// one is without the time that the kernel takes to hand out as much memory to Postgres.
pub async fn run(rounds: usize, pgbench_scale: u32) -> anyhow::Result<()> {
    let scale = pgbench_scale.to_string();
    let init = ["-i", "-q", "-s", &scale];
    let transactions = (20_000 * pgbench_scale / 10).to_string();
    let pgbench = Recorded::make(&init, |home| client(home, "pgbench", &["-n", "-c", "4", "-t", &transactions]))
        .await
        .context("pgbench")?;
    let rows = 60_000 * pgbench_scale;
    let bulk = Recorded::make(&[], |home| {
        let load = format!(
            "create table bulk (id int primary key, k int, t text);
             create index on bulk (k); create index on bulk using gin (to_tsvector('simple', t));
             insert into bulk select g, (g * 7919::bigint % 1000003)::int, 'row ' || g % 977 || ' of many'
             from generate_series(1, {rows}) g;
             create index on bulk (t);"
        );
        client(home, "psql", &["-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", &load])
    })
    .await
    .context("bulk load")?;

    let mut spare = Spare::default();
    let mut library = Totals::default();
    let (mut postgres, mut for_memory) = (Duration::ZERO, Duration::ZERO);
    for (name, recorded) in [("pgbench", &pgbench), ("bulk", &bulk)] {
        let mut ours = Vec::new();
        let mut theirs = Vec::new();
        recorded.replay(&mut spare)?;
        for _ in 0..rounds {
            let (recovery, replay) = (recorded.recover().await?, recorded.replay(&mut spare)?);
            let (end, expected) = (replay.last_record, recovery.last_record);
            ensure!(end == expected, "{name}: the library's last record is at {end}, that of Postgres at {expected}");
            theirs.push(recovery.took);
            ours.push(replay);
        }
        theirs.sort();
        ours.sort_by_key(|totals| totals.took);
        let (ours, theirs) = (ours[ours.len() / 2], theirs[theirs.len() / 2]);
        // The library has its memory from the round before; Postgres gets its buffers while it recovers.
        let memory = time_of_fresh_memory(ours.page_bytes)?;
        println!(
            "{name}: {} records, {:.1} MB of WAL: library {:.2} s, postgres {:.2} s ({:.2} s of it for memory), ratio {:.2}",
            ours.records,
            mb(ours.wal_bytes),
            ours.took.as_secs_f64(),
            theirs.as_secs_f64(),
            memory.as_secs_f64(),
            theirs.as_secs_f64() / ours.took.as_secs_f64()
        );
        for_memory += memory;
        library.add(ours);
        postgres += theirs;
    }
    let chains = replay::chains(&pgbench.base(), pgbench.start, pgbench.counters)?;
    let (chain_us, chain_max_us) = (chains[chains.len() / 2], chains[chains.len() - 1]);
    let seconds = library.took.as_secs_f64();
    println!(
        "redo_mrec_s={:.2} redo_mb_s={:.1} postgres_mb_s={:.1} redo_ratio={:.2} warm_ratio={:.2} chain_us={chain_us:.2} chain_max_us={chain_max_us:.2}",
        library.records as f64 / 1e6 / seconds,
        mb(library.wal_bytes) / seconds,
        mb(library.wal_bytes) / postgres.as_secs_f64(),
        postgres.as_secs_f64() / seconds,
        postgres.saturating_sub(for_memory).as_secs_f64() / seconds,
    );
    Ok(())
}

/// How long the kernel takes to hand out so much memory in pages of 4 KiB, as Postgres gets its shared buffers.
pub(crate) fn time_of_fresh_memory(bytes: usize) -> anyhow::Result<Duration> {
    let mut memory = MmapMut::map_anon(bytes.max(1))?;
    let _large_pages_were_never_on = memory.advise(Advice::NoHugePage);
    let began = Instant::now();
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    Ok(began.elapsed())
}

pub(crate) fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

pub(crate) fn client(socket_dir: &Path, program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let mut command = as_postgres(e2e::pg_bin_dir().join(program))?;
    command.env("PGHOST", socket_dir).env("PGUSER", SUPERUSER).env("PGDATABASE", "postgres");
    succeed(command.args(arguments)).map(drop)
}

/// What Postgres did in crash recovery.
pub(crate) struct Recovery {
    /// From the start of redo to its end.
    pub(crate) took: Duration,
    /// Start of the last record that it replayed.
    pub(crate) last_record: Lsn,
}

#[derive(Clone, Copy, Default)]
struct Totals {
    records: u64,
    wal_bytes: u64,
    /// Of memory that pages take in the end.
    page_bytes: usize,
    /// Its start.
    last_record: Lsn,
    took: Duration,
}

impl Totals {
    fn add(&mut self, other: Totals) {
        self.records += other.records;
        self.wal_bytes += other.wal_bytes;
        self.page_bytes += other.page_bytes;
        self.took += other.took;
    }
}

/// A cluster's files from before a load, and all that the load wrote to WAL, up to a crash.
pub(crate) struct Recorded {
    /// Holds `base`: the files from before with the crashed server's WAL and control file.
    home: tempfile::TempDir,
    start: Lsn,
    /// What the control file said at the start.
    counters: CheckPoint,
}

impl Recorded {
    /// `init` are pgbench's arguments to fill the cluster before; none leaves it empty.
    pub(crate) async fn make(
        init: &[&str],
        load: impl FnOnce(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<Recorded> {
        let home = tempfile::tempdir()?;
        std::fs::set_permissions(home.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let base = home.path().join("base");
        let mut server = StockServer::create(SETTINGS)?;
        if !init.is_empty() {
            server.start().await?;
            client(&server.socket_dir(), "pgbench", init)?;
            server.stop()?;
        }
        succeed(Command::new("cp").arg("-a").arg(server.data_dir()).arg(&base))?;
        let control = control_file(&base);
        std::fs::copy(base.join(CONTROL_FILE), home.path().join(CONTROL_BEFORE))?;
        server.start().await?;
        load(&server.socket_dir())?;
        server.kill()?;
        // Now the files from before look as if the server had crashed with nothing written but WAL.
        for part in ["pg_wal", CONTROL_FILE] {
            succeed(Command::new("rm").arg("-r").arg(base.join(part)))?;
            succeed(Command::new("cp").arg("-a").arg(server.data_dir().join(part)).arg(base.join(part)))?;
        }
        Ok(Recorded { home, start: control.checkpoint_lsn(), counters: control.checkpoint() })
    }

    pub(crate) fn base(&self) -> PathBuf {
        self.home.path().join("base")
    }

    /// Runs `f` while the files look as before the load, with all of its WAL beside them.
    pub(crate) async fn before_load<T>(&self, f: impl AsyncFnOnce(&Path) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let control = self.base().join(CONTROL_FILE);
        let after = std::fs::read(&control)?;
        std::fs::copy(self.home.path().join(CONTROL_BEFORE), &control)?;
        let outcome = f(&self.base()).await;
        std::fs::write(&control, after)?;
        outcome
    }

    /// All whole records of the load's WAL from `from` on, in pieces.
    pub(crate) fn wal(&self, from: Lsn) -> anyhow::Result<Vec<(Lsn, Vec<u8>)>> {
        let (_, bytes) = each_record(&self.base(), self.start, |_| Ok(()))?;
        let end = self.start + bytes;
        let mut pieces = Vec::new();
        let mut at = from;
        while at < end {
            let segment = File::open(self.base().join("pg_wal").join(at.segment_file_name()))?;
            let offset = at.segment_offset();
            let length = (WAL_SEGMENT_BYTES - offset).min(end.0 - at.0).min(WAL_PIECE_BYTES);
            let mut piece = vec![0; length as usize];
            segment.read_exact_at(&mut piece, offset)?;
            pieces.push((at, piece));
            at += length;
        }
        Ok(pieces)
    }

    /// Postgres's crash recovery, by its own log.
    pub(crate) async fn recover(&self) -> anyhow::Result<Recovery> {
        let mut server =
            StockServer::on(|data_dir| succeed(Command::new("cp").arg("-a").arg(self.base()).arg(data_dir)).map(drop))?;
        server.start().await?;
        server.stop()?;
        let log = std::fs::read_to_string(server.socket_dir().join("log"))?;
        // "redo done at 0/1A2B3C8 system usage: CPU: user: 1.00 s, system: 0.20 s, elapsed: 1.30 s"
        let done = log.lines().find_map(|line| line.split_once("redo done at ")).and_then(|(_, done)| {
            let last_record = done.split(' ').next()?.parse().ok()?;
            let seconds = done.split_once("elapsed: ")?.1.trim_end_matches(" s").parse().ok()?;
            Some(Recovery { took: Duration::from_secs_f64(seconds), last_record })
        });
        done.with_context(|| format!("the server tells of no redo:\n{log}"))
    }

    /// The library does the same, with memory that it had before.
    fn replay(&self, spare: &mut Spare) -> anyhow::Result<Totals> {
        let mut replay = Replay::new(self.base(), self.counters, std::mem::take(spare));
        let began = Instant::now();
        let mut last_record = self.start;
        let (records, wal_bytes) = each_record(&self.base(), self.start, |record| {
            last_record = record.start_lsn;
            replay.apply(record)
        })?;
        let took = began.elapsed();
        let page_bytes = replay.page_bytes();
        *spare = replay.into_spare();
        Ok(Totals { records, wal_bytes, page_bytes, last_record, took })
    }
}
