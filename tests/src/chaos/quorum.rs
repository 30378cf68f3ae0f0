//! A run: clients, faults, and what must hold during and after them.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use types::{BranchId, BranchRef, ProjectId};

use super::{
    faults::{self, Bitten, Deck, Fault},
    history,
    links::Links,
    second::SecondCompute,
    writers::{self, Door, Ledger},
};
use crate::{Cluster, ClusterOptions, Project, processes, sql};

const NUMBER_WRITERS: i64 = 4;
const LIST_WRITERS: u64 = 3;
/// Writers of second computes are numbered from here on.
const FIRST_OF_SECONDS: usize = 100;
/// Once the network is whole: how soon one of two computes must have ended, and a client that comes through the proxy must have
/// committed something again.
const RECOVERY_LIMIT: Duration = Duration::from_secs(60);

/// What was seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Acknowledged commits.
    pub commits: usize,
    /// Processes killed or stopped.
    pub kills: usize,
    /// Times that safekeepers were cut off and something was held back.
    pub partitions: usize,
    /// Second computes that became ready.
    pub double_starts: usize,
    /// Commits that second computes acknowledged, to their own clients.
    pub second_commits: usize,
    /// Acknowledged and not there.
    pub lost: usize,
    /// There, but refused or never tried.
    pub phantom: usize,
}

/// Runs an installation for so long, or up to thrice as long until each kind of misfortune has happened. `seed` decides what happens,
/// but not when clients write.
pub async fn run(duration: Duration, seed: u64) -> anyhow::Result<Figures> {
    let mut cluster = Cluster::prepare(ClusterOptions::default())?;
    let links = Links::to(&cluster.safekeepers()).await?;
    cluster.reach_safekeepers_at(links.addresses());
    cluster.up().await?;
    let outcome = disturb(&cluster, &links, duration, seed).await;
    let figures = outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await?;
    Ok(figures)
}

async fn disturb(cluster: &Cluster, links: &Links, duration: Duration, seed: u64) -> anyhow::Result<Figures> {
    let project = cluster.api()?.create_project("chaos").await?;
    writers::prepare(&project.uri).await?;
    let ledger = Ledger::new();
    let mut clients = Vec::new();
    let door = Door::Proxy(project.uri.clone());
    for writer in 0..NUMBER_WRITERS {
        clients.push(tokio::spawn(writers::insert_numbers(ledger.clone(), door.clone(), writer)));
    }
    for writer in 1..=LIST_WRITERS {
        clients.push(tokio::spawn(writers::append_to_lists(ledger.clone(), door.clone(), writer)));
    }
    let mut disturbance = Disturbance::new(cluster, links, &project, ledger.clone(), seed)?;
    let began = Instant::now();
    while began.elapsed() < duration || (!disturbance.has_seen_all() && began.elapsed() < 3 * duration) {
        disturbance.next().await?;
    }
    ledger.stop();
    for client in clients {
        client.await?;
    }
    ledger.read_all(&project.uri).await.context("reading the lists at the end")?;
    let history = ledger.history();
    println!("{} transactions on lists; cuts held something back {} times", history.len(), links.held());
    tokio::task::spawn_blocking(move || history::check(&history)).await??;
    let (lost, phantom) = compare(&ledger, &project.uri).await?;
    let Disturbance { bitten: Bitten { kills, partitions }, double_starts, second_commits, .. } = disturbance;
    Ok(Figures { commits: ledger.commits(), kills, partitions, double_starts, second_commits, lost, phantom })
}

/// What happens to one installation.
struct Disturbance<'a> {
    cluster: &'a Cluster,
    links: &'a Links,
    ledger: Arc<Ledger>,
    branch: BranchRef,
    database: String,
    rng: StdRng,
    deck: Deck,
    bitten: Bitten,
    double_starts: usize,
    second_commits: usize,
}

