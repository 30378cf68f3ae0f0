//! What can happen.

use safekeeper_protocol::{
    Acceptor, AcceptorMessage, AcceptorState, Action, ConnectionId, Effect, Mutation, Proposer, ProposerId,
    ProposerMessage, ProposerSettings,
};
use stateright::{Model, Property};
use types::{Member, Membership, NodeId, Term};

use crate::{
    START,
    disk::offset,
    setup::{Setup, only_the_second},
    state::{Broken, Candidate, Control, Link, Node, State},
};

/// The model: an installation and how much may happen to it.
#[derive(Debug, Clone)]
pub struct Quorum {
    /// What there is at first.
    pub setup: Setup,
    /// Safekeepers (from 0) that are the branch's at first.
    pub members: Vec<usize>,
    /// Those that are to be its members after a change, if there is to be one. The change may be taken back once.
    pub new_members: Option<Vec<usize>>,
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
    /// So many times may a safekeeper die and lose the last byte that it acknowledged.
    pub rots: usize,
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
    /// A safekeeper dies, and its last byte, which it had acknowledged, is damaged when it comes back.
    Rot { node: usize },
    /// The control plane stores the joint membership.
    BeginChange,
    /// It stores the new members alone, for the joint membership is established.
    CompleteChange,
    /// It goes back to the old ones.
    AbandonChange,
    /// It tells a safekeeper of the membership that is stored.
    TellNode { node: usize },
    /// It tells a proposer.
    TellProposer { proposer: usize },
}

/// Answers over a lost connection go nowhere.
const NOWHERE: ConnectionId = ConnectionId(0);

impl Quorum {
    /// Proposers that reach these of three fresh safekeepers and write one record each; no faults.
    pub fn fresh(proposers: &[&[usize]]) -> Quorum {
        let (setup, records, terms) = (Setup::Fresh, 1, proposers.len() as u64);
        let proposers = proposers.iter().map(|reach| reach.to_vec()).collect();
        let (members, new_members) = (vec![0, 1, 2], None);
        let (crashes, losses, heartbeats, rots, mutation) = (0, 0, 0, 0, None);
        Quorum { setup, members, new_members, proposers, records, terms, crashes, losses, heartbeats, rots, mutation }
    }

    /// The same, but for fresh safekeepers of which these are the branch's at first, and those after a change.
    pub fn changing(members: &[usize], new_members: &[usize], proposers: &[&[usize]]) -> Quorum {
        let (members, new_members) = (members.to_vec(), Some(new_members.to_vec()));
        Quorum { members, new_members, ..Quorum::fresh(proposers) }
    }

    /// What the control plane has stored at first.
    fn stored(&self) -> Membership {
        match self.setup {
            Setup::Moved => only_the_second(),
            Setup::Fresh | Setup::LongerButOlder | Setup::Figure8 | Setup::OneLags => {
                Membership::first(members(&self.members))
            }
        }
    }

    fn safekeepers(&self) -> usize {
        self.members.iter().chain(self.new_members.iter().flatten()).max().map_or(0, |last| last + 1)
    }

