//! The pool between many clients and few server connections, without a socket or a clock: who gets which connection
//! ([`scheduler`]), and what is said on it ([`conversation`]).

pub mod conversation;
pub mod frame;
pub mod scheduler;
mod server_state;
pub mod session;
pub mod sql;
pub mod statement;

pub use conversation::{Conversation, Output, Settled, Unattached};
pub use server_state::ServerState;
pub use statement::Interner;

/// Why a conversation cannot go on. The texts are for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A message's length makes no sense.
    #[error("invalid message length")]
    Length,
    /// No such type of message.
    #[error("invalid frontend message type {0}")]
    MessageType(u8),
    /// Fields don't end where they must.
    #[error("invalid message format")]
    Layout,
    /// Postgres sent what it should not have.
    #[error("unexpected message of type {0} from the server")]
    Unexpected(u8),
    /// Too many named statements.
    #[error("too many prepared statements for a pooled connection: close some, or connect without -pooler")]
    TooManyStatements,
    /// A named statement whose text is too long to keep.
    #[error("a prepared statement of over 1 MiB needs a connection without -pooler")]
    StatementTooLong,
}

impl Violation {
    /// SQLSTATE for the client.
    pub fn sqlstate(self) -> &'static str {
        match self {
            Self::Length | Self::MessageType(_) | Self::Layout | Self::Unexpected(_) => "08P01",
            Self::TooManyStatements | Self::StatementTooLong => "53400",
        }
    }
}
