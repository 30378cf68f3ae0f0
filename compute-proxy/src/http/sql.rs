//! `POST /sql`: login at the door, one exchange with Postgres, one answer.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Bytes,
    extract::Request,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::BytesMut;
use control_plane_api::internal::RoleAuth;
use futures::StreamExt as _;
use tokio::time::timeout;

use super::{
    answer::Answer,
    budget::Share,
    cache_policy::CacheWish,
    cached,
    connection_string::ConnectionString,
    error::SqlError,
    request::{BatchOptions, Body, Query, RequestError, Shape, batch_messages, bearer, single},
    routes::Context,
};
use crate::{
    end::{EndReason, Stop},
    endpoint_name::{self, Choice, Options},
    login::{self, Admitted},
    messages::FatalError,
    pooling::{Exchange, ExchangeError, Route, TransactionStatus},
    server::Shared,
    session,
    token::Claims,
};

/// Name of the header that says whom to connect to, and as whom.
const CONNECTION_STRING: &str = "neon-connection-string";

/// Name of the header that says whether the answer may be kept, and in answers, what came of it.
const CACHE: &str = "dormouse-cache";

/// What takes back whatever a request has left open.
const ROLLBACK: &[u8] = b"Q\0\0\0\x0dROLLBACK\0";

/// Answers a request. Dropped when the client leaves: the query is then cancelled.
pub async fn answer(context: &Context, request: Request) -> Response {
    match attempt(context, request).await {
        Ok(answered) => answered.into_response(),
        Err(error) => error.into_response(),
    }
}

async fn attempt(context: &Context, request: Request) -> Result<Answered, SqlError> {
    let shared = &context.shared;
    let (head, body) = request.into_parts();
    let _slot = shared.session_slot().ok_or_else(|| SqlError::new("53300", "sorry, too many clients already"))?;
    let target = log_in(context, &head.headers).await?;
    let shape = Shape::from_headers(&head.headers)?;
    let batch_options = BatchOptions::from_headers(&head.headers)?;
    let wish = match single(&head.headers, CACHE)?.or(target.connection.cache.as_deref()) {
        Some(text) => CacheWish::parse(text).map_err(RequestError::from)?,
        None => CacheWish::default(),
    };
    let mut share = shared.http_memory.share();
    let body = read_body(shared, &mut share, body).await?;
    let body = Body::parse(&body)?;
    let policy = wish.policy(target.auth.query_cache.settings);
    let cache = policy.is_some().then_some(("bypass", None));
    if let Some(policy) = policy.filter(|_| cached::may_be_kept(&body)) {
        return Box::pin(cached::answer(shared, target, &body, batch_options, shape, policy)).await;
    }
    let (json, answer_share) = match &body {
        Body::Single(query) => ask_single(shared, &target, query, shape).await?,
        Body::Batch(queries) => {
            let claims = target.claims.as_ref();
            let messages = batch_messages(queries, batch_options, claims)?;
            let answer = Answer::batch(shape, queries.len(), shared.config.http_response_max_bytes);
            ask(shared, &target, &messages, answer.after(usize::from(claims.is_some()))).await?
        }
    };
    Ok(Answered { json: answer_share.with(json), cache })
}

/// One query by itself. A text that comes again is a statement that server connections remember.
async fn ask_single(
    shared: &Shared,
    target: &Target,
    query: &Query<'_>,
    shape: Shape,
) -> Result<(Vec<u8>, Share), SqlError> {
    let limit = shared.config.http_response_max_bytes;
    let claims = target.claims.as_ref();
    // With claims it is one of two in a transaction, which cannot be tried again.
    let place = shared.repeated.place(&target.endpoint, &query.query).filter(|_| claims.is_none());
    if place.is_some_and(|place| shared.repeated.contains(place)) {
        let answer = Answer::single(shape, limit);
        match ask(shared, target, &query.remembered_messages()?, answer).await {
            Err(error) if error.is_stale_plan() => {}
            outcome => return outcome,
        }
    }
    let answer = Answer::single(shape, limit).after(usize::from(claims.is_some()));
    let outcome = ask(shared, target, &query.messages(claims)?, answer).await;
    if let Some(place) = place.filter(|_| outcome.is_ok()) {
        shared.repeated.insert(place);
    }
    outcome
}

