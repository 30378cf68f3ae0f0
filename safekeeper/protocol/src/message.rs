//! What proposers, readers and safekeepers say to each other, each message one wire frame.
//!
//! After `wire::Hello`, the side that connects sends one [`Request`], without waiting for the answer. What follows depends
//! on it: a proposer and a safekeeper exchange [`ProposerMessage`]s and [`AcceptorMessage`]s, a reader sends
//! [`ReaderMessage`]s and receives [`ReaderReply`]s, a single question gets one [`Answer`].

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use types::{BranchRef, Lsn, Membership, MembershipGeneration, NodeId, Term};

use crate::history::TermHistory;

/// Most WAL bytes in one [`Append`], [`Fetched`] or [`ReaderReply::Wal`].
pub const MAX_WAL_BYTES_PER_MESSAGE: usize = 1024 * 1024;

/// What a connection is for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    /// The branch that it is about.
    pub branch: BranchRef,
    /// What is wanted.
    pub body: RequestBody,
}

/// See [`Request`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum RequestBody {
    /// [`ProposerMessage`]s follow.
    Propose,
    /// Committed WAL from here on, pushed as it is committed; [`ReaderMessage`]s may follow.
    Read { from: Lsn },
    /// Answered with [`Answer::Status`].
    Status,
    /// Everything up to here is in the object store. Answered with [`Answer::Done`]. Services only.
    Report { remote_consistent_lsn: Lsn },
    /// Remove the branch's WAL; its id is refused from then on. Answered with [`Answer::Done`]. Services only.
    Delete,
    /// The branch's membership, which this safekeeper will tell to others. One that is not joint, and that the safekeeper is not
    /// in, has it drop the branch's WAL. Answered with [`Answer::Status`]. Services only.
    SetMembership { membership: Membership },
    /// Answered with [`Answer::Membership`].
    Membership,
    /// How the safekeeper itself does, whatever the branch. Answered with [`Answer::Node`]. Services only.
    Node,
}

/// The answer to a single question.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Answer {
    /// To [`RequestBody::Status`] and [`RequestBody::SetMembership`].
    Status(BranchStatus),
    /// To [`RequestBody::Membership`]: the newest that this safekeeper has been told of, if any.
    Membership(Option<Membership>),
    /// Done.
    Done,
    /// It could not be done; says why.
    Failed(String),
    /// To [`RequestBody::Node`].
    Node(NodeStatus),
}

/// How a safekeeper does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Which one it is.
    pub node: NodeId,
    /// Why it takes no WAL at present, such as that its disk is full; `None`: it does.
    pub trouble: Option<String>,
    /// Bytes that can still be written to its disk.
    pub free_bytes: u64,
    /// Branches that it has in memory.
    pub loaded_branches: u64,
    /// Where it gives out WAL by Postgres's own protocol; `None`: it does not.
    pub replication: Option<ReplicationAddress>,
}

/// See [`NodeStatus::replication`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicationAddress {
    /// As host:port. An address of no host (`0.0.0.0`, `[::]`): the host where the safekeeper is reached.
    pub address: String,
    /// Only inside TLS.
    pub tls: bool,
}

/// Where a branch stands on one safekeeper.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchStatus {
    /// Highest term it has voted in; zero: it has never heard of the branch.
    pub term: Term,
    /// Term of the last WAL it holds.
    pub last_log_term: Term,
    /// End of what it holds durably: the end of a whole record.
    pub flush_lsn: Lsn,
    /// Up to where it knows a majority to hold the WAL.
    pub commit_lsn: Lsn,
    /// Up to where the object store holds everything, as far as it was told.
    pub remote_consistent_lsn: Lsn,
    /// Start of what it still holds.
    pub log_start_lsn: Lsn,
    /// It has lost WAL that it acknowledged, and not got it back yet ([`VoteReply::doubtful`]).
    pub doubtful: bool,
    /// The highest membership that it has heard of.
    pub generation: MembershipGeneration,
}

