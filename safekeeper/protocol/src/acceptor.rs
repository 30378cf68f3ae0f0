//! A safekeeper's side of the consensus, for one branch.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use types::{Lsn, Membership, MembershipGeneration, NodeId, Term};

use crate::{
    history::TermHistory,
    message::{
        AcceptorMessage, Append, AppendReply, BranchStatus, Elected, Fetch, Goodbye, MAX_WAL_BYTES_PER_MESSAGE,
        ProposerId, ProposerMessage, StreamStart, Vote, VoteReply, VoteTerm,
    },
    mutation::{Broken, Mutation},
};

/// How far `flush_lsn` may run ahead of the persisted one: what a restart has to decode to find the log's end.
const PERSIST_EVERY_BYTES: u64 = 16 * 1024 * 1024;

/// Votes, keeps WAL and acknowledges it.
///
/// Contract: the driver performs the effects of one call in order before it makes the next call, each durable before the
/// one behind it. If one fails, this value no longer describes the disk: drop it and recover from what is stored.
/// [`Acceptor::end_batch`] must follow any number of messages before the driver goes idle; it holds the one flush that
/// acknowledges all of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Acceptor {
    state: AcceptorState,
    /// `state.flush_lsn` as last persisted.
    persisted_flush_lsn: Lsn,
    /// `state.commit_lsn` as last persisted.
    persisted_commit_lsn: Lsn,
    /// End of the bytes written, durable or not.
    write_lsn: Lsn,
    /// Last end of a whole record at or below `write_lsn`.
    boundary: Lsn,
    /// The proposer's commit position, perhaps beyond what is here.
    leader_commit_lsn: Lsn,
    /// The proposer that leads here has told it since this value was made.
    commit_told: bool,
    /// True when bytes were written since the last flush.
    unflushed: bool,
    /// Who waits for an acknowledgement.
    to_acknowledge: Vec<ConnectionId>,
    /// Who said goodbye and waits for the answer.
    leaving: Vec<ConnectionId>,
    /// A proposer's connection has ended since the last batch.
    proposer_gone: bool,
    broken: Broken,
}

/// A connection, numbered by the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// What a safekeeper must remember of a branch besides its WAL.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AcceptorState {
    /// Highest term voted in.
    pub term: Term,
    /// Who got the vote of `term`.
    pub voted_for: Option<ProposerId>,
    /// The log's terms; may name some that start beyond `flush_lsn`.
    pub history: TermHistory,
    /// The cluster's identifier, once a proposer has named it.
    pub system_identifier: Option<u64>,
    /// Start of the WAL that is kept.
    pub log_start_lsn: Lsn,
    /// End of the durable WAL, always the end of a whole record. In stored state: a lower bound; the log's true end is
    /// found by decoding from here.
    pub flush_lsn: Lsn,
    /// Up to here a majority is known to hold the WAL; never beyond `flush_lsn`.
    pub commit_lsn: Lsn,
    /// Up to here the object store holds everything, as layers or as WAL; may be beyond `flush_lsn`.
    pub remote_consistent_lsn: Lsn,
    /// WAL that was acknowledged is missing: a restart found less than there was. Such a safekeeper's votes don't count
    /// until it has everything that a leader knows to be committed.
    pub doubtful: bool,
    /// The highest membership heard of: nothing of an older one is taken.
    pub generation: MembershipGeneration,
    /// The newest membership that a service has told of in full.
    pub membership: Option<Membership>,
    /// Up to here the pageserver has everything in its layers, and no replication slot needs the WAL: nobody will ask for it. Never
    /// beyond `remote_consistent_lsn`; what lies between the two is in the object store as WAL.
    pub pageserver_lsn: Lsn,
    /// Where the branch's WAL begins, once a proposer has named it; else [`Lsn::INVALID`].
    pub branch_start_lsn: Lsn,
}

