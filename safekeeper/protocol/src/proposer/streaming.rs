//! Sending WAL to safekeepers and counting what they hold.

use std::collections::BTreeSet;

use types::{Lsn, MembershipGeneration, NodeId, Term};

use super::{Action, Leadership, Peer, Phase, Proposer, RecordScanner};
use crate::{
    message::{Append, AppendReply, Fetch, Fetched, Goodbye, ProposerMessage, StreamStart},
    mutation::Mutation,
};

/// A safekeeper that has been told of the term.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Follower<S> {
    /// It has confirmed the term's history.
    accepted: bool,
    sent_lsn: Lsn,
    /// Last end of a record sent.
    sent_boundary: Lsn,
    received_lsn: Lsn,
    flush_lsn: Lsn,
    sent_commit_lsn: Lsn,
    /// The commit position that it was told with goodbye.
    sent_goodbye_lsn: Lsn,
    /// The commit position that it has stored, as it answered to goodbye.
    stored_commit_lsn: Lsn,
    owes_heartbeat: bool,
    /// Start of what it holds, as far as known.
    pub(super) log_start_lsn: Lsn,
    /// Whom WAL at `sent_lsn` was asked from on its behalf.
    fetching_from: Option<NodeId>,
    /// Finds records in what is fetched; stands at `sent_lsn`.
    scanner: Option<S>,
    /// Who sent damaged WAL.
    bad_donors: BTreeSet<NodeId>,
    /// Who sent what was fetched since the last end of a record.
    part_from: BTreeSet<NodeId>,
}

/// What every append tells besides WAL.
#[derive(Debug, Clone, Copy)]
struct Told {
    commit_lsn: Lsn,
    remote_consistent_lsn: Lsn,
    generation: MembershipGeneration,
    system_identifier: Option<u64>,
}

impl<S: RecordScanner> Follower<S> {
    pub fn new(begin: Lsn, log_start_lsn: Lsn) -> Follower<S> {
        Follower {
            accepted: false,
            sent_lsn: begin,
            sent_boundary: begin,
            received_lsn: begin,
            flush_lsn: begin,
            sent_commit_lsn: Lsn::INVALID,
            sent_goodbye_lsn: Lsn::INVALID,
            stored_commit_lsn: Lsn::INVALID,
            owes_heartbeat: false,
            log_start_lsn,
            fetching_from: None,
            scanner: None,
            bad_donors: BTreeSet::new(),
            part_from: BTreeSet::new(),
        }
    }

    pub fn forget_fetch_from(&mut self, node: NodeId) {
        if self.fetching_from == Some(node) {
            self.fetching_from = None;
        }
    }

    pub fn owe_heartbeat(&mut self) {
        self.owes_heartbeat = true;
    }

    /// True when it has been told that everything up to here is committed.
    pub fn knows_commit(&self, commit_lsn: Lsn) -> bool {
        self.sent_commit_lsn >= commit_lsn
    }

    /// True when it has said that it has stored this commit position.
    pub fn has_stored_commit(&self, commit_lsn: Lsn) -> bool {
        self.accepted && self.stored_commit_lsn >= commit_lsn
    }

    /// Passes over fetched WAL and moves `sent_boundary` to the last record that ends in it.
    fn scan(&mut self, wal: &[u8]) -> Result<(), String> {
        let boundary = self.scanner.get_or_insert_with(|| S::starting_at(self.sent_lsn)).feed(wal)?;
        self.sent_lsn += wal.len() as u64;
        self.sent_boundary = self.sent_boundary.max(boundary.min(self.sent_lsn));
        Ok(())
    }

    /// What was fetched must end with a whole record where the proposer's own WAL begins: a record that seems to go on there
    /// has a damaged length.
    fn check_whole_at(&self, own_start: Lsn) -> Result<(), String> {
        if self.sent_lsn == own_start && self.sent_boundary < self.sent_lsn {
            return Err(format!("the record at {} does not end at {own_start}", self.sent_boundary));
        }
        Ok(())
    }
}