/// A good answer.
pub struct Answered {
    /// Its JSON.
    pub json: Bytes,
    /// What the cache did, and how old the answer is; `None`: the cache was not asked.
    pub cache: Option<(&'static str, Option<Duration>)>,
}

impl IntoResponse for Answered {
    fn into_response(self) -> Response {
        let mut response = self.json.into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some((outcome, age)) = self.cache {
            headers.insert(CACHE, HeaderValue::from_static(outcome));
            if let Some(age) = age {
                headers.insert(header::AGE, age.as_secs().into());
            }
        }
        response
    }
}

/// What a request is for, after a good login.
pub struct Target {
    /// The endpoint.
    pub endpoint: types::EndpointId,
    /// Role, database, parameters.
    pub connection: ConnectionString,
    /// Start-up options without the endpoint.
    pub options: Options,
    /// What the control plane says of the role and its endpoint.
    pub auth: Arc<RoleAuth>,
    /// What a token says of its holder, when it came in place of a password.
    pub claims: Option<Claims>,
    /// Where its connections come from.
    pub route: Route,
}

async fn log_in(context: &Context, headers: &HeaderMap) -> Result<Arc<Target>, SqlError> {
    let Context { shared, visitor, last_login, .. } = context;
    let text = single(headers, CONNECTION_STRING)?.ok_or(RequestError::NoConnectionString)?;
    let (token, from) = (bearer(headers)?, visitor.peer.ip());
    let remembered = if token.is_none() { last_login.find(text.as_bytes()) } else { None };
    if let Some(target) = remembered {
        shared.login.check_limit(from, &target.endpoint)?;
        return Ok(target);
    }
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
    let fresh_for = shared.config.http_auth_cache.max(shared.config.auth_cache);
    let (login, endpoint, user) = (&shared.login, name.endpoint, &startup.user);
    let (auth, claims, asked) = match token {
        Some(token) => {
            let (auth, claims) = login.by_token(fresh_for, from, &endpoint, user, token).await?;
            (auth, Some(claims), None)
        }
        None => {
            let Admitted { auth, asked } = login.by_password_within(fresh_for, from, &endpoint, user, password).await?;
            (auth, None, Some(asked))
        }
    };
    let route = Route::new(&shared.pools, &endpoint, startup, options.rest.as_deref())?;
    // It is remembered, but not its password.
    let connection = ConnectionString { password: String::new(), ..connection };
    let target = Arc::new(Target { endpoint, connection, options, auth, claims, route });
    if let Some(asked) = asked {
        last_login.remember(text.as_bytes(), &target, asked, fresh_for);
    }
    Ok(target)
}

/// The whole body; its share of memory holds it and the messages that are made of it.
async fn read_body(shared: &Shared, share: &mut Share, body: axum::body::Body) -> Result<Bytes, SqlError> {
    let limit = shared.config.http_request_max_bytes;
    let reading = async {
        let mut chunks = body.into_data_stream();
        let mut read = BytesMut::new();
        while let Some(chunk) = chunks.next().await {
            let chunk =
                chunk.map_err(|error| SqlError::new("08P01", format!("the request cannot be read: {error}")))?;
            if read.len() + chunk.len() > limit {
                let error = SqlError::new("54000", format!("the request is larger than {limit} bytes"));
                return Err(error.with_status(StatusCode::PAYLOAD_TOO_LARGE));
            }
            read.extend_from_slice(&chunk);
            share.grow(2 * read.len())?;
        }
        Ok(read.freeze())
    };
    timeout(shared.config.handshake_timeout, reading).await.unwrap_or_else(|_| {
        let error = SqlError::new("08P01", "the request took too long to arrive");
        Err(error.with_status(StatusCode::REQUEST_TIMEOUT))
    })
}

/// One exchange with Postgres; its answer as JSON, with its share of memory.
pub async fn ask(
    shared: &Shared,
    target: &Target,
    messages: &[u8],
    mut answer: Answer,
) -> Result<(Vec<u8>, Share), SqlError> {
    let mut exchange = begin(shared, target).await?;
    let mut share = shared.http_memory.share();
    let take = |kind, body: &[u8]| {
        answer.take(kind, body)?;
        share.grow(answer.bytes() + body.len())
    };
    let status = match run(shared, &mut exchange, messages, take).await {
        Ok(status) => status,
        // What Postgres said before it closed the connection says more.
        Err(Failure::Closed(error)) => return answer.finish().and(Err(error)),
        Err(Failure::Other(error)) => return Err(error),
    };
    end(exchange, status).await;
    Ok((answer.finish()?, share))
}

/// Borrows a connection.
pub async fn begin(shared: &Shared, target: &Target) -> Result<Exchange, SqlError> {
    if shared.draining.is_cancelled() {
        return Err(shutdown());
    }
    let mut beginning = Box::pin(Exchange::begin(&target.route, shared.config.http_response_max_bytes));
    tokio::select! {
        biased;
        exchange = &mut beginning => Ok(exchange?),
        () = shared.draining.cancelled() => Err(shutdown()),
    }
}

/// Why an exchange has no whole answer.
pub enum Failure {
    /// Postgres closed the connection.
    Closed(SqlError),
    /// Anything else.
    Other(SqlError),
}

impl From<Failure> for SqlError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Closed(error) | Failure::Other(error) => error,
        }
    }
}

/// Sends messages and takes the answer.
pub async fn run(
    shared: &Shared,
    exchange: &mut Exchange,
    messages: &[u8],
    take: impl FnMut(u8, &[u8]) -> Result<(), SqlError>,
) -> Result<TransactionStatus, Failure> {
    exchange.run(messages, take).await.map_err(|error| {
        Failure::Other(match error {
            ExchangeError::Closed => {
                return Failure::Closed(SqlError::new("08006", "the compute closed the connection"));
            }
            ExchangeError::Refused(error) => error,
            ExchangeError::Violation(error) => SqlError::new(error.sqlstate(), error.to_string()),
            ExchangeError::TooLong => {
                let limit = shared.config.http_response_max_bytes;
                SqlError::new("54000", format!("a row of the answer is larger than {limit} bytes"))
            }
            ExchangeError::Settings(body) => SqlError::from_postgres(&body),
        })
    })
}

/// Gives the connection back without a transaction. Where that cannot be done it is closed.
pub async fn end(mut exchange: Exchange, status: TransactionStatus) {
    if status == TransactionStatus::Open {
        let rolled_back = exchange.run(ROLLBACK, |_, _| Ok::<_, SqlError>(())).await;
        if !matches!(rolled_back, Ok(TransactionStatus::Idle)) {
            return;
        }
    }
    exchange.finish();
}

fn shutdown() -> SqlError {
    let message = "terminating connection due to administrator command";
    Stop::refuse(EndReason::Shutdown, FatalError::new("57P01", message)).into()
}
