//! Pooled clients: many of them on few connections to each compute. The rules are in the crate `connection-pool`; here is
//! what moves the bytes.

mod client;
mod connection;
mod endpoint;
mod exchange;
mod relay;
mod stopping;

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::BytesMut;
use connection_pool::{
    Conversation,
    session::{Reported, Settings},
};
use parking_lot::Mutex;
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;
use types::EndpointId;

pub use self::client::Session;
pub use self::endpoint::PoolOptions;
pub use self::exchange::{Exchange, ExchangeError, Route, TransactionStatus};
use self::{endpoint::EndpointPool, stopping::Stopping};
use crate::{
    cancel::CancelMap,
    end::{EndReason, Stop},
    endpoint_name::PoolMode,
    handshake::Startup,
    messages::{self, FatalError},
    server::ClientStream,
    wake::Waker,
};

/// How often pools are looked after: waiting that took too long, connections that have ended.
const TICK: Duration = Duration::from_millis(250);

/// All endpoints' pools.
pub struct Pools {
    options: PoolOptions,
    waker: Waker,
    endpoints: Mutex<HashMap<EndpointId, Arc<EndpointPool>>>,
}

impl Pools {
    /// No pool yet; connections will be opened through `waker`.
    pub fn new(options: PoolOptions, waker: Waker) -> Self {
        Self { options, waker, endpoints: Mutex::default() }
    }

    /// Looks after the pools. Never returns.
    pub async fn look_after(&self) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let pools: Vec<_> = self.endpoints.lock().values().cloned().collect();
            pools.iter().for_each(|pool| pool.tick());
            drop(pools);
            // More than this list holds one that is in use.
            self.endpoints.lock().retain(|_, pool| Arc::strong_count(pool) > 1 || !pool.is_empty());
        }
    }

    fn endpoint(&self, endpoint: &EndpointId) -> Arc<EndpointPool> {
        let mut endpoints = self.endpoints.lock();
        let pool = endpoints.entry(endpoint.clone());
        pool.or_insert_with(|| EndpointPool::new(endpoint.clone(), self.options, self.waker.clone())).clone()
    }
}

/// A pooled client that is ready for its first query.
struct PooledClient {
    stream: ClientStream,
    session: Session,
}

/// Greets a client that has logged in. `options` are its start-up options without the endpoint.
///
/// Only the first one with these start-up parameters wakes the compute: what Postgres says to it is said to all.
pub async fn greet(
    pools: &Pools,
    cancels: &CancelMap,
    stream: &mut ClientStream,
    endpoint: &EndpointId,
    startup: &Startup,
    options: Option<&str>,
    mode: PoolMode,
) -> Result<Session, Stop> {
    if startup.parameters.iter().any(|(name, value)| name == "replication" && value != "false") {
        let error = FatalError {
            hint: Some("Connect to the endpoint's host without -pooler.".to_owned()),
            ..FatalError::new("0A000", "replication does not work through the pool")
        };
        return Err(Stop::refuse(EndReason::PoolRefused, error));
    }
    let pool = pools.endpoint(endpoint);
    let (profile, settings) = pool.profile(startup, options, mode)?;
    let cancel = cancels.register(None);
    let reported = pool.greeting(&profile).await?;
    let told = Arc::new(with_settings(&reported, &settings));
    let interner = pool.interner().clone();
    let conversation = match mode {
        PoolMode::Transaction => Conversation::new(interner, settings, told.clone()),
        PoolMode::Session => Conversation::session_mode(interner, settings, told.clone()),
    };
    let mut greeting = BytesMut::from(&messages::authentication_ok()[..]);
    for (name, value) in told.iter() {
        greeting.extend_from_slice(&messages::parameter_status(name, value));
    }
    let key = cancel.key();
    greeting.extend_from_slice(&messages::backend_key_data(key.process_id, key.secret));
    greeting.extend_from_slice(&messages::ready_for_query());
    stream.write_all(&greeting).await?;
    stream.flush().await?;
    Ok(Session { pool, profile, conversation: Box::new(conversation), cancel })
}

/// What the client is told: as Postgres reported it, but for what the client itself has asked for.
fn with_settings(reported: &Reported, settings: &Settings) -> Reported {
    let mut told = reported.clone();
    for (name, value) in settings {
        if let Some(reported) = told.get_mut(name) {
            reported.clone_from(value);
        }
    }
    told
}

/// Serves a pooled client to its end.
pub async fn serve(
    stream: ClientStream,
    session: Session,
    draining: CancellationToken,
    kill: CancellationToken,
) -> EndReason {
    client::serve(PooledClient { stream, session }, Stopping::new(draining, kill)).await
}
