//! WAL into a pageserver until all of it can be read, written out to the object store meanwhile as memory is bounded, in turn
//! with a stock server's recovery over the same WAL on the same disk: small rows one by one, and a bulk load. What is still in
//! memory at the end is not waited for, as recovery does not wait for its buffers.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use pageserver::{
    ObjectStoreConfig,
    branch::{Branch, Branches, Shared, Tuning},
    import_template,
    read::PageCache,
    remote::{DiskCache, Remote},
};
use types::{BranchId, BranchRef, Generation, Lsn, ProjectId};
use wire::pageserver::BranchPoint;

use crate::redo::{Recorded, client, mb, time_of_fresh_memory};

const CACHE_BYTES: u64 = 128 << 20;
/// More than either side takes. A virtual machine gets memory from its host as it first touches it, which takes several times
/// as long as all else: who comes later finds it there.
const MACHINE_MEMORY_BYTES: usize = 4 << 30;

/// Prints `small_mb_s= bulk_mb_s= ingest_ratio=`: megabytes of WAL a second, and the stock server's time over ours.
pub async fn run(rounds: usize, scale: u32) -> anyhow::Result<()> {
    let small_rows = format!(
        "create table small (id int primary key, k int, t text);
         do $$ begin for i in 1..{} loop insert into small values (i, (i * 7919::bigint % 1000003)::int, 'row ' || i); end loop; end $$",
        scale * 50_000
    );
    let bulk_rows = format!(
        "create table bulk as select g id, repeat(md5(g::text), 8) t from generate_series(1, {}) g",
        scale * 40_000
    );
    time_of_fresh_memory(MACHINE_MEMORY_BYTES)?;
    let mut speeds = Vec::new();
    let (mut ours_total, mut theirs_total) = (Duration::ZERO, Duration::ZERO);
    for (name, sql) in [("small", small_rows), ("bulk", bulk_rows)] {
        let recorded =
            Recorded::make(&[], |home| client(home, "psql", &["-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", &sql]))
                .await?;
        let (mut ours, mut theirs, mut bytes) = (Vec::new(), Vec::new(), 0);
        for _ in 0..rounds {
            theirs.push(recorded.recover().await?.took);
            let (took, wal_bytes) = ingest(&recorded).await?;
            ours.push(took);
            bytes = wal_bytes;
        }
        let (ours, theirs) = (median(ours), median(theirs));
        let speed = mb(bytes) / ours.as_secs_f64();
        println!(
            "{name}: {:.0} MB of WAL: pageserver {:.2} s ({speed:.0} MB/s), postgres {:.2} s",
            mb(bytes),
            ours.as_secs_f64(),
            theirs.as_secs_f64()
        );
        speeds.push(speed);
        ours_total += ours;
        theirs_total += theirs;
    }
    println!(
        "small_mb_s={:.1} bulk_mb_s={:.1} ingest_ratio={:.2}",
        speeds[0],
        speeds[1],
        theirs_total.as_secs_f64() / ours_total.as_secs_f64()
    );
    Ok(())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Ingests it all into a new branch; how long that took, and how much it was.
async fn ingest(recorded: &Recorded) -> anyhow::Result<(Duration, u64)> {
    let directory = tempfile::tempdir()?;
    let storage = Storage::over(recorded, directory.path(), Tuning::default()).await?;
    let wal = recorded.wal(storage.start)?;
    let bytes = wal.iter().map(|(_, piece)| piece.len() as u64).sum();
    let began = Instant::now();
    for (at, piece) in &wal {
        storage.branch.ingest_wal(*at, piece).await?;
    }
    let ingested = began.elapsed();
    storage.branch.flush().await?;
    println!(
        "ingested after {:.2} s, written out after {:.2} s",
        ingested.as_secs_f64(),
        began.elapsed().as_secs_f64()
    );
    Ok((ingested, bytes))
}

/// A pageserver's branches over a directory, and one branch of what a cluster was before a load.
pub(crate) struct Storage {
    pub remote: Arc<Remote>,
    /// The branch needs it to find its ancestor.
    _branches: Arc<Branches>,
    pub branch: Arc<Branch>,
    pub start: Lsn,
}

/// The branch's name.
pub(crate) fn project() -> anyhow::Result<BranchRef> {
    Ok(BranchRef { project: ProjectId::new("bench")?, branch: BranchId::new("main")? })
}

impl Storage {
    pub(crate) async fn over(recorded: &Recorded, store: &Path, tuning: Tuning) -> anyhow::Result<Storage> {
        let config = ObjectStoreConfig::Local(store.to_owned());
        let remote = Arc::new(Remote::open(&config, DiskCache::disabled(), CACHE_BYTES)?);
        let template = BranchRef { project: ProjectId::new("template")?, branch: BranchId::new("root")? };
        let import = async |before: &Path| Ok(import_template(&config, &template, before, |_, _| ()).await?);
        let start = recorded.before_load(import).await?;
        let pages = PageCache::new(CACHE_BYTES);
        let shared = Shared {
            remote: remote.clone(),
            pages,
            generation: Generation(1),
            elsewhere: Default::default(),
            ingest_memory: Default::default(),
            tuning,
            wal: None,
            background: Default::default(),
        };
        let branches = Branches::new(Arc::new(shared));
        let name = project()?;
        branches.create(&name, &template, BranchPoint::Head).await?;
        let branch = branches.get(&name).await?;
        Ok(Storage { remote, _branches: branches, branch, start })
    }
}
