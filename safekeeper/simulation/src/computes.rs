//! Computes: they start, write, compete and end.

use bytes::Bytes;
use safekeeper_protocol::{
    Action, ConnectionId, Proposer, ProposerId, ProposerMessage, ProposerSettings,
    message::{Vote, VoteTerm},
};
use types::{Membership, NodeId, Term};

use crate::{
    Disk, SimError, World,
    control::disks_of,
    make_record,
    world::{Compute, START},
};

impl World {
    pub(crate) fn start_compute(&mut self) -> Result<(), SimError> {
        if self.computes.len() >= self.options.computes {
            return Ok(());
        }
        let id = ProposerId(u128::from(self.fresh_id()));
        self.note("compute", id);
        let settings = ProposerSettings {
            id,
            membership: self.membership_for_compute(),
            branch_start_lsn: START,
            system_identifier: None,
            buffer_bytes: 150,
            window_bytes: 120,
            message_bytes: 40,
            stranded_heartbeats: 1,
        };
        let proposer = Proposer::new(settings).with_mutation(self.options.mutation);
        self.computes.insert(id, Compute { proposer, started: None, written: Vec::new(), retry: false });
        Ok(())
    }

    /// Ends a compute, sometimes with a goodbye.
    pub(crate) fn kill_compute(&mut self) -> Result<(), SimError> {
        let ids: Vec<ProposerId> = self.computes.keys().copied().collect();
        let Some(id) = self.pick(&ids) else { return Ok(()) };
        self.note("kill", id);
        if self.rng.chance(50) {
            let actions = self.computes.get_mut(&id).map(|c| c.proposer.finish()).unwrap_or_default();
            self.act(id, actions)?;
        }
        self.computes.remove(&id);
        for connection in self.connections.values_mut().filter(|c| c.compute == id) {
            connection.ghost = true;
        }
        Ok(())
    }

    /// A safekeeper that no compute is connected to votes for a candidate that is never heard of again.
    pub(crate) fn vote_in_vain(&mut self) -> Result<(), SimError> {
        let alone = |node: NodeId| !self.connections.values().any(|c| !c.ghost && c.node == node);
        let ids: Vec<NodeId> = self.nodes.keys().copied().filter(|node| alone(*node)).collect();
        let Some(node_id) = self.pick(&ids) else { return Ok(()) };
        let proposer = ProposerId(u128::from(self.fresh_id()));
        let generation = self.membership_for_compute().generation;
        let Some(acceptor) = self.nodes.get_mut(&node_id).and_then(|node| node.acceptor.as_mut()) else {
            return Ok(());
        };
        let vote = Vote { proposer, term: VoteTerm::Next, system_identifier: None, generation };
        let mut effects = acceptor.handle(ConnectionId(0), ProposerMessage::Vote(vote));
        effects.extend(acceptor.end_batch());
        self.note("vain", (node_id, proposer));
        self.perform(node_id, effects)
    }

