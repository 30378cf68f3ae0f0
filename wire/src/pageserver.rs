//! Messages between a pageserver and its clients (compute agents and the control plane).
//!
//! After [`crate::Hello`], the client sends [`Request`]s and the pageserver answers each with a [`Response`] of the same
//! `id`, in any order. A compute's token lets it ask for its own branch only.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use types::{BlockNumber, BranchId, BranchRef, Generation, Lsn, Oid, PageTag, RelTag};

/// A numbered request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the client; unique among its unanswered requests on this connection.
    pub id: u64,
    /// The branch that is asked about.
    pub branch: BranchRef,
    /// What is asked.
    pub body: RequestBody,
}

/// At which point of a branch's history to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadLsn {
    /// The state as of this position is wanted. [`Lsn::MAX`]: as of the last record ingested.
    pub request: Lsn,
    /// The asker knows that what it asks for did not change in `(not_modified_since, request]`: the pageserver waits until
    /// it has ingested up to here, no further.
    pub not_modified_since: Lsn,
}

/// What may be asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum RequestBody {
    /// Pages, answered in the same order with [`ResponseBody::Pages`]. At most [`MAX_PAGES_PER_REQUEST`]. A block past the
    /// relation's end is a page of zeroes.
    GetPages { pages: Vec<PageTag>, at: ReadLsn },
    /// A fork's size; answered with [`ResponseBody::RelSize`].
    RelSize { rel: RelTag, at: ReadLsn },
    /// All forks of all relations of a database; answered with [`ResponseBody::Rels`].
    ListRels { spc: Oid, db: Oid, at: ReadLsn },
    /// What a data directory needs besides relations, as of exactly `at`; answered with [`ResponseBody::BaseFiles`].
    BaseFiles { at: Lsn },
    /// Make `Request::branch` a child of `ancestor`. Answered with [`ResponseBody::BranchCreated`]. Repeating the same
    /// call is harmless. Services only.
    CreateBranch { ancestor: BranchRef, at: BranchPoint },
    /// Remove the branch and its objects; refused with [`ErrorKind::Conflict`] while it has children. Services only.
    DeleteBranch,
    /// Where the branch stands; answered with [`ResponseBody::BranchInfo`]. Services only.
    BranchInfo,
    /// The last position all of whose commits are at or before this time (microseconds since 2000-01-01 UTC, as in WAL);
    /// answered with [`ResponseBody::Lsn`]. Services only.
    LsnByTimestamp { timestamp_us: i64 },
    /// Ingest up to here and upload all of it to the object store; answered with [`ResponseBody::Lsn`] (what the object
    /// store now holds). Services only.
    Checkpoint { up_to: Lsn },
    /// When the latest commit at or before this position was; answered with [`ResponseBody::Timestamp`]. Services only.
    TimestampByLsn { lsn: Lsn },
    /// Let go what only positions from before this time (microseconds since 2000-01-01 UTC) need, but for those at which
    /// children left the branch and those of `leases`; answered with [`ResponseBody::GarbageCollected`]. Services only.
    CollectGarbage { since_us: i64, leases: Vec<Lsn> },
    /// Give the branch all its data to itself, so that its ancestor can be deleted. Repeating it is harmless. Services only.
    DetachBranch,
    /// How large branches of `Request::branch`'s project are, each as of a position or later; at most
    /// [`MAX_BRANCHES_PER_REQUEST`]. Answered in the same order with [`ResponseBody::Sizes`]. Attaches only those whose
    /// manifests are not enough. Services only.
    Sizes { branches: Vec<(BranchId, Lsn)> },
    /// Serve `Request::branch`'s project from now on, writing under this generation, which is higher than any before:
    /// claims all its branches. Services only.
    TakeOver { generation: Generation },
    /// How far the branch has ingested WAL, of which there is some up to `committed`; answered with [`ResponseBody::Lsn`] at
    /// once. What is missing is fetched meanwhile.
    Ingested { committed: Lsn },
}

/// Most branches in one [`RequestBody::Sizes`].
pub const MAX_BRANCHES_PER_REQUEST: usize = 1000;

/// Most pages in one [`RequestBody::GetPages`].
pub const MAX_PAGES_PER_REQUEST: usize = 256;

/// Where a new branch leaves its ancestor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BranchPoint {
    /// At this position; the pageserver waits until it has ingested up to there.
    Lsn(Lsn),
    /// Where the ancestor's ingested WAL ends now (for an ancestor that is never written, such as a template).
    Head,
}