/// What the driver must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Make this state durable.
    Persist(Box<AcceptorState>),
    /// Remove all WAL bytes from here on, durably.
    TruncateWal { at: Lsn },
    /// WAL below here may be removed; a file that also holds later bytes stays.
    DropWalBelow { lsn: Lsn },
    /// Write WAL; durable only after [`Effect::FlushWal`].
    WriteWal { at: Lsn, wal: Bytes },
    /// Make all written WAL durable.
    FlushWal,
    /// Read durable WAL and send it as [`crate::message::Fetched`].
    SendWal { to: ConnectionId, fetch: Fetch },
    /// Send a message.
    Reply { to: ConnectionId, message: AcceptorMessage },
}

impl Acceptor {
    /// A branch that this safekeeper knows nothing of (`AcceptorState::default()`), or one recovered from disk:
    /// `state.flush_lsn` is then the log's true end, and no byte follows it.
    pub fn new(state: AcceptorState) -> Acceptor {
        let end = state.flush_lsn;
        Acceptor {
            persisted_flush_lsn: end,
            persisted_commit_lsn: state.commit_lsn,
            write_lsn: end,
            boundary: end,
            leader_commit_lsn: state.commit_lsn,
            commit_told: false,
            unflushed: false,
            to_acknowledge: Vec::new(),
            leaving: Vec::new(),
            proposer_gone: false,
            broken: Broken::default(),
            state,
        }
    }

    /// Breaks a rule from now on.
    #[cfg(feature = "mutations")]
    pub fn with_mutation(mut self, mutation: Option<Mutation>) -> Acceptor {
        self.broken = Broken(mutation);
        self
    }

    fn breaks(&self, rule: Mutation) -> bool {
        self.broken.is(rule)
    }

    /// What is remembered now.
    pub fn state(&self) -> &AcceptorState {
        &self.state
    }

    /// The state in short.
    pub fn status(&self) -> BranchStatus {
        let s = &self.state;
        BranchStatus {
            term: s.term,
            last_log_term: s.history.up_to(s.flush_lsn).last_term(),
            flush_lsn: s.flush_lsn,
            commit_lsn: s.commit_lsn,
            remote_consistent_lsn: s.remote_consistent_lsn,
            log_start_lsn: s.log_start_lsn,
            doubtful: s.doubtful,
            generation: s.generation,
        }
    }

    /// Takes a proposer's message.
    pub fn handle(&mut self, from: ConnectionId, message: ProposerMessage) -> Vec<Effect> {
        match message {
            ProposerMessage::Vote(vote) => self.handle_vote(from, vote),
            ProposerMessage::Elected(elected) => self.handle_elected(from, elected),
            ProposerMessage::Append(append) => self.handle_append(from, append),
            ProposerMessage::Fetch(fetch) => self.handle_fetch(from, fetch),
            ProposerMessage::Goodbye(goodbye) => self.handle_goodbye(from, goodbye),
        }
    }

    /// Notes that a proposer's connection has ended: nobody may tell this safekeeper the commit position again for long, so
    /// that [`Acceptor::end_batch`] stores it.
    pub fn proposer_gone(&mut self) {
        self.proposer_gone = true;
    }

    /// Flushes and acknowledges all appends since the last call.
    pub fn end_batch(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.flush(&mut effects);
        let is_sure_again = self.state.doubtful && self.has_all_committed();
        self.state.doubtful &= !is_sure_again;
        let left = std::mem::take(&mut self.proposer_gone) || !self.leaving.is_empty();
        if is_sure_again
            || self.state.flush_lsn.0 >= self.persisted_flush_lsn.0 + PERSIST_EVERY_BYTES
            || (left && self.state.commit_lsn > self.persisted_commit_lsn)
        {
            self.persist(&mut effects);
        }
        for to in std::mem::take(&mut self.to_acknowledge) {
            effects.push(Effect::Reply { to, message: AcceptorMessage::Append(self.append_reply()) });
        }
        let (term, commit_lsn) = (self.state.history.last_term(), self.state.commit_lsn);
        for to in std::mem::take(&mut self.leaving) {
            effects.push(Effect::Reply { to, message: AcceptorMessage::Goodbye { term, commit_lsn } });
        }
        effects
    }

    /// Notes that the pageserver has everything up to `lsn` in the object store, and that nobody will ask for WAL below.
    pub fn handle_report(&mut self, lsn: Lsn) {
        self.state.pageserver_lsn = self.state.pageserver_lsn.max(lsn);
        self.handle_offloaded(lsn);
    }

