//! The pools of one endpoint: carries out what the scheduler says.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use bytes::Bytes;
use connection_pool::{
    Interner,
    scheduler::{ClientId, Command, ConnectionId, Key, Limits, OpenFailure, PoolId, Refusal, Scheduler},
    session::{Reported, Settings},
};
use parking_lot::Mutex;
use tokio::{net::UnixStream, sync::oneshot};
use types::EndpointId;

use super::connection::{Lease, ServerConnection};
use crate::{
    compute::{self, OpenError},
    end::{EndReason, Stop},
    endpoint_name::PoolMode,
    handshake::Startup,
    messages::FatalError,
    session::wake_refusal,
    token::CLAIMS_SETTING,
    wake::{WakeError, Waker, Woken},
};

/// Connections that an endpoint may have until Postgres has said how many it allows.
const FIRST_TOTAL: usize = 10;

/// Of the connections that Postgres allows, in percent, the pools take at most so many: direct clients need some too.
const SHARE_PERCENT: usize = 90;

/// How long a connection may take to open, waking included.
const OPEN_TIMEOUT: Duration = Duration::from_secs(75);

/// Settings of pools.
#[derive(Debug, Clone, Copy)]
pub struct PoolOptions {
    /// Connections of one (database, role); `None`: as many as the endpoint may have.
    pub size: Option<usize>,
    /// How long a client waits for a connection.
    pub queue_timeout: Duration,
    /// How long an unused connection is kept.
    pub idle_timeout: Duration,
    /// Clients that may wait for the connections of one endpoint.
    pub queue: usize,
}

/// Start-up parameters that connections are opened with.
pub struct Profile {
    key: Key,
    /// The start-up message.
    message: Bytes,
    /// What Postgres reported to the connection that was opened last.
    reported: Mutex<Option<Arc<Reported>>>,
}

/// One endpoint's connections.
pub struct EndpointPool {
    endpoint: EndpointId,
    options: PoolOptions,
    waker: Waker,
    begun: Instant,
    interner: Arc<Interner>,
    state: Mutex<State>,
    this: Weak<Self>,
}

struct State {
    scheduler: Scheduler,
    idle: HashMap<ConnectionId, Box<ServerConnection>>,
    waiting: HashMap<ClientId, oneshot::Sender<Answer>>,
    profiles: HashMap<Bytes, Weak<Profile>>,
    by_key: HashMap<Key, Weak<Profile>>,
    pools: HashMap<(String, String), PoolId>,
    last_client: u64,
    last_profile: u32,
    limits_known: bool,
    /// Why the last connection could not be opened.
    failure: Option<Arc<Failure>>,
}

type Answer = Result<Box<ServerConnection>, Refused>;

/// Why a client gets no connection.
#[derive(Clone)]
pub struct Refused {
    reason: Refusal,
    failure: Option<Arc<Failure>>,
}

struct Failure {
    reason: EndReason,
    response: Bytes,
}

impl EndpointPool {
    /// No connection yet.
    pub fn new(endpoint: EndpointId, options: PoolOptions, waker: Waker) -> Arc<Self> {
        let limits = limits(options, FIRST_TOTAL);
        Arc::new_cyclic(|this| Self {
            endpoint,
            options,
            waker,
            begun: Instant::now(),
            interner: Arc::default(),
            state: Mutex::new(State {
                scheduler: Scheduler::new(limits),
                idle: HashMap::new(),
                waiting: HashMap::new(),
                profiles: HashMap::new(),
                by_key: HashMap::new(),
                pools: HashMap::new(),
                last_client: 0,
                last_profile: 0,
                limits_known: false,
                failure: None,
            }),
            this: this.clone(),
        })
    }

    /// Prepared statements of all its clients.
    pub fn interner(&self) -> &Arc<Interner> {
        &self.interner
    }

    /// True when it has no connection and nobody waits.
    pub fn is_empty(&self) -> bool {
        let state = self.state.lock();
        state.scheduler.connections() == 0 && state.scheduler.waiting() == 0
    }

