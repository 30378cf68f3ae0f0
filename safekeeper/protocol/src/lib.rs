//! The consensus by which a branch's WAL is kept on a majority of safekeepers: pure state machines and their messages.
//!
//! - [`Acceptor`]: a safekeeper's side, for one branch.
//! - [`Proposer`]: a compute's side. It wins a term, brings safekeepers up to one log and learns what is committed.
//! - [`message`]: what the two say to each other, and what readers say.
//!
//! Nothing in here does IO, knows the time or rolls dice: inputs go in, effects come out as data, and the driver performs
//! them in order. The simulation (`safekeeper/simulation`) and the model (`safekeeper/model`) drive both sides through crashes and
//! lost connections.

pub mod acceptor;
pub mod history;
pub mod message;
pub mod mutation;
pub mod proposer;

pub use acceptor::{Acceptor, AcceptorState, ConnectionId, Effect};
pub use history::{HistoryError, TermHistory, TermStart};
pub use message::{AcceptorMessage, ProposerId, ProposerMessage};
pub use mutation::Mutation;
pub use proposer::{Action, Proposer, ProposerSettings, RecordScanner};
