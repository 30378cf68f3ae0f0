//! Pooled clients across the sleep of a real compute.

use std::time::Duration;

use anyhow::ensure;
use e2e::{Cluster, ClusterOptions, sql};
use futures::future::try_join_all;
use serde_json::json;

const CLIENTS: usize = 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_pooled_clients_let_the_compute_sleep_and_outlive_it() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    sleep_and_wake(&cluster).await.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn sleep_and_wake(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("pool").await?;
    let path = format!("/projects/{}/endpoints/{}", project.id, project.endpoint);
    api.ok("PATCH".parse()?, &path, Some(json!({"endpoint": {"suspend_timeout_seconds": 2}}))).await?;
    let uri = project.uri.replace(&project.endpoint, &format!("{}-pooler", project.endpoint));
    let clients = try_join_all((0..CLIENTS).map(|_| sql::connect(&uri))).await?;
    clients[0].batch_execute("set work_mem = '5MB'; create table t (a int)").await?;
    let insert = clients[0].prepare("insert into t values ($1)").await?;
    let listener = sql::connect(&uri).await?;
    listener.batch_execute("listen news").await?;

    for round in 0..2 {
        // The server connections are still open, and so is the one that listens: none of them is in use.
        api.wait_state(&project.id, &project.endpoint, "idle", Duration::from_secs(60)).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        ensure!(api.state(&project.id, &project.endpoint).await? == "idle", "idle clients woke it");
        let started = |client| sql::value(client, "select pg_postmaster_start_time()");
        let starts = try_join_all(clients.iter().map(started)).await?;
        ensure!(starts.iter().all(|start| *start == starts[0]), "one wake for all: {starts:?}");
        ensure!(sql::value(&clients[0], "show work_mem").await? == "5MB", "its settings are back");
        clients[0].execute(&insert, &[&round]).await?;
    }
    ensure!(sql::value(&clients[1], "select sum(a) from t").await? == "1", "both rows are there");
    // Who listened has lost its connection, and is told rather than left waiting.
    ensure!(listener.simple_query("select 1").await.is_err() && listener.is_closed(), "a lost LISTEN is said");
    Ok(())
}