impl<S: RecordScanner> Proposer<S> {
    pub(super) fn handle_append_reply(&mut self, from: NodeId, reply: AppendReply, actions: &mut Vec<Action>) {
        let Phase::Leader(leader) = &self.phase else { return };
        let Some(Peer::Following(follower)) = self.peers.get_mut(&from) else { return };
        if reply.generation != self.settings.membership.generation {
            // What it holds is said again under the membership that this proposer is going over to.
            return;
        }
        if reply.term < leader.term {
            // To an append from before this proposer was elected again.
            return;
        }
        if reply.term > leader.term {
            let reason = format!("safekeeper {from} went to term {}", reply.term);
            return self.fence(reason, actions);
        }
        if reply.flush_lsn < follower.flush_lsn && !follower.accepted {
            // Sent before it heard from where its log starts anew.
            return;
        }
        if reply.flush_lsn > leader.wal.end() || reply.flush_lsn < follower.flush_lsn {
            let reason = format!("it claims WAL to {}, which can't be", reply.flush_lsn);
            return actions.push(Action::Disconnect { to: from, reason });
        }
        follower.accepted = true;
        follower.flush_lsn = reply.flush_lsn;
        follower.received_lsn = follower.received_lsn.max(reply.received_lsn);
        self.horizon = self.horizon.max(reply.remote_consistent_lsn);
        self.advance_commit(actions);
        self.trim_buffer();
        self.pump_all(actions);
    }

    /// The commit rule: the highest position that a majority of all members (of each set, while the membership is joint) hold under
    /// this term's history and this membership, but nothing below the term's start. An earlier term's WAL on a majority could
    /// still lose to a log with a later term; once the term's own first entry, its history, is there with it, it can't.
    fn advance_commit(&mut self, actions: &mut Vec<Action>) {
        let commit = self.held_by_quorum();
        let lowest = self.lowest_commit();
        let Phase::Leader(leader) = &mut self.phase else { return };
        if commit < lowest || (commit < self.commit_lsn && leader.started) {
            return;
        }
        let (goes_on, moves) = (leader.started, commit > self.commit_lsn);
        if !std::mem::replace(&mut leader.started, true) {
            self.damaged.clear();
            let (term, start_lsn) = (leader.term, leader.start_lsn);
            actions.push(match leader.earlier_terms.is_empty() {
                true => Action::Started { term, start_lsn },
                false => Action::Reelected { term, start_lsn },
            });
        }
        if moves || !goes_on {
            self.commit_lsn = commit;
            actions.push(Action::Committed { lsn: commit });
        }
        self.establish(actions);
    }

    /// The lowest position that this term may commit.
    fn lowest_commit(&self) -> Lsn {
        if self.breaks(Mutation::CommitOldTermsByCounting) {
            return Lsn(1);
        }
        match &self.phase {
            Phase::Leader(leader) => leader.start_lsn,
            Phase::Campaign { .. } | Phase::Over => Lsn::MAX,
        }
    }

    /// What a safekeeper holds durably under this term's history, as it has said under this membership.
    pub(super) fn held_by(&self, peer: &Peer<S>) -> Lsn {
        match peer {
            Peer::Following(follower) if follower.accepted => follower.flush_lsn,
            Peer::Following(_) | Peer::Voted(_) | Peer::Asked | Peer::Away => Lsn::INVALID,
        }
    }

    fn trim_buffer(&mut self) {
        let everyone_has = self.peers.values().map(|peer| self.held_by(peer)).min().unwrap_or_default();
        let everyone_has = everyone_has.min(self.commit_lsn);
        let Phase::Leader(leader) = &mut self.phase else { return };
        leader.wal.trim(everyone_has, self.commit_lsn, self.settings.buffer_bytes);
    }

    pub(super) fn pump_all(&mut self, actions: &mut Vec<Action>) {
        let nodes: Vec<NodeId> = self.peers.keys().copied().collect();
        for node in nodes {
            self.pump(node, actions);
        }
    }

    fn told(&self) -> Told {
        let (generation, system_identifier) = (self.generation(), self.settings.system_identifier);
        Told { commit_lsn: self.commit_lsn, remote_consistent_lsn: self.horizon, generation, system_identifier }
    }

