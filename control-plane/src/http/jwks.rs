//! `/projects/{id}/jwks`: whose JSON Web Tokens stand for passwords.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
    routing::{delete, get},
};
use control_plane_api::v2::{Jwks, JwksEnvelope, JwksFields, JwksList};
use types::{BranchId, ProjectId};
use url::Url;

use super::{Shared, parse, project_id};
use crate::{
    app::App,
    names,
    problem::Problem,
    store::jwks::{self, NewJwks},
};

/// Roles that a token may take when nobody said which; Neon's.
const DEFAULT_ROLES: [&str; 3] = ["authenticator", "authenticated", "anonymous"];

const MAX_ROLES: usize = 20;
const MAX_TEXT_BYTES: usize = 1000;

/// The routes of this file.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/projects/{project}/jwks", get(list).post(create))
        .route("/projects/{project}/jwks/{jwks}", delete(remove))
}

async fn list(State(app): Shared, Path(project): Path<String>) -> Result<Json<JwksList>, Problem> {
    let project = project_id(&project)?;
    Ok(Json(JwksList { jwks: app.store.call(move |db| jwks::list(db, &project)).await? }))
}

async fn create(
    State(app): Shared,
    Path(project): Path<String>,
    body: Bytes,
) -> Result<(StatusCode, Json<JwksEnvelope>), Problem> {
    let new = checked(project_id(&project)?, parse(&body)?)?;
    let jwks = app.store.call(move |db| jwks::insert(db, &new)).await?;
    Ok((StatusCode::CREATED, Json(JwksEnvelope { jwks, operations: Vec::new() })))
}

async fn remove(State(app): Shared, Path((project, id)): Path<(String, String)>) -> Result<Json<Jwks>, Problem> {
    let project = project_id(&project)?;
    Ok(Json(app.store.call(move |db| jwks::remove(db, &project, &id)).await?))
}

fn checked(project: ProjectId, fields: JwksFields) -> Result<NewJwks, Problem> {
    let host = check_url(&fields.jwks_url)?;
    let provider_name = fields.provider_name.unwrap_or(host);
    let branch = fields.branch_id.map(|id| BranchId::new(&id).map_err(|_| Problem::not_found("branch", id)));
    let default_roles = || DEFAULT_ROLES.map(str::to_owned).to_vec();
    Ok(NewJwks {
        project,
        branch: branch.transpose()?,
        jwks_url: fields.jwks_url,
        provider_name: names::check_title("provider", &provider_name)?,
        audience: check_text("jwt_audience", fields.jwt_audience)?,
        issuer: check_text("jwt_issuer", fields.jwt_issuer)?,
        role_names: check_roles(fields.role_names.unwrap_or_else(default_roles))?,
    })
}

/// The URL's host.
fn check_url(text: &str) -> Result<String, Problem> {
    let url = Url::parse(text).ok().filter(|url| {
        let bare = url.username().is_empty() && url.password().is_none();
        text.len() <= MAX_TEXT_BYTES && matches!(url.scheme(), "https" | "http") && bare
    });
    let host = url.as_ref().and_then(Url::host_str).map(str::to_owned);
    host.ok_or_else(|| Problem::Invalid("jwks_url must be an https or http URL without user and password".into()))
}

fn check_text(field: &str, text: Option<String>) -> Result<Option<String>, Problem> {
    let good = |text: &String| (1..=MAX_TEXT_BYTES).contains(&text.len()) && !text.chars().any(char::is_control);
    if text.as_ref().is_none_or(good) {
        return Ok(text);
    }
    Err(Problem::Invalid(format!("{field} must be 1 to {MAX_TEXT_BYTES} bytes of plain text; leave it out for any")))
}

fn check_roles(names: Vec<String>) -> Result<Vec<String>, Problem> {
    if !(1..=MAX_ROLES).contains(&names.len()) {
        return Err(Problem::Invalid(format!("role_names must be 1 to {MAX_ROLES} names")));
    }
    names.iter().try_for_each(|name| names::check_role(name))?;
    Ok(names)
}
