//! From a spec to a Postgres that takes connections.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use control_plane_api::compute::{ComputeReady, ComputeSpec};
use page_cache::{PageCache, PageCacheConfig};
use pageserver_client::PageserverClient;
use parking_lot::Mutex;
use safekeeper_client::{Elected, ProposerConfig, WalProposer, WalReaderConfig};
use shim_server::{ShimServer, required_settings, shim_environment};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use types::{BranchRef, ForkNumber, Lsn, RelTag, oids};
use wire::pageserver::{BaseFiles, ReadLsn};

use crate::{
    StartError,
    asking::patiently,
    backend::AgentBackend,
    catalog,
    compute_dir::{ComputeDir, ComputePaths},
    data_dir::{DataDir, DataDirError},
    kept_files::KeptFiles,
    last_written::LastWritten,
    local_wal::LocalWal,
    opening::{Opening, open_term},
    owner::{Owner, give, make_private_dir},
    page_file::PageFile,
    postgres::{Postgres, PostgresCommand},
    settings::{ControlSettings, PG_HBA, postgresql_conf},
    shipper::WalShipper,
    slots::Slots,
    subscriptions,
    timings::Timings,
};

/// Longest time from `exec` to "ready".
const READY_LIMIT: Duration = Duration::from_secs(60);

/// A running compute. Fields are dropped in this order: Postgres goes before what it lives on.
pub struct Compute {
    /// The postmaster.
    pub postgres: Postgres,
    /// Answers the shim.
    pub backend: Arc<AgentBackend>,
    /// Ships WAL.
    pub shipper: Arc<WalShipper>,
    /// The term.
    pub proposer: WalProposer,
    /// The cluster's identifier.
    pub system_identifier: u64,
    /// What the control plane is told.
    pub ready: ComputeReady,
    /// The shim's server; ends when `AgentBackend::stopping` is cancelled.
    pub shim_server: JoinHandle<()>,
    /// The page cache.
    pub cache: PageCache,
    /// The page cache's file.
    pub page_file: PageFile,
    /// The most that page caches of sleeping computes may take on this disk.
    pub sleeping_caches_bytes: u64,
    /// It cannot run subscriptions, of which the branch may have some from its ancestor.
    pub holds_subscriptions: bool,
    /// The directory.
    pub dir: ComputeDir,
}

/// What can be prepared before anything is known about the branch.
struct Prepared {
    data: DataDir,
    page_file: PageFile,
    cache: PageCache,
    cache_config: PageCacheConfig,
    /// What the pages are of that the cache has from before a sleep.
    cached_as_of: Option<String>,
    owner: Option<Owner>,
}

/// What a sleeping cache's pages are of: the branch as of the end of its WAL. Every start of a compute writes more WAL, so
/// where it is still the same, nobody has had the branch since.
pub fn cached_as_of(branch: &BranchRef, end: Lsn) -> String {
    format!("{branch} as of {end}")
}

/// The cache that fell asleep with this list; `None`, with a warning, when the list is damaged.
fn woken_cache(config: &PageCacheConfig, list: &[u8]) -> Option<(PageCache, String)> {
    let label = page_cache::decode_asleep(list).map(|(label, _)| label.to_owned());
    let woken = PageCache::wake(config, list);
    let woken = woken.inspect_err(|error| tracing::warn!(%error, "the page cache from before the sleep is of no use"));
    Some((woken.ok()?, label?))
}

/// Starts the compute. Twice if there may be subscriptions to disable, the first time without what would run them.
pub async fn start(spec: &ComputeSpec, owner: Option<Owner>) -> Result<Compute, StartError> {
    let compute = start_once(spec, ComputeDir::claim(&spec.compute_dir, owner)?, owner).await?;
    if !compute.holds_subscriptions {
        return Ok(compute);
    }
    let subscriptions_disabled = subscriptions::disable(compute).await?;
    let spec = ComputeSpec { disable_subscriptions: false, ..spec.clone() };
    let mut compute = start_once(&spec, ComputeDir::claim(&spec.compute_dir, owner)?, owner).await?;
    compute.ready.subscriptions_disabled = subscriptions_disabled;
    Ok(compute)
}

