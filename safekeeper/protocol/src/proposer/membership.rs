//! Counting by the branch's membership, and going over to another one.

use types::{Lsn, Member, Membership, MembershipGeneration, NodeId};

use super::{Action, Peer, Phase, Proposer, RecordScanner};
use crate::mutation::Mutation;

impl<S: RecordScanner> Proposer<S> {
    /// Goes over to a newer membership; an older one changes nothing. In office or not: all members are asked again for the term
    /// that goes on, and what they have acknowledged counts once they have said so under this membership. The driver gives up the
    /// connections to those that are members no more, and connects to the new ones.
    pub fn set_membership(&mut self, membership: Membership) -> Vec<Action> {
        let mut actions = Vec::new();
        if membership.generation <= self.generation() || matches!(self.phase, Phase::Over) {
            return actions;
        }
        self.settings.membership = membership;
        self.established = false;
        let membership = &self.settings.membership;
        self.peers.retain(|node, _| membership.contains(*node));
        for member in self.settings.membership.all() {
            self.peers.entry(member.node).or_insert(Peer::Away);
        }
        let term = self.vote_term();
        for node in self.peers.keys().copied().collect::<Vec<_>>() {
            let goes_on = self.breaks(Mutation::KeepOldAcknowledgements)
                && matches!(self.peers.get(&node), Some(Peer::Following(_)));
            if self.is_connected(node) && !goes_on {
                self.ask(node, term, &mut actions);
            }
        }
        actions
    }

    /// The membership by which votes and acknowledgements are counted.
    pub fn membership(&self) -> &Membership {
        &self.settings.membership
    }

    /// True once this proposer has committed under its membership; see [`Action::Established`].
    pub fn is_established(&self) -> bool {
        self.established
    }

    /// Members that do not hold, as far as is known, everything that is committed.
    pub fn lagging(&self) -> Vec<NodeId> {
        let lags = |peer: &Peer<S>| self.held_by(peer) < self.commit_lsn;
        self.peers.iter().filter(|(_, peer)| lags(peer)).map(|(node, _)| *node).collect()
    }

    pub(super) fn generation(&self) -> MembershipGeneration {
        self.settings.membership.generation
    }

    /// The highest position that a majority of each set of members holds under this term's history and this membership.
    pub(super) fn held_by_quorum(&self) -> Lsn {
        let by_majority = |set: &[Member]| {
            let held = |member: &Member| self.peers.get(&member.node).map_or(Lsn::INVALID, |peer| self.held_by(peer));
            let mut held: Vec<Lsn> = set.iter().map(held).collect();
            held.sort_unstable_by(|a, b| b.cmp(a));
            let enough = if self.breaks(Mutation::CommitWithoutMajority) { 1 } else { set.len() / 2 + 1 };
            held.get(enough - 1).copied().unwrap_or_default()
        };
        let new_only = self.settings.membership.is_joint() && self.breaks(Mutation::CommitWithNewMembersOnly);
        let sets = self.settings.membership.sets().skip(usize::from(new_only));
        sets.map(by_majority).min().unwrap_or_default()
    }

    /// Notes that a position at or beyond everything committed before is held by a quorum under this membership.
    pub(super) fn establish(&mut self, actions: &mut Vec<Action>) {
        if !std::mem::replace(&mut self.established, true) {
            actions.push(Action::Established { generation: self.generation() });
        }
    }
}
