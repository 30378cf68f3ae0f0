//! A request to `/sql`, understood: what is asked for, how answers are to look, and the messages for Postgres. Pure.

use axum::http::HeaderMap;
use connection_pool::frame;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    cache_policy::CachePolicyError,
    parameter::{ParameterError, write_parameter},
};
use crate::token::Claims;

/// Parameters that one query may have: the protocol counts them in 16 bits.
const PARAMETERS_MAX: usize = 65_535;

/// Queries that one batch may have.
pub const QUERIES_MAX: usize = 10_000;

/// What a statement is called that server connections remember: Postgres names it in some errors.
const REMEMBERED: &str = "query";

/// Sets the claims of a token for the transaction, as PostgREST does.
const SET_CLAIMS: &str = "SELECT pg_catalog.set_config('request.jwt.claims', $1, true)";

/// How rows are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Shape {
    /// `Neon-Raw-Text-Output: true`: values are Postgres's text rather than JSON values.
    pub raw_text: bool,
    /// `Neon-Array-Mode: true`: a row is an array rather than an object.
    pub arrays: bool,
}

impl Shape {
    /// From the headers of a request.
    pub fn from_headers(headers: &HeaderMap) -> Result<Self, RequestError> {
        Ok(Self {
            raw_text: flag(headers, "neon-raw-text-output")?.unwrap_or(false),
            arrays: flag(headers, "neon-array-mode")?.unwrap_or(false),
        })
    }
}

/// How a batch's transaction begins.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BatchOptions {
    isolation: Option<&'static str>,
    read_only: Option<bool>,
    deferrable: Option<bool>,
}

impl BatchOptions {
    /// From the headers of a request.
    pub fn from_headers(headers: &HeaderMap) -> Result<Self, RequestError> {
        let isolation = match single(headers, "neon-batch-isolation-level")? {
            None => None,
            Some("ReadUncommitted") => Some("READ UNCOMMITTED"),
            Some("ReadCommitted") => Some("READ COMMITTED"),
            Some("RepeatableRead") => Some("REPEATABLE READ"),
            Some("Serializable") => Some("SERIALIZABLE"),
            Some(_) => return Err(RequestError::Isolation),
        };
        let read_only = flag(headers, "neon-batch-read-only")?;
        Ok(Self { isolation, read_only, deferrable: flag(headers, "neon-batch-deferrable")? })
    }

    /// The same for a transaction that only reads, whatever was asked for.
    pub fn reading(self) -> Self {
        Self { read_only: Some(true), ..self }
    }

    fn begin(self) -> String {
        let mut text = "BEGIN".to_owned();
        if let Some(isolation) = self.isolation {
            text.push_str(" ISOLATION LEVEL ");
            text.push_str(isolation);
        }
        if let Some(read_only) = self.read_only {
            text.push_str(if read_only { " READ ONLY" } else { " READ WRITE" });
        }
        if let Some(deferrable) = self.deferrable {
            text.push_str(if deferrable { " DEFERRABLE" } else { " NOT DEFERRABLE" });
        }
        text
    }
}

/// One query with its parameters.
#[derive(Debug, Deserialize)]
pub struct Query<'a> {
    /// Its text, with `$1` and so on.
    pub query: String,
    /// Its parameters.
    #[serde(borrow, default)]
    pub params: Vec<&'a RawValue>,
}

/// The body of a request.
#[derive(Debug)]
pub enum Body<'a> {
    /// `{"query", "params"}`.
    Single(Query<'a>),
    /// `{"queries": […]}`.
    Batch(Vec<Query<'a>>),
}

#[derive(Deserialize)]
struct Fields<'a> {
    query: Option<String>,
    #[serde(borrow, default)]
    params: Option<Vec<&'a RawValue>>,
    #[serde(borrow)]
    queries: Option<Vec<Query<'a>>>,
}

