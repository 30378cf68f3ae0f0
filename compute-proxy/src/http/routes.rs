//! Paths, and what all answers have in common: they may be read by scripts of any origin.

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{any, get, post},
};

use super::{Visitor, error::SqlError, sql, websocket};
use crate::server::Shared;

/// Headers that scripts may send.
const ALLOWED_HEADERS: &str = "Authorization, Content-Type, Neon-Connection-String, Neon-Raw-Text-Output, Neon-Array-Mode, \
    Neon-Batch-Isolation-Level, Neon-Batch-Read-Only, Neon-Batch-Deferrable, Neon-Pool-Opt-In, Dormouse-Cache";

/// Headers of answers that scripts may read.
const EXPOSED_HEADERS: &str = "Age, Dormouse-Cache";

/// How long a browser may remember all this, in seconds.
const PREFLIGHT_LIFETIME: &str = "86400";

/// What handlers work with.
#[derive(Clone)]
pub struct Context {
    /// The proxy.
    pub shared: Arc<Shared>,
    /// Who asks.
    pub visitor: Visitor,
}

/// The routes of one connection.
pub fn router(shared: Arc<Shared>, visitor: Visitor) -> Router {
    Router::new()
        .route("/sql", post(sql::answer).options(|| async { StatusCode::NO_CONTENT }).fallback(wrong_method))
        .route("/v2", get(websocket::upgrade))
        .fallback(any(not_found))
        .layer(middleware::from_fn(cors))
        .with_state(Context { shared, visitor })
}

async fn cors(request: Request, next: Next) -> Response {
    let is_preflight = request.method() == Method::OPTIONS;
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED_HEADERS));
    if is_preflight {
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("POST, OPTIONS"));
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(ALLOWED_HEADERS));
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(PREFLIGHT_LIFETIME));
    }
    response
}

async fn wrong_method(State(_): State<Context>) -> Response {
    let error = SqlError::new("08P01", "queries are sent with POST").with_status(StatusCode::METHOD_NOT_ALLOWED);
    ([(header::ALLOW, "POST, OPTIONS")], error).into_response()
}

async fn not_found() -> SqlError {
    SqlError::new("08P01", "there are only POST /sql and the WebSocket /v2").with_status(StatusCode::NOT_FOUND)
}
