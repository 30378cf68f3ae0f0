//! `make redo-check`: WAL written by a stock server, replayed by a stock standby and by the redo library, which is then broken on
//! purpose.

mod kinds;
mod mutants;
mod standby;
mod workload;

pub use kinds::{NEVER_SEEN, RECORD_TYPES};
pub use mutants::{Mutant, Mutants};
pub use standby::Standby;
pub use workload::Workload;
