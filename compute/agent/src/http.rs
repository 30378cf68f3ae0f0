//! The agent's HTTP interface, on a Unix socket.

use std::{sync::Arc, time::Instant};

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use control_plane_api::{
    compute::{AgentStatus, CatalogSpec, MembershipProgress, StopAnswer},
    internal::ApiError,
};
use parking_lot::Mutex;
use serde_json::json;
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot},
};
use tokio_util::sync::CancellationToken;
use types::{Lsn, Membership};

use crate::{activity::Activity, backend::AgentBackend, catalog, compute_dir::ComputePaths};

/// A quorum that takes longer than this for an answer is a problem worth telling.
const SLOW_QUORUM_MS: u64 = 3_000;

/// Somebody wants the compute to stop and waits for where its WAL ended.
pub type StopRequest = oneshot::Sender<Result<Lsn, String>>;

/// What the handlers need.
pub struct AgentApi {
    /// Where Postgres is.
    pub paths: ComputePaths,
    /// What the compute does.
    pub backend: Arc<AgentBackend>,
    /// Who uses it.
    pub activity: Arc<Mutex<Activity>>,
    /// To the loop that owns the compute.
    pub stops: mpsc::Sender<StopRequest>,
    /// One change of the catalog at a time.
    pub catalog: tokio::sync::Mutex<()>,
}

/// Serves until `shutdown`, then finishes answering.
pub async fn serve(listener: UnixListener, api: Arc<AgentApi>, shutdown: CancellationToken) {
    let router = Router::new()
        .route("/status", get(status))
        .route("/stop", post(stop))
        .route("/apply", post(apply))
        .route("/membership", post(set_membership))
        .with_state(api);
    let served = axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::error!(%error, "serving the agent's socket");
    }
}

async fn status(State(api): State<Arc<AgentApi>>) -> Json<AgentStatus> {
    let (idle_ms, connections) = {
        let activity = api.activity.lock();
        (activity.idle_ms(Instant::now()), activity.connections())
    };
    let membership = api.backend.proposer.membership().await.ok();
    Json(AgentStatus {
        running: !api.backend.stopping.is_cancelled(),
        branch: api.backend.branch.clone(),
        commit_lsn: api.backend.proposer.commit_lsn(),
        idle_ms,
        connections,
        membership: membership.map(|now| MembershipProgress {
            generation: now.generation,
            established: now.established,
            lagging: now.lagging,
        }),
        problem: problem(&api.backend),
    })
}

fn problem(backend: &AgentBackend) -> Option<String> {
    if let Some(reason) = backend.proposer.fenced() {
        return Some(format!("fenced by a newer term: {reason}"));
    }
    let waiting_ms = backend.shipper.waiting_ms();
    if waiting_ms > SLOW_QUORUM_MS {
        return Some(format!("WAL has been waiting for a majority of safekeepers for {} s", waiting_ms / 1000));
    }
    backend.shipper.backpressure().problem().or_else(|| backend.storage_problem.lock().clone())
}

async fn stop(State(api): State<Arc<AgentApi>>) -> Response {
    let (answer_to, answer) = oneshot::channel();
    // The loop that takes requests ends only with the compute.
    let asked = api.stops.send(answer_to).await.is_ok();
    match answer.await {
        Ok(Ok(lsn)) => Json(StopAnswer { commit_lsn: lsn }).into_response(),
        Ok(Err(error)) => failure(StatusCode::INTERNAL_SERVER_ERROR, error),
        Err(_) if asked => failure(StatusCode::SERVICE_UNAVAILABLE, "the compute ended meanwhile".to_owned()),
        Err(_) => failure(StatusCode::SERVICE_UNAVAILABLE, "the compute has ended".to_owned()),
    }
}

async fn apply(State(api): State<Arc<AgentApi>>, Json(spec): Json<CatalogSpec>) -> Response {
    let _one_at_a_time = api.catalog.lock().await;
    match catalog::apply(api.paths.root(), &spec).await {
        Ok(()) => Json(json!({})).into_response(),
        Err(error @ catalog::CatalogError::Postgres { .. }) => {
            failure(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
        }
        Err(error @ (catalog::CatalogError::Name(_) | catalog::CatalogError::Verifier(_))) => {
            failure(StatusCode::BAD_REQUEST, error.to_string())
        }
    }
}

async fn set_membership(State(api): State<Arc<AgentApi>>, Json(membership): Json<Membership>) -> Response {
    if let Err(error) = membership.check() {
        return failure(StatusCode::BAD_REQUEST, error.to_string());
    }
    match api.backend.proposer.set_membership(membership) {
        Ok(()) => Json(json!({})).into_response(),
        Err(fenced) => failure(StatusCode::CONFLICT, fenced.to_string()),
    }
}

fn failure(status: StatusCode, error: String) -> Response {
    let code = String::new();
    (status, Json(ApiError { code, message: error })).into_response()
}
