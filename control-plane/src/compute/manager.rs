//! Wakes computes and puts them to sleep.
//!
//! Each branch has a [`Slot`]. Whoever changes whether its compute runs holds the slot's turn, so that at most one compute of
//! a branch is ever started from here, a wake during a suspend waits and then starts, and concurrent wakes share one start.
//! Whether a compute is awake is kept in memory: the fast path of a wake asks neither the store nor the agent.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use control_plane_api::{
    compute::{CatalogSpec, ComputeSpec},
    internal::Wake,
    v2::Operation,
};
use parking_lot::{Mutex, RwLock};
use time::OffsetDateTime;
use tokio::task::JoinHandle;
use types::{BranchId, BranchRef, EndpointId, Lsn, Membership, NodeId};
use wire::{Scope, TokenSigner};

use super::{
    agent_http::AgentError,
    idle,
    launcher::{AgentProcess, ComputeLauncher, LaunchError},
    watch,
};
use crate::{
    problem::Problem,
    storage::Storage,
    store::{
        self, Store,
        branches::{self, BranchRow},
        catalog,
        endpoints::{self, EndpointRow},
        memberships,
        operations::{self, Action},
    },
};

/// How long an agent's token is good.
const AGENT_TOKEN_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// Longest wait for an agent to stop Postgres and have its last WAL at a quorum.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for roles and databases to be applied.
const APPLY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a stopped agent may take to exit.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// What all computes have in common.
#[derive(Clone)]
pub struct ComputeSettings {
    /// Compute directories are made in it; a short path.
    pub runtime_dir: PathBuf,
    /// Page caches are made in it; on disk.
    pub page_cache_dir: PathBuf,
    /// The directory of `postgres`.
    pub postgres_bin_dir: PathBuf,
    /// The shim's shared object.
    pub shim_path: PathBuf,
    /// The user to run Postgres as, when root.
    pub postgres_user: Option<String>,
    /// Limit of clean pages in each page cache, bytes.
    pub page_cache_bytes: u64,
    /// Limit of evicted dirty pages in each page cache, bytes.
    pub kept_pages_bytes: u64,
    /// Limit of what page caches of sleeping computes take together, bytes.
    pub sleeping_caches_bytes: u64,
    /// Longest wait for a compute to be ready.
    pub wake_timeout: Duration,
}

/// All computes of this control plane; cheap to clone.
#[derive(Clone)]
pub struct Computes {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) store: Store,
    pub(super) storage: Arc<dyn Storage>,
    pub(super) launcher: Arc<dyn ComputeLauncher>,
    signer: TokenSigner,
    settings: ComputeSettings,
    slots: Mutex<HashMap<BranchId, Arc<Slot>>>,
    routes: RwLock<HashMap<EndpointId, Arc<Route>>>,
    closed: std::sync::atomic::AtomicBool,
}

/// What a wake needs to know of an endpoint.
pub(super) struct Route {
    pub(super) endpoint: EndpointId,
    disabled: bool,
    pub(super) suspend_timeout: Option<Duration>,
    pub(super) slot: Arc<Slot>,
}

/// A branch's compute.
pub(super) struct Slot {
    pub(super) branch: BranchRef,
    /// Held by whoever starts or stops the compute.
    pub(super) turn: Arc<tokio::sync::Mutex<()>>,
    pub(super) state: Mutex<SlotState>,
}

pub(super) struct SlotState {
    pub(super) phase: Phase,
    /// Starts tried so far, and how the last one failed if it did.
    attempts: u64,
    failure: Option<Problem>,
    pub(super) last_wake: Instant,
}

/// Whether a compute runs.
#[derive(Clone)]
pub(super) enum Phase {
    Idle,
    Starting(EndpointId),
    Awake(Arc<Running>),
    Stopping(EndpointId),
}

/// A compute that takes connections.
pub(super) struct Running {
    pub(super) endpoint: EndpointId,
    pub(super) process: AgentProcess,
    pub(super) agent_socket: PathBuf,
    pub(super) postgres_socket: PathBuf,
    /// When it last did something, as far as is known.
    pub(super) last_active: Mutex<OffsetDateTime>,
}

