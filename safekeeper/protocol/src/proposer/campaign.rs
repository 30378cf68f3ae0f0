//! Winning a term, and telling safekeepers of it.

use types::{Lsn, Member, NodeId, Term};

use super::{Action, Leadership, Office, Peer, Phase, Proposer, RecordScanner, buffer::WalBuffer, streaming::Follower};
use crate::{
    message::{Elected, ProposerMessage, StreamStart, VoteReply, VoteTerm},
    mutation::Mutation,
};

impl<S: RecordScanner> Proposer<S> {
    /// Asks all connected safekeepers for a term above all that were seen.
    pub fn campaign(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        let Phase::Campaign { candidate, .. } = &mut self.phase else { return actions };
        let seen = self.peers.values().filter_map(voted).map(|reply| reply.term).max();
        let term = Term(seen.max(*candidate).unwrap_or_default().0 + 1);
        *candidate = Some(term);
        let connected: Vec<NodeId> =
            self.peers.iter().filter(|(_, peer)| !matches!(peer, Peer::Away)).map(|(node, _)| *node).collect();
        for node in connected {
            self.ask(node, VoteTerm::Exactly(term), &mut actions);
        }
        actions
    }

    pub(super) fn handle_vote_reply(&mut self, from: NodeId, reply: VoteReply, actions: &mut Vec<Action>) {
        self.horizon = self.horizon.max(reply.remote_consistent_lsn);
        if reply.generation != self.generation() {
            // It votes again under the membership that this proposer is going over to.
            return;
        }
        let (term, log_term) = (reply.term, reply.history.last_term());
        self.peers.insert(from, Peer::Voted(Box::new(reply)));
        if let Some(reason) = self.deposed_by(from, log_term) {
            return self.fence(reason, actions);
        }
        match &mut self.phase {
            Phase::Campaign { .. } => self.count_votes(actions),
            Phase::Leader(leader) if term == leader.term => self.tell_elected(from, actions),
            Phase::Leader(leader) if term < leader.term => {
                let term = leader.term;
                self.ask(from, VoteTerm::Exactly(term), actions);
            }
            Phase::Leader(leader) if !leader.started => {
                // Nothing has been committed in this term: a higher one is taken, so that this safekeeper takes part too.
                self.campaign_from(term);
                actions.push(Action::RetryElection);
            }
            // It voted for a candidate that has not been heard of again. If that one wins after all, the others will tell;
            // if not, see `recover_stranded`.
            Phase::Leader(leader) => {
                if term > leader.stranded_term {
                    (leader.stranded_term, leader.stranded_beats) = (term, 0);
                }
            }
            Phase::Over => {}
        }
    }

    /// Why a log with this last term deposes the proposer in office: somebody else has led since.
    fn deposed_by(&self, node: NodeId, log_term: Term) -> Option<String> {
        if self.breaks(Mutation::ReelectAfterOthers) {
            return None;
        }
        let own = match &self.phase {
            Phase::Leader(leader) if leader.in_office() => leader.term,
            Phase::Campaign { office: Some(office), .. } => office.last_term(),
            Phase::Leader(_) | Phase::Campaign { .. } | Phase::Over => return None,
        };
        (log_term > own).then(|| format!("safekeeper {node} has WAL of term {log_term}, this compute led {own}"))
    }