impl<'a> Body<'a> {
    /// Parses it.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, RequestError> {
        let text = std::str::from_utf8(bytes).map_err(|_| RequestError::Encoding)?;
        let fields: Fields<'_> = serde_json::from_str(text).map_err(|error| RequestError::Json(error.to_string()))?;
        match fields {
            Fields { query: Some(query), params, queries: None } => {
                Ok(Self::Single(Query { query, params: params.unwrap_or_default() }))
            }
            Fields { query: None, params: None, queries: Some(queries) } if queries.len() <= QUERIES_MAX => {
                Ok(Self::Batch(queries))
            }
            Fields { query: None, params: None, queries: Some(_) } => Err(RequestError::TooManyQueries),
            _ => Err(RequestError::Kind),
        }
    }
}

/// The messages for a batch: a transaction with one `Sync` at its end, to which Postgres skips when a statement fails.
/// `claims`: those of the token that the request came with.
pub fn batch_messages(
    queries: &[Query<'_>],
    options: BatchOptions,
    claims: Option<&Claims>,
) -> Result<Vec<u8>, RequestError> {
    let mut messages = Vec::new();
    write_query(&options.begin(), &[], &mut messages)?;
    write_claims(claims, &mut messages)?;
    queries.iter().try_for_each(|query| write_query(&query.query, &query.params, &mut messages))?;
    write_query("COMMIT", &[], &mut messages)?;
    write_sync(&mut messages);
    Ok(messages)
}

fn write_sync(messages: &mut Vec<u8>) {
    frame::write(messages, b'S', |_| ());
}

/// The messages for a few statements without parameters, and a `Sync`.
pub fn statements<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Vec<u8>, RequestError> {
    let mut messages = Vec::new();
    texts.into_iter().try_for_each(|text| write_query(text, &[], &mut messages))?;
    write_sync(&mut messages);
    Ok(messages)
}

impl Query<'_> {
    /// The messages for this query by itself, as a statement that server connections remember.
    pub fn remembered_messages(&self) -> Result<Vec<u8>, RequestError> {
        let mut messages = Vec::new();
        write_named(REMEMBERED, &self.query, &self.params, &mut messages)?;
        write_sync(&mut messages);
        Ok(messages)
    }

    /// The messages for this query by itself; with `claims`, it and what sets these are one transaction.
    pub fn messages(&self, claims: Option<&Claims>) -> Result<Vec<u8>, RequestError> {
        let mut messages = Vec::new();
        write_claims(claims, &mut messages)?;
        write_query(&self.query, &self.params, &mut messages)?;
        write_sync(&mut messages);
        Ok(messages)
    }

    /// The messages for some statements and then the query's analysis, without running it.
    pub fn analysis_messages(&self, before: &[&str]) -> Result<Vec<u8>, RequestError> {
        let mut messages = Vec::new();
        before.iter().try_for_each(|text| write_query(text, &[], &mut messages))?;
        write_parse("", &self.query, &mut messages)?;
        write_sync(&mut messages);
        Ok(messages)
    }
}

fn write_parse(name: &str, text: &str, messages: &mut Vec<u8>) -> Result<(), RequestError> {
    if text.contains('\0') {
        return Err(ParameterError::Zero.into());
    }
    frame::write(messages, b'P', |body| {
        body.extend_from_slice(name.as_bytes());
        body.push(0);
        body.extend_from_slice(text.as_bytes());
        body.extend_from_slice(&[0, 0, 0]);
    });
    Ok(())
}

fn write_query(text: &str, parameters: &[&RawValue], messages: &mut Vec<u8>) -> Result<(), RequestError> {
    write_named("", text, parameters, messages)
}

fn write_named(name: &str, text: &str, parameters: &[&RawValue], messages: &mut Vec<u8>) -> Result<(), RequestError> {
    let count = u16::try_from(parameters.len()).map_err(|_| RequestError::TooManyParameters)?;
    write_statement(name, text, count, messages, |body| {
        Ok(parameters.iter().try_for_each(|parameter| write_parameter(parameter, body))?)
    })
}

/// Makes the claims of a token a setting of the transaction; they end with it.
fn write_claims(claims: Option<&Claims>, messages: &mut Vec<u8>) -> Result<(), RequestError> {
    let Some(claims) = claims else { return Ok(()) };
    let text = claims.as_str().as_bytes();
    write_statement("", SET_CLAIMS, 1, messages, |body| {
        // A token is far shorter than this can count.
        body.extend_from_slice(&(text.len() as u32).to_be_bytes());
        body.extend_from_slice(text);
        Ok(())
    })
}

