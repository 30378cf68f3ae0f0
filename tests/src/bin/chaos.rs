//! `make chaos`: an installation of real processes, disturbed at random.

use std::{process::ExitCode, time::Duration};

use clap::{Parser, ValueEnum};

/// Disturb a whole installation and look whether anything acknowledged is lost.
#[derive(Parser)]
struct Arguments {
    /// What is disturbed.
    #[arg(long, value_enum, default_value_t = Name::Quorum)]
    name: Name,
    /// For so long.
    #[arg(long, default_value_t = 1800)]
    seconds: u64,
    /// Decides what happens, but not when clients write.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Name {
    /// Safekeepers and computes, and the network between them.
    Quorum,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let Name::Quorum = arguments.name;
    match e2e::chaos::run(Duration::from_secs(arguments.seconds), arguments.seed).await {
        Ok(figures) => {
            let e2e::chaos::Figures { commits, kills, partitions, double_starts, second_commits, lost, phantom } =
                figures;
            println!("second_commits={second_commits}");
            println!(
                "commits={commits} kills={kills} partitions={partitions} double_starts={double_starts} lost={lost} \
                 phantom={phantom}"
            );
            if lost + phantom == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("chaos failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}
