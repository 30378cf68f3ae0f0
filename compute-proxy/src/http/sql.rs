//! `POST /sql`: login at the door, one exchange with Postgres, one answer.

use axum::{
    body::Bytes,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use http_body_util::{BodyExt as _, Limited};
use tokio::time::timeout;

use super::{
    Visitor,
    answer::Answer,
    connection_string::ConnectionString,
    error::SqlError,
    request::{BatchOptions, Body, RequestError, Shape, single},
    routes::Context,
};
use crate::{
    end::{EndReason, Stop},
    endpoint_name::{self, Choice, Options},
    login,
    messages::FatalError,
    pooling::{Exchange, ExchangeError, TransactionStatus},
    server::Shared,
    session,
};

/// Name of the header that says whom to connect to, and as whom.
const CONNECTION_STRING: &str = "neon-connection-string";

/// What takes back whatever a request has left open.
const ROLLBACK: &[u8] = b"Q\0\0\0\x0dROLLBACK\0";

/// Answers a request. Dropped when the client leaves: the query is then cancelled.
pub async fn answer(State(context): State<Context>, request: Request) -> Response {
    match attempt(&context, request).await {
        Ok(json) => ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], json).into_response(),
        Err(error) => error.into_response(),
    }
}

async fn attempt(Context { shared, visitor }: &Context, request: Request) -> Result<Vec<u8>, SqlError> {
    let (head, body) = request.into_parts();
    let _slot = shared.session_slot().ok_or_else(|| SqlError::new("53300", "sorry, too many clients already"))?;
    let target = log_in(shared, visitor, &head.headers).await?;
    let shape = Shape::from_headers(&head.headers)?;
    let batch_options = BatchOptions::from_headers(&head.headers)?;
    let body = read_body(shared, body).await?;
    let body = Body::parse(&body)?;
    let messages = body.messages(batch_options)?;
    let limit = shared.config.http_response_max_bytes;
    let answer = match &body {
        Body::Single(_) => Answer::single(shape, limit),
        Body::Batch(queries) => Answer::batch(shape, queries.len(), limit),
    };
    ask(shared, &target, &messages, answer).await
}

/// What a request is for, after a good login.
struct Target {
    endpoint: types::EndpointId,
    connection: ConnectionString,
    options: Options,
}

async fn log_in(shared: &Shared, visitor: &Visitor, headers: &HeaderMap) -> Result<Target, SqlError> {
    let text = single(headers, CONNECTION_STRING)?.ok_or(RequestError::NoConnectionString)?;
    let connection = ConnectionString::parse(text)?;
    let startup = &connection.startup;
    let options = Options::parse(startup.options.as_deref().unwrap_or("")).map_err(Stop::from)?;
    let domain = shared.config.domain.as_deref();
    let chosen = endpoint_name::choose(Some(&connection.host), &options, domain).map_err(Stop::from)?;
    let sent = connection.password.as_bytes();
    let (name, password) = match chosen {
        Choice::Named(name) => (name, sent),
        Choice::AskPassword => login::endpoint_in_password(sent, || session::no_endpoint(domain))?,
    };
    let (fresh_for, from) = (shared.config.http_auth_cache.max(shared.config.auth_cache), visitor.peer.ip());
    shared.login.by_password_within(fresh_for, from, &name.endpoint, &startup.user, password).await?;
    Ok(Target { endpoint: name.endpoint, connection, options })
}

async fn read_body(shared: &Shared, body: axum::body::Body) -> Result<Bytes, SqlError> {
    let limit = shared.config.http_request_max_bytes;
    let reading = timeout(shared.config.handshake_timeout, Limited::new(body, limit).collect());
    match reading.await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            let message = format!("the request is larger than {limit} bytes");
            Err(SqlError::new("54000", message).with_status(StatusCode::PAYLOAD_TOO_LARGE))
        }
        Ok(Err(error)) => Err(SqlError::new("08P01", format!("the request cannot be read: {error}"))),
        Err(_) => {
            Err(SqlError::new("08P01", "the request took too long to arrive").with_status(StatusCode::REQUEST_TIMEOUT))
        }
    }
}

/// One exchange with Postgres.
async fn ask(shared: &Shared, target: &Target, messages: &[u8], mut answer: Answer) -> Result<Vec<u8>, SqlError> {
    let Target { endpoint, connection, options } = target;
    let limit = shared.config.http_response_max_bytes;
    let rest = options.rest.as_deref();
    let beginning = Exchange::begin(&shared.pools, endpoint, &connection.startup, rest, limit);
    let mut exchange = tokio::select! {
        () = shared.draining.cancelled() => return Err(shutdown()),
        exchange = Box::pin(beginning) => exchange?,
    };
    let running = exchange.run(messages, |kind, body| answer.take(kind, body));
    let status = match running.await {
        Ok(status) => status,
        Err(ExchangeError::Closed) => return answer.finish().and_then(|_| Err(closed())),
        Err(error) => return Err(failure(error, limit)),
    };
    if status == TransactionStatus::Open {
        let rolled_back = exchange.run(ROLLBACK, |_, _| Ok::<_, SqlError>(())).await;
        if !matches!(rolled_back, Ok(TransactionStatus::Idle)) {
            // It is closed rather than given to somebody else.
            return answer.finish();
        }
    }
    exchange.finish();
    answer.finish()
}

fn failure(error: ExchangeError<SqlError>, limit: usize) -> SqlError {
    match error {
        ExchangeError::Refused(error) => error,
        ExchangeError::Closed => closed(),
        ExchangeError::Violation(error) => SqlError::new(error.sqlstate(), error.to_string()),
        ExchangeError::TooLong => SqlError::new("54000", format!("a row of the answer is larger than {limit} bytes")),
        ExchangeError::Settings(body) => SqlError::from_postgres(&body),
    }
}

fn closed() -> SqlError {
    SqlError::new("08006", "the compute closed the connection")
}

fn shutdown() -> SqlError {
    let message = "terminating connection due to administrator command";
    Stop::refuse(EndReason::Shutdown, FatalError::new("57P01", message)).into()
}
