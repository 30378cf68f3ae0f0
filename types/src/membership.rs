//! Which safekeepers keep a branch's WAL, and how many of them make a majority.

use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};

use crate::NodeId;

/// Number of a branch's membership. The control plane gives each change a higher one; the first is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MembershipGeneration(pub u64);

impl MembershipGeneration {
    /// That of a branch whose membership has never changed, and of all that nobody has told otherwise.
    pub const FIRST: MembershipGeneration = MembershipGeneration(1);

    /// The one that follows.
    pub fn next(self) -> MembershipGeneration {
        MembershipGeneration(self.0 + 1)
    }
}

impl Default for MembershipGeneration {
    fn default() -> MembershipGeneration {
        MembershipGeneration::FIRST
    }
}

impl fmt::Display for MembershipGeneration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A safekeeper and where it is reached.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Which.
    pub node: NodeId,
    /// `host:port`.
    pub address: String,
}

/// The safekeepers of a branch. While it is **joint**, on the way from one set of members to another, whatever needs a majority needs
/// one of each set.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Membership {
    /// Higher than that of every membership before.
    pub generation: MembershipGeneration,
    /// The members.
    pub members: Vec<Member>,
    /// While it is joint: those that are to be the members.
    pub new_members: Option<Vec<Member>>,
}

/// A membership that makes no sense, or a change that can't be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    /// Nobody could ever make a majority.
    #[error("the branch has no safekeepers")]
    Empty,
    /// It would have two votes.
    #[error("safekeeper {0} is named twice")]
    Twice(NodeId),
    /// One change at a time.
    #[error("another change is under way")]
    Joint,
}

impl Membership {
    /// A membership that never changed.
    pub fn first(members: Vec<Member>) -> Membership {
        Membership { generation: MembershipGeneration::FIRST, members, new_members: None }
    }

    /// Refuses sets that are empty or name a safekeeper twice.
    pub fn check(&self) -> Result<(), MembershipError> {
        for set in self.sets() {
            if set.is_empty() {
                return Err(MembershipError::Empty);
            }
            let mut seen = BTreeSet::new();
            if let Some(twice) = set.iter().find(|member| !seen.insert(member.node)) {
                return Err(MembershipError::Twice(twice.node));
            }
        }
        Ok(())
    }

    /// True on the way from one set of members to another.
    pub fn is_joint(&self) -> bool {
        self.new_members.is_some()
    }

    /// The sets of which each must give its majority: one, or two while it is joint.
    pub fn sets(&self) -> impl Iterator<Item = &[Member]> {
        std::iter::once(&self.members[..]).chain(self.new_members.as_deref())
    }

    /// Everybody, each once, in order of their numbers; of two addresses the newer.
    pub fn all(&self) -> Vec<Member> {
        let mut all: Vec<Member> = self.new_members.iter().flatten().chain(&self.members).cloned().collect();
        all.sort_by_key(|member| member.node);
        all.dedup_by_key(|member| member.node);
        all
    }

    /// Whether a safekeeper is in one of the sets.
    pub fn contains(&self, node: NodeId) -> bool {
        self.sets().flatten().any(|member| member.node == node)
    }

    /// Whether more than half of each set are among these.
    pub fn is_quorum(&self, mut among: impl FnMut(NodeId) -> bool) -> bool {
        self.sets().all(|set| set.iter().filter(|member| among(member.node)).count() > set.len() / 2)
    }

    /// On the way to other members.
    pub fn joint_with(&self, new_members: Vec<Member>) -> Result<Membership, MembershipError> {
        if self.is_joint() {
            return Err(MembershipError::Joint);
        }
        let joint = Membership {
            generation: self.generation.next(),
            members: self.members.clone(),
            new_members: Some(new_members),
        };
        joint.check().map(|()| joint)
    }

    /// The new members alone. Only once the joint membership is established: see the safekeepers' protocol.
    pub fn completed(&self) -> Membership {
        let members = self.new_members.clone().unwrap_or_else(|| self.members.clone());
        Membership { generation: self.generation.next(), members, new_members: None }
    }

    /// Back to the members from before the change; possible at any time while it is joint.
    pub fn abandoned(&self) -> Membership {
        Membership { generation: self.generation.next(), members: self.members.clone(), new_members: None }
    }
}

impl fmt::Display for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.generation)?;
        for (index, set) in self.sets().enumerate() {
            let nodes: Vec<String> = set.iter().map(|member| member.node.to_string()).collect();
            write!(f, "{}{}", if index > 0 { " and " } else { " " }, nodes.join(","))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(nodes: &[u64]) -> Vec<Member> {
        nodes.iter().map(|node| Member { node: NodeId(*node), address: format!("host{node}:1") }).collect()
    }

    #[test]
    fn a_joint_membership_needs_both_majorities() {
        let first = Membership::first(members(&[1, 2, 3]));
        let joint = first.joint_with(members(&[3, 4, 5])).expect("joint");
        let quorum = |membership: &Membership, nodes: &[u64]| membership.is_quorum(|node| nodes.contains(&node.0));
        assert!(quorum(&first, &[1, 2]) && !quorum(&first, &[1, 4, 5]));
        assert!(!quorum(&joint, &[1, 2, 3]) && !quorum(&joint, &[3, 4, 5]) && !quorum(&joint, &[1, 2, 4]));
        assert!(quorum(&joint, &[1, 3, 5]) && quorum(&joint, &[1, 2, 4, 5]));
        let last = joint.completed();
        assert_eq!((last.generation.0, joint.abandoned().generation.0), (3, 3));
        assert!(quorum(&last, &[4, 5]) && quorum(&joint.abandoned(), &[1, 2]));
        assert_eq!(joint.all().iter().map(|member| member.node.0).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        assert_eq!(joint.to_string(), "2: 1,2,3 and 3,4,5");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let first = Membership::first(members(&[1, 2, 3]));
        assert_eq!(first.joint_with(Vec::new()), Err(MembershipError::Empty));
        assert_eq!(first.joint_with(members(&[1, 4, 1])), Err(MembershipError::Twice(NodeId(1))));
        let joint = first.joint_with(members(&[1, 2])).expect("joint");
        assert_eq!(joint.joint_with(members(&[1])), Err(MembershipError::Joint));
    }
}
