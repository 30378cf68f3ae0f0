//! One state of the installation, and what an observer of everything makes of it.

use std::collections::{BTreeMap, VecDeque};

use safekeeper_protocol::{Acceptor, AcceptorMessage, Proposer, ProposerMessage, TermHistory};
use types::{Lsn, Membership, MembershipGeneration, Term};

use crate::{
    ByteScanner, START,
    disk::{Disk, offset},
};

/// See the crate's documentation.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State {
    /// Safekeepers; the first has number 1.
    pub nodes: Vec<Node>,
    /// Computes.
    pub proposers: Vec<Candidate>,
    /// Current connections, by proposer and safekeeper.
    pub links: BTreeMap<(usize, usize), Link>,
    /// What is still on the way to safekeepers over lost connections.
    pub late: Vec<(usize, VecDeque<ProposerMessage>)>,
    /// So many crashes of safekeepers may still happen.
    pub crashes_left: usize,
    /// So many connections may still be lost.
    pub losses_left: usize,
    /// So many heartbeats may still be sent.
    pub heartbeats_left: usize,
    /// So many times may a safekeeper still lose what it acknowledged.
    pub rots_left: usize,
    /// What the control plane has stored.
    pub control: Control,
    /// What was seen.
    pub seen: Seen,
}

/// What the control plane has stored.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Control {
    /// The branch's membership.
    pub current: Membership,
    /// It is joint, and a proposer has committed under it.
    pub is_established: bool,
}

impl Control {
    /// A proposer has committed under a membership.
    pub fn established(&mut self, generation: MembershipGeneration) {
        self.is_established |= self.current.is_joint() && self.current.generation == generation;
    }
}

/// A safekeeper.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Node {
    /// The real state machine.
    pub acceptor: Acceptor,
    /// Its files.
    pub disk: Disk,
}

/// A compute.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Candidate {
    /// The real state machine.
    pub proposer: Proposer<ByteScanner>,
    /// The term it leads.
    pub term: Option<Term>,
    /// Its log, from [`START`] on: what it found and what it wrote.
    pub log: Vec<u8>,
    /// So many records it has written.
    pub written: usize,
    /// It was told to try the election again.
    pub retry: bool,
    /// It is fenced.
    pub over: bool,
}

/// What is on the way over one connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Link {
    /// To the safekeeper, first things first.
    pub to_node: VecDeque<ProposerMessage>,
    /// To the proposer.
    pub to_proposer: VecDeque<AcceptorMessage>,
}

/// What an observer of everything has seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Seen {
    /// Who started each term, and where.
    pub leaders: BTreeMap<Term, (usize, Lsn)>,
    /// All WAL that anybody was told to be committed.
    pub committed: Vec<u8>,
    /// What must never happen, and has.
    pub broken: Option<Broken>,
}

/// What must never happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Broken {
    /// Two proposers have started one term.
    TwoLeaders(Term),
    /// Something was reported committed beyond the start of a newer term, by an older one.
    CommittedWhenFenced(Term),
    /// Two proposers were told of different committed WAL.
    CommittedTwice,
}

impl Seen {
    /// A proposer has started a term at a position, with this log below it.
    pub fn started(&mut self, who: usize, term: Term, start_lsn: Lsn, log: &[u8]) {
        let (leader, _) = *self.leaders.entry(term).or_insert((who, start_lsn));
        if leader != who {
            self.broken = Some(Broken::TwoLeaders(term));
        }
        self.committed(term, start_lsn, log);
    }

    /// A proposer was told that its log is committed up to a position.
    pub fn committed(&mut self, term: Term, lsn: Lsn, log: &[u8]) {
        let newer = self.leaders.iter().find(|(leader_term, _)| **leader_term > term);
        if newer.is_some_and(|(_, (_, start_lsn))| lsn > *start_lsn) {
            self.broken = Some(Broken::CommittedWhenFenced(term));
        }
        let told = &log[..offset(lsn).min(log.len())];
        let common = told.len().min(self.committed.len());
        if told[..common] != self.committed[..common] {
            self.broken = Some(Broken::CommittedTwice);
        } else if told.len() > common {
            self.committed = told.to_vec();
        }
    }
}

impl State {
    /// A majority of the members' disks hold everything committed, unchanged, or know that they have lost it; of the new members'
    /// too once a joint membership is established.
    pub fn committed_is_held(&self) -> bool {
        let committed = &self.seen.committed;
        let holds = |node: &Node| node.disk.control.doubtful || node.disk.durable(Lsn::MAX).starts_with(committed);
        let sets = if self.control.is_established { 2 } else { 1 };
        self.control.current.sets().take(sets).all(|set| {
            set.iter().filter(|member| holds(&self.nodes[member.node.0 as usize - 1])).count() > set.len() / 2
        })
    }

    /// Whenever two logs have a term, they hold the same bytes up to where it ends in the shorter one.
    pub fn logs_match(&self) -> bool {
        let pairs = self.nodes.iter().enumerate().flat_map(|(i, a)| self.nodes[..i].iter().map(move |b| (a, b)));
        pairs.into_iter().all(|(a, b)| matching(a, b))
    }

    /// The highest term anywhere.
    pub fn highest_term(&self) -> Term {
        self.nodes.iter().map(|node| node.acceptor.state().term).max().unwrap_or_default()
    }
}

fn matching(a: &Node, b: &Node) -> bool {
    let (ends_a, ends_b) = (ends(a), ends(b));
    let shared = ends_a.iter().filter_map(|(term, end)| Some((*end).min(*ends_b.get(term)?))).max();
    let end = shared.unwrap_or(START);
    a.disk.durable(end) == b.disk.durable(end)
}

/// Where each term ends in a safekeeper's log.
fn ends(node: &Node) -> BTreeMap<Term, Lsn> {
    let state = node.acceptor.state();
    let history: TermHistory = state.history.up_to(state.flush_lsn);
    let starts = history.entries().iter().skip(1).map(|entry| entry.start_lsn).chain([state.flush_lsn]);
    history.entries().iter().map(|entry| entry.term).zip(starts).collect()
}