    /// Notes that the object store holds everything up to `lsn`, though perhaps only as WAL.
    pub fn handle_offloaded(&mut self, lsn: Lsn) {
        self.state.remote_consistent_lsn = self.state.remote_consistent_lsn.max(lsn);
    }

    /// Takes the branch's membership from the control plane, which stores each before it tells of it; `own` is this safekeeper's
    /// number. An older one than is known changes nothing. One that this safekeeper is not in, and that is not joint, is only
    /// made when others have everything committed: the log goes. What this safekeeper must never forget stays, its term and its
    /// membership. Call between batches.
    pub fn set_membership(&mut self, own: NodeId, membership: Membership) -> Vec<Effect> {
        let mut effects = Vec::new();
        let known = self.state.membership.as_ref().map(|known| known.generation);
        if membership.generation < self.state.generation || known >= Some(membership.generation) {
            return effects;
        }
        let leaves = !membership.is_joint() && !membership.contains(own);
        self.state.generation = membership.generation;
        self.state.membership = Some(membership);
        if leaves {
            self.forget_log();
        }
        self.persist(&mut effects);
        if leaves {
            effects.push(Effect::TruncateWal { at: Lsn::INVALID });
        }
        effects
    }

    /// As if there had never been a log.
    fn forget_log(&mut self) {
        let s = &mut self.state;
        s.history = TermHistory::default();
        (s.log_start_lsn, s.flush_lsn, s.commit_lsn) = (Lsn::INVALID, Lsn::INVALID, Lsn::INVALID);
        s.doubtful = false;
        (self.write_lsn, self.boundary, self.leader_commit_lsn) = (Lsn::INVALID, Lsn::INVALID, Lsn::INVALID);
        (self.commit_told, self.unflushed) = (false, false);
        self.to_acknowledge.clear();
    }

    /// Drops WAL that the object store holds, in whole segments of this size while the branch is in use (`idle` false), else
    /// all of it if nothing else is left. While it is in use, the last `keep_bytes` of what the pageserver does not have yet stay: it
    /// will ask for them soon. Call between batches.
    pub fn trim(&mut self, idle: bool, segment_bytes: u64, keep_bytes: u64) -> Vec<Effect> {
        let s = &self.state;
        let stored = match idle {
            true => s.remote_consistent_lsn,
            false => s.pageserver_lsn.max(Lsn(s.remote_consistent_lsn.0.saturating_sub(keep_bytes))),
        };
        let safe = stored.min(s.commit_lsn);
        let all = idle && safe == s.flush_lsn && self.write_lsn == s.flush_lsn;
        let keep_from = if all { safe } else { Lsn(safe.0 - safe.0 % segment_bytes) };
        if keep_from <= s.log_start_lsn {
            return Vec::new();
        }
        self.state.log_start_lsn = keep_from;
        let mut effects = Vec::new();
        self.persist(&mut effects);
        effects.push(Effect::DropWalBelow { lsn: keep_from });
        effects
    }

    /// True when there is no WAL here, durable or not, and nobody waits for anything.
    pub fn holds_nothing(&self) -> bool {
        let s = &self.state;
        s.log_start_lsn == s.flush_lsn && self.write_lsn == s.flush_lsn && self.to_acknowledge.is_empty()
    }

    /// The state as it should be stored before the branch is forgotten in memory, if that differs from what is stored.
    pub fn persist_before_idle(&mut self, stored: &AcceptorState) -> Vec<Effect> {
        let mut effects = Vec::new();
        if *stored != self.state && self.state.term != Term(0) {
            self.persist(&mut effects);
        }
        effects
    }

