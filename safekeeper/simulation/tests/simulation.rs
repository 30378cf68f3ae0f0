//! Many random runs; and proof that they would notice if the rules were wrong.

use std::collections::BTreeMap;

use dormouse_safekeeper_simulation::{SimError, SimOptions, World};
use safekeeper_protocol::Mutation;

/// Runs each second seed, from the first one given.
fn run_half(first: u64, seeds: u64) -> BTreeMap<&'static str, u64> {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in (first..seeds).step_by(2) {
        let mut world = World::new(SimOptions::of_seed(seed));
        if let Err(error) = world.run() {
            panic!("{error}");
        }
        for (what, count) in world.counts {
            *counts.entry(what).or_default() += count;
        }
    }
    counts
}

#[test]
fn nothing_committed_is_ever_lost_or_changed() {
    let seeds = std::env::var("SIM_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2000);
    let other = std::thread::spawn(move || run_half(1, seeds));
    let mut counts = run_half(0, seeds);
    for (what, count) in other.join().expect("the other half") {
        *counts.entry(what).or_default() += count;
    }
    println!("{counts:?}");
    let often = [
        "started",
        "committed",
        "fenced",
        "crash",
        "trim",
        "campaign",
        "reelected",
        "refused",
        "parted",
        "rot",
        "joint",
        "completed",
        "abandoned",
        "established",
        "newer",
    ];
    for what in often {
        assert!(counts.get(what).copied().unwrap_or_default() >= seeds / 20, "hardly any {what}: {counts:?}");
    }
    assert!(counts.contains_key("damaged"), "rot was never met: {counts:?}");
}

#[test]
fn a_seed_gives_the_same_run_twice() {
    let hash = |seed| World::new(SimOptions { trace: true, ..SimOptions::of_seed(seed) }).run().expect("run");
    for seed in [1, 4, 17, 25] {
        assert_eq!(hash(seed), hash(seed));
    }
    assert_ne!(hash(1), hash(2));
}

fn finds(mutation: Mutation) -> Option<SimError> {
    (0..3000)
        .find_map(|seed| World::new(SimOptions { mutation: Some(mutation), ..SimOptions::of_seed(seed) }).run().err())
}

#[test]
fn committing_without_a_majority_is_noticed() {
    println!("{}", finds(Mutation::CommitWithoutMajority).expect("must be noticed"));
}

#[test]
fn choosing_the_longest_log_is_noticed() {
    println!("{}", finds(Mutation::LongestLogWins).expect("must be noticed"));
}

#[test]
fn votes_of_those_who_lost_what_they_acknowledged_are_noticed() {
    println!("{}", finds(Mutation::CountDoubtfulVotes).expect("must be noticed"));
}

#[test]
fn a_reelection_after_somebody_else_has_led_is_noticed() {
    println!("{}", finds(Mutation::ReelectAfterOthers).expect("must be noticed"));
}

#[test]
fn committing_old_terms_by_counting_is_noticed() {
    println!("{}", finds(Mutation::CommitOldTermsByCounting).expect("must be noticed"));
}

#[test]
fn a_membership_completed_before_it_is_established_is_noticed() {
    println!("{}", finds(Mutation::CompleteUnestablished).expect("must be noticed"));
}

#[test]
fn committing_with_the_new_members_only_is_noticed() {
    println!("{}", finds(Mutation::CommitWithNewMembersOnly).expect("must be noticed"));
}
