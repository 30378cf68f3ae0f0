//! How computes and pageservers talk to safekeepers.
//!
//! - [`WalProposer`]: a compute's side of the consensus. It wins a term, ships WAL and learns what is committed.
//! - [`WalReader`]: committed WAL for a pageserver, from whichever safekeeper has it.
//! - [`Distrust`]: whom not to ask again, when what a reader got was no WAL.
//! - [`settle`], [`carry_over`]: what the control plane does for a branch that has no compute.
//! - [`branch_status`], [`delete_branch`], [`set_branch_membership`], [`node_status`]: single questions.

mod admin;
mod connection;
mod distrust;
mod proposer;
mod reader;

pub use admin::{
    AdminError, BranchStatus, NodeStatus, ReplicationAddress, branch_membership, branch_status, delete_branch,
    node_status, set_branch_membership,
};
pub use distrust::{BadWal, Distrust};
pub use proposer::{ElectError, Elected, Fenced, MembershipStatus, ProposerConfig, WalProposer, carry_over, settle};
pub use reader::{WalChunk, WalReadError, WalReader, WalReaderConfig};
