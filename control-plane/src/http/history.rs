//! `/projects/{id}/branches/{id}/history` and `.../leases`.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, Query, State},
    http::StatusCode,
    routing::{delete, get},
};
use control_plane_api::v2::{BranchHistoryEnvelope, LeaseEnvelope, LeaseList, LeaseRequest};
use serde::Deserialize;

use super::{Shared, branch_ref, parse};
use crate::{
    app::App,
    history::{self, Point},
    problem::Problem,
    store::leases,
};

/// The routes of this file.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/projects/{project}/branches/{branch}/history", get(show))
        .route("/projects/{project}/branches/{branch}/leases", get(list_leases).post(lease))
        .route("/projects/{project}/branches/{branch}/leases/{lease}", delete(end_lease))
}

/// Which point of the history is asked about; its end by default.
#[derive(Debug, Deserialize)]
struct PointQuery {
    lsn: Option<String>,
    timestamp: Option<String>,
}

async fn show(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
    Query(query): Query<PointQuery>,
) -> Result<Json<BranchHistoryEnvelope>, Problem> {
    let point = Point::new(("lsn", query.lsn.as_deref()), ("timestamp", query.timestamp.as_deref()))?;
    let history = history::show(&app, branch_ref(&project, &branch)?, point).await?;
    Ok(Json(BranchHistoryEnvelope { history }))
}

async fn lease(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
    body: Bytes,
) -> Result<(StatusCode, Json<LeaseEnvelope>), Problem> {
    let request: LeaseRequest = parse(&body)?;
    let lease = history::lease(&app, branch_ref(&project, &branch)?, request.lease).await?;
    Ok((StatusCode::CREATED, Json(LeaseEnvelope { lease })))
}

async fn list_leases(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
) -> Result<Json<LeaseList>, Problem> {
    let branch = branch_ref(&project, &branch)?;
    let rows = app.store.call(move |db| leases::list(db, &branch)).await?;
    Ok(Json(LeaseList { leases: rows.into_iter().map(history::shown_lease).collect() }))
}

async fn end_lease(
    State(app): Shared,
    Path((project, branch, id)): Path<(String, String, String)>,
) -> Result<Json<LeaseEnvelope>, Problem> {
    let branch = branch_ref(&project, &branch)?;
    let row = app.store.call(move |db| leases::remove(db, &branch, &id)).await?;
    Ok(Json(LeaseEnvelope { lease: history::shown_lease(row) }))
}
