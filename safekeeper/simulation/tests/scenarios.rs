//! Stories of a few safekeepers and computes, each message delivered at once unless the story says otherwise.

use std::collections::BTreeMap;

use bytes::Bytes;
use types::{Lsn, Member, Membership, MembershipGeneration, NodeId, Term};

use dormouse_safekeeper_simulation::{Disk, SimScanner, make_record};
use safekeeper_protocol::{
    Acceptor, AcceptorMessage, AcceptorState, Action, ConnectionId, Effect, Proposer, ProposerId, ProposerMessage,
    ProposerSettings, TermHistory, TermStart,
    message::{Append, Elected, Fetch, StreamStart, Vote, VoteTerm},
};

const START: Lsn = Lsn(1000);
const CONNECTION: ConnectionId = ConnectionId(1);

fn members(nodes: &[u64]) -> Vec<Member> {
    nodes.iter().map(|node| Member { node: NodeId(*node), address: String::new() }).collect()
}

fn first_three() -> Membership {
    Membership::first(members(&[1, 2, 3]))
}

struct Safekeeper {
    acceptor: Acceptor,
    disk: Disk,
}

impl Safekeeper {
    fn new() -> Safekeeper {
        Safekeeper { acceptor: Acceptor::new(AcceptorState::default()), disk: Disk::default() }
    }

    fn tell(&mut self, message: ProposerMessage) -> Vec<AcceptorMessage> {
        let mut effects = self.acceptor.handle(CONNECTION, message);
        effects.extend(self.acceptor.end_batch());
        let replies = self.disk.perform(effects, None, self.flush_lsn()).expect("disk");
        replies.into_iter().map(|(_, message)| message).collect()
    }

    fn flush_lsn(&self) -> Lsn {
        self.acceptor.state().flush_lsn
    }
}

struct Compute {
    proposer: Proposer<SimScanner>,
    events: Vec<Action>,
    round_trips: usize,
}

/// Safekeepers 1, 2, 3 and computes by name.
struct Story {
    safekeepers: BTreeMap<NodeId, Safekeeper>,
    computes: BTreeMap<u128, Compute>,
}

impl Story {
    fn new() -> Story {
        let safekeepers = (1..=3).map(|n| (NodeId(n), Safekeeper::new())).collect();
        Story { safekeepers, computes: BTreeMap::new() }
    }

    /// A compute that reaches these safekeepers.
    fn compute(&mut self, name: u128, reaches: &[u64]) {
        self.compute_of(name, &first_three(), reaches);
    }

    /// One that was given this membership.
    fn compute_of(&mut self, name: u128, membership: &Membership, reaches: &[u64]) {
        let settings = ProposerSettings {
            id: ProposerId(name),
            membership: membership.clone(),
            branch_start_lsn: START,
            system_identifier: None,
            buffer_bytes: 10_000,
            window_bytes: 10_000,
            message_bytes: 64,
            stranded_heartbeats: 3,
        };
        let compute = Compute { proposer: Proposer::new(settings), events: Vec::new(), round_trips: 0 };
        self.computes.insert(name, compute);
        self.connect(name, reaches);
    }

    /// Further safekeepers, which have never heard of the branch.
    fn join(&mut self, nodes: &[u64]) {
        self.safekeepers.extend(nodes.iter().map(|node| (NodeId(*node), Safekeeper::new())));
    }

    /// The control plane tells a compute of another membership.
    fn change(&mut self, name: u128, membership: &Membership) {
        let actions = self.computes.get_mut(&name).expect("compute").proposer.set_membership(membership.clone());
        self.deliver(name, actions);
    }

    /// It tells a safekeeper.
    fn tell(&mut self, node: u64, membership: &Membership) {
        let safekeeper = self.safekeepers.get_mut(&NodeId(node)).expect("safekeeper");
        let effects = safekeeper.acceptor.set_membership(NodeId(node), membership.clone());
        let flush_lsn = safekeeper.flush_lsn();
        safekeeper.disk.perform(effects, None, flush_lsn).expect("disk");
    }

    fn established(&self, name: u128, generation: u64) -> bool {
        let generation = MembershipGeneration(generation);
        self.computes[&name].events.contains(&Action::Established { generation })
    }

    fn flushed_of(&self, node: u64) -> Lsn {
        self.safekeepers[&NodeId(node)].flush_lsn()
    }

    fn heartbeat(&mut self, name: u128) {
        let actions = self.computes.get_mut(&name).expect("compute").proposer.heartbeat();
        self.deliver(name, actions);
    }

    fn disconnect(&mut self, name: u128, nodes: &[u64]) {
        let compute = self.computes.get_mut(&name).expect("compute");
        let actions = nodes.iter().flat_map(|node| compute.proposer.disconnected(NodeId(*node))).collect();
        self.deliver(name, actions);
    }

