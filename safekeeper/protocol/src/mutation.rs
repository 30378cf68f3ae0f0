//! Rules that can be broken on purpose, one at a time, to show that the model and the simulation notice.
//!
//! Without the feature `mutations`, which only those two enable, nothing can be broken.

/// A rule that is not followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mutation {
    /// Proposer: one safekeeper is enough to commit.
    CommitWithoutMajority,
    /// Proposer: WAL of earlier terms commits before the new term's history is on a majority.
    CommitOldTermsByCounting,
    /// Proposer: safekeepers are chosen for the log's end without regard to the terms in it.
    LongestLogWins,
    /// Proposer: in office, it takes another term although somebody else has written in between.
    ReelectAfterOthers,
    /// Proposer: a vote counts although the voter has lost what it acknowledged.
    CountDoubtfulVotes,
    /// Proposer: while the membership is joint, a majority of the new members is enough to commit.
    CommitWithNewMembersOnly,
    /// Proposer: on a newer membership, acknowledgements from under the older one go on counting.
    KeepOldAcknowledgements,
    /// Acceptor: a newer membership is remembered, but not stored.
    MembershipNotStored,
    /// Control plane: a joint membership is completed before it is established.
    CompleteUnestablished,
    /// Acceptor: a vote is answered before it is stored, and not stored at all.
    VoteNotStored,
    /// Acceptor: an append is acknowledged before it is flushed.
    AcknowledgeUnflushed,
    /// Acceptor: appends of a term that leads no more are taken.
    AppendsOfOldTerms,
    /// Acceptor: a term's history is taken, but what parts from it is not cut off.
    KeepPartedLog,
}

/// Which rule, if any, a state machine breaks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(crate) struct Broken(#[cfg(feature = "mutations")] pub(crate) Option<Mutation>);

impl Broken {
    #[cfg(feature = "mutations")]
    pub(crate) fn is(self, mutation: Mutation) -> bool {
        self.0 == Some(mutation)
    }

    #[cfg(not(feature = "mutations"))]
    pub(crate) fn is(self, _mutation: Mutation) -> bool {
        false
    }
}