    fn proposer(&self, index: usize) -> Proposer<crate::ByteScanner> {
        let settings = ProposerSettings {
            id: ProposerId(index as u128 + 1),
            membership: Membership::first(members(&self.members)),
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
        state.crashes_left -= 1;
        self.restart(state, node, recovered);
    }

    fn restart(&self, state: &mut State, node: usize, recovered: AcceptorState) {
        state.nodes[node].acceptor = Acceptor::new(recovered).with_mutation(self.mutation);
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
        if !state.proposers[proposer].proposer.membership().contains(number(node)) {
            return;
        }
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
                Action::Established { generation } => state.control.established(generation),
                Action::NewerMembership { membership: Some(told), .. } => self.tell_proposer(state, who, told),
                Action::NewerMembership { from, membership: None, .. } => {
                    state.links.remove(&(who, from.0 as usize - 1));
                    self.disconnected(state, who, from.0 as usize - 1);
                }
                Action::Damaged { .. } | Action::BranchDeleted => unreachable!("nothing is damaged or deleted here"),
            }
        }
    }

    fn tell_proposer(&self, state: &mut State, who: usize, told: Membership) {
        let gone = |state: &State, node: usize| !state.proposers[who].proposer.membership().contains(number(node));
        let actions = state.proposers[who].proposer.set_membership(told);
        self.act(state, who, actions);
        for node in self.proposers[who].iter().copied() {
            if gone(state, node) {
                self.give_up(state, who, node);
            } else if !state.links.contains_key(&(who, node)) && !state.proposers[who].over {
                self.connect(state, who, node);
            }
        }
    }

    /// A connection is closed; what is on the way may still arrive.
    fn give_up(&self, state: &mut State, who: usize, node: usize) {
        if let Some(link) = state.links.remove(&(who, node))
            && !link.to_node.is_empty()
        {
            state.late.push((node, link.to_node));
            state.late.sort_by_key(|(node, queue)| (*node, format!("{queue:?}")));
        }
    }

    fn tell_node(&self, state: &mut State, node: usize) {
        let told = state.control.current.clone();
        let Node { acceptor, disk } = &mut state.nodes[node];
        let mut effects = acceptor.set_membership(number(node), told);
        effects.extend(acceptor.end_batch());
        disk.perform(effects, None);
    }

    /// What the control plane may do.
    fn changes(&self, state: &State, actions: &mut Vec<Happening>) {
        let control = &state.control;
        if self.new_members.is_none() {
            return;
        }
        if control.current.is_joint() {
            let may = control.is_established || self.mutation == Some(Mutation::CompleteUnestablished);
            actions.extend(may.then_some(Happening::CompleteChange));
            actions.push(Happening::AbandonChange);
        } else if control.current.generation == Default::default() {
            actions.push(Happening::BeginChange);
        }
        for (node, safekeeper) in state.nodes.iter().enumerate() {
            if safekeeper.acceptor.state().membership.as_ref() != Some(&control.current) {
                actions.push(Happening::TellNode { node });
            }
        }
        for (proposer, candidate) in state.proposers.iter().enumerate().filter(|(_, candidate)| !candidate.over) {
            if candidate.proposer.membership().generation < control.current.generation {
                actions.push(Happening::TellProposer { proposer });
            }
        }
    }

    /// A fenced proposer is gone, but what it sent may still arrive.
    fn end(&self, state: &mut State, who: usize) {
        state.proposers[who].over = true;
        let nodes: Vec<usize> = state.links.keys().filter(|(p, _)| *p == who).map(|(_, n)| *n).collect();
        nodes.into_iter().for_each(|node| self.give_up(state, who, node));
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
        let nodes = self.setup.nodes(self.safekeepers(), self.mutation);
        let candidates = (0..self.proposers.len()).map(|index| Candidate {
            proposer: self.proposer(index),
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
            rots_left: self.rots,
            control: Control { current: self.stored(), is_established: false },
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
            let away = self.proposers[proposer].iter().filter(|node| {
                !state.links.contains_key(&(proposer, **node))
                    && candidate.proposer.membership().contains(number(**node))
            });
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
        if state.rots_left > 0 {
            let rotten = state.nodes.iter().enumerate().filter(|(_, node)| node.disk.can_rot());
            actions.extend(rotten.map(|(node, _)| Happening::Rot { node }));
        }
        self.changes(state, actions);
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
                let proposer_of = &mut state.proposers[proposer].proposer;
                let mut actions = proposer_of.handle(number(node), message);
                // At once: a telling that comes later is one that is delivered later.
                actions.extend(proposer_of.tell_commits(proposer_of.commit_lsn()));
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
            Happening::Rot { node } => {
                state.rots_left -= 1;
                let recovered = state.nodes[node].disk.rot();
                self.restart(&mut state, node, recovered);
            }
            Happening::BeginChange => {
                let joint = state.control.current.joint_with(members(self.new_members.as_ref()?)).ok()?;
                state.control = Control { current: joint, is_established: false };
            }
            Happening::CompleteChange => {
                state.control = Control { current: state.control.current.completed(), is_established: false };
            }
            Happening::AbandonChange => {
                state.control = Control { current: state.control.current.abandoned(), is_established: false };
            }
            Happening::TellNode { node } => self.tell_node(&mut state, node),
            Happening::TellProposer { proposer } => {
                let told = state.control.current.clone();
                self.tell_proposer(&mut state, proposer, told);
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
            Property::<Self>::sometimes("a change can be completed", |model, state| {
                let is_last = |new: &Vec<usize>| state.control.current.members == members(new);
                model.new_members.as_ref().is_none_or(is_last)
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

fn members(nodes: &[usize]) -> Vec<Member> {
    nodes.iter().map(|node| Member { node: number(*node), address: String::new() }).collect()
}

fn number(node: usize) -> NodeId {
    NodeId(node as u64 + 1)
}
