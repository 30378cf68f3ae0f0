//! The rules hold in every interleaving of small installations; a rule that is broken on purpose is found out.

use dormouse_safekeeper_model::{Quorum, setup::Setup};
use safekeeper_protocol::Mutation;
use stateright::{Checker, HasDiscoveries, Model};

const SAFETY: [&str; 4] =
    ["election safety", "log matching", "no committed record lost", "fenced proposers never commit"];

/// Looks at every state there is; how many.
fn holds(what: &str, model: Quorum) -> usize {
    let checker = model.checker().threads(2).spawn_bfs().join();
    let unique = checker.unique_state_count();
    println!("{what}: states={} unique={unique} depth={}", checker.state_count(), checker.max_depth());
    checker.assert_properties();
    unique
}

#[test]
fn one_proposer_through_any_crash() {
    let unique = holds("one proposer, one crash", Quorum { crashes: 1, ..Quorum::fresh(&[&[0, 1, 2]]) });
    assert!(unique > 10_000, "only {unique} states were looked at");
}

#[test]
fn two_proposers_with_overlapping_majorities() {
    let unique = holds("two proposers", Quorum::fresh(&[&[0, 1], &[1, 2]]));
    assert!(unique > 1_000, "only {unique} states were looked at");
}

#[test]
fn a_newer_term_over_a_lagging_safekeeper() {
    let model = Quorum { setup: Setup::OneLags, crashes: 1, ..Quorum::fresh(&[&[1, 2]]) };
    holds("a lagging safekeeper, one crash", model);
}

#[test]
fn logs_as_only_long_runs_leave_them() {
    for setup in [Setup::LongerButOlder, Setup::Figure8] {
        holds(&format!("{setup:?}, one crash"), Quorum { setup, crashes: 1, ..Quorum::fresh(&[&[0, 1]]) });
    }
}

#[test]
fn messages_of_a_lost_connection_arrive_at_any_time() {
    holds("two proposers, one loss", Quorum { records: 0, losses: 1, ..Quorum::fresh(&[&[0, 1], &[1, 2]]) });
}

/// Looks for a state that must not be, near the first one first.
fn found_out(mutation: Mutation, model: Quorum) {
    let model = Quorum { mutation: Some(mutation), ..model };
    let checker = model.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let found = SAFETY.iter().find_map(|property| Some((property, checker.discovery(property)?)));
    let Some((property, path)) = found else {
        panic!("{mutation:?} is not noticed in {} states", checker.unique_state_count())
    };
    let steps = path.into_actions();
    println!("{mutation:?} breaks \"{property}\" in {} steps, {} states:", steps.len(), checker.unique_state_count());
    steps.iter().for_each(|step| println!("    {step:?}"));
}

#[test]
fn committing_without_a_majority_is_found_out() {
    found_out(Mutation::CommitWithoutMajority, Quorum::fresh(&[&[0, 1]]));
}

#[test]
fn a_vote_that_is_not_stored_is_found_out() {
    found_out(Mutation::VoteNotStored, Quorum { crashes: 1, ..Quorum::fresh(&[&[0, 1], &[1, 2]]) });
}

#[test]
fn an_acknowledgement_before_the_flush_is_found_out() {
    found_out(Mutation::AcknowledgeUnflushed, Quorum { crashes: 1, ..Quorum::fresh(&[&[0, 1]]) });
}

#[test]
fn appends_of_an_old_term_are_found_out() {
    found_out(Mutation::AppendsOfOldTerms, Quorum::fresh(&[&[0, 1], &[1, 2]]));
}

#[test]
fn the_longest_log_instead_of_the_newest_is_found_out() {
    found_out(Mutation::LongestLogWins, Quorum { setup: Setup::LongerButOlder, ..Quorum::fresh(&[&[0, 1]]) });
}

#[test]
fn old_terms_committed_by_counting_are_found_out() {
    found_out(Mutation::CommitOldTermsByCounting, Quorum { setup: Setup::Figure8, ..Quorum::fresh(&[&[0, 1]]) });
}

#[test]
fn a_parted_log_that_is_kept_is_found_out() {
    found_out(Mutation::KeepPartedLog, Quorum { setup: Setup::LongerButOlder, ..Quorum::fresh(&[&[0, 1]]) });
}

#[test]
fn a_change_of_members_under_one_proposer() {
    for (members, new) in [(&[0][..], &[0, 1][..]), (&[0, 1], &[0]), (&[0], &[1])] {
        holds(&format!("{members:?} to {new:?}"), Quorum::changing(members, new, &[&[0, 1]]));
    }
}

#[test]
fn who_was_given_members_that_have_left_learns_of_the_others() {
    let model = Quorum { setup: Setup::Moved, crashes: 1, ..Quorum::changing(&[0], &[1], &[&[0, 1]]) };
    holds("a late proposer, one crash", model);
}

#[test]
fn an_acknowledged_byte_that_rots() {
    holds("one proposer, one rot", Quorum { setup: Setup::OneLags, rots: 1, ..Quorum::fresh(&[&[0, 1, 2]]) });
}

#[test]
fn committing_with_the_new_members_only_is_found_out() {
    found_out(Mutation::CommitWithNewMembersOnly, Quorum::changing(&[0], &[1], &[&[0, 1]]));
}

#[test]
fn acknowledgements_that_outlive_their_membership_are_found_out() {
    found_out(Mutation::KeepOldAcknowledgements, Quorum::changing(&[0], &[1], &[&[0, 1], &[0]]));
}

#[test]
fn a_membership_that_is_not_stored_is_found_out() {
    let model = Quorum { setup: Setup::Moved, crashes: 1, ..Quorum::changing(&[0], &[1], &[&[0]]) };
    found_out(Mutation::MembershipNotStored, model);
}

#[test]
fn a_membership_completed_before_it_is_established_is_found_out() {
    found_out(Mutation::CompleteUnestablished, Quorum::changing(&[0], &[1], &[&[0, 1]]));
}

#[test]
fn votes_of_those_who_lost_what_they_acknowledged_are_found_out() {
    found_out(Mutation::CountDoubtfulVotes, Quorum { setup: Setup::OneLags, rots: 1, ..Quorum::fresh(&[&[1, 2]]) });
}
