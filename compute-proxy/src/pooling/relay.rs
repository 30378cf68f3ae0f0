//! Moves bytes between a client and the server connection that it holds, through the conversation, both ways at once and
//! within bounds.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, BytesMut};
use connection_pool::{Conversation, Output, Settled, Unattached, Violation};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::{connection::ServerConnection, stopping::Stopping};
use crate::{
    end::{EndReason, Stop},
    server::ClientStream,
};

/// Bytes read at once. One buffer for all connections of a thread: idle ones hold none.
const SCRATCH_BYTES: usize = 32 * 1024;

/// Bytes for a client above which no more is read from its server.
const TO_CLIENT_MAX_BYTES: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH_BYTES].into_boxed_slice());
}

/// A client's socket and what is on its way.
pub struct ClientEnd {
    /// The socket.
    pub stream: ClientStream,
    /// What was read and not yet taken.
    pub input: BytesMut,
    /// What is to be written, to it and to its server.
    pub output: Output,
    unflushed: bool,
}

impl ClientEnd {
    /// Nothing on its way.
    pub fn new(stream: ClientStream) -> Self {
        Self { stream, input: BytesMut::new(), output: Output::default(), unflushed: false }
    }

    /// So many bytes of the input were taken.
    pub fn take(&mut self, bytes: usize) {
        self.input.advance(bytes);
    }

