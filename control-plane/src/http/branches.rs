//! `/projects/{id}/branches`.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, Query, State},
    http::StatusCode,
    routing::{get, post},
};
use control_plane_api::v2::{
    BranchCreated, BranchEnvelope, BranchList, BranchRequest, EndpointList, GarbageCollected, RestoreRequest,
    WalReader, WalReaderRequest,
};

use super::{ListQuery, Shared, branch_ref, pagination, parse, project_id};
use crate::{
    app::App,
    branching, followers, garbage,
    problem::Problem,
    restoring, sizes,
    store::{branches, endpoints, operations},
};

/// The routes of this file.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/projects/{project}/branches", get(list).post(create))
        .route("/projects/{project}/branches/{branch}", get(show).patch(update).delete(delete))
        .route("/projects/{project}/branches/{branch}/set_as_default", post(set_as_default))
        .route("/projects/{project}/branches/{branch}/restore", post(restore))
        .route("/projects/{project}/branches/{branch}/detach", post(detach))
        .route("/projects/{project}/branches/{branch}/collect_garbage", post(collect_garbage))
        .route("/projects/{project}/branches/{branch}/wal_reader", post(wal_reader))
        .route("/projects/{project}/branches/{branch}/endpoints", get(list_endpoints))
}

async fn list(
    State(app): Shared,
    Path(project): Path<String>,
    Query(query): Query<ListQuery>,
) -> Result<Json<BranchList>, Problem> {
    let (project, page, search) = (project_id(&project)?, query.page()?, query.search());
    let (rows, next) = app.store.call(move |db| branches::list(db, &project, page, &search)).await?;
    let branches = sizes::with_sizes(&app, rows).await;
    Ok(Json(BranchList { branches, pagination: pagination(next) }))
}

async fn create(
    State(app): Shared,
    Path(project): Path<String>,
    body: Bytes,
) -> Result<(StatusCode, Json<BranchCreated>), Problem> {
    let request: BranchRequest = parse(&body)?;
    Ok((StatusCode::CREATED, Json(branching::create(&app, project_id(&project)?, request).await?)))
}

async fn show(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
) -> Result<Json<BranchEnvelope>, Problem> {
    let branch = branch_ref(&project, &branch)?;
    let wanted = branch.clone();
    let row = app.store.call(move |db| branches::get(db, &branch.project, &branch.branch)).await?;
    let branch = sizes::with_sizes(&app, vec![row]).await.pop();
    let branch = branch.ok_or_else(|| Problem::not_found("branch", &wanted.branch))?;
    Ok(Json(BranchEnvelope { branch, operations: Vec::new() }))
}

async fn update(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
    body: Bytes,
) -> Result<Json<BranchEnvelope>, Problem> {
    let request: BranchRequest = parse(&body)?;
    let row = branching::update(&app, branch_ref(&project, &branch)?, request.branch).await?;
    Ok(Json(BranchEnvelope { branch: app.branch(row), operations: Vec::new() }))
}

async fn delete(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
) -> Result<Json<BranchEnvelope>, Problem> {
    let branch = branch_ref(&project, &branch)?;
    let (row, operation) = branching::delete(&app, branch).await?;
    let project = row.branch.project.clone();
    let operation = app.store.call(move |db| operations::get(db, &project, &operation)).await?;
    Ok(Json(BranchEnvelope { branch: app.branch(row), operations: vec![operation] }))
}

async fn set_as_default(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
) -> Result<Json<BranchEnvelope>, Problem> {
    let branch = branch_ref(&project, &branch)?;
    let row = app.store.call(move |db| branches::set_default(db, &branch)).await?;
    Ok(Json(BranchEnvelope { branch: app.branch(row), operations: Vec::new() }))
}

async fn restore(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
    body: Bytes,
) -> Result<Json<BranchEnvelope>, Problem> {
    let request: RestoreRequest = parse(&body)?;
    Ok(Json(restoring::restore(&app, branch_ref(&project, &branch)?, request).await?))
}

async fn detach(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
) -> Result<Json<BranchEnvelope>, Problem> {
    Ok(Json(restoring::detach(&app, branch_ref(&project, &branch)?).await?))
}

async fn collect_garbage(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
) -> Result<Json<GarbageCollected>, Problem> {
    let branch = branch_ref(&project, &branch)?;
    let row = app.store.call(move |db| branches::get(db, &branch.project, &branch.branch)).await?;
    let report = garbage::collect(&app, &row).await?;
    Ok(Json(GarbageCollected {
        start_lsn: Some(report.start_lsn),
        removed_layers: report.removed_layers,
        removed_bytes: report.removed_bytes,
    }))
}

async fn wal_reader(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
    body: Bytes,
) -> Result<(StatusCode, Json<WalReader>), Problem> {
    let request: WalReaderRequest = parse(&body)?;
    let made = followers::wal_reader(&app, branch_ref(&project, &branch)?, request).await?;
    Ok((StatusCode::CREATED, Json(made)))
}

async fn list_endpoints(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
) -> Result<Json<EndpointList>, Problem> {
    let branch = branch_ref(&project, &branch)?;
    let row = app.store.call(move |db| {
        branches::get(db, &branch.project, &branch.branch)?;
        endpoints::of_branch(db, &branch.branch)
    });
    let endpoints = row.await?.into_iter().map(|row| app.endpoint(row)).collect();
    Ok(Json(EndpointList { endpoints }))
}