/// Why a compute is put to sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SuspendReason {
    /// Nothing happened for the endpoint's timeout.
    Idle,
    /// Someone asked for it.
    Requested,
    /// Its endpoint or branch is being deleted.
    Deleted,
    /// Its branch is being restored to another state.
    Restored,
    /// The installation stops.
    Shutdown,
}

/// An endpoint's state as the API names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndpointState {
    /// `init`, `active` or `idle`.
    pub current: &'static str,
    /// What it is changing to.
    pub pending: Option<&'static str>,
    /// When its running compute last did something.
    pub last_active: Option<OffsetDateTime>,
}

impl Computes {
    /// With nothing running; call [`Computes::adopt`] before the first wake.
    pub fn new(
        store: Store,
        storage: Arc<dyn Storage>,
        launcher: Arc<dyn ComputeLauncher>,
        signer: TokenSigner,
        settings: ComputeSettings,
    ) -> Computes {
        let inner = Inner {
            store,
            storage,
            launcher,
            signer,
            settings,
            slots: Mutex::default(),
            routes: RwLock::default(),
            closed: std::sync::atomic::AtomicBool::new(false),
        };
        Computes { inner: Arc::new(inner) }
    }

    /// Where the endpoint takes connections; starts its compute when it sleeps.
    pub async fn wake(&self, endpoint: &EndpointId) -> Result<Wake, Problem> {
        self.wake_for(endpoint, None).await
    }

    /// Begins to wake the endpoint; the operation says how it goes.
    pub async fn wake_in_background(&self, branch: &BranchRef, endpoint: &EndpointId) -> Result<Operation, Problem> {
        let (wanted, id) = (branch.clone(), endpoint.clone());
        let begun = self.inner.store.call(move |db| operations::begin(db, &wanted, Some(&id), Action::StartCompute));
        let operation = begun.await?;
        let (this, endpoint, id) = (self.clone(), endpoint.clone(), operation.id.clone());
        tokio::spawn(async move {
            let woken = this.wake_for(&endpoint, Some(id.clone())).await;
            let error = woken.err().map(|e| e.to_string());
            let ended = this.inner.store.call(move |db| operations::end(db, &id, error.as_deref())).await;
            if let Err(error) = ended {
                tracing::error!(%error, "recording a compute's start");
            }
        });
        Ok(operation)
    }

    async fn wake_for(&self, endpoint: &EndpointId, operation: Option<String>) -> Result<Wake, Problem> {
        let route = self.route(endpoint).await?;
        if route.disabled {
            return Err(disabled(endpoint));
        }
        let attempts_before = match self.awake(&route) {
            Ok(running) => return Ok(answer(&running, false)),
            Err(attempts) => attempts,
        };
        // A start that was begun is finished even if the one who asked for it is gone.
        let this = self.clone();
        let task = tokio::spawn(async move { this.wake_slowly(&route, attempts_before, operation).await });
        task.await.unwrap_or_else(|e| Err(Problem::Internal(format!("wake: {e}"))))
    }

    /// The running compute, noting that it was asked for; else the number of starts tried so far.
    fn awake(&self, route: &Route) -> Result<Arc<Running>, u64> {
        let mut state = route.slot.state.lock();
        if let Phase::Awake(running) = &state.phase {
            let running = Arc::clone(running);
            if running.endpoint == route.endpoint && self.inner.launcher.is_alive(running.process) {
                state.last_wake = Instant::now();
                return Ok(running);
            }
        }
        Err(state.attempts)
    }

