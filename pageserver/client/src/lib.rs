//! A client of the pageserver: one pipelined connection that is opened on demand and reopened after a failure.
//!
//! - [`PageserverClient`]: typed calls; cheap to clone, clones share the connection.
//! - `connection`: one TCP connection, its reader and writer tasks.

mod connection;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use types::{BlockNumber, BranchId, BranchRef, Generation, Lsn, Oid, PageTag, ProjectId, RelTag};
use wire::pageserver::{
    BaseFiles, BranchInfo, BranchPoint, BranchSizes, ErrorKind, GarbageReport, PageserverError, ReadLsn, RequestBody,
    ResponseBody,
};

use connection::Connection;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest wait for the answer to a read. The pageserver itself gives up waiting for WAL after 30 s.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest wait for the answer to what may upload a lot.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(180);

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The pageserver could not be reached, or the connection broke before it answered. Every call may be repeated.
    #[error("pageserver at {address}: {reason}")]
    Transport {
        /// Where the pageserver should be.
        address: String,
        /// What happened.
        reason: String,
    },
    /// The pageserver answered with an error. Its kind says whether to try again.
    #[error("pageserver: {0}")]
    Pageserver(#[from] PageserverError),
    /// The answer does not fit the question: the two sides disagree about the protocol.
    #[error("pageserver gave an unexpected answer to {asked}")]
    Unexpected {
        /// Which call.
        asked: &'static str,
    },
}

impl ClientError {
    /// True when the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            ClientError::Transport { .. } => true,
            ClientError::Pageserver(error) => error.kind == ErrorKind::Unavailable,
            ClientError::Unexpected { .. } => false,
        }
    }
}

/// Talks to one pageserver over one pipelined connection. Calls may be made from many tasks at once.
#[derive(Clone)]
pub struct PageserverClient {
    shared: Arc<Shared>,
}

struct Shared {
    address: String,
    token: String,
    connection: tokio::sync::Mutex<Option<Arc<Connection>>>,
}

impl std::fmt::Debug for PageserverClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageserverClient").field("address", &self.shared.address).finish_non_exhaustive()
    }
}

macro_rules! expect_answer {
    ($call:expr, $asked:literal, $answer:pat => $value:expr) => {
        match $call {
            $answer => Ok($value),
            _ => Err(ClientError::Unexpected { asked: $asked }),
        }
    };
}

impl PageserverClient {
    /// For the pageserver at `address` (`host:port`), shown `token` at connecting. Connects at the first call.
    pub fn new(address: String, token: String) -> Self {
        let shared = Shared { address, token, connection: tokio::sync::Mutex::new(None) };
        Self { shared: Arc::new(shared) }
    }

    /// Where the pageserver is.
    pub fn address(&self) -> &str {
        &self.shared.address
    }

    /// One request and its answer. A connection that turns out to have died meanwhile is replaced, once, unseen.
    pub async fn call(&self, branch: &BranchRef, body: RequestBody) -> Result<ResponseBody, ClientError> {
        let limit = timeout_of(&body);
        let answer = tokio::time::timeout(limit, self.call_unbounded(branch, body)).await;
        match answer {
            Ok(answer) => answer,
            Err(_) => Err(self.transport(format!("no answer within {} s", limit.as_secs()))),
        }
    }

    async fn call_unbounded(&self, branch: &BranchRef, body: RequestBody) -> Result<ResponseBody, ClientError> {
        let (connection, reused) = self.connection().await?;
        match connection.call(branch, body.clone()).await {
            Ok(answer) => return Ok(answer?),
            Err(reason) if !reused => return Err(self.transport(reason)),
            Err(reason) => tracing::debug!(address = %self.shared.address, reason, "pageserver connection was lost"),
        }
        let (connection, _) = self.connection().await?;
        match connection.call(branch, body).await {
            Ok(answer) => Ok(answer?),
            Err(reason) => Err(self.transport(reason)),
        }
    }