    /// Sends one safekeeper what it lacks and there is room for.
    fn pump(&mut self, node: NodeId, actions: &mut Vec<Action>) {
        let (donor, told) = (self.donor_for(node), self.told());
        let Phase::Leader(leader) = &self.phase else { return };
        let Some(Peer::Following(follower)) = self.peers.get_mut(&node) else { return };
        while follower.sent_lsn < leader.wal.end()
            && follower.sent_lsn.0 < follower.received_lsn.0 + self.settings.window_bytes
        {
            if follower.sent_lsn < leader.wal.start() {
                if let (None, Some(donor)) = (follower.fetching_from, donor) {
                    if follower.scanner.is_none() {
                        // A record may have been sent in part from memory: it is found from its start.
                        follower.sent_lsn = follower.sent_boundary;
                    }
                    follower.fetching_from = Some(donor);
                    let message =
                        ProposerMessage::Fetch(fetch_for(node, follower, leader, self.settings.message_bytes));
                    actions.push(Action::Send { to: donor, message });
                }
                break;
            }
            let part = leader.wal.read(follower.sent_lsn, self.settings.message_bytes);
            let begin = follower.sent_lsn;
            follower.sent_lsn += part.wal.len() as u64;
            follower.sent_boundary = follower.sent_boundary.max(part.boundary);
            actions.push(append(node, leader, follower, begin, part.wal, told));
        }
        if follower.owes_heartbeat || (self.finishing && !follower.knows_commit(self.commit_lsn)) {
            let begin = follower.sent_lsn;
            actions.push(append(node, leader, follower, begin, Default::default(), told));
        }
        let has_all = leader.started && self.commit_lsn == leader.wal.end() && follower.flush_lsn >= self.commit_lsn;
        if self.finishing && has_all && follower.accepted && follower.sent_goodbye_lsn < self.commit_lsn {
            follower.sent_goodbye_lsn = self.commit_lsn;
            let goodbye = Goodbye { term: leader.term, commit_lsn: self.commit_lsn };
            actions.push(Action::Send { to: node, message: ProposerMessage::Goodbye(goodbye) });
        }
    }

    pub(super) fn handle_goodbye(&mut self, from: NodeId, term: Term, commit_lsn: Lsn) {
        if let (Phase::Leader(leader), Some(Peer::Following(follower))) = (&self.phase, self.peers.get_mut(&from))
            && term == leader.term
        {
            follower.stored_commit_lsn = commit_lsn;
        }
    }

    /// Who can give `node` the WAL that it is to be sent next.
    fn donor_for(&self, node: NodeId) -> Option<NodeId> {
        let (Phase::Leader(leader), Some(Peer::Following(lagging))) = (&self.phase, self.peers.get(&node)) else {
            return None;
        };
        let has = |candidate: &NodeId| match self.peers.get(candidate) {
            Some(Peer::Following(f)) => {
                // Fetching goes on at the record that was sent in part.
                let begin = if lagging.scanner.is_some() { lagging.sent_lsn } else { lagging.sent_boundary };
                let apart = *candidate != node && !lagging.bad_donors.contains(candidate);
                apart && f.flush_lsn > begin && f.log_start_lsn <= begin
            }
            Some(Peer::Voted(_) | Peer::Asked | Peer::Away) | None => false,
        };
        std::iter::once(&leader.donor).chain(self.peers.keys()).find(|candidate| has(candidate)).copied()
    }

    pub(super) fn handle_fetched(&mut self, from: NodeId, fetched: Fetched, actions: &mut Vec<Action>) {
        let told = self.told();
        let Phase::Leader(leader) = &self.phase else { return };
        let node = fetched.on_behalf_of;
        let Some(Peer::Following(follower)) = self.peers.get_mut(&node) else { return };
        if follower.fetching_from != Some(from) || follower.sent_lsn != fetched.begin {
            return;
        }
        follower.fetching_from = None;
        let room = leader.wal.start().checked_sub(fetched.begin).unwrap_or_default() as usize;
        let wal = fetched.wal.slice(..fetched.wal.len().min(room));
        let begin = follower.sent_lsn;
        follower.part_from.insert(from);
        let boundary = follower.sent_boundary;
        let scanned = follower.scan(&wal).and_then(|()| follower.check_whole_at(leader.wal.start()));
        if let Err(reason) = scanned {
            let bad_donor = (follower.part_from.len() == 1).then_some(from);
            if let Some(donor) = bad_donor {
                actions.push(Action::Damaged { donor, on_behalf_of: node, reason });
            }
            return self.refill(node, bad_donor, actions);
        }
        if follower.sent_boundary > boundary {
            follower.part_from = BTreeSet::from([from]);
        }
        if follower.sent_lsn == leader.wal.start() {
            follower.scanner = None;
        }
        actions.push(append(node, leader, follower, begin, wal, told));
        self.pump(node, actions);
    }