    fn handle_vote(&mut self, from: ConnectionId, vote: Vote) -> Vec<Effect> {
        let mut effects = Vec::new();
        if let Some(refusal) = self.other_system(from, vote.system_identifier) {
            return vec![refusal];
        }
        if let Some(newer) = self.newer_membership(from, vote.generation) {
            return vec![newer];
        }
        let moves_on = vote.generation > self.state.generation;
        self.state.generation = self.state.generation.max(vote.generation);
        let granted = self.grants(&vote);
        let mut voted = false;
        if let Some(term) = granted {
            // The log must not change any more once its end has been told.
            self.flush(&mut effects);
            self.drop_partial_record(&mut effects);
            if term != self.state.term || self.state.voted_for != Some(vote.proposer) {
                self.state.term = term;
                self.state.voted_for = Some(vote.proposer);
                self.state.system_identifier = self.state.system_identifier.or(vote.system_identifier);
                self.leader_commit_lsn = self.state.commit_lsn;
                self.commit_told = false;
                voted = true;
            }
        }
        if moves_on || (voted && !self.breaks(Mutation::VoteNotStored)) {
            self.persist(&mut effects);
        }
        let s = &self.state;
        let reply = VoteReply {
            granted: granted.is_some(),
            term: s.term,
            history: s.history.up_to(s.flush_lsn),
            flush_lsn: s.flush_lsn,
            commit_lsn: s.commit_lsn,
            log_start_lsn: s.log_start_lsn,
            remote_consistent_lsn: s.remote_consistent_lsn,
            doubtful: s.doubtful,
            generation: s.generation,
        };
        effects.push(Effect::Reply { to: from, message: AcceptorMessage::Vote(reply) });
        effects
    }

    /// The term in which the vote is granted: one proposer per term, terms grow. A vote may be given again to who has it, but not
    /// once the term's winner has been heard of: that may be somebody else, by the votes of members that have gone since.
    fn grants(&self, vote: &Vote) -> Option<Term> {
        let mine = self.state.voted_for == Some(vote.proposer);
        let is_open = self.state.history.last_term() < self.state.term;
        match vote.term {
            VoteTerm::Next => Some(Term(self.state.term.0 + 1)),
            VoteTerm::Exactly(term) if term > self.state.term => Some(term),
            VoteTerm::Exactly(term) => (term == self.state.term && mine && is_open).then_some(term),
        }
    }

    /// The answer to what is said under an older membership than this safekeeper knows; `None` when it is not older.
    fn newer_membership(&self, to: ConnectionId, theirs: MembershipGeneration) -> Option<Effect> {
        let AcceptorState { generation, membership, .. } = &self.state;
        let message = AcceptorMessage::NewerMembership { generation: *generation, membership: membership.clone() };
        (theirs < *generation).then_some(Effect::Reply { to, message })
    }

    /// The refusal of what is said under another membership than the vote was asked for.
    fn other_membership(&self, to: ConnectionId, theirs: MembershipGeneration) -> Option<Effect> {
        let own = self.state.generation;
        let refusal = || self.refuse(to, format!("membership {theirs} is not known here, {own} is"));
        self.newer_membership(to, theirs).or_else(|| (theirs > own).then(refusal))
    }

    /// The refusal of a proposer whose WAL is of another cluster.
    fn other_system(&self, to: ConnectionId, theirs: Option<u64>) -> Option<Effect> {
        let (known, named) = self.state.system_identifier.zip(theirs).filter(|(known, named)| known != named)?;
        Some(self.refuse(to, format!("the branch's WAL is of system {known}, the proposer's of system {named}")))
    }