    /// Reads some input; errors when there will be none.
    pub fn poll_read_more(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Stop>> {
        poll_fill(&mut self.stream, &mut self.input, context).map(|read| match read {
            Ok(0) => Err(Stop::silent(EndReason::ClientClosed)),
            Ok(_) => Ok(()),
            Err(_) => Err(Stop::silent(EndReason::ClientLost)),
        })
    }

    /// Writes all that the client is to get.
    pub async fn write_out(&mut self) -> Result<(), Stop> {
        let written = poll_fn(|context| self.poll_write_out(context)).await;
        written.map_err(|_| Stop::silent(EndReason::ClientLost))
    }

    /// Reads until the client closes, and forgets what it says.
    pub async fn drain_input(&mut self) -> Result<(), Stop> {
        let mut ignored = [0; 512];
        while self.stream.read(&mut ignored).await? > 0 {}
        Ok(())
    }

    /// Gives back memory while nothing is on its way.
    pub fn shrink(&mut self) {
        if self.input.is_empty() {
            self.input = BytesMut::new();
        }
        for buffer in [&mut self.output.to_client, &mut self.output.to_server] {
            if buffer.is_empty() {
                *buffer = Vec::new();
            }
        }
    }

    fn poll_write_out(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.unflushed |= !self.output.to_client.is_empty();
        if poll_empty(&mut self.stream, &mut self.output.to_client, context)?.is_pending() {
            return Poll::Pending;
        }
        if self.unflushed {
            // TLS keeps back what the socket did not take at once.
            std::task::ready!(Pin::new(&mut self.stream).poll_flush(context))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}

/// Why [`Relay::run`] returned.
pub enum Ended {
    /// The connection may go to somebody else.
    Free,
    /// The proxy stops.
    Stopped,
    /// The client said goodbye, or closed.
    ClientTerminated,
    /// The connection to the client broke.
    ClientLost,
    /// Postgres closed the connection. All that it said was passed on.
    ServerClosed,
    /// Postgres did not take the client's settings.
    OwnError,
    /// The client does not speak the protocol.
    ClientViolation(Violation),
    /// Postgres does not.
    ServerViolation(Violation),
}

/// A client, its server connection, and what they say.
pub struct Relay<'a> {
    /// The client.
    pub client: &'a mut ClientEnd,
    /// Its server connection.
    pub server: &'a mut ServerConnection,
    /// What is said.
    pub conversation: &'a mut Conversation,
    /// Whether the proxy stops.
    pub stopping: &'a mut Stopping,
    /// Something of the client's was taken since it got the connection.
    pub begun: bool,
}

impl Relay<'_> {
    /// Moves bytes until something has ended.
    pub async fn run(&mut self) -> Ended {
        poll_fn(|context| self.poll(context)).await
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Ended> {
        loop {
            match self.talk() {
                Err(ended) => return Poll::Ready(ended),
                Ok(Settled::Free) => return Poll::Ready(Ended::Free),
                Ok(Settled::Busy | Settled::Pinned(_)) => {}
            }
            let [to_server_bytes, to_client_bytes] = self.waiting();
            let to_server = poll_empty(&mut self.server.stream, &mut self.client.output.to_server, context);
            let server_lost = matches!(to_server, Poll::Ready(Err(_)));
            if matches!(self.client.poll_write_out(context), Poll::Ready(Err(_))) {
                return Poll::Ready(Ended::ClientLost);
            }
            // What there was no room for has room now, and may be all that comes.
            let [to_server_rest, to_client_rest] = self.waiting();
            let mut moved = to_client_rest < to_client_bytes && !self.server.input.is_empty()
                || to_server_rest < to_server_bytes && !self.client.input.is_empty();
            if self.client.output.to_client.len() < TO_CLIENT_MAX_BYTES {
                match poll_fill(&mut self.server.stream, &mut self.server.input, context) {
                    Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Ended::ServerClosed),
                    Poll::Ready(Ok(_)) => moved = true,
                    Poll::Pending if server_lost => return Poll::Ready(Ended::ServerClosed),
                    Poll::Pending => {}
                }
            }
            if self.conversation.has_room(&self.client.output) {
                match poll_fill(&mut self.client.stream, &mut self.client.input, context) {
                    Poll::Ready(Ok(0)) => return Poll::Ready(Ended::ClientTerminated),
                    Poll::Ready(Ok(_)) => moved = true,
                    Poll::Ready(Err(_)) => return Poll::Ready(Ended::ClientLost),
                    Poll::Pending => {}
                }
            }
            if !moved {
                return self.stopping.poll(self.conversation.is_busy(), context).map(|()| Ended::Stopped);
            }
        }
    }

    /// Bytes that wait to be written to the server and to the client.
    fn waiting(&self) -> [usize; 2] {
        [self.client.output.to_server.len(), self.client.output.to_client.len()]
    }

    /// Has the conversation take what there is.
    fn talk(&mut self) -> Result<Settled, Ended> {
        let Self { client, server, conversation, begun, .. } = self;
        if !server.input.is_empty() {
            let taken = conversation.from_server(&server.input, &mut server.state, &mut client.output);
            server.input.advance(taken.map_err(Ended::ServerViolation)?);
        }
        if conversation.own_error().is_some() {
            return Err(Ended::OwnError);
        }
        let settled = conversation.settle(&mut server.state, &mut client.output);
        // Whoever sends one transaction after the other must let others in between, so a free connection is given back first.
        let free = settled == Settled::Free && *begun;
        if free || client.input.is_empty() || !conversation.has_room(&client.output) {
            return Ok(if free { Settled::Free } else { Settled::Busy });
        }
        let taken = conversation.from_client(&client.input, &mut server.state, &mut client.output);
        let (taken, wants) = taken.map_err(Ended::ClientViolation)?;
        *begun |= taken > 0;
        client.take(taken);
        if wants == Unattached::Terminate {
            return Err(Ended::ClientTerminated);
        }
        let settled = conversation.settle(&mut server.state, &mut client.output);
        Ok(if *begun { settled } else { Settled::Busy })
    }
}

/// Reads what there is, into what is there already.
pub fn poll_fill(
    stream: &mut (impl AsyncRead + Unpin),
    input: &mut BytesMut,
    context: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    SCRATCH.with_borrow_mut(|scratch| {
        let mut buffer = ReadBuf::new(scratch);
        std::task::ready!(Pin::new(stream).poll_read(context, &mut buffer))?;
        input.extend_from_slice(buffer.filled());
        Poll::Ready(Ok(buffer.filled().len()))
    })
}

/// Writes until nothing is left.
pub fn poll_empty(
    stream: &mut (impl AsyncWrite + Unpin),
    output: &mut Vec<u8>,
    context: &mut Context<'_>,
) -> Poll<io::Result<()>> {
    let mut written = 0;
    let mut outcome = Poll::Ready(Ok(()));
    while written < output.len() {
        match Pin::new(&mut *stream).poll_write(context, &output[written..]) {
            Poll::Ready(Ok(0)) => outcome = Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            Poll::Ready(Ok(bytes)) => {
                written += bytes;
                continue;
            }
            Poll::Ready(Err(error)) => outcome = Poll::Ready(Err(error)),
            Poll::Pending => outcome = Poll::Pending,
        }
        break;
    }
    output.drain(..written);
    outcome
}