    /// All connections come up at the same moment.
    fn connect(&mut self, name: u128, nodes: &[u64]) {
        let compute = self.computes.get_mut(&name).expect("compute");
        let actions = nodes.iter().flat_map(|node| compute.proposer.connected(NodeId(*node))).collect();
        self.deliver(name, actions);
    }

    fn write(&mut self, name: u128, records: u32) {
        let pieces: Vec<Bytes> = (0..records).map(|n| make_record(Term(name as u64), n, 50).into()).collect();
        let actions = self.computes.get_mut(&name).expect("compute").proposer.append(pieces);
        self.deliver(name, actions);
    }

    fn deliver(&mut self, name: u128, actions: Vec<Action>) {
        self.deliver_some(name, actions, usize::MAX);
    }

    /// Delivers messages for so many round trips; the rest is lost.
    fn deliver_some(&mut self, name: u128, actions: Vec<Action>, round_trips: usize) {
        let compute = self.computes.get_mut(&name).expect("compute");
        let mut actions = actions;
        let mut done = 0;
        while !actions.is_empty() && done < round_trips {
            done += 1;
            let mut answers = Vec::new();
            for action in std::mem::take(&mut actions) {
                match action {
                    Action::Send { to, message } => {
                        let safekeeper = self.safekeepers.get_mut(&to).expect("safekeeper");
                        answers.extend(safekeeper.tell(message).into_iter().map(|answer| (to, answer)));
                    }
                    Action::RetryElection => actions.extend(compute.proposer.campaign()),
                    Action::NewerMembership { membership: Some(told), .. } => {
                        actions.extend(compute.proposer.set_membership(told));
                    }
                    event => compute.events.push(event),
                }
            }
            let started = compute.proposer.is_leader();
            compute.round_trips += usize::from(!started && !answers.is_empty());
            actions.extend(answers.into_iter().flat_map(|(from, answer)| compute.proposer.handle(from, answer)));
            actions.extend(compute.proposer.tell_commits(compute.proposer.commit_lsn()));
        }
    }

    fn started(&self, name: u128) -> Option<(Term, Lsn)> {
        self.computes[&name].events.iter().find_map(|event| match event {
            Action::Started { term, start_lsn } => Some((*term, *start_lsn)),
            _ => None,
        })
    }

    fn fenced(&self, name: u128) -> bool {
        self.computes[&name].events.iter().any(|event| matches!(event, Action::Fenced { .. }))
    }

    fn commit(&self, name: u128) -> Lsn {
        self.computes[&name].proposer.commit_lsn()
    }

    fn flushed(&self) -> [u64; 3] {
        [1, 2, 3].map(|n| self.safekeepers[&NodeId(n)].flush_lsn().0)
    }
}

#[test]
fn the_first_compute_starts_the_log_where_the_branch_starts() {
    let mut story = Story::new();
    story.compute(1, &[1, 2, 3]);
    assert_eq!(story.started(1), Some((Term(1), START)));
    assert_eq!(story.computes[&1].round_trips, 2, "a vote and the news of the election");
    story.write(1, 2);
    assert_eq!((story.commit(1), story.flushed()), (Lsn(1100), [1100; 3]));
}

#[test]
fn one_safekeeper_elects_nobody() {
    let mut story = Story::new();
    story.compute(1, &[2]);
    assert_eq!(story.started(1), None);
    story.connect(1, &[3]);
    assert_eq!(story.started(1).map(|(_, start)| start), Some(START));
}

#[test]
fn safekeepers_in_different_terms_are_brought_into_one() {
    let mut story = Story::new();
    for name in 1..=4 {
        story.compute(name, &[3]);
    }
    story.compute(5, &[1, 2, 3]);
    let (_, start) = story.started(5).expect("started");
    story.write(5, 1);
    assert_eq!((start, story.flushed()), (START, [1050; 3]), "the one that was ahead in terms takes part");
}

#[test]
fn a_newer_term_fences_an_older_one() {
    let mut story = Story::new();
    story.compute(1, &[1, 2, 3]);
    story.write(1, 1);
    story.compute(2, &[1, 2]);
    assert_eq!(story.started(2), Some((Term(2), Lsn(1050))));
    story.write(1, 1);
    assert!(story.fenced(1) && story.commit(1) == Lsn(1050));
    story.write(2, 2);
    // Safekeeper 3 took a record of the first compute that was never committed; it goes.
    assert_eq!((story.commit(2), story.flushed()), (Lsn(1150), [1150, 1150, 1100]));
    story.connect(2, &[3]);
    assert_eq!(story.flushed(), [1150; 3]);
    let bytes = |n| story.safekeepers[&NodeId(n)].disk.bytes.clone();
    assert!(bytes(1) == bytes(3));
}