    fn handle_elected(&mut self, from: ConnectionId, elected: Elected) -> Vec<Effect> {
        let mut effects = Vec::new();
        // Whoever got this safekeeper's vote: a term has one winner, and the log has not changed since the term began.
        if elected.term != self.state.term {
            return vec![self.refuse(from, format!("term {} is not the one of this safekeeper", elected.term))];
        }
        if let Some(refusal) = self.other_membership(from, elected.generation) {
            return vec![refusal];
        }
        if let Err(error) = elected.history.check() {
            return vec![Effect::Reply { to: from, message: AcceptorMessage::Failed { reason: error.to_string() } }];
        }
        if elected.history.last_term() != elected.term {
            return vec![self.refuse(from, "the history does not end with the term".to_owned())];
        }
        if !self.state.branch_start_lsn.is_valid() {
            self.state.branch_start_lsn = elected.branch_start_lsn;
        }
        let known = self.state.history.last_term() == elected.term;
        let own = self.state.history.up_to(self.state.flush_lsn);
        let common = elected.history.common_end(Lsn::MAX, &own, self.state.flush_lsn);
        match elected.start {
            StreamStart::Continue(start) if !known => {
                if start < self.state.commit_lsn || common != Some(start) || !start.is_valid() {
                    return vec![self.refuse(from, format!("can't continue the log at {start}"))];
                }
                self.truncate(start, &mut effects);
                self.state.history = elected.history;
                self.persist(&mut effects);
            }
            StreamStart::Restart(start) if !known || start > self.state.flush_lsn => {
                // What the two logs share may be committed: a restart can only go beyond it.
                if start < self.state.commit_lsn || common > Some(start) || !start.is_valid() {
                    return vec![self.refuse(from, format!("can't restart the log at {start}"))];
                }
                self.restart(start, elected.history, &mut effects);
            }
            // Said again on another connection. The log is this term's already: nothing in it may go.
            StreamStart::Continue(_) | StreamStart::Restart(_) => {
                self.flush(&mut effects);
                self.drop_partial_record(&mut effects);
            }
        }
        effects.push(Effect::Reply { to: from, message: AcceptorMessage::Append(self.append_reply()) });
        effects
    }

    fn handle_append(&mut self, from: ConnectionId, append: Append) -> Vec<Effect> {
        let s = &self.state;
        let leads = append.term == s.term || self.breaks(Mutation::AppendsOfOldTerms);
        if !leads || s.history.last_term() != append.term {
            return vec![self.refuse(from, format!("term {} does not lead here", append.term))];
        }
        if let Some(refusal) = self.other_membership(from, append.generation) {
            return vec![refusal];
        }
        if let Some(refusal) = self.other_system(from, append.system_identifier) {
            return vec![refusal];
        }
        let end = append.begin + append.wal.len() as u64;
        let new_end = end.max(self.write_lsn);
        if append.begin > self.write_lsn || append.boundary > new_end {
            let reason = format!("WAL from {} does not follow on {}", append.begin, self.write_lsn);
            return vec![Effect::Reply { to: from, message: AcceptorMessage::Failed { reason } }];
        }
        let mut effects = Vec::new();
        if end > self.write_lsn {
            // Within a term the same position always has the same bytes: what is here already is skipped.
            let known = (self.write_lsn.0 - append.begin.0) as usize;
            effects.push(Effect::WriteWal { at: self.write_lsn, wal: append.wal.slice(known..) });
            self.write_lsn = end;
            self.unflushed = true;
        }
        // Stored with what is next: until then, it may have to be told again.
        self.state.system_identifier = self.state.system_identifier.or(append.system_identifier);
        self.boundary = self.boundary.max(append.boundary);
        self.leader_commit_lsn = self.leader_commit_lsn.max(append.commit_lsn);
        self.commit_told = true;
        self.state.remote_consistent_lsn = self.state.remote_consistent_lsn.max(append.remote_consistent_lsn);
        if !self.to_acknowledge.contains(&from) {
            self.to_acknowledge.push(from);
        }
        effects
    }

    fn handle_goodbye(&mut self, from: ConnectionId, goodbye: Goodbye) -> Vec<Effect> {
        let s = &self.state;
        if goodbye.term != s.term || s.history.last_term() != goodbye.term {
            return vec![self.refuse(from, format!("term {} does not lead here", goodbye.term))];
        }
        self.leader_commit_lsn = self.leader_commit_lsn.max(goodbye.commit_lsn);
        self.leaving.push(from);
        Vec::new()
    }