    async fn wake_slowly(
        &self,
        route: &Arc<Route>,
        attempts_before: u64,
        operation: Option<String>,
    ) -> Result<Wake, Problem> {
        let slot = &route.slot;
        let _turn = slot.turn.lock().await;
        if let Ok(running) = self.awake(route) {
            return Ok(answer(&running, true));
        }
        {
            // Whoever waited while another's start failed shares that failure instead of trying for another minute.
            let state = slot.state.lock();
            if let Some(failure) = state.failure.as_ref().filter(|_| state.attempts > attempts_before) {
                return Err(failure.clone());
            }
        }
        self.bury(slot).await?;
        if self.inner.closed.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(Problem::Unavailable("the control plane is stopping".into()));
        }
        slot.state.lock().phase = Phase::Starting(route.endpoint.clone());
        let started = self.start(route, operation).await;
        let mut state = slot.state.lock();
        state.attempts += 1;
        match started {
            Ok(running) => {
                let running = Arc::new(running);
                state.failure = None;
                state.last_wake = Instant::now();
                state.phase = Phase::Awake(Arc::clone(&running));
                drop(state);
                watch::watch(self.clone(), Arc::clone(route), Arc::clone(&running));
                Ok(answer(&running, true))
            }
            Err(problem) => {
                state.failure = Some(problem.clone());
                state.phase = Phase::Idle;
                Err(problem)
            }
        }
    }

    /// Starts the compute. The caller holds the turn.
    async fn start(&self, route: &Arc<Route>, operation: Option<String>) -> Result<Running, Problem> {
        let endpoint = route.endpoint.clone();
        let began = Instant::now();
        // The process is loaded and recorded first and told its spec last: no compute ever runs that the store knows nothing of.
        let launching = self.inner.launcher.spawn(&endpoint).await.map_err(launch_problem)?;
        let process = launching.process();
        let branch = route.slot.branch.clone();
        let prepared = self.inner.store.call(move |db| prepare_start(db, &branch, &endpoint, process, operation)).await;
        let Prepared { row, timeline, start_lsn, membership, catalog, inherits_subscriptions, operation } =
            match prepared {
                Ok(prepared) => prepared,
                Err(problem) => {
                    self.inner.launcher.kill(process);
                    return Err(problem);
                }
            };
        let (version, catalog) = catalog.map_or((None, None), |(version, spec)| (Some(version), Some(spec)));
        let spec = self.spec(&row, timeline, start_lsn, membership, catalog)?;
        let spec = ComputeSpec { disable_subscriptions: inherits_subscriptions, ..spec };
        let outcome = launching.start(&spec, self.inner.settings.wake_timeout).await;
        match outcome {
            Ok(ready) => {
                let elapsed_ms = began.elapsed().as_millis();
                tracing::info!(endpoint = %row.id, branch = %row.branch, term = %ready.term, lsn = %ready.start_lsn, elapsed_ms, "compute is awake");
                let recording = self.record_awake(&row, &spec, version, operation);
                if ready.subscriptions_disabled > 0 {
                    tracing::info!(branch = %row.branch, count = ready.subscriptions_disabled, "subscriptions were disabled");
                    // Were it lost, those that are enabled again meanwhile would be disabled once more.
                    let _ = recording.await;
                }
                Ok(Running {
                    endpoint: row.id,
                    process,
                    agent_socket: ready.agent_socket,
                    postgres_socket: ready.postgres_socket,
                    last_active: Mutex::new(OffsetDateTime::now_utc()),
                })
            }
            Err(error) => {
                tracing::warn!(endpoint = %row.id, branch = %row.branch, %error, "compute did not start");
                self.inner.launcher.kill(process);
                let (text, endpoint) = (error.to_string(), row.id);
                self.inner
                    .store
                    .call(move |db| {
                        endpoints::asleep(db, &endpoint, None)?;
                        operations::end(db, &operation, Some(&text))
                    })
                    .await?;
                Err(launch_problem(error))
            }
        }
    }

    /// Need not be waited for: were it lost, the catalog would only be applied once more.
    fn record_awake(
        &self,
        row: &EndpointRow,
        spec: &ComputeSpec,
        catalog_version: Option<i64>,
        operation: String,
    ) -> JoinHandle<()> {
        let (store, endpoint, branch) = (self.inner.store.clone(), row.id.clone(), row.branch.branch.clone());
        let inheriting = spec.disable_subscriptions.then(|| spec.branch.branch.clone());
        tokio::spawn(async move {
            let recorded = store.call(move |db| {
                endpoints::awake(db, &endpoint)?;
                if let Some(timeline) = inheriting {
                    branches::subscriptions_are_its_own(db, &timeline)?;
                }
                if let Some(version) = catalog_version {
                    catalog::applied(db, &branch, version)?;
                }
                operations::end(db, &operation, None)
            });
            if let Err(error) = recorded.await {
                tracing::error!(%error, "recording a compute's start");
            }
        })
    }

    fn spec(
        &self,
        row: &EndpointRow,
        timeline: BranchRef,
        start_lsn: Lsn,
        membership: Membership,
        catalog: Option<CatalogSpec>,
    ) -> Result<ComputeSpec, Problem> {
        let settings = &self.inner.settings;
        let scope = Scope::Branch { branch: timeline.clone() };
        let token = self.inner.signer.sign(scope, AGENT_TOKEN_LIFETIME);
        Ok(ComputeSpec {
            branch: timeline,
            endpoint: row.id.clone(),
            branch_start_lsn: start_lsn,
            compute_dir: self.compute_dir(&row.id),
            page_cache_dir: settings.page_cache_dir.join(row.id.as_str()),
            membership,
            pageserver: self.inner.storage.pageserver_of(&row.branch.project),
            token: token.map_err(|e| Problem::Internal(e.to_string()))?,
            postgres_bin_dir: settings.postgres_bin_dir.clone(),
            shim_path: settings.shim_path.clone(),
            postgres_user: settings.postgres_user.clone(),
            settings: BTreeMap::clone(&row.settings.pg_settings),
            catalog,
            disable_subscriptions: false,
            page_cache_bytes: settings.page_cache_bytes,
            kept_pages_bytes: settings.kept_pages_bytes,
            sleeping_caches_bytes: settings.sleeping_caches_bytes,
        })
    }

    /// A token for whoever follows a timeline's WAL.
    pub fn wal_reader_token(&self, timeline: BranchRef, lifetime: Duration) -> Result<String, Problem> {
        let token = self.inner.signer.sign(Scope::WalReader { branch: timeline }, lifetime);
        token.map_err(|error| Problem::Internal(error.to_string()))
    }

    pub(super) fn compute_dir(&self, endpoint: &EndpointId) -> PathBuf {
        self.inner.settings.runtime_dir.join(endpoint.as_str())
    }

    /// Puts a branch's compute to sleep if it runs; `None` when it did not.
    pub async fn suspend(&self, branch: &BranchRef, reason: SuspendReason) -> Result<Option<Operation>, Problem> {
        let slot = self.slot(branch);
        let this = self.clone();
        let task = tokio::spawn(async move {
            let _turn = Arc::clone(&slot.turn).lock_owned().await;
            let phase = slot.state.lock().phase.clone();
            match phase {
                Phase::Awake(running) if this.inner.launcher.is_alive(running.process) => {
                    this.stop(&slot, &running, reason).await.map(Some)
                }
                Phase::Idle | Phase::Starting(_) | Phase::Awake(_) | Phase::Stopping(_) => {
                    this.bury(&slot).await.map(|()| None)
                }
            }
        });
        task.await.unwrap_or_else(|e| Err(Problem::Internal(format!("suspend: {e}"))))
    }

    /// Stops a running compute. The caller holds the turn.
    pub(super) async fn stop(
        &self,
        slot: &Slot,
        running: &Running,
        reason: SuspendReason,
    ) -> Result<Operation, Problem> {
        slot.state.lock().phase = Phase::Stopping(running.endpoint.clone());
        let (branch, endpoint) = (slot.branch.clone(), running.endpoint.clone());
        let action = Action::SuspendCompute;
        let began = self.inner.store.call(move |db| operations::begin(db, &branch, Some(&endpoint), action)).await;
        let stopped = self.inner.launcher.stop(&running.agent_socket, STOP_TIMEOUT).await;
        let clean = stopped.is_ok() && self.wait_for_exit(running.process).await;
        let settled = stopped.as_ref().ok().copied().flatten().filter(|_| clean);
        match &stopped {
            Ok(_) => {
                tracing::info!(endpoint = %running.endpoint, branch = %slot.branch, ?reason, clean, ?settled, "compute sleeps")
            }
            Err(error) => {
                tracing::warn!(endpoint = %running.endpoint, branch = %slot.branch, ?reason, %error, "compute had to be killed")
            }
        }
        // Also sweeps up what a clean stop may have left in its process group.
        self.inner.launcher.kill(running.process);
        slot.state.lock().phase = Phase::Idle;
        let operation = began?;
        let last_active = store::at(*running.last_active.lock());
        let (endpoint, branch, id) = (running.endpoint.clone(), slot.branch.clone(), operation.id);
        let recorded = self.inner.store.call(move |db| {
            endpoints::asleep(db, &endpoint, Some(last_active))?;
            branches::set_settled(db, &branch.branch, settled)?;
            operations::end(db, &id, None)?;
            let row = branches::find(db, &branch.project, &branch.branch)?;
            Ok((operations::get(db, &branch.project, &id)?, row))
        });
        let (operation, row) = recorded.await?;
        if let (Some(row), Some(settled), false) = (row, settled, reason == SuspendReason::Deleted) {
            self.store_in_background(row.timeline, settled);
        }
        Ok(operation)
    }

    /// A sleeping branch's WAL goes to the object store, so that its sizes are known and safekeepers can forget it. Were it
    /// not done, whoever reads the branch next would do it.
    fn store_in_background(&self, timeline: BranchRef, lsn: Lsn) {
        let storage = Arc::clone(&self.inner.storage);
        tokio::spawn(async move {
            if let Err(error) = storage.checkpoint(&timeline, lsn).await {
                tracing::debug!(branch = %timeline, %error, "a sleeping branch is not in the object store yet");
            }
        });
    }

    async fn wait_for_exit(&self, process: AgentProcess) -> bool {
        let deadline = Instant::now() + EXIT_TIMEOUT;
        while self.inner.launcher.is_alive(process) {
            if Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        true
    }

    /// Notes that a compute which should run is dead. The caller holds the turn.
    pub(super) async fn bury(&self, slot: &Slot) -> Result<(), Problem> {
        let Phase::Awake(running) = slot.state.lock().phase.clone() else { return Ok(()) };
        tracing::warn!(endpoint = %running.endpoint, branch = %slot.branch, "compute died");
        self.inner.launcher.kill(running.process);
        slot.state.lock().phase = Phase::Idle;
        let last_active = store::at(*running.last_active.lock());
        let (endpoint, branch) = (running.endpoint.clone(), slot.branch.branch.clone());
        self.inner
            .store
            .call(move |db| {
                endpoints::asleep(db, &endpoint, Some(last_active))?;
                branches::set_settled(db, &branch, None)
            })
            .await
    }

    /// Puts a branch's compute to sleep and starts none until the answer is dropped: wakes wait. The end of the branch's
    /// WAL is then known to the store.
    pub async fn pause(&self, branch: &BranchRef, reason: SuspendReason) -> Result<Paused, Problem> {
        let slot = self.slot(branch);
        let turn = Arc::clone(&slot.turn).lock_owned().await;
        let phase = slot.state.lock().phase.clone();
        match phase {
            Phase::Awake(running) if self.inner.launcher.is_alive(running.process) => {
                self.stop(&slot, &running, reason).await?;
            }
            Phase::Idle | Phase::Starting(_) | Phase::Awake(_) | Phase::Stopping(_) => self.bury(&slot).await?,
        }
        self.settled_head(branch).await?;
        Ok(Paused { _turn: turn })
    }

    /// The end of a branch's WAL: everything committed before this call is before it.
    pub async fn head(&self, branch: &BranchRef) -> Result<Lsn, Problem> {
        let slot = self.slot(branch);
        let _turn = slot.turn.lock().await;
        let phase = slot.state.lock().phase.clone();
        if let Phase::Awake(running) = phase {
            match self.inner.launcher.status(&running.agent_socket).await {
                Ok(status) => return Ok(status.commit_lsn),
                Err(error) if self.inner.launcher.is_alive(running.process) => {
                    return Err(Problem::Unavailable(format!("the branch's compute does not answer: {error}")));
                }
                Err(_) => self.bury(&slot).await?,
            }
        }
        self.settled_head(branch).await
    }

    /// The end of a branch's WAL as far as it can be told at once: a running compute says it, of a sleeping one the store
    /// knows it. [`Lsn::INVALID`] when neither does.
    pub async fn known_head(&self, row: &BranchRow) -> Lsn {
        let slot = self.inner.slots.lock().get(&row.branch.branch).cloned();
        let phase = slot.map_or(Phase::Idle, |slot| slot.state.lock().phase.clone());
        match phase {
            Phase::Awake(running) => {
                let status = self.inner.launcher.status(&running.agent_socket).await;
                status.map_or(Lsn::INVALID, |status| status.commit_lsn)
            }
            Phase::Idle | Phase::Starting(_) | Phase::Stopping(_) => row.settled_lsn.unwrap_or(Lsn::INVALID),
        }
    }

    /// The caller holds the turn, and no compute runs.
    async fn settled_head(&self, branch: &BranchRef) -> Result<Lsn, Problem> {
        let wanted = branch.clone();
        let row = self.inner.store.call(move |db| branches::get(db, &wanted.project, &wanted.branch)).await?;
        match row.settled_lsn {
            Some(settled) => Ok(settled),
            None => self.settle(&row).await,
        }
    }

    /// Has safekeepers agree again on the end of a sleeping branch's WAL. They may have forgotten, in a crash, how much of it
    /// is committed, and pageservers get no more than that; without a compute nobody else would tell them.
    pub async fn settle_again(&self, branch: &BranchRef) -> Result<(), Problem> {
        let slot = self.slot(branch);
        let _turn = slot.turn.lock().await;
        if !matches!(slot.state.lock().phase, Phase::Idle) {
            return Ok(());
        }
        let wanted = branch.clone();
        let row = self.inner.store.call(move |db| branches::get(db, &wanted.project, &wanted.branch)).await?;
        self.settle(&row).await.map(|_| ())
    }

    /// The caller holds the turn, and no compute runs.
    async fn settle(&self, row: &BranchRow) -> Result<Lsn, Problem> {
        let timeline = row.timeline.branch.clone();
        let membership = self.inner.store.call(move |db| memberships::of(db, &timeline)).await?;
        let head = self.inner.storage.settle(&row.timeline, row.start_lsn, membership).await?;
        let id = row.branch.branch.clone();
        self.inner.store.call(move |db| branches::set_settled(db, &id, Some(head))).await?;
        Ok(head)
    }

    /// Brings a branch under its joint membership, and these safekeepers, which are new, up to what is committed: by its compute if
    /// one runs, else by an election. True when the joint membership is established and all of these have everything.
    pub async fn carry_over(&self, row: &BranchRow, joint: &Membership, to: &[NodeId]) -> Result<bool, Problem> {
        let slot = self.slot(&row.branch);
        let _turn = slot.turn.lock().await;
        let phase = slot.state.lock().phase.clone();
        if let Phase::Awake(running) = phase {
            match self.carry_over_awake(&running, joint, to).await {
                Err(error) if self.inner.launcher.is_alive(running.process) => return Err(error),
                Err(_) => self.bury(&slot).await?,
                Ok(done) => return Ok(done),
            }
        }
        let lagging = self.inner.storage.carry_over(&row.timeline, row.start_lsn, joint.clone(), to).await?;
        Ok(lagging.is_empty())
    }

    async fn carry_over_awake(&self, running: &Running, joint: &Membership, to: &[NodeId]) -> Result<bool, Problem> {
        let unavailable = |error: AgentError| Problem::Unavailable(format!("the branch's compute: {error}"));
        let launcher = &self.inner.launcher;
        launcher.set_membership(&running.agent_socket, joint).await.map_err(unavailable)?;
        let status = launcher.status(&running.agent_socket).await.map_err(unavailable)?;
        let now = status.membership.filter(|now| now.generation == joint.generation && now.established);
        Ok(now.is_some_and(|now| !now.lagging.iter().any(|node| to.contains(node))))
    }

    /// Tells a branch's compute, if one runs, of another membership.
    pub async fn tell_membership(&self, branch: &BranchRef, membership: &Membership) -> Result<(), Problem> {
        let slot = self.inner.slots.lock().get(&branch.branch).cloned();
        let phase = slot.map_or(Phase::Idle, |slot| slot.state.lock().phase.clone());
        let Phase::Awake(running) = phase else { return Ok(()) };
        let told = self.inner.launcher.set_membership(&running.agent_socket, membership).await;
        told.map_err(|error| Problem::Unavailable(format!("the branch's compute: {error}")))
    }

    /// Brings changed roles and databases to a running compute; a sleeping one gets them when it wakes (`None`).
    pub async fn apply_catalog(&self, branch: &BranchRef) -> Result<Option<Operation>, Problem> {
        let slot = self.slot(branch);
        let this = self.clone();
        let task = tokio::spawn(async move {
            let _turn = slot.turn.lock().await;
            let Phase::Awake(running) = slot.state.lock().phase.clone() else { return Ok(None) };
            this.apply_to(&slot, &running).await
        });
        task.await.unwrap_or_else(|e| Err(Problem::Internal(format!("apply: {e}"))))
    }

    async fn apply_to(&self, slot: &Slot, running: &Running) -> Result<Option<Operation>, Problem> {
        let (branch, endpoint) = (slot.branch.clone(), running.endpoint.clone());
        let begun = self.inner.store.call(move |db| {
            let Some(pending) = catalog::pending(db, &branch.branch)? else { return Ok(None) };
            Ok(Some((pending, operations::begin(db, &branch, Some(&endpoint), Action::ApplyConfig)?)))
        });
        let Some(((version, spec), operation)) = begun.await? else { return Ok(None) };
        let applied = self.inner.launcher.apply(&running.agent_socket, &spec, APPLY_TIMEOUT).await;
        let error = applied.err().map(|e| e.to_string());
        if let Some(error) = &error {
            tracing::warn!(endpoint = %running.endpoint, branch = %slot.branch, error, "roles and databases were not applied");
        }
        let branch = slot.branch.clone();
        self.inner
            .store
            .call(move |db| {
                operations::end(db, &operation.id, error.as_deref())?;
                if error.is_none() {
                    catalog::applied(db, &branch.branch, version)?;
                }
                operations::get(db, &branch.project, &operation.id).map(Some)
            })
            .await
    }

    /// Stops all computes, at once, and starts no more.
    pub async fn stop_all(&self) {
        self.inner.closed.store(true, std::sync::atomic::Ordering::Relaxed);
        let branches: Vec<BranchRef> = self.inner.slots.lock().values().map(|slot| slot.branch.clone()).collect();
        let stops = branches.iter().map(|branch| self.suspend(branch, SuspendReason::Shutdown));
        for stopped in futures::future::join_all(stops).await {
            if let Err(error) = stopped {
                tracing::warn!(%error, "stopping a compute");
            }
        }
    }

    /// An endpoint's state, from memory.
    pub fn state(&self, endpoint: &EndpointRow) -> EndpointState {
        let slot = self.inner.slots.lock().get(&endpoint.branch.branch).cloned();
        let phase = slot.map_or(Phase::Idle, |slot| slot.state.lock().phase.clone());
        let last_active = match &phase {
            Phase::Awake(running) if running.endpoint == endpoint.id => Some(*running.last_active.lock()),
            Phase::Idle | Phase::Starting(_) | Phase::Awake(_) | Phase::Stopping(_) => None,
        };
        let (current, pending) = match phase {
            Phase::Starting(id) if id == endpoint.id => ("init", Some("active")),
            Phase::Awake(running) if running.endpoint == endpoint.id => ("active", None),
            Phase::Stopping(id) if id == endpoint.id => ("active", Some("idle")),
            Phase::Idle | Phase::Starting(_) | Phase::Awake(_) | Phase::Stopping(_) => ("idle", None),
        };
        EndpointState { current, pending, last_active }
    }

    /// An endpoint was changed or deleted: what is cached about it is void.
    pub fn forget(&self, endpoint: &EndpointId) {
        self.inner.routes.write().remove(endpoint);
    }

    /// A branch is gone for good.
    pub fn forget_branch(&self, branch: &BranchId) {
        self.inner.slots.lock().remove(branch);
        self.inner.routes.write().retain(|_, route| route.slot.branch.branch != *branch);
    }

    /// Removes an endpoint's cached pages; its compute is stopped.
    pub async fn remove_files(&self, endpoint: &EndpointId) {
        for directory in [self.compute_dir(endpoint), self.inner.settings.page_cache_dir.join(endpoint.as_str())] {
            let _ = tokio::fs::remove_dir_all(directory).await;
        }
    }

    pub(super) fn slot(&self, branch: &BranchRef) -> Arc<Slot> {
        let mut slots = self.inner.slots.lock();
        let slot = slots.entry(branch.branch.clone()).or_insert_with(|| {
            let state = SlotState { phase: Phase::Idle, attempts: 0, failure: None, last_wake: Instant::now() };
            Arc::new(Slot { branch: branch.clone(), turn: Arc::default(), state: Mutex::new(state) })
        });
        Arc::clone(slot)
    }

    pub(super) async fn route(&self, endpoint: &EndpointId) -> Result<Arc<Route>, Problem> {
        if let Some(route) = self.inner.routes.read().get(endpoint) {
            return Ok(Arc::clone(route));
        }
        let id = endpoint.clone();
        let row = self.inner.store.call(move |db| {
            let row = endpoints::find(db, &id)?.ok_or_else(|| Problem::not_found("endpoint", &id))?;
            branches::get(db, &row.branch.project, &row.branch.branch)?;
            Ok(row)
        });
        let row = row.await?;
        let route = Arc::new(Route {
            endpoint: row.id.clone(),
            disabled: row.disabled,
            suspend_timeout: idle::timeout(row.suspend_timeout_seconds),
            slot: self.slot(&row.branch),
        });
        self.inner.routes.write().insert(row.id, Arc::clone(&route));
        Ok(route)
    }
}

