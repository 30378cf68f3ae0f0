//! `/projects` and `/projects/{id}/operations`.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, Query, State},
    http::StatusCode,
    routing::{get, post},
};
use control_plane_api::v2::{
    OperationEnvelope, OperationList, ProjectCreated, ProjectEnvelope, ProjectList, ProjectRequest, UriAnswer,
};
use serde::Deserialize;
use types::{BranchId, BranchRef, EndpointId, ProjectId};

use super::{ListQuery, Shared, pagination, parse, project_id};
use crate::{
    address::Login,
    app::App,
    placement,
    problem::Problem,
    projects as service,
    store::{branches, catalog, endpoints, operations, projects},
};

/// The routes of this file.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/projects", get(list).post(create))
        .route("/projects/{project}", get(show).patch(update).delete(delete))
        .route("/projects/{project}/take_over", post(take_over))
        .route("/projects/{project}/connection_uri", get(connection_uri))
        .route("/projects/{project}/operations", get(list_operations))
        .route("/projects/{project}/operations/{operation}", get(show_operation))
}

async fn list(State(app): Shared, Query(query): Query<ListQuery>) -> Result<Json<ProjectList>, Problem> {
    let (page, search) = (query.page()?, query.search());
    let (rows, next) = app.store.call(move |db| projects::list(db, page, &search)).await?;
    let projects = rows.into_iter().map(|row| app.project(row)).collect();
    Ok(Json(ProjectList { projects, pagination: pagination(next) }))
}

async fn create(State(app): Shared, body: Bytes) -> Result<(StatusCode, Json<ProjectCreated>), Problem> {
    let request: ProjectRequest = parse(&body)?;
    Ok((StatusCode::CREATED, Json(service::create(&app, request.project).await?)))
}

async fn show(State(app): Shared, Path(project): Path<String>) -> Result<Json<ProjectEnvelope>, Problem> {
    let id = project_id(&project)?;
    let row = app.store.call(move |db| projects::get(db, &id)).await?;
    Ok(Json(ProjectEnvelope { project: app.project(row), operations: Vec::new() }))
}

async fn update(
    State(app): Shared,
    Path(project): Path<String>,
    body: Bytes,
) -> Result<Json<ProjectEnvelope>, Problem> {
    let request: ProjectRequest = parse(&body)?;
    Ok(Json(service::update(&app, project_id(&project)?, request.project).await?))
}

async fn delete(State(app): Shared, Path(project): Path<String>) -> Result<Json<ProjectEnvelope>, Problem> {
    Ok(Json(service::delete(&app, project_id(&project)?).await?))
}

async fn take_over(
    State(app): Shared,
    Path(project): Path<String>,
    body: Bytes,
) -> Result<Json<ProjectEnvelope>, Problem> {
    Ok(Json(placement::take_over(&app, project_id(&project)?, parse(&body)?).await?))
}

/// Query parameters of `connection_uri`. Neon wants database and role; here they may be left out.
#[derive(Debug, Deserialize)]
struct UriQuery {
    branch_id: Option<String>,
    endpoint_id: Option<String>,
    database_name: Option<String>,
    role_name: Option<String>,
    #[serde(default)]
    pooled: bool,
}

async fn connection_uri(
    State(app): Shared,
    Path(project): Path<String>,
    Query(query): Query<UriQuery>,
) -> Result<Json<UriAnswer>, Problem> {
    let (project, pooled) = (project_id(&project)?, query.pooled);
    let (endpoint, role, database) = app.store.call(move |db| find_login(db, &project, query)).await?;
    let login = Login { endpoint: &endpoint, role: &role.name, password: &role.password, database: &database };
    Ok(Json(UriAnswer { uri: app.address.uri(login, pooled) }))
}

fn find_login(
    db: &rusqlite::Connection,
    project: &ProjectId,
    query: UriQuery,
) -> Result<(EndpointId, catalog::RoleRow, String), Problem> {
    let endpoint = match &query.endpoint_id {
        Some(id) => endpoints::get(db, project, &super::endpoint_id(id)?)?,
        None => {
            let branch = asked_branch(db, project, query.branch_id.as_deref())?;
            endpoints::of_branch(db, &branch.branch)?
                .ok_or_else(|| Problem::not_found("endpoint of branch", &branch.branch))?
        }
    };
    let branch = &endpoint.branch.branch;
    if query.branch_id.as_deref().is_some_and(|asked| asked != branch.as_str()) {
        return Err(Problem::Invalid(format!("endpoint {} belongs to another branch, {branch}", endpoint.id)));
    }
    let databases = catalog::databases(db, branch)?;
    let database = match query.database_name {
        Some(name) => catalog::database(db, branch, &name)?,
        None => {
            let of_role = |d: &&catalog::DatabaseRow| query.role_name.as_ref().is_none_or(|role| d.owner == *role);
            let first = databases.iter().find(of_role).or(databases.first());
            first.cloned().ok_or_else(|| Problem::not_found("database of branch", branch))?
        }
    };
    let role = catalog::role(db, branch, query.role_name.as_deref().unwrap_or(&database.owner))?;
    Ok((endpoint.id, role, database.name))
}

fn asked_branch(db: &rusqlite::Connection, project: &ProjectId, asked: Option<&str>) -> Result<BranchRef, Problem> {
    match asked {
        Some(id) => {
            let id = BranchId::new(id).map_err(|_| Problem::not_found("branch", id))?;
            Ok(branches::get(db, project, &id)?.branch)
        }
        None => Ok(branches::default(db, project)?.branch),
    }
}

async fn list_operations(
    State(app): Shared,
    Path(project): Path<String>,
    Query(query): Query<ListQuery>,
) -> Result<Json<OperationList>, Problem> {
    let (project, page) = (project_id(&project)?, query.page()?);
    let (operations, next) = app.store.call(move |db| operations::list(db, &project, page)).await?;
    Ok(Json(OperationList { operations, pagination: pagination(next) }))
}

async fn show_operation(
    State(app): Shared,
    Path((project, operation)): Path<(String, String)>,
) -> Result<Json<OperationEnvelope>, Problem> {
    let project = project_id(&project)?;
    let operation = app.store.call(move |db| operations::get(db, &project, &operation)).await?;
    Ok(Json(OperationEnvelope { operation }))
}
