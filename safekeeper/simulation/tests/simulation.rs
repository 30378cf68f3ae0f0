//! Many random runs; and proof that they would notice if the rules were wrong.

use std::collections::BTreeMap;

use dormouse_safekeeper_simulation::{SimOptions, World};
use safekeeper_protocol::Mutation;

fn options(seed: u64) -> SimOptions {
    let members = if seed.is_multiple_of(4) { 5 } else { 3 };
    let computes = if seed.is_multiple_of(3) { 1 } else { 3 };
    SimOptions { seed, members, computes, steps: 4000, mutation: None, print: false }
}

#[test]
fn nothing_committed_is_ever_lost_or_changed() {
    let seeds = std::env::var("SIM_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(300);
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for seed in 0..seeds {
        let mut world = World::new(options(seed));
        if let Err(error) = world.run() {
            panic!("{error}");
        }
        for (what, count) in world.counts {
            *counts.entry(what).or_default() += count;
        }
    }
    println!("{counts:?}");
    for what in ["started", "committed", "fenced", "crash", "trim", "campaign", "reelected"] {
        assert!(counts.get(what).copied().unwrap_or_default() >= seeds / 10, "hardly any {what}: {counts:?}");
    }
}

/// For a look at one run: `SIM_SEED=18 cargo test ... print_one_run -- --ignored --nocapture`.
#[test]
#[ignore = "prints a run for people"]
fn print_one_run() {
    let seed = std::env::var("SIM_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    println!("{:?}", World::new(SimOptions { print: true, ..options(seed) }).run());
}

#[test]
fn a_seed_gives_the_same_run_twice() {
    for seed in [1, 4, 17] {
        let hash = || World::new(options(seed)).run().expect("run");
        assert_eq!(hash(), hash());
    }
    assert_ne!(World::new(options(1)).run(), World::new(options(2)).run());
}

fn finds(mutation: Mutation) -> Option<String> {
    (0..3000).find_map(|seed| World::new(SimOptions { mutation: Some(mutation), ..options(seed) }).run().err())
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
fn a_reelection_after_somebody_else_has_led_is_noticed() {
    println!("{}", finds(Mutation::ReelectAfterOthers).expect("must be noticed"));
}

#[test]
fn committing_old_terms_by_counting_is_noticed() {
    println!("{}", finds(Mutation::CommitOldTermsByCounting).expect("must be noticed"));
}
