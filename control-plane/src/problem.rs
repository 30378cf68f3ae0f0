//! What can go wrong with a request, and its HTTP status.

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use control_plane_api::internal::{ApiError, ENDPOINT_NOT_FOUND};

/// Why a request was not done. Each kind tells the caller what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The key or token is missing or wrong.
    #[error("{0}")]
    Unauthorized(&'static str),
    /// The key is good, but does not allow this.
    #[error("{0}")]
    Forbidden(String),
    /// There is no such thing.
    #[error("{what} {id:?} not found")]
    NotFound {
        /// What kind of thing.
        what: &'static str,
        /// Its name as asked for.
        id: String,
    },
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The request clashes with what exists; the code is stable.
    #[error("{message}")]
    Conflict {
        /// Such as `BRANCH_ALREADY_EXISTS`.
        code: &'static str,
        /// For people.
        message: String,
    },
    /// The request is well formed, but the thing's state or role forbids it.
    #[error("{0}")]
    Refused(String),
    /// Try again later.
    #[error("{0}")]
    Unavailable(String),
    /// Something is broken here; the details are in the log.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Problem {
    /// There is no `what` called `id`.
    pub fn not_found(what: &'static str, id: impl ToString) -> Problem {
        Problem::NotFound { what, id: id.to_string().chars().take(80).collect() }
    }

    /// The HTTP status that says the same.
    pub fn status(&self) -> StatusCode {
        match self {
            Problem::Unauthorized(_) => StatusCode::UNAUTHORIZED,
            Problem::Forbidden(_) => StatusCode::FORBIDDEN,
            Problem::NotFound { .. } => StatusCode::NOT_FOUND,
            Problem::Invalid(_) => StatusCode::BAD_REQUEST,
            Problem::Conflict { .. } => StatusCode::CONFLICT,
            Problem::Refused(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Problem::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Problem::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl From<rusqlite::Error> for Problem {
    fn from(error: rusqlite::Error) -> Problem {
        Problem::Internal(format!("metadata store: {error}"))
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = self.status();
        if let Problem::Internal(reason) = &self {
            tracing::error!(reason, "request failed");
        }
        let code = match &self {
            Problem::Conflict { code, .. } => (*code).to_owned(),
            Problem::NotFound { what: "endpoint", .. } => ENDPOINT_NOT_FOUND.to_owned(),
            Problem::Unauthorized(_)
            | Problem::Forbidden(_)
            | Problem::NotFound { .. }
            | Problem::Invalid(_)
            | Problem::Refused(_)
            | Problem::Unavailable(_)
            | Problem::Internal(_) => String::new(),
        };
        (status, Json(ApiError { code, message: self.to_string() })).into_response()
    }
}
