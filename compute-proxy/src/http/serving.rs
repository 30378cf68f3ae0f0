//! One connection of HTTP, in version 1.1 or 2, until its client leaves, says nothing for long, or the proxy stops.

use std::{
    convert::Infallible,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use axum::response::Response;
use hyper::{
    Request,
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::time::sleep;

use super::{
    Visitor,
    again::Again,
    routes::{self, Context},
    websocket::Upgraded,
};
use crate::server::{ByteStream, Shared};

/// How long a client may take to send a request's head, and may stay silent between requests.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes that the head of a request may have in HTTP/1.1.
const HEAD_MAX_BYTES: usize = 64 * 1024;

/// The same in HTTP/2, where one connection has many: a connection string and a token have 8 KiB each.
const STREAM_HEAD_MAX_BYTES: u32 = 32 * 1024;

/// Requests that one connection of HTTP/2 may have open.
const STREAMS_MAX: u32 = 100;

/// Bytes of a request's body that HTTP/2 takes in before somebody reads them; of all bodies of a connection together.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;

/// Bytes of an answer that HTTP/2 has ready for its client.
const STREAM_SEND_BYTES: usize = 64 * 1024;

/// How often a client of HTTP/2 is asked whether it is still there, and how long it may take to say so.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Serves HTTP/1.1, and what a WebSocket makes of it.
pub async fn version_1(shared: Arc<Shared>, stream: Box<dyn ByteStream>, visitor: Visitor) {
    let peer = visitor.peer;
    let context = Arc::new(Context::new(shared.clone(), visitor, Upgraded::afterwards()));
    let answering = context.clone();
    let service = service_fn(move |request| answer(answering.clone(), request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIMEOUT)
        .max_buf_size(HEAD_MAX_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let never_silent = std::future::pending::<()>;
    if let Err(error) = serve(&shared, connection, |connection| connection.graceful_shutdown(), never_silent).await {
        tracing::debug!(%peer, %error, "HTTP connection ended");
    }
    context.upgraded.serve().await;
}

/// Serves HTTP/2, and WebSockets within it.
pub async fn version_2(shared: Arc<Shared>, stream: Box<dyn ByteStream>, visitor: Visitor) {
    let peer = visitor.peer;
    let context = Arc::new(Context::new(shared.clone(), visitor, Upgraded::beside()));
    let answers = context.clone();
    let service = service_fn(move |request| {
        let open = answers.activity.begin();
        let answering = answer(answers.clone(), request);
        async move {
            let answer = answering.await;
            drop(open);
            answer
        }
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(STREAM_HEAD_MAX_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(STREAM_SEND_BYTES)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .enable_connect_protocol()
        .serve_connection(TokioIo::new(stream), service);
    let silence = || context.activity.silence(IDLE_TIMEOUT);
    if let Err(error) = serve(&shared, connection, |connection| connection.graceful_shutdown(), silence).await {
        tracing::debug!(%peer, %error, "HTTP/2 connection ended");
    }
    context.upgraded.serve().await;
}

async fn answer(context: Arc<Context>, request: Request<Incoming>) -> Result<Response, Infallible> {
    Ok(routes::answer(context, request).await)
}

/// Drives a connection. When the proxy stops, or after `silence`, it is told to take no further requests; when the proxy must
/// stop, or after more silence, it is dropped, and with it what its requests are doing.
async fn serve<C, S>(
    shared: &Shared,
    connection: C,
    take_no_further: impl FnOnce(Pin<&mut C>),
    silence: impl Fn() -> S,
) -> hyper::Result<()>
where
    C: Future<Output = hyper::Result<()>>,
    S: Future<Output = ()>,
{
    let mut connection = pin!(connection);
    let last_request = async {
        tokio::select! {
            () = shared.draining.cancelled() => {}
            () = silence() => {}
        }
    };
    tokio::select! {
        ended = Again::new(connection.as_mut()) => return ended,
        () = last_request => {}
        () = shared.kill.cancelled() => return Ok(()),
    }
    take_no_further(connection.as_mut());
    let stalled = async {
        sleep(IDLE_TIMEOUT).await;
        silence().await;
    };
    tokio::select! {
        ended = Again::new(connection.as_mut()) => ended,
        () = shared.kill.cancelled() => Ok(()),
        () = stalled => Ok(()),
    }
}
