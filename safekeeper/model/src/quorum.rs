//! What can happen.

use safekeeper_protocol::{
    Acceptor, AcceptorMessage, Action, ConnectionId, Effect, Mutation, Proposer, ProposerId, ProposerMessage,
    ProposerSettings,
};
use stateright::{Model, Property};
use types::{NodeId, Term};

use crate::{
    START,
    disk::offset,
    setup::Setup,
    state::{Broken, Candidate, Link, State},
};

/// The model: an installation and how much may happen to it.
#[derive(Debug, Clone)]
pub struct Quorum {
    /// What there is at first.
    pub setup: Setup,
    /// Proposers, each by the safekeepers (from 0) that it can reach. All connections are there at first.
    pub proposers: Vec<Vec<usize>>,
    /// So many records each of them writes at most.
    pub records: usize,
    /// No term above this is looked at.
    pub terms: u64,
    /// So many crashes of safekeepers, each between any two effects.
    pub crashes: usize,
    /// So many lost connections; what was on the way to the safekeeper may arrive at any time or never.
    pub losses: usize,
    /// So many heartbeats, which bring back safekeepers that were left behind in a higher term.
    pub heartbeats: usize,
    /// A rule that is broken.
    pub mutation: Option<Mutation>,
}

/// One thing that happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happening {
    /// The next message of a connection reaches the safekeeper, which answers at once.
    ToNode { proposer: usize, node: usize },
    /// It does, but the safekeeper dies before it has performed this effect.
    ToNodeThatDies { proposer: usize, node: usize, before_effect: usize, lose_unflushed: bool },
    /// A message of a lost connection arrives after all.
    Late { index: usize },
    /// An answer reaches the proposer.
    ToProposer { proposer: usize, node: usize },
    /// A safekeeper dies while it has nothing to do, and is started again.
    Crash { node: usize, lose_unflushed: bool },
    /// A connection is lost.
    Lose { proposer: usize, node: usize },
    /// A connection is there again.
    Connect { proposer: usize, node: usize },
    /// A proposer that should try the election again does.
    Campaign { proposer: usize },
    /// A proposer sends heartbeats.
    Heartbeat { proposer: usize },
    /// A leader writes a record.
    Write { proposer: usize },
}

/// Answers over a lost connection go nowhere.
const NOWHERE: ConnectionId = ConnectionId(0);

impl Quorum {
    /// Proposers that reach these of three fresh safekeepers and write one record each; no faults.
    pub fn fresh(proposers: &[&[usize]]) -> Quorum {
        let (setup, records, terms) = (Setup::Fresh, 1, proposers.len() as u64);
        let proposers = proposers.iter().map(|reach| reach.to_vec()).collect();
        Quorum { setup, proposers, records, terms, crashes: 0, losses: 0, heartbeats: 0, mutation: None }
    }

    fn proposer(&self, index: usize, members: usize) -> Proposer<crate::ByteScanner> {
        let settings = ProposerSettings {
            id: ProposerId(index as u128 + 1),
            members: (1..=members as u64).map(NodeId).collect(),
            branch_start_lsn: START,
            system_identifier: None,
            buffer_bytes: 1000,
            window_bytes: 1000,
            message_bytes: 100,
            stranded_heartbeats: 1,
        };
        Proposer::new(settings).with_mutation(self.mutation)
    }

    fn to_node(&self, state: &mut State, connection: ConnectionId, node: usize, message: ProposerMessage) {
        let effects = self.effects(state, connection, node, message);
        let replies = state.nodes[node].disk.perform(effects, None);
        self.answer(state, node, replies);
    }

    /// What the safekeeper wants done, its batch of one message ended.
    fn effects(&self, state: &mut State, from: ConnectionId, node: usize, message: ProposerMessage) -> Vec<Effect> {
        let acceptor = &mut state.nodes[node].acceptor;
        let mut effects = acceptor.handle(from, message);
        effects.extend(acceptor.end_batch());
        effects
    }

    fn answer(&self, state: &mut State, node: usize, replies: Vec<(ConnectionId, AcceptorMessage)>) {
        for (to, message) in replies {
            if to != NOWHERE
                && let Some(link) = state.links.get_mut(&(to.0 as usize - 1, node))
            {
                link.to_proposer.push_back(message);
            }
        }
    }

    fn crash(&self, state: &mut State, node: usize, lose_unflushed: bool) {
        let recovered = state.nodes[node].disk.recover(lose_unflushed);
        state.nodes[node].acceptor = Acceptor::new(recovered).with_mutation(self.mutation);
        state.crashes_left -= 1;
        let lost: Vec<usize> = state.links.keys().filter(|(_, n)| *n == node).map(|(p, _)| *p).collect();
        // What was on the way is not heard by the process that follows.
        state.late.retain(|(n, _)| *n != node);
        for proposer in lost {
            state.links.remove(&(proposer, node));
            self.disconnected(state, proposer, node);
        }
    }

