//! A session of one request: borrows a connection, sends messages, takes the answer, and gives the connection back clean.
//! For clients that hold no session, as those of SQL over HTTP.

use std::{
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Buf;
use connection_pool::{Conversation, Output, Settled, Unattached, Violation, frame, session::Settings};
use tokio::time::timeout;
use types::EndpointId;

use super::{
    Pools,
    connection::Lease,
    endpoint::{EndpointPool, Profile},
    relay::{poll_empty, poll_fill},
};
use crate::{end::Stop, endpoint_name::PoolMode, handshake::Startup};

/// How long Postgres may take to tell what a session has left behind, before its connection is closed instead.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection that is used for one request. Dropped in the middle of a statement it cancels that, and the connection is
/// closed; so it is when a transaction is left open.
pub struct Exchange {
    conversation: Box<Conversation>,
    /// `None` once it was given back.
    lease: Option<Lease>,
    output: Output,
    /// Bytes that one message of the answer may have.
    message_max_bytes: usize,
}

/// What `ReadyForQuery` says of the transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransactionStatus {
    /// There is none.
    Idle,
    /// One is open, or has failed.
    Open,
}

/// Why there is no whole answer. The connection is not used again.
#[derive(Debug)]
pub enum ExchangeError<E> {
    /// Whoever took the answer wants no more of it.
    Refused(E),
    /// Postgres closed the connection.
    Closed,
    /// Something does not speak the protocol.
    Violation(Violation),
    /// A message of the answer is longer than it may be.
    TooLong,
    /// The session's own settings were not taken: the body of Postgres's `ErrorResponse`.
    Settings(Box<[u8]>),
}

/// Where a client's connections come from, and what they are opened with.
pub struct Route {
    pool: Arc<EndpointPool>,
    profile: Arc<Profile>,
    settings: Arc<Settings>,
}

impl Route {
    /// For clients that begin so. `options`: those of the start-up without the endpoint. Opens nothing.
    pub fn new(pools: &Pools, endpoint: &EndpointId, startup: &Startup, options: Option<&str>) -> Result<Self, Stop> {
        let pool = pools.endpoint(endpoint);
        let (profile, settings) = pool.profile(startup, options, PoolMode::Transaction)?;
        Ok(Self { pool, profile, settings: Arc::new(settings) })
    }
}

impl Exchange {
    /// Borrows a connection, waking the endpoint if need be. `message_max_bytes`: what one message of an answer may have, as
    /// all of it is held in memory.
    pub async fn begin(route: &Route, message_max_bytes: usize) -> Result<Self, Stop> {
        let Route { pool, profile, settings } = route;
        let interner = pool.interner().clone();
        let mut conversation = Box::new(Conversation::new(interner, settings.clone(), pool.reported(profile)));
        let acquired = pool.acquire(profile, conversation.settings()).await;
        let mut lease = acquired.map_err(|refused| refused.into_stop(pool))?;
        let mut output = Output::default();
        conversation.attach(&mut lease.connection().state, &mut output);
        Ok(Self { conversation, lease: Some(lease), output, message_max_bytes })
    }

    /// Sends messages that end with a `Sync` or are one simple query; `take` gets each message of the answer, its type and
    /// its body, up to `ReadyForQuery`.
    pub async fn run<E>(
        &mut self,
        messages: &[u8],
        mut take: impl FnMut(u8, &[u8]) -> Result<(), E>,
    ) -> Result<TransactionStatus, ExchangeError<E>> {
        let mut rest = messages;
        loop {
            let waiting = self.input_bytes();
            self.talk(&mut rest)?;
            if let Some(status) = self.take_answer(&mut take)? {
                return Ok(status);
            }
            // What there was no room for before the answer was taken has room now, and may be all that comes.
            if (1..waiting).contains(&self.input_bytes()) {
                continue;
            }
            if !self.move_bytes().await {
                // What it said last may say why.
                self.talk(&mut rest)?;
                self.take_answer(&mut take)?;
                return Err(ExchangeError::Closed);
            }
        }
    }

    /// Gives the connection back; what is left in its session is asked for behind the caller's back.
    pub fn finish(mut self) {
        match self.settle() {
            Settled::Free => self.give_back(),
            Settled::Busy => drop(tokio::spawn(async move {
                if timeout(SETTLE_TIMEOUT, self.settled()).await.is_ok_and(|free| free) {
                    self.give_back();
                }
            })),
            // A temporary table, a lock: nobody will come back for it.
            Settled::Pinned(_) => {}
        }
    }

