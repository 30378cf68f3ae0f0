//! What the control plane asks of pageserver and safekeepers.

use std::{collections::HashMap, time::Duration};

use async_trait::async_trait;
use futures::future::join_all;
use pageserver_client::{ClientError, PageserverClient};
use parking_lot::RwLock;
use safekeeper_client::{NodeStatus, ProposerConfig};
use types::{BranchId, BranchRef, ForkNumber, Generation, Lsn, Member, Membership, NodeId, ProjectId, RelTag, oids};
use wire::pageserver::{BranchPoint, BranchSizes, ErrorKind, GarbageReport, ReadLsn};

use crate::problem::Problem;

/// Longest wait for a quorum when a branch's end of WAL must be learned.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for a safekeeper to take note of a branch's membership.
const TELL_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for new safekeepers of a branch to have all that is committed; then it is tried again. Wakes wait for it.
const CATCH_UP_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for a safekeeper to say how it does, which is only shown.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest wait for a safekeeper to forget a branch.
const SAFEKEEPER_DELETE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for branches' sizes, which are only shown.
const SIZES_TIMEOUT: Duration = Duration::from_secs(5);
/// `pg_database`'s file in a template: any relation will do to wait for ingestion.
const PG_DATABASE: RelTag = RelTag { spc: oids::GLOBAL_TABLESPACE, db: 0, rel: 1262, fork: ForkNumber::Main };

/// Branches' storage. The real one is [`Services`]; tests have their own.
#[async_trait]
pub trait Storage: Send + Sync + 'static {
    /// Makes `branch` from `ancestor`; answers where exactly. Repeating it is harmless.
    async fn create_branch(&self, branch: &BranchRef, ancestor: &BranchRef, at: BranchPoint) -> Result<Lsn, Problem>;

    /// Has the project's pageserver claim all its branches under a generation higher than any before.
    async fn take_over(&self, any_of_project: &BranchRef, generation: Generation) -> Result<(), Problem>;

    /// Which projects are served where (`host:port`); all others by the pageserver of the settings.
    fn set_placements(&self, placements: Vec<(ProjectId, String)>);

    /// Where the project's pageserver is reached.
    fn pageserver_of(&self, project: &ProjectId) -> String;

    /// Gives a branch all its data to itself, so that what it comes from can be deleted. Repeating it is harmless.
    async fn detach_branch(&self, branch: &BranchRef) -> Result<(), Problem>;

    /// Brings everything up to `lsn` to the object store, so that nothing else has to keep it.
    async fn checkpoint(&self, branch: &BranchRef, lsn: Lsn) -> Result<(), Problem>;

    /// Lets go what only positions from before `since_us` (microseconds since 2000) need, but for those of `leases`.
    async fn collect_garbage(
        &self,
        branch: &BranchRef,
        since_us: i64,
        leases: Vec<Lsn>,
    ) -> Result<GarbageReport, Problem>;

    /// Removes a branch from the pageserver and from safekeepers: answers which of these did not say that it is done. Repeating
    /// it is harmless.
    async fn delete_branch(&self, branch: &BranchRef, safekeepers: &[Member]) -> Result<Vec<NodeId>, Problem>;

    /// Removes a branch, of which nothing else is left, from one safekeeper. Repeating it is harmless.
    async fn delete_from_safekeeper(&self, branch: &BranchRef, safekeeper: &Member) -> Result<(), Problem>;

    /// The last position whose commits are all at or before `timestamp_us` (microseconds since 2000), in a history that ends
    /// at `head`.
    async fn lsn_by_timestamp(&self, branch: &BranchRef, timestamp_us: i64, head: Lsn) -> Result<Lsn, Problem>;

    /// When the latest commit at or before `lsn` was, microseconds since 2000; `None` when no commit's time is known there.
    async fn timestamp_by_lsn(&self, branch: &BranchRef, lsn: Lsn) -> Result<Option<i64>, Problem>;

    /// The end of a branch's WAL. Fences any compute: the caller makes sure that none runs.
    async fn settle(&self, branch: &BranchRef, start_lsn: Lsn, membership: Membership) -> Result<Lsn, Problem>;

    /// Tells a safekeeper of a branch's membership, which is stored.
    async fn tell_membership(&self, branch: &BranchRef, to: &Member, membership: &Membership) -> Result<(), Problem>;

    /// Establishes a joint membership of a branch that no compute runs on, and waits a while for these safekeepers to have
    /// everything that is committed; those that have not. Fences any compute.
    async fn carry_over(
        &self,
        branch: &BranchRef,
        start_lsn: Lsn,
        joint: Membership,
        to: &[NodeId],
    ) -> Result<Vec<NodeId>, Problem>;

    /// How a safekeeper does.
    async fn safekeeper_status(&self, address: &str) -> Result<NodeStatus, Problem>;

    /// How large branches of a project are, each as of a position or later; for information only.
    async fn sizes(
        &self,
        project: &ProjectId,
        branches: Vec<(BranchId, Lsn)>,
    ) -> Result<Vec<Option<BranchSizes>>, Problem>;
}

