//! Who gets which server connection: clients that wait, connections that are idle, how many there may be.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

/// Connections that are being opened at the same time; more would only make each of them slower.
const OPENING_MAX: usize = 4;

/// Idle connections that are looked at for one with the right settings.
const LOOK_AT: usize = 16;

/// How much longer than anybody else a client waits before a connection of another kind is closed in its favour.
const PATIENCE: Duration = Duration::from_millis(200);

/// Pause after Postgres has said that it has no room for more connections.
const FULL_PAUSE: Duration = Duration::from_millis(500);

/// A (database, role) pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PoolId(pub u32);

/// Whom a connection can serve: the pool, and the start-up parameters that it was opened with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The pool.
    pub pool: PoolId,
    /// Stands for start-up parameters.
    pub profile: u32,
}

/// A waiting client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(pub u64);

/// A server connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u64);

/// How many connections there may be, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections of one pool.
    pub pool_size: usize,
    /// Connections of all pools of the endpoint.
    pub total: usize,
    /// Waiting clients of the endpoint.
    pub queue: usize,
    /// How long a client waits at most.
    pub queue_timeout: Duration,
    /// How long an unused connection is kept.
    pub idle_timeout: Duration,
}

/// What the driver must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Give the connection to the client.
    Assign {
        /// Who waits.
        client: ClientId,
        /// What it gets.
        connection: ConnectionId,
    },
    /// Open a connection, then call [`Scheduler::opened`] or [`Scheduler::open_failed`].
    Open {
        /// Its number from now on.
        connection: ConnectionId,
        /// For whom.
        key: Key,
    },
    /// Close an idle connection. The scheduler knows it no more.
    Close {
        /// Which.
        connection: ConnectionId,
    },
    /// Tell a client that it waits in vain.
    Refuse {
        /// Whom.
        client: ClientId,
        /// Why.
        reason: Refusal,
    },
}

/// Why a client gets no connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It waited too long.
    Timeout,
    /// Too many wait.
    QueueFull,
    /// A connection could not be opened; the driver knows why.
    OpenFailed,
}

/// Why a connection could not be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenFailure {
    /// Postgres has as many connections as it may have. Waiting helps.
    Full,
    /// Another reason: those who wait are told.
    Refused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Opening,
    Idle { since: Duration },
    Busy,
}

#[derive(Debug)]
struct Connection {
    key: Key,
    state: State,
    /// Stands for the settings it has.
    settings: u64,
}

#[derive(Debug, Clone, Copy)]
struct Waiter {
    client: ClientId,
    since: Duration,
    /// Later ones have higher numbers.
    turn: u64,
}

/// The connections of one endpoint and those who wait for one. No clock inside: `now` is the time since some start, and
/// never goes back.
///
/// The driver calls [`Scheduler::request`], [`Scheduler::release`] and so on, carries out the commands in order, and calls
/// [`Scheduler::tick`] now and then.
pub struct Scheduler {
    limits: Limits,
    connections: BTreeMap<ConnectionId, Connection>,
    /// The one used last stands last.
    idle: Vec<ConnectionId>,
    waiters: BTreeMap<Key, VecDeque<Waiter>>,
    waiting: HashMap<ClientId, Key>,
    last_connection: u64,
    last_turn: u64,
    full_until: Duration,
}

