//! `make bench`: every benchmark, each beside its peer in the same run. The last line of each is `key=value` figures.

mod awake;
mod bare;
mod branch;
mod commit;
mod density;
mod http;
mod ingest;
mod oltp;
mod own_disks;
mod pages;
mod peer;
mod pool;
mod redo;
mod scan;
mod space;
mod wake;

use std::{process::ExitCode, time::Duration};

use clap::{Parser, ValueEnum};

/// As in the program itself.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Benchmarks of Dormouse. These machines are noisy: trust ratios, not single times.
#[derive(Parser)]
struct Arguments {
    /// Run only this one.
    #[arg(long, value_enum)]
    name: Option<Name>,
    /// Wakes, or branches, to time.
    #[arg(long, default_value_t = 30)]
    rounds: usize,
    /// pgbench scale of the large database of `branch`: 67 is 1 GB.
    #[arg(long, default_value_t = 67)]
    large_scale: u32,
    /// Rounds of each load of `oltp`, `commit` and `scan`.
    #[arg(long, default_value_t = 3)]
    load_rounds: usize,
    /// Only these loads of `oltp`: ro_cached, ro_large, tpcb1, tpcb16.
    #[arg(long, value_delimiter = ',')]
    loads: Vec<String>,
    /// Seconds of each round of `oltp` and `commit`.
    #[arg(long, default_value_t = 8)]
    seconds: u32,
    /// Size of the table of `scan`, MiB.
    #[arg(long, default_value_t = 2048)]
    scan_mib: u32,
    /// Projects of `density`.
    #[arg(long, default_value_t = 1000)]
    projects: usize,
    /// pgbench scale of the load of `redo`; the bulk load grows with it.
    #[arg(long, default_value_t = 20)]
    redo_scale: u32,
    /// pgbench scale of `pages` and `space`; the loads of `ingest` are of about as many MB of WAL, times 15.
    #[arg(long, default_value_t = 20)]
    pages_scale: u32,
    /// Transactions that count as a minute's worth in `pages`; it runs 60 times as many.
    #[arg(long, default_value_t = 3000)]
    minute_transactions: u32,
    /// WAL of each round of `commit`, MiB.
    #[arg(long, default_value_t = 256)]
    wal_mib: usize,
    /// Keep all data in memory, and have each sync take so many microseconds longer: as if each process had a disk of its own, where this
    /// machine has one for all.
    #[arg(long)]
    sync_us: Option<u32>,
    /// Idle clients whose memory `pool` measures.
    #[arg(long, default_value_t = 2000)]
    idle_clients: usize,
    /// Clients that `pool` connects at a time; as many open files and some are needed (`ulimit -n`).
    #[arg(long, default_value_t = 10_000)]
    connected_clients: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Name {
    /// A sleeping endpoint's first row, beside a stock server's start.
    Wake,
    /// A branch of a large database, beside one of a small database.
    Branch,
    /// pgbench, beside a stock server that is as durable.
    Oltp,
    /// Commits, beside a stock server that is as durable; WAL into safekeepers, beside plain files.
    Commit,
    /// Scan, COPY and index build, beside a stock server with a cold file cache.
    Scan,
    /// WAL redo, beside a stock server's crash recovery.
    Redo,
    /// Reading pages from a pageserver, young and aged.
    Pages,
    /// WAL into a pageserver, beside a stock server's recovery.
    Ingest,
    /// Bytes stored and written, beside a stock server's data directory.
    Space,
    /// The proxy's pool, beside PgBouncer in front of the same compute.
    Pool,
    /// SQL over HTTP, beside fresh and held connections.
    Http,
    /// A thousand projects: what they cost while nobody uses them.
    Density,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(micros) = arguments.sync_us
        && !own_disks::are_there()
    {
        return own_disks::run_again(micros).unwrap_or_else(|error| {
            eprintln!("--sync-us: {error:#}");
            ExitCode::FAILURE
        });
    }
    for name in Name::value_variants().iter().copied() {
        if arguments.name.is_some_and(|only| only != name) {
            continue;
        }
        let outcome = match name {
            Name::Wake => wake::run(arguments.rounds).await,
            Name::Branch => branch::run(arguments.rounds, arguments.large_scale).await,
            Name::Oltp => oltp::run(arguments.load_rounds, arguments.seconds, &arguments.loads).await,
            Name::Commit => commit::run(arguments.load_rounds, arguments.seconds, arguments.wal_mib).await,
            Name::Scan => scan::run(arguments.load_rounds, arguments.scan_mib).await,
            Name::Redo => redo::run(arguments.load_rounds, arguments.redo_scale).await,
            Name::Pages => pages::run(arguments.pages_scale, arguments.minute_transactions).await,
            Name::Ingest => ingest::run(arguments.load_rounds, arguments.pages_scale).await,
            Name::Space => space::run(arguments.pages_scale).await,
            Name::Pool => {
                let (idle, connected) = (arguments.idle_clients, arguments.connected_clients);
                pool::run(arguments.load_rounds, arguments.seconds, idle, connected).await
            }
            Name::Http => http::run(arguments.load_rounds, arguments.seconds).await,
            Name::Density => density::run(arguments.projects).await,
        };
        if let Err(error) = outcome {
            eprintln!("bench failed: {error:#}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Times of one thing, done again and again.
#[derive(Default)]
struct Samples(Vec<Duration>);

impl Samples {
    fn add(&mut self, took: Duration) {
        self.0.push(took);
        self.0.sort();
    }

    /// The nearest-rank percentile in milliseconds; 0 when there are none.
    fn percentile_ms(&self, percent: usize) -> f64 {
        let rank = (self.0.len() * percent).div_ceil(100).saturating_sub(1);
        self.0.get(rank).map_or(0.0, |took| took.as_secs_f64() * 1000.0)
    }
}