#[test]
fn what_one_safekeeper_alone_holds_goes_when_logs_part() {
    let mut story = Story::new();
    story.compute(1, &[1, 2, 3]);
    story.write(1, 1);
    let disconnected = story.computes.get_mut(&1).expect("compute");
    disconnected.proposer.disconnected(NodeId(2));
    disconnected.proposer.disconnected(NodeId(3));
    story.write(1, 3);
    assert_eq!((story.commit(1), story.flushed()), (Lsn(1050), [1200, 1050, 1050]));
    story.compute(2, &[2, 3]);
    story.write(2, 1);
    story.connect(2, &[1]);
    assert_eq!((story.commit(2), story.flushed()), (Lsn(1100), [1100; 3]));
    let bytes = |n| story.safekeepers[&NodeId(n)].disk.bytes.clone();
    assert!(bytes(1) == bytes(2) && bytes(2) == bytes(3));
}

#[test]
fn a_lagging_safekeeper_is_filled_from_another() {
    let mut story = Story::new();
    story.compute(1, &[1, 2]);
    story.write(1, 9);
    // Another compute, which has nothing in memory; messages carry less than what is missing.
    story.compute(2, &[1, 2, 3]);
    assert_eq!((story.flushed(), story.commit(2)), ([1450; 3], Lsn(1450)));
}

#[test]
fn a_catch_up_that_is_cut_off_goes_on_where_it_was() {
    let mut story = Story::new();
    story.compute(1, &[1, 2]);
    story.write(1, 9);
    story.compute(2, &[1, 2]);
    let actions = story.computes.get_mut(&2).expect("compute").proposer.connected(NodeId(3));
    story.deliver_some(2, actions, 8);
    let reached = story.safekeepers[&NodeId(3)].flush_lsn();
    assert!(Lsn(1100) < reached && reached < Lsn(1450), "{reached}");
    story.disconnect(2, &[3]);
    story.connect(2, &[3]);
    assert_eq!(story.flushed(), [1450; 3]);
    assert_eq!(story.safekeepers[&NodeId(3)].disk.lowest_write_after(reached), Some(reached), "nothing came twice");
}

#[test]
fn damaged_wal_is_not_passed_on() {
    let mut story = Story::new();
    story.compute(1, &[1, 2]);
    story.write(1, 9);
    let good = story.safekeepers[&NodeId(1)].disk.bytes.clone();
    story.safekeepers.get_mut(&NodeId(2)).expect("safekeeper").disk.bytes[230] ^= 1;
    story.safekeepers.get_mut(&NodeId(1)).expect("safekeeper").disk.bytes[330] ^= 1;
    story.compute(2, &[1, 2, 3]);
    let damaged = story.computes[&2].events.iter().filter(|event| matches!(event, Action::Damaged { .. })).count();
    assert_eq!((damaged, story.flushed()), (2, [1450, 1450, 1300]), "both donors' good parts are taken");
    assert!(story.safekeepers[&NodeId(3)].disk.bytes[..300] == good[..300]);
}

#[test]
fn a_last_record_with_a_damaged_length_is_not_passed_on() {
    let mut story = Story::new();
    story.compute(1, &[1, 2]);
    story.write(1, 9);
    // It seems to go on where the second compute's own WAL begins.
    for node in [1, 2] {
        story.safekeepers.get_mut(&NodeId(node)).expect("safekeeper").disk.bytes[400] = 60;
    }
    story.compute(2, &[1, 2, 3]);
    let damaged = story.computes[&2].events.iter().filter(|event| matches!(event, Action::Damaged { .. })).count();
    assert_eq!((damaged, story.flushed()), (2, [1450, 1450, 1400]));
}

#[test]
fn a_safekeeper_left_behind_in_a_higher_term_is_brought_back() {
    let mut story = Story::new();
    story.compute(1, &[1, 2]);
    story.write(1, 2);
    // Candidates that are never heard of again.
    story.compute(2, &[3]);
    story.compute(3, &[3]);
    story.connect(1, &[3]);
    assert_eq!((story.flushed(), story.fenced(1)), ([1100, 1100, 0], false));
    for _ in 0..3 {
        assert_eq!(story.flushed(), [1100, 1100, 0], "the candidate gets some time");
        story.heartbeat(1);
    }
    assert_eq!(story.flushed(), [1100; 3]);
    // One of the first two may go now.
    story.disconnect(1, &[1]);
    story.write(1, 1);
    assert_eq!((story.commit(1), story.flushed(), story.fenced(1)), (Lsn(1150), [1100, 1150, 1150], false));
    assert_eq!(story.safekeepers[&NodeId(3)].acceptor.status().last_log_term, Term(3));
}

#[test]
fn a_candidate_that_wins_in_time_is_not_outvoted() {
    let mut story = Story::new();
    story.compute(1, &[1, 2]);
    story.write(1, 1);
    story.compute(2, &[3]);
    story.compute(3, &[3]);
    story.connect(1, &[3]);
    story.heartbeat(1);
    story.connect(3, &[2]);
    assert_eq!(story.started(3), Some((Term(2), Lsn(1050))));
    (0..5).for_each(|_| story.heartbeat(1));
    assert!(story.fenced(1));
    story.write(3, 1);
    assert_eq!(story.commit(3), Lsn(1100));
}