    /// What a client's connections are opened with, and what it sets on top of that.
    ///
    /// Clients differ most in `application_name` and in the claims of their tokens, so in transaction mode these are set
    /// rather than opened with.
    pub fn profile(
        &self,
        startup: &Startup,
        options: Option<&str>,
        mode: PoolMode,
    ) -> Result<(Arc<Profile>, Settings), Stop> {
        let mut startup = startup.clone();
        let mut settings = Settings::new();
        if mode == PoolMode::Transaction {
            startup.parameters.retain(|(name, value)| {
                let is_set = name == "application_name" || name == CLAIMS_SETTING;
                if is_set {
                    settings.insert(name.clone(), value.clone());
                }
                !is_set
            });
        }
        startup.parameters.sort();
        let message = compute::encode_startup(&startup, options).map_err(|_| {
            Stop::refuse(EndReason::Internal, FatalError::new("XX000", "cannot pass the parameters on"))
        })?;
        let state = &mut *self.state.lock();
        if let Some(profile) = state.profiles.get(&message).and_then(Weak::upgrade) {
            return Ok((profile, settings));
        }
        state.profiles.retain(|_, profile| profile.strong_count() > 0);
        state.by_key.retain(|_, profile| profile.strong_count() > 0);
        let next_pool = PoolId(state.pools.len() as u32);
        let pool = *state.pools.entry((startup.database, startup.user)).or_insert(next_pool);
        state.last_profile += 1;
        let key = Key { pool, profile: state.last_profile };
        let profile = Arc::new(Profile { key, message: message.clone(), reported: Mutex::default() });
        state.profiles.insert(message, Arc::downgrade(&profile));
        state.by_key.insert(key, Arc::downgrade(&profile));
        Ok((profile, settings))
    }

    /// What Postgres reports to connections with this profile; opens one to learn it.
    pub async fn greeting(&self, profile: &Arc<Profile>) -> Result<Arc<Reported>, Stop> {
        if let Some(reported) = profile.reported.lock().clone() {
            return Ok(reported);
        }
        let mut lease = self.acquire(profile, &Settings::new()).await.map_err(|refused| refused.into_stop(self))?;
        let reported = lease.connection().state.reported.clone();
        lease.give_back();
        Ok(profile.reported.lock().clone().unwrap_or(reported))
    }

    /// What Postgres has reported to connections with this profile so far; nothing before the first one.
    pub fn reported(&self, profile: &Profile) -> Arc<Reported> {
        profile.reported.lock().clone().unwrap_or_default()
    }

    /// A connection for a client with these settings; waits for one if need be.
    pub async fn acquire(&self, profile: &Arc<Profile>, settings: &Settings) -> Result<Lease, Refused> {
        let this = self.this.upgrade().expect("held by the caller");
        loop {
            let mut waiter = match self.request(profile.key, tag(settings)) {
                Ok(connection) => {
                    let mut lease = Lease::new(this.clone(), connection);
                    if lease.connection().is_usable() {
                        return Ok(lease);
                    }
                    continue;
                }
                Err(waiter) => waiter,
            };
            let answer = (&mut waiter.receiver).await;
            let mut lease = Lease::new(this.clone(), answer.unwrap_or_else(|_| Err(Refused::pool_gone()))?);
            if lease.connection().is_usable() {
                return Ok(lease);
            }
        }
    }

