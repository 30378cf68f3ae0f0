//! `/api/v2/safekeepers`: which safekeepers the installation has. Dormouse's own; Neon's API has no such notion.
//!
//! - `GET /safekeepers`, `POST /safekeepers` ([`AddSafekeeper`]), `DELETE /safekeepers/{id}`, `POST /safekeepers/{id}/replace`
//!   ([`AddSafekeeper`]). All answer [`Safekeepers`] at once; the branches follow one by one, while writes go on.

use serde::{Deserialize, Serialize};
use types::NodeId;

/// A further safekeeper, or one in place of another. It must run, and never have been a safekeeper under another number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddSafekeeper {
    /// Its number, unique for good: a safekeeper that has lost its disk comes back with a new one.
    pub id: NodeId,
    /// Where it is reached, as host:port.
    pub address: String,
}

/// The safekeepers, and how far branches have come with them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Safekeepers {
    /// All of them, those that are leaving too.
    pub safekeepers: Vec<Safekeeper>,
    /// How far branches have come.
    pub branches: BranchesOnTheirWay,
}

/// A safekeeper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Safekeeper {
    /// Its number.
    pub id: NodeId,
    /// Where it is reached.
    pub address: String,
    /// Whether it stays.
    pub state: SafekeeperState,
    /// So many branches count it among their safekeepers.
    pub branches: usize,
    /// Why it does not take WAL at present: it does not answer, or has stepped aside, its disk being full or broken. `None` when it takes WAL,
    /// and in the answer to a change, for which nobody is asked.
    #[serde(default)]
    pub trouble: Option<String>,
    /// Bytes that can still be written to its disk, when it was asked and has answered.
    #[serde(default)]
    pub free_bytes: Option<u64>,
}

/// See [`Safekeeper::state`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SafekeeperState {
    /// Every branch is to have it.
    Member,
    /// No branch is to have it. It is not listed any more once none has.
    Leaving,
}

/// See [`Safekeepers::branches`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchesOnTheirWay {
    /// All branches.
    pub total: usize,
    /// Those that have other safekeepers than they are to have, or some of whose safekeepers do not know yet; 0: all is done.
    pub changing: usize,
    /// Why some of these do not come to their end; at most 20.
    pub troubles: Vec<String>,
}