#[test]
fn what_is_held_under_a_term_that_came_to_nothing_does_not_count() {
    let mut story = Story::new();
    story.compute(1, &[1]);
    for name in 2..=4 {
        story.compute(name, &[2]);
    }
    // Compute 9 wins a term with 1 and 3, and 1 says that it follows, before 2 answers with its vote in a higher one.
    story.compute(9, &[]);
    let told = |story: &mut Story, node: u64, action: &Action| match action {
        Action::Send { to, message } if *to == NodeId(node) => {
            story.safekeepers.get_mut(to).expect("safekeeper").tell(message.clone())
        }
        _ => Vec::new(),
    };
    let pass = |story: &mut Story, node: u64, actions: &[Action]| {
        let answers: Vec<AcceptorMessage> = actions.iter().flat_map(|action| told(story, node, action)).collect();
        let proposer = &mut story.computes.get_mut(&9).expect("compute").proposer;
        answers.into_iter().flat_map(|answer| proposer.handle(NodeId(node), answer)).collect::<Vec<Action>>()
    };
    let connect =
        |story: &mut Story, node: u64| story.computes.get_mut(&9).expect("compute").proposer.connected(NodeId(node));
    let asked_first = connect(&mut story, 2);
    let asked = connect(&mut story, 1);
    pass(&mut story, 1, &asked);
    let asked = connect(&mut story, 3);
    let mut elected = pass(&mut story, 3, &asked);
    while elected.iter().any(|action| matches!(action, Action::Send { message: ProposerMessage::Vote(_), .. })) {
        elected = [pass(&mut story, 1, &elected), pass(&mut story, 3, &elected)].concat();
    }
    pass(&mut story, 1, &elected);
    assert!(!story.computes[&9].proposer.is_leader(), "3 has not answered");
    pass(&mut story, 2, &asked_first);
    story.computes.get_mut(&9).expect("compute").proposer.disconnected(NodeId(3));
    let asked = connect(&mut story, 3);
    let elected = pass(&mut story, 3, &asked);
    let asked_again =
        |action: &Action| matches!(action, Action::Send { to: NodeId(1), message: ProposerMessage::Vote(_) });
    assert!(elected.iter().any(asked_again), "1 has to hear of the new term: {elected:?}");
}

#[test]
fn wal_written_during_a_reelection_goes_out_after_it() {
    let mut story = Story::new();
    story.compute(1, &[1, 2]);
    story.write(1, 1);
    story.compute(2, &[3]);
    story.compute(3, &[3]);
    story.connect(1, &[3]);
    (0..2).for_each(|_| story.heartbeat(1));
    let proposer = &mut story.computes.get_mut(&1).expect("compute").proposer;
    let votes = proposer.heartbeat();
    assert!(proposer.is_leader() && proposer.commit_lsn() == Lsn(1050));
    assert_eq!(proposer.append([make_record(Term(1), 9, 50).into()]), []);
    assert_eq!(proposer.end_lsn(), Lsn(1100));
    story.deliver(1, votes);
    assert_eq!((story.commit(1), story.flushed()), (Lsn(1100), [1100; 3]));
}

#[test]
fn the_commit_position_is_stored_when_the_proposer_goes() {
    let mut story = Story::new();
    story.compute(1, &[1, 2, 3]);
    story.write(1, 2);
    let stored = |story: &Story| [1, 2, 3].map(|n| story.safekeepers[&NodeId(n)].disk.control.commit_lsn.0);
    assert_ne!(stored(&story), [1100; 3], "not with every commit");
    let actions = story.computes.get_mut(&1).expect("compute").proposer.finish();
    assert!(!story.computes[&1].proposer.is_finished());
    story.deliver(1, actions);
    assert!(story.computes[&1].proposer.is_finished());
    assert_eq!(stored(&story), [1100; 3]);
}

#[test]
fn the_commit_position_is_stored_when_the_connection_ends() {
    let mut safekeeper = one_with_wal();
    let ProposerMessage::Append(empty) = append(1, 1060, &[]) else { unreachable!() };
    safekeeper.tell(ProposerMessage::Append(Append { commit_lsn: Lsn(1060), ..empty }));
    assert_eq!(safekeeper.acceptor.end_batch(), [], "no write on the way of a commit");
    safekeeper.acceptor.proposer_gone();
    let effects = safekeeper.acceptor.end_batch();
    assert!(matches!(&effects[..], [Effect::Persist(state)] if state.commit_lsn == Lsn(1060)), "{effects:?}");
    safekeeper.acceptor.proposer_gone();
    assert_eq!(safekeeper.acceptor.end_batch(), [], "once is enough");
}

