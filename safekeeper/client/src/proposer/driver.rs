//! The task that owns the proposer's state machine.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use bytes::Bytes;
use safekeeper_protocol::{
    Action, Proposer, ProposerId, ProposerMessage, ProposerSettings, message::MAX_WAL_BYTES_PER_MESSAGE,
};
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::{AbortHandle, JoinSet},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tracing::{debug, error, info, warn};
use types::{BranchRef, Lsn, Member, Membership, MembershipGeneration, NodeId};

use super::{
    ElectError, Elected, MembershipStatus, Progress, ProposerConfig,
    peer::{PeerEvent, PeerTask},
    scanner::WalScanner,
};

const BUFFER_BYTES: u64 = 64 * 1024 * 1024;
const WINDOW_BYTES: u64 = 16 * 1024 * 1024;
const HEARTBEAT: Duration = Duration::from_secs(1);
const FINISH_LIMIT: Duration = Duration::from_secs(3);
/// See [`ProposerSettings::stranded_heartbeats`].
const STRANDED_HEARTBEATS: u32 = 3;
const WAITING_LOG_INTERVAL: Duration = Duration::from_secs(5);
/// A split election is tried again after a random time up to this.
const ELECTION_RETRY_MS: u64 = 50;

/// A commit that no WAL follows within this time is told to the safekeepers by itself.
const TELL_COMMITS_AFTER: Duration = Duration::from_millis(1);

/// What handles ask of the driver.
pub(super) enum Command {
    Append(Bytes),
    Identify(u64),
    Finish(oneshot::Sender<()>),
    SetMembership(Membership),
    Membership(oneshot::Sender<MembershipStatus>),
}

/// What handles hear from the driver.
pub(super) struct Told {
    pub progress: watch::Sender<Progress>,
    pub fence: watch::Sender<Option<Arc<str>>>,
}

impl Told {
    fn committed(&self, lsn: Lsn) {
        self.progress.send_modify(|progress| progress.commit_lsn = lsn);
    }

    fn fenced(&self, reason: &Arc<str>) {
        self.progress.send_modify(|progress| progress.fenced = Some(Arc::clone(reason)));
        self.fence.send_replace(Some(Arc::clone(reason)));
    }
}

/// A member that is connected, or being connected to.
struct Connecting {
    /// Has it connect without a pause.
    hurry: Arc<Notify>,
    address: String,
    task: AbortHandle,
}

pub(super) struct Driver {
    branch: BranchRef,
    proposer: Proposer<WalScanner>,
    links: BTreeMap<NodeId, (u64, mpsc::UnboundedSender<ProposerMessage>)>,
    told: Told,
    /// Taken once the election is decided.
    result: Option<oneshot::Sender<Result<Elected, ElectError>>>,
    events: mpsc::UnboundedReceiver<PeerEvent>,
    event_sender: mpsc::UnboundedSender<PeerEvent>,
    token: String,
    /// Ends the connections with the driver.
    tasks: JoinSet<()>,
    members: BTreeMap<NodeId, Connecting>,
    /// Grows with each connection of whatever member.
    epochs: Arc<AtomicU64>,
    follows_membership: bool,
    retry_at: Option<Instant>,
    /// When, and up to where, safekeepers are told of commits that they have not heard of by then.
    tell_at: Option<(Instant, Lsn)>,
    finishing: Option<(oneshot::Sender<()>, Instant)>,
    /// Safekeepers whose connection may yet come up: the attempt under way has not failed.
    trying: BTreeSet<NodeId>,
    over: bool,
}

impl Driver {
    pub fn new(config: ProposerConfig, told: Told, result: oneshot::Sender<Result<Elected, ElectError>>) -> Driver {
        let settings = ProposerSettings {
            id: ProposerId(rand::random()),
            membership: config.membership,
            branch_start_lsn: config.branch_start_lsn,
            system_identifier: config.system_identifier,
            buffer_bytes: BUFFER_BYTES,
            window_bytes: WINDOW_BYTES,
            message_bytes: MAX_WAL_BYTES_PER_MESSAGE,
            stranded_heartbeats: STRANDED_HEARTBEATS,
        };
        let (event_sender, events) = mpsc::unbounded_channel();
        let mut driver = Driver {
            branch: config.branch,
            proposer: Proposer::new(settings),
            links: BTreeMap::new(),
            told,
            result: Some(result),
            events,
            event_sender,
            token: config.token,
            tasks: JoinSet::new(),
            members: BTreeMap::new(),
            epochs: Arc::default(),
            follows_membership: config.follows_membership,
            retry_at: None,
            tell_at: None,
            finishing: None,
            trying: BTreeSet::new(),
            over: false,
        };
        driver.connect_members();
        driver
    }

