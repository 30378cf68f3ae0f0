//! HTTP over an agent's Unix socket: one connection for each request.

use std::{path::Path, time::Duration};

use control_plane_api::{
    compute::{AgentStatus, CatalogSpec},
    internal::ApiError,
};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, body::Bytes, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::UnixStream;
use types::{Lsn, Membership};

/// Answers are small JSON texts.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;

/// Why an agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Its socket does not answer: it is gone, or has not come yet.
    #[error("agent does not answer: {0}")]
    Unreachable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It did not answer in time.
    #[error("agent did not answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// It answered with an error.
    #[error("agent: {0}")]
    Refused(String),
    /// It answered with something else.
    #[error("agent gave a malformed answer: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// What is read from the answer to `POST /stop`, whatever else it says.
#[derive(Debug, Default, Deserialize)]
struct Stopped {
    #[serde(default)]
    commit_lsn: Option<Lsn>,
}

/// `GET /status`.
pub async fn status(socket: &Path, limit: Duration) -> Result<AgentStatus, AgentError> {
    let answer = call(socket, Method::GET, "/status", Bytes::new(), limit).await?;
    Ok(serde_json::from_slice(&answer)?)
}

/// `POST /stop`; the end of the branch's WAL, when the agent says it.
pub async fn stop(socket: &Path, limit: Duration) -> Result<Option<Lsn>, AgentError> {
    let answer = call(socket, Method::POST, "/stop", Bytes::new(), limit).await?;
    Ok(serde_json::from_slice::<Stopped>(&answer).unwrap_or_default().commit_lsn)
}

/// `POST /apply`.
pub async fn apply(socket: &Path, catalog: &CatalogSpec, limit: Duration) -> Result<(), AgentError> {
    let body = Bytes::from(serde_json::to_vec(catalog)?);
    call(socket, Method::POST, "/apply", body, limit).await.map(|_| ())
}

/// `POST /membership`.
pub async fn set_membership(socket: &Path, membership: &Membership, limit: Duration) -> Result<(), AgentError> {
    let body = Bytes::from(serde_json::to_vec(membership)?);
    call(socket, Method::POST, "/membership", body, limit).await.map(|_| ())
}

async fn call(
    socket: &Path,
    method: Method,
    path: &'static str,
    body: Bytes,
    limit: Duration,
) -> Result<Bytes, AgentError> {
    match tokio::time::timeout(limit, exchange(socket, method, path, body)).await {
        Ok(answer) => answer,
        Err(_) => Err(AgentError::Timeout(limit)),
    }
}

async fn exchange(socket: &Path, method: Method, path: &'static str, body: Bytes) -> Result<Bytes, AgentError> {
    let stream = UnixStream::connect(socket).await.map_err(|e| AgentError::Unreachable(e.into()))?;
    let unreachable = |e: hyper::Error| AgentError::Unreachable(e.into());
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(unreachable)?;
    let driver = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "agent")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))
        .map_err(|e| AgentError::Unreachable(e.into()))?;
    let response = sender.send_request(request).await.map_err(unreachable)?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await.map_err(AgentError::Unreachable)?;
    driver.abort();
    let body = body.to_bytes();
    if status.is_success() {
        return Ok(body);
    }
    let text = match serde_json::from_slice::<ApiError>(&body) {
        Ok(error) => error.message,
        Err(_) => String::from_utf8_lossy(&body).chars().take(500).collect(),
    };
    Err(AgentError::Refused(format!("{status}: {text}")))
}