#[test]
fn shared_wal_is_kept_even_if_nobody_can_send_what_follows() {
    let mut story = Story::new();
    story.compute(1, &[1, 2, 3]);
    story.write(1, 2);
    let first = story.computes.get_mut(&1).expect("compute");
    first.proposer.disconnected(NodeId(3));
    story.write(1, 2);
    story.compute(2, &[1, 2]);
    let second = story.computes.get_mut(&2).expect("compute");
    second.proposer.disconnected(NodeId(1));
    second.proposer.disconnected(NodeId(2));
    // Safekeeper 3 has the first two records, committed ones; the fourth's end is where this term starts.
    story.connect(2, &[3]);
    assert_eq!(story.flushed(), [1200, 1200, 1100]);
    story.connect(2, &[1]);
    assert_eq!(story.flushed(), [1200; 3]);
}

fn elected(term: u64, proposer: u128, entries: &[(u64, u64)], start: StreamStart) -> ProposerMessage {
    let entries = entries.iter().map(|&(t, l)| TermStart { term: Term(t), start_lsn: Lsn(l) }).collect();
    let history = TermHistory::new(entries);
    let (proposer, term, generation) = (ProposerId(proposer), Term(term), MembershipGeneration::FIRST);
    let branch_start_lsn = Lsn(1000);
    ProposerMessage::Elected(Elected { proposer, term, history, start, generation, branch_start_lsn })
}

fn append(term: u64, begin: u64, wal: &[u8]) -> ProposerMessage {
    let boundary = Lsn(begin + wal.len() as u64);
    ProposerMessage::Append(Append {
        term: Term(term),
        begin: Lsn(begin),
        wal: Bytes::copy_from_slice(wal),
        boundary,
        commit_lsn: Lsn::INVALID,
        remote_consistent_lsn: Lsn::INVALID,
        generation: MembershipGeneration::FIRST,
        system_identifier: Some(7),
    })
}

fn vote(term: VoteTerm, proposer: u128) -> ProposerMessage {
    let (proposer, generation) = (ProposerId(proposer), MembershipGeneration::FIRST);
    ProposerMessage::Vote(Vote { proposer, term, system_identifier: Some(7), generation })
}

/// Voted for proposer 1 in term 1 and took 60 bytes of it.
fn one_with_wal() -> Safekeeper {
    let mut safekeeper = Safekeeper::new();
    safekeeper.tell(vote(VoteTerm::Next, 1));
    safekeeper.tell(elected(1, 1, &[(1, 1000)], StreamStart::Restart(START)));
    safekeeper.tell(append(1, 1000, &[7; 60]));
    assert_eq!(safekeeper.flush_lsn(), Lsn(1060));
    safekeeper
}

#[test]
fn a_term_has_one_vote() {
    let mut safekeeper = one_with_wal();
    let mut granted = |term, proposer| match &safekeeper.tell(vote(term, proposer))[..] {
        [AcceptorMessage::Vote(reply)] => (reply.granted, reply.term.0),
        other => panic!("{other:?}"),
    };
    assert_eq!(granted(VoteTerm::Exactly(Term(1)), 2), (false, 1));
    assert_eq!(granted(VoteTerm::Exactly(Term(1)), 1), (false, 1), "the term's winner is known");
    assert_eq!(granted(VoteTerm::Exactly(Term(4)), 2), (true, 4));
    assert_eq!(granted(VoteTerm::Exactly(Term(4)), 2), (true, 4), "said again");
    assert_eq!(granted(VoteTerm::Exactly(Term(3)), 1), (false, 4));
    assert_eq!(granted(VoteTerm::Next, 1), (true, 5));
    assert_eq!(safekeeper.disk.control.term, Term(5));
}

#[test]
fn nothing_of_an_older_term_is_taken() {
    let mut safekeeper = one_with_wal();
    safekeeper.tell(vote(VoteTerm::Next, 2));
    for message in [
        append(1, 1060, &[8; 10]),
        append(2, 1060, &[8; 10]),
        elected(1, 1, &[(1, 1000)], StreamStart::Continue(Lsn(1000))),
        ProposerMessage::Fetch(Fetch { term: Term(1), on_behalf_of: NodeId(9), begin: START, end: Lsn(1060) }),
    ] {
        let replies = safekeeper.tell(message);
        assert!(matches!(replies[..], [AcceptorMessage::Refused { term: Term(2), .. }]), "{replies:?}");
    }
    assert_eq!(safekeeper.disk.bytes, [7; 60]);
}

#[test]
fn late_news_of_an_election_takes_nothing_back() {
    let mut safekeeper = one_with_wal();
    safekeeper.tell(elected(1, 1, &[(1, 1000)], StreamStart::Continue(START)));
    safekeeper.tell(elected(1, 1, &[(1, 1000)], StreamStart::Restart(START)));
    assert_eq!((safekeeper.flush_lsn(), safekeeper.disk.bytes.len()), (Lsn(1060), 60));
}

