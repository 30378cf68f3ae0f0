//! What befalls safekeepers and computes, and what must hold afterwards.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{
    history,
    writers::{self, Ledger},
};
use crate::{Cluster, ClusterOptions, processes, sql};

const NUMBER_WRITERS: i64 = 4;
const LIST_WRITERS: u64 = 3;

/// What was seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Acknowledged commits.
    pub commits: usize,
    /// Processes killed or stopped.
    pub kills: usize,
    /// Acknowledged and not there.
    pub lost: usize,
    /// There, but refused or never tried.
    pub phantom: usize,
}

/// Runs an installation for so long. `seed` decides what happens, but not when clients write.
pub async fn run(duration: Duration, seed: u64) -> anyhow::Result<Figures> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = disturb(&cluster, duration, seed).await;
    let figures = outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await?;
    Ok(figures)
}

async fn disturb(cluster: &Cluster, duration: Duration, seed: u64) -> anyhow::Result<Figures> {
    let project = cluster.api()?.create_project("chaos").await?;
    writers::prepare(&project.uri).await?;
    let ledger = Ledger::new();
    let mut clients = Vec::new();
    for writer in 0..NUMBER_WRITERS {
        clients.push(tokio::spawn(writers::insert_numbers(ledger.clone(), project.uri.clone(), writer)));
    }
    for writer in 1..=LIST_WRITERS {
        clients.push(tokio::spawn(writers::append_to_lists(ledger.clone(), project.uri.clone(), writer)));
    }
    let (began, mut rng, mut kills) = (Instant::now(), StdRng::seed_from_u64(seed), 0);
    while began.elapsed() < duration {
        tokio::time::sleep(Duration::from_millis(rng.random_range(300..2500))).await;
        kills += befall(cluster, &mut rng).await?;
    }
    ledger.stop();
    for client in clients {
        client.await?;
    }
    ledger.read_all(&project.uri).await.context("reading the lists at the end")?;
    let history = ledger.history();
    println!("{} transactions on lists", history.len());
    tokio::task::spawn_blocking(move || history::check(&history)).await??;
    let (lost, phantom) = compare(&ledger, &project.uri).await?;
    Ok(Figures { commits: ledger.commits(), kills, lost, phantom })
}

/// One random misfortune; how many processes it hit.
async fn befall(cluster: &Cluster, rng: &mut StdRng) -> anyhow::Result<usize> {
    match rng.random_range(0..10) {
        0..3 => {
            cluster.kill_service("safekeeper").await?;
            Ok(1)
        }
        3..6 => {
            // A majority at the worst: commits wait.
            let safekeepers = processes::children_with(cluster.up_pid()?, "dormouse safekeeper");
            let count = rng.random_range(1..=2).min(safekeepers.len());
            let pids: Vec<i32> = safekeepers.iter().take(count).map(|process| process.pid).collect();
            stop_for_a_while(&pids, Duration::from_millis(rng.random_range(200..3000))).await;
            Ok(pids.len())
        }
        6..9 => kill_compute(cluster),
        _ => {
            let frozen: Vec<i32> =
                processes::postgres_below(&cluster.runtime_dir()).iter().flat_map(|p| [p.parent, p.pid]).collect();
            let frozen: BTreeSet<i32> = frozen.into_iter().filter(|pid| *pid > 1).collect();
            let pids: Vec<i32> = frozen.into_iter().collect();
            stop_for_a_while(&pids, Duration::from_millis(rng.random_range(200..3000))).await;
            Ok(1)
        }
    }
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
fn kill_compute(cluster: &Cluster) -> anyhow::Result<usize> {
    let running = processes::postgres_below(&cluster.runtime_dir());
    let Some(postmaster) = running.iter().find(|process| process.command.contains(" -D ")) else { return Ok(0) };
    let hit = [postmaster.parent, postmaster.pid].map(|pid| processes::kill_hard(pid).is_ok());
    Ok(hit.into_iter().filter(|hit| *hit).count())
}

/// How many acknowledged numbers are missing, and how many are there that can't be.
async fn compare(ledger: &Ledger, uri: &str) -> anyhow::Result<(usize, usize)> {
    let client = sql::connect(uri).await?;
    let rows = client.query("select n from numbers", &[]).await?;
    let there: BTreeSet<i64> = rows.iter().map(|row| row.get(0)).collect();
    ensure!(there.len() == rows.len(), "a primary key is there twice");
    let numbers = ledger.numbers();
    let lost = numbers.acknowledged.difference(&there).count();
    let known = |number: &&i64| numbers.acknowledged.contains(*number) || numbers.unknown.contains(*number);
    let phantoms: Vec<&i64> = there.iter().filter(|number| !known(number)).collect();
    for number in &phantoms {
        let said = numbers.refused.get(number).map_or("nobody tried it", String::as_str);
        println!("{number} is there, but was refused: {said}");
    }
    Ok((lost, phantoms.len()))
}
