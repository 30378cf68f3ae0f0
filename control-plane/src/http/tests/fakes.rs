//! Storage and computes that keep count.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use control_plane_api::compute::{AgentStatus, CatalogSpec, ComputeReady, ComputeSpec, MembershipProgress};
use parking_lot::Mutex;
use safekeeper_client::{NodeStatus, ReplicationAddress};
use types::{BranchId, BranchRef, EndpointId, Generation, Lsn, Member, Membership, NodeId, ProjectId, Term};
use wire::pageserver::{BranchPoint, BranchSizes, GarbageReport};

use crate::{
    Problem,
    compute::{AgentProcess, ComputeLauncher, Launching, agent_http::AgentError, launcher::LaunchError},
    storage::Storage,
};

/// Where the WAL of every branch ends.
const HEAD: Lsn = Lsn(0x3000);

/// Storage that knows which branches there are.
#[derive(Default)]
pub(super) struct FakeStorage {
    pub(super) branches: Mutex<BTreeMap<BranchRef, (BranchRef, Lsn)>>,
    pub(super) settled: AtomicU32,
    pub(super) taken_over: Mutex<Vec<(ProjectId, Generation)>>,
    pub(super) placements: Mutex<Vec<(ProjectId, String)>>,
    /// Branch, start of the window, leases.
    pub(super) collected: Mutex<Vec<(BranchRef, i64, Vec<Lsn>)>>,
    pub(super) failing: AtomicBool,
    /// Safekeepers that don't answer, and such that are slow to have what is committed.
    pub(super) silent: Mutex<BTreeSet<NodeId>>,
    pub(super) slow: Mutex<BTreeSet<NodeId>>,
    /// What safekeepers have deleted.
    pub(super) deleted: Mutex<BTreeSet<(BranchRef, NodeId)>>,
    /// The last membership that a safekeeper was told of.
    pub(super) told: Mutex<BTreeMap<(BranchRef, NodeId), Membership>>,
    /// Elections under joint memberships.
    pub(super) carried: Mutex<Vec<(BranchRef, Membership)>>,
    /// WAL arrives only once it was settled.
    pub(super) forgetful: AtomicBool,
}

#[async_trait]
impl Storage for FakeStorage {
    async fn create_branch(&self, branch: &BranchRef, ancestor: &BranchRef, at: BranchPoint) -> Result<Lsn, Problem> {
        if self.failing.load(Ordering::Relaxed) {
            return Err(Problem::Unavailable("pageserver is away".into()));
        }
        while self.forgetful.load(Ordering::Relaxed) && self.settled.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let lsn = match at {
            BranchPoint::Lsn(lsn) => lsn,
            BranchPoint::Head => Lsn(0x1000),
        };
        self.branches.lock().insert(branch.clone(), (ancestor.clone(), lsn));
        Ok(lsn)
    }

    async fn take_over(&self, any_of_project: &BranchRef, generation: Generation) -> Result<(), Problem> {
        self.taken_over.lock().push((any_of_project.project.clone(), generation));
        Ok(())
    }

    fn set_placements(&self, placements: Vec<(ProjectId, String)>) {
        *self.placements.lock() = placements;
    }

    fn pageserver_of(&self, project: &ProjectId) -> String {
        let placed = self.placements.lock().iter().find(|(id, _)| id == project).map(|(_, address)| address.clone());
        placed.unwrap_or_else(|| "127.0.0.1:1".into())
    }

    async fn detach_branch(&self, branch: &BranchRef) -> Result<(), Problem> {
        self.branches.lock().get_mut(branch).expect("exists").0 = crate::storage::template();
        Ok(())
    }

    async fn checkpoint(&self, _branch: &BranchRef, _lsn: Lsn) -> Result<(), Problem> {
        Ok(())
    }

