//! Rules one by one, and whole days of a busy pool made from seeds.

use std::collections::{BTreeMap, BTreeSet};

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::*;

const LIMITS: Limits = Limits {
    pool_size: 2,
    total: 3,
    queue: 100,
    queue_timeout: Duration::from_secs(10),
    idle_timeout: Duration::from_secs(60),
};

const A: Key = Key { pool: PoolId(1), profile: 1 };
const A_OTHER: Key = Key { pool: PoolId(1), profile: 2 };
const B: Key = Key { pool: PoolId(2), profile: 1 };

fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// A scheduler and its commands, with the connections to be opened opened at once.
struct Desk {
    scheduler: Scheduler,
    now: Duration,
    commands: Vec<Command>,
}

impl Desk {
    fn new() -> Self {
        Self { scheduler: Scheduler::new(LIMITS), now: Duration::ZERO, commands: Vec::new() }
    }

    fn ask(&mut self, client: u64, key: Key) -> Option<u64> {
        let now = self.now;
        self.scheduler.request(now, ClientId(client), key, 0, &mut self.commands).map(|connection| connection.0)
    }

    fn give_back(&mut self, connection: u64) {
        self.scheduler.release(self.now, ConnectionId(connection), 0, &mut self.commands);
    }

    /// Carries out what there is to do; says who got what, and what was closed.
    fn work(&mut self) -> (Vec<(u64, u64)>, Vec<u64>) {
        let (mut got, mut closed) = (Vec::new(), Vec::new());
        while !self.commands.is_empty() {
            for command in std::mem::take(&mut self.commands) {
                match command {
                    Command::Open { connection, .. } => {
                        self.scheduler.opened(self.now, connection, &mut self.commands);
                    }
                    Command::Assign { client, connection } => got.push((client.0, connection.0)),
                    Command::Close { connection } => closed.push(connection.0),
                    Command::Refuse { client, reason } => panic!("{client:?} {reason:?}"),
                }
            }
            self.scheduler.check();
        }
        (got, closed)
    }
}

#[test]
fn a_connection_goes_to_whoever_waits_longest() {
    let mut desk = Desk::new();
    for client in 1..=4 {
        assert_eq!(desk.ask(client, A), None);
    }
    assert_eq!(desk.work().0, [(1, 1), (2, 2)], "no more than the pool may have");
    desk.give_back(2);
    assert_eq!(desk.work().0, [(3, 2)]);
    desk.give_back(1);
    desk.give_back(2);
    assert_eq!(desk.work().0, [(4, 1)]);
    assert_eq!(desk.ask(5, A), Some(2), "idle");
}

#[test]
fn an_idle_connection_with_the_right_settings_is_preferred() {
    let mut desk = Desk::new();
    desk.ask(1, A);
    desk.ask(2, A);
    desk.work();
    desk.scheduler.release(ms(1), ConnectionId(1), 7, &mut desk.commands);
    desk.scheduler.release(ms(1), ConnectionId(2), 8, &mut desk.commands);
    let mut take = |settings| {
        let taken = desk.scheduler.request(ms(2), ClientId(9), A, settings, &mut desk.commands).expect("idle");
        desk.scheduler.release(ms(2), taken, settings, &mut desk.commands);
        taken.0
    };
    assert_eq!(take(7), 1);
    assert_eq!(take(8), 2);
    assert_eq!(take(9), 2, "else the one used last");
}

#[test]
fn another_profile_or_pool_gets_room() {
    let mut desk = Desk::new();
    for (client, key) in [(1, A), (2, A), (3, B)] {
        desk.ask(client, key);
    }
    assert_eq!(desk.work().0.len(), 3);
    desk.give_back(1);
    desk.ask(4, A_OTHER);
    assert_eq!(desk.work(), (vec![(4, 4)], vec![1]), "an idle one of the same pool goes");
    desk.ask(5, B);
    assert_eq!(desk.work(), (vec![], vec![]));
    desk.give_back(2);
    assert_eq!(desk.work(), (vec![(5, 5)], vec![2]), "one that nobody else waits for goes");
}

