//! One branch: the task that owns its acceptor and its files.

use std::{
    collections::BTreeMap,
    fs::File,
    path::PathBuf,
    sync::{Arc, Weak},
    time::Duration,
};

use safekeeper_protocol::{
    Acceptor, AcceptorMessage, AcceptorState, ConnectionId, Effect, ProposerMessage,
    message::{BranchStatus, ReplicationAddress},
};
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    task::{spawn_blocking, yield_now},
    time::{Instant, sleep_until},
};
use tracing::{debug, error, info};
use types::{BranchRef, Lsn, Membership, NodeId, WAL_SEGMENT_BYTES};

use crate::{
    health::Health,
    offload::{Done, Offload, Offloader},
    registry::Registry,
    storage::{BranchStore, Loaded, Shelf, StorageError},
};

/// Messages handled before one flush.
const MAX_BATCH: usize = 256;

/// What connections ask of a branch.
pub(crate) enum BranchCommand {
    Open { connection: ConnectionId, link: mpsc::Sender<AcceptorMessage> },
    Message { connection: ConnectionId, message: ProposerMessage },
    Close { connection: ConnectionId },
    Report { remote_consistent_lsn: Lsn },
    Delete { done: oneshot::Sender<Result<(), String>> },
    SetMembership { membership: Membership, done: oneshot::Sender<Result<BranchStatus, String>> },
}

/// What readers and askers see of a branch. Everything in it is durable.
#[derive(Debug, Clone)]
pub(crate) enum BranchView {
    Loading,
    Here {
        status: BranchStatus,
        membership: Option<Arc<Membership>>,
        identity: Identity,
    },
    Deleted,
    /// The files could not be used; says why.
    Failed(String),
}

/// What never changes about a branch, as far as proposers have told it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    /// The cluster's, from `pg_control`.
    pub system_identifier: Option<u64>,
    /// Where the branch's own WAL begins.
    pub start_lsn: Option<Lsn>,
}

impl Identity {
    fn of(state: &AcceptorState) -> Identity {
        let start_lsn = Some(state.branch_start_lsn).filter(|lsn| lsn.is_valid());
        Identity { system_identifier: state.system_identifier, start_lsn }
    }
}

pub(crate) struct BranchActor {
    /// This safekeeper.
    node: NodeId,
    branch: BranchRef,
    /// The acceptor's, shared with readers.
    membership: Option<Arc<Membership>>,
    directory: PathBuf,
    view: watch::Sender<BranchView>,
    /// Weak: the registry owns the actors.
    registry: Weak<Registry>,
    links: BTreeMap<ConnectionId, mpsc::Sender<AcceptorMessage>>,
    /// Bytes beyond may have been lost by a failed write: they are cut off when the branch is loaded again.
    distrust_beyond: Option<Lsn>,
    /// The lock on the data directory, held by whatever works on files: who gets it next finds none of that under way.
    lock: Arc<File>,
    /// `None` when there is no object store.
    offloader: Option<Offloader>,
    /// See [`crate::Config::keep_local_mib`].
    keep_bytes: u64,
    health: Arc<Health>,
    shelf: Arc<Shelf>,
    in_place: Arc<Semaphore>,
}

/// What every branch's actor is given.
pub(crate) struct Settings {
    /// This safekeeper.
    pub node: NodeId,
    pub idle_after: Duration,
    pub keep_bytes: u64,
    /// Where it gives out WAL by Postgres's own protocol, if it does.
    pub replication: Option<ReplicationAddress>,
    pub offload: Option<Arc<Offload>>,
    pub lock: Arc<File>,
    pub health: Arc<Health>,
    pub shelf: Arc<Shelf>,
    /// A permit for each of the runtime's threads that may wait for the disk itself, so that no other has to be woken for a commit.
    /// The rest is left for the network, however slow the disk is.
    pub in_place: Arc<Semaphore>,
}

/// What an actor wakes for.
enum Event {
    Commands(usize),
    Offload(Done),
    Time,
}

/// A branch's rules and files.
struct Open {
    acceptor: Acceptor,
    store: BranchStore,
}

enum State {
    Open(Box<Open>),
    Deleted,
    Failed(String),
}