/// From a reader.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub enum ReaderMessage {
    /// Everything up to here is in the object store.
    Report { remote_consistent_lsn: Lsn },
}

/// To a reader.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ReaderReply {
    /// WAL from `begin` on, all of it committed. Empty: nothing new, the connection is alive.
    Wal { begin: Lsn, wal: Bytes, commit_lsn: Lsn },
    /// The position that was asked for is below what this safekeeper still holds. The connection is closed.
    Trimmed { log_start_lsn: Lsn },
    /// It can't be read; says why. The connection is closed.
    Failed(String),
    /// The branch's membership, when the safekeeper has been told of one: at first, and whenever it changes. One that has left
    /// has no WAL.
    Membership(Membership),
}

/// One run of a proposer, told apart from all others by chance (128 random bits).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProposerId(pub u128);

impl fmt::Debug for ProposerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// From a proposer to a safekeeper.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ProposerMessage {
    /// Asks for a vote; answered with [`VoteReply`].
    Vote(Vote),
    /// Tells of an election won; answered with [`AppendReply`].
    Elected(Elected),
    /// WAL; answered with [`AppendReply`] once it is durable.
    Append(Append),
    /// Asks for WAL that another safekeeper lacks; answered with [`Fetched`] or [`AcceptorMessage::FetchRefused`].
    Fetch(Fetch),
    /// The proposer ends; answered with [`AcceptorMessage::Goodbye`] once what it says is stored.
    Goodbye(Goodbye),
}

/// Which term a vote is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum VoteTerm {
    /// The safekeeper's next: saves the round trip that asks for its term. When all safekeepers are in the same term, as they
    /// mostly are, their next one is the same too.
    Next,
    /// This one.
    Exactly(Term),
}

/// See [`ProposerMessage::Vote`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Vote {
    /// Who asks.
    pub proposer: ProposerId,
    /// For which term.
    pub term: VoteTerm,
    /// The cluster's identifier (`pg_control`); a safekeeper that knows another one refuses.
    pub system_identifier: Option<u64>,
    /// The membership by which votes are counted. A safekeeper that knows a newer one refuses; else it remembers this one.
    pub generation: MembershipGeneration,
}

/// See [`ProposerMessage::Elected`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Elected {
    /// Who won.
    pub proposer: ProposerId,
    /// The term won.
    pub term: Term,
    /// The winner's history, this term last.
    pub history: TermHistory,
    /// From where this safekeeper will be sent WAL.
    pub start: StreamStart,
    /// The membership that the safekeeper's vote was asked for.
    pub generation: MembershipGeneration,
    /// Where the branch's WAL begins: there never was any before.
    pub branch_start_lsn: Lsn,
}

/// See [`Elected::start`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum StreamStart {
    /// The safekeeper's log is the winner's up to here. What it has beyond goes.
    Continue(Lsn),
    /// The safekeeper's log starts anew here, a committed position: it has nothing, or lacks WAL that only the object store
    /// still holds.
    Restart(Lsn),
}

/// See [`ProposerMessage::Append`].
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Append {
    /// The proposer's term.
    pub term: Term,
    /// Position of the first byte.
    pub begin: Lsn,
    /// The bytes; empty when there is only `commit_lsn` to tell.
    pub wal: Bytes,
    /// The last end of a whole record that the proposer knows of at or below the end of `wal`.
    pub boundary: Lsn,
    /// Up to here a majority holds the WAL.
    pub commit_lsn: Lsn,
    /// Up to here the object store holds everything.
    pub remote_consistent_lsn: Lsn,
    /// The membership by which acknowledgements are counted.
    pub generation: MembershipGeneration,
    /// The cluster's identifier (`pg_control`), once the proposer knows it: a compute reads it only when it has won its term.
    pub system_identifier: Option<u64>,
}