    fn request(&self, key: Key, settings: u64) -> Result<Box<ServerConnection>, Waiter<'_>> {
        let state = &mut *self.state.lock();
        state.last_client += 1;
        let client = ClientId(state.last_client);
        let mut commands = Vec::new();
        if let Some(id) = state.scheduler.request(self.now(), client, key, settings, &mut commands)
            && let Some(connection) = state.idle.remove(&id)
        {
            return Ok(connection);
        }
        let (sender, receiver) = oneshot::channel();
        state.waiting.insert(client, sender);
        self.obey(state, commands);
        Err(Waiter { pool: self, client, receiver })
    }

    /// A connection comes back.
    pub fn release(&self, connection: Box<ServerConnection>) {
        let state = &mut *self.state.lock();
        let (id, settings) = (connection.id, tag(&connection.state.settings));
        state.idle.insert(id, connection);
        let mut commands = Vec::new();
        state.scheduler.release(self.now(), id, settings, &mut commands);
        self.obey(state, commands);
    }

    /// A connection is closed.
    pub fn closed(&self, id: ConnectionId) {
        let state = &mut *self.state.lock();
        let mut commands = Vec::new();
        state.scheduler.closed(self.now(), id, &mut commands);
        self.obey(state, commands);
    }

    /// Time passes.
    pub fn tick(&self) {
        let state = &mut *self.state.lock();
        let mut commands = Vec::new();
        let ended: Vec<_> = state.idle.iter_mut().filter_map(|(id, idle)| (!idle.is_usable()).then_some(*id)).collect();
        for id in ended {
            state.idle.remove(&id);
            state.scheduler.closed(self.now(), id, &mut commands);
        }
        state.scheduler.tick(self.now(), &mut commands);
        self.obey(state, commands);
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    fn obey(&self, state: &mut State, commands: Vec<Command>) {
        let mut queue = commands;
        while !queue.is_empty() {
            for command in std::mem::take(&mut queue) {
                match command {
                    Command::Assign { client, connection } => {
                        let Some(held) = state.idle.remove(&connection) else { continue };
                        let sender = state.waiting.remove(&client);
                        let undelivered = match sender {
                            Some(sender) => sender.send(Ok(held)).err(),
                            None => Some(Ok(held)),
                        };
                        // It left in this very moment: the next one gets it.
                        if let Some(Ok(held)) = undelivered {
                            let settings = tag(&held.state.settings);
                            state.idle.insert(connection, held);
                            state.scheduler.release(self.now(), connection, settings, &mut queue);
                        }
                    }
                    Command::Open { connection, key } => self.open(state, connection, key),
                    Command::Close { connection } => {
                        if let Some(held) = state.idle.remove(&connection) {
                            held.say_goodbye();
                        }
                    }
                    Command::Refuse { client, reason } => {
                        let failure = state.failure.clone().filter(|_| reason == Refusal::OpenFailed);
                        if let Some(sender) = state.waiting.remove(&client) {
                            // Nobody may be left to hear it.
                            let _ = sender.send(Err(Refused { reason, failure }));
                        }
                    }
                }
            }
        }
    }

    fn open(&self, state: &State, id: ConnectionId, key: Key) {
        let Some(this) = self.this.upgrade() else { return };
        let profile = state.by_key.get(&key).and_then(Weak::upgrade);
        let learn = !state.limits_known;
        tokio::spawn(async move {
            let Some(profile) = profile else {
                return this.open_failed(id, OpenFailure::Refused, None);
            };
            let deadline = tokio::time::Instant::now() + OPEN_TIMEOUT;
            match this.waker.open(&this.endpoint, &profile.message, deadline).await {
                Ok(woken) => this.opened(id, &profile, woken, learn).await,
                Err(error) => this.refused(id, error),
            }
        });
    }

    async fn opened(&self, id: ConnectionId, profile: &Arc<Profile>, woken: Woken, learn: bool) {
        let Woken { mut session, socket, .. } = woken;
        let total = if learn { ask_total(&mut session.stream).await } else { None };
        let Some(connection) = ServerConnection::new(id, session, socket, profile.clone()) else {
            tracing::error!(endpoint = %self.endpoint, "the compute's greeting is not Postgres's");
            return self.open_failed(id, OpenFailure::Refused, None);
        };
        *profile.reported.lock() = Some(connection.state.reported.clone());
        let state = &mut *self.state.lock();
        if let Some(total) = total {
            state.limits_known = true;
            state.scheduler.set_limits(limits(self.options, (total * SHARE_PERCENT / 100).max(1)));
        }
        state.idle.insert(id, Box::new(connection));
        let mut commands = Vec::new();
        state.scheduler.opened(self.now(), id, &mut commands);
        self.obey(state, commands);
    }

    fn refused(&self, id: ConnectionId, error: WakeError) {
        let full = matches!(&error, WakeError::Open(OpenError::Refused { sqlstate, .. }) if sqlstate == "53300");
        if full {
            tracing::debug!(endpoint = %self.endpoint, "the compute has no room for another connection");
            return self.open_failed(id, OpenFailure::Full, None);
        }
        let Stop { reason, response } = wake_refusal(&self.endpoint, error);
        let failure = response.map(|response| Arc::new(Failure { reason, response }));
        self.open_failed(id, OpenFailure::Refused, failure);
    }

    fn open_failed(&self, id: ConnectionId, how: OpenFailure, failure: Option<Arc<Failure>>) {
        let state = &mut *self.state.lock();
        state.failure = failure;
        let mut commands = Vec::new();
        state.scheduler.open_failed(self.now(), id, how, &mut commands);
        self.obey(state, commands);
    }
}