    /// Waits for the answers to the conversation's own questions; true when the connection is free.
    async fn settled(&mut self) -> bool {
        loop {
            match self.settle() {
                Settled::Free => return true,
                Settled::Pinned(_) => return false,
                Settled::Busy => {}
            }
            if !self.move_bytes().await || self.talk::<()>(&mut &[][..]).is_err() {
                return false;
            }
        }
    }

    fn settle(&mut self) -> Settled {
        let Self { conversation, lease, output, .. } = self;
        let Some(lease) = lease else { return Settled::Free };
        conversation.settle(&mut lease.connection().state, output)
    }

    fn give_back(&mut self) {
        if let Some(lease) = self.lease.take() {
            lease.give_back();
        }
    }

    /// Bytes that Postgres has sent and the conversation has not taken.
    fn input_bytes(&mut self) -> usize {
        self.lease.as_mut().map_or(0, |lease| lease.connection().input.len())
    }

    /// Has the conversation take what there is.
    fn talk<E>(&mut self, rest: &mut &[u8]) -> Result<(), ExchangeError<E>> {
        let Self { conversation, lease, output, .. } = self;
        let server = lease.as_mut().expect("held until it is given back").connection();
        if !server.input.is_empty() {
            let taken = conversation.from_server(&server.input, &mut server.state, output);
            server.input.advance(taken.map_err(ExchangeError::Violation)?);
        }
        if let Some(error) = conversation.own_error() {
            return Err(ExchangeError::Settings(error.into()));
        }
        if !rest.is_empty() && conversation.has_room(output) {
            let taken = conversation.from_client(rest, &mut server.state, output);
            let (taken, wants) = taken.map_err(ExchangeError::Violation)?;
            debug_assert!(wants != Unattached::Terminate, "requests hold no Terminate");
            *rest = &rest[taken..];
        }
        Ok(())
    }

    /// Hands out whole messages; the status when the answer is complete.
    fn take_answer<E>(
        &mut self,
        take: &mut impl FnMut(u8, &[u8]) -> Result<(), E>,
    ) -> Result<Option<TransactionStatus>, ExchangeError<E>> {
        let to_client = &self.output.to_client;
        let mut at = 0;
        let mut status = None;
        // The conversation lets nothing pass that has an impossible length.
        while let Ok(Some(header)) = frame::header(&to_client[at..]) {
            if header.bytes > self.message_max_bytes {
                return Err(ExchangeError::TooLong);
            }
            let Some(message) = to_client.get(at..at + header.bytes) else { break };
            at += header.bytes;
            let body = &message[frame::HEADER_BYTES..];
            if header.kind == b'Z' {
                status = Some(if body == b"I" { TransactionStatus::Idle } else { TransactionStatus::Open });
            } else {
                take(header.kind, body).map_err(ExchangeError::Refused)?;
            }
        }
        self.output.to_client.drain(..at);
        Ok(status)
    }

    /// Writes and reads what is possible, as soon as something is; false when Postgres has closed the connection.
    async fn move_bytes(&mut self) -> bool {
        poll_fn(|context| self.poll_move(context)).await
    }

    fn poll_move(&mut self, context: &mut Context<'_>) -> Poll<bool> {
        let Self { lease, output, conversation, .. } = self;
        let server = lease.as_mut().expect("held until it is given back").connection();
        let had = output.to_server.len();
        let written = poll_empty(&mut server.stream, &mut output.to_server, context);
        match poll_fill(&mut server.stream, &mut server.input, context) {
            Poll::Ready(Ok(bytes)) => return Poll::Ready(bytes > 0),
            Poll::Ready(Err(_)) => return Poll::Ready(false),
            Poll::Pending => {}
        }
        match written {
            Poll::Ready(Err(_)) => Poll::Ready(false),
            // There is room for more of the request.
            _ if output.to_server.len() < had && conversation.has_room(output) => Poll::Ready(true),
            _ => Poll::Pending,
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Some(lease) = &mut self.lease
            && self.conversation.is_busy()
        {
            // Nobody wants the answer any more. The connection is closed, but Postgres would notice that only at the end.
            lease.cancel();
        }
    }
}
