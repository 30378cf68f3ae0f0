//! `/v2`: Postgres's protocol in a WebSocket's binary frames, which need not begin or end where its messages do.

use std::{
    io,
    pin::Pin,
    task::{Context as TaskContext, Poll, ready},
};

use axum::{
    extract::{
        Query, State, WebSocketUpgrade,
        ws::{Message, WebSocket},
    },
    http::{HeaderMap, header},
    response::Response,
};
use bytes::{Buf, Bytes};
use futures::{Sink, Stream};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{error::SqlError, request::bearer, routes::Context};
use crate::session::{self, Arrival};

/// Bytes that one message of a client may have.
const MESSAGE_MAX_BYTES: usize = 16 * 1024 * 1024;

/// Bytes that one of ours has at most.
const FRAME_BYTES: usize = 64 * 1024;

/// Bytes that may wait to be written.
const WRITE_BUFFER_BYTES: usize = 128 * 1024;

/// `?address=<host>:<port>`: the address that the client means, where the WebSocket's own says nothing of it. This is how
/// the driver's users write `wsProxy`.
#[derive(Deserialize)]
pub struct Address {
    address: Option<String>,
}

/// Begins a session.
pub async fn upgrade(
    State(Context { shared, visitor }): State<Context>,
    Query(Address { address }): Query<Address>,
    headers: HeaderMap,
    upgrade: WebSocketUpgrade,
) -> Result<Response, SqlError> {
    let own = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let host = address.as_deref().or(own).map(|address| without_port(address).to_owned());
    let token = bearer(&headers)?.map(str::to_owned);
    let arrival = Arrival { host, encrypted: visitor.encrypted, end_point: None, sends_password: true, token };
    let upgrade = upgrade
        .max_message_size(MESSAGE_MAX_BYTES)
        .max_frame_size(MESSAGE_MAX_BYTES)
        .write_buffer_size(0)
        .max_write_buffer_size(WRITE_BUFFER_BYTES);
    let serve = move |socket| session::serve_inside(shared, Box::new(Tunnel::new(socket)), arrival, visitor.peer);
    Ok(upgrade.on_upgrade(serve))
}

fn without_port(address: &str) -> &str {
    match address.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !host.ends_with(':') => host,
        _ => address,
    }
}

/// A WebSocket as a stream of bytes.
struct Tunnel<S> {
    socket: S,
    /// What came and was not yet read.
    input: Bytes,
    ended: bool,
}

impl<S> Tunnel<S> {
    fn new(socket: S) -> Self {
        Self { socket, input: Bytes::new(), ended: false }
    }
}

/// What a tunnel needs of a WebSocket.
trait Frames: Stream<Item = Result<Message, axum::Error>> + Sink<Message, Error = axum::Error> + Unpin {}

impl Frames for WebSocket {}

impl<S: Frames> AsyncRead for Tunnel<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.input.is_empty() && !self.ended {
            match ready!(Pin::new(&mut self.socket).poll_next(context)) {
                Some(Ok(Message::Binary(bytes))) => self.input = bytes,
                // Pings are answered below us.
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_))) | None => self.ended = true,
                Some(Ok(Message::Text(_))) => {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "a text frame")));
                }
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
            }
        }
        let bytes = self.input.len().min(buffer.remaining());
        buffer.put_slice(&self.input[..bytes]);
        self.input.advance(bytes);
        Poll::Ready(Ok(()))
    }
}

impl<S: Frames> AsyncWrite for Tunnel<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(Pin::new(&mut self.socket).poll_ready(context)).map_err(io::Error::other)?;
        let bytes = &bytes[..bytes.len().min(FRAME_BYTES)];
        let frame = Message::Binary(Bytes::copy_from_slice(bytes));
        Pin::new(&mut self.socket).start_send(frame).map_err(io::Error::other)?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context).map_err(io::Error::other)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_close(context).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_loses_its_port() {
        for (address, host) in [
            ("ep-a.localhost:5432", "ep-a.localhost"),
            ("ep-a.localhost", "ep-a.localhost"),
            ("127.0.0.1:80", "127.0.0.1"),
            ("[::1]:80", "[::1]"),
            ("::1", "::1"),
            ("", ""),
        ] {
            assert_eq!(without_port(address), host, "{address}");
        }
    }
}
