//! Why a session ends, for logs and for the client.

use std::{fmt, io};

use bytes::Bytes;

use crate::{endpoint_name::EndpointNameError, handshake::HandshakeError, messages::FatalError};

/// Why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// The client closed the connection.
    ClientClosed,
    /// The connection to the client broke.
    ClientLost,
    /// Postgres closed the session: it was told to, or it sleeps.
    ComputeClosed,
    /// The proxy stops.
    Shutdown,
    /// The client left before it was logged in; psql does, to ask for a password.
    LeftBeforeLogin,
    /// The login took too long.
    HandshakeTimeout,
    /// TLS failed.
    Tls,
    /// The client does not speak the protocol.
    ProtocolViolation,
    /// The client named no endpoint, two, or an impossible one.
    EndpointName,
    /// There is no such endpoint.
    UnknownEndpoint,
    /// The endpoint's owner has disabled it.
    EndpointDisabled,
    /// The endpoint is not open to the client's address.
    AddressNotAllowed,
    /// Wrong password or token, or no such role.
    WrongPassword,
    /// Too many logins from there have failed.
    TooManyFailures,
    /// Somebody sits between client and proxy.
    ChannelBinding,
    /// There were as many sessions as there may be.
    TooManyConnections,
    /// The login could not be checked.
    ControlPlaneDown,
    /// The keys that a token is checked with could not be fetched.
    IssuerDown,
    /// The endpoint did not wake.
    WakeFailed,
    /// Postgres refused the session.
    ComputeRefused,
    /// The pool had no connection for the client, or could not go on with its session.
    PoolRefused,
    /// It was a request to cancel another session's query.
    Cancel,
    /// A fault of the proxy.
    Internal,
}

impl EndReason {
    /// As it stands in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ClientClosed => "client-closed",
            Self::ClientLost => "client-lost",
            Self::ComputeClosed => "compute-closed",
            Self::Shutdown => "shutdown",
            Self::LeftBeforeLogin => "left-before-login",
            Self::HandshakeTimeout => "handshake-timeout",
            Self::Tls => "tls",
            Self::ProtocolViolation => "protocol-violation",
            Self::EndpointName => "endpoint-name",
            Self::UnknownEndpoint => "unknown-endpoint",
            Self::EndpointDisabled => "endpoint-disabled",
            Self::AddressNotAllowed => "address-not-allowed",
            Self::WrongPassword => "wrong-password",
            Self::TooManyFailures => "too-many-failures",
            Self::ChannelBinding => "channel-binding",
            Self::TooManyConnections => "too-many-connections",
            Self::ControlPlaneDown => "control-plane-down",
            Self::IssuerDown => "issuer-down",
            Self::WakeFailed => "wake-failed",
            Self::ComputeRefused => "compute-refused",
            Self::PoolRefused => "pool-refused",
            Self::Cancel => "cancel",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Ends a session before it was ready.
#[derive(Debug)]
pub struct Stop {
    /// Why.
    pub reason: EndReason,
    /// An `ErrorResponse` for the client, if it is still there.
    pub response: Option<Bytes>,
}

impl Stop {
    /// Tells the client why.
    pub fn refuse(reason: EndReason, error: FatalError) -> Self {
        Self { reason, response: Some(error.encode()) }
    }

    /// Just closes the connection.
    pub fn silent(reason: EndReason) -> Self {
        Self { reason, response: None }
    }
}

impl From<io::Error> for Stop {
    fn from(_: io::Error) -> Self {
        Self::silent(EndReason::LeftBeforeLogin)
    }
}

impl From<HandshakeError> for Stop {
    fn from(error: HandshakeError) -> Self {
        Self::refuse(EndReason::ProtocolViolation, FatalError::new(error.sqlstate(), error.to_string()))
    }
}

impl From<EndpointNameError> for Stop {
    fn from(error: EndpointNameError) -> Self {
        Self::refuse(EndReason::EndpointName, FatalError::new("08P01", error.to_string()))
    }
}