/// A numbered answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Response {
    /// The request's.
    pub id: u64,
    /// The answer.
    pub body: Result<ResponseBody, PageserverError>,
}

/// What may be answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ResponseBody {
    /// One page of [`types::PAGE_BYTES`] for each asked, in order.
    Pages(Vec<Bytes>),
    /// Blocks in the fork; `None` when it does not exist.
    RelSize(Option<BlockNumber>),
    /// Forks and their sizes in blocks.
    Rels(Vec<(RelTag, BlockNumber)>),
    /// See [`BaseFiles`].
    BaseFiles(Box<BaseFiles>),
    /// The exact position at which the branch left its ancestor.
    BranchCreated { lsn: Lsn },
    /// See [`BranchInfo`].
    BranchInfo(BranchInfo),
    /// A position.
    Lsn(Lsn),
    /// Done.
    Done,
    /// Microseconds since 2000-01-01 UTC; `None` when no commit's time is known at or before the position.
    Timestamp(Option<i64>),
    /// See [`GarbageReport`].
    GarbageCollected(GarbageReport),
    /// One for each branch asked about; `None`: there is no such branch, or it could not be read.
    Sizes(Vec<Option<BranchSizes>>),
}

/// The files of a data directory that are not relations, as of an LSN.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BaseFiles {
    /// As of where.
    pub lsn: Lsn,
    /// Start of the last record before `lsn` ([`Lsn::INVALID`] when not known): the next record's `xl_prev`.
    pub prev_record_lsn: Lsn,
    /// The whole `pg_control` as the template's `initdb` left it: system identifier, limits, locale checks.
    pub control_file: Bytes,
    /// The `CheckPoint` struct (`catalog/pg_control.h`) with all counters as of `lsn`: what the term's opening checkpoint
    /// record carries once `redo` and `time` are filled in.
    pub checkpoint: Bytes,
    /// Files by path relative to the data directory.
    pub files: Vec<BaseFile>,
    /// Directories that must exist, even if empty.
    pub directories: Vec<String>,
    /// Symbolic links below `pg_tblspc`: tablespace and the path it points to.
    pub tablespaces: Vec<(Oid, String)>,
    /// Relations that have an init fork (main forks): unlogged, to be reset from it.
    pub unlogged: Vec<RelTag>,
}

/// One file of [`BaseFiles`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BaseFile {
    /// Relative path with forward slashes; never absolute, never with `..`.
    pub path: String,
    /// Whole content.
    pub content: Bytes,
}

/// Where a branch stands on its pageserver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchInfo {
    /// End of the last record ingested.
    pub last_record_lsn: Lsn,
    /// Everything up to here is in the object store.
    pub remote_consistent_lsn: Lsn,
    /// Where it left its ancestor.
    pub ancestor: Option<(BranchRef, Lsn)>,
    /// Under which generation this pageserver writes.
    pub generation: Generation,
    /// Sum of all relations' sizes in bytes.
    pub logical_size_bytes: u64,
    /// Why ingestion stopped, when it did: for good, or until a safekeeper gives good WAL.
    pub ingest_error: Option<String>,
}

/// How large a branch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchSizes {
    /// As of where.
    pub last_record_lsn: Lsn,
    /// Sum of all relations' sizes.
    pub logical_bytes: u64,
    /// WAL of its own within the history that is kept.
    pub history_bytes: u64,
    /// Its own layers in the object store; what it shares with its ancestor is the ancestor's.
    pub stored_bytes: u64,
}

/// What a collection of garbage did, and what it left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GarbageReport {
    /// Every position from here on is readable.
    pub start_lsn: Lsn,
    /// End of the last record ingested.
    pub last_record_lsn: Lsn,
    /// A child keeps a position from before `start_lsn`.
    pub is_held: bool,
    /// Layers that are not part of the branch any more.
    pub removed_layers: u64,
    /// Their size in the object store.
    pub removed_bytes: u64,
}

/// What the asker can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorKind {
    /// Try again: the object store, a safekeeper or the WAL is not there yet.
    Unavailable,
    /// There is no such branch.
    NotFound,
    /// The request itself is wrong (an LSN outside history, too many pages).
    Invalid,
    /// The token does not allow it.
    Denied,
    /// The branch's state forbids it (children exist).
    Conflict,
    /// Stored data is damaged or WAL could not be understood: an operator must look.
    Corrupt,
}

/// An error from the pageserver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct PageserverError {
    /// What to do about it.
    pub kind: ErrorKind,
    /// What happened, for people.
    pub message: String,
}