    /// Connects to the members there are now, and gives up the connections to others.
    fn connect_members(&mut self) {
        let members = self.proposer.membership().all();
        let stays = |node: &NodeId, address: &str| members.iter().any(|m| m.node == *node && m.address == address);
        let gone = self.members.iter().filter(|(node, connecting)| !stays(node, &connecting.address));
        for node in gone.map(|(node, _)| *node).collect::<Vec<_>>() {
            if let Some(connecting) = self.members.remove(&node) {
                connecting.task.abort();
            }
            self.links.remove(&node);
            self.trying.remove(&node);
            // Where only the address is another one.
            let actions = self.proposer.disconnected(node);
            self.perform(actions);
        }
        while self.tasks.try_join_next().is_some() {}
        for Member { node, address } in members {
            if !self.members.contains_key(&node) {
                self.connect(node, address);
            }
        }
    }

    fn connect(&mut self, node: NodeId, address: String) {
        let hurry = Arc::new(Notify::new());
        let task = PeerTask {
            node,
            address: address.clone(),
            token: self.token.clone(),
            branch: self.branch.clone(),
            events: self.event_sender.clone(),
            epochs: Arc::clone(&self.epochs),
            hurry: Arc::clone(&hurry),
        };
        let task = self.tasks.spawn(task.run());
        self.members.insert(node, Connecting { hurry, address, task });
        self.trying.insert(node);
    }

    fn set_membership(&mut self, membership: Membership) {
        let before = self.proposer.membership().generation;
        info!(branch = %self.branch, %before, %membership, "going over to another membership");
        let actions = self.proposer.set_membership(membership);
        self.perform(actions);
        self.connect_members();
    }

    /// A safekeeper has heard of a newer membership than this proposer's.
    fn newer_membership(&mut self, from: NodeId, known: MembershipGeneration, membership: Option<Membership>) {
        let given = self.proposer.membership().generation;
        let membership = membership.filter(|membership| membership.generation > given);
        match membership {
            _ if !self.follows_membership => self.end(ElectError::Outdated { given, known }),
            Some(membership) => self.set_membership(membership),
            None => {
                warn!(branch = %self.branch, safekeeper = %from, %given, %known, "a safekeeper has heard of a newer membership, and does not know its members");
                self.lose(from);
            }
        }
    }

    /// Ends a connection; its task connects again.
    fn lose(&mut self, node: NodeId) {
        self.links.remove(&node);
        let actions = self.proposer.disconnected(node);
        self.perform(actions);
    }

    fn membership_status(&self) -> MembershipStatus {
        MembershipStatus {
            generation: self.proposer.membership().generation,
            established: self.proposer.is_established(),
            lagging: self.proposer.lagging(),
        }
    }

