//! What an agent must be able to answer.

use async_trait::async_trait;
use bytes::Bytes;
use types::{BlockNumber, Oid, PageTag, RelTag};

/// Answers the shim's questions. Calls come from many backends at once.
///
/// A call waits while what it needs is merely unreachable; it fails only when waiting cannot help.
#[async_trait]
pub trait ShimBackend: Send + Sync + 'static {
    /// The latest version of the page that WAL describes ([`types::PAGE_BYTES`] bytes; zeroes past the end). The caller
    /// holds no newer version.
    async fn get_page(&self, tag: PageTag) -> Result<Bytes, BackendError>;

    /// Pages that nobody has asked for yet, for the cache. Left out: those that may have changed since, and those that hold
    /// nothing.
    async fn get_pages_ahead(&self, tags: Vec<PageTag>) -> Result<Vec<(PageTag, Bytes)>, BackendError>;

    /// Blocks in the fork; `None` when it does not exist.
    async fn rel_size(&self, rel: RelTag) -> Result<Option<BlockNumber>, BackendError>;

    /// All forks of all relations of a database directory.
    async fn list_rels(&self, spc: Oid, db: Oid) -> Result<Vec<(RelTag, BlockNumber)>, BackendError>;

    /// Returns when a quorum holds every whole record that Postgres has written to `pg_wal` so far. Before it returns, the
    /// page cache's horizon is up to date with those records.
    async fn sync_wal(&self) -> Result<(), BackendError>;

    /// Much WAL has been written that nobody has asked to be synced yet: it may be sent on by now. Errors are for the next sync.
    async fn wal_written(&self);
}

/// Waiting does not help: the shim turns it into an errno.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BackendError {
    /// A newer compute has taken the branch over: `EIO`; on WAL, Postgres panics, which is right.
    #[error("fenced by a newer term: {0}")]
    Fenced(String),
    /// Storage refused or is damaged: `EIO`.
    #[error("storage: {0}")]
    Storage(String),
    /// The compute is stopping: `EIO`.
    #[error("the compute is stopping")]
    Stopping,
}