    async fn collect_garbage(
        &self,
        branch: &BranchRef,
        since_us: i64,
        leases: Vec<Lsn>,
    ) -> Result<GarbageReport, Problem> {
        self.collected.lock().push((branch.clone(), since_us, leases));
        let (start_lsn, last_record_lsn) = (HEAD, HEAD);
        Ok(GarbageReport { start_lsn, last_record_lsn, is_held: false, removed_layers: 2, removed_bytes: 100 })
    }

    async fn delete_branch(&self, branch: &BranchRef, safekeepers: &[Member]) -> Result<Vec<NodeId>, Problem> {
        let child = self.branches.lock().iter().find(|(_, (ancestor, _))| ancestor == branch).map(|(b, _)| b.clone());
        if let Some(child) = child {
            return Err(Problem::Conflict { code: "STORAGE_CONFLICT", message: format!("it has a child: {child}") });
        }
        self.branches.lock().remove(branch);
        let mut left = Vec::new();
        for safekeeper in safekeepers {
            if self.delete_from_safekeeper(branch, safekeeper).await.is_err() {
                left.push(safekeeper.node);
            }
        }
        Ok(left)
    }

    async fn delete_from_safekeeper(&self, branch: &BranchRef, safekeeper: &Member) -> Result<(), Problem> {
        if self.silent.lock().contains(&safekeeper.node) {
            return Err(Problem::Unavailable("it does not answer".into()));
        }
        self.deleted.lock().insert((branch.clone(), safekeeper.node));
        Ok(())
    }

    async fn lsn_by_timestamp(&self, branch: &BranchRef, timestamp_us: i64, _head: Lsn) -> Result<Lsn, Problem> {
        let start = self.branches.lock().get(branch).map_or(Lsn(0), |(_, lsn)| *lsn);
        let lsn = Lsn(timestamp_us.unsigned_abs());
        if lsn < start { Err(Problem::Invalid("before the start".into())) } else { Ok(lsn) }
    }

    async fn timestamp_by_lsn(&self, _branch: &BranchRef, lsn: Lsn) -> Result<Option<i64>, Problem> {
        Ok(i64::try_from(lsn.0).ok())
    }

    async fn settle(&self, _branch: &BranchRef, _start_lsn: Lsn, _membership: Membership) -> Result<Lsn, Problem> {
        self.settled.fetch_add(1, Ordering::Relaxed);
        Ok(HEAD)
    }

    async fn tell_membership(&self, branch: &BranchRef, to: &Member, membership: &Membership) -> Result<(), Problem> {
        if self.silent.lock().contains(&to.node) {
            return Err(Problem::Unavailable("it does not answer".into()));
        }
        self.told.lock().insert((branch.clone(), to.node), membership.clone());
        Ok(())
    }

    async fn carry_over(
        &self,
        branch: &BranchRef,
        _start_lsn: Lsn,
        joint: Membership,
        to: &[NodeId],
    ) -> Result<Vec<NodeId>, Problem> {
        self.carried.lock().push((branch.clone(), joint));
        Ok(to.iter().copied().filter(|node| self.slow.lock().contains(node)).collect())
    }

    async fn safekeeper_status(&self, address: &str) -> Result<NodeStatus, Problem> {
        let node = NodeId(address.trim_start_matches("sk").split(':').next().and_then(|n| n.parse().ok()).unwrap_or(0));
        let trouble = self.slow.lock().contains(&node).then(|| "write: no space left on device".to_owned());
        let address = format!("{}:7101", address.split(':').next().unwrap_or_default());
        let replication = (node != NodeId(2)).then_some(ReplicationAddress { address, tls: false });
        Ok(NodeStatus { node, trouble, free_bytes: 1 << 30, loaded_branches: 0, replication })
    }

    async fn sizes(
        &self,
        _project: &ProjectId,
        branches: Vec<(BranchId, Lsn)>,
    ) -> Result<Vec<Option<BranchSizes>>, Problem> {
        let sizes = |(_, up_to): (BranchId, Lsn)| BranchSizes {
            last_record_lsn: up_to,
            logical_bytes: 4096,
            history_bytes: up_to.0,
            stored_bytes: 100,
        };
        Ok(branches.into_iter().map(|asked| Some(sizes(asked))).collect())
    }
}

