//! How computes and pageservers talk to safekeepers.
//!
//! - [`WalProposer`]: a compute's side of the consensus. It wins a term, ships WAL and learns what is committed.
//! - [`WalReader`]: committed WAL for a pageserver, from whichever safekeeper has it.
//! - [`settle`], [`branch_status`], [`delete_branch`]: single questions.

mod admin;
mod connection;
mod proposer;
mod reader;

pub use admin::{AdminError, BranchStatus, branch_status, delete_branch};
pub use proposer::{ElectError, Elected, Fenced, ProposerConfig, WalProposer, settle};
pub use reader::{WalChunk, WalReadError, WalReader, WalReaderConfig};
