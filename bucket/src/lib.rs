//! The object store, as far as safekeepers and pageservers both know of it.
//!
//! - [`ObjectStoreConfig`]: which store, and how long a request may take.
//! - [`whole`], [`is_unanswered`], [`broke_off`], [`reason_of`]: what the client does not repeat by itself, and what to say of an error.
//! - [`BranchWal`]: committed WAL that safekeepers copy to the store.

mod ask;
mod config;
mod wal;
mod wal_object;

use object_store::path::Path;
use types::BranchRef;

pub use ask::{broke_off, is_unanswered, reason_of, whole, with_jitter};
pub use config::{ObjectStoreConfig, ObjectStoreConfigError, open_local, open_s3};
pub use wal::{BranchWal, StoredWalReader, WalStoreError};
pub use wal_object::{WalObject, covered_from};

/// Everything of a branch is below it.
pub fn branch_root(branch: &BranchRef) -> Path {
    Path::from_iter(["projects", branch.project.as_str(), "branches", branch.branch.as_str()])
}

/// How the names of a branch's manifests begin, which pageservers write directly below [`branch_root`]. There is one as long as
/// the branch exists: from before anybody may write to it until it is deleted.
pub const MANIFEST_PREFIX: &str = "manifest-";
