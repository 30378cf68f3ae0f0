//! The HTTP surface: the public REST API below `/api/v2`, services' calls below `/internal/v1`, and `/healthz`.

mod branches;
mod catalog;
mod endpoints;
mod history;
mod internal;
mod jwks;
mod projects;
mod safekeepers;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use control_plane_api::v2::Pagination;
use serde::{Deserialize, de::DeserializeOwned};
use tower_http::timeout::TimeoutLayer;
use types::{BranchId, BranchRef, EndpointId, ProjectId};

use crate::{app::App, keys, problem::Problem, store::Page};

const MAX_BODY_BYTES: usize = 256 * 1024;
/// Longer than the longest thing that a handler waits for.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(240);
const DEFAULT_PAGE: u32 = 100;
const MAX_PAGE: u32 = 1000;

/// Handlers share the application.
type Shared = State<Arc<App>>;

/// All routes.
pub fn router(app: Arc<App>) -> Router {
    let public = Router::new()
        .merge(projects::routes())
        .merge(branches::routes())
        .merge(history::routes())
        .merge(endpoints::routes())
        .merge(catalog::routes())
        .merge(jwks::routes())
        .merge(safekeepers::routes())
        .fallback(unknown_path)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), require_api_key));
    let internal = Router::new()
        .route("/generations", post(internal::take_generation))
        .route("/endpoints/{endpoint}/roles/{role}", get(internal::role_auth))
        .route("/endpoints/{endpoint}/wake", post(internal::wake))
        .fallback(unknown_path)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), require_service_token));
    Router::new()
        .nest("/api/v2", public)
        .nest("/internal/v1", internal)
        .route("/healthz", get(async || "ok\n"))
        .fallback(unknown_path)
        .method_not_allowed_fallback(async || (StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n"))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, REQUEST_TIMEOUT))
        .with_state(app)
}

async fn unknown_path(request: Request) -> Problem {
    Problem::not_found("path", request.uri().path())
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

async fn require_api_key(State(app): Shared, request: Request, next: Next) -> Response {
    let Some(key) = bearer(request.headers()) else {
        return Problem::Unauthorized("an API key is needed: Authorization: Bearer <key>").into_response();
    };
    if !keys::equal(&keys::hash(key), &app.admin_key_hash) {
        return Problem::Unauthorized("the API key is not valid").into_response();
    }
    next.run(request).await
}

async fn require_service_token(State(app): Shared, request: Request, next: Next) -> Response {
    let claims = bearer(request.headers()).and_then(|token| app.verifier.verify(token).ok());
    match claims {
        Some(claims) if claims.is_service() => next.run(request).await,
        Some(_) => Problem::Forbidden("the token is not a service's".into()).into_response(),
        None => Problem::Unauthorized("a service token is needed").into_response(),
    }
}

/// A JSON body; an empty one is `{}`. Fields that mean nothing here are ignored.
fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, Problem> {
    let text: &[u8] = if body.trim_ascii().is_empty() { b"{}" } else { body };
    serde_json::from_slice(text).map_err(|e| Problem::Invalid(format!("the request body is not what is expected: {e}")))
}

/// Ids in a path that no one could have handed out name nothing.
fn project_id(text: &str) -> Result<ProjectId, Problem> {
    ProjectId::new(text).map_err(|_| Problem::not_found("project", text))
}

fn branch_ref(project: &str, branch: &str) -> Result<BranchRef, Problem> {
    let project = project_id(project)?;
    BranchId::new(branch).map(|branch| BranchRef { project, branch }).map_err(|_| Problem::not_found("branch", branch))
}

fn endpoint_id(text: &str) -> Result<EndpointId, Problem> {
    EndpointId::new(text).map_err(|_| Problem::not_found("endpoint", text))
}

/// Query parameters of lists.
#[derive(Debug, Default, Deserialize)]
struct ListQuery {
    limit: Option<u32>,
    cursor: Option<String>,
    search: Option<String>,
}

impl ListQuery {
    fn page(&self) -> Result<Page, Problem> {
        let limit = self.limit.unwrap_or(DEFAULT_PAGE);
        if !(1..=MAX_PAGE).contains(&limit) {
            return Err(Problem::Invalid(format!("limit must be 1 to {MAX_PAGE}")));
        }
        let cursor = self.cursor.as_deref().filter(|cursor| !cursor.is_empty());
        let after = cursor.map(str::parse).transpose();
        let after = after.map_err(|_| Problem::Invalid("cursor is not one that was handed out".into()))?;
        Ok(Page { limit, after })
    }

    fn search(&self) -> String {
        self.search.clone().unwrap_or_default()
    }
}

fn pagination(next: Option<i64>) -> Option<Pagination> {
    next.map(|seq| Pagination { cursor: seq.to_string() })
}

#[cfg(test)]
mod tests;