/// The database that the template has: a project that is called after another one drops it at its first wake.
pub const DEFAULT_DATABASE: &str = "dormouse";

/// The branch that every project's first branch is made from.
pub fn template() -> BranchRef {
    BranchRef {
        project: ProjectId::new("dormouse-template").expect("a valid id"),
        branch: BranchId::new("pg15").expect("a valid id"),
    }
}

/// Pageservers and safekeepers over the network.
pub struct Services {
    default_pageserver: PageserverClient,
    /// Projects that were given to other pageservers.
    placed: RwLock<HashMap<ProjectId, PageserverClient>>,
    token: String,
}

impl Services {
    /// `token` has scope `Service`.
    pub fn new(pageserver: String, token: String) -> Services {
        let default_pageserver = PageserverClient::new(pageserver, token.clone());
        Services { default_pageserver, placed: RwLock::default(), token }
    }

    fn client(&self, project: &ProjectId) -> PageserverClient {
        self.placed.read().get(project).unwrap_or(&self.default_pageserver).clone()
    }

    fn pageserver(&self, branch: &BranchRef) -> PageserverClient {
        self.client(&branch.project)
    }

    fn proposer_config(&self, branch: &BranchRef, start_lsn: Lsn, membership: Membership) -> ProposerConfig {
        ProposerConfig {
            branch: branch.clone(),
            membership,
            // The store knows the newest; and a service's token is shown to no address that safekeepers name.
            follows_membership: false,
            token: self.token.clone(),
            branch_start_lsn: start_lsn,
            system_identifier: None,
        }
    }
}

fn problem(error: ClientError) -> Problem {
    let retryable = error.is_retryable();
    match error {
        ClientError::Transport { .. } => Problem::Unavailable(error.to_string()),
        ClientError::Unexpected { .. } => Problem::Internal(error.to_string()),
        ClientError::Pageserver(error) => match error.kind {
            ErrorKind::Unavailable => Problem::Unavailable(format!("the pageserver is not ready: {error}")),
            ErrorKind::Invalid => Problem::Invalid(error.message),
            ErrorKind::Conflict => Problem::Conflict { code: "STORAGE_CONFLICT", message: error.message },
            ErrorKind::NotFound | ErrorKind::Denied | ErrorKind::Corrupt => {
                debug_assert!(!retryable);
                Problem::Internal(format!("pageserver: {error}"))
            }
        },
    }
}

#[async_trait]
impl Storage for Services {
    async fn create_branch(&self, branch: &BranchRef, ancestor: &BranchRef, at: BranchPoint) -> Result<Lsn, Problem> {
        self.pageserver(branch).create_branch(branch, ancestor, at).await.map_err(problem)
    }

    async fn take_over(&self, any_of_project: &BranchRef, generation: Generation) -> Result<(), Problem> {
        self.pageserver(any_of_project).take_over(any_of_project, generation).await.map_err(problem)
    }

    fn set_placements(&self, placements: Vec<(ProjectId, String)>) {
        let mut placed = self.placed.write();
        let known = std::mem::take(&mut *placed);
        for (project, address) in placements {
            let open = known.get(&project).filter(|client| client.address() == address).cloned();
            let client = open.unwrap_or_else(|| PageserverClient::new(address, self.token.clone()));
            placed.insert(project, client);
        }
    }

    fn pageserver_of(&self, project: &ProjectId) -> String {
        self.client(project).address().to_owned()
    }

    async fn detach_branch(&self, branch: &BranchRef) -> Result<(), Problem> {
        self.pageserver(branch).detach_branch(branch).await.map_err(problem)
    }

    async fn checkpoint(&self, branch: &BranchRef, lsn: Lsn) -> Result<(), Problem> {
        self.pageserver(branch).checkpoint(branch, lsn).await.map(|_| ()).map_err(problem)
    }

    async fn collect_garbage(
        &self,
        branch: &BranchRef,
        since_us: i64,
        leases: Vec<Lsn>,
    ) -> Result<GarbageReport, Problem> {
        self.pageserver(branch).collect_garbage(branch, since_us, leases).await.map_err(problem)
    }

