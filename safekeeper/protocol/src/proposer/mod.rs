//! A compute's side of the consensus: wins a term, brings safekeepers up to one log, learns what is committed.

mod buffer;
mod campaign;
mod membership;
mod streaming;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use types::{Lsn, Membership, MembershipGeneration, NodeId, Term};

use self::{buffer::WalBuffer, streaming::Follower};
use crate::{
    history::TermHistory,
    message::{AcceptorMessage, ProposerId, ProposerMessage, Vote, VoteReply, VoteTerm},
    mutation::{Broken, Mutation},
};

/// The proposer of one branch, for one run of a compute.
///
/// Contract: the driver reports connections as they come and go, hands in what safekeepers send over the connection that
/// is current, and performs actions in order. Messages to one safekeeper must arrive in order or not at all; a connection
/// that lost one is over. While [`Proposer::is_leader`] is false, [`Proposer::append`] must not be called.
///
/// `S` finds records in WAL that goes from one safekeeper to another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Proposer<S> {
    settings: ProposerSettings,
    phase: Phase,
    peers: BTreeMap<NodeId, Peer<S>>,
    commit_lsn: Lsn,
    /// The highest position that any safekeeper knows to be in the object store.
    horizon: Lsn,
    /// This membership's majorities have held, all at once, everything that is committed.
    established: bool,
    /// Safekeepers that are passed over in the election that goes on: their logs end in damage.
    damaged: BTreeSet<NodeId>,
    /// Goodbye is said to everybody that has everything.
    finishing: bool,
    broken: Broken,
}

/// Finds where records end in WAL that comes from another safekeeper.
pub trait RecordScanner {
    /// For WAL that starts here, the end of a whole record.
    fn starting_at(start: Lsn) -> Self;

    /// Takes bytes that follow on those before, and returns the end of the last record that is whole by now; the start when
    /// there is none. An error says why this can't be WAL.
    fn feed(&mut self, wal: &[u8]) -> Result<Lsn, String>;
}

/// What a proposer is given.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProposerSettings {
    /// Different for every run.
    pub id: ProposerId,
    /// The safekeepers of the branch.
    pub membership: Membership,
    /// Where the log starts when no safekeeper has any of it.
    pub branch_start_lsn: Lsn,
    /// The cluster's identifier, when known.
    pub system_identifier: Option<u64>,
    /// Bytes of WAL kept in memory for safekeepers that lag; beyond, they get it from each other.
    pub buffer_bytes: u64,
    /// Bytes that may be on the way to one safekeeper.
    pub window_bytes: u64,
    /// Most WAL bytes in one message; at most [`crate::message::MAX_WAL_BYTES_PER_MESSAGE`].
    pub message_bytes: usize,
    /// After so many heartbeats without news of the candidate that a safekeeper voted for, the proposer in office takes a term
    /// above it. Time enough for a compute that is just starting to win and fence this one.
    pub stranded_heartbeats: u32,
}

/// What the driver must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send a message over the current connection.
    Send { to: NodeId, message: ProposerMessage },
    /// The term is won and this position committed: WAL may be appended from here.
    Started { term: Term, start_lsn: Lsn },
    /// The proposer in office has taken a higher term, so that a safekeeper left behind in one takes part again. The log
    /// goes on as it was.
    Reelected { term: Term, start_lsn: Lsn },
    /// WAL that a safekeeper sent for another one is damaged; it was not passed on.
    Damaged { donor: NodeId, on_behalf_of: NodeId, reason: String },
    /// A majority holds WAL up to here.
    Committed { lsn: Lsn },
    /// Somebody else took the term or a newer one; nothing will ever be committed again.
    Fenced { reason: String },
    /// The election was split or lost: call [`Proposer::campaign`] after a short random while.
    RetryElection,
    /// The connection is of no use (the reason is for people); report it as lost, connect again later.
    Disconnect { to: NodeId, reason: String },
    /// The safekeepers have deleted the branch.
    BranchDeleted,
    /// This proposer has committed under a membership: nobody will ever commit anything under an older one again, and while it
    /// is joint its new members have everything. Once for each membership.
    Established { generation: MembershipGeneration },
    /// A safekeeper has heard of a newer membership. Where it knows the members, hand them to [`Proposer::set_membership`], if this
    /// proposer may learn them from safekeepers; the connection is of no use before that.
    NewerMembership { from: NodeId, generation: MembershipGeneration, membership: Option<Membership> },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Phase {
    /// Asks for votes; `candidate` is `None` until safekeepers have named a term.
    Campaign {
        candidate: Option<Term>,
        /// There when this proposer has led before and its log is to go on.
        office: Option<Office>,
    },
    Leader(Leadership),
    Over,
}