    fn handle_fetch(&mut self, from: ConnectionId, fetch: Fetch) -> Vec<Effect> {
        let s = &self.state;
        if fetch.term != s.term {
            return vec![self.refuse(from, format!("term {} does not lead here", fetch.term))];
        }
        let Fetch { on_behalf_of, begin, .. } = fetch;
        if begin < s.log_start_lsn {
            let remote_consistent_lsn = s.remote_consistent_lsn;
            let message = AcceptorMessage::FetchRefused { on_behalf_of, begin, remote_consistent_lsn };
            return vec![Effect::Reply { to: from, message }];
        }
        let end = fetch.end.min(s.flush_lsn).min(begin + MAX_WAL_BYTES_PER_MESSAGE as u64);
        if begin >= end {
            let reason = format!("WAL from {begin} was asked for, it ends at {}", s.flush_lsn);
            return vec![Effect::Reply { to: from, message: AcceptorMessage::Failed { reason } }];
        }
        vec![Effect::SendWal { to: from, fetch: Fetch { end, ..fetch } }]
    }

    fn refuse(&self, to: ConnectionId, reason: String) -> Effect {
        Effect::Reply { to, message: AcceptorMessage::Refused { term: self.state.term, reason } }
    }

    fn append_reply(&self) -> AppendReply {
        AppendReply {
            // Not the term of a vote given since: that one's log is not here yet.
            term: self.state.history.last_term(),
            flush_lsn: self.state.flush_lsn,
            received_lsn: self.write_lsn,
            commit_lsn: self.state.commit_lsn,
            remote_consistent_lsn: self.state.remote_consistent_lsn,
            generation: self.state.generation,
        }
    }

    fn persist(&mut self, effects: &mut Vec<Effect>) {
        self.persisted_flush_lsn = self.state.flush_lsn;
        self.persisted_commit_lsn = self.state.commit_lsn;
        let mut state = self.state.clone();
        if self.breaks(Mutation::MembershipNotStored) {
            (state.generation, state.membership) = (MembershipGeneration::FIRST, None);
        }
        effects.push(Effect::Persist(Box::new(state)));
    }

    fn flush(&mut self, effects: &mut Vec<Effect>) {
        if std::mem::take(&mut self.unflushed) && !self.breaks(Mutation::AcknowledgeUnflushed) {
            effects.push(Effect::FlushWal);
        }
        self.state.flush_lsn = self.boundary;
        self.state.commit_lsn = self.state.commit_lsn.max(self.leader_commit_lsn.min(self.state.flush_lsn));
    }

    /// True when this log is the leader's, has reached its term, and holds all that the leader has told to be committed: what was
    /// committed with this safekeeper's help before it was restarted is among that, for the leader knew it when it told.
    fn has_all_committed(&self) -> bool {
        let s = &self.state;
        let leader = s.history.entries().last().filter(|entry| entry.term == s.term);
        self.commit_told
            && leader.is_some_and(|entry| s.flush_lsn >= entry.start_lsn && s.flush_lsn >= self.leader_commit_lsn)
    }

    /// Removes bytes behind the last whole record, so that nothing but this term's WAL can ever be found there.
    fn drop_partial_record(&mut self, effects: &mut Vec<Effect>) {
        if self.write_lsn > self.state.flush_lsn {
            self.write_lsn = self.state.flush_lsn;
            effects.push(Effect::TruncateWal { at: self.write_lsn });
        }
    }

    /// Shortens the log. The lower end is stored first: a crash in between leaves the old log under the old history.
    fn truncate(&mut self, at: Lsn, effects: &mut Vec<Effect>) {
        if at < self.write_lsn && !self.breaks(Mutation::KeepPartedLog) {
            self.state.flush_lsn = at;
            self.persist(effects);
            effects.push(Effect::TruncateWal { at });
            self.write_lsn = at;
            self.boundary = at;
        }
    }

    /// Starts the log anew at a committed position. What the log has from there on was never committed, and goes first;
    /// then one write of the state moves it over, so that no crash shows a log that has forgotten something committed.
    fn restart(&mut self, at: Lsn, history: TermHistory, effects: &mut Vec<Effect>) {
        self.flush(effects);
        self.drop_partial_record(effects);
        self.truncate(at.min(self.write_lsn), effects);
        self.write_lsn = at;
        self.boundary = at;
        self.state.flush_lsn = at;
        self.state.commit_lsn = at;
        self.state.log_start_lsn = at;
        self.leader_commit_lsn = self.leader_commit_lsn.max(at);
        self.state.history = history;
        self.persist(effects);
        effects.push(Effect::DropWalBelow { lsn: at });
    }
}
