//! `quorum-sim`: many seeds, or one that is told step by step.

use std::process::ExitCode;

use clap::Parser;
use dormouse_safekeeper_simulation::{SimError, SimOptions, World};

/// Run the safekeepers' consensus on faulty disks and networks, by seeds
#[derive(Parser)]
struct Arguments {
    /// Run this seed alone and print what happens
    #[arg(long)]
    seed: Option<u64>,
    /// Run so many seeds, from 0
    #[arg(long, default_value_t = 3000)]
    seeds: u64,
}

#[derive(Default)]
struct Totals {
    seeds: u64,
    steps: u64,
    lost: u64,
    diverged: u64,
    others: u64,
}

impl Totals {
    /// Runs one seed and notes how it went.
    fn run(&mut self, options: SimOptions) {
        let mut world = World::new(options);
        let outcome = world.run();
        self.seeds += 1;
        self.steps += world.steps_done();
        match outcome {
            Ok(hash) if options.print => println!("trace={hash:016x}"),
            Ok(_) => {}
            Err(error) => {
                println!("{error}");
                match error {
                    SimError::Lost(_) => self.lost += 1,
                    SimError::Diverged(_) => self.diverged += 1,
                    SimError::Stuck(_) | SimError::Wrong(_) => self.others += 1,
                }
            }
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut totals = Totals::default();
    match arguments.seed {
        Some(seed) => totals.run(SimOptions { print: true, trace: true, ..SimOptions::of_seed(seed) }),
        None => (0..arguments.seeds).for_each(|seed| totals.run(SimOptions::of_seed(seed))),
    }
    let Totals { seeds, steps, lost, diverged, others } = totals;
    if others > 0 {
        println!("{others} seeds were stuck or went wrong");
    }
    println!("seeds={seeds} steps={steps} lost={lost} diverged={diverged}");
    if lost + diverged + others == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