/// `Parse`, `Bind`, `Describe` and `Execute` of a statement and the unnamed portal, all values as text.
fn write_statement(
    name: &str,
    text: &str,
    parameters: u16,
    messages: &mut Vec<u8>,
    write_parameters: impl FnOnce(&mut Vec<u8>) -> Result<(), RequestError>,
) -> Result<(), RequestError> {
    write_parse(name, text, messages)?;
    let mut outcome = Ok(());
    frame::write(messages, b'B', |body| {
        body.push(0);
        body.extend_from_slice(name.as_bytes());
        body.extend_from_slice(&[0, 0, 0]);
        body.extend_from_slice(&parameters.to_be_bytes());
        outcome = write_parameters(body);
        body.extend_from_slice(&[0, 0]);
    });
    frame::write(messages, b'D', |body| body.extend_from_slice(b"P\0"));
    frame::write(messages, b'E', |body| body.extend_from_slice(&[0; 5]));
    outcome
}

/// A header's one value; errors when it is there twice or is no text.
pub fn single<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<Option<&'a str>, RequestError> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(RequestError::HeaderTwice(name));
    }
    value.to_str().map(Some).map_err(|_| RequestError::HeaderText(name))
}

/// The token of a header `Authorization: Bearer <token>`.
pub fn bearer(headers: &HeaderMap) -> Result<Option<&str>, RequestError> {
    let Some(value) = single(headers, "authorization")? else { return Ok(None) };
    let (scheme, token) = value.split_once(' ').ok_or(RequestError::Authorization)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(RequestError::Authorization);
    }
    Ok(Some(token.trim()))
}

fn flag(headers: &HeaderMap, name: &'static str) -> Result<Option<bool>, RequestError> {
    match single(headers, name)? {
        None => Ok(None),
        Some("true") => Ok(Some(true)),
        Some("false") => Ok(Some(false)),
        Some(_) => Err(RequestError::Flag(name)),
    }
}

