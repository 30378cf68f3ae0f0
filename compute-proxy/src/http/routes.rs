//! Paths, and what all answers have in common: they may be read by scripts of any origin.

use std::sync::Arc;

use axum::{
    body::Body,
    http::{HeaderValue, Method, Request, StatusCode, Version, header},
    response::{IntoResponse, Response},
};
use hyper::body::Incoming;

use super::{
    Visitor,
    activity::Activity,
    error::SqlError,
    last_login::LastLogin,
    sql,
    websocket::{self, Upgraded},
};
use crate::server::Shared;

/// Headers that scripts may send.
const ALLOWED_HEADERS: &str = "Authorization, Content-Type, Neon-Connection-String, Neon-Raw-Text-Output, Neon-Array-Mode, \
    Neon-Batch-Isolation-Level, Neon-Batch-Read-Only, Neon-Batch-Deferrable, Neon-Pool-Opt-In, Dormouse-Cache";

/// Headers of answers that scripts may read.
const EXPOSED_HEADERS: &str = "Age, Dormouse-Cache";

/// How long a browser may remember all this, in seconds.
const PREFLIGHT_LIFETIME: &str = "86400";

/// What the requests of one connection work with.
pub struct Context {
    /// The proxy.
    pub shared: Arc<Shared>,
    /// Who asks.
    pub visitor: Visitor,
    /// Whose login was good.
    pub last_login: LastLogin,
    /// Its WebSockets.
    pub upgraded: Upgraded,
    /// How many of its requests and WebSockets are open.
    pub activity: Arc<Activity>,
}

impl Context {
    /// Of a new connection.
    pub fn new(shared: Arc<Shared>, visitor: Visitor, upgraded: Upgraded) -> Self {
        Self { shared, visitor, last_login: LastLogin::default(), upgraded, activity: Arc::default() }
    }
}

/// Answers a request.
pub async fn answer(context: Arc<Context>, request: Request<Incoming>) -> Response {
    let is_preflight = request.method() == Method::OPTIONS;
    let request = request.map(Body::new);
    let mut response = match (request.method(), request.uri().path()) {
        (&Method::POST, "/sql") => sql::answer(&context, request).await,
        (&Method::OPTIONS, "/sql") => StatusCode::NO_CONTENT.into_response(),
        (_, "/sql") => wrong_method("queries are sent with POST", "POST, OPTIONS"),
        (&Method::CONNECT, "/v2") => websocket::upgrade(&context, request),
        (_, "/v2") if request.version() == Version::HTTP_2 => {
            wrong_method("a WebSocket in HTTP/2 begins with CONNECT", "CONNECT")
        }
        (&Method::GET, "/v2") => websocket::upgrade(&context, request),
        (_, "/v2") => wrong_method("a WebSocket begins with GET", "GET"),
        _ => SqlError::new("08P01", "there are only POST /sql and the WebSocket /v2")
            .with_status(StatusCode::NOT_FOUND)
            .into_response(),
    };
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

fn wrong_method(message: &str, allowed: &'static str) -> Response {
    let error = SqlError::new("08P01", message).with_status(StatusCode::METHOD_NOT_ALLOWED);
    ([(header::ALLOW, allowed)], error).into_response()
}
