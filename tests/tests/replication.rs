//! Logical replication through the front door: a stock server follows a branch over the proxy, by a project user's name, and a
//! branch follows a stock server, while computes sleep, wake by themselves and crash.

use std::time::{Duration, Instant};

use anyhow::ensure;
use e2e::{Cluster, ClusterOptions, Project, sql, stock::StockServer};
use reqwest::Method;
use serde_json::json;
use tokio_postgres::Client;

const A_WHILE: Duration = Duration::from_secs(60);
const STARTED: &str = "select pg_postmaster_start_time()::text";
const ROWS: &str = "select format('%s %s %s', count(*), count(distinct i), sum(i)) from followed";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_go_out_of_and_into_branches_that_sleep_and_crash() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let mut stock = StockServer::create(&[("wal_level", "logical"), ("wal_retrieve_retry_interval", "500ms")])?;
    stock.start().await?;
    let outcome = follow(&cluster, &stock).await;
    outcome.map_err(|error| error.context(stock.log()).context(cluster.log()))?;
    stock.stop()?;
    cluster.down().await
}

async fn follow(cluster: &Cluster, stock: &StockServer) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("followed").await?;
    api.wait_state(&project.id, &project.endpoint, "active", A_WHILE).await?;
    let settings = json!({"endpoint": {"settings": {"pg_settings": {"wal_level": "logical"}}}});
    let endpoint = format!("/projects/{}/endpoints/{}", project.id, project.endpoint);
    api.ok(Method::PATCH, &endpoint, Some(settings)).await?;
    api.suspend(&project.id, &project.endpoint).await?;
    let peer = stock.connect("postgres").await?;
    out_of_the_branch(cluster, &project, &peer).await?;
    a_child_has_no_slots(cluster, &project).await?;
    into_the_branch(cluster, &project, stock, &peer).await
}

async fn out_of_the_branch(cluster: &Cluster, project: &Project, subscriber: &Client) -> anyhow::Result<()> {
    sql::psql(&project.uri, "create table followed (i bigint); insert into followed values (1)").await?;
    sql::psql(&project.uri, "create publication p for table followed").await?;
    subscriber.batch_execute("create table followed (i bigint)").await?;
    let subscribe = format!("create subscription s connection '{}' publication p", project.uri);
    subscriber.batch_execute(&subscribe).await?;
    sql::same_answers(&project.uri, subscriber, ROWS, A_WHILE).await?;
    for round in 2..5i64 {
        let insert = format!("insert into followed select {round} * 1000 + g from generate_series(1, 500) g");
        sql::psql(&project.uri, &insert).await?;
        let started = sql::ask(&project.uri, STARTED).await?;
        if round % 2 == 0 {
            // The subscriber comes back by itself, so soon that nobody sees the endpoint idle.
            let suspend = format!("/projects/{}/endpoints/{}/suspend", project.id, project.endpoint);
            cluster.api()?.ok(Method::POST, &suspend, None).await?;
        } else {
            cluster.kill_compute(&project.endpoint)?;
        }
        sql::same_answers(&project.uri, subscriber, ROWS, A_WHILE).await?;
        ensure!(sql::ask(&project.uri, STARTED).await? != started, "the compute did not start anew");
    }
    Ok(())
}

async fn a_child_has_no_slots(cluster: &Cluster, project: &Project) -> anyhow::Result<()> {
    let child = cluster.api()?.create_branch(&project.id, json!({"name": "child"})).await?;
    let slots = "select count(*) from pg_replication_slots";
    ensure!(sql::ask(&child.uri, slots).await? == "0", "a child has its parent's slot");
    ensure!(sql::ask(&project.uri, slots).await? == "1", "the parent has lost its slot");
    Ok(())
}

async fn into_the_branch(
    cluster: &Cluster,
    project: &Project,
    stock: &StockServer,
    publisher: &Client,
) -> anyhow::Result<()> {
    for statement in ["drop subscription s", "drop table followed"] {
        publisher.batch_execute(statement).await?;
    }
    publisher.batch_execute("create table followed (i bigint); create publication p for table followed").await?;
    sql::psql(&project.uri, "truncate followed").await?;
    // PostgreSQL 15 lets only superusers do this.
    let database = sql::ask(&project.uri, "select current_database()").await?;
    let admin = cluster.superuser(&project.endpoint, &database).await?;
    let connection = format!("host={} user=dormouse_admin dbname=postgres", stock.socket_dir().display());
    admin.batch_execute(&format!("create subscription t connection '{connection}' publication p")).await?;
    // The first copy of the table is not to be cut short: that may leave it unfinished on any server.
    let began = Instant::now();
    while sql::value(&admin, "select string_agg(srsubstate::text, '') from pg_subscription_rel").await? != "r" {
        ensure!(began.elapsed() < A_WHILE, "the table is not copied");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    admin.batch_execute("create table synced (i int)").await?;
    for round in 0..4i64 {
        let insert = format!("insert into followed select {round} * 1000 + g from generate_series(1, 500) g");
        publisher.batch_execute(&insert).await?;
        if round % 2 == 0 {
            cluster.kill_compute(&project.endpoint)?;
        } else {
            cluster.api()?.suspend(&project.id, &project.endpoint).await?;
        }
        sql::same_answers(&project.uri, publisher, ROWS, A_WHILE).await?;
    }
    Ok(())
}