    fn lose(&self, state: &mut State, proposer: usize, node: usize) {
        state.losses_left -= 1;
        if let Some(link) = state.links.remove(&(proposer, node))
            && !link.to_node.is_empty()
        {
            state.late.push((node, link.to_node));
            state.late.sort_by_key(|(node, queue)| (*node, format!("{queue:?}")));
        }
        self.disconnected(state, proposer, node);
    }

    fn disconnected(&self, state: &mut State, proposer: usize, node: usize) {
        let actions = state.proposers[proposer].proposer.disconnected(number(node));
        self.act(state, proposer, actions);
    }

    fn connect(&self, state: &mut State, proposer: usize, node: usize) {
        state.links.insert((proposer, node), Link::default());
        let actions = state.proposers[proposer].proposer.connected(number(node));
        self.act(state, proposer, actions);
    }

    fn act(&self, state: &mut State, who: usize, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send { to, message } => {
                    if let Some(link) = state.links.get_mut(&(who, to.0 as usize - 1)) {
                        link.to_node.push_back(message);
                    }
                }
                Action::Started { term, start_lsn } => {
                    let log = found_log(state, term, offset(start_lsn));
                    state.seen.started(who, term, start_lsn, &log);
                    let candidate = &mut state.proposers[who];
                    (candidate.term, candidate.log) = (Some(term), log);
                }
                Action::Reelected { term, start_lsn } => {
                    state.proposers[who].term = Some(term);
                    let log = state.proposers[who].log.clone();
                    state.seen.started(who, term, start_lsn, &log);
                }
                Action::Committed { lsn } => {
                    let Candidate { term, log, .. } = &state.proposers[who];
                    let (term, log) = (term.unwrap_or_default(), log.clone());
                    state.seen.committed(term, lsn, &log);
                }
                Action::Fenced { .. } => self.end(state, who),
                Action::RetryElection => state.proposers[who].retry = true,
                Action::Disconnect { to, .. } => {
                    state.links.remove(&(who, to.0 as usize - 1));
                    self.disconnected(state, who, to.0 as usize - 1);
                }
                Action::Damaged { .. } | Action::BranchDeleted => unreachable!("nothing is damaged or deleted here"),
            }
        }
    }

    /// A fenced proposer is gone, but what it sent may still arrive.
    fn end(&self, state: &mut State, who: usize) {
        state.proposers[who].over = true;
        let nodes: Vec<usize> = state.links.keys().filter(|(p, _)| *p == who).map(|(_, n)| *n).collect();
        for node in nodes {
            if let Some(link) = state.links.remove(&(who, node))
                && !link.to_node.is_empty()
            {
                state.late.push((node, link.to_node));
            }
        }
    }

    fn crashes(&self, state: &State, actions: &mut Vec<Happening>) {
        for ((proposer, node), link) in &state.links {
            let Some(message) = link.to_node.front().cloned() else { continue };
            let mut copy = state.clone();
            let effects = self.effects(&mut copy, NOWHERE, *node, message);
            for before_effect in 0..effects.len() {
                let unflushed = effects[..before_effect].iter().any(|effect| matches!(effect, Effect::WriteWal { .. }));
                let (proposer, node) = (*proposer, *node);
                for lose_unflushed in [true, false].into_iter().take(1 + usize::from(unflushed)) {
                    actions.push(Happening::ToNodeThatDies { proposer, node, before_effect, lose_unflushed });
                }
            }
        }
        for (node, safekeeper) in state.nodes.iter().enumerate() {
            let both = safekeeper.disk.has_unflushed();
            for lose_unflushed in [true, false].into_iter().take(1 + usize::from(both)) {
                actions.push(Happening::Crash { node, lose_unflushed });
            }
        }
    }
}

impl Model for Quorum {
    type State = State;
    type Action = Happening;

