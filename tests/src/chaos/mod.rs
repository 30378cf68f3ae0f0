//! `make chaos`: real processes are killed and stopped at random while clients write and keep a ledger of what was acknowledged.

pub mod history;
mod quorum;
mod writers;

pub use quorum::{Figures, run};