impl Scheduler {
    /// No connection yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            connections: BTreeMap::new(),
            idle: Vec::new(),
            waiters: BTreeMap::new(),
            waiting: HashMap::new(),
            last_connection: 0,
            last_turn: 0,
            full_until: Duration::ZERO,
        }
    }

    /// Changes the limits; connections above them are closed as they become idle.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// A client wants a connection. `Some`: here it is. `None`: a command will follow, now or later.
    ///
    /// A connection whose settings are the client's is preferred, then the one used last.
    pub fn request(
        &mut self,
        now: Duration,
        client: ClientId,
        key: Key,
        settings: u64,
        commands: &mut Vec<Command>,
    ) -> Option<ConnectionId> {
        let queue_is_empty = self.waiters.get(&key).is_none_or(VecDeque::is_empty);
        if queue_is_empty && let Some(connection) = self.take_idle(key, settings) {
            return Some(connection);
        }
        if self.waiting.len() >= self.limits.queue {
            commands.push(Command::Refuse { client, reason: Refusal::QueueFull });
            return None;
        }
        self.last_turn += 1;
        self.waiters.entry(key).or_default().push_back(Waiter { client, since: now, turn: self.last_turn });
        self.waiting.insert(client, key);
        self.open_more(now, commands);
        None
    }

    /// A client waits no more: it has gone.
    pub fn forget(&mut self, client: ClientId) {
        let Some(key) = self.waiting.remove(&client) else { return };
        let Some(queue) = self.waiters.get_mut(&key) else { return };
        queue.retain(|waiter| waiter.client != client);
        if queue.is_empty() {
            self.waiters.remove(&key);
        }
    }

    /// A connection is open.
    pub fn opened(&mut self, now: Duration, connection: ConnectionId, commands: &mut Vec<Command>) {
        self.release(now, connection, 0, commands);
    }

    /// A connection could not be opened.
    pub fn open_failed(
        &mut self,
        now: Duration,
        connection: ConnectionId,
        failure: OpenFailure,
        commands: &mut Vec<Command>,
    ) {
        let Some(Connection { key, .. }) = self.connections.remove(&connection) else { return };
        match failure {
            OpenFailure::Full => self.full_until = now + FULL_PAUSE,
            OpenFailure::Refused => {
                for waiter in self.waiters.remove(&key).unwrap_or_default() {
                    self.waiting.remove(&waiter.client);
                    commands.push(Command::Refuse { client: waiter.client, reason: Refusal::OpenFailed });
                }
            }
        }
        self.open_more(now, commands);
    }

    /// A client gives its connection back, in good order and with these settings.
    pub fn release(&mut self, now: Duration, connection: ConnectionId, settings: u64, commands: &mut Vec<Command>) {
        let Some(entry) = self.connections.get_mut(&connection) else { return };
        entry.settings = settings;
        let key = entry.key;
        let open = self.connections.len();
        let too_many =
            open > self.limits.total || open > self.limits.pool_size && self.count(key.pool) > self.limits.pool_size;
        if too_many || self.must_make_room(now, key) {
            self.connections.remove(&connection);
            commands.push(Command::Close { connection });
            return self.open_more(now, commands);
        }
        match self.pop_waiter(key) {
            Some(waiter) => {
                self.set_state(connection, State::Busy);
                commands.push(Command::Assign { client: waiter.client, connection });
            }
            None => {
                self.set_state(connection, State::Idle { since: now });
                self.idle.push(connection);
            }
        }
    }

    /// A connection is closed: it broke, or the client left it in disorder.
    pub fn closed(&mut self, now: Duration, connection: ConnectionId, commands: &mut Vec<Command>) {
        self.connections.remove(&connection);
        self.idle.retain(|idle| *idle != connection);
        self.open_more(now, commands);
    }

    /// Time passes: who waited too long is told, what was idle too long is closed.
    pub fn tick(&mut self, now: Duration, commands: &mut Vec<Command>) {
        let mut late = Vec::new();
        for queue in self.waiters.values_mut() {
            while let Some(waiter) = queue.front().filter(|waiter| now >= waiter.since + self.limits.queue_timeout) {
                late.push(waiter.client);
                queue.pop_front();
            }
        }
        self.waiters.retain(|_, queue| !queue.is_empty());
        for client in late {
            self.waiting.remove(&client);
            commands.push(Command::Refuse { client, reason: Refusal::Timeout });
        }
        let timeout = self.limits.idle_timeout;
        let old = |state: State| matches!(state, State::Idle { since } if now >= since + timeout);
        let stale: Vec<_> = self.idle.iter().copied().filter(|id| old(self.connections[id].state)).collect();
        for connection in stale {
            self.close_idle(connection, commands);
        }
        self.open_more(now, commands);
    }

    /// Idle connections, for a driver that looks whether they still work.
    pub fn idle(&self) -> &[ConnectionId] {
        &self.idle
    }

    /// Open connections, those being opened included.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Waiting clients.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    fn set_state(&mut self, connection: ConnectionId, state: State) {
        if let Some(connection) = self.connections.get_mut(&connection) {
            connection.state = state;
        }
    }

    fn count(&self, pool: PoolId) -> usize {
        self.connections.values().filter(|connection| connection.key.pool == pool).count()
    }

    fn take_idle(&mut self, key: Key, settings: u64) -> Option<ConnectionId> {
        let fits = |id: &ConnectionId| self.connections.get(id).filter(|connection| connection.key == key);
        let recent = self.idle.iter().enumerate().rev();
        let fitting = recent.filter_map(|(at, id)| fits(id).map(|connection| (at, connection.settings)));
        let mut best = None;
        for (at, has) in fitting.take(LOOK_AT) {
            best = best.or(Some(at));
            if has == settings {
                best = Some(at);
                break;
            }
        }
        let connection = self.idle.remove(best?);
        self.set_state(connection, State::Busy);
        Some(connection)
    }

    fn pop_waiter(&mut self, key: Key) -> Option<Waiter> {
        let queue = self.waiters.get_mut(&key)?;
        let waiter = queue.pop_front();
        if queue.is_empty() {
            self.waiters.remove(&key);
        }
        self.waiting.remove(&waiter?.client);
        waiter
    }

    /// The one who has waited longest, of those whose keys `wanted` picks.
    fn oldest(&self, wanted: impl Fn(Key) -> bool) -> Option<(Key, Waiter)> {
        let fronts = self.waiters.iter().filter(|(key, _)| wanted(**key));
        fronts.filter_map(|(key, queue)| Some((*key, *queue.front()?))).min_by_key(|(_, waiter)| waiter.turn)
    }

    /// True when a connection for `key` should be closed in favour of somebody who needs another kind and has waited so
    /// much longer that it is his turn.
    fn must_make_room(&self, now: Duration, key: Key) -> bool {
        if self.waiters.keys().all(|waiting| *waiting == key) || now < self.full_until {
            return false;
        }
        let full = |pool: PoolId| self.count(pool) >= self.limits.pool_size;
        let all_full = self.connections.len() >= self.limits.total;
        // Closing this one helps a pool that is full only if it is its own.
        let helped = |other: Key| other != key && if full(other.pool) { other.pool == key.pool } else { all_full };
        let Some((other, waiter)) = self.oldest(helped) else { return false };
        let opening = |(_, connection): (&ConnectionId, &Connection)| {
            connection.key == other && connection.state == State::Opening
        };
        if self.connections.iter().any(opening) {
            return false;
        }
        let own = self.waiters.get(&key).and_then(VecDeque::front);
        own.is_none_or(|own| waiter.turn < own.turn && now >= waiter.since + PATIENCE)
    }

    /// Opens connections for those who wait, as far as the limits let it.
    fn open_more(&mut self, now: Duration, commands: &mut Vec<Command>) {
        if self.waiters.is_empty() || now < self.full_until {
            return;
        }
        let mut opening: BTreeMap<Key, usize> = BTreeMap::new();
        for connection in self.connections.values().filter(|connection| connection.state == State::Opening) {
            *opening.entry(connection.key).or_default() += 1;
        }
        let mut all_opening: usize = opening.values().sum();
        while all_opening < OPENING_MAX {
            let wants = |key: Key| {
                let queue = self.waiters.get(&key).map_or(0, VecDeque::len);
                queue > opening.get(&key).copied().unwrap_or(0) && self.may_open(key)
            };
            let Some((key, _)) = self.oldest(wants) else { return };
            if let Some(connection) = self.in_the_way(key) {
                self.close_idle(connection, commands);
            }
            self.last_connection += 1;
            let connection = ConnectionId(self.last_connection);
            self.connections.insert(connection, Connection { key, state: State::Opening, settings: 0 });
            commands.push(Command::Open { connection, key });
            *opening.entry(key).or_default() += 1;
            all_opening += 1;
        }
    }

    /// True when a connection may be opened, if need be after an idle one is closed.
    fn may_open(&self, key: Key) -> bool {
        let full = self.count(key.pool) >= self.limits.pool_size || self.connections.len() >= self.limits.total;
        !full || self.in_the_way(key).is_some()
    }

    /// The idle connection to close so that one for `key` may be opened; the one unused for longest.
    fn in_the_way(&self, key: Key) -> Option<ConnectionId> {
        let key_of = |id: &ConnectionId| self.connections[id].key;
        if self.count(key.pool) >= self.limits.pool_size {
            return self.idle.iter().copied().find(|id| key_of(id).pool == key.pool && key_of(id) != key);
        }
        if self.connections.len() >= self.limits.total {
            return self.idle.iter().copied().find(|id| key_of(id) != key);
        }
        None
    }

    fn close_idle(&mut self, connection: ConnectionId, commands: &mut Vec<Command>) {
        self.connections.remove(&connection);
        self.idle.retain(|idle| *idle != connection);
        commands.push(Command::Close { connection });
    }

    /// Panics when a rule is broken that always holds.
    #[cfg(test)]
    fn check(&self) {
        assert!(self.connections.len() <= self.limits.total, "{} connections", self.connections.len());
        for key in self.connections.values().map(|connection| connection.key) {
            assert!(self.count(key.pool) <= self.limits.pool_size);
        }
        for id in &self.idle {
            assert!(matches!(self.connections[id].state, State::Idle { .. }));
            let key = self.connections[id].key;
            assert!(!self.waiters.contains_key(&key), "somebody waits for an idle connection");
        }
        assert_eq!(self.waiters.values().map(VecDeque::len).sum::<usize>(), self.waiting.len());
        assert!(self.waiters.values().all(|queue| !queue.is_empty()));
    }
}

#[cfg(test)]
mod tests;