    /// The open connection, or a new one; true when it was open before.
    async fn connection(&self) -> Result<(Arc<Connection>, bool), ClientError> {
        let mut slot = self.shared.connection.lock().await;
        if let Some(open) = slot.as_ref().filter(|connection| !connection.is_closed()) {
            return Ok((open.clone(), true));
        }
        *slot = None;
        let opening = Connection::open(&self.shared.address, &self.shared.token);
        let opened = match tokio::time::timeout(CONNECT_TIMEOUT, opening).await {
            Ok(opened) => opened,
            Err(_) => return Err(self.transport(format!("no connection within {} s", CONNECT_TIMEOUT.as_secs()))),
        };
        let connection = Arc::new(opened.map_err(|error| match error {
            connection::OpenError::Denied(message) => {
                ClientError::Pageserver(PageserverError { kind: ErrorKind::Denied, message })
            }
            connection::OpenError::Transport(reason) => self.transport(reason),
        })?);
        *slot = Some(connection.clone());
        Ok((connection, false))
    }

    fn transport(&self, reason: String) -> ClientError {
        ClientError::Transport { address: self.shared.address.clone(), reason }
    }

    /// Pages in the order asked, at most [`wire::pageserver::MAX_PAGES_PER_REQUEST`].
    pub async fn get_pages(
        &self,
        branch: &BranchRef,
        pages: Vec<PageTag>,
        at: ReadLsn,
    ) -> Result<Vec<Bytes>, ClientError> {
        let asked = pages.len();
        let answer = self.call(branch, RequestBody::GetPages { pages, at }).await?;
        let pages = expect_answer!(answer, "GetPages", ResponseBody::Pages(pages) => pages)?;
        let whole = pages.len() == asked && pages.iter().all(|page| page.len() == types::PAGE_BYTES);
        if whole { Ok(pages) } else { Err(ClientError::Unexpected { asked: "GetPages" }) }
    }

    /// Blocks in a fork; `None` when it does not exist.
    pub async fn rel_size(
        &self,
        branch: &BranchRef,
        rel: RelTag,
        at: ReadLsn,
    ) -> Result<Option<BlockNumber>, ClientError> {
        let answer = self.call(branch, RequestBody::RelSize { rel, at }).await?;
        expect_answer!(answer, "RelSize", ResponseBody::RelSize(size) => size)
    }

    /// All forks of all relations of a database, with their sizes in blocks.
    pub async fn list_rels(
        &self,
        branch: &BranchRef,
        spc: Oid,
        db: Oid,
        at: ReadLsn,
    ) -> Result<Vec<(RelTag, BlockNumber)>, ClientError> {
        let answer = self.call(branch, RequestBody::ListRels { spc, db, at }).await?;
        expect_answer!(answer, "ListRels", ResponseBody::Rels(rels) => rels)
    }

    /// What a data directory needs besides relations, as of exactly `at`.
    pub async fn base_files(&self, branch: &BranchRef, at: Lsn) -> Result<BaseFiles, ClientError> {
        let answer = self.call(branch, RequestBody::BaseFiles { at }).await?;
        expect_answer!(answer, "BaseFiles", ResponseBody::BaseFiles(files) => *files)
    }

    /// Makes `branch` a child of `ancestor`; answers the exact position. Repeating it is harmless.
    pub async fn create_branch(
        &self,
        branch: &BranchRef,
        ancestor: &BranchRef,
        at: BranchPoint,
    ) -> Result<Lsn, ClientError> {
        let body = RequestBody::CreateBranch { ancestor: ancestor.clone(), at };
        let answer = self.call(branch, body).await?;
        expect_answer!(answer, "CreateBranch", ResponseBody::BranchCreated { lsn } => lsn)
    }

    /// Removes a branch that has no children.
    pub async fn delete_branch(&self, branch: &BranchRef) -> Result<(), ClientError> {
        let answer = self.call(branch, RequestBody::DeleteBranch).await?;
        expect_answer!(answer, "DeleteBranch", ResponseBody::Done => ())
    }

    /// Where the branch stands.
    pub async fn branch_info(&self, branch: &BranchRef) -> Result<BranchInfo, ClientError> {
        let answer = self.call(branch, RequestBody::BranchInfo).await?;
        expect_answer!(answer, "BranchInfo", ResponseBody::BranchInfo(info) => info)
    }

    /// How far the branch has ingested WAL, of which there is some up to `committed`. Does not wait for it.
    pub async fn ingested(&self, branch: &BranchRef, committed: Lsn) -> Result<Lsn, ClientError> {
        let answer = self.call(branch, RequestBody::Ingested { committed }).await?;
        expect_answer!(answer, "Ingested", ResponseBody::Lsn(lsn) => lsn)
    }