    async fn delete_branch(&self, branch: &BranchRef, safekeepers: &[Member]) -> Result<Vec<NodeId>, Problem> {
        match self.pageserver(branch).delete_branch(branch).await {
            Ok(()) => {}
            Err(ClientError::Pageserver(error)) if error.kind == ErrorKind::NotFound => {}
            Err(error) => return Err(problem(error)),
        }
        let deletions = safekeepers.iter().map(|safekeeper| async move {
            let deleted = self.delete_from_safekeeper(branch, safekeeper).await;
            let failed = deleted.err().inspect(|error| {
                tracing::warn!(%branch, safekeeper = %safekeeper.node, %error, "it will be asked again");
            });
            failed.map(|_| safekeeper.node)
        });
        Ok(join_all(deletions).await.into_iter().flatten().collect())
    }

    async fn delete_from_safekeeper(&self, branch: &BranchRef, safekeeper: &Member) -> Result<(), Problem> {
        let deletion = safekeeper_client::delete_branch(&safekeeper.address, &self.token, branch);
        match tokio::time::timeout(SAFEKEEPER_DELETE_TIMEOUT, deletion).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Problem::Unavailable(format!("safekeeper did not delete the branch: {error}"))),
            Err(_) => Err(Problem::Unavailable("safekeeper did not answer a deletion".into())),
        }
    }

    async fn lsn_by_timestamp(&self, branch: &BranchRef, timestamp_us: i64, head: Lsn) -> Result<Lsn, Problem> {
        // A pageserver that lags behind would find an older position: have it catch up first.
        let caught_up = ReadLsn { request: head, not_modified_since: head };
        self.pageserver(branch).rel_size(branch, PG_DATABASE, caught_up).await.map_err(problem)?;
        self.pageserver(branch).lsn_by_timestamp(branch, timestamp_us).await.map_err(problem)
    }

    async fn timestamp_by_lsn(&self, branch: &BranchRef, lsn: Lsn) -> Result<Option<i64>, Problem> {
        self.pageserver(branch).timestamp_by_lsn(branch, lsn).await.map_err(problem)
    }

    async fn settle(&self, branch: &BranchRef, start_lsn: Lsn, membership: Membership) -> Result<Lsn, Problem> {
        let config = self.proposer_config(branch, start_lsn, membership);
        match tokio::time::timeout(SETTLE_TIMEOUT, safekeeper_client::settle(config)).await {
            Ok(Ok(lsn)) => Ok(lsn),
            Ok(Err(error)) => Err(Problem::Unavailable(format!("end of the branch's WAL: {error}"))),
            Err(_) => Err(Problem::Unavailable("no majority of safekeepers answered; try again".into())),
        }
    }

    async fn tell_membership(&self, branch: &BranchRef, to: &Member, membership: &Membership) -> Result<(), Problem> {
        let telling = safekeeper_client::set_branch_membership(&to.address, &self.token, branch, membership);
        match tokio::time::timeout(TELL_TIMEOUT, telling).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(Problem::Unavailable(error.to_string())),
            Err(_) => Err(Problem::Unavailable(format!("safekeeper {} at {} did not answer", to.node, to.address))),
        }
    }

    async fn carry_over(
        &self,
        branch: &BranchRef,
        start_lsn: Lsn,
        joint: Membership,
        to: &[NodeId],
    ) -> Result<Vec<NodeId>, Problem> {
        let config = self.proposer_config(branch, start_lsn, joint);
        let carrying = safekeeper_client::carry_over(config, to, CATCH_UP_LIMIT);
        match tokio::time::timeout(SETTLE_TIMEOUT, carrying).await {
            Ok(Ok(lagging)) => Ok(lagging),
            Ok(Err(error)) => Err(Problem::Unavailable(format!("election: {error}"))),
            Err(_) => Err(Problem::Unavailable("no majority of the old and of the new safekeepers answered".into())),
        }
    }

    async fn safekeeper_status(&self, address: &str) -> Result<NodeStatus, Problem> {
        match tokio::time::timeout(STATUS_TIMEOUT, safekeeper_client::node_status(address, &self.token)).await {
            Ok(Ok(status)) => Ok(status),
            Ok(Err(error)) => Err(Problem::Unavailable(error.to_string())),
            Err(_) => Err(Problem::Unavailable("it does not answer".into())),
        }
    }

    async fn sizes(
        &self,
        project: &ProjectId,
        branches: Vec<(BranchId, Lsn)>,
    ) -> Result<Vec<Option<BranchSizes>>, Problem> {
        match tokio::time::timeout(SIZES_TIMEOUT, self.client(project).sizes(project, branches)).await {
            Ok(answer) => answer.map_err(problem),
            Err(_) => Err(Problem::Unavailable("the pageserver did not answer in time".into())),
        }
    }
}