    pub(crate) fn act(&mut self, id: ProposerId, actions: Vec<Action>) -> Result<(), SimError> {
        for action in actions {
            match action {
                Action::Send { to, message } => {
                    let open = self.connections.values_mut().find(|c| !c.ghost && c.compute == id && c.node == to);
                    if let Some(connection) = open {
                        connection.to_node.push_back(message);
                    }
                }
                Action::Started { term, start_lsn } => {
                    self.note("started", (id, term, start_lsn));
                    self.observer.started(term, id, start_lsn)?;
                    if let Some(compute) = self.computes.get_mut(&id) {
                        compute.started = Some((term, start_lsn));
                    }
                }
                Action::Reelected { term, start_lsn } => {
                    self.note("reelected", (id, term, start_lsn));
                    self.observer.started(term, id, start_lsn)?;
                    if let Some((own, _)) = self.computes.get_mut(&id).and_then(|compute| compute.started.as_mut()) {
                        *own = term;
                    }
                }
                Action::Damaged { donor, reason, .. } => {
                    self.note("damaged", (donor, &reason));
                    if self.rotting != Some(donor) {
                        return Err(SimError::Wrong(format!("{donor} is said to have damaged WAL: {reason}")));
                    }
                }
                Action::Committed { lsn } => {
                    self.note("committed", (id, lsn));
                    let Some(compute) = self.computes.get(&id) else { continue };
                    let own_start = compute.started.map_or(lsn, |(_, start)| start);
                    let sets: Vec<Vec<&Disk>> =
                        compute.proposer.membership().sets().map(|set| disks_of(&self.nodes, set)).collect();
                    self.observer.committed(lsn, own_start, &compute.written, &sets)?;
                    self.check_held()?;
                }
                Action::Fenced { reason } => {
                    self.note("fenced", (id, reason));
                    self.computes.remove(&id);
                    self.connections.values_mut().filter(|c| c.compute == id).for_each(|c| c.ghost = true);
                }
                Action::RetryElection => {
                    if let Some(compute) = self.computes.get_mut(&id) {
                        compute.retry = true;
                    }
                }
                Action::Disconnect { to, reason } => {
                    self.note("disconnect", (id, to, reason));
                    self.lose(id, to)?;
                }
                Action::Established { generation } => {
                    self.note("established", (id, generation));
                    self.control.established(generation);
                    self.check_held()?;
                }
                Action::NewerMembership { from, membership, .. } => {
                    self.note("newer", (id, from, &membership));
                    match membership {
                        Some(told) if self.is_news(id, &told) => self.tell_compute(id, told)?,
                        Some(_) | None => self.lose(id, from)?,
                    }
                }
                Action::BranchDeleted => return Err(SimError::Wrong("nobody deleted the branch".to_owned())),
            }
        }
        Ok(())
    }

    fn is_news(&self, id: ProposerId, told: &Membership) -> bool {
        self.computes.get(&id).is_some_and(|compute| compute.proposer.membership().generation < told.generation)
    }

    pub(crate) fn write(&mut self) -> Result<(), SimError> {
        let leaders = self.computes.iter().filter(|(_, c)| c.proposer.is_leader()).map(|(id, _)| *id);
        let leaders: Vec<ProposerId> = leaders.collect();
        let Some(id) = self.pick(&leaders) else { return Ok(()) };
        let mut pieces = Vec::new();
        for _ in 0..1 + self.rng.below(3) {
            let number = self.fresh_id() as u32;
            let length = 10 + self.rng.below(90);
            let term = self.computes[&id].started.map_or(Term(0), |(term, _)| term);
            pieces.push(Bytes::from(make_record(term, number, length)));
        }
        self.note("write", (id, pieces.len()));
        let Some(compute) = self.computes.get_mut(&id) else { return Ok(()) };
        pieces.iter().for_each(|piece| compute.written.extend_from_slice(piece));
        let actions = compute.proposer.append(pieces);
        self.act(id, actions)
    }

    pub(crate) fn retry_elections(&mut self) -> Result<(), SimError> {
        let retrying = self.computes.iter().filter(|(_, c)| c.retry).map(|(id, _)| *id);
        for id in retrying.collect::<Vec<_>>() {
            let Some(compute) = self.computes.get_mut(&id) else { continue };
            compute.retry = false;
            let actions = compute.proposer.campaign();
            self.note("campaign", id);
            self.act(id, actions)?;
        }
        Ok(())
    }

    /// A compute tells of what is committed before more WAL does.
    pub(crate) fn tell_commits(&mut self) -> Result<(), SimError> {
        let ids: Vec<ProposerId> = self.computes.keys().copied().collect();
        let Some(id) = self.pick(&ids) else { return Ok(()) };
        let Some(compute) = self.computes.get_mut(&id) else { return Ok(()) };
        let actions = compute.proposer.tell_commits(compute.proposer.commit_lsn());
        self.act(id, actions)
    }

    pub(crate) fn heartbeats(&mut self) -> Result<(), SimError> {
        for id in self.computes.keys().copied().collect::<Vec<_>>() {
            let actions = self.computes.get_mut(&id).map(|c| c.proposer.heartbeat()).unwrap_or_default();
            self.act(id, actions)?;
        }
        Ok(())
    }
}
