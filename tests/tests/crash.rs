//! Processes die at bad moments; what was acknowledged stays.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI32, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use e2e::{Cluster, ClusterOptions, processes, sql};

/// Inserts numbers, reconnecting whenever the connection breaks; `acknowledged` counts the confirmed ones.
async fn write_stubbornly(uri: String, acknowledged: Arc<AtomicI32>, stop: Arc<AtomicBool>) {
    let mut number = 0;
    while !stop.load(Ordering::SeqCst) {
        let Ok(client) = sql::connect(&uri).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        while !stop.load(Ordering::SeqCst) {
            number += 1;
            if client.execute("insert into acks values ($1)", &[&number]).await.is_err() {
                break;
            }
            acknowledged.fetch_add(1, Ordering::SeqCst);
        }
    }
}

async fn count(uri: &str) -> anyhow::Result<i32> {
    Ok(sql::ask(uri, "select count(*) from acks").await?.parse()?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = kill_everything_in_turn(&mut cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn kill_everything_in_turn(cluster: &mut Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("crash").await?;
    sql::psql(&project.uri, "create table acks(n int primary key)").await?;
    let acknowledged = Arc::new(AtomicI32::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn(write_stubbornly(project.uri.clone(), acknowledged.clone(), stop.clone()));

    for victim in ["safekeeper", "pageserver", "compute", "control-plane", "proxy", "compute"] {
        let before = acknowledged.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(700)).await;
        if victim == "compute" {
            kill_compute(cluster)?;
        } else {
            cluster.kill_service(victim).await?;
        }
        let progress = || acknowledged.load(Ordering::SeqCst) > before + 20;
        processes::wait_until(&format!("writes to go on after {victim} was killed"), Duration::from_secs(60), progress)
            .await?;
    }
    stop.store(true, Ordering::SeqCst);
    writer.await?;
    let there = count(&project.uri).await?;
    let wanted = acknowledged.load(Ordering::SeqCst);
    assert!(there >= wanted, "{there} rows are there, {wanted} were acknowledged");
    // A row whose acknowledgement was lost with its connection may be there too: one for each break, no more.
    assert!(there <= wanted + 20, "{there} rows are there, only {wanted} were acknowledged");
    Ok(())
}

fn kill_compute(cluster: &Cluster) -> anyhow::Result<()> {
    let all = processes::postgres_below(&cluster.runtime_dir());
    let postmaster = all.iter().find(|p| p.command.contains(" -D ")).context("no postmaster")?;
    processes::kill_hard(postmaster.parent)?;
    let _ = processes::kill_hard(postmaster.pid);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_safekeeper_of_three_may_be_away() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = safekeeper_away(&mut cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn safekeeper_away(cluster: &mut Cluster) -> anyhow::Result<()> {
    let project = cluster.api()?.create_project("away").await?;
    sql::psql(&project.uri, "create table t as select generate_series(1, 1000) g").await?;
    let up = cluster.up_pid()?;
    let safekeepers = processes::children_with(up, "dormouse safekeeper");
    assert_eq!(safekeepers.len(), 3);
    let stopped = nix::unistd::Pid::from_raw(safekeepers[0].pid);
    let other = nix::unistd::Pid::from_raw(safekeepers[1].pid);
    use nix::sys::signal::{Signal, kill};

    kill(stopped, Signal::SIGSTOP)?;
    sql::psql(&project.uri, "insert into t select generate_series(1001, 50000)").await?;
    // With a second one away there is no quorum: a commit waits, and goes through when it is back.
    kill(other, Signal::SIGSTOP)?;
    let uri = project.uri.clone();
    let waiting = tokio::spawn(async move { sql::psql(&uri, "insert into t values (0)").await });
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!waiting.is_finished(), "no commit without a quorum");
    kill(stopped, Signal::SIGCONT)?;
    let committed = tokio::time::timeout(Duration::from_secs(30), waiting).await;
    kill(other, Signal::SIGCONT)?;
    committed.context("the commit never came")???;
    assert_eq!(sql::ask(&project.uri, "select count(*) from t").await?, "50001");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_whole_installation_may_die_at_once() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = die_at_once(&mut cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn die_at_once(cluster: &mut Cluster) -> anyhow::Result<()> {
    let project = cluster.api()?.create_project("power-cut").await?;
    sql::psql(&project.uri, "create table t as select generate_series(1, 12345) g").await?;
    cluster.power_cut().await?;
    cluster.up().await?;
    assert_eq!(sql::ask(&project.uri, "select count(*) from t").await?, "12345");
    Ok(())
}
