//! `make chaos`: real processes are killed, stopped, cut off and doubled at random while clients write and keep a ledger of what was
//! acknowledged.

mod faults;
pub mod history;
mod links;
mod quorum;
mod second;
mod writers;

pub use quorum::{Figures, run};