impl fmt::Debug for Append {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Append { term, begin, wal, boundary, commit_lsn, .. } = self;
        write!(f, "Append(term {term}, {begin} +{}, boundary {boundary}, commit {commit_lsn})", wal.len())
    }
}

/// See [`ProposerMessage::Fetch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fetch {
    /// The proposer's term; the safekeeper must have voted for it.
    pub term: Term,
    /// For whom; comes back in the answer.
    pub on_behalf_of: NodeId,
    /// First byte wanted.
    pub begin: Lsn,
    /// End of what is wanted; at most [`MAX_WAL_BYTES_PER_MESSAGE`] from `begin`.
    pub end: Lsn,
}

/// See [`ProposerMessage::Goodbye`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Goodbye {
    /// The proposer's term.
    pub term: Term,
    /// Up to here a majority holds the WAL.
    pub commit_lsn: Lsn,
}

/// From a safekeeper to a proposer.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum AcceptorMessage {
    /// To a [`Vote`].
    Vote(VoteReply),
    /// To an [`Elected`] or [`Append`].
    Append(AppendReply),
    /// To a [`Fetch`].
    Fetched(Fetched),
    /// The WAL asked for is not here any more.
    FetchRefused { on_behalf_of: NodeId, begin: Lsn, remote_consistent_lsn: Lsn },
    /// The safekeeper is in a higher term, or this proposer never won the one it names.
    Refused { term: Term, reason: String },
    /// To what was said under an older membership: the number of the newest that the safekeeper has heard of, and the newest that it
    /// was told of in full, which may be older than that.
    NewerMembership { generation: MembershipGeneration, membership: Option<Membership> },
    /// The safekeeper can't do it now (disk full, damaged file); the connection is closed after this.
    Failed { reason: String },
    /// The branch has been deleted.
    Deleted,
    /// To a [`Goodbye`]: this commit position is stored.
    Goodbye { term: Term, commit_lsn: Lsn },
}

/// See [`AcceptorMessage::Vote`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VoteReply {
    /// True when the vote was granted, in `term`.
    pub granted: bool,
    /// The safekeeper's term now.
    pub term: Term,
    /// Terms of the log that it really has, up to `flush_lsn`.
    pub history: TermHistory,
    /// End of that log; [`Lsn::INVALID`] when it has none.
    pub flush_lsn: Lsn,
    /// Up to where it knows the log to be committed.
    pub commit_lsn: Lsn,
    /// Start of what it still holds.
    pub log_start_lsn: Lsn,
    /// Up to where the object store holds everything, as far as it was told.
    pub remote_consistent_lsn: Lsn,
    /// It has lost WAL that it acknowledged: the vote does not count towards a majority, unless all members have voted.
    pub doubtful: bool,
    /// The membership under which it votes: it never takes anything of an older one again.
    pub generation: MembershipGeneration,
}

/// See [`AcceptorMessage::Append`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AppendReply {
    /// The term whose log this is about.
    pub term: Term,
    /// Whole records up to here are durable.
    pub flush_lsn: Lsn,
    /// Bytes up to here are durable, perhaps of a record that is not whole.
    pub received_lsn: Lsn,
    /// Up to where it knows the log to be committed.
    pub commit_lsn: Lsn,
    /// Up to where the object store holds everything, as far as it was told.
    pub remote_consistent_lsn: Lsn,
    /// The membership under which it acknowledges: it never takes anything of an older one again.
    pub generation: MembershipGeneration,
}

/// See [`AcceptorMessage::Fetched`].
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fetched {
    /// From the [`Fetch`].
    pub on_behalf_of: NodeId,
    /// Position of the first byte.
    pub begin: Lsn,
    /// The bytes, perhaps fewer than were asked for.
    pub wal: Bytes,
}

impl fmt::Debug for Fetched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fetched({} +{} for {:?})", self.begin, self.wal.len(), self.on_behalf_of)
    }
}
