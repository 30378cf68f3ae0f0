//! `/projects/{id}/branches/{id}/roles` and `/databases`.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
    routing::{get, post},
};
use control_plane_api::v2::{
    DatabaseEnvelope, DatabaseList, DatabaseRequest, Operation, RoleEnvelope, RoleList, RolePassword, RoleRequest,
};
use types::BranchRef;

use super::{Shared, branch_ref, parse};
use crate::{
    app::{self, App},
    names,
    problem::Problem,
    store::{branches, catalog},
};

/// The routes of this file.
pub fn routes() -> Router<Arc<App>> {
    let roles = "/projects/{project}/branches/{branch}/roles";
    let databases = "/projects/{project}/branches/{branch}/databases";
    Router::new()
        .route(roles, get(list_roles).post(create_role))
        .route(&format!("{roles}/{{role}}"), get(show_role).delete(delete_role))
        .route(&format!("{roles}/{{role}}/reset_password"), post(reset_password))
        .route(&format!("{roles}/{{role}}/reveal_password"), get(reveal_password))
        .route(databases, get(list_databases).post(create_database))
        .route(&format!("{databases}/{{database}}"), get(show_database).delete(delete_database))
}

/// A change of rows is brought to the branch's compute when it is awake, else at its next wake.
async fn changed(app: &App, branch: &BranchRef) -> Result<Vec<Operation>, Problem> {
    Ok(app.computes.apply_catalog(branch).await?.into_iter().collect())
}

async fn list_roles(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
) -> Result<Json<RoleList>, Problem> {
    let branch = branch_ref(&project, &branch)?;
    let rows = app.store.call(move |db| {
        branches::get(db, &branch.project, &branch.branch)?;
        catalog::roles(db, &branch.branch)
    });
    Ok(Json(RoleList { roles: rows.await?.into_iter().map(|row| app::role(row, false)).collect() }))
}

async fn create_role(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
    body: Bytes,
) -> Result<(StatusCode, Json<RoleEnvelope>), Problem> {
    let branch = branch_ref(&project, &branch)?;
    let name = parse::<RoleRequest>(&body)?.role.name;
    names::check_role(&name)?;
    let wanted = branch.clone();
    let row = app.store.call(move |db| {
        branches::get(db, &wanted.project, &wanted.branch)?;
        let password = names::password();
        catalog::insert_role(db, &wanted.branch, &name, &password, &names::scram_verifier(&password))
    });
    let role = app::role(row.await?, true);
    Ok((StatusCode::CREATED, Json(RoleEnvelope { role, operations: changed(&app, &branch).await? })))
}

async fn show_role(
    State(app): Shared,
    Path((project, branch, role)): Path<(String, String, String)>,
) -> Result<Json<RoleEnvelope>, Problem> {
    let row = find_role(&app, &project, &branch, role).await?;
    Ok(Json(RoleEnvelope { role: app::role(row, false), operations: Vec::new() }))
}

async fn find_role(app: &App, project: &str, branch: &str, role: String) -> Result<catalog::RoleRow, Problem> {
    let branch = branch_ref(project, branch)?;
    let row = app.store.call(move |db| {
        branches::get(db, &branch.project, &branch.branch)?;
        catalog::role(db, &branch.branch, &role)
    });
    row.await
}

async fn delete_role(
    State(app): Shared,
    Path((project, branch, role)): Path<(String, String, String)>,
) -> Result<Json<RoleEnvelope>, Problem> {
    let branch = branch_ref(&project, &branch)?;
    let wanted = branch.clone();
    let row = app.store.call(move |db| {
        branches::get(db, &wanted.project, &wanted.branch)?;
        catalog::remove_role(db, &wanted.branch, &role)
    });
    let role = app::role(row.await?, false);
    Ok(Json(RoleEnvelope { role, operations: changed(&app, &branch).await? }))
}

async fn reset_password(
    State(app): Shared,
    Path((project, branch, role)): Path<(String, String, String)>,
) -> Result<Json<RoleEnvelope>, Problem> {
    let branch = branch_ref(&project, &branch)?;
    let wanted = branch.clone();
    let row = app.store.call(move |db| {
        branches::get(db, &wanted.project, &wanted.branch)?;
        let password = names::password();
        catalog::set_password(db, &wanted.branch, &role, &password, &names::scram_verifier(&password))
    });
    let role = app::role(row.await?, true);
    Ok(Json(RoleEnvelope { role, operations: changed(&app, &branch).await? }))
}

async fn reveal_password(
    State(app): Shared,
    Path((project, branch, role)): Path<(String, String, String)>,
) -> Result<Json<RolePassword>, Problem> {
    let row = find_role(&app, &project, &branch, role).await?;
    Ok(Json(RolePassword { password: row.password }))
}

async fn list_databases(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
) -> Result<Json<DatabaseList>, Problem> {
    let branch = branch_ref(&project, &branch)?;
    let rows = app.store.call(move |db| {
        branches::get(db, &branch.project, &branch.branch)?;
        catalog::databases(db, &branch.branch)
    });
    Ok(Json(DatabaseList { databases: rows.await?.into_iter().map(app::database).collect() }))
}

async fn create_database(
    State(app): Shared,
    Path((project, branch)): Path<(String, String)>,
    body: Bytes,
) -> Result<(StatusCode, Json<DatabaseEnvelope>), Problem> {
    let branch = branch_ref(&project, &branch)?;
    let fields = parse::<DatabaseRequest>(&body)?.database;
    names::check_database(&fields.name)?;
    let wanted = branch.clone();
    let row = app.store.call(move |db| {
        branches::get(db, &wanted.project, &wanted.branch)?;
        catalog::insert_database(db, &wanted.branch, &fields.name, &fields.owner_name)
    });
    let database = app::database(row.await?);
    Ok((StatusCode::CREATED, Json(DatabaseEnvelope { database, operations: changed(&app, &branch).await? })))
}

async fn show_database(
    State(app): Shared,
    Path((project, branch, database)): Path<(String, String, String)>,
) -> Result<Json<DatabaseEnvelope>, Problem> {
    let branch = branch_ref(&project, &branch)?;
    let row = app.store.call(move |db| {
        branches::get(db, &branch.project, &branch.branch)?;
        catalog::database(db, &branch.branch, &database)
    });
    Ok(Json(DatabaseEnvelope { database: app::database(row.await?), operations: Vec::new() }))
}

async fn delete_database(
    State(app): Shared,
    Path((project, branch, database)): Path<(String, String, String)>,
) -> Result<Json<DatabaseEnvelope>, Problem> {
    let branch = branch_ref(&project, &branch)?;
    let wanted = branch.clone();
    let row = app.store.call(move |db| {
        branches::get(db, &wanted.project, &wanted.branch)?;
        catalog::remove_database(db, &wanted.branch, &database)
    });
    let database = app::database(row.await?);
    Ok(Json(DatabaseEnvelope { database, operations: changed(&app, &branch).await? }))
}