/// What a proposer in office takes along into a higher term.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Office {
    /// Its log.
    wal: WalBuffer,
    /// The terms that it has won, the latest last.
    terms: Vec<Term>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Leadership {
    term: Term,
    start_lsn: Lsn,
    history: TermHistory,
    donor: NodeId,
    wal: WalBuffer,
    /// This term's start is committed.
    started: bool,
    /// Terms that this proposer led before this one; empty: it has not been in office before.
    earlier_terms: Vec<Term>,
    /// Heartbeats for which a safekeeper has been left behind in a higher term with no sign of whom it voted for.
    stranded_beats: u32,
    /// The highest term that such a safekeeper was in.
    stranded_term: Term,
}

impl Leadership {
    fn in_office(&self) -> bool {
        self.started || !self.earlier_terms.is_empty()
    }

    /// What goes along into another election.
    fn into_office(self) -> Option<Office> {
        let in_office = self.in_office();
        let mut terms = self.earlier_terms;
        terms.push(self.term);
        in_office.then_some(Office { wal: self.wal, terms })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Peer<S> {
    Away,
    /// Asked for a vote.
    Asked,
    Voted(Box<VoteReply>),
    Following(Follower<S>),
}

impl<S: RecordScanner> Proposer<S> {
    /// Starts with no connection and no term.
    pub fn new(settings: ProposerSettings) -> Proposer<S> {
        let peers = settings.membership.all().iter().map(|member| (member.node, Peer::Away)).collect();
        let phase = Phase::Campaign { candidate: None, office: None };
        let (commit_lsn, horizon) = (Lsn::INVALID, Lsn::INVALID);
        let (damaged, broken) = (BTreeSet::new(), Broken::default());
        let (established, finishing) = (false, false);
        Proposer { settings, phase, peers, commit_lsn, horizon, established, damaged, finishing, broken }
    }

    /// Breaks a rule from now on.
    #[cfg(feature = "mutations")]
    pub fn with_mutation(mut self, mutation: Option<Mutation>) -> Proposer<S> {
        self.broken = Broken(mutation);
        self
    }

    fn breaks(&self, rule: Mutation) -> bool {
        self.broken.is(rule)
    }

    /// True from [`Action::Started`] on, until fenced.
    pub fn is_leader(&self) -> bool {
        match &self.phase {
            Phase::Leader(leader) => leader.in_office(),
            Phase::Campaign { office, .. } => office.is_some(),
            Phase::Over => false,
        }
    }

    /// Up to here a majority holds the WAL; invalid before [`Action::Started`].
    pub fn commit_lsn(&self) -> Lsn {
        self.commit_lsn
    }

    /// End of the WAL appended.
    pub fn end_lsn(&self) -> Lsn {
        match &self.phase {
            Phase::Leader(leader) => leader.wal.end(),
            Phase::Campaign { office: Some(office), .. } => office.wal.end(),
            Phase::Campaign { office: None, .. } | Phase::Over => Lsn::INVALID,
        }
    }

    /// Names the cluster's identifier, which is told to safekeepers from now on.
    pub fn identify(&mut self, system_identifier: u64) {
        self.settings.system_identifier = Some(system_identifier);
    }

    /// Says goodbye to each safekeeper as soon as everything is committed and it has all of it. Nothing is appended any more.
    pub fn finish(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        self.finishing = true;
        self.pump_all(&mut actions);
        actions
    }

    /// True when, after [`Proposer::finish`], everything is committed and every connected safekeeper has stored that it is;
    /// but for those in a higher term, which don't listen.
    pub fn is_finished(&self) -> bool {
        let Phase::Leader(leader) = &self.phase else { return false };
        let stored = |peer: &Peer<S>| match peer {
            Peer::Following(follower) => follower.has_stored_commit(self.commit_lsn),
            Peer::Asked => false,
            Peer::Voted(_) | Peer::Away => true,
        };
        self.finishing && leader.started && leader.wal.end() == self.commit_lsn && self.peers.values().all(stored)
    }

    /// Whether a safekeeper is connected.
    pub fn is_connected(&self, node: NodeId) -> bool {
        !matches!(self.peers.get(&node), None | Some(Peer::Away))
    }

    /// A connection to a safekeeper is there.
    pub fn connected(&mut self, node: NodeId) -> Vec<Action> {
        let mut actions = Vec::new();
        if matches!(self.phase, Phase::Over) || !self.peers.contains_key(&node) {
            return actions;
        }
        self.ask(node, self.vote_term(), &mut actions);
        actions
    }

    /// The term that safekeepers are asked for when their connection comes up.
    fn vote_term(&self) -> VoteTerm {
        match &self.phase {
            Phase::Leader(leader) => VoteTerm::Exactly(leader.term),
            Phase::Campaign { candidate: Some(term), .. } => VoteTerm::Exactly(*term),
            Phase::Campaign { candidate: None, .. } | Phase::Over => VoteTerm::Next,
        }
    }

    /// The connection to a safekeeper is lost.
    pub fn disconnected(&mut self, node: NodeId) -> Vec<Action> {
        let mut actions = Vec::new();
        if let Some(peer) = self.peers.get_mut(&node) {
            *peer = Peer::Away;
        }
        for peer in self.peers.values_mut() {
            if let Peer::Following(follower) = peer {
                follower.forget_fetch_from(node);
            }
        }
        self.pump_all(&mut actions);
        actions
    }

    /// Takes what a safekeeper sent over the current connection.
    pub fn handle(&mut self, from: NodeId, message: AcceptorMessage) -> Vec<Action> {
        let mut actions = Vec::new();
        if matches!(self.phase, Phase::Over) || matches!(self.peers.get(&from), None | Some(Peer::Away)) {
            return actions;
        }
        match message {
            AcceptorMessage::Vote(reply) => self.handle_vote_reply(from, reply, &mut actions),
            AcceptorMessage::Append(reply) => self.handle_append_reply(from, reply, &mut actions),
            AcceptorMessage::Fetched(fetched) => self.handle_fetched(from, fetched, &mut actions),
            AcceptorMessage::FetchRefused { on_behalf_of, remote_consistent_lsn, .. } => {
                self.handle_fetch_refused(from, on_behalf_of, remote_consistent_lsn, &mut actions);
            }
            AcceptorMessage::Refused { term, reason } => self.handle_refused(from, term, reason, &mut actions),
            AcceptorMessage::Failed { reason } => actions.push(Action::Disconnect { to: from, reason }),
            AcceptorMessage::Deleted => {
                self.phase = Phase::Over;
                actions.push(Action::BranchDeleted);
            }
            AcceptorMessage::Goodbye { term, commit_lsn } => self.handle_goodbye(from, term, commit_lsn),
            AcceptorMessage::NewerMembership { generation, membership } => {
                if generation > self.generation() {
                    actions.push(Action::NewerMembership { from, generation, membership });
                }
            }
        }
        actions
    }

    /// Adds WAL at the log's end; each piece must end at the end of a whole record.
    pub fn append(&mut self, pieces: impl IntoIterator<Item = Bytes>) -> Vec<Action> {
        let mut actions = Vec::new();
        let wal = match &mut self.phase {
            Phase::Leader(leader) => &mut leader.wal,
            // It goes out once the new term is won.
            Phase::Campaign { office: Some(office), .. } => &mut office.wal,
            Phase::Campaign { office: None, .. } | Phase::Over => return actions,
        };
        pieces.into_iter().filter(|piece| !piece.is_empty()).for_each(|piece| wal.push(piece));
        self.pump_all(&mut actions);
        actions
    }

    /// Says something to every follower, so that both ends notice a dead connection, and looks after safekeepers left behind
    /// in a higher term. Call about once a second.
    pub fn heartbeat(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        for peer in self.peers.values_mut() {
            if let Peer::Following(follower) = peer {
                follower.owe_heartbeat();
            }
        }
        self.pump_all(&mut actions);
        self.recover_stranded(&mut actions);
        actions
    }

    /// True while a follower of this leader has not been told of everything that is committed. It hears of it with the next WAL,
    /// with a heartbeat, or by [`Proposer::tell_commits`].
    pub fn has_untold_commit(&self) -> bool {
        let lacks =
            |peer: &Peer<S>| matches!(peer, Peer::Following(follower) if !follower.knows_commit(self.commit_lsn));
        matches!(self.phase, Phase::Leader(_)) && self.peers.values().any(lacks)
    }

    /// Tells what is committed to those followers that don't know it even up to `lsn`. Call a moment after [`Action::Committed`],
    /// which mostly has gone out with more WAL by then: a message less for each commit.
    pub fn tell_commits(&mut self, lsn: Lsn) -> Vec<Action> {
        let mut actions = Vec::new();
        let lsn = lsn.min(self.commit_lsn);
        for peer in self.peers.values_mut() {
            if let Peer::Following(follower) = peer
                && !follower.knows_commit(lsn)
            {
                follower.owe_heartbeat();
            }
        }
        self.pump_all(&mut actions);
        actions
    }

    fn ask(&mut self, node: NodeId, term: VoteTerm, actions: &mut Vec<Action>) {
        let ProposerSettings { id, system_identifier, .. } = self.settings;
        let vote = Vote { proposer: id, term, system_identifier, generation: self.generation() };
        self.peers.insert(node, Peer::Asked);
        actions.push(Action::Send { to: node, message: ProposerMessage::Vote(vote) });
    }

    fn fence(&mut self, reason: String, actions: &mut Vec<Action>) {
        self.phase = Phase::Over;
        actions.push(Action::Fenced { reason });
    }
}