    /// Runs until all handles are gone, the proposer is finished or fenced, or the caller of `elect` has given up.
    pub async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut batch = Vec::new();
        let mut last_logged = Instant::now();
        while !self.over {
            let timer = self.timer();
            tokio::select! {
                received = commands.recv_many(&mut batch, 256) => match received {
                    0 => return,
                    _ => self.take_commands(&mut batch),
                },
                Some(event) = self.events.recv() => self.take_event(event),
                () = sleep_until(timer.unwrap_or_else(Instant::now)), if timer.is_some() => self.take_timer(),
                _ = heartbeat.tick() => {
                    let actions = self.proposer.heartbeat();
                    self.perform(actions);
                    if self.result.is_some() && last_logged.elapsed() >= WAITING_LOG_INTERVAL {
                        last_logged = Instant::now();
                        warn!(branch = %self.branch, connected = self.links.len(), "waiting for a majority of safekeepers");
                    }
                }
            }
            self.check_finished();
            if self.result.as_ref().is_some_and(oneshot::Sender::is_closed) {
                return;
            }
        }
    }

    fn timer(&self) -> Option<Instant> {
        let finish_by = self.finishing.as_ref().map(|(_, deadline)| *deadline);
        let tell_at = self.tell_at.map(|(at, _)| at);
        self.retry_at.into_iter().chain(finish_by).chain(tell_at).min()
    }

    fn take_timer(&mut self) {
        let now = Instant::now();
        if let Some((_, lsn)) = self.tell_at.take_if(|(at, _)| *at <= now) {
            let actions = self.proposer.tell_commits(lsn);
            self.perform(actions);
        }
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            let actions = self.proposer.campaign();
            self.perform(actions);
        }
    }

    fn take_commands(&mut self, batch: &mut Vec<Command>) {
        let mut pieces = Vec::with_capacity(batch.len());
        let (mut memberships, mut askers) = (Vec::new(), Vec::new());
        for command in batch.drain(..) {
            match command {
                Command::Append(wal) => pieces.push(wal),
                Command::Identify(system_identifier) => self.proposer.identify(system_identifier),
                Command::Finish(reply) => self.finishing = Some((reply, Instant::now() + FINISH_LIMIT)),
                Command::SetMembership(membership) => memberships.push(membership),
                Command::Membership(asker) => askers.push(asker),
            }
        }
        let mut actions = self.proposer.append(pieces);
        if self.finishing.is_some() {
            actions.extend(self.proposer.finish());
            // Those that are away are given another chance to hear how far the log is committed.
            for (node, connecting) in &self.members {
                if !self.links.contains_key(node) {
                    self.trying.insert(*node);
                    connecting.hurry.notify_one();
                }
            }
        }
        self.perform(actions);
        let newer = |membership: &Membership| membership.generation > self.proposer.membership().generation;
        if let Some(membership) = memberships.into_iter().filter(newer).max_by_key(|membership| membership.generation) {
            self.set_membership(membership);
        }
        for asker in askers {
            // It may be gone.
            let _ = asker.send(self.membership_status());
        }
    }

    fn take_event(&mut self, event: PeerEvent) {
        let actions = match event {
            // Told by a task that has been given up since.
            PeerEvent::Connected { node, address, .. }
                if self.members.get(&node).is_none_or(|member| member.address != address) =>
            {
                return;
            }
            PeerEvent::Connected { node, epoch, link, .. } => {
                self.trying.remove(&node);
                self.links.insert(node, (epoch, link));
                self.proposer.connected(node)
            }
            PeerEvent::Received { node, epoch, message } if self.is_current(node, epoch) => {
                self.proposer.handle(node, message)
            }
            PeerEvent::Disconnected { node, epoch } if self.is_current(node, epoch) => {
                self.links.remove(&node);
                self.proposer.disconnected(node)
            }
            PeerEvent::Received { .. } | PeerEvent::Disconnected { .. } => return,
            PeerEvent::Unreachable { node } => {
                self.trying.remove(&node);
                return;
            }
            PeerEvent::Denied { reason } => {
                if let Some(result) = self.result.take() {
                    let _ = result.send(Err(ElectError::Denied(reason)));
                    self.over = true;
                }
                return;
            }
        };
        self.perform(actions);
    }

    fn is_current(&self, node: NodeId, epoch: u64) -> bool {
        self.links.get(&node).is_some_and(|(current, _)| *current == epoch)
    }

    fn perform(&mut self, actions: Vec<Action>) {
        let mut lost = Vec::new();
        for action in actions {
            match action {
                Action::Send { to, message } => {
                    if let Some((_, link)) = self.links.get(&to) {
                        // A connection that has ended reports so itself.
                        let _ = link.send(message);
                    }
                }
                Action::Started { term, start_lsn } => {
                    info!(branch = %self.branch, %term, lsn = %start_lsn, "term won");
                    self.told.committed(start_lsn);
                    if let Some(result) = self.result.take() {
                        let _ = result.send(Ok(Elected { term, start_lsn }));
                    }
                }
                Action::Committed { lsn } => self.told.committed(lsn),
                Action::Reelected { term, start_lsn } => {
                    info!(branch = %self.branch, %term, lsn = %start_lsn, "a higher term won, for a safekeeper that had been left behind");
                }
                Action::Damaged { donor, on_behalf_of, reason } => {
                    error!(branch = %self.branch, safekeeper = %donor, reason, "a safekeeper's WAL is damaged; {on_behalf_of} does not get it");
                }
                Action::Fenced { reason } => self.end(ElectError::Fenced(reason)),
                Action::BranchDeleted => self.end(ElectError::Deleted),
                Action::RetryElection => {
                    let pause = Duration::from_millis(rand::random_range(1..=ELECTION_RETRY_MS));
                    self.retry_at.get_or_insert_with(|| Instant::now() + pause);
                }
                Action::Disconnect { to, reason } => {
                    warn!(branch = %self.branch, safekeeper = %to, reason, "closing the connection to a safekeeper");
                    lost.push(to);
                }
                Action::Established { generation } => {
                    debug!(branch = %self.branch, %generation, "committed under this membership");
                }
                Action::NewerMembership { from, generation, membership } => {
                    self.newer_membership(from, generation, membership);
                }
            }
        }
        lost.into_iter().for_each(|node| self.lose(node));
        if self.tell_at.is_none() && self.proposer.has_untold_commit() {
            self.tell_at = Some((Instant::now() + TELL_COMMITS_AFTER, self.proposer.commit_lsn()));
        }
    }

    fn end(&mut self, error: ElectError) {
        warn!(branch = %self.branch, %error, "this proposer is over");
        let reason: Arc<str> = match &error {
            ElectError::Fenced(reason) => Arc::from(reason.as_str()),
            ElectError::Config(_) | ElectError::Denied(_) | ElectError::Deleted | ElectError::Outdated { .. } => {
                Arc::from(error.to_string())
            }
        };
        self.told.fenced(&reason);
        if let Some(result) = self.result.take() {
            let _ = result.send(Err(error));
        }
        self.over = true;
    }

    fn check_finished(&mut self) {
        let Some((_, deadline)) = &self.finishing else { return };
        let told = self.proposer.is_finished() && self.trying.is_empty();
        if told || *deadline <= Instant::now() {
            self.over = true;
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if let Some((reply, _)) = self.finishing.take() {
            let _ = reply.send(());
        }
    }
}