impl BranchActor {
    pub fn new(
        settings: &Settings,
        branch: BranchRef,
        directory: PathBuf,
        view: watch::Sender<BranchView>,
        registry: Weak<Registry>,
    ) -> BranchActor {
        let Settings { node, keep_bytes, .. } = *settings;
        let (membership, links, distrust_beyond, lock) = (None, BTreeMap::new(), None, Arc::clone(&settings.lock));
        let offloader = settings
            .offload
            .as_ref()
            .map(|shared| Offloader::new(Arc::clone(shared), node, branch.clone(), directory.clone()));
        BranchActor {
            node,
            branch,
            membership,
            directory,
            view,
            registry,
            links,
            distrust_beyond,
            lock,
            offloader,
            keep_bytes,
            health: Arc::clone(&settings.health),
            shelf: Arc::clone(&settings.shelf),
            in_place: Arc::clone(&settings.in_place),
        }
    }

    /// Serves the branch until nobody has used it for `idle_after` and nothing is to be copied to the object store.
    pub async fn run(mut self, mut commands: mpsc::Receiver<BranchCommand>, idle_after: Duration) {
        let mut state = self.load().await;
        let mut batch = Vec::new();
        let mut idle_at = Instant::now() + idle_after;
        loop {
            let is_idle = Instant::now() >= idle_at;
            let look_at = self.look(&state, is_idle);
            // An idle branch that can't be let go is tidied up again after a while.
            let wake_at = [look_at, Some(if is_idle { Instant::now() + idle_after } else { idle_at })];
            let wake_at = wake_at.into_iter().flatten().min().unwrap_or(idle_at);
            let event = tokio::select! {
                count = commands.recv_many(&mut batch, MAX_BATCH) => Event::Commands(count),
                done = offloaded(&mut self.offloader) => Event::Offload(done),
                () = sleep_until(wake_at) => Event::Time,
            };
            match event {
                Event::Commands(0) => {
                    self.tidy(state).await;
                    return;
                }
                Event::Commands(_) => {
                    idle_at = Instant::now() + idle_after;
                    if matches!(state, State::Failed(_)) {
                        state = self.load().await;
                    }
                    state = self.take(state, &mut batch).await;
                    if !commands.is_empty() {
                        // Answers go out before this thread waits for the disk again.
                        yield_now().await;
                    }
                    continue;
                }
                Event::Offload(done) => state = self.offloaded(state, done).await,
                Event::Time => {}
            }
            if Instant::now() < idle_at {
                continue;
            }
            state = self.tidy(state).await;
            self.look(&state, true);
            let is_busy = self.offloader.as_ref().is_some_and(Offloader::is_busy);
            if !is_busy
                && commands.is_empty()
                && self.registry.upgrade().is_none_or(|registry| registry.release(&self.branch))
            {
                debug!(branch = %self.branch, "idle, forgotten");
                return;
            }
        }
    }

    /// Has the offloader look at the branch; answers when it wants to look again.
    fn look(&mut self, state: &State, idle: bool) -> Option<Instant> {
        let offloader = self.offloader.as_mut()?;
        match state {
            State::Open(open) => offloader.look(open.acceptor.state(), idle),
            State::Deleted | State::Failed(_) => {
                offloader.rest();
                None
            }
        }
    }

    /// Takes what the offloader has done, and gives disk space back.
    async fn offloaded(&mut self, state: State, done: Done) -> State {
        let Done::Stored(lsn) = done else { return state };
        let state = match state {
            // A full disk, most likely: what can go now makes room.
            State::Failed(_) => self.load().await,
            State::Open(_) | State::Deleted => state,
        };
        let State::Open(mut open) = state else { return state };
        open.acceptor.handle_offloaded(lsn);
        let effects = open.acceptor.trim(false, WAL_SEGMENT_BYTES, self.keep_bytes);
        let state = self.perform(open, effects).await;
        self.publish(&state);
        state
    }

    async fn load(&mut self) -> State {
        let (directory, distrust_beyond) = (self.directory.clone(), self.distrust_beyond);
        let (lock, branch, shelf) = (Arc::clone(&self.lock), self.branch.clone(), Arc::clone(&self.shelf));
        let load = move || {
            let _lock = lock;
            BranchStore::load(branch, directory, shelf, distrust_beyond)
        };
        let loaded = spawn_blocking(load).await;
        let state = match loaded {
            Ok(Ok(Loaded::Branch { store, state })) => {
                self.distrust_beyond = None;
                self.membership = state.membership.clone().map(Arc::new);
                debug!(branch = %self.branch, term = %state.term, lsn = %state.flush_lsn, "branch loaded");
                State::Open(Box::new(Open { acceptor: Acceptor::new(*state), store: *store }))
            }
            Ok(Ok(Loaded::Deleted)) => State::Deleted,
            Ok(Err(failure)) => self.failed(&failure),
            Err(panic) => self.failed(&StorageError::Panicked(panic.to_string())),
        };
        self.publish(&state);
        state
    }

