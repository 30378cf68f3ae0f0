//! The control plane: it stores which safekeepers a branch has, and changes that while everything else goes on.

use std::collections::BTreeMap;

use safekeeper_protocol::{Acceptor, Mutation, ProposerId};
use types::{Member, Membership, MembershipGeneration, NodeId};

use crate::{Disk, SimError, World, world::Node};

/// Most members of a set.
const MOST_MEMBERS: usize = 5;

/// What it has stored.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    /// All memberships so far; the last one counts.
    stored: Vec<Membership>,
    /// The last one is joint, and some proposer has committed under it.
    established: bool,
}

pub(crate) fn members(nodes: impl IntoIterator<Item = NodeId>) -> Vec<Member> {
    nodes.into_iter().map(|node| Member { node, address: String::new() }).collect()
}

pub(crate) fn disks_of<'a>(nodes: &'a BTreeMap<NodeId, Node>, set: &[Member]) -> Vec<&'a Disk> {
    set.iter().map(|member| &nodes[&member.node].disk).collect()
}

impl Control {
    pub fn new(nodes: impl IntoIterator<Item = NodeId>) -> Control {
        Control { stored: vec![Membership::first(members(nodes))], established: false }
    }

    pub fn current(&self) -> &Membership {
        &self.stored[self.stored.len() - 1]
    }

    /// One of the last few; a compute may be that late.
    fn recent(&self, back: usize) -> &Membership {
        &self.stored[self.stored.len().saturating_sub(1 + back)]
    }

    /// A proposer has committed under this membership.
    pub fn established(&mut self, generation: MembershipGeneration) {
        self.established |= self.current().is_joint() && self.current().generation == generation;
    }

    fn store(&mut self, membership: Membership) {
        self.stored.push(membership);
        self.established = false;
    }

    /// Ends a change that everything committed has come along with; false when it can't be ended yet.
    fn complete(&mut self, mutation: Option<Mutation>) -> bool {
        let may = self.current().is_joint() && (self.established || mutation == Some(Mutation::CompleteUnestablished));
        if may {
            self.store(self.current().completed());
        }
        may
    }
}

impl World {
    /// The membership that a new compute is given, which may be out of date by the time it gets it.
    pub(crate) fn membership_for_compute(&mut self) -> Membership {
        let back = if self.options.changes && self.rng.chance(30) { self.rng.below(4) } else { 0 };
        self.control.recent(back).clone()
    }

    /// Sets of members of which each holds everything committed on a majority.
    pub(crate) fn holders(&self) -> Vec<Vec<&Disk>> {
        let count = if self.control.current().is_joint() && !self.control.established { 1 } else { 2 };
        self.control.current().sets().take(count).map(|set| disks_of(&self.nodes, set)).collect()
    }

    /// The control plane does one thing.
    pub(crate) fn change(&mut self) -> Result<(), SimError> {
        match self.rng.below(100) {
            0..30 => {
                self.store_change();
                Ok(())
            }
            30..65 => {
                let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
                self.pick(&ids).map_or(Ok(()), |id| self.tell_node(id))
            }
            _ => {
                let ids: Vec<ProposerId> = self.computes.keys().copied().collect();
                let told = self.control.current().clone();
                self.pick(&ids).map_or(Ok(()), |id| self.tell_compute(id, told))
            }
        }
    }

    /// Begins a change, ends it, or takes it back.
    fn store_change(&mut self) {
        if self.control.current().is_joint() {
            if self.control.complete(self.options.mutation) {
                self.note("completed", self.control.current().to_string());
            } else if self.rng.chance(10) {
                self.control.store(self.control.current().abandoned());
                self.note("abandoned", self.control.current().to_string());
            }
            return;
        }
        let new = self.other_members();
        if let Ok(joint) = self.control.current().joint_with(members(new)) {
            self.note("joint", joint.to_string());
            self.control.store(joint);
        }
    }

    /// A member is replaced, added or removed; sometimes all are exchanged.
    fn other_members(&mut self) -> Vec<NodeId> {
        // One that rots is one too many where fewer than three have what is committed.
        let fewest = if self.rotting.is_some() { 3 } else { 1 };
        let mut set: Vec<NodeId> = self.control.current().all().iter().map(|member| member.node).collect();
        let mut spare: Vec<NodeId> = self.nodes.keys().copied().filter(|node| !set.contains(node)).collect();
        let choice = self.rng.below(100);
        if choice >= 90 && spare.len() >= fewest {
            return spare;
        }
        if choice < 60 && set.len() > (if choice < 35 { 0 } else { fewest }) {
            set.remove(self.rng.below(set.len()));
        }
        if !(35..60).contains(&choice) && set.len() < MOST_MEMBERS && !spare.is_empty() {
            set.push(spare.swap_remove(self.rng.below(spare.len())));
        }
        set
    }

    pub(crate) fn tell_node(&mut self, id: NodeId) -> Result<(), SimError> {
        let told = self.control.current().clone();
        let known = |acceptor: &Acceptor| acceptor.state().membership.as_ref() == Some(&told);
        if self.nodes[&id].acceptor.as_ref().is_none_or(known) {
            return Ok(());
        }
        let Some(acceptor) = self.nodes.get_mut(&id).and_then(|node| node.acceptor.as_mut()) else {
            return Ok(());
        };
        let mut effects = acceptor.set_membership(id, told);
        effects.extend(acceptor.end_batch());
        self.note("told", id);
        self.perform(id, effects)
    }

    pub(crate) fn tell_compute(&mut self, id: ProposerId, told: Membership) -> Result<(), SimError> {
        let Some(compute) = self.computes.get_mut(&id) else { return Ok(()) };
        let actions = compute.proposer.set_membership(told);
        let membership = compute.proposer.membership().clone();
        for connection in self.connections.values_mut().filter(|c| c.compute == id && !membership.contains(c.node)) {
            connection.ghost = true;
        }
        self.act(id, actions)
    }

    /// Ends the change that is under way.
    pub(crate) fn finish_change(&mut self) -> Result<(), SimError> {
        if !self.control.complete(None) {
            return Err(SimError::Stuck(format!("nothing is committed under {}", self.control.current())));
        }
        Ok(())
    }
}
