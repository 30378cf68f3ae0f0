//! What befalls an installation, one thing after another.

use std::{collections::BTreeSet, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rand::{RngExt, rngs::StdRng, seq::SliceRandom};

use super::links::{Cut, Links, Ways};
use crate::{Cluster, processes};

/// A misfortune.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// One is killed; it is started again.
    KillSafekeeper,
    /// One or two can't do anything for a while.
    StopSafekeepers,
    /// An agent and its Postgres are killed.
    KillCompute,
    /// A compute can't do anything for a while.
    StopCompute,
    /// Safekeepers are cut off, from all or from the compute.
    Partition,
    /// A second compute is started for the branch.
    DoubleStart,
}

/// So often each comes in a round.
const ROUND: [(Fault, usize); 6] = [
    (Fault::KillSafekeeper, 2),
    (Fault::StopSafekeepers, 2),
    (Fault::KillCompute, 2),
    (Fault::StopCompute, 1),
    (Fault::Partition, 4),
    (Fault::DoubleStart, 2),
];

/// Rounds of faults, each shuffled.
#[derive(Default)]
pub struct Deck(Vec<Fault>);

impl Deck {
    /// The next one.
    pub fn draw(&mut self, rng: &mut StdRng) -> Fault {
        if self.0.is_empty() {
            self.0 = ROUND.iter().flat_map(|(fault, count)| std::iter::repeat_n(*fault, *count)).collect();
            self.0.shuffle(rng);
        }
        self.0.pop().unwrap_or(Fault::KillSafekeeper)
    }
}

/// How many processes were killed or stopped, and how many cuts held something back.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bitten {
    /// Processes.
    pub kills: usize,
    /// Cuts.
    pub partitions: usize,
}

impl std::ops::AddAssign for Bitten {
    fn add_assign(&mut self, other: Bitten) {
        self.kills += other.kills;
        self.partitions += other.partitions;
    }
}

/// Does it, but for [`Fault::DoubleStart`], which is not a moment's work.
pub async fn befall(cluster: &Cluster, links: &Links, fault: Fault, rng: &mut StdRng) -> anyhow::Result<Bitten> {
    let killed = |kills| Ok(Bitten { kills, partitions: 0 });
    let pause = Duration::from_millis(rng.random_range(200..3000));
    match fault {
        Fault::KillSafekeeper => {
            cluster.kill_service("safekeeper").await?;
            killed(1)
        }
        Fault::StopSafekeepers => {
            // A majority at the worst: commits wait.
            let mut safekeepers = processes::children_with(cluster.up_pid()?, "dormouse safekeeper");
            safekeepers.shuffle(rng);
            let count = rng.random_range(1..=2).min(safekeepers.len());
            let pids: Vec<i32> = safekeepers.iter().take(count).map(|process| process.pid).collect();
            stop_for_a_while(&pids, pause).await;
            killed(pids.len())
        }
        Fault::KillCompute => killed(kill_compute(cluster)),
        Fault::StopCompute => {
            let running = processes::postgres_below(&cluster.runtime_dir());
            let frozen: BTreeSet<i32> = running.iter().flat_map(|p| [p.parent, p.pid]).filter(|pid| *pid > 1).collect();
            stop_for_a_while(&Vec::from_iter(frozen.iter().copied()), pause).await;
            killed(usize::from(!frozen.is_empty()))
        }
        Fault::Partition => {
            let cut = any_cut(agent(cluster), rng);
            // Longer than some of the limits after which the silent are taken to be gone.
            let pause = Duration::from_millis(rng.random_range(300..8000));
            let meanwhile = if rng.random_bool(0.3) {
                [Fault::KillCompute, Fault::KillSafekeeper].get(rng.random_range(0..2)).copied()
            } else {
                None
            };
            cut_for_a_while(cluster, links, cut, pause, meanwhile).await
        }
        Fault::DoubleStart => killed(0),
    }
}

async fn cut_for_a_while(
    cluster: &Cluster,
    links: &Links,
    cut: Cut,
    pause: Duration,
    meanwhile: Option<Fault>,
) -> anyhow::Result<Bitten> {
    let before = links.held();
    let mut bitten = Bitten::default();
    let number = links.cut(cut);
    tokio::time::sleep(pause / 2).await;
    match meanwhile {
        Some(Fault::KillCompute) => bitten.kills += kill_compute(cluster),
        Some(_) => {
            cluster.kill_service("safekeeper").await?;
            bitten.kills += 1;
        }
        None => {}
    }
    tokio::time::sleep(pause / 2).await;
    links.heal(number);
    bitten.partitions += usize::from(links.held() > before);
    Ok(bitten)
}

/// One, two or all safekeepers, cut off from everybody or from one process, both ways or one.
fn any_cut(process: Option<i32>, rng: &mut StdRng) -> Cut {
    let mut safekeepers = vec![0, 1, 2];
    safekeepers.shuffle(rng);
    safekeepers.truncate(rng.random_range(1..=3));
    let ways = [Ways::Both, Ways::Requests, Ways::Answers][rng.random_range(0..3)];
    let process = process.filter(|_| rng.random_bool(0.5));
    Cut { safekeepers, process, ways, breaks: rng.random_bool(0.5) }
}

/// A process cut off from a majority, or from all.
pub fn isolating(process: i32, rng: &mut StdRng) -> Cut {
    let cut = any_cut(None, rng);
    let mut safekeepers = cut.safekeepers;
    safekeepers.extend((0..3).filter(|other| !safekeepers.contains(other)).collect::<Vec<_>>());
    safekeepers.truncate(rng.random_range(2..=3));
    Cut { safekeepers, process: Some(process), ..cut }
}

/// The agent of a compute that runs.
pub fn agent(cluster: &Cluster) -> Option<i32> {
    postmaster(cluster).map(|postmaster| postmaster.parent)
}

fn postmaster(cluster: &Cluster) -> Option<processes::Process> {
    processes::postgres_below(&cluster.runtime_dir()).into_iter().find(|process| process.command.contains(" -D "))
}

/// SIGSTOP, and SIGCONT after that time; those that have ended meanwhile are let be.
async fn stop_for_a_while(pids: &[i32], pause: Duration) {
    for pid in pids {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGSTOP);
    }
    tokio::time::sleep(pause).await;
    for pid in pids {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGCONT);
    }
}

/// Kills an agent and its Postgres, if one runs.
pub fn kill_compute(cluster: &Cluster) -> usize {
    let Some(postmaster) = postmaster(cluster) else { return 0 };
    let hit = [postmaster.parent, postmaster.pid].map(|pid| processes::kill_hard(pid).is_ok());
    hit.into_iter().filter(|hit| *hit).count()
}