#[test]
fn a_winner_can_only_cut_where_the_logs_part() {
    let mut safekeeper = one_with_wal();
    safekeeper.tell(vote(VoteTerm::Next, 2));
    for start in [StreamStart::Continue(Lsn(1030)), StreamStart::Continue(Lsn(1070)), StreamStart::Restart(Lsn(1050))] {
        let replies = safekeeper.tell(elected(2, 2, &[(1, 1000), (2, 1060)], start));
        assert!(matches!(replies[..], [AcceptorMessage::Refused { .. }]), "{replies:?}");
    }
    safekeeper.tell(elected(2, 2, &[(1, 1000), (2, 1040)], StreamStart::Continue(Lsn(1040))));
    assert_eq!((safekeeper.flush_lsn(), safekeeper.disk.bytes.len()), (Lsn(1040), 40));
}

#[test]
fn an_answer_comes_after_the_flush_and_one_flush_serves_many() {
    let mut safekeeper = one_with_wal();
    let acceptor = &mut safekeeper.acceptor;
    let mut effects = acceptor.handle(CONNECTION, append(1, 1060, &[1; 8]));
    effects.extend(acceptor.handle(CONNECTION, append(1, 1068, &[2; 8])));
    effects.extend(acceptor.handle(CONNECTION, append(1, 1064, &[9; 8])));
    effects.extend(acceptor.end_batch());
    let kinds: Vec<&str> = effects
        .iter()
        .map(|effect| match effect {
            Effect::WriteWal { .. } => "write",
            Effect::FlushWal => "flush",
            Effect::Reply { .. } => "reply",
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(kinds, ["write", "write", "flush", "reply"]);
}

#[test]
fn an_answer_to_an_append_is_about_its_own_term() {
    let mut safekeeper = one_with_wal();
    let acceptor = &mut safekeeper.acceptor;
    let mut effects = acceptor.handle(CONNECTION, append(1, 1060, &[1; 8]));
    effects.extend(acceptor.handle(CONNECTION, vote(VoteTerm::Exactly(Term(2)), 1)));
    effects.extend(acceptor.end_batch());
    let Some(Effect::Reply { message: AcceptorMessage::Append(reply), .. }) = effects.last() else {
        panic!("{effects:?}")
    };
    assert_eq!((reply.term, reply.flush_lsn), (Term(1), Lsn(1068)), "the log of term 2 is not here yet");
}

#[test]
fn wal_with_a_gap_and_a_foreign_cluster_are_refused() {
    let mut safekeeper = one_with_wal();
    assert!(matches!(safekeeper.tell(append(1, 1061, &[1; 8]))[..], [AcceptorMessage::Failed { .. }]));
    let generation = MembershipGeneration::FIRST;
    let foreign = Vote { proposer: ProposerId(3), term: VoteTerm::Next, system_identifier: Some(8), generation };
    assert!(matches!(safekeeper.tell(ProposerMessage::Vote(foreign))[..], [AcceptorMessage::Refused { .. }]));
    assert_eq!(safekeeper.acceptor.state().term, Term(1));
    let ProposerMessage::Append(next) = append(1, 1060, &[1; 8]) else { unreachable!() };
    let foreign = Append { system_identifier: Some(8), ..next.clone() };
    assert!(matches!(safekeeper.tell(ProposerMessage::Append(foreign))[..], [AcceptorMessage::Refused { .. }]));
    assert_eq!(safekeeper.flush_lsn(), Lsn(1060));
    let silent = Append { system_identifier: None, ..next };
    assert!(matches!(safekeeper.tell(ProposerMessage::Append(silent))[..], [AcceptorMessage::Append(_)]));
}

#[test]
fn whose_the_log_is_and_where_it_begins_is_remembered_once_told() {
    let mut safekeeper = Safekeeper::new();
    let generation = MembershipGeneration::FIRST;
    let unnamed = Vote { proposer: ProposerId(1), term: VoteTerm::Next, system_identifier: None, generation };
    safekeeper.tell(ProposerMessage::Vote(unnamed));
    assert!(!safekeeper.acceptor.state().branch_start_lsn.is_valid());
    safekeeper.tell(elected(1, 1, &[(1, 1000)], StreamStart::Restart(START)));
    assert_eq!(safekeeper.disk.control.branch_start_lsn, START, "stored with the history");
    assert_eq!(safekeeper.acceptor.state().system_identifier, None);
    let ProposerMessage::Append(first) = append(1, 1000, &[7; 60]) else { unreachable!() };
    safekeeper.tell(ProposerMessage::Append(Append { commit_lsn: Lsn(1060), ..first }));
    assert_eq!(safekeeper.acceptor.state().system_identifier, Some(7));
    assert_eq!(safekeeper.disk.control.system_identifier, None, "no write on the way of a commit");
    safekeeper.acceptor.proposer_gone();
    let effects = safekeeper.acceptor.end_batch();
    assert!(matches!(&effects[..], [Effect::Persist(state)] if state.system_identifier == Some(7)), "{effects:?}");
}

#[test]
fn part_of_a_record_counts_for_nothing() {
    let mut safekeeper = one_with_wal();
    let ProposerMessage::Append(whole) = append(1, 1060, &[1; 8]) else { unreachable!() };
    let replies = safekeeper.tell(ProposerMessage::Append(Append { boundary: Lsn(1060), ..whole }));
    assert!(
        matches!(replies[..], [AcceptorMessage::Append(r)] if (r.flush_lsn, r.received_lsn) == (Lsn(1060), Lsn(1068)))
    );
    safekeeper.tell(vote(VoteTerm::Next, 2));
    assert_eq!(safekeeper.disk.end(), Lsn(1060), "and goes with the next term");
}

fn joint(new: &[u64]) -> Membership {
    first_three().joint_with(members(new)).expect("joint")
}

fn generations(story: &Story) -> Vec<u64> {
    story.safekeepers.values().map(|safekeeper| safekeeper.disk.control.generation.0).collect()
}

#[test]
fn a_leader_goes_over_to_other_members_and_goes_on() {
    let mut story = Story::new();
    story.compute(1, &[1, 2, 3]);
    story.write(1, 2);
    story.join(&[4]);
    let joint = joint(&[1, 2, 4]);
    let proposer = &mut story.computes.get_mut(&1).expect("compute").proposer;
    let asked = proposer.set_membership(joint.clone());
    assert_eq!(proposer.lagging().len(), 4, "nothing is counted that was said under the older membership");
    story.deliver(1, asked);
    assert!(story.established(1, 2), "1 and 2 are a majority of both");
    story.connect(1, &[4]);
    assert_eq!(story.computes[&1].proposer.lagging(), []);
    assert_eq!(story.flushed_of(4), Lsn(1100), "from the proposer's memory");
    story.change(1, &joint.completed());
    story.tell(3, &joint.completed());
    story.write(1, 1);
    assert_eq!((story.commit(1), story.flushed_of(4), story.flushed_of(3)), (Lsn(1150), Lsn(1150), Lsn::INVALID));
    assert_eq!(generations(&story), [3, 3, 3, 3]);
    assert!(story.safekeepers[&NodeId(3)].disk.bytes.is_empty(), "who leaves forgets its log");
    // One of those that were there before may go now.
    story.disconnect(1, &[1]);
    story.write(1, 1);
    assert_eq!((story.commit(1), story.started(1)), (Lsn(1200), Some((Term(1), START))));
}

#[test]
fn a_joint_membership_commits_with_both_majorities_only() {
    let mut story = Story::new();
    story.compute(1, &[1, 2, 3]);
    story.join(&[4, 5, 6]);
    story.change(1, &joint(&[4, 5, 6]));
    story.write(1, 1);
    assert_eq!((story.commit(1), story.established(1, 2)), (START, false), "the old members alone");
    story.connect(1, &[4]);
    assert_eq!((story.commit(1), story.established(1, 2)), (START, false));
    story.disconnect(1, &[1, 2]);
    story.connect(1, &[5]);
    story.write(1, 1);
    assert_eq!((story.commit(1), story.established(1, 2)), (START, false), "the new members alone");
    story.connect(1, &[2]);
    assert_eq!((story.commit(1), story.established(1, 2)), (Lsn(1100), true));
}

#[test]
fn who_has_heard_of_a_newer_membership_takes_nothing_of_an_older_one() {
    let mut story = Story::new();
    story.compute(1, &[1, 2, 3]);
    story.write(1, 1);
    let joint = joint(&[1, 4, 5]);
    (1..=3).for_each(|node| story.tell(node, &joint));
    story.write(1, 1);
    assert_eq!(story.computes[&1].proposer.membership(), &joint, "it has learned of it by being refused");
    assert_eq!(story.commit(1), Lsn(1050));
    let safekeeper = story.safekeepers.get_mut(&NodeId(1)).expect("safekeeper");
    for message in [vote(VoteTerm::Next, 2), append(1, 1050, &[7; 50])] {
        let replies = safekeeper.tell(message);
        assert!(
            matches!(&replies[..], [AcceptorMessage::NewerMembership { membership: Some(told), .. }] if *told == joint)
        );
    }
    // It is heard of although the control plane does not reach the safekeeper itself.
    story.join(&[4, 5]);
    story.connect(1, &[4, 5]);
    assert!(story.established(1, 2) && story.commit(1) == Lsn(1100));
    assert_eq!(generations(&story), [2, 2, 2, 2, 2]);
    assert_eq!(story.safekeepers[&NodeId(4)].disk.control.membership, None, "only its number");
}

#[test]
fn an_idle_branch_moves_by_an_election() {
    let mut story = Story::new();
    story.compute(1, &[1, 2, 3]);
    story.write(1, 3);
    story.disconnect(1, &[1, 2, 3]);
    story.join(&[4, 5]);
    let joint = joint(&[3, 4, 5]);
    story.compute_of(2, &joint, &[1, 3, 4, 5]);
    assert!(story.established(2, 2) && story.flushed_of(5) == Lsn(1150));
    let last = joint.completed();
    (1..=5).for_each(|node| story.tell(node, &last));
    story.compute_of(3, &last, &[4, 5]);
    assert_eq!(story.started(3).map(|(_, start)| start), Some(Lsn(1150)), "without those who were there before");
    assert_eq!(story.flushed_of(1), Lsn::INVALID);
    // The first compute comes back: who left tells it of the newest membership, whose members are in a newer term.
    story.connect(1, &[1]);
    assert_eq!(story.computes[&1].proposer.membership(), &last);
    story.connect(1, &[3]);
    story.connect(1, &[4]);
    assert!(story.fenced(1));
}

#[test]
fn who_left_and_comes_back_has_no_log_but_its_terms() {
    let mut story = Story::new();
    story.compute(1, &[1, 2, 3]);
    story.write(1, 2);
    let joint = joint(&[1, 2]);
    story.change(1, &joint);
    story.change(1, &joint.completed());
    story.tell(3, &joint.completed());
    let left = story.safekeepers[&NodeId(3)].acceptor.state().clone();
    assert_eq!((left.term, left.flush_lsn, left.history.entries().len()), (Term(1), Lsn::INVALID, 0));
    let again = joint.completed().joint_with(members(&[1, 2, 3])).expect("joint");
    story.change(1, &again);
    story.connect(1, &[3]);
    story.change(1, &again.completed());
    story.write(1, 1);
    assert_eq!((story.flushed(), generations(&story)), ([1150; 3], vec![5, 5, 5]));
}

#[test]
fn doubtful_votes_are_told_apart_in_each_set_of_members() {
    let mut story = Story::new();
    story.compute(1, &[1, 2, 3]);
    story.write(1, 1);
    story.disconnect(1, &[3]);
    story.write(1, 1);
    story.disconnect(1, &[1, 2]);
    // Safekeeper 2 loses the last record; only 1 has it now.
    let disk = &mut story.safekeepers.get_mut(&NodeId(2)).expect("safekeeper").disk;
    let at = disk.bytes.len() - 1;
    disk.bytes[at] ^= 1;
    let recovered = disk.recover().expect("recover");
    assert!(recovered.doubtful);
    story.safekeepers.get_mut(&NodeId(2)).expect("safekeeper").acceptor = Acceptor::new(recovered);
    story.join(&[4, 5]);
    let joint = joint(&[3, 4, 5]);
    story.compute_of(2, &joint, &[2, 3, 4, 5]);
    assert_eq!(story.started(2), None, "a majority of the new members is sure, one of the old is not");
    story.connect(2, &[1]);
    assert_eq!(story.started(2).map(|(_, start)| start), Some(Lsn(1100)));
}

#[test]
fn a_change_can_be_taken_back() {
    let mut story = Story::new();
    story.compute(1, &[1, 2, 3]);
    story.join(&[4, 5, 6]);
    let joint = joint(&[4, 5, 6]);
    story.change(1, &joint);
    story.write(1, 1);
    assert_eq!(story.commit(1), START, "the new members are away");
    story.change(1, &joint.abandoned());
    assert_eq!((story.commit(1), story.established(1, 3)), (Lsn(1050), true));
}

#[test]
fn a_commit_is_told_with_the_next_wal_or_when_it_is_time() {
    let mut story = Story::new();
    story.compute(1, &[1, 2, 3]);
    let start = story.started(1).expect("started").1;
    let Story { safekeepers, computes } = &mut story;
    let proposer = &mut computes.get_mut(&1).expect("compute").proposer;
    // One round trip of each safekeeper; what comes of it.
    let mut write = |proposer: &mut Proposer<SimScanner>, number: u32| {
        let mut actions = proposer.append([make_record(Term(1), number, 50).into()]);
        let sent = std::mem::take(&mut actions).into_iter().filter_map(|action| match action {
            Action::Send { to, message } => Some((to, message)),
            _ => None,
        });
        for (to, message) in sent {
            let told = match &message {
                ProposerMessage::Append(append) => append.commit_lsn,
                other => panic!("{other:?}"),
            };
            for answer in safekeepers.get_mut(&to).expect("safekeeper").tell(message) {
                actions.extend(proposer.handle(to, answer));
            }
            actions.retain(|action| matches!(action, Action::Send { .. }));
            assert!(told < proposer.end_lsn());
        }
        actions
    };
    assert!(!proposer.has_untold_commit());
    assert_eq!(write(proposer, 1), [], "the commit is not told by itself");
    let first = proposer.commit_lsn();
    assert!(first > start && first == proposer.end_lsn() && proposer.has_untold_commit());
    assert_eq!(write(proposer, 2), []);
    assert_eq!(proposer.tell_commits(first), [], "all have heard of it with the WAL that came next");
    assert!(safekeepers.values().all(|safekeeper| safekeeper.acceptor.state().commit_lsn == first));
    let second = proposer.commit_lsn();
    let told = proposer.tell_commits(second);
    let all_tell = told.iter().all(
        |action| matches!(action, Action::Send { message: ProposerMessage::Append(append), .. } if append.commit_lsn == second && append.wal.is_empty()),
    );
    assert!(told.len() == 3 && all_tell && !proposer.has_untold_commit(), "{told:?}");
}
