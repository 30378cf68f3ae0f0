//! How Dormouse's services talk to each other: frames, tokens and the pageserver's messages.
//!
//! A connection is TCP. Each message is one [`frame`]; the first is a [`Hello`] with a token ([`auth`]). The safekeeper's
//! messages are those of its consensus and live beside it, in `safekeeper-protocol`.

pub mod auth;
pub mod frame;
pub mod pageserver;

pub use auth::{Claims, Scope, TokenError, TokenSigner, TokenVerifier};
pub use frame::{FrameReader, FrameWriter, MAX_FRAME_BYTES, MAX_GREETING_BYTES, WireError};

use serde::{Deserialize, Serialize};

/// Version of all wire messages; both ends must have the same.
pub const PROTOCOL_VERSION: u32 = 4;

/// First message on every connection, from the side that connects. Requests may follow without waiting for the reply.
#[derive(Clone, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub version: u32,
    /// A token of the control plane's making. Never logged.
    pub token: String,
}

/// Answer to a [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HelloReply {
    /// Go on.
    Welcome,
    /// The connection is closed after this; says why.
    Denied(String),
}
