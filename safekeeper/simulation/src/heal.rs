//! What is expected once faults stop.

use safekeeper_protocol::{Acceptor, ProposerId};
use types::NodeId;

use crate::{SimError, World, world::Node};

impl World {
    /// All safekeepers up, one fresh compute: it must win, write, commit, and bring everybody to the same log.
    pub(crate) fn heal(&mut self) -> Result<(), SimError> {
        self.computes.clear();
        self.connections.clear();
        self.partition = None;
        self.nodes.values_mut().for_each(|node| node.full = false);
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        for id in &ids {
            self.crash(*id)?;
            if self.nodes[id].acceptor.is_none() {
                self.restart(*id)?;
            }
        }
        let committed = self.observer.committed_end();
        // One compute brings everybody back, also those that voted in vain for somebody else. It may be fenced by a vote of its
        // own that arrives late, from a lost connection.
        for _ in 0..3 {
            self.computes.clear();
            self.connections.values_mut().for_each(|c| c.ghost = true);
            self.start_compute()?;
            let Some(compute) = self.computes.keys().next().copied() else { continue };
            let current = self.control.current().clone();
            self.tell_compute(compute, current)?;
            self.settle(compute, &ids)?;
            if self.all_at_end(compute) && self.control.current().is_joint() {
                self.finish_change()?;
                self.settle(compute, &ids)?;
            }
            if self.all_at_end(compute) {
                let end = self.computes[&compute].proposer.end_lsn();
                let good = self.observer.committed_end() == end && end >= committed;
                if !good {
                    return Err(SimError::Lost(format!("the log ends at {end}, {committed} was committed")));
                }
                return self.same_everywhere();
            }
            if self.computes.contains_key(&compute) {
                break;
            }
        }
        let states: Vec<_> = self.nodes.values().map(|n| n.acceptor.as_ref().map(Acceptor::status)).collect();
        Err(SimError::Stuck(format!("no agreement, committed is {}: {states:?}", self.observer.committed_end())))
    }

    /// Lets one compute work until everybody has its log, or for a while.
    pub(crate) fn settle(&mut self, compute: ProposerId, ids: &[NodeId]) -> Result<(), SimError> {
        let mut quiet_rounds = 0;
        for round in 0..3000 {
            for id in ids {
                self.tell_node(*id)?;
                if self.nodes[id].acceptor.is_none() {
                    self.restart(*id)?;
                }
                let connected = self.connections.values().any(|c| !c.ghost && c.compute == compute && c.node == *id);
                let member = self.computes.get(&compute).is_some_and(|c| c.proposer.membership().contains(*id));
                if !connected && member {
                    self.connect_pair(compute, *id)?;
                }
            }
            for _ in 0..4 * ids.len() {
                self.deliver_to_node()?;
                self.deliver_to_compute()?;
            }
            self.retry_elections()?;
            if round % 50 == 0 && round < 500 {
                self.write()?;
            }
            self.heartbeats()?;
            quiet_rounds = if self.all_at_end(compute) { quiet_rounds + 1 } else { 0 };
            if quiet_rounds > 20 && round > 500 {
                break;
            }
        }
        Ok(())
    }

    pub(crate) fn all_at_end(&self, compute: ProposerId) -> bool {
        let Some(compute) = self.computes.get(&compute) else { return false };
        let end = compute.proposer.end_lsn();
        let membership = self.control.current();
        let at_end = |(id, node): (&NodeId, &Node)| {
            let state = node.acceptor.as_ref().map(Acceptor::state);
            state.is_some_and(|state| !membership.contains(*id) || state.commit_lsn == end)
        };
        compute.proposer.membership() == membership && compute.proposer.is_leader() && self.nodes.iter().all(at_end)
    }

    /// All logs are the committed one, but for what has rotted; who is not a member has none.
    fn same_everywhere(&self) -> Result<(), SimError> {
        let end = self.observer.committed_end();
        let gone = self.nodes.iter().filter(|(id, _)| !self.control.current().contains(**id));
        if let Some((id, _)) = gone.into_iter().find(|(_, node)| !node.disk.bytes.is_empty()) {
            return Err(SimError::Wrong(format!("{id} is not a member any more, and still has WAL")));
        }
        self.nodes.values().try_for_each(|node| self.observer.knows_committed(&node.disk, end))
    }
}