/// A branch whose compute sleeps and is not woken until this is dropped.
pub struct Paused {
    _turn: tokio::sync::OwnedMutexGuard<()>,
}

/// What [`prepare_start`] learned and wrote.
struct Prepared {
    row: EndpointRow,
    timeline: BranchRef,
    start_lsn: Lsn,
    membership: Membership,
    catalog: Option<(i64, CatalogSpec)>,
    inherits_subscriptions: bool,
    operation: String,
}

/// Before an agent gets its spec: from now on the branch may get WAL that nobody here knows of.
fn prepare_start(
    db: &rusqlite::Connection,
    branch: &BranchRef,
    endpoint: &EndpointId,
    process: AgentProcess,
    operation: Option<String>,
) -> Result<Prepared, Problem> {
    let row = endpoints::get(db, &branch.project, endpoint)?;
    if row.disabled {
        return Err(disabled(endpoint));
    }
    let branch_row = branches::get(db, &branch.project, &branch.branch)?;
    branches::set_settled(db, &branch.branch, None)?;
    endpoints::agent_started(db, endpoint, process)?;
    let operation = match operation {
        Some(begun) => begun,
        None => operations::begin(db, branch, Some(endpoint), Action::StartCompute)?.id,
    };
    let catalog = catalog::pending(db, &branch.branch)?;
    let membership = memberships::of(db, &branch_row.timeline.branch)?;
    let BranchRow { timeline, start_lsn, inherits_subscriptions, .. } = branch_row;
    Ok(Prepared { row, timeline, start_lsn, membership, catalog, inherits_subscriptions, operation })
}

fn answer(running: &Running, cold: bool) -> Wake {
    Wake { endpoint: running.endpoint.clone(), postgres_socket: running.postgres_socket.clone(), cold }
}

fn disabled(endpoint: &EndpointId) -> Problem {
    Problem::Forbidden(format!("endpoint {endpoint} is disabled by its owner"))
}

fn launch_problem(error: LaunchError) -> Problem {
    Problem::Unavailable(error.to_string())
}