/// Why a request cannot be understood. The texts are for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Nothing says whom to connect to.
    #[error("the header Neon-Connection-String is missing")]
    NoConnectionString,
    /// A header that may be there once.
    #[error("the header {0} is there more than once")]
    HeaderTwice(&'static str),
    /// A header that is no text.
    #[error("the header {0} is not ASCII text")]
    HeaderText(&'static str),
    /// A header that is not a boolean.
    #[error("the header {0} must be true or false")]
    Flag(&'static str),
    /// Something else than a token.
    #[error("the header Authorization must be Bearer and a JSON Web Token; a password stands in the connection string")]
    Authorization,
    /// No such isolation level.
    #[error("Neon-Batch-Isolation-Level must be ReadUncommitted, ReadCommitted, RepeatableRead or Serializable")]
    Isolation,
    /// The body is not text.
    #[error("the body is not UTF-8 text")]
    Encoding,
    /// The body is not the JSON that it should be.
    #[error("the body is not valid: {0}")]
    Json(String),
    /// Neither a query nor a batch, or both.
    #[error("the body must hold either \"query\" and \"params\", or \"queries\"")]
    Kind,
    /// More queries than a batch may have.
    #[error("a batch may have {QUERIES_MAX} queries")]
    TooManyQueries,
    /// More parameters than the protocol can count.
    #[error("a query may have {PARAMETERS_MAX} parameters")]
    TooManyParameters,
    /// A parameter that cannot be passed on.
    #[error(transparent)]
    Parameter(#[from] ParameterError),
    /// What is said about keeping the answer makes no sense.
    #[error(transparent)]
    Cache(#[from] CachePolicyError),
}

impl RequestError {
    /// SQLSTATE for the client.
    pub fn sqlstate(&self) -> &'static str {
        match self {
            Self::TooManyQueries | Self::TooManyParameters => "54000",
            Self::Parameter(error) => error.sqlstate(),
            Self::Encoding => "22021",
            Self::NoConnectionString
            | Self::HeaderTwice(_)
            | Self::HeaderText(_)
            | Self::Flag(_)
            | Self::Authorization
            | Self::Isolation
            | Self::Json(_)
            | Self::Cache(_)
            | Self::Kind => "08P01",
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn headers_say_how_a_batch_begins() {
        let begin = |pairs| BatchOptions::from_headers(&headers(pairs)).map(BatchOptions::begin);
        assert_eq!(begin(&[]), Ok("BEGIN".to_owned()));
        assert_eq!(
            begin(&[
                ("neon-batch-isolation-level", "Serializable"),
                ("neon-batch-read-only", "true"),
                ("neon-batch-deferrable", "true"),
            ]),
            Ok("BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE".to_owned())
        );
        assert_eq!(
            begin(&[("neon-batch-read-only", "false"), ("neon-batch-deferrable", "false")]),
            Ok("BEGIN READ WRITE NOT DEFERRABLE".to_owned())
        );
        assert_eq!(begin(&[("neon-batch-isolation-level", "serializable; drop")]), Err(RequestError::Isolation));
        assert!(matches!(begin(&[("neon-batch-read-only", "1")]), Err(RequestError::Flag(_))));
    }

    #[test]
    fn a_header_may_be_there_once() {
        let twice = headers(&[("neon-array-mode", "true"), ("neon-array-mode", "true")]);
        assert_eq!(Shape::from_headers(&twice), Err(RequestError::HeaderTwice("neon-array-mode")));
        let shape = Shape::from_headers(&headers(&[("neon-array-mode", "true")])).expect("good");
        assert_eq!(shape, Shape { arrays: true, raw_text: false });
    }

    #[test]
    fn bodies_are_told_apart() {
        let kind = |text: &str| match Body::parse(text.as_bytes()) {
            Ok(Body::Single(query)) => Ok(query.params.len()),
            Ok(Body::Batch(queries)) => Ok(100 + queries.len()),
            Err(error) => Err(error.sqlstate()),
        };
        assert_eq!(kind(r#"{"query":"select 1"}"#), Ok(0));
        assert_eq!(kind(r#"{"query":"select $1","params":[{"a":[1]}], "arrayMode": true}"#), Ok(1));
        assert_eq!(kind(r#"{"queries":[{"query":"select 1","params":[]},{"query":"select 2"}]}"#), Ok(102));
        assert_eq!(kind(r#"{"queries":[]}"#), Ok(100));
        for bad in [
            "",
            "null",
            "[]",
            "{",
            "{}",
            r#"{"query":1}"#,
            r#"{"query":null,"params":[]}"#,
            r#"{"query":"x","params":{}}"#,
            r#"{"query":"x","queries":[]}"#,
            r#"{"params":[],"queries":[]}"#,
            r#"{"queries":{}}"#,
            r#"{"queries":[1]}"#,
            r#"{"query":"x"} trailing"#,
        ] {
            assert_eq!(kind(bad), Err("08P01"), "{bad}");
        }
        let deep = format!(r#"{{"query":"x","params":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert!(kind(&deep).is_ok(), "taken apart only when it is written");
    }

    #[test]
    fn a_batch_is_one_transaction_with_one_sync() {
        let body = Body::parse(br#"{"queries":[{"query":"a"},{"query":"b","params":[null]}]}"#).expect("good");
        let Body::Batch(queries) = body else { panic!("a batch") };
        let messages = batch_messages(&queries, BatchOptions::default(), None).expect("good");
        let (mut rest, mut kinds) = (&messages[..], Vec::new());
        while let Some(header) = frame::header(rest).expect("framed") {
            kinds.push(char::from(header.kind));
            rest = &rest[header.bytes..];
        }
        assert_eq!(kinds.into_iter().collect::<String>(), "PBDEPBDEPBDEPBDES");
    }

    #[test]
    fn a_zero_in_a_text_is_refused() {
        let body = Body::parse(br#"{"query":"select '\u0000'"}"#).expect("JSON");
        let Body::Single(query) = body else { panic!("one query") };
        assert_eq!(query.messages(None).map_err(|error| error.sqlstate()), Err("22021"));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes: Vec<u8>, text in "\\PC{0,80}") {
            let _ = Body::parse(&bytes);
            let _ = Body::parse(text.as_bytes());
            let wrapped = format!(r#"{{"query":"x","params":[{text}]}}"#);
            if let Ok(Body::Single(query)) = Body::parse(wrapped.as_bytes()) {
                let _ = query.messages(None);
            }
        }
    }
}
