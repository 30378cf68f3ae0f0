//! Safekeepers are replaced and removed while a compute commits, and while another sleeps.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, ensure};
use e2e::{Cluster, ClusterOptions, processes, sql};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::task::JoinHandle;

const COUNT: &str = "select count(*) from t";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_safekeeper_is_replaced_and_nothing_is_lost() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = replaced(&cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn replaced(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let (busy, asleep) = (api.create_project("busy").await?, api.create_project("asleep").await?);
    sql::psql(&asleep.uri, "create table t as select generate_series(1, 1000) a").await?;
    api.suspend(&asleep.id, &asleep.endpoint).await?;
    sql::psql(&busy.uri, "create table t (a bigint)").await?;
    let writer = Writer::start(&busy.uri).await?;

    let fourth = cluster.another_safekeeper(4)?;
    let said = cluster.command_line(&["safekeepers", "replace", "2", "4", &fourth.address]).await?;
    let listed = cluster.command_line(&["safekeepers", "list"]).await?;
    ensure!(listed.contains(&fourth.address), "{said}{listed}");
    let before = writer.committed();
    processes::wait_until("commits to go on", Duration::from_secs(20), || writer.committed() > before + 20).await?;

    // Of 1, 2 and 3 only one is left: whatever is committed or read now the fourth has.
    let stopped = [Stopped::service(cluster, "safekeeper-1")?, Stopped::service(cluster, "safekeeper-2")?];
    let before = writer.committed();
    processes::wait_until("the fourth to count", Duration::from_secs(30), || writer.committed() > before + 20).await?;
    let committed = writer.stop().await?;
    ensure!(sql::ask(&busy.uri, COUNT).await? == committed.to_string());
    api.suspend(&busy.id, &busy.endpoint).await?;
    ensure!(sql::ask(&busy.uri, COUNT).await? == committed.to_string(), "after a sleep");
    ensure!(sql::ask(&asleep.uri, COUNT).await? == "1000", "the one that slept meanwhile");
    sql::psql(&asleep.uri, "insert into t values (0)").await?;
    drop(stopped);

    // Back to one fewer.
    cluster.command_line(&["safekeepers", "remove", "3"]).await?;
    sql::psql(&busy.uri, "insert into t values (0)").await?;
    ensure!(sql::ask(&busy.uri, COUNT).await? == (committed + 1).to_string());
    ensure!(sql::ask(&asleep.uri, COUNT).await? == "1001");
    let last = cluster.command_line(&["safekeepers", "remove", "1"]).await;
    let last = last.and(cluster.command_line(&["safekeepers", "remove", "4"]).await);
    ensure!(last.is_err(), "the last one can't be removed");
    Ok(())
}

/// Commits row after row over one connection.
struct Writer {
    committed: Arc<AtomicI64>,
    stop: Arc<AtomicBool>,
    running: JoinHandle<anyhow::Result<()>>,
}

impl Writer {
    async fn start(uri: &str) -> anyhow::Result<Writer> {
        let client = sql::connect(uri).await?;
        let (committed, stop) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, stopping) = (committed.clone(), stop.clone());
        let running = tokio::spawn(async move {
            while !stopping.load(Ordering::Relaxed) {
                let next = count.load(Ordering::Relaxed) + 1;
                client.execute("insert into t values ($1)", &[&next]).await.context("a commit failed")?;
                count.store(next, Ordering::Relaxed);
            }
            Ok(())
        });
        Ok(Writer { committed, stop, running })
    }

    fn committed(&self) -> i64 {
        self.committed.load(Ordering::Relaxed)
    }

    /// How many rows there must be.
    async fn stop(self) -> anyhow::Result<i64> {
        self.stop.store(true, Ordering::Relaxed);
        self.running.await??;
        Ok(self.committed.load(Ordering::Relaxed))
    }
}

/// A service that stands still until this is dropped.
struct Stopped(Pid);

impl Stopped {
    fn service(cluster: &Cluster, name: &str) -> anyhow::Result<Stopped> {
        let found = processes::children_with(cluster.up_pid()?, name);
        let process = found.first().with_context(|| format!("no process of {name}"))?;
        let pid = Pid::from_raw(process.pid);
        kill(pid, Signal::SIGSTOP)?;
        Ok(Stopped(pid))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}