    /// Has a safekeeper drop the record that it has in part, perhaps in damaged part, and asks somebody else for it; when there
    /// is nobody, its log starts anew at what the object store has. Nobody is blamed (`bad_donor`) for a record that came from
    /// several.
    fn refill(&mut self, node: NodeId, bad_donor: Option<NodeId>, actions: &mut Vec<Action>) {
        let Some(Peer::Following(follower)) = self.peers.get(&node) else { return };
        let (boundary, log_start_lsn) = (follower.sent_boundary, follower.log_start_lsn);
        let bad_donors = follower.bad_donors.iter().copied().chain(bad_donor).collect();
        let follower = Follower { bad_donors, ..Follower::new(boundary, log_start_lsn) };
        self.peers.insert(node, Peer::Following(follower));
        let restart = self.restart_lsn();
        let nobody_has_it = self.donor_for(node).is_none();
        if nobody_has_it && restart > boundary {
            // Nobody here has it undamaged, but the object store does.
            return self.follow(node, StreamStart::Restart(restart), restart, actions);
        }
        if nobody_has_it
            && let Some(donor) = bad_donor
            && self.elect_without(donor, actions)
        {
            return;
        }
        self.send_elected(node, StreamStart::Continue(boundary), actions);
        self.pump(node, actions);
    }

    pub(super) fn handle_fetch_refused(
        &mut self,
        from: NodeId,
        on_behalf_of: NodeId,
        remote_consistent_lsn: Lsn,
        actions: &mut Vec<Action>,
    ) {
        self.horizon = self.horizon.max(remote_consistent_lsn);
        let restart = self.restart_lsn();
        if let Some(Peer::Following(donor)) = self.peers.get_mut(&from) {
            donor.log_start_lsn = donor.log_start_lsn.max(restart.segment_start());
        }
        let Some(Peer::Following(follower)) = self.peers.get_mut(&on_behalf_of) else { return };
        if follower.fetching_from != Some(from) {
            return;
        }
        follower.fetching_from = None;
        if restart > follower.sent_lsn {
            self.follow(on_behalf_of, StreamStart::Restart(restart), restart, actions);
        }
    }

    pub(super) fn handle_refused(&mut self, from: NodeId, term: Term, reason: String, actions: &mut Vec<Action>) {
        match &self.phase {
            Phase::Leader(leader) if term > leader.term => {
                let fenced = format!("safekeeper {from} is in term {term}, this compute in {}: {reason}", leader.term);
                self.fence(fenced, actions);
            }
            Phase::Leader(_) | Phase::Campaign { .. } => actions.push(Action::Disconnect { to: from, reason }),
            Phase::Over => {}
        }
    }
}

fn fetch_for<S>(node: NodeId, follower: &Follower<S>, leader: &Leadership, max_bytes: usize) -> Fetch {
    let end = leader.wal.start().min(follower.sent_lsn + max_bytes as u64);
    Fetch { term: leader.term, on_behalf_of: node, begin: follower.sent_lsn, end }
}

fn append<S>(
    to: NodeId,
    leader: &Leadership,
    follower: &mut Follower<S>,
    begin: Lsn,
    wal: bytes::Bytes,
    told: Told,
) -> Action {
    let Told { commit_lsn, remote_consistent_lsn, generation, system_identifier } = told;
    follower.sent_commit_lsn = commit_lsn;
    follower.owes_heartbeat = false;
    let boundary = follower.sent_boundary;
    let append = Append {
        term: leader.term,
        begin,
        wal,
        boundary,
        commit_lsn,
        remote_consistent_lsn,
        generation,
        system_identifier,
    };
    Action::Send { to, message: ProposerMessage::Append(append) }
}