/// Computes that are numbers.
#[derive(Default)]
pub(super) struct FakeComputes {
    pub(super) next: AtomicU32,
    pub(super) alive: Mutex<BTreeMap<u32, BranchRef>>,
    pub(super) specs: Mutex<Vec<ComputeSpec>>,
    pub(super) applied: Mutex<Vec<CatalogSpec>>,
    pub(super) told: Mutex<Vec<Membership>>,
    pub(super) membership: Mutex<Option<MembershipProgress>>,
    pub(super) idle_ms: AtomicU64,
    pub(super) failing: AtomicBool,
}

pub(super) struct FakeLaunching(Arc<FakeComputes>, u32);

#[async_trait]
impl Launching for FakeLaunching {
    fn process(&self) -> AgentProcess {
        AgentProcess { pid: self.1, started_ticks: 0 }
    }

    async fn start(self: Box<Self>, spec: &ComputeSpec, _limit: Duration) -> Result<ComputeReady, LaunchError> {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if self.0.failing.load(Ordering::Relaxed) {
            return Err(LaunchError::Failed("no quorum".into()));
        }
        self.0.alive.lock().insert(self.1, spec.branch.clone());
        self.0.specs.lock().push(spec.clone());
        Ok(ComputeReady {
            agent_pid: self.1,
            postgres_socket: spec.compute_dir.join(".s.PGSQL.5432"),
            agent_socket: self.1.to_string().into(),
            term: Term(u64::from(self.1)),
            start_lsn: spec.branch_start_lsn,
            timings_us: Vec::new(),
            subscriptions_disabled: 0,
        })
    }
}

impl FakeComputes {
    fn pid(socket: &Path) -> u32 {
        socket.to_str().and_then(|text| text.parse().ok()).expect("a fake socket")
    }
}

pub(super) struct FakeLauncher(pub(super) Arc<FakeComputes>);

#[async_trait]
impl ComputeLauncher for FakeLauncher {
    async fn spawn(&self, _endpoint: &EndpointId) -> Result<Box<dyn Launching>, LaunchError> {
        let pid = self.0.next.fetch_add(1, Ordering::Relaxed) + 1;
        Ok(Box::new(FakeLaunching(Arc::clone(&self.0), pid)))
    }

    fn is_alive(&self, process: AgentProcess) -> bool {
        self.0.alive.lock().contains_key(&process.pid)
    }

    async fn status(&self, socket: &Path) -> Result<AgentStatus, AgentError> {
        let pid = FakeComputes::pid(socket);
        let branch = self.0.alive.lock().get(&pid).cloned();
        let branch = branch.ok_or_else(|| AgentError::Refused("gone".into()))?;
        Ok(AgentStatus {
            running: true,
            branch,
            commit_lsn: Lsn(0x2000),
            idle_ms: self.0.idle_ms.load(Ordering::Relaxed),
            connections: 0,
            membership: self.0.membership.lock().clone(),
            problem: None,
        })
    }

    async fn stop(&self, socket: &Path, _limit: Duration) -> Result<Option<Lsn>, AgentError> {
        self.0.alive.lock().remove(&FakeComputes::pid(socket));
        Ok(Some(Lsn(0x2800)))
    }

    async fn apply(&self, _socket: &Path, catalog: &CatalogSpec, _limit: Duration) -> Result<(), AgentError> {
        self.0.applied.lock().push(catalog.clone());
        Ok(())
    }

    async fn set_membership(&self, _socket: &Path, membership: &Membership) -> Result<(), AgentError> {
        self.0.told.lock().push(membership.clone());
        Ok(())
    }

    fn kill(&self, process: AgentProcess) {
        self.0.alive.lock().remove(&process.pid);
    }
}