    /// Back to asking for votes, above this term; a log in office is kept.
    fn campaign_from(&mut self, term: Term) {
        let office = match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Leader(leader) => leader.into_office(),
            Phase::Campaign { office, .. } => office,
            Phase::Over => return,
        };
        self.phase = Phase::Campaign { candidate: Some(term), office };
    }

    /// Looks after safekeepers in a term above the leader's: they voted for a candidate that nobody has heard of since, and
    /// would sit out for as long as this proposer leads. They are asked again, which shows whether anything has happened
    /// there; if not, a term above theirs is taken.
    ///
    /// That is an election like any other, and as safe: the new term starts at the end of the newest log of a majority, and
    /// that log must be one of this proposer's own terms, so that all of it is in the proposer's memory or on safekeepers and
    /// what follows it can be sent on. Had another proposer committed anything in between, one of the majority would have
    /// shown its term.
    pub(super) fn recover_stranded(&mut self, actions: &mut Vec<Action>) {
        let enough_connected = self.settings.membership.is_quorum(|node| self.is_connected(node));
        let Phase::Leader(leader) = &mut self.phase else { return };
        let term = leader.term;
        let is_stranded = |peer: &Peer<S>| voted(peer).is_some_and(|reply| reply.term > term);
        let stranded: Vec<NodeId> =
            self.peers.iter().filter(|(_, peer)| is_stranded(peer)).map(|(node, _)| *node).collect();
        if !leader.started || stranded.is_empty() {
            leader.stranded_beats = 0;
            return;
        }
        leader.stranded_beats += 1;
        if leader.stranded_beats < self.settings.stranded_heartbeats || !enough_connected {
            return stranded.into_iter().for_each(|node| self.ask(node, VoteTerm::Exactly(term), actions));
        }
        self.campaign_from(term);
        actions.extend(self.campaign());
    }

    /// Begins another election in which a safekeeper's log is not looked at, for what it alone has is damaged; true when it did.
    ///
    /// The others must make a majority without it, so that whatever is committed is in one of their logs, and the term that
    /// was won before must not have started: nothing was committed in it.
    pub(super) fn elect_without(&mut self, damaged: NodeId, actions: &mut Vec<Action>) -> bool {
        let Phase::Leader(leader) = &self.phase else { return false };
        if leader.started || leader.in_office() || leader.donor != damaged {
            return false;
        }
        let term = leader.term;
        self.damaged.insert(damaged);
        self.campaign_from(term);
        actions.push(Action::RetryElection);
        true
    }

    fn count_votes(&mut self, actions: &mut Vec<Action>) {
        let Phase::Campaign { candidate, .. } = self.phase else { return };
        let replies: Vec<(NodeId, &VoteReply)> =
            self.peers.iter().filter_map(|(node, peer)| voted(peer).map(|reply| (*node, reply))).collect();
        let Some(highest) = replies.iter().map(|(_, reply)| reply.term).max() else { return };
        let term = candidate.unwrap_or(highest).max(highest);
        if self.settings.membership.sets().all(|set| self.is_elected_by(set, term)) {
            return self.become_leader(term, actions);
        }
        let refused = replies.iter().any(|(_, reply)| !reply.granted && reply.term >= term);
        if !self.settings.membership.is_quorum(|node| replies.iter().any(|(voter, _)| *voter == node)) {
            return;
        }
        if refused {
            return actions.push(Action::RetryElection);
        }
        // Safekeepers were in different terms: those below join the highest.
        let below: Vec<NodeId> = replies.iter().filter(|(_, r)| r.term < term).map(|(node, _)| *node).collect();
        self.campaign_from(term);
        for node in below {
            self.ask(node, VoteTerm::Exactly(term), actions);
        }
    }

    /// Whether a majority of a set of members has voted for this term without doubts, or all of them with: nobody who has more can
    /// be away then.
    fn is_elected_by(&self, set: &[Member], term: Term) -> bool {
        let vote = |node: NodeId| {
            let reply = self.peers.get(&node).and_then(voted)?;
            (reply.granted && reply.term == term && !self.damaged.contains(&node)).then_some(reply)
        };
        let counts = |reply: &VoteReply| !reply.doubtful || self.breaks(Mutation::CountDoubtfulVotes);
        let sure = set.iter().filter(|member| vote(member.node).is_some_and(counts)).count();
        sure > set.len() / 2 || set.iter().all(|member| vote(member.node).is_some())
    }

    fn become_leader(&mut self, term: Term, actions: &mut Vec<Action>) {
        let granted = |peer: &Peer<S>| voted(peer).is_some_and(|reply| reply.granted && reply.term == term);
        let best = self
            .peers
            .iter()
            .filter(|(node, peer)| granted(peer) && !self.damaged.contains(node))
            .filter_map(|(node, peer)| voted(peer).map(|reply| (*node, reply)))
            .max_by_key(|(_, reply)| self.log_rank(reply));
        let Some((donor, reply)) = best else { return };
        let start_lsn = if reply.flush_lsn.is_valid() { reply.flush_lsn } else { self.settings.branch_start_lsn };
        let history = reply.history.clone().without_terms_below(self.horizon).with(term, start_lsn);
        let last_log_term = reply.history.last_term();
        let office = match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Campaign { office, .. } => office,
            Phase::Leader(_) | Phase::Over => None,
        };
        let (wal, earlier_terms) = match office {
            None => (WalBuffer::starting_at(start_lsn), Vec::new()),
            Some(office) if self.continues(&office, last_log_term, start_lsn) => (office.wal, office.terms),
            Some(_) => {
                let reason =
                    format!("the newest log ends in term {last_log_term} at {start_lsn}, not with this compute");
                return self.fence(reason, actions);
            }
        };
        self.phase = Phase::Leader(Leadership {
            term,
            start_lsn,
            history,
            donor,
            wal,
            started: false,
            earlier_terms,
            stranded_beats: 0,
            stranded_term: Term(0),
        });
        // Those that followed in a term of this proposer's that came to nothing: what they hold, they hold under its history.
        let followed: Vec<NodeId> =
            self.peers.iter().filter(|(_, peer)| matches!(peer, Peer::Following(_))).map(|(node, _)| *node).collect();
        for node in followed {
            self.ask(node, VoteTerm::Exactly(term), actions);
        }
        let voters: Vec<(NodeId, VoteReply)> =
            self.peers.iter().filter_map(|(node, peer)| voted(peer).map(|reply| (*node, reply.clone()))).collect();
        for (node, reply) in voters {
            // Those in other terms are asked again, or show that there is a newer one.
            self.handle_vote_reply(node, reply, actions);
        }
    }

    /// True when the newest log is the one of the proposer in office, as far as it goes: of a term in which only this
    /// proposer has written.
    fn continues(&self, office: &Office, last_log_term: Term, end: Lsn) -> bool {
        let in_memory = office.wal.start() <= end && end <= office.wal.end();
        if self.breaks(Mutation::ReelectAfterOthers) {
            return in_memory;
        }
        in_memory && office.terms.contains(&last_log_term)
    }

    /// What makes a log the newest: its last term first, then its length.
    fn log_rank(&self, reply: &VoteReply) -> (Term, Lsn) {
        if self.breaks(Mutation::LongestLogWins) {
            return (Term(0), reply.flush_lsn);
        }
        (reply.history.last_term(), reply.flush_lsn)
    }

    pub(super) fn tell_elected(&mut self, node: NodeId, actions: &mut Vec<Action>) {
        let (Phase::Leader(leader), Some(Peer::Voted(reply))) = (&self.phase, self.peers.get(&node)) else { return };
        let common = leader.history.common_end(leader.wal.end(), &reply.history, reply.flush_lsn);
        let have_from = self.have_wal_from(leader, node);
        let restart = self.restart_lsn();
        let start = match common {
            // What is above the restart position may be committed and must not go, even if nobody who could send what
            // follows is connected now.
            Some(common) if reply.flush_lsn.is_valid() && common >= have_from.min(restart) => {
                StreamStart::Continue(common)
            }
            Some(_) | None => StreamStart::Restart(restart),
        };
        let log_start_lsn = reply.log_start_lsn;
        self.follow(node, start, log_start_lsn, actions);
    }

    /// Tells a safekeeper from where it will be sent WAL, and starts to send it.
    pub(super) fn follow(&mut self, node: NodeId, start: StreamStart, log_start_lsn: Lsn, actions: &mut Vec<Action>) {
        let (begin, log_start_lsn) = match start {
            StreamStart::Continue(lsn) => (lsn, log_start_lsn),
            StreamStart::Restart(lsn) => (lsn, lsn),
        };
        self.send_elected(node, start, actions);
        self.peers.insert(node, Peer::Following(Follower::new(begin, log_start_lsn)));
        self.pump_all(actions);
    }

    pub(super) fn send_elected(&self, node: NodeId, start: StreamStart, actions: &mut Vec<Action>) {
        let Phase::Leader(leader) = &self.phase else { return };
        let (proposer, history, generation) = (self.settings.id, leader.history.clone(), self.generation());
        let branch_start_lsn = self.settings.branch_start_lsn;
        let elected = Elected { proposer, term: leader.term, history, start, generation, branch_start_lsn };
        actions.push(Action::Send { to: node, message: ProposerMessage::Elected(elected) });
    }

    /// From where on somebody but `node` itself has this log.
    fn have_wal_from(&self, leader: &Leadership, node: NodeId) -> Lsn {
        let of_peer = |(peer_node, peer): (&NodeId, &Peer<S>)| match peer {
            Peer::Following(follower) => Some(follower.log_start_lsn),
            Peer::Voted(reply) if *peer_node == leader.donor && reply.flush_lsn.is_valid() => Some(reply.log_start_lsn),
            Peer::Voted(_) | Peer::Asked | Peer::Away => None,
        };
        let others = self.peers.iter().filter(|(peer_node, _)| **peer_node != node).filter_map(of_peer).min();
        others.map_or(leader.wal.start(), |lsn| lsn.min(leader.wal.start()))
    }

    /// Where a safekeeper that lacks WAL which only the object store has starts anew: committed, in the object store, and
    /// not below what the others still hold.
    pub(super) fn restart_lsn(&self) -> Lsn {
        let (committed, known_stored) = match &self.phase {
            // Terms are only forgotten below what the object store holds: whoever forgot them knew more than we may.
            Phase::Leader(leader) => {
                let first = leader.history.entries().first().map_or(Lsn::INVALID, |entry| entry.start_lsn);
                (leader.start_lsn.max(self.commit_lsn), first.max(self.horizon))
            }
            Phase::Campaign { .. } | Phase::Over => (self.commit_lsn, self.horizon),
        };
        known_stored.min(committed).max(self.settings.branch_start_lsn)
    }
}

impl Office {
    fn last_term(&self) -> Term {
        self.terms.last().copied().unwrap_or_default()
    }
}

fn voted<S>(peer: &Peer<S>) -> Option<&VoteReply> {
    match peer {
        Peer::Voted(reply) => Some(reply),
        Peer::Away | Peer::Asked | Peer::Following(_) => None,
    }
}
