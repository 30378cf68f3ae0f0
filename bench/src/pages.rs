//! Reading single pages from a pageserver over its protocol: hot, and from layers on the local disk; young, and after sixty
//! times as many updates.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, TryStreamExt};
use pageserver::{Config, ObjectStoreConfig, Server, branch::Tuning};
use pageserver_client::PageserverClient;
use tokio_util::sync::CancellationToken;
use types::{BlockNumber, Generation, Lsn, PageTag, RelTag};
use wire::{Scope, TokenSigner, auth::TokenKeys, pageserver::ReadLsn};

use crate::{
    awake::Awake,
    ingest::{Storage, project},
    redo::{Recorded, client},
};

const LATEST: ReadLsn = ReadLsn { request: Lsn::MAX, not_modified_since: Lsn(0) };
const READS: usize = 20_000;
const IN_FLIGHT: usize = 64;
const MINUTES: u32 = 60;

/// Latencies and pages a second of one way to read.
struct Measured {
    p50_us: f64,
    p99_us: f64,
    pages_s: f64,
}

/// Prints `p50_us= p99_us= pages_s_1= pages_s_64=` of hot pages, the same with `cold_` of pages from layers, and
/// `aging_ratio=`: the cold p99 after an hour's worth of updates over that after a minute's.
pub async fn run(scale: u32, minute_transactions: u32) -> anyhow::Result<()> {
    let transactions = (minute_transactions * MINUTES / 4).to_string();
    let scale_text = scale.to_string();
    let recorded = Recorded::make(&["-i", "-q", "-s", &scale_text], |home| {
        client(home, "pgbench", &["-n", "-c", "4", "-t", &transactions])
    })
    .await?;
    let directory = tempfile::tempdir()?;
    let storage = Storage::over(&recorded, &directory.path().join("store"), Tuning::default()).await?;
    let pieces = recorded.wal(storage.start)?;
    let minute = pieces.len() / MINUTES as usize;
    let mut young = None;
    for (number, (at, piece)) in pieces.iter().enumerate() {
        storage.branch.ingest_wal(*at, piece).await?;
        if number == minute {
            storage.branch.flush().await?;
            storage.branch.compact().await?;
            young = Some(Service::start(&directory, 2).await?.measure("young, from layers", READS, false).await?);
        }
    }
    storage.branch.flush().await?;
    storage.branch.compact().await?;
    let cold = Service::start(&directory, 3).await?.measure("aged, from layers", READS, false).await?;
    let hot = Service::start(&directory, 4).await?.measure("aged, hot", READS, true).await?;
    let aging = young.map_or(0.0, |young| cold.p99_us / young.p99_us);
    println!(
        "p50_us={:.0} p99_us={:.0} pages_s_1={:.0} pages_s_64={:.0} cold_p50_us={:.0} cold_p99_us={:.0} cold_pages_s_64={:.0} aging_ratio={aging:.2}",
        hot.p50_us,
        hot.p99_us,
        1e6 / hot.p50_us,
        hot.pages_s,
        cold.p50_us,
        cold.p99_us,
        cold.pages_s
    );
    Ok(())
}

/// A pageserver of its own generation over the same store.
struct Service {
    client: Arc<PageserverClient>,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Service {
    async fn start(directory: &tempfile::TempDir, generation: u32) -> anyhow::Result<Service> {
        let keys = TokenKeys::generate()?;
        let key_path = directory.path().join(format!("key-{generation}.pem"));
        std::fs::write(&key_path, &keys.public_pem)?;
        let store = ObjectStoreConfig::Local(directory.path().join("store"));
        let mut config = Config::new(store, directory.path().join("data"), key_path);
        config.listen = "127.0.0.1:0".parse()?;
        config.generation = Some(Generation(generation));
        let server = Server::bind(config).await?;
        let (address, stop) = (server.local_addr().to_string(), CancellationToken::new());
        let running = tokio::spawn(server.run(stop.clone()));
        let token = TokenSigner::from_pem(&keys.private_pem)?.sign(Scope::Service, Duration::from_secs(3600))?;
        Ok(Service { client: Arc::new(PageserverClient::new(address, token)), stop, running })
    }

    async fn end(self) -> anyhow::Result<()> {
        self.stop.cancel();
        self.running.await?
    }

    /// Random pages of the largest relation. Hot: of few, which were all read before; else each is read once.
    async fn measure(self, what: &str, reads: usize, hot: bool) -> anyhow::Result<Measured> {
        let (rel, blocks) = self.largest().await?;
        let mut random = 0x2545_F491_4F6C_DD1Du64;
        let mut block = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random % u64::from(if hot { blocks.min(2000) } else { blocks })) as BlockNumber
        };
        if hot {
            let all: Vec<PageTag> = (0..blocks.min(2000)).map(|block| PageTag { rel, block }).collect();
            for some in all.chunks(100) {
                self.client.get_pages(&project()?, some.to_vec(), LATEST).await?;
            }
        }
        let awake = Awake::new()?;
        let mut times = Vec::with_capacity(reads);
        for _ in 0..reads {
            let began = Instant::now();
            self.client.get_pages(&project()?, vec![PageTag { rel, block: block() }], LATEST).await?;
            times.push(began.elapsed());
        }
        times.sort_unstable();
        let micros = |part: usize| times[(times.len() - 1) * part / 100].as_secs_f64() * 1e6;
        let (p50_us, p99_us) = (micros(50), micros(99));
        drop(awake);
        let began = Instant::now();
        let name = project()?;
        let tags: Vec<PageTag> = (0..reads).map(|_| PageTag { rel, block: block() }).collect();
        let requests = tags.iter().map(|tag| self.client.get_pages(&name, vec![*tag], LATEST));
        let answers: Vec<_> = futures::stream::iter(requests).buffer_unordered(IN_FLIGHT).try_collect().await?;
        let pages_s = answers.len() as f64 / began.elapsed().as_secs_f64();
        println!(
            "{what}: p50 {p50_us:.0} us, p99 {p99_us:.0} us; {pages_s:.0} pages a second at {IN_FLIGHT} in flight"
        );
        self.end().await?;
        Ok(Measured { p50_us, p99_us, pages_s })
    }

    async fn largest(&self) -> anyhow::Result<(RelTag, BlockNumber)> {
        let rels =
            self.client.list_rels(&project()?, types::oids::DEFAULT_TABLESPACE, POSTGRES_DATABASE, LATEST).await?;
        rels.into_iter().max_by_key(|(_, blocks)| *blocks).ok_or_else(|| anyhow::anyhow!("no relations"))
    }
}

/// The database `postgres`, as `initdb` makes it.
const POSTGRES_DATABASE: u32 = 5;
