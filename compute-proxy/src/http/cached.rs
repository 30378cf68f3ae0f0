//! Queries whose answers may be kept: found, or asked for and kept, or asked for behind the client's back.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;

use super::{
    answer::Answer,
    cache::{Found, Kept, Key, Refreshing},
    cache_policy::CachePolicy,
    error::SqlError,
    request::{Query, Shape, statements},
    sql::{self, Answered, Target},
    stability::{BEGIN_PRINTING, Calls, END_PRINTING},
};
use crate::{pooling::TransactionStatus, server::Shared};

/// SQLSTATE of a change in a transaction that only reads.
const READ_ONLY: &str = "25006";

/// Answers from what is kept, where there is something; a kept answer wakes nothing.
pub async fn answer(
    shared: &Arc<Shared>,
    target: Target,
    query: &Query<'_>,
    shape: Shape,
    policy: CachePolicy,
) -> Result<Answered, SqlError> {
    let asking = Asking::new(shared.clone(), target, query, shape, policy)?;
    let now = Instant::now();
    match shared.answers.find(now, &asking.key, &asking.policy, &asking.target.auth.query_cache) {
        Found::Fresh(kept) => Ok(Answered { json: kept.json.clone(), cache: Some(("hit", Some(kept.age(now)))) }),
        Found::Stale(kept) => {
            if let Some(refreshing) = shared.answers.refresh(asking.key) {
                tokio::spawn(asking.refresh(refreshing));
            }
            Ok(Answered { json: kept.json.clone(), cache: Some(("stale", Some(kept.age(now)))) })
        }
        Found::Nothing => {
            let (json, kept) = asking.ask().await?;
            Ok(Answered { json, cache: Some((if kept { "miss" } else { "bypass" }, None)) })
        }
    }
}

/// All that it takes to ask, also later.
struct Asking {
    shared: Arc<Shared>,
    target: Target,
    shape: Shape,
    policy: CachePolicy,
    /// Stands for the answer.
    key: Key,
    /// Stands for the query, whatever its parameters.
    query_key: Key,
    messages: Vec<u8>,
    reading_messages: Vec<u8>,
    analysis_messages: Vec<u8>,
}

impl Asking {
    fn new(
        shared: Arc<Shared>,
        target: Target,
        query: &Query<'_>,
        shape: Shape,
        policy: CachePolicy,
    ) -> Result<Self, SqlError> {
        let claims = target.claims.as_ref();
        let messages = query.messages(claims)?;
        let session = session(&target);
        let session = || session.iter().map(Vec::as_slice);
        let form = [u8::from(shape.raw_text), u8::from(shape.arrays), u8::from(claims.is_some())];
        Ok(Self {
            // The messages hold the claims of a token, so an answer is for these only.
            key: Key::of(session().chain([&form[..], &messages])),
            query_key: Key::of(session().chain([query.query.as_bytes()])),
            reading_messages: query.reading_messages(claims)?,
            analysis_messages: query.analysis_messages(&BEGIN_PRINTING)?,
            messages,
            shared,
            target,
            shape,
            policy,
        })
    }

    async fn refresh(self, _refreshing: Refreshing) {
        if let Err(error) = Box::pin(self.ask()).await {
            let endpoint = &self.target.endpoint;
            tracing::debug!(%endpoint, sqlstate = error.sqlstate(), "a kept answer could not be fetched anew");
        }
    }

    /// Asks Postgres, and keeps the answer if that is all right; says whether it is.
    async fn ask(&self) -> Result<(Bytes, bool), SqlError> {
        let Self { shared, target, shape, policy, key, query_key, .. } = self;
        let (answers, limit) = (&shared.answers, shared.config.http_response_max_bytes);
        let before = usize::from(target.claims.is_some());
        let stable = match answers.verdict(query_key) {
            Some(stable) => stable,
            None => {
                let stable = self.is_stable().await?;
                answers.set_verdict(*query_key, stable);
                stable
            }
        };
        if stable {
            let asked = Instant::now();
            let answer = Answer::single_in_transaction(*shape, limit).after(before);
            match sql::ask(shared, target, &self.reading_messages, answer).await {
                // The cache has a bound of its own.
                Ok((json, _share)) => {
                    let json = Bytes::from(json);
                    answers.keep(*key, Kept::new(json.clone(), asked, policy, &target.auth.query_cache));
                    return Ok((json, true));
                }
                // It has become one that changes something; nothing was done.
                Err(error) if error.sqlstate() == Some(READ_ONLY) => answers.set_verdict(*query_key, false),
                Err(error) => return Err(error),
            }
        }
        let answer = Answer::single(*shape, limit).after(before);
        let (json, share) = sql::ask(shared, target, &self.messages, answer).await?;
        Ok((share.with(json), false))
    }

    /// Asks Postgres whether the query only reads and calls nothing volatile. Runs nothing of it.
    async fn is_stable(&self) -> Result<bool, SqlError> {
        let Self { shared, target, .. } = self;
        let mut exchange = sql::begin(shared, target).await?;
        let (mut calls, mut error) = (Calls::default(), None);
        let analysing = sql::run(shared, &mut exchange, &self.analysis_messages, |kind, body| {
            match kind {
                b'N' => calls.take_notice(body),
                b'E' => error = Some(SqlError::from_postgres(body)),
                _ => {}
            }
            Ok(())
        });
        let status = analysing.await?;
        let question = calls.question().filter(|_| error.is_none() && status == TransactionStatus::Open);
        let Some(question) = question else {
            sql::end(exchange, status).await;
            return error.map_or(Ok(false), Err);
        };
        let mut stable = false;
        let messages = statements([END_PRINTING, &question])?;
        let asking = sql::run(shared, &mut exchange, &messages, |kind, body| {
            stable |= kind == b'D' && body == b"\0\x01\0\0\0\x01t";
            Ok(())
        });
        let status = asking.await?;
        sql::end(exchange, status).await;
        Ok(stable)
    }
}

/// All of a session that its answers depend on: whose it is, and how it begins.
fn session(target: &Target) -> Vec<Vec<u8>> {
    let Target { endpoint, connection, options, auth, .. } = target;
    let startup = &connection.startup;
    let mut parts = vec![
        endpoint.as_str().into(),
        auth.branch.branch.as_str().into(),
        startup.database.clone().into_bytes(),
        startup.user.clone().into_bytes(),
        options.rest.clone().unwrap_or_default().into_bytes(),
    ];
    // Its name changes no answer.
    let parameters = startup.parameters.iter().filter(|(name, _)| name != "application_name");
    parts.extend(parameters.flat_map(|(name, value)| [name.clone().into_bytes(), value.clone().into_bytes()]));
    parts
}