    fn init_states(&self) -> Vec<State> {
        let nodes = self.setup.nodes(self.mutation);
        let candidates = (0..self.proposers.len()).map(|index| Candidate {
            proposer: self.proposer(index, nodes.len()),
            term: None,
            log: Vec::new(),
            written: 0,
            retry: false,
            over: false,
        });
        let mut state = State {
            proposers: candidates.collect(),
            links: Default::default(),
            late: Vec::new(),
            crashes_left: self.crashes,
            losses_left: self.losses,
            heartbeats_left: self.heartbeats,
            seen: self.setup.seen(),
            nodes,
        };
        for (proposer, reach) in self.proposers.iter().enumerate() {
            reach.iter().for_each(|node| self.connect(&mut state, proposer, *node));
        }
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Happening>) {
        for ((proposer, node), link) in &state.links {
            let (proposer, node) = (*proposer, *node);
            if !link.to_node.is_empty() {
                actions.push(Happening::ToNode { proposer, node });
            }
            if !link.to_proposer.is_empty() {
                actions.push(Happening::ToProposer { proposer, node });
            }
            if state.losses_left > 0 {
                actions.push(Happening::Lose { proposer, node });
            }
        }
        actions.extend((0..state.late.len()).map(|index| Happening::Late { index }));
        for (proposer, candidate) in state.proposers.iter().enumerate().filter(|(_, candidate)| !candidate.over) {
            let away = self.proposers[proposer].iter().filter(|node| !state.links.contains_key(&(proposer, **node)));
            actions.extend(away.map(|node| Happening::Connect { proposer, node: *node }));
            if candidate.retry {
                actions.push(Happening::Campaign { proposer });
            }
            if candidate.proposer.is_leader() && candidate.written < self.records {
                actions.push(Happening::Write { proposer });
            }
            if candidate.proposer.is_leader() && state.heartbeats_left > 0 {
                actions.push(Happening::Heartbeat { proposer });
            }
        }
        if state.crashes_left > 0 {
            self.crashes(state, actions);
        }
    }

    fn next_state(&self, last: &State, happening: Happening) -> Option<State> {
        let mut state = last.clone();
        match happening {
            Happening::ToNode { proposer, node } => {
                let message = state.links.get_mut(&(proposer, node))?.to_node.pop_front()?;
                self.to_node(&mut state, ConnectionId(proposer as u64 + 1), node, message);
            }
            Happening::ToNodeThatDies { proposer, node, before_effect, lose_unflushed } => {
                let message = state.links.get_mut(&(proposer, node))?.to_node.pop_front()?;
                let effects = self.effects(&mut state, NOWHERE, node, message);
                state.nodes[node].disk.perform(effects, Some(before_effect));
                self.crash(&mut state, node, lose_unflushed);
            }
            Happening::Late { index } => {
                let (node, queue) = state.late.get_mut(index)?;
                let (node, message) = (*node, queue.pop_front()?);
                state.late.retain(|(_, queue)| !queue.is_empty());
                self.to_node(&mut state, NOWHERE, node, message);
            }
            Happening::ToProposer { proposer, node } => {
                let message = state.links.get_mut(&(proposer, node))?.to_proposer.pop_front()?;
                let actions = state.proposers[proposer].proposer.handle(number(node), message);
                self.act(&mut state, proposer, actions);
            }
            Happening::Crash { node, lose_unflushed } => self.crash(&mut state, node, lose_unflushed),
            Happening::Lose { proposer, node } => self.lose(&mut state, proposer, node),
            Happening::Connect { proposer, node } => self.connect(&mut state, proposer, node),
            Happening::Campaign { proposer } => {
                state.proposers[proposer].retry = false;
                let actions = state.proposers[proposer].proposer.campaign();
                self.act(&mut state, proposer, actions);
            }
            Happening::Heartbeat { proposer } => {
                state.heartbeats_left -= 1;
                let actions = state.proposers[proposer].proposer.heartbeat();
                self.act(&mut state, proposer, actions);
            }
            Happening::Write { proposer } => {
                let candidate = &mut state.proposers[proposer];
                candidate.written += 1;
                let record = (10 * (proposer + 1) + candidate.written) as u8;
                candidate.log.push(record);
                let actions = candidate.proposer.append([vec![record].into()]);
                self.act(&mut state, proposer, actions);
            }
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always("election safety", |_, state| {
                !matches!(state.seen.broken, Some(Broken::TwoLeaders(_)))
            }),
            Property::<Self>::always("log matching", |_, state| state.logs_match()),
            Property::<Self>::always("no committed record lost", |_, state| {
                state.committed_is_held() && state.seen.broken != Some(Broken::CommittedTwice)
            }),
            Property::<Self>::always("fenced proposers never commit", |_, state| {
                !matches!(state.seen.broken, Some(Broken::CommittedWhenFenced(_)))
            }),
            Property::<Self>::sometimes("every proposer can start", |model, state| {
                state.seen.leaders.len() >= model.proposers.len()
            }),
            Property::<Self>::sometimes("records of all can be committed", |model, state| {
                state.seen.committed.len() >= model.proposers.len() * model.records
            }),
        ]
    }

    fn within_boundary(&self, state: &State) -> bool {
        state.highest_term() <= Term(self.terms + self.setup.highest_term())
    }
}

/// The log of a term that has just started: a majority has it.
fn found_log(state: &State, term: Term, bytes: usize) -> Vec<u8> {
    let has =
        |node: &&crate::state::Node| node.acceptor.state().history.last_term() == term && node.disk.wal.len() >= bytes;
    state.nodes.iter().find(has).map(|node| node.disk.wal[..bytes].to_vec()).unwrap_or_default()
}

fn number(node: usize) -> NodeId {
    NodeId(node as u64 + 1)
}
