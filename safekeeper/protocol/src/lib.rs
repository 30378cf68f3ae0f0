//! The consensus by which a branch's WAL is kept on a majority of safekeepers: pure state machines and their messages.
//!
//! - [`Acceptor`]: a safekeeper's side, for one branch.
//! - [`Proposer`]: a compute's side. It wins a term, brings safekeepers up to one log and learns what is committed.
//! - [`message`]: what the two say to each other, and what readers say.
//!
//! Nothing in here does IO, knows the time or rolls dice: inputs go in, effects come out as data, and the driver performs
//! them in order. The simulation in this crate's tests drives both sides through crashes and lost connections.

pub mod acceptor;
pub mod history;
pub mod message;
pub mod proposer;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;

pub use acceptor::{Acceptor, AcceptorState, ConnectionId, Effect};
pub use history::{HistoryError, TermHistory, TermStart};
pub use message::{AcceptorMessage, ProposerId, ProposerMessage};
pub use proposer::{Action, Proposer, ProposerSettings, RecordScanner};
