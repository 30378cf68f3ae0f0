//! Queries whose answers may be kept: found, or asked for and kept, or asked for behind the client's back.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;

use super::{
    answer::Answer,
    cache::{Found, Kept, Key, Refreshing},
    cache_policy::CachePolicy,
    error::SqlError,
    request::{BatchOptions, Body, Query, Shape, batch_messages, statements},
    sql::{self, Answered, Target},
    stability::{BEGIN_PRINTING, Calls, END_PRINTING},
};
use crate::{pooling::TransactionStatus, server::Shared};

/// SQLSTATE of a change in a transaction that only reads.
const READ_ONLY: &str = "25006";

/// Queries of a batch whose answer may be kept: each new text is analysed first.
const QUERIES_MAX: usize = 100;

/// Whether a body's answer can be kept at all.
pub fn may_be_kept(body: &Body<'_>) -> bool {
    match body {
        Body::Single(_) => true,
        Body::Batch(queries) => (1..=QUERIES_MAX).contains(&queries.len()),
    }
}

/// Answers from what is kept, where there is something; a kept answer wakes nothing.
pub async fn answer(
    shared: &Arc<Shared>,
    target: Arc<Target>,
    body: &Body<'_>,
    options: BatchOptions,
    shape: Shape,
    policy: CachePolicy,
) -> Result<Answered, SqlError> {
    let asking = Arc::new(Asking::new(shared.clone(), target, body, options, shape, policy)?);
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
    target: Arc<Target>,
    shape: Shape,
    policy: CachePolicy,
    /// Queries of a batch; `None`: it is a single query.
    batch: Option<usize>,
    /// Stands for the answer.
    key: Key,
    /// The texts, whatever their parameters.
    texts: Vec<Text>,
    messages: Vec<u8>,
    reading_messages: Vec<u8>,
}

/// A query's text.
struct Text {
    /// Stands for it.
    key: Key,
    analysis_messages: Vec<u8>,
}

impl Asking {
    fn new(
        shared: Arc<Shared>,
        target: Arc<Target>,
        body: &Body<'_>,
        options: BatchOptions,
        shape: Shape,
        policy: CachePolicy,
    ) -> Result<Self, SqlError> {
        let claims = target.claims.as_ref();
        let (queries, batch, messages) = match body {
            Body::Single(query) => (std::slice::from_ref(query), None, query.messages(claims)?),
            Body::Batch(queries) => (&queries[..], Some(queries.len()), batch_messages(queries, options, claims)?),
        };
        let options = if batch.is_some() { options } else { BatchOptions::default() };
        let session = session(&target);
        let session = || session.iter().map(Vec::as_slice);
        let form = [shape.raw_text, shape.arrays, claims.is_some(), batch.is_some()].map(u8::from);
        let text = |query: &Query<'_>| {
            let key = Key::of(session().chain([query.query.as_bytes()]));
            Ok::<_, SqlError>(Text { key, analysis_messages: query.analysis_messages(&BEGIN_PRINTING)? })
        };
        Ok(Self {
            // The messages hold the claims of a token, so an answer is for these only.
            key: Key::of(session().chain([&form[..], &messages])),
            texts: queries.iter().map(text).collect::<Result<_, _>>()?,
            reading_messages: batch_messages(queries, options.reading(), claims)?,
            messages,
            batch,
            shared,
            target,
            shape,
            policy,
        })
    }

    async fn refresh(self: Arc<Self>, _refreshing: Refreshing) {
        if let Err(error) = Box::pin(self.ask()).await {
            let endpoint = &self.target.endpoint;
            tracing::debug!(%endpoint, sqlstate = error.sqlstate(), "a kept answer could not be fetched anew");
        }
    }

    /// Asks Postgres, and keeps the answer if that is all right; says whether it is. Those who ask for what may be kept at the
    /// same time share one answer.
    async fn ask(self: &Arc<Self>) -> Result<(Bytes, bool), SqlError> {
        if self.are_all_stable().await? {
            let fetching = || {
                let this = self.clone();
                async move { this.fetch().await }
            };
            if let Some(json) = self.shared.answers.fetching.run(self.fetch_key(), fetching).await? {
                return Ok((json, true));
            }
        }
        let (json, share) = sql::ask(&self.shared, &self.target, &self.messages, self.answer(false)).await?;
        Ok((share.with(json), false))
    }

    /// Fetches the answer in a transaction that only reads, and keeps it. `None`: a query has become one that changes
    /// something; nothing was done.
    async fn fetch(&self) -> Result<Option<Bytes>, SqlError> {
        let Self { shared, target, policy, key, .. } = self;
        let asked = Instant::now();
        match sql::ask(shared, target, &self.reading_messages, self.answer(true)).await {
            // The cache has a bound of its own.
            Ok((json, _share)) => {
                let json = Bytes::from(json);
                shared.answers.keep(*key, Kept::new(json.clone(), asked, policy, &target.auth.query_cache));
                Ok(Some(json))
            }
            Err(error) if error.sqlstate() == Some(READ_ONLY) => {
                self.texts.iter().for_each(|text| shared.answers.set_verdict(text.key, false));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Stands for the answer and for all by which it can become invalid: who asks after an invalidation does not join who
    /// asked before.
    fn fetch_key(&self) -> Key {
        let Self { policy, key, target, .. } = self;
        let known = &target.auth.query_cache;
        let numbers = policy.tags.iter().map(|tag| format!("{tag} {:?}", known.tags.get(tag)));
        let policy = format!("{} {:?} {:?}", known.all, policy.max_age, policy.stale);
        let parts: Vec<_> = numbers.chain([policy]).collect();
        Key::of([key.as_bytes()].into_iter().chain(parts.iter().map(String::as_bytes)))
    }

    /// For the answer of Postgres. `reading`: to the messages of a transaction that only reads.
    fn answer(&self, reading: bool) -> Answer {
        let limit = self.shared.config.http_response_max_bytes;
        let answer = match self.batch {
            Some(count) => Answer::batch(self.shape, count, limit),
            None if reading => Answer::single_in_transaction(self.shape, limit),
            None => Answer::single(self.shape, limit),
        };
        answer.after(usize::from(self.target.claims.is_some()))
    }

    async fn are_all_stable(self: &Arc<Self>) -> Result<bool, SqlError> {
        let answers = &self.shared.answers;
        for (index, text) in self.texts.iter().enumerate() {
            let analysing = || {
                let this = self.clone();
                async move { this.is_stable(&this.texts[index]).await }
            };
            let stable = match answers.verdict(&text.key) {
                Some(stable) => stable,
                None => answers.analysing.run(text.key, analysing).await?,
            };
            if !stable {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Asks Postgres whether a query only reads and calls nothing volatile, and remembers that. Runs nothing of it.
    async fn is_stable(&self, text: &Text) -> Result<bool, SqlError> {
        let stable = self.analyse(&text.analysis_messages).await?;
        self.shared.answers.set_verdict(text.key, stable);
        Ok(stable)
    }

    async fn analyse(&self, messages: &[u8]) -> Result<bool, SqlError> {
        let Self { shared, target, .. } = self;
        let mut exchange = sql::begin(shared, target).await?;
        let (mut calls, mut error) = (Calls::default(), None);
        let analysing = sql::run(shared, &mut exchange, messages, |kind, body| {
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