async fn start_once(spec: &ComputeSpec, dir: ComputeDir, owner: Option<Owner>) -> Result<Compute, StartError> {
    let mut timings = Timings::begin();
    let conf =
        postgresql_conf(dir.root(), &spec.endpoint, &required_settings(), &spec.settings, spec.page_cache_bytes)?;
    let pageserver = PageserverClient::new(spec.pageserver.clone(), spec.token.clone());
    let warming = warm(pageserver.clone(), spec);
    let electing = WalProposer::elect(proposer_config(spec));
    let (elected, prepared) = tokio::join!(electing, prepare(spec, &dir, owner, conf));
    let (proposer, elected) = elected.map_err(|error| StartError::Elect(error.to_string()))?;
    let prepared = prepared?.check_cache(&spec.branch, elected.start_lsn)?;
    timings.step("elect");
    tracing::info!(term = %elected.term, lsn = %elected.start_lsn, "elected");

    let mut base = base_files(&pageserver, spec, elected.start_lsn).await?;
    warming.abort();
    timings.step("base_files");
    let looking = subscriptions::look(pageserver.clone(), spec, &base)?;
    let control_settings = ControlSettings::of(&spec.settings);
    let opening = open_term(&base, elected.start_lsn, &control_settings, now_seconds())?;
    proposer
        .identify(opening.system_identifier)
        .and_then(|()| proposer.append(opening.record.begin, opening.record.bytes.clone()))
        .map_err(|fenced| StartError::Fenced(fenced.0))?;
    timings.step("opening");
    let kept_files = KeptFiles::of(&base.files);
    let mut slots = Slots::take(&mut base.files, spec.branch_start_lsn);
    prepared.write(&base, &opening)?;
    let reader = wal_reader_config(spec);
    let (branch_start, end) = (spec.branch_start_lsn, elected.start_lsn);
    slots.fetch_wal(&reader, &prepared.data, opening.system_identifier, branch_start, end).await?;
    prepared.write_slots(&slots)?;
    let local = local_wal(&dir, &elected, &opening, kept_files);
    let backend = backend(spec, local, &proposer, pageserver, &prepared.cache);
    let server = ShimServer::bind(&dir.shim_socket(), backend.clone(), prepared.cache.clone())?;
    give(&dir.shim_socket(), owner)?;
    let shim_server = tokio::spawn(server.run(backend.stopping.clone()));
    let stop_serving = backend.stopping.clone().drop_guard();
    timings.step("data_dir");

    let mut environment = shim_environment(&spec.shim_path, &dir.pgdata(), &dir.shim_socket(), &prepared.cache_config);
    // What `dblink` and `postgres_fdw` take for the local server when nothing is said: it is this one.
    environment.push(("PGHOST".into(), dir.root().into()));
    let holds_subscriptions = subscriptions::may_exist(looking).await?;
    let settings = if holds_subscriptions { subscriptions::HELD } else { &[] };
    let bin_dir = spec.postgres_bin_dir.clone();
    let command = PostgresCommand { bin_dir, pgdata: dir.pgdata(), environment, settings, owner };
    let postgres = Postgres::spawn(command).await?;
    timings.step("exec");
    postgres.wait_ready(READY_LIMIT).await?;
    timings.step("postgres_ready");
    if let Some(spec) = &spec.catalog {
        catalog::apply(dir.root(), spec).await?;
        timings.step("catalog");
    }
    proposer.wait_committed(opening.record.end_lsn).await.map_err(|fenced| StartError::Fenced(fenced.0))?;
    // A compute that is only read syncs no WAL, but its pages' hint bits change: such pages may go again.
    prepared.cache.set_shipped(opening.record.end_lsn);
    prepared.cache.set_horizon(opening.record.end_lsn);
    timings.step("opening_committed");
    let ready = ComputeReady {
        agent_pid: std::process::id(),
        postgres_socket: dir.postgres_socket(),
        agent_socket: dir.agent_socket(),
        term: elected.term,
        start_lsn: elected.start_lsn,
        timings_us: timings.finish(),
        subscriptions_disabled: 0,
    };
    stop_serving.disarm();
    let Prepared { page_file, cache, .. } = prepared;
    let shipper = backend.shipper.clone();
    let system_identifier = opening.system_identifier;
    let sleeping_caches_bytes = spec.sleeping_caches_bytes;
    Ok(Compute {
        postgres,
        backend,
        shipper,
        proposer,
        system_identifier,
        ready,
        shim_server,
        cache,
        page_file,
        sleeping_caches_bytes,
        holds_subscriptions,
        dir,
    })
}

fn wal_reader_config(spec: &ComputeSpec) -> WalReaderConfig {
    WalReaderConfig { branch: spec.branch.clone(), safekeepers: spec.membership.all(), token: spec.token.clone() }
}

fn proposer_config(spec: &ComputeSpec) -> ProposerConfig {
    ProposerConfig {
        branch: spec.branch.clone(),
        membership: spec.membership.clone(),
        follows_membership: true,
        token: spec.token.clone(),
        branch_start_lsn: spec.branch_start_lsn,
        system_identifier: None,
    }
}

/// Opens the connection to the pageserver, and the branch there, while the election is still going on.
fn warm(pageserver: PageserverClient, spec: &ComputeSpec) -> JoinHandle<()> {
    let branch = spec.branch.clone();
    let at = ReadLsn { request: Lsn::MAX, not_modified_since: Lsn::INVALID };
    // `pg_database`, a relation that every branch has.
    let rel = RelTag { spc: oids::GLOBAL_TABLESPACE, db: 0, rel: 1262, fork: ForkNumber::Main };
    tokio::spawn(async move {
        if let Err(error) = pageserver.rel_size(&branch, rel, at).await {
            tracing::debug!(%error, "warming up the pageserver");
        }
    })
}

