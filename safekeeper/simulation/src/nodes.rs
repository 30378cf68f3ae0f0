//! Safekeepers: what their drivers do, and what befalls them.

use safekeeper_protocol::{Acceptor, AcceptorMessage, Effect, ProposerId};
use types::NodeId;

use crate::{SimError, World};

const SEGMENT_BYTES: u64 = 256;

/// Whether it needs room on the disk.
fn writes(effect: &Effect) -> bool {
    matches!(effect, Effect::WriteWal { .. } | Effect::Persist(_))
}

impl World {
    /// A disk has no room left, or has room again.
    pub(crate) fn fill_or_free_disk(&mut self) -> Result<(), SimError> {
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        let Some(id) = self.pick(&ids) else { return Ok(()) };
        let fill = self.rng.chance(25);
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        node.full = !node.full && fill;
        let full = node.full;
        self.note(if full { "full" } else { "freed" }, id);
        Ok(())
    }

    /// As the service does it: what comes before the write that fails is done, the branch is closed with the reason, and loaded
    /// again, cut to what had been flushed before.
    fn write_fails(&mut self, id: NodeId, effects: Vec<Effect>) -> Result<(), SimError> {
        self.note("refused", id);
        let first = effects.iter().position(writes);
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        let (known, persisted) = (node.disk.flushed, node.disk.control.flush_lsn);
        let acknowledged = node.acceptor.as_ref().map_or(node.disk.mark, |acceptor| acceptor.state().flush_lsn);
        let replies = node.disk.perform(effects, first, acknowledged)?;
        node.disk.cut(known.max(persisted));
        node.acceptor = None;
        for (to, message) in replies {
            if let Some(connection) = self.connections.get_mut(&to).filter(|c| !c.ghost) {
                connection.to_compute.push_back(message);
            }
        }
        let failed = AcceptorMessage::Failed { reason: "no space left on the disk".to_owned() };
        self.connections.retain(|_, c| !(c.ghost && c.node == id));
        self.connections.values_mut().filter(|c| c.node == id).for_each(|c| c.to_compute.push_back(failed.clone()));
        self.restart(id)
    }

    /// A bit of durable WAL changes, on the one safekeeper whose disk rots.
    pub(crate) fn rot(&mut self) {
        let Some(id) = self.rotting else { return };
        let place = self.rng.next_u64();
        let Some(node) = self.nodes.get_mut(&id) else { return };
        if let Some(at) = node.disk.rot(place) {
            self.note("rot", (id, at));
        }
    }

    pub(crate) fn perform(&mut self, node_id: NodeId, effects: Vec<Effect>) -> Result<(), SimError> {
        let crash_at = self.rng.chance(1).then(|| self.rng.below(effects.len() + 1));
        let Some(node) = self.nodes.get_mut(&node_id) else { return Ok(()) };
        if node.full && effects.iter().any(writes) {
            return self.write_fails(node_id, effects);
        }
        let acknowledged = node.acceptor.as_ref().map_or(node.disk.mark, |acceptor| acceptor.state().flush_lsn);
        let replies = node.disk.perform(effects, crash_at, acknowledged)?;
        for (to, message) in replies {
            if let Some(connection) = self.connections.get_mut(&to).filter(|c| !c.ghost) {
                connection.to_compute.push_back(message);
            }
        }
        if crash_at.is_some() {
            return self.crash(node_id);
        }
        self.check_node(node_id)
    }

    pub(crate) fn check_node(&self, node_id: NodeId) -> Result<(), SimError> {
        let node = &self.nodes[&node_id];
        if let Some(acceptor) = &node.acceptor {
            let state = acceptor.state();
            if state.flush_lsn > node.disk.flushed && state.log_start_lsn < state.flush_lsn {
                return Err(format!("{node_id} claims {}, has {}", state.flush_lsn, node.disk.flushed).into());
            }
            self.observer.knows_committed(&node.disk, state.commit_lsn)?;
        }
        self.check_held()
    }

    /// Everything committed is held by a majority of each set of members that should have it.
    pub(crate) fn check_held(&self) -> Result<(), SimError> {
        self.holders().iter().try_for_each(|disks| self.observer.held(disks))
    }

    pub(crate) fn crash_or_restart(&mut self) -> Result<(), SimError> {
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        let Some(id) = self.pick(&ids) else { return Ok(()) };
        if self.nodes[&id].acceptor.is_some() { self.crash(id) } else { self.restart(id) }
    }

    pub(crate) fn crash(&mut self, id: NodeId) -> Result<(), SimError> {
        self.note("crash", id);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.acceptor = None;
            node.disk.crash(&mut self.rng);
        }
        let computes: Vec<ProposerId> =
            self.connections.values().filter(|c| !c.ghost && c.node == id).map(|c| c.compute).collect();
        for compute in computes {
            self.lose(compute, id)?;
        }
        self.connections.retain(|_, c| c.node != id);
        if self.rng.chance(80) { self.restart(id) } else { Ok(()) }
    }

    pub(crate) fn restart(&mut self, id: NodeId) -> Result<(), SimError> {
        self.note("restart", id);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.acceptor = Some(Acceptor::new(node.disk.recover()?).with_mutation(self.options.mutation));
        }
        self.check_node(id)
    }

    /// The object store has everything up to some committed record.
    pub(crate) fn report_stored(&mut self) -> Result<(), SimError> {
        let boundaries = self.observer.boundaries().to_vec();
        let (Some(stored), ids) = (self.pick(&boundaries), self.nodes.keys().copied().collect::<Vec<_>>()) else {
            return Ok(());
        };
        let Some(id) = self.pick(&ids) else { return Ok(()) };
        self.note("report", (id, stored));
        if let Some(acceptor) = self.nodes.get_mut(&id).and_then(|node| node.acceptor.as_mut()) {
            acceptor.handle_report(stored);
        }
        Ok(())
    }

    pub(crate) fn trim(&mut self) -> Result<(), SimError> {
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        let idle = self.rng.chance(30);
        let Some(id) = self.pick(&ids) else { return Ok(()) };
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        let Some(acceptor) = &mut node.acceptor else { return Ok(()) };
        let mut effects = acceptor.trim(idle, SEGMENT_BYTES, 0);
        if idle {
            effects.extend(acceptor.persist_before_idle(&node.disk.control));
        }
        if !effects.is_empty() {
            self.note("trim", (id, effects.len()));
        }
        self.perform(id, effects)
    }

    pub(crate) fn notice_loss(&mut self, node_id: NodeId) -> Result<(), SimError> {
        let Some(acceptor) = self.nodes.get_mut(&node_id).and_then(|node| node.acceptor.as_mut()) else {
            return Ok(());
        };
        acceptor.proposer_gone();
        let effects = acceptor.end_batch();
        self.perform(node_id, effects)
    }
}
