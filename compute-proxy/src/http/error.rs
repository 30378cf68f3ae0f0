//! Errors as the driver reads them: a JSON object with the fields of a Postgres error, status 400.

use axum::{
    http::{HeaderValue, StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use connection_pool::frame;
use serde::Serialize;

use super::{connection_string::ConnectionStringError, request::RequestError};
use crate::{
    end::{EndReason, Stop},
    messages::FatalError,
};

/// SQLSTATE of "cached plan must not change result type", among others.
const FEATURE_NOT_SUPPORTED: &str = "0A000";

/// Postgres's own name of the place where it says so.
const STALE_PLAN_ROUTINE: &str = "RevalidateCachedQuery";

/// Why a request has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SqlError {
    status: StatusCode,
    /// See [`SqlError::is_stale_plan`].
    stale_plan: bool,
    fields: Box<ErrorFields>,
}

/// The fields, named as in node-postgres.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct ErrorFields {
    message: String,
    severity: Option<String>,
    code: Option<String>,
    detail: Option<String>,
    hint: Option<String>,
    position: Option<String>,
    internal_position: Option<String>,
    internal_query: Option<String>,
    r#where: Option<String>,
    schema: Option<String>,
    table: Option<String>,
    column: Option<String>,
    data_type: Option<String>,
    constraint: Option<String>,
    file: Option<String>,
    line: Option<String>,
    routine: Option<String>,
}

impl SqlError {
    /// An error of the proxy's own.
    pub fn new(sqlstate: &str, message: impl Into<String>) -> Self {
        let fields = ErrorFields {
            message: message.into(),
            severity: Some("ERROR".to_owned()),
            code: Some(sqlstate.to_owned()),
            ..ErrorFields::default()
        };
        Self { status: StatusCode::BAD_REQUEST, stale_plan: false, fields: Box::new(fields) }
    }

    /// The same with another status than 400.
    pub fn with_status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }

    /// The same with advice.
    pub fn with_hint(mut self, hint: &str) -> Self {
        self.fields.hint = Some(hint.to_owned());
        self
    }

    /// Its SQLSTATE.
    pub fn sqlstate(&self) -> Option<&str> {
        self.fields.code.as_deref()
    }

    /// True when nothing was run because a prepared statement is older than the columns of its table.
    pub fn is_stale_plan(&self) -> bool {
        self.stale_plan
    }

    /// The same for a statement that had begun: Postgres says that of statements in functions too.
    pub fn after_begin(self) -> Self {
        Self { stale_plan: false, ..self }
    }

    /// From the body of an `ErrorResponse`.
    pub fn from_postgres(body: &[u8]) -> Self {
        let mut fields = ErrorFields::default();
        for (kind, text) in frame::error_fields(body) {
            let text = String::from_utf8_lossy(text).into_owned();
            let field = match kind {
                b'M' => {
                    fields.message = text;
                    continue;
                }
                // Not translated; it comes after `S`.
                b'S' | b'V' => &mut fields.severity,
                b'C' => &mut fields.code,
                b'D' => &mut fields.detail,
                b'H' => &mut fields.hint,
                b'P' => &mut fields.position,
                b'p' => &mut fields.internal_position,
                b'q' => &mut fields.internal_query,
                b'W' => &mut fields.r#where,
                b's' => &mut fields.schema,
                b't' => &mut fields.table,
                b'c' => &mut fields.column,
                b'd' => &mut fields.data_type,
                b'n' => &mut fields.constraint,
                b'F' => &mut fields.file,
                b'L' => &mut fields.line,
                b'R' => &mut fields.routine,
                // The protocol asks to ignore what it may add.
                _ => continue,
            };
            *field = Some(text);
        }
        let stale_plan = fields.code.as_deref() == Some(FEATURE_NOT_SUPPORTED)
            && fields.routine.as_deref() == Some(STALE_PLAN_ROUTINE);
        Self { status: StatusCode::BAD_REQUEST, stale_plan, fields: Box::new(fields) }
    }
}

impl From<Stop> for SqlError {
    fn from(stop: Stop) -> Self {
        match stop.response {
            Some(response) => Self::from_postgres(response.get(frame::HEADER_BYTES..).unwrap_or_default()),
            None => Self::new("08006", format!("the connection ended: {}", stop.reason)),
        }
    }
}

impl From<RequestError> for SqlError {
    fn from(error: RequestError) -> Self {
        Self::new(error.sqlstate(), error.to_string())
    }
}

impl From<ConnectionStringError> for SqlError {
    fn from(error: ConnectionStringError) -> Self {
        let stop = Stop::refuse(EndReason::ProtocolViolation, FatalError::new("08P01", error.to_string()));
        Self::from(stop)
            .with_hint("Send the header Neon-Connection-String: postgresql://<user>:<password>@<host>/<database>")
    }
}

impl IntoResponse for SqlError {
    fn into_response(self) -> Response {
        // Strings and nulls are always JSON.
        let body = serde_json::to_vec(&self.fields).unwrap_or_default();
        let json = HeaderValue::from_static("application/json");
        (self.status, [(CONTENT_TYPE, json)], body).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_fields_of_postgres_are_kept() {
        let body = b"SERREUR\0VERROR\0C23505\0Mm\0Dd\0Hh\0P1\0p2\0qq\0Ww\0ss\0tt\0cc\0dd\0nn\0Ff\0L3\0Rr\0?x\0\0";
        let error = SqlError::from_postgres(body);
        let json = serde_json::to_value(&error.fields).expect("JSON");
        let wanted = serde_json::json!({
            "message": "m", "severity": "ERROR", "code": "23505", "detail": "d", "hint": "h", "position": "1",
            "internalPosition": "2", "internalQuery": "q", "where": "w", "schema": "s", "table": "t", "column": "c",
            "dataType": "d", "constraint": "n", "file": "f", "line": "3", "routine": "r",
        });
        assert_eq!(json, wanted);
    }

    #[test]
    fn what_the_door_says_is_said_as_postgres_would() {
        let stop = Stop::refuse(EndReason::WrongPassword, FatalError::new("28P01", "no"));
        let error = SqlError::from(stop);
        assert_eq!((error.fields.message.as_str(), error.fields.code.as_deref()), ("no", Some("28P01")));
        assert_eq!(error.into_response().status(), StatusCode::BAD_REQUEST);
    }
}