/// Makes the directories and the page cache, on a thread of its own.
async fn prepare(
    spec: &ComputeSpec,
    dir: &ComputeDir,
    owner: Option<Owner>,
    conf: String,
) -> Result<Prepared, StartError> {
    let cache_config = PageCacheConfig {
        shm_path: dir.page_cache_index(),
        pages_path: PageFile::path_in(&spec.page_cache_dir, &spec.endpoint, dir.root()),
        clean_bytes: spec.page_cache_bytes,
        kept_bytes: spec.kept_pages_bytes,
    };
    let page_cache_dir = spec.page_cache_dir.clone();
    let paths = ComputePaths::clone(dir);
    let work = move || -> Result<Prepared, StartError> {
        let data = DataDir::create(&paths, owner)?;
        data.write_file("postgresql.conf", conf.as_bytes())?;
        data.write_file("pg_hba.conf", PG_HBA.as_bytes())?;
        data.write_file("pg_ident.conf", b"")?;
        data.write_file("postgresql.auto.conf", b"")?;
        make_private_dir(&page_cache_dir, owner)?;
        let page_file = PageFile::claim(cache_config.pages_path.clone())?;
        let (cache, cached_as_of) = match page_file.take_asleep().and_then(|list| woken_cache(&cache_config, &list)) {
            Some((cache, as_of)) => (cache, Some(as_of)),
            None => (PageCache::create(&cache_config)?, None),
        };
        let prepared = Prepared { data, page_file, cache, cache_config, cached_as_of, owner };
        prepared.give_cache()?;
        Ok(prepared)
    };
    tokio::task::spawn_blocking(work).await.map_err(|error| StartError::Io(std::io::Error::other(error)))?
}

impl Prepared {
    fn give_cache(&self) -> std::io::Result<()> {
        give(&self.cache_config.shm_path, self.owner)?;
        give(&self.cache_config.pages_path, self.owner)
    }

    /// Throws away what the cache has from before a sleep unless it is of this branch as of `start`.
    fn check_cache(self, branch: &BranchRef, start: Lsn) -> Result<Prepared, StartError> {
        match &self.cached_as_of {
            Some(as_of) if *as_of == cached_as_of(branch, start) => {
                tracing::info!(bytes = self.cache.stats().clean_bytes, "the page cache is still warm");
                Ok(self)
            }
            Some(as_of) => {
                tracing::info!(as_of, "the branch was written to since the page cache fell asleep");
                let Prepared { data, page_file, cache, cache_config, owner, .. } = self;
                // The new one is made in the same files.
                drop(cache);
                let cache = PageCache::create(&cache_config)?;
                let prepared = Prepared { data, page_file, cache, cache_config, cached_as_of: None, owner };
                prepared.give_cache()?;
                Ok(prepared)
            }
            None => Ok(self),
        }
    }

    fn write(&self, base: &BaseFiles, opening: &Opening) -> Result<(), StartError> {
        self.data.write_base_files(base)?;
        self.data.write_file("global/pg_control", &opening.control_file)?;
        for segment in &opening.segments {
            self.data.write_segment(segment)?;
        }
        self.cache.set_unlogged(&base.unlogged)?;
        self.cache.set_shipped(base.lsn);
        Ok(())
    }

    fn write_slots(&self, slots: &Slots) -> Result<(), DataDirError> {
        slots.files().iter().try_for_each(|(path, content)| self.data.write_file(path, content))
    }
}

/// What Postgres will write, and where the agent notes what that says about pages.
fn local_wal(
    dir: &ComputeDir,
    elected: &Elected,
    opening: &Opening,
    kept_files: KeptFiles,
) -> (LocalWal, Arc<LastWritten>) {
    let last_written = Arc::new(LastWritten::new(elected.start_lsn));
    let record = &opening.record;
    let directory = dir.pgdata().join("pg_wal");
    let wal = LocalWal::new(directory, record.end_lsn, record.start_lsn, last_written.clone(), kept_files);
    (wal, last_written)
}

fn backend(
    spec: &ComputeSpec,
    (wal, last_written): (LocalWal, Arc<LastWritten>),
    proposer: &WalProposer,
    pageserver: PageserverClient,
    cache: &PageCache,
) -> Arc<AgentBackend> {
    Arc::new(AgentBackend {
        branch: spec.branch.clone(),
        pageserver,
        pageserver_ahead: PageserverClient::new(spec.pageserver.clone(), spec.token.clone()),
        proposer: proposer.clone(),
        cache: cache.clone(),
        shipper: WalShipper::new(wal, proposer.clone(), cache.clone()),
        last_written,
        storage_problem: Mutex::default(),
        give_up_reads: CancellationToken::new(),
        stopping: CancellationToken::new(),
    })
}

async fn base_files(pageserver: &PageserverClient, spec: &ComputeSpec, at: Lsn) -> Result<BaseFiles, StartError> {
    let base = patiently("base files", at, || pageserver.base_files(&spec.branch, at)).await;
    base.map_err(|error| StartError::BaseFiles(error.to_string()))
}

fn now_seconds() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64)
}