    fn failed(&self, failure: &StorageError) -> State {
        error!(branch = %self.branch, error = %failure, "can't use the branch's files");
        if matches!(failure, StorageError::Io { .. }) {
            self.health.failed(&failure.to_string());
        }
        State::Failed(failure.to_string())
    }

    fn publish(&self, state: &State) {
        let view = match state {
            State::Open(open) => BranchView::Here {
                status: open.acceptor.status(),
                membership: self.membership.clone(),
                identity: Identity::of(open.acceptor.state()),
            },
            State::Deleted => BranchView::Deleted,
            State::Failed(reason) => BranchView::Failed(reason.clone()),
        };
        self.view.send_if_modified(|current| {
            let same = match (&*current, &view) {
                // What else of the membership could change comes with another generation.
                (
                    BranchView::Here { status: a, membership: m, identity: i },
                    BranchView::Here { status: b, membership: n, identity: j },
                ) => a == b && m.is_some() == n.is_some() && i == j,
                _ => false,
            };
            *current = view;
            !same
        });
    }

    async fn take(&mut self, state: State, batch: &mut Vec<BranchCommand>) -> State {
        let mut state = state;
        let (mut effects, mut told) = (Vec::new(), Vec::new());
        for command in batch.drain(..) {
            match (command, &mut state) {
                (BranchCommand::Open { connection, link }, _) => {
                    self.links.insert(connection, link);
                }
                (BranchCommand::Close { connection }, _) => {
                    self.links.remove(&connection);
                    if let State::Open(open) = &mut state {
                        open.acceptor.proposer_gone();
                    }
                }
                (BranchCommand::Message { connection, message }, State::Open(open)) => {
                    effects.extend(open.acceptor.handle(connection, message));
                }
                (BranchCommand::Report { remote_consistent_lsn }, State::Open(open)) => {
                    let before = open.acceptor.state().clone();
                    open.acceptor.handle_report(remote_consistent_lsn);
                    if let Some(offloader) = &mut self.offloader {
                        offloader.reported(&before, open.acceptor.state());
                    }
                }
                (BranchCommand::Message { .. } | BranchCommand::Report { .. }, State::Deleted | State::Failed(_)) => {}
                (BranchCommand::SetMembership { membership, done }, State::Open(open)) => {
                    effects.extend(self.set_membership(open, membership));
                    told.push(done);
                }
                (BranchCommand::SetMembership { done, .. }, State::Deleted | State::Failed(_)) => told.push(done),
                (BranchCommand::Delete { done }, _) => {
                    effects.clear();
                    state = self.delete(state, done).await;
                }
            }
        }
        let state = match state {
            State::Open(mut open) => {
                effects.extend(open.acceptor.end_batch());
                effects.extend(open.acceptor.trim(false, WAL_SEGMENT_BYTES, self.keep_bytes));
                self.perform(open, effects).await
            }
            State::Deleted | State::Failed(_) => state,
        };
        match &state {
            State::Open(_) => {}
            State::Deleted => self.end_links(AcceptorMessage::Deleted),
            State::Failed(reason) => self.end_links(AcceptorMessage::Failed { reason: reason.clone() }),
        }
        self.publish(&state);
        for done in told {
            // Who asked may be gone.
            let _ = done.send(match &state {
                State::Open(open) => Ok(open.acceptor.status()),
                State::Deleted => Err("the branch has been deleted".to_owned()),
                State::Failed(reason) => Err(reason.clone()),
            });
        }
        state
    }

    fn set_membership(&mut self, open: &mut Open, membership: Membership) -> Vec<Effect> {
        let (before, had_log) = (open.acceptor.state().membership.clone(), open.acceptor.status().flush_lsn.is_valid());
        let effects = open.acceptor.set_membership(self.node, membership);
        let state = open.acceptor.state();
        if state.membership != before {
            self.membership = state.membership.clone().map(Arc::new);
            let left = had_log && !state.flush_lsn.is_valid();
            if let Some(membership) = &self.membership {
                info!(branch = %self.branch, %membership, left, "the branch's safekeepers change");
            }
        }
        effects
    }

