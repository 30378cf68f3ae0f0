//! A WebSocket as a stream of bytes: its binary messages, whole or in fragments. A client that does not keep to the protocol is
//! told so by the status code of a close frame (RFC 6455, 7.4).

use std::{
    future::Future as _,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use futures::{Sink as _, Stream as _};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error, Message,
        error::ProtocolError,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

/// Bytes that one message of a client may have.
const MESSAGE_MAX_BYTES: usize = 16 * 1024 * 1024;

/// Bytes that one of ours has at most.
const FRAME_BYTES: usize = 64 * 1024;

/// Bytes that are read at once: one TLS record. Each idle session keeps room for them.
const READ_BYTES: usize = 16 * 1024;

/// Bytes that may wait to be written.
const WRITE_BUFFER_BYTES: usize = 128 * 1024;

/// How long a client that has gone wrong may take to read why.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

/// A WebSocket as a stream of bytes.
pub struct Tunnel<S> {
    socket: WebSocketStream<S>,
    /// What came and was not yet read.
    input: Bytes,
    state: State,
}

enum State {
    Open,
    /// Our close frame was sent; the client's may come.
    Closing,
    /// A client that has gone wrong was told so. What it sends until it has read that is ignored: a close with unread input
    /// could throw the message away.
    Failing {
        error: io::Error,
        deadline: Pin<Box<Sleep>>,
    },
    /// Nothing comes any more.
    Ended,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Tunnel<S> {
    /// The server's end of a WebSocket whose handshake is done.
    pub async fn new(stream: S) -> Self {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BYTES)
            .write_buffer_size(0)
            .max_write_buffer_size(WRITE_BUFFER_BYTES)
            .max_message_size(Some(MESSAGE_MAX_BYTES))
            .max_frame_size(Some(MESSAGE_MAX_BYTES));
        let socket = WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await;
        Self { socket, input: Bytes::new(), state: State::Open }
    }

    fn say_goodbye(&mut self, code: CloseCode, reason: &'static str) {
        let frame = CloseFrame { code, reason: reason.into() };
        // It may have said goodbye itself in this moment.
        let _ = Pin::new(&mut self.socket).start_send(Message::Close(Some(frame)));
    }

    fn fail(&mut self, code: CloseCode, reason: &'static str) {
        self.say_goodbye(code, reason);
        let error = io::Error::new(io::ErrorKind::InvalidData, reason);
        self.state = State::Failing { error, deadline: Box::pin(sleep(FAREWELL_TIMEOUT)) };
    }

    /// Reads the next message's bytes into `input`, or changes the state.
    fn poll_input(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match ready!(Pin::new(&mut self.socket).poll_next(context)) {
            Some(Ok(Message::Binary(bytes))) => self.input = bytes,
            // Pings are answered below us.
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
            Some(Ok(Message::Close(_))) | None => self.state = State::Ended,
            Some(Ok(Message::Text(_))) => self.fail(CloseCode::Unsupported, "messages must be binary"),
            Some(Err(error)) => match fault(&error) {
                Some((code, reason)) => self.fail(code, reason),
                None => {
                    self.state = State::Ended;
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, error)));
                }
            },
        }
        Poll::Ready(Ok(()))
    }

    /// Ready when the client has hung up, or has had time enough.
    fn poll_farewell(&mut self, context: &mut Context<'_>) -> Poll<()> {
        // Its answer does not matter: if it cannot be written, reading ends too.
        let _ = Pin::new(&mut self.socket).poll_flush(context);
        let State::Failing { deadline, .. } = &mut self.state else { return Poll::Ready(()) };
        if deadline.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        let mut ignored = [0; 4096];
        loop {
            let mut buffer = ReadBuf::new(&mut ignored);
            match ready!(Pin::new(self.socket.get_mut()).poll_read(context, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => {}
                Ok(()) | Err(_) => return Poll::Ready(()),
            }
        }
    }
}

/// What a client is told whose frames are not as they should be; `None`: the connection broke.
fn fault(error: &Error) -> Option<(CloseCode, &'static str)> {
    match error {
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => None,
        Error::Protocol(_) => Some((CloseCode::Protocol, "not the WebSocket protocol")),
        Error::Capacity(_) => Some((CloseCode::Size, "a message may have 16 MiB")),
        Error::Utf8(_) => Some((CloseCode::Invalid, "not UTF-8")),
        _ => None,
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tunnel<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.input.is_empty() {
            match &self.state {
                State::Open | State::Closing => ready!(self.poll_input(context))?,
                State::Failing { .. } => {
                    ready!(self.poll_farewell(context));
                    let State::Failing { error, .. } = std::mem::replace(&mut self.state, State::Ended) else {
                        continue;
                    };
                    return Poll::Ready(Err(error));
                }
                State::Ended => return Poll::Ready(Ok(())),
            }
        }
        let bytes = self.input.len().min(buffer.remaining());
        buffer.put_slice(&self.input[..bytes]);
        self.input.advance(bytes);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tunnel<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(Pin::new(&mut self.socket).poll_ready(context)).map_err(io::Error::other)?;
        let bytes = &bytes[..bytes.len().min(FRAME_BYTES)];
        let frame = Message::Binary(Bytes::copy_from_slice(bytes));
        Pin::new(&mut self.socket).start_send(frame).map_err(io::Error::other)?;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context).map_err(io::Error::other)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if matches!(self.state, State::Open) {
            self.state = State::Closing;
            self.say_goodbye(CloseCode::Normal, "");
        }
        Pin::new(&mut self.socket).poll_flush(context).map_err(io::Error::other)
    }
}