#[test]
fn a_busy_pool_cannot_starve_another_kind() {
    let mut desk = Desk::new();
    for (client, key) in [(1, A), (2, A), (3, B)] {
        desk.ask(client, key);
    }
    desk.work();
    desk.ask(4, A_OTHER);
    for client in 5..100 {
        desk.ask(client, A);
    }
    desk.give_back(1);
    assert_eq!(desk.work().0, [(5, 1)], "not yet: opening one costs everybody");
    desk.now = PATIENCE;
    desk.give_back(1);
    assert_eq!(desk.work(), (vec![(4, 4)], vec![1]));
}

#[test]
fn waiting_has_an_end() {
    let mut desk = Desk::new();
    for client in 1..=3 {
        desk.ask(client, A);
    }
    desk.work();
    desk.scheduler.tick(LIMITS.queue_timeout - ms(1), &mut desk.commands);
    assert_eq!(desk.commands, []);
    desk.scheduler.tick(LIMITS.queue_timeout, &mut desk.commands);
    assert_eq!(desk.commands, [Command::Refuse { client: ClientId(3), reason: Refusal::Timeout }]);
}

#[test]
fn a_failure_to_open_is_told_to_all_who_wait_for_it() {
    let mut desk = Desk::new();
    desk.ask(1, A);
    desk.ask(2, A);
    desk.ask(3, B);
    desk.commands.clear();
    desk.scheduler.open_failed(ms(0), ConnectionId(1), OpenFailure::Refused, &mut desk.commands);
    let refuse = |client| Command::Refuse { client: ClientId(client), reason: Refusal::OpenFailed };
    assert_eq!(desk.commands, [refuse(1), refuse(2)]);
    desk.commands.clear();
    desk.scheduler.open_failed(ms(0), ConnectionId(3), OpenFailure::Full, &mut desk.commands);
    assert_eq!(desk.commands, [], "it waits");
    desk.scheduler.tick(FULL_PAUSE, &mut desk.commands);
    assert_eq!(desk.commands, [Command::Open { connection: ConnectionId(4), key: B }], "and it is tried again");
}

#[test]
fn idle_connections_are_closed_in_time() {
    let mut desk = Desk::new();
    desk.ask(1, A);
    desk.work();
    desk.give_back(1);
    desk.scheduler.tick(LIMITS.idle_timeout, &mut desk.commands);
    assert_eq!(desk.commands, [Command::Close { connection: ConnectionId(1) }]);
    assert_eq!(desk.scheduler.connections(), 0);
}

/// A day of a pool: clients come, work, wait, leave in the middle; connections open, fail, break.
struct Day {
    random: StdRng,
    scheduler: Scheduler,
    now: Duration,
    opening: BTreeSet<ConnectionId>,
    /// Who holds which connection.
    busy: BTreeMap<ConnectionId, ClientId>,
    idle: BTreeSet<ConnectionId>,
    keys: BTreeMap<ConnectionId, Key>,
    waiting: BTreeMap<ClientId, (Key, Duration)>,
    next_client: u64,
    log: Vec<String>,
    served: usize,
}