    /// Carries out effects; what they promise is sent once they are done.
    async fn perform(&mut self, mut open: Box<Open>, effects: Vec<Effect>) -> State {
        let durable = open.store.durable_lsn();
        let acknowledged = open.acceptor.state().flush_lsn;
        let needs_disk = effects.iter().any(needs_disk);
        let place = needs_disk.then(|| Arc::clone(&self.in_place).try_acquire_owned().ok()).flatten();
        let performed = if needs_disk && place.is_none() {
            let lock = Arc::clone(&self.lock);
            spawn_blocking(move || {
                let _lock = lock;
                let replies = open.store.perform(effects, acknowledged);
                (open, replies)
            })
            .await
        } else {
            let replies = open.store.perform(effects, acknowledged);
            Ok((open, replies))
        };
        match performed {
            Ok((mut open, (replies, Ok(())))) => {
                open.store.set_durable(open.acceptor.state().flush_lsn);
                self.send(replies);
                State::Open(open)
            }
            Ok((_, (replies, Err(failure)))) => {
                self.send(replies);
                self.distrust_beyond = Some(durable);
                self.failed(&failure)
            }
            Err(panic) => {
                self.distrust_beyond = Some(durable);
                self.failed(&StorageError::Panicked(panic.to_string()))
            }
        }
    }

    fn send(&mut self, replies: Vec<(ConnectionId, AcceptorMessage)>) {
        for (to, message) in replies {
            // A proposer that does not read its answers is cut off.
            if self.links.get(&to).is_some_and(|link| link.try_send(message).is_err()) {
                self.links.remove(&to);
            }
        }
    }

    fn end_links(&mut self, message: AcceptorMessage) {
        for link in std::mem::take(&mut self.links).into_values() {
            // The connection ends in any case when the link is dropped.
            let _ = link.try_send(message.clone());
        }
    }

    /// Stores what is only in memory and gives disk space back.
    async fn tidy(&mut self, state: State) -> State {
        let State::Open(mut open) = state else { return state };
        let mut effects = open.acceptor.trim(true, WAL_SEGMENT_BYTES, 0);
        effects.extend(open.acceptor.persist_before_idle(open.store.stored()));
        let state = self.perform(open, effects).await;
        let state = self.shelve(state).await;
        self.publish(&state);
        state
    }

    /// Of a branch without WAL only a record in a file stays that all such branches share; of another its WAL, and no room ahead of it.
    async fn shelve(&mut self, state: State) -> State {
        let State::Open(mut open) = state else { return state };
        let holds_nothing = open.acceptor.holds_nothing() && open.acceptor.state() == open.store.stored();
        if !holds_nothing && !open.store.has_room_ahead() {
            return State::Open(open);
        }
        let lock = Arc::clone(&self.lock);
        let shelved = spawn_blocking(move || {
            let _lock = lock;
            let shelved = if holds_nothing { open.store.shelve() } else { open.store.trim() };
            (open, shelved)
        });
        match shelved.await {
            Ok((open, Ok(()))) => State::Open(open),
            Ok((_, Err(failure))) => self.failed(&failure),
            Err(panic) => self.failed(&StorageError::Panicked(panic.to_string())),
        }
    }

    async fn delete(&mut self, state: State, done: oneshot::Sender<Result<(), String>>) -> State {
        // Open files are closed first.
        drop(state);
        let directory = self.directory.clone();
        let lock = Arc::clone(&self.lock);
        let delete = move || {
            let _lock = lock;
            BranchStore::delete(&directory)
        };
        let deleted = spawn_blocking(delete).await;
        let (answer, state) = match deleted {
            Ok(Ok(())) => {
                info!(branch = %self.branch, "branch deleted");
                let removed = match &mut self.offloader {
                    Some(offloader) => offloader.remove_all().await.map_err(|error| error.to_string()),
                    None => Ok(()),
                };
                (removed, State::Deleted)
            }
            Ok(Err(failure)) => (Err(failure.to_string()), self.failed(&failure)),
            Err(panic) => (Err(panic.to_string()), self.failed(&StorageError::Panicked(panic.to_string()))),
        };
        // Who asked may be gone.
        let _ = done.send(answer);
        state
    }
}

/// What the offloader has done, once it has.
async fn offloaded(offloader: &mut Option<Offloader>) -> Done {
    match offloader {
        Some(offloader) => offloader.finished().await,
        None => std::future::pending().await,
    }
}

fn needs_disk(effect: &Effect) -> bool {
    match effect {
        Effect::Reply { .. } => false,
        Effect::Persist(_)
        | Effect::TruncateWal { .. }
        | Effect::DropWalBelow { .. }
        | Effect::WriteWal { .. }
        | Effect::FlushWal
        | Effect::SendWal { .. } => true,
    }
}