/// A place in the queue; given up when dropped.
struct Waiter<'a> {
    pool: &'a EndpointPool,
    client: ClientId,
    receiver: oneshot::Receiver<Answer>,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        {
            let state = &mut *self.pool.state.lock();
            if state.waiting.remove(&self.client).is_some() {
                state.scheduler.forget(self.client);
            }
        }
        // What was sent and not taken must not be lost.
        if let Ok(Ok(connection)) = self.receiver.try_recv() {
            self.pool.release(connection);
        }
    }
}

impl Refused {
    fn pool_gone() -> Self {
        Self { reason: Refusal::OpenFailed, failure: None }
    }

    /// What the client is told.
    pub fn into_stop(self, pool: &EndpointPool) -> Stop {
        let endpoint = &pool.endpoint;
        let error = match (self.reason, self.failure) {
            (_, Some(failure)) => return Stop { reason: failure.reason, response: Some(failure.response.clone()) },
            (Refusal::Timeout, None) => FatalError {
                hint: Some("Shorten transactions, raise max_connections of the compute, or use fewer clients.".into()),
                ..FatalError::new(
                    "53300",
                    format!("no server connection of endpoint \"{endpoint}\" became free in time"),
                )
            },
            (Refusal::QueueFull, None) => {
                FatalError::new("53300", format!("too many clients wait for connections of endpoint \"{endpoint}\""))
            }
            (Refusal::OpenFailed, None) => {
                FatalError::new("57P03", format!("no connection to endpoint \"{endpoint}\" could be opened"))
            }
        };
        Stop::refuse(EndReason::PoolRefused, error)
    }
}

fn limits(options: PoolOptions, total: usize) -> Limits {
    let PoolOptions { size, queue_timeout, idle_timeout, queue } = options;
    let pool_size = size.unwrap_or(total).max(1);
    Limits { pool_size, total: total.max(pool_size.min(FIRST_TOTAL)), queue, queue_timeout, idle_timeout }
}

/// Stands for settings.
fn tag(settings: &Settings) -> u64 {
    if settings.is_empty() {
        return 0;
    }
    let mut hasher = DefaultHasher::new();
    settings.hash(&mut hasher);
    hasher.finish()
}

/// Connections that Postgres allows ordinary roles. `None`: it did not say; the next connection is asked again.
async fn ask_total(stream: &mut UnixStream) -> Option<usize> {
    const QUESTION: &str = "SELECT 'set', 'total', (pg_catalog.current_setting('max_connections')::int - \
                            pg_catalog.current_setting('superuser_reserved_connections')::int)::text";
    let answer = compute::ask(stream, QUESTION).await;
    let answer = answer.inspect_err(|error| tracing::warn!(%error, "cannot ask how many connections there may be"));
    answer.ok()?.settings.get("total")?.parse().ok()
}