impl Day {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let limits = Limits {
            pool_size: random.random_range(1..6),
            total: random.random_range(1..10),
            queue: random.random_range(5..60),
            ..LIMITS
        };
        Self {
            random,
            scheduler: Scheduler::new(limits),
            now: Duration::ZERO,
            opening: BTreeSet::new(),
            busy: BTreeMap::new(),
            idle: BTreeSet::new(),
            keys: BTreeMap::new(),
            waiting: BTreeMap::new(),
            next_client: 0,
            log: Vec::new(),
            served: 0,
        }
    }

    fn pick<T: Copy>(&mut self, from: impl Iterator<Item = T>) -> Option<T> {
        let all: Vec<T> = from.collect();
        if all.is_empty() { None } else { Some(all[self.random.random_range(0..all.len())]) }
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(self.random.random_range(0..40));
        let mut commands = Vec::new();
        match self.random.random_range(0..100) {
            0..35 => self.arrive(&mut commands),
            35..70 => {
                if let Some(connection) = self.pick(self.busy.keys().copied().collect::<Vec<_>>().into_iter()) {
                    self.busy.remove(&connection);
                    self.idle.insert(connection);
                    let settings = self.random.random_range(0..3);
                    self.scheduler.release(self.now, connection, settings, &mut commands);
                }
            }
            70..90 => {
                if let Some(connection) = self.pick(self.opening.iter().copied().collect::<Vec<_>>().into_iter()) {
                    self.opening.remove(&connection);
                    match self.random.random_range(0..20) {
                        0 => self.scheduler.open_failed(self.now, connection, OpenFailure::Refused, &mut commands),
                        1 => self.scheduler.open_failed(self.now, connection, OpenFailure::Full, &mut commands),
                        _ => {
                            self.idle.insert(connection);
                            self.scheduler.opened(self.now, connection, &mut commands);
                        }
                    }
                }
            }
            90..94 => {
                let open: Vec<_> = self.busy.keys().chain(&self.idle).copied().collect();
                if let Some(connection) = self.pick(open.into_iter()) {
                    self.busy.remove(&connection);
                    self.idle.remove(&connection);
                    self.scheduler.closed(self.now, connection, &mut commands);
                }
            }
            94..97 => {
                if let Some(client) = self.pick(self.waiting.keys().copied().collect::<Vec<_>>().into_iter()) {
                    self.waiting.remove(&client);
                    self.scheduler.forget(client);
                }
            }
            _ => self.scheduler.tick(self.now, &mut commands),
        }
        self.obey(commands);
        self.scheduler.check();
    }

    fn arrive(&mut self, commands: &mut Vec<Command>) {
        self.next_client += 1;
        let client = ClientId(self.next_client);
        let key = Key { pool: PoolId(self.random.random_range(0..3)), profile: self.random.random_range(0..2) };
        let settings = self.random.random_range(0..3);
        self.waiting.insert(client, (key, self.now));
        if let Some(connection) = self.scheduler.request(self.now, client, key, settings, commands) {
            self.hand_over(client, connection);
        }
    }

    fn hand_over(&mut self, client: ClientId, connection: ConnectionId) {
        assert!(self.idle.remove(&connection), "{connection:?} is not free");
        let (key, _) = self.waiting.remove(&client).expect("it waits");
        assert_eq!(self.keys[&connection], key, "of the kind that was asked for");
        self.busy.insert(connection, client);
        self.served += 1;
    }

    fn obey(&mut self, commands: Vec<Command>) {
        for command in commands {
            self.log.push(format!("{:?} {command:?}", self.now));
            match command {
                Command::Open { connection, key } => {
                    assert!(self.opening.insert(connection));
                    self.keys.insert(connection, key);
                }
                Command::Close { connection } => assert!(self.idle.remove(&connection), "only idle ones are closed"),
                Command::Assign { client, connection } => self.hand_over(client, connection),
                Command::Refuse { client, .. } => {
                    self.waiting.remove(&client).expect("it waits");
                }
            }
        }
    }

    /// Nobody comes any more and nothing fails: all who wait are served or told within the queue's timeout.
    fn evening(&mut self) {
        let end = self.now + LIMITS.queue_timeout + ms(500);
        while self.now < end {
            let mut commands = Vec::new();
            for connection in std::mem::take(&mut self.opening) {
                self.idle.insert(connection);
                self.scheduler.opened(self.now, connection, &mut commands);
            }
            for (connection, _) in std::mem::take(&mut self.busy) {
                self.idle.insert(connection);
                self.scheduler.release(self.now, connection, 0, &mut commands);
            }
            self.now += ms(20);
            self.scheduler.tick(self.now, &mut commands);
            self.obey(commands);
            self.scheduler.check();
        }
        assert!(self.waiting.is_empty(), "{:?} still wait", self.waiting);
    }
}

fn day(seed: u64) -> (Vec<String>, usize) {
    let mut day = Day::new(seed);
    for _ in 0..3000 {
        day.step();
    }
    day.evening();
    (day.log, day.served)
}

#[test]
fn whole_days_keep_the_rules() {
    let served: usize = (0..200).map(|seed| day(seed).1).sum();
    assert!(served > 50_000, "{served} served");
}

#[test]
fn a_seed_makes_the_same_day_twice() {
    assert_eq!(day(7).0, day(7).0);
}
