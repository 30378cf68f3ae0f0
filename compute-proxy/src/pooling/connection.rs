//! A server connection of a pool, and who holds it.

use std::{io, sync::Arc};

use bytes::{Buf, BytesMut};
use connection_pool::{ServerState, frame, scheduler::ConnectionId, session::Reported};
use tokio::net::UnixStream;

use super::endpoint::{EndpointPool, Profile};
use crate::{cancel::CancelTarget, compute::Opened};

/// Named statements that a server connection keeps.
const STATEMENTS: usize = 250;

/// `Terminate`.
const TERMINATE: &[u8] = b"X\0\0\0\x04";

/// One connection to a compute's Postgres.
pub struct ServerConnection {
    /// Its number.
    pub id: ConnectionId,
    /// The socket.
    pub stream: UnixStream,
    /// What was read and not yet taken.
    pub input: BytesMut,
    /// What is known of its session.
    pub state: ServerState,
    /// How to cancel what it runs.
    pub target: Arc<CancelTarget>,
    /// What it was opened with: known as long as there is such a connection.
    _profile: Arc<Profile>,
}

impl ServerConnection {
    /// A connection that Postgres has greeted. `None`: it gave no key, so that nothing could be cancelled.
    pub fn new(id: ConnectionId, opened: Opened, socket: std::path::PathBuf, profile: Arc<Profile>) -> Option<Self> {
        let mut reported = Reported::new();
        for mut messages in [&opened.before_key[..], &opened.after_key[..]] {
            while let Ok(Some(header)) = frame::header(messages) {
                let message = messages.get(..header.bytes)?;
                if header.kind == b'S' {
                    let (name, value) = parameter(&message[frame::HEADER_BYTES..])?;
                    reported.insert(name, value);
                }
                messages = &messages[header.bytes..];
            }
        }
        Some(Self {
            id,
            stream: opened.stream,
            input: BytesMut::new(),
            state: ServerState::new(Arc::new(reported), STATEMENTS),
            target: Arc::new(CancelTarget { socket, key: opened.key? }),
            _profile: profile,
        })
    }

    /// Takes what Postgres has said while nobody listened; false when it has closed the connection, or is about to.
    pub fn is_usable(&mut self) -> bool {
        loop {
            let mut buffer = [0; 1024];
            match self.stream.try_read(&mut buffer) {
                Ok(0) => return false,
                Ok(bytes) => self.input.extend_from_slice(&buffer[..bytes]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return self.take_news(),
                Err(_) => return false,
            }
        }
    }

    /// A parameter that was changed for all sessions, a notice; anything else is the end.
    fn take_news(&mut self) -> bool {
        while let Ok(Some(header)) = frame::header(&self.input) {
            let Some(message) = self.input.get(..header.bytes) else { return false };
            match header.kind {
                b'S' => {
                    let Some((name, value)) = parameter(&message[frame::HEADER_BYTES..]) else { return false };
                    let mut reported = Reported::clone(&self.state.reported);
                    reported.insert(name, value);
                    self.state.reported = Arc::new(reported);
                }
                b'N' | b'A' => {}
                _ => return false,
            }
            self.input.advance(header.bytes);
        }
        self.input.is_empty()
    }

    /// Tells Postgres that nobody will use it any more.
    pub fn say_goodbye(&self) {
        // If it can't be written at once, Postgres sees the end of the connection all the same.
        let _ = self.stream.try_write(TERMINATE);
    }
}

fn parameter(mut body: &[u8]) -> Option<(String, String)> {
    let mut text = || Some(String::from_utf8_lossy(frame::take_string(&mut body)?).into_owned());
    Some((text()?, text()?))
}

/// A connection that a client holds. Dropped without [`Lease::give_back`] it is closed.
pub struct Lease {
    pool: Arc<EndpointPool>,
    connection: Option<Box<ServerConnection>>,
}

impl Lease {
    /// Holds it for the pool.
    pub fn new(pool: Arc<EndpointPool>, connection: Box<ServerConnection>) -> Self {
        Self { pool, connection: Some(connection) }
    }

    /// The connection.
    pub fn connection(&mut self) -> &mut ServerConnection {
        self.connection.as_mut().expect("held until it is given back")
    }

    /// Stops what it runs. The connection is not to be used further.
    pub fn cancel(&mut self) {
        let target = self.connection().target.clone();
        tokio::spawn(async move {
            if let Err(error) = target.cancel().await {
                tracing::debug!(%error, "cannot stop what a client has left behind");
            }
        });
    }

    /// The connection is in good order and free.
    pub fn give_back(mut self) {
        if let Some(connection) = self.connection.take() {
            self.pool.release(connection);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.say_goodbye();
            self.pool.closed(connection.id);
        }
    }
}