impl<'a> Disturbance<'a> {
    fn new(
        cluster: &'a Cluster,
        links: &'a Links,
        project: &Project,
        ledger: Arc<Ledger>,
        seed: u64,
    ) -> anyhow::Result<Disturbance<'a>> {
        // A branch that was never restored is called the same in storage.
        let branch = BranchRef { project: ProjectId::new(&project.id)?, branch: BranchId::new(&project.branch)? };
        let config: tokio_postgres::Config = project.uri.parse()?;
        let database = config.get_dbname().context("a database")?.to_owned();
        let (rng, deck, bitten) = (StdRng::seed_from_u64(seed), Deck::default(), Bitten::default());
        let (double_starts, second_commits) = (0, 0);
        Ok(Disturbance { cluster, links, ledger, branch, database, rng, deck, bitten, double_starts, second_commits })
    }

    fn has_seen_all(&self) -> bool {
        self.bitten.kills > 0 && self.bitten.partitions > 0 && self.second_commits > 0
    }

    async fn next(&mut self) -> anyhow::Result<()> {
        tokio::time::sleep(Duration::from_millis(self.rng.random_range(300..2500))).await;
        match self.deck.draw(&mut self.rng) {
            Fault::DoubleStart => self.double_start().await,
            fault => self.befall(fault).await,
        }
    }

    async fn befall(&mut self, fault: Fault) -> anyhow::Result<()> {
        self.bitten += faults::befall(self.cluster, self.links, fault, &mut self.rng).await?;
        Ok(())
    }

    /// A second compute, and clients of its own; the first may be cut off from the safekeepers meanwhile, and not know of it, or be
    /// about to be started anew. At the end one of the two is left, and the proxy's clients have one that is right.
    async fn double_start(&mut self) -> anyhow::Result<()> {
        let first = faults::agent(self.cluster);
        let held = self.links.held();
        let cut = match (self.rng.random_range(0..4), first) {
            (0 | 1, Some(first)) => Some(self.links.cut(faults::isolating(first, &mut self.rng))),
            (2, _) => {
                self.bitten.kills += faults::kill_compute(self.cluster);
                None
            }
            _ => None,
        };
        let second = SecondCompute::start(self.cluster, &self.branch, self.links.addresses()).await?;
        let second_pid = second.as_ref().map(|second| second.pid);
        let closed = Arc::new(AtomicBool::new(false));
        let clients = second.as_ref().map(|second| self.clients_of(second, &closed));
        if clients.is_some() {
            self.double_starts += 1;
            tokio::time::sleep(Duration::from_millis(self.rng.random_range(300..3000))).await;
            if self.rng.random_bool(0.5) {
                let also = [Fault::KillSafekeeper, Fault::StopSafekeepers, Fault::KillCompute, Fault::Partition];
                let fault = also[self.rng.random_range(0..also.len())];
                self.befall(fault).await?;
            }
        }
        if let Some(cut) = cut {
            self.links.heal(cut);
            self.bitten.partitions += usize::from(self.links.held() > held);
        }
        if let (Some(first), Some(second)) = (first, second_pid) {
            let one_left = || !processes::is_alive(first) || !processes::is_alive(second);
            processes::wait_until("one of two computes to end", RECOVERY_LIMIT, one_left).await?;
        }
        self.proxied_clients_commit().await?;
        if let Some(mut second) = second {
            second.ended(RECOVERY_LIMIT).await?;
        }
        closed.store(true, Ordering::SeqCst);
        if let Some((numbers, lists)) = clients {
            self.second_commits += numbers.await? + lists.await?;
        }
        Ok(())
    }

    /// Clients that know nothing but the second compute.
    fn clients_of(
        &self,
        second: &SecondCompute,
        closed: &Arc<AtomicBool>,
    ) -> (tokio::task::JoinHandle<usize>, tokio::task::JoinHandle<usize>) {
        let (directory, database) = (second.directory.clone(), self.database.clone());
        let door = Door::Socket { directory, database, closed: Arc::clone(closed) };
        let writer = FIRST_OF_SECONDS + 2 * self.double_starts;
        let numbers = writers::insert_numbers(Arc::clone(&self.ledger), door.clone(), writer as i64);
        let lists = writers::append_to_lists(Arc::clone(&self.ledger), door, writer as u64 + 1);
        (tokio::spawn(numbers), tokio::spawn(lists))
    }

    /// Waits until clients that come through the proxy have committed something from now on.
    async fn proxied_clients_commit(&self) -> anyhow::Result<()> {
        let before = self.proxied_commits();
        let committed = || self.proxied_commits() > before;
        processes::wait_until("a commit through the proxy", RECOVERY_LIMIT, committed).await
    }

    fn proxied_commits(&self) -> usize {
        self.ledger.acknowledged_below((FIRST_OF_SECONDS as i64) << 32)
    }
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
