//! Connections: they break, stall, and deliver late, twice or out of order what was on the way when they broke.

use std::collections::VecDeque;

use safekeeper_protocol::{ConnectionId, Effect, ProposerId, ProposerMessage};
use types::NodeId;

use crate::{SimError, World, world::Connection};

impl World {
    /// Parts some computes from some safekeepers, or joins all again.
    pub(crate) fn part_or_join(&mut self) {
        if self.partition.take().is_some() {
            return self.note("joined", ());
        }
        let computes: Vec<ProposerId> = self.computes.keys().copied().collect();
        let nodes: Vec<NodeId> = self.nodes.keys().copied().collect();
        let computes = computes.into_iter().filter(|_| self.rng.chance(60)).collect();
        let nodes = nodes.into_iter().filter(|_| self.rng.chance(50)).collect();
        self.note("parted", (&computes, &nodes));
        self.partition = Some((computes, nodes));
    }

    fn is_parted(&self, compute: ProposerId, node: NodeId) -> bool {
        self.partition.as_ref().is_some_and(|(computes, nodes)| computes.contains(&compute) && nodes.contains(&node))
    }

    pub(crate) fn connect(&mut self) -> Result<(), SimError> {
        let connected = |compute: ProposerId, node: NodeId| {
            self.connections.values().any(|c| !c.ghost && c.compute == compute && c.node == node)
        };
        let up: Vec<NodeId> = self.nodes.iter().filter(|(_, n)| n.acceptor.is_some()).map(|(id, _)| *id).collect();
        let is_member =
            |compute: ProposerId, node: NodeId| self.computes[&compute].proposer.membership().contains(node);
        let pairs = self.computes.keys().flat_map(|compute| up.iter().map(move |node| (*compute, *node)));
        let pairs = pairs.filter(|(compute, node)| is_member(*compute, *node));
        let free = pairs.filter(|(compute, node)| !connected(*compute, *node) && !self.is_parted(*compute, *node));
        let free: Vec<(ProposerId, NodeId)> = free.collect();
        let Some((compute, node)) = self.pick(&free) else { return Ok(()) };
        self.connect_pair(compute, node)
    }

    pub(crate) fn connect_pair(&mut self, compute: ProposerId, node: NodeId) -> Result<(), SimError> {
        let id = ConnectionId(self.fresh_id());
        let slow = self.rng.chance(15);
        self.note("connect", (id, compute, node));
        let connection =
            Connection { compute, node, ghost: false, slow, to_node: VecDeque::new(), to_compute: VecDeque::new() };
        self.connections.insert(id, connection);
        let actions = self.computes.get_mut(&compute).map(|c| c.proposer.connected(node)).unwrap_or_default();
        self.act(compute, actions)
    }

    pub(crate) fn break_connection(&mut self) {
        let ids: Vec<ConnectionId> = self.connections.iter().filter(|(_, c)| !c.ghost).map(|(id, _)| *id).collect();
        if let Some(id) = self.pick(&ids) {
            let (compute, node) = (self.connections[&id].compute, self.connections[&id].node);
            // An error is found by the next check as well.
            let _ = self.lose(compute, node);
        }
    }

    pub(crate) fn lose(&mut self, compute: ProposerId, node: NodeId) -> Result<(), SimError> {
        let found = self.connections.iter_mut().find(|(_, c)| !c.ghost && c.compute == compute && c.node == node);
        let Some((id, connection)) = found else { return Ok(()) };
        let id = *id;
        connection.ghost = true;
        connection.to_compute.clear();
        if self.rng.chance(50) {
            self.connections.remove(&id);
        }
        self.note("lose", id);
        if self.rng.chance(50) {
            self.notice_loss(node)?;
        }
        let actions = self.computes.get_mut(&compute).map(|c| c.proposer.disconnected(node)).unwrap_or_default();
        self.act(compute, actions)
    }

    pub(crate) fn deliver_to_node(&mut self) -> Result<(), SimError> {
        let waiting =
            self.connections.iter().filter(|(_, c)| !c.to_node.is_empty() && !self.is_parted(c.compute, c.node));
        let waiting: Vec<ConnectionId> = waiting.map(|(id, _)| *id).collect();
        let Some(id) = self.pick(&waiting) else { return Ok(()) };
        let many = 1 + self.rng.below(4);
        let (late, again, later) = (self.rng.chance(90), self.rng.chance(20), self.rng.next_u64());
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        if connection.slow && late {
            return Ok(());
        }
        let node_id = connection.node;
        let take = many.min(connection.to_node.len());
        if connection.ghost {
            // A lost connection keeps no order, and what it holds may come twice.
            let at = (later % connection.to_node.len() as u64) as usize;
            connection.to_node.swap(0, at);
            if again {
                connection.to_node.push_back(connection.to_node[0].clone());
            }
        }
        let messages: Vec<ProposerMessage> = connection.to_node.drain(..take).collect();
        if connection.ghost && connection.to_node.is_empty() {
            self.connections.remove(&id);
        }
        self.note("to_node", (id, &messages));
        let Some(node) = self.nodes.get_mut(&node_id) else { return Ok(()) };
        let Some(acceptor) = &mut node.acceptor else { return Ok(()) };
        let mut effects: Vec<Effect> = messages.into_iter().flat_map(|m| acceptor.handle(id, m)).collect();
        effects.extend(acceptor.end_batch());
        self.perform(node_id, effects)
    }

    pub(crate) fn deliver_to_compute(&mut self) -> Result<(), SimError> {
        let parted = |c: &Connection| self.is_parted(c.compute, c.node);
        let waiting = self.connections.iter().filter(|(_, c)| !c.to_compute.is_empty() && !c.ghost && !parted(c));
        let waiting: Vec<ConnectionId> = waiting.map(|(id, _)| *id).collect();
        let Some(id) = self.pick(&waiting) else { return Ok(()) };
        let late = self.rng.chance(90);
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        if connection.slow && late {
            return Ok(());
        }
        let (compute, node) = (connection.compute, connection.node);
        let Some(message) = connection.to_compute.pop_front() else { return Ok(()) };
        self.note("to_compute", (id, &message));
        let actions = self.computes.get_mut(&compute).map(|c| c.proposer.handle(node, message)).unwrap_or_default();
        self.act(compute, actions)
    }
}
