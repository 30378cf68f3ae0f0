//! What there is at first: fresh safekeepers, or logs that only a long run would bring about.

use safekeeper_protocol::{Acceptor, AcceptorState, Mutation, TermHistory, TermStart};
use types::{Lsn, Member, Membership, MembershipGeneration, NodeId, Term};

use crate::{
    START,
    disk::Disk,
    state::{Node, Seen},
};

/// See the module's documentation. In pictures, a digit is a byte that was written in that term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setup {
    /// Safekeepers that have never heard of the branch.
    Fresh,
    /// `11`, `2`, `2`: term 1 wrote two records to one safekeeper only; term 2 committed one on the two others.
    LongerButOlder,
    /// `2`, ``, `3`: as in figure 8 of the paper on Raft. Term 2's record is on one safekeeper, term 3's on another,
    /// with the vote of the one in the middle.
    Figure8,
    /// `1`, `1`, ``: term 1 committed a record, the third safekeeper has yet to hear of it. How far their logs are has not been
    /// stored since.
    OneLags,
    /// ``, `1`: of two safekeepers the first has left, and has been told of it; the second is the only member, in term 2.
    Moved,
}

impl Setup {
    /// The safekeepers, so many where they are fresh.
    pub fn nodes(self, count: usize, mutation: Option<Mutation>) -> Vec<Node> {
        match self {
            Setup::Fresh => (0..count).map(|_| node(0, &[], &[], mutation)).collect(),
            Setup::LongerButOlder => vec![
                node(0, &[(1, 0)], &[1, 1], mutation),
                node(0, &[(1, 0), (2, 0)], &[2], mutation),
                node(0, &[(1, 0), (2, 0)], &[2], mutation),
            ],
            Setup::Figure8 => vec![
                node(0, &[(1, 0), (2, 0)], &[2], mutation),
                node(3, &[(1, 0)], &[], mutation),
                node(0, &[(1, 0), (3, 0)], &[3], mutation),
            ],
            Setup::OneLags => {
                let mut nodes = vec![
                    node(0, &[(1, 0)], &[1], mutation),
                    node(0, &[(1, 0)], &[1], mutation),
                    node(0, &[(1, 0)], &[], mutation),
                ];
                nodes.iter_mut().for_each(|node| node.disk.control.flush_lsn = START);
                nodes
            }
            Setup::Moved => {
                let nodes = [node(2, &[], &[], mutation), node(0, &[(1, 0), (2, 1)], &[1], mutation)];
                nodes.into_iter().map(|node| moved(node, mutation)).collect()
            }
        }
    }

    /// What was committed.
    pub fn seen(self) -> Seen {
        let committed = match self {
            Setup::Fresh | Setup::Figure8 => Vec::new(),
            Setup::LongerButOlder => vec![2],
            Setup::OneLags | Setup::Moved => vec![1],
        };
        Seen { committed, ..Seen::default() }
    }

    /// The highest term in it.
    pub fn highest_term(self) -> u64 {
        match self {
            Setup::Fresh => 0,
            Setup::LongerButOlder | Setup::Moved => 2,
            Setup::Figure8 => 3,
            Setup::OneLags => 1,
        }
    }
}

/// The membership of [`Setup::Moved`]: the second safekeeper alone, after a change.
pub fn only_the_second() -> Membership {
    let member = |node| Member { node: NodeId(node), address: String::new() };
    let joint = Membership::first(vec![member(1)]).joint_with(vec![member(2)]);
    joint.expect("another member").completed()
}

/// Told of [`only_the_second`].
fn moved(node: Node, mutation: Option<Mutation>) -> Node {
    let mut control = node.disk.control;
    (control.generation, control.membership) = (only_the_second().generation, Some(only_the_second()));
    let acceptor = Acceptor::new(control.clone()).with_mutation(mutation);
    if mutation == Some(Mutation::MembershipNotStored) {
        (control.generation, control.membership) = (MembershipGeneration::FIRST, None);
    }
    Node { acceptor, disk: Disk { control, ..node.disk } }
}

/// A safekeeper that voted last in this term, if that is later than its log's, with these terms (and where they start, from
/// [`START`] on) and bytes.
fn node(voted: u64, terms: &[(u64, u64)], wal: &[u8], mutation: Option<Mutation>) -> Node {
    let entries = terms.iter().map(|(term, start)| TermStart { term: Term(*term), start_lsn: START + *start });
    let end = START + wal.len() as u64;
    let (log_start_lsn, flush_lsn) = if terms.is_empty() { (Lsn::INVALID, Lsn::INVALID) } else { (START, end) };
    let control = AcceptorState {
        term: Term(terms.last().map_or(0, |(term, _)| *term).max(voted)),
        history: TermHistory::new(entries.collect()),
        log_start_lsn,
        flush_lsn,
        ..AcceptorState::default()
    };
    let acceptor = Acceptor::new(control.clone()).with_mutation(mutation);
    Node { acceptor, disk: Disk { control, wal: wal.to_vec(), flushed_bytes: wal.len() } }
}
