//! Acceptors, proposers, and what happens between them.

use std::{
    collections::{BTreeMap, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
};

use bytes::Bytes;
use types::{Lsn, NodeId, Term};

use crate::{Disk, Rng, SimScanner, make_record, observer::Observer};
use safekeeper_protocol::{
    Acceptor, AcceptorMessage, Action, ConnectionId, Effect, Mutation, Proposer, ProposerId, ProposerMessage,
    ProposerSettings,
    message::{Vote, VoteTerm},
};

pub const START: Lsn = Lsn(1000);
const SEGMENT_BYTES: u64 = 256;

#[derive(Debug, Clone, Copy)]
pub struct SimOptions {
    pub seed: u64,
    pub members: u64,
    /// So many computes at a time.
    pub computes: usize,
    pub steps: usize,
    pub mutation: Option<Mutation>,
    /// Tell what happens on standard output.
    pub print: bool,
}

pub struct World {
    options: SimOptions,
    rng: Rng,
    nodes: BTreeMap<NodeId, Node>,
    computes: BTreeMap<ProposerId, Compute>,
    connections: BTreeMap<ConnectionId, Connection>,
    observer: Observer,
    next_id: u64,
    trace: DefaultHasher,
    /// What happened most often, for tests that want to know whether anything did.
    pub counts: BTreeMap<&'static str, u64>,
}

struct Node {
    disk: Disk,
    /// `None` while it is down.
    acceptor: Option<Acceptor>,
}

struct Compute {
    proposer: Proposer<SimScanner>,
    started: Option<(Term, Lsn)>,
    written: Vec<u8>,
    retry: bool,
}

struct Connection {
    compute: ProposerId,
    node: NodeId,
    /// Lost, but what is on the way to the safekeeper may still arrive.
    ghost: bool,
    to_node: VecDeque<ProposerMessage>,
    to_compute: VecDeque<AcceptorMessage>,
}

impl World {
    pub fn new(options: SimOptions) -> World {
        let nodes = (1..=options.members).map(|n| {
            (
                NodeId(n),
                Node {
                    disk: Disk::default(),
                    acceptor: Some(Acceptor::new(Default::default()).with_mutation(options.mutation)),
                },
            )
        });
        World {
            options,
            rng: Rng(options.seed),
            nodes: nodes.collect(),
            computes: BTreeMap::new(),
            connections: BTreeMap::new(),
            observer: Observer::new(START),
            next_id: 1,
            trace: DefaultHasher::new(),
            counts: BTreeMap::new(),
        }
    }

    /// Runs to the end, then heals everything and expects the installation to work. Returns the trace's hash.
    pub fn run(&mut self) -> Result<u64, String> {
        for step in 0..self.options.steps {
            self.step().map_err(|error| format!("seed {}, step {step}: {error}", self.options.seed))?;
        }
        self.heal().map_err(|error| format!("seed {}, healed: {error}", self.options.seed))?;
        Ok(self.trace.finish())
    }

    fn note(&mut self, what: &'static str, detail: impl std::fmt::Debug) {
        *self.counts.entry(what).or_default() += 1;
        if self.options.print {
            println!("{what} {detail:?}");
        }
        (what, format!("{detail:?}")).hash(&mut self.trace);
    }

    fn step(&mut self) -> Result<(), String> {
        match self.rng.below(1000) {
            0..400 => self.deliver_to_node(),
            400..700 => self.deliver_to_compute(),
            700..790 => self.connect(),
            790..800 => {
                self.break_connection();
                Ok(())
            }
            800..806 => self.crash_or_restart(),
            806..900 => self.write(),
            900..912 => self.start_compute(),
            912..917 => self.kill_compute(),
            917..922 => self.vote_in_vain(),
            922..940 => self.retry_elections(),
            940..960 => self.heartbeats(),
            960..980 => self.report_stored(),
            _ => self.trim(),
        }
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.rng.below(from.len())])
    }

    fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn start_compute(&mut self) -> Result<(), String> {
        if self.computes.len() >= self.options.computes {
            return Ok(());
        }
        let id = ProposerId(u128::from(self.fresh_id()));
        self.note("compute", id);
        let settings = ProposerSettings {
            id,
            members: self.nodes.keys().copied().collect(),
            branch_start_lsn: START,
            system_identifier: None,
            buffer_bytes: 150,
            window_bytes: 120,
            message_bytes: 40,
            stranded_heartbeats: 1,
        };
        let proposer = Proposer::new(settings).with_mutation(self.options.mutation);
        self.computes.insert(id, Compute { proposer, started: None, written: Vec::new(), retry: false });
        Ok(())
    }

    /// Ends a compute, sometimes with a goodbye.
    fn kill_compute(&mut self) -> Result<(), String> {
        let ids: Vec<ProposerId> = self.computes.keys().copied().collect();
        let Some(id) = self.pick(&ids) else { return Ok(()) };
        self.note("kill", id);
        if self.rng.chance(50) {
            let actions = self.computes.get_mut(&id).map(|c| c.proposer.finish()).unwrap_or_default();
            self.act(id, actions)?;
        }
        self.computes.remove(&id);
        for connection in self.connections.values_mut().filter(|c| c.compute == id) {
            connection.ghost = true;
        }
        Ok(())
    }

    fn connect(&mut self) -> Result<(), String> {
        let connected = |compute: ProposerId, node: NodeId| {
            self.connections.values().any(|c| !c.ghost && c.compute == compute && c.node == node)
        };
        let up: Vec<NodeId> = self.nodes.iter().filter(|(_, n)| n.acceptor.is_some()).map(|(id, _)| *id).collect();
        let pairs = self.computes.keys().flat_map(|compute| up.iter().map(move |node| (*compute, *node)));
        let free: Vec<(ProposerId, NodeId)> = pairs.filter(|(compute, node)| !connected(*compute, *node)).collect();
        let Some((compute, node)) = self.pick(&free) else { return Ok(()) };
        self.connect_pair(compute, node)
    }

    fn connect_pair(&mut self, compute: ProposerId, node: NodeId) -> Result<(), String> {
        let id = ConnectionId(self.fresh_id());
        self.note("connect", (id, compute, node));
        let connection =
            Connection { compute, node, ghost: false, to_node: VecDeque::new(), to_compute: VecDeque::new() };
        self.connections.insert(id, connection);
        let actions = self.computes.get_mut(&compute).map(|c| c.proposer.connected(node)).unwrap_or_default();
        self.act(compute, actions)
    }

    fn break_connection(&mut self) {
        let ids: Vec<ConnectionId> = self.connections.iter().filter(|(_, c)| !c.ghost).map(|(id, _)| *id).collect();
        if let Some(id) = self.pick(&ids) {
            let (compute, node) = (self.connections[&id].compute, self.connections[&id].node);
            // An error is found by the next check as well.
            let _ = self.lose(compute, node);
        }
    }

    fn lose(&mut self, compute: ProposerId, node: NodeId) -> Result<(), String> {
        let found = self.connections.iter_mut().find(|(_, c)| !c.ghost && c.compute == compute && c.node == node);
        let Some((id, connection)) = found else { return Ok(()) };
        let id = *id;
        connection.ghost = true;
        connection.to_compute.clear();
        if self.rng.chance(50) {
            self.connections.remove(&id);
        }
        self.note("lose", id);
        if self.rng.chance(50) {
            self.notice_loss(node)?;
        }
        let actions = self.computes.get_mut(&compute).map(|c| c.proposer.disconnected(node)).unwrap_or_default();
        self.act(compute, actions)
    }

    /// A safekeeper that no compute is connected to votes for a candidate that is never heard of again.
    fn vote_in_vain(&mut self) -> Result<(), String> {
        let alone = |node: NodeId| !self.connections.values().any(|c| !c.ghost && c.node == node);
        let ids: Vec<NodeId> = self.nodes.keys().copied().filter(|node| alone(*node)).collect();
        let Some(node_id) = self.pick(&ids) else { return Ok(()) };
        let proposer = ProposerId(u128::from(self.fresh_id()));
        let Some(acceptor) = self.nodes.get_mut(&node_id).and_then(|node| node.acceptor.as_mut()) else {
            return Ok(());
        };
        let vote = Vote { proposer, term: VoteTerm::Next, system_identifier: None };
        let mut effects = acceptor.handle(ConnectionId(0), ProposerMessage::Vote(vote));
        effects.extend(acceptor.end_batch());
        self.note("vain", (node_id, proposer));
        self.perform(node_id, effects)
    }

    fn notice_loss(&mut self, node_id: NodeId) -> Result<(), String> {
        let Some(acceptor) = self.nodes.get_mut(&node_id).and_then(|node| node.acceptor.as_mut()) else {
            return Ok(());
        };
        acceptor.proposer_gone();
        let effects = acceptor.end_batch();
        self.perform(node_id, effects)
    }

    fn deliver_to_node(&mut self) -> Result<(), String> {
        let waiting = self.connections.iter().filter(|(_, c)| !c.to_node.is_empty()).map(|(id, _)| *id);
        let waiting: Vec<ConnectionId> = waiting.collect();
        let Some(id) = self.pick(&waiting) else { return Ok(()) };
        let many = 1 + self.rng.below(4);
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        let node_id = connection.node;
        let take = many.min(connection.to_node.len());
        let messages: Vec<ProposerMessage> = connection.to_node.drain(..take).collect();
        if connection.ghost && connection.to_node.is_empty() {
            self.connections.remove(&id);
        }
        self.note("to_node", (id, &messages));
        let Some(node) = self.nodes.get_mut(&node_id) else { return Ok(()) };
        let Some(acceptor) = &mut node.acceptor else { return Ok(()) };
        let mut effects: Vec<Effect> = messages.into_iter().flat_map(|m| acceptor.handle(id, m)).collect();
        effects.extend(acceptor.end_batch());
        self.perform(node_id, effects)
    }

    fn perform(&mut self, node_id: NodeId, effects: Vec<Effect>) -> Result<(), String> {
        let crash_at = self.rng.chance(1).then(|| self.rng.below(effects.len() + 1));
        let Some(node) = self.nodes.get_mut(&node_id) else { return Ok(()) };
        let replies = node.disk.perform(effects, crash_at)?;
        for (to, message) in replies {
            if let Some(connection) = self.connections.get_mut(&to).filter(|c| !c.ghost) {
                connection.to_compute.push_back(message);
            }
        }
        if crash_at.is_some() {
            return self.crash(node_id);
        }
        self.check_node(node_id)
    }

    fn check_node(&self, node_id: NodeId) -> Result<(), String> {
        let node = &self.nodes[&node_id];
        if let Some(acceptor) = &node.acceptor {
            let state = acceptor.state();
            if state.flush_lsn > node.disk.flushed && state.log_start_lsn < state.flush_lsn {
                return Err(format!("{node_id} claims {}, has {}", state.flush_lsn, node.disk.flushed));
            }
            self.observer.knows_committed(&node.disk, state.commit_lsn)?;
        }
        let disks: Vec<&Disk> = self.nodes.values().map(|node| &node.disk).collect();
        self.observer.held(&disks)
    }

    fn crash_or_restart(&mut self) -> Result<(), String> {
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        let Some(id) = self.pick(&ids) else { return Ok(()) };
        if self.nodes[&id].acceptor.is_some() { self.crash(id) } else { self.restart(id) }
    }

    fn crash(&mut self, id: NodeId) -> Result<(), String> {
        self.note("crash", id);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.acceptor = None;
            node.disk.crash(&mut self.rng);
        }
        let computes: Vec<ProposerId> =
            self.connections.values().filter(|c| !c.ghost && c.node == id).map(|c| c.compute).collect();
        for compute in computes {
            self.lose(compute, id)?;
        }
        self.connections.retain(|_, c| c.node != id);
        if self.rng.chance(80) { self.restart(id) } else { Ok(()) }
    }

    fn restart(&mut self, id: NodeId) -> Result<(), String> {
        self.note("restart", id);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.acceptor = Some(Acceptor::new(node.disk.recover()?).with_mutation(self.options.mutation));
        }
        self.check_node(id)
    }

    fn deliver_to_compute(&mut self) -> Result<(), String> {
        let waiting = self.connections.iter().filter(|(_, c)| !c.to_compute.is_empty() && !c.ghost);
        let waiting: Vec<ConnectionId> = waiting.map(|(id, _)| *id).collect();
        let Some(id) = self.pick(&waiting) else { return Ok(()) };
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        let (compute, node) = (connection.compute, connection.node);
        let Some(message) = connection.to_compute.pop_front() else { return Ok(()) };
        self.note("to_compute", (id, &message));
        let actions = self.computes.get_mut(&compute).map(|c| c.proposer.handle(node, message)).unwrap_or_default();
        self.act(compute, actions)
    }

    fn act(&mut self, id: ProposerId, actions: Vec<Action>) -> Result<(), String> {
        for action in actions {
            match action {
                Action::Send { to, message } => {
                    let open = self.connections.values_mut().find(|c| !c.ghost && c.compute == id && c.node == to);
                    if let Some(connection) = open {
                        connection.to_node.push_back(message);
                    }
                }
                Action::Started { term, start_lsn } => {
                    self.note("started", (id, term, start_lsn));
                    self.observer.started(term, id, start_lsn)?;
                    if let Some(compute) = self.computes.get_mut(&id) {
                        compute.started = Some((term, start_lsn));
                    }
                }
                Action::Reelected { term, start_lsn } => {
                    self.note("reelected", (id, term, start_lsn));
                    self.observer.started(term, id, start_lsn)?;
                    if let Some((own, _)) = self.computes.get_mut(&id).and_then(|compute| compute.started.as_mut()) {
                        *own = term;
                    }
                }
                Action::Damaged { donor, reason, .. } => {
                    return Err(format!("safekeeper {donor} is said to have damaged WAL: {reason}"));
                }
                Action::Committed { lsn } => {
                    self.note("committed", (id, lsn));
                    let Some(compute) = self.computes.get(&id) else { continue };
                    let own_start = compute.started.map_or(lsn, |(_, start)| start);
                    let disks: Vec<&Disk> = self.nodes.values().map(|node| &node.disk).collect();
                    self.observer.committed(lsn, own_start, &compute.written, &disks)?;
                }
                Action::Fenced { reason } => {
                    self.note("fenced", (id, reason));
                    self.computes.remove(&id);
                    self.connections.values_mut().filter(|c| c.compute == id).for_each(|c| c.ghost = true);
                }
                Action::RetryElection => {
                    if let Some(compute) = self.computes.get_mut(&id) {
                        compute.retry = true;
                    }
                }
                Action::Disconnect { to, reason } => {
                    self.note("disconnect", (id, to, reason));
                    self.lose(id, to)?;
                }
                Action::BranchDeleted => return Err("nobody deleted the branch".to_owned()),
            }
        }
        Ok(())
    }

    fn write(&mut self) -> Result<(), String> {
        let leaders = self.computes.iter().filter(|(_, c)| c.proposer.is_leader()).map(|(id, _)| *id);
        let leaders: Vec<ProposerId> = leaders.collect();
        let Some(id) = self.pick(&leaders) else { return Ok(()) };
        let mut pieces = Vec::new();
        for _ in 0..1 + self.rng.below(3) {
            let number = self.fresh_id() as u32;
            let length = 10 + self.rng.below(90);
            let term = self.computes[&id].started.map_or(Term(0), |(term, _)| term);
            pieces.push(Bytes::from(make_record(term, number, length)));
        }
        self.note("write", (id, pieces.len()));
        let Some(compute) = self.computes.get_mut(&id) else { return Ok(()) };
        pieces.iter().for_each(|piece| compute.written.extend_from_slice(piece));
        let actions = compute.proposer.append(pieces);
        self.act(id, actions)
    }

    fn retry_elections(&mut self) -> Result<(), String> {
        let retrying = self.computes.iter().filter(|(_, c)| c.retry).map(|(id, _)| *id);
        for id in retrying.collect::<Vec<_>>() {
            let Some(compute) = self.computes.get_mut(&id) else { continue };
            compute.retry = false;
            let actions = compute.proposer.campaign();
            self.note("campaign", id);
            self.act(id, actions)?;
        }
        Ok(())
    }

    fn heartbeats(&mut self) -> Result<(), String> {
        for id in self.computes.keys().copied().collect::<Vec<_>>() {
            let actions = self.computes.get_mut(&id).map(|c| c.proposer.heartbeat()).unwrap_or_default();
            self.act(id, actions)?;
        }
        Ok(())
    }

    /// The object store has everything up to some committed record.
    fn report_stored(&mut self) -> Result<(), String> {
        let boundaries = self.observer.boundaries().to_vec();
        let (Some(stored), ids) = (self.pick(&boundaries), self.nodes.keys().copied().collect::<Vec<_>>()) else {
            return Ok(());
        };
        let Some(id) = self.pick(&ids) else { return Ok(()) };
        self.note("report", (id, stored));
        if let Some(acceptor) = self.nodes.get_mut(&id).and_then(|node| node.acceptor.as_mut()) {
            acceptor.handle_report(stored);
        }
        Ok(())
    }

    fn trim(&mut self) -> Result<(), String> {
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        let idle = self.rng.chance(30);
        let Some(id) = self.pick(&ids) else { return Ok(()) };
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        let Some(acceptor) = &mut node.acceptor else { return Ok(()) };
        let mut effects = acceptor.trim(idle, SEGMENT_BYTES);
        if idle {
            effects.extend(acceptor.persist_before_idle(&node.disk.control));
        }
        if !effects.is_empty() {
            self.note("trim", (id, effects.len()));
        }
        self.perform(id, effects)
    }

    /// All safekeepers up, one fresh compute: it must win, write, commit, and bring everybody to the same log.
    fn heal(&mut self) -> Result<(), String> {
        self.computes.clear();
        self.connections.clear();
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        for id in &ids {
            self.crash(*id)?;
            if self.nodes[id].acceptor.is_none() {
                self.restart(*id)?;
            }
        }
        let committed = self.observer.committed_end();
        // One compute brings everybody back, also those that voted in vain for somebody else. It may be fenced by a vote of its
        // own that arrives late, from a lost connection.
        for _ in 0..3 {
            self.computes.clear();
            self.connections.values_mut().for_each(|c| c.ghost = true);
            self.start_compute()?;
            let compute = *self.computes.keys().next().ok_or("no compute")?;
            self.settle(compute, &ids)?;
            if self.all_at_end(compute) {
                let end = self.computes[&compute].proposer.end_lsn();
                let good = self.observer.committed_end() == end && end >= committed;
                return if good { Ok(()) } else { Err(format!("the log ends at {end}, {committed} was committed")) };
            }
            if self.computes.contains_key(&compute) {
                break;
            }
        }
        let states: Vec<_> = self.nodes.values().map(|n| n.acceptor.as_ref().map(Acceptor::status)).collect();
        Err(format!("no agreement, committed is {}: {states:?}", self.observer.committed_end()))
    }

    /// Lets one compute work until everybody has its log, or for a while.
    fn settle(&mut self, compute: ProposerId, ids: &[NodeId]) -> Result<(), String> {
        let mut quiet_rounds = 0;
        for round in 0..3000 {
            for id in ids {
                if self.nodes[id].acceptor.is_none() {
                    self.restart(*id)?;
                }
                let connected = self.connections.values().any(|c| !c.ghost && c.compute == compute && c.node == *id);
                if !connected && self.computes.contains_key(&compute) {
                    self.connect_pair(compute, *id)?;
                }
            }
            for _ in 0..10 {
                self.deliver_to_node()?;
                self.deliver_to_compute()?;
            }
            self.retry_elections()?;
            if round % 50 == 0 && round < 500 {
                self.write()?;
            }
            self.heartbeats()?;
            quiet_rounds = if self.all_at_end(compute) { quiet_rounds + 1 } else { 0 };
            if quiet_rounds > 20 && round > 500 {
                break;
            }
        }
        Ok(())
    }

    fn all_at_end(&self, compute: ProposerId) -> bool {
        let Some(compute) = self.computes.get(&compute) else { return false };
        let end = compute.proposer.end_lsn();
        let at_end = |node: &Node| node.acceptor.as_ref().is_some_and(|a| a.state().commit_lsn == end);
        compute.proposer.is_leader() && self.nodes.values().all(at_end)
    }
}