    /// The last position all of whose commits are at or before `timestamp_us` (microseconds since 2000-01-01 UTC).
    pub async fn lsn_by_timestamp(&self, branch: &BranchRef, timestamp_us: i64) -> Result<Lsn, ClientError> {
        let answer = self.call(branch, RequestBody::LsnByTimestamp { timestamp_us }).await?;
        expect_answer!(answer, "LsnByTimestamp", ResponseBody::Lsn(lsn) => lsn)
    }

    /// When the latest commit at or before `lsn` was, microseconds since 2000-01-01 UTC; `None` when that is not known.
    pub async fn timestamp_by_lsn(&self, branch: &BranchRef, lsn: Lsn) -> Result<Option<i64>, ClientError> {
        let answer = self.call(branch, RequestBody::TimestampByLsn { lsn }).await?;
        expect_answer!(answer, "TimestampByLsn", ResponseBody::Timestamp(timestamp_us) => timestamp_us)
    }

    /// Lets go what only positions from before `since_us` (microseconds since 2000-01-01 UTC) need, but for those of children
    /// and `leases`.
    pub async fn collect_garbage(
        &self,
        branch: &BranchRef,
        since_us: i64,
        leases: Vec<Lsn>,
    ) -> Result<GarbageReport, ClientError> {
        let answer = self.call(branch, RequestBody::CollectGarbage { since_us, leases }).await?;
        expect_answer!(answer, "CollectGarbage", ResponseBody::GarbageCollected(report) => report)
    }

    /// How large branches of the project are, each as of a position or later, in the order asked.
    pub async fn sizes(
        &self,
        project: &ProjectId,
        branches: Vec<(BranchId, Lsn)>,
    ) -> Result<Vec<Option<BranchSizes>>, ClientError> {
        let Some((first, _)) = branches.first() else { return Ok(Vec::new()) };
        let (asked, branch) = (branches.len(), BranchRef { project: project.clone(), branch: first.clone() });
        let answer = self.call(&branch, RequestBody::Sizes { branches }).await?;
        let sizes = expect_answer!(answer, "Sizes", ResponseBody::Sizes(sizes) => sizes)?;
        if sizes.len() == asked { Ok(sizes) } else { Err(ClientError::Unexpected { asked: "Sizes" }) }
    }

    /// Has the pageserver serve a project from now on, under a generation higher than any before.
    pub async fn take_over(&self, any_of_project: &BranchRef, generation: Generation) -> Result<(), ClientError> {
        let answer = self.call(any_of_project, RequestBody::TakeOver { generation }).await?;
        expect_answer!(answer, "TakeOver", ResponseBody::Done => ())
    }

    /// Gives the branch all its data to itself.
    pub async fn detach_branch(&self, branch: &BranchRef) -> Result<(), ClientError> {
        let answer = self.call(branch, RequestBody::DetachBranch).await?;
        expect_answer!(answer, "DetachBranch", ResponseBody::Done => ())
    }

    /// Ingests up to `up_to` and uploads everything; answers what the object store now holds.
    pub async fn checkpoint(&self, branch: &BranchRef, up_to: Lsn) -> Result<Lsn, ClientError> {
        let answer = self.call(branch, RequestBody::Checkpoint { up_to }).await?;
        expect_answer!(answer, "Checkpoint", ResponseBody::Lsn(lsn) => lsn)
    }
}

fn timeout_of(body: &RequestBody) -> Duration {
    match body {
        RequestBody::GetPages { .. }
        | RequestBody::RelSize { .. }
        | RequestBody::ListRels { .. }
        | RequestBody::BaseFiles { .. }
        | RequestBody::Ingested { .. }
        | RequestBody::BranchInfo
        | RequestBody::LsnByTimestamp { .. }
        | RequestBody::TimestampByLsn { .. }
        | RequestBody::Sizes { .. } => READ_TIMEOUT,
        RequestBody::CreateBranch { .. }
        | RequestBody::DeleteBranch
        | RequestBody::CollectGarbage { .. }
        | RequestBody::DetachBranch
        | RequestBody::TakeOver { .. }
        | RequestBody::Checkpoint { .. } => CHANGE_TIMEOUT,
    }
}

#[cfg(test)]
mod tests;
