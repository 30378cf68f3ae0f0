//! `quorum-model`: the model with as much happening as is asked for, to the end or for a while.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use dormouse_safekeeper_model::Quorum;
use stateright::{Checker, Model};

/// Check the safekeeper protocol in every interleaving of a small installation.
#[derive(Parser)]
struct Arguments {
    /// A compute, by the safekeepers that it reaches ("123"); once for each. By default two, which reach 1, 2 and 2, 3
    #[arg(long = "proposer", value_parser = parse_reach)]
    proposers: Vec<Reach>,
    /// Safekeepers that are the branch's at first ("123")
    #[arg(long, default_value = "123", value_parser = parse_reach)]
    members: Reach,
    /// Those that are to be its members after a change ("124"); by default there is none
    #[arg(long, value_parser = parse_reach)]
    new_members: Option<Reach>,
    /// Records that each of them writes
    #[arg(long, default_value_t = 1)]
    records: usize,
    /// Terms, more than the proposers need
    #[arg(long, default_value_t = 0)]
    more_terms: u64,
    /// Crashes of safekeepers
    #[arg(long, default_value_t = 0)]
    crashes: usize,
    /// Lost connections
    #[arg(long, default_value_t = 0)]
    losses: usize,
    /// Heartbeats
    #[arg(long, default_value_t = 0)]
    heartbeats: usize,
    /// Times that a safekeeper loses the last byte which it acknowledged
    #[arg(long, default_value_t = 0)]
    rots: usize,
    /// Seconds after which it ends without having seen all
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

/// Safekeepers, from 0.
#[derive(Clone)]
struct Reach(Vec<usize>);

fn parse_reach(text: &str) -> Result<Reach, String> {
    let digit = |c: char| match c {
        '1'..='6' => Ok(c as usize - '1' as usize),
        other => Err(format!("{other} is none of the safekeepers 1 to 6")),
    };
    text.chars().map(digit).collect::<Result<_, _>>().map(Reach)
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let asked: Vec<&[usize]> = arguments.proposers.iter().map(|reach| &reach.0[..]).collect();
    let proposers = if asked.is_empty() { vec![&[0, 1][..], &[1, 2]] } else { asked };
    let model = Quorum {
        records: arguments.records,
        terms: proposers.len() as u64 + arguments.more_terms,
        crashes: arguments.crashes,
        losses: arguments.losses,
        heartbeats: arguments.heartbeats,
        rots: arguments.rots,
        members: arguments.members.0.clone(),
        new_members: arguments.new_members.as_ref().map(|reach| reach.0.clone()),
        ..Quorum::fresh(&proposers)
    };
    let (limit, began) = (Duration::from_secs(arguments.seconds), Instant::now());
    let checker = model.checker().threads(arguments.threads).timeout(limit).spawn_bfs().join();
    let mut broken = 0;
    for (property, path) in checker.discoveries() {
        let kind = checker.discovery_classification(property);
        println!("{kind}: {property}, after {} steps", path.into_actions().len());
        broken += usize::from(matches!(kind, stateright::DiscoveryClassification::Counterexample));
    }
    let complete = began.elapsed() < limit;
    let (states, unique) = (checker.state_count(), checker.unique_state_count());
    println!("states={states} unique={unique} depth={} complete={complete} broken={broken}", checker.max_depth());
    if broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
