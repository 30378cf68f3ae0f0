//! The safekeeper protocol in a model checker: every interleaving of a small installation.
//!
//! The model drives the *real* state machines (`safekeeper-protocol`); only disks, connections and the choice of what happens
//! next are its own. A state is all safekeepers with their disks, all proposers, what is on the way between them, and what an
//! observer of everything has seen. See [`Quorum`] for what can happen and [`state::Broken`] for what must not.

mod disk;
mod quorum;
mod scanner;
pub mod setup;
pub mod state;

pub use quorum::{Happening, Quorum};
pub use scanner::ByteScanner;

/// Where the log starts.
pub const START: types::Lsn = types::Lsn(100);
