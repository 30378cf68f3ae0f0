//! What can go wrong in storage, and what the asker is told.

use types::{BranchRef, Lsn, ProjectId};
use wire::pageserver::{ErrorKind, PageserverError};

/// Why storage could not do what was asked. Cheap to clone: several askers may wait for one load.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StorageError {
    /// The object store did not do it; it may, later.
    #[error("object store, {object}: {reason}")]
    Store {
        /// The object.
        object: String,
        /// What happened.
        reason: String,
    },
    /// Something stored is not what was stored.
    #[error("damaged object {object}: {reason}")]
    Damaged {
        /// The object.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A stored record could not be applied, or a value that must exist is missing.
    #[error("{branch}: {what} at {lsn} cannot be made: {reason}")]
    Unmakeable {
        /// The branch.
        branch: BranchRef,
        /// The key.
        what: String,
        /// As of where.
        lsn: Lsn,
        /// Why.
        reason: String,
    },
    /// WAL could not be understood; ingestion stands still.
    #[error("{branch}: ingestion stopped at {at}: {reason}")]
    IngestStopped {
        /// The branch.
        branch: BranchRef,
        /// End of the last record ingested.
        at: Lsn,
        /// Why.
        reason: String,
    },
    /// The WAL did not come in time.
    #[error("{branch}: WAL up to {wanted} has not arrived within {waited_s} s (have {have}){detail}")]
    NotArrived {
        /// The branch.
        branch: BranchRef,
        /// Up to where it was needed.
        wanted: Lsn,
        /// What there is.
        have: Lsn,
        /// How long was waited.
        waited_s: u64,
        /// What the WAL's source last complained of; empty or starting with a colon.
        detail: String,
    },
    /// What was given as the branch's WAL is none; others may give good WAL for the same place.
    #[error("{branch}: after {at}: {reason}")]
    Undecodable {
        /// The branch.
        branch: BranchRef,
        /// End of the last good record.
        at: Lsn,
        /// Why.
        reason: String,
    },
    /// No such branch.
    #[error("branch {0} does not exist")]
    NoBranch(BranchRef),
    /// The request is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The branch's state forbids it.
    #[error("{0}")]
    Conflict(String),
    /// Another pageserver has taken the branch over.
    #[error("{branch}: generation {newer:08x} has taken over from this pageserver's {own:08x}")]
    Deposed {
        /// The branch.
        branch: BranchRef,
        /// This pageserver's.
        own: u32,
        /// The other's.
        newer: u32,
    },
    /// Another pageserver serves the project.
    #[error("project {0} is served by another pageserver")]
    Elsewhere(ProjectId),
    /// What was known of the branch is out of date; asking again finds the newest.
    #[error("{0} was removed, or changed by another pageserver, meanwhile; ask again")]
    Stale(BranchRef),
    /// The pageserver is stopping.
    #[error("the pageserver is stopping")]
    Stopping,
}

impl StorageError {
    /// What the asker can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            StorageError::Store { .. }
            | StorageError::NotArrived { .. }
            | StorageError::Undecodable { .. }
            | StorageError::Deposed { .. }
            | StorageError::Elsewhere(_)
            | StorageError::Stale(_)
            | StorageError::Stopping => ErrorKind::Unavailable,
            StorageError::Damaged { .. } | StorageError::Unmakeable { .. } | StorageError::IngestStopped { .. } => {
                ErrorKind::Corrupt
            }
            StorageError::NoBranch(_) => ErrorKind::NotFound,
            StorageError::Invalid(_) => ErrorKind::Invalid,
            StorageError::Conflict(_) => ErrorKind::Conflict,
        }
    }
}

impl From<StorageError> for PageserverError {
    fn from(error: StorageError) -> PageserverError {
        PageserverError { kind: error.kind(), message: error.to_string() }
    }
}
