//! One pooled client: borrows a connection for each transaction.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use connection_pool::{Conversation, Unattached, Violation, frame};
use tokio::{
    io::AsyncWriteExt,
    time::{Instant, timeout, timeout_at},
};

use super::{
    PooledClient,
    connection::Lease,
    endpoint::{EndpointPool, Profile},
    relay::{ClientEnd, Ended, Relay},
    stopping::Stopping,
};
use crate::{
    cancel::CancelGuard,
    end::{EndReason, Stop},
    messages::FatalError,
};

/// How long a client that is told why it is closed may take to read that.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

/// Bytes that are read from a client while it waits for a connection.
const WAITING_MAX_BYTES: usize = 64 * 1024;

/// How long an idle client may take to send the rest of a message that it has begun. Until then the proxy keeps what came
/// of it, so that time must end.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(120);

/// What a pooled client's session is made of, apart from its socket.
pub struct Session {
    /// Where its connections come from.
    pub pool: Arc<EndpointPool>,
    /// What they are opened with.
    pub profile: Arc<Profile>,
    /// What is said.
    pub conversation: Box<Conversation>,
    /// Its cancel key.
    pub cancel: CancelGuard,
}

/// Serves the client until it leaves, its server connection breaks, or the proxy stops.
pub async fn serve(client: PooledClient, mut stopping: Stopping) -> EndReason {
    let PooledClient { stream, mut session } = client;
    let mut end = ClientEnd::new(stream);
    let stop = loop {
        if let Err(stop) = wait_for_work(&mut session, &mut end, &mut stopping).await {
            break stop;
        }
        let lease = match acquire(&mut session, &mut end, &mut stopping).await {
            Ok(Some(lease)) => lease,
            Ok(None) => continue,
            Err(stop) => break stop,
        };
        if let Err(stop) = work(&mut session, &mut end, lease, &mut stopping).await {
            break stop;
        }
    };
    farewell(end, stop).await
}

/// Returns when the client has sent something for which it needs a connection.
async fn wait_for_work(session: &mut Session, end: &mut ClientEnd, stopping: &mut Stopping) -> Result<(), Stop> {
    let mut deadline = None;
    loop {
        let (taken, wants) = session.conversation.unattached(&end.input, &mut end.output).map_err(violation)?;
        end.take(taken);
        end.write_out().await?;
        match wants {
            Unattached::Attach => return Ok(()),
            Unattached::Terminate => return Err(Stop::silent(EndReason::ClientClosed)),
            Unattached::More => {
                end.shrink();
                let whole = end.input.is_empty();
                let read = poll_fn(|context| match end.poll_read_more(context) {
                    Poll::Pending => stopping.poll(false, context).map(|()| Err(shutdown())),
                    read => read,
                });
                if whole {
                    deadline = None;
                    read.await?;
                } else {
                    let deadline = *deadline.get_or_insert_with(|| Instant::now() + MESSAGE_TIMEOUT);
                    timeout_at(deadline, read).await.map_err(|_| too_slow())??;
                }
            }
        }
    }
}

/// A connection for the client; `None`: its statement was cancelled while it waited.
async fn acquire(session: &mut Session, end: &mut ClientEnd, stopping: &mut Stopping) -> Result<Option<Lease>, Stop> {
    let Session { pool, profile, conversation, cancel } = session;
    let acquired = {
        let mut acquiring = pin!(pool.acquire(profile, conversation.settings()));
        let mut cancelled = pin!(cancel.cancelled_while_waiting());
        poll_fn(|context| {
            if let Poll::Ready(acquired) = acquiring.as_mut().poll(context) {
                return Poll::Ready(acquired.map(Some).map_err(|refused| refused.into_stop(pool)));
            }
            if cancelled.as_mut().poll(context).is_ready() {
                return Poll::Ready(Ok(None));
            }
            // A client that leaves must not be waited for.
            while end.input.len() < WAITING_MAX_BYTES {
                match end.poll_read_more(context) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(stop)) => return Poll::Ready(Err(stop)),
                    Poll::Pending => break,
                }
            }
            stopping.poll(false, context).map(|()| Err(shutdown()))
        })
        .await?
    };
    let Some(mut lease) = acquired else {
        let cancelled = FatalError::new("57014", "canceling statement due to user request").encode_as("ERROR");
        conversation.refuse_first(&end.input, &cancelled, &mut end.output);
        return Ok(None);
    };
    cancel.attach(lease.connection().target.clone());
    Ok(Some(lease))
}

/// Passes messages until the connection is free again.
async fn work(
    session: &mut Session,
    end: &mut ClientEnd,
    mut lease: Lease,
    stopping: &mut Stopping,
) -> Result<(), Stop> {
    let Session { conversation, cancel, .. } = session;
    conversation.attach(&mut lease.connection().state, &mut end.output);
    let ended = Relay { client: end, server: lease.connection(), conversation, stopping, begun: false }.run().await;
    if matches!(ended, Ended::Free) {
        cancel.detach().await;
        lease.give_back();
        return Ok(());
    }
    if conversation.is_busy() && !matches!(ended, Ended::ServerClosed) {
        // Nobody wants the answer any more. The connection is closed, but Postgres would notice that only at the end.
        lease.cancel();
    }
    Err(match ended {
        Ended::Free | Ended::Stopped => shutdown(),
        Ended::ClientTerminated => Stop::silent(EndReason::ClientClosed),
        Ended::ClientLost => Stop::silent(EndReason::ClientLost),
        Ended::ServerClosed => Stop::silent(EndReason::ComputeClosed),
        Ended::OwnError => own_error(conversation),
        Ended::ClientViolation(error) => violation(error),
        Ended::ServerViolation(error) => {
            tracing::error!(%error, "a compute does not speak the protocol");
            let message = format!("the pool does not understand the server: {error}");
            Stop::refuse(EndReason::Internal, FatalError::new("XX000", message))
        }
    })
}

fn too_slow() -> Stop {
    let error = FatalError::new("08P01", "a message took too long to arrive");
    Stop::refuse(EndReason::ProtocolViolation, error)
}

fn shutdown() -> Stop {
    let message = "terminating connection due to administrator command";
    Stop::refuse(EndReason::Shutdown, FatalError::new("57P01", message))
}

fn violation(error: Violation) -> Stop {
    Stop::refuse(EndReason::ProtocolViolation, FatalError::new(error.sqlstate(), error.to_string()))
}

/// The client's settings could not be brought to another connection: going on would be going on with others.
fn own_error(conversation: &Conversation) -> Stop {
    let fields = conversation.own_error().into_iter().flat_map(frame::error_fields);
    let reason = fields.filter(|(kind, _)| *kind == b'M').map(|(_, text)| String::from_utf8_lossy(text)).next();
    let message = format!("the session's settings cannot be restored: {}", reason.unwrap_or_default());
    let hint = Some("Connect without -pooler to keep one server connection.".to_owned());
    Stop::refuse(EndReason::PoolRefused, FatalError { hint, ..FatalError::new("55000", message) })
}

async fn farewell(mut end: ClientEnd, stop: Stop) -> EndReason {
    let say = async {
        // What Postgres has said comes first.
        end.write_out().await?;
        if let Some(response) = &stop.response {
            end.stream.write_all(response).await?;
        }
        end.stream.shutdown().await?;
        if stop.response.is_some() {
            end.drain_input().await?;
        }
        Ok::<_, Stop>(())
    };
    // The client may be gone or slow: nothing more is owed to it.
    let _ = timeout(FAREWELL_TIMEOUT, say).await;
    stop.reason
}
