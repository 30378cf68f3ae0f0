//! Acceptors, proposers, and what happens between them.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
};

use safekeeper_protocol::{Acceptor, AcceptorMessage, ConnectionId, Mutation, Proposer, ProposerId, ProposerMessage};
use types::{Lsn, NodeId, Term};

use crate::{Disk, Rng, SimError, SimScanner, control::Control, observer::Observer};

/// Where the log starts.
pub const START: Lsn = Lsn(1000);

/// What a run is made from.
#[derive(Debug, Clone, Copy)]
pub struct SimOptions {
    /// Decides everything that is left to chance.
    pub seed: u64,
    /// Safekeepers that the branch has at first.
    pub members: u64,
    /// Its membership changes, among these and three more.
    pub changes: bool,
    /// So many computes at a time.
    pub computes: usize,
    /// Things that happen before faults stop.
    pub steps: usize,
    /// A rule that is broken.
    pub mutation: Option<Mutation>,
    /// Keep a hash of all that happens, to compare runs by; slows the run down.
    pub trace: bool,
    /// Tell what happens on standard output.
    pub print: bool,
}

impl SimOptions {
    /// What a seed stands for: three safekeepers or five, or some that change, one compute at a time or three.
    pub fn of_seed(seed: u64) -> SimOptions {
        let members = if seed.is_multiple_of(4) { 5 } else { 3 };
        let computes = if seed.is_multiple_of(3) { 1 } else { 3 };
        let changes = !seed.is_multiple_of(2);
        SimOptions { seed, members, changes, computes, steps: 4000, mutation: None, trace: false, print: false }
    }
}

/// The installation, and who watches it.
pub struct World {
    pub(crate) options: SimOptions,
    pub(crate) rng: Rng,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) computes: BTreeMap<ProposerId, Compute>,
    pub(crate) connections: BTreeMap<ConnectionId, Connection>,
    pub(crate) control: Control,
    pub(crate) observer: Observer,
    pub(crate) next_id: u64,
    /// Between these nothing is delivered, in either direction.
    pub(crate) partition: Option<(BTreeSet<ProposerId>, BTreeSet<NodeId>)>,
    /// The only safekeeper whose disk rots, and only in some runs.
    pub(crate) rotting: Option<NodeId>,
    pub(crate) trace: DefaultHasher,
    /// What happened most often, for tests that want to know whether anything did.
    pub counts: BTreeMap<&'static str, u64>,
}

pub(crate) struct Node {
    pub(crate) disk: Disk,
    /// `None` while it is down.
    pub(crate) acceptor: Option<Acceptor>,
    /// No write succeeds.
    pub(crate) full: bool,
}

pub(crate) struct Compute {
    pub(crate) proposer: Proposer<SimScanner>,
    pub(crate) started: Option<(Term, Lsn)>,
    pub(crate) written: Vec<u8>,
    pub(crate) retry: bool,
}

pub(crate) struct Connection {
    pub(crate) compute: ProposerId,
    pub(crate) node: NodeId,
    /// Lost, but what is on the way to the safekeeper may still arrive.
    pub(crate) ghost: bool,
    /// Seldom delivers anything.
    pub(crate) slow: bool,
    pub(crate) to_node: VecDeque<ProposerMessage>,
    pub(crate) to_compute: VecDeque<AcceptorMessage>,
}

impl World {
    pub fn new(options: SimOptions) -> World {
        let spare = if options.changes { 3 } else { 0 };
        let nodes = (1..=options.members + spare).map(|n| {
            (
                NodeId(n),
                Node {
                    disk: Disk::default(),
                    acceptor: Some(Acceptor::new(Default::default()).with_mutation(options.mutation)),
                    full: false,
                },
            )
        });
        World {
            options,
            rng: Rng(options.seed),
            nodes: nodes.collect(),
            computes: BTreeMap::new(),
            connections: BTreeMap::new(),
            control: Control::new((1..=options.members).map(NodeId)),
            observer: Observer::new(START),
            next_id: 1,
            partition: None,
            rotting: options.seed.is_multiple_of(5).then_some(NodeId(1 + options.seed / 5 % options.members)),
            trace: DefaultHasher::new(),
            counts: BTreeMap::new(),
        }
    }

    /// Runs to the end, then heals everything and expects the installation to work. Returns the trace's hash (see
    /// [`SimOptions::trace`]).
    pub fn run(&mut self) -> Result<u64, SimError> {
        for step in 0..self.options.steps {
            self.step().map_err(|error| error.at(&format!("seed {}, step {step}", self.options.seed)))?;
        }
        self.heal().map_err(|error| error.at(&format!("seed {}, healed", self.options.seed)))?;
        Ok(self.trace.finish())
    }

    /// So many things have happened.
    pub fn steps_done(&self) -> u64 {
        self.counts.values().sum()
    }

    pub(crate) fn note(&mut self, what: &'static str, detail: impl std::fmt::Debug) {
        *self.counts.entry(what).or_default() += 1;
        if self.options.print {
            println!("{what} {detail:?}");
        }
        if self.options.trace {
            (what, format!("{detail:?}")).hash(&mut self.trace);
        }
    }

    fn step(&mut self) -> Result<(), SimError> {
        if self.options.changes && self.rng.below(1000) < 20 {
            return self.change();
        }
        match self.rng.below(1000) {
            0..400 => self.deliver_to_node(),
            400..700 => self.deliver_to_compute(),
            700..790 => self.connect(),
            790..800 => {
                self.break_connection();
                Ok(())
            }
            800..806 => self.crash_or_restart(),
            806..880 => self.write(),
            880..900 => self.tell_commits(),
            900..912 => self.start_compute(),
            912..917 => self.kill_compute(),
            917..922 => self.vote_in_vain(),
            922..940 => self.retry_elections(),
            940..960 => self.heartbeats(),
            960..975 => self.report_stored(),
            975..990 => self.trim(),
            990..994 => self.fill_or_free_disk(),
            994..997 => {
                self.part_or_join();
                Ok(())
            }
            _ => {
                self.rot();
                Ok(())
            }
        }
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.rng.below(from.len())])
    }

    pub(crate) fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}
