//! `/projects/{id}/endpoints`.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
    routing::{get, post},
};
use control_plane_api::v2::{EndpointEnvelope, EndpointList, EndpointRequest, InvalidateQueryCache, Operation};

use super::{Shared, endpoint_id, parse, project_id};
use crate::{
    app::App,
    branching,
    compute::SuspendReason,
    endpoint_rules,
    problem::Problem,
    store::{
        endpoints::{self, EndpointRow},
        query_cache,
    },
};

/// The routes of this file.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/projects/{project}/endpoints", get(list).post(create))
        .route("/projects/{project}/endpoints/{endpoint}", get(show).patch(update).delete(delete))
        .route("/projects/{project}/endpoints/{endpoint}/start", post(start))
        .route("/projects/{project}/endpoints/{endpoint}/suspend", post(suspend))
        .route("/projects/{project}/endpoints/{endpoint}/restart", post(restart))
        .route("/projects/{project}/endpoints/{endpoint}/query_cache/invalidate", post(invalidate_query_cache))
}

async fn row(app: &App, project: &str, endpoint: &str) -> Result<EndpointRow, Problem> {
    let (project, endpoint) = (project_id(project)?, endpoint_id(endpoint)?);
    app.store.call(move |db| endpoints::get(db, &project, &endpoint)).await
}

/// The endpoint as it is now, with what was done.
async fn answer(app: &App, row: EndpointRow, operations: Vec<Operation>) -> Result<Json<EndpointEnvelope>, Problem> {
    let now = app.store.call(move |db| endpoints::get(db, &row.branch.project, &row.id)).await?;
    Ok(Json(EndpointEnvelope { endpoint: app.endpoint(now), operations }))
}

async fn list(State(app): Shared, Path(project): Path<String>) -> Result<Json<EndpointList>, Problem> {
    let project = project_id(&project)?;
    let rows = app.store.call(move |db| endpoints::list(db, &project)).await?;
    Ok(Json(EndpointList { endpoints: rows.into_iter().map(|row| app.endpoint(row)).collect() }))
}

async fn create(
    State(app): Shared,
    Path(project): Path<String>,
    body: Bytes,
) -> Result<(StatusCode, Json<EndpointEnvelope>), Problem> {
    let request: EndpointRequest = parse(&body)?;
    let row = branching::create_endpoint(&app, project_id(&project)?, request.endpoint).await?;
    let envelope = EndpointEnvelope { endpoint: app.endpoint(row), operations: Vec::new() };
    Ok((StatusCode::CREATED, Json(envelope)))
}

async fn show(
    State(app): Shared,
    Path((project, endpoint)): Path<(String, String)>,
) -> Result<Json<EndpointEnvelope>, Problem> {
    let row = row(&app, &project, &endpoint).await?;
    Ok(Json(EndpointEnvelope { endpoint: app.endpoint(row), operations: Vec::new() }))
}

async fn update(
    State(app): Shared,
    Path((project, endpoint)): Path<(String, String)>,
    body: Bytes,
) -> Result<Json<EndpointEnvelope>, Problem> {
    let request: EndpointRequest = parse(&body)?;
    let (project, endpoint) = (project_id(&project)?, endpoint_id(&endpoint)?);
    let updated = app.store.call(move |db| {
        let mut row = endpoints::get(db, &project, &endpoint)?;
        if request.endpoint.branch_id.as_deref().is_some_and(|asked| asked != row.branch.branch.as_str()) {
            return Err(Problem::Invalid("an endpoint cannot be moved to another branch".into()));
        }
        endpoint_rules::change(&mut row, request.endpoint)?;
        endpoints::update(db, &row)
    });
    let row = updated.await?;
    app.computes.forget(&row.id);
    let mut operations = Vec::new();
    if row.disabled {
        operations.extend(app.computes.suspend(&row.branch, SuspendReason::Requested).await?);
    }
    answer(&app, row, operations).await
}

async fn delete(
    State(app): Shared,
    Path((project, endpoint)): Path<(String, String)>,
) -> Result<Json<EndpointEnvelope>, Problem> {
    let row = row(&app, &project, &endpoint).await?;
    // Its row goes first, so that nothing wakes it again.
    let shown = app.endpoint(row.clone());
    let suspended = app.computes.suspend(&row.branch, SuspendReason::Deleted).await?;
    let id = row.id.clone();
    app.store.call(move |db| endpoints::remove(db, &id)).await?;
    app.computes.forget(&row.id);
    // A wake that came in between has been given to nobody that matters.
    app.computes.suspend(&row.branch, SuspendReason::Deleted).await?;
    app.computes.remove_files(&row.id).await;
    Ok(Json(EndpointEnvelope { endpoint: shown, operations: suspended.into_iter().collect() }))
}

async fn start(
    State(app): Shared,
    Path((project, endpoint)): Path<(String, String)>,
) -> Result<Json<EndpointEnvelope>, Problem> {
    let row = row(&app, &project, &endpoint).await?;
    if row.disabled {
        return Err(Problem::Refused(format!("endpoint {} is disabled", row.id)));
    }
    let operation = app.computes.wake_in_background(&row.branch, &row.id).await?;
    answer(&app, row, vec![operation]).await
}

async fn suspend(
    State(app): Shared,
    Path((project, endpoint)): Path<(String, String)>,
) -> Result<Json<EndpointEnvelope>, Problem> {
    let row = row(&app, &project, &endpoint).await?;
    let operation = app.computes.suspend(&row.branch, SuspendReason::Requested).await?;
    answer(&app, row, operation.into_iter().collect()).await
}

async fn restart(
    State(app): Shared,
    Path((project, endpoint)): Path<(String, String)>,
) -> Result<Json<EndpointEnvelope>, Problem> {
    let row = row(&app, &project, &endpoint).await?;
    if row.disabled {
        return Err(Problem::Refused(format!("endpoint {} is disabled", row.id)));
    }
    let suspended = app.computes.suspend(&row.branch, SuspendReason::Requested).await?;
    let started = app.computes.wake_in_background(&row.branch, &row.id).await?;
    answer(&app, row, suspended.into_iter().chain([started]).collect()).await
}

/// Proxies hear of it with the next login that they check, which is within a second.
async fn invalidate_query_cache(
    State(app): Shared,
    Path((project, endpoint)): Path<(String, String)>,
    body: Bytes,
) -> Result<Json<EndpointEnvelope>, Problem> {
    let InvalidateQueryCache { tags } = if body.is_empty() { InvalidateQueryCache::default() } else { parse(&body)? };
    let tags = endpoint_rules::check_query_cache_tags(tags)?;
    let row = row(&app, &project, &endpoint).await?;
    let id = row.id.clone();
    app.store.call(move |db| query_cache::invalidate(db, &id, &tags)).await?;
    answer(&app, row, Vec::new()).await
}
