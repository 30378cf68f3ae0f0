//! The life of a database on a local object store: made, used, asleep, awake, branched.

use std::time::Duration;

use e2e::{Cluster, ClusterOptions, processes, sql};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_sleeps_wakes_and_branches() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = life(&mut cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn life(cluster: &mut Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("life").await?;
    // A new project's compute is started at once, to make its role and database.
    api.wait_state(&project.id, &project.endpoint, "active", Duration::from_secs(30)).await?;
    let (status, _) =
        api.call("POST".parse()?, "/projects", Some(json!({"project": {"name": "x".repeat(500)}}))).await?;
    assert!((400..500).contains(&status), "an endless name is refused: {status}");

    sql::psql(&project.uri, "create table t(id int primary key, v text)").await?;
    sql::psql(&project.uri, "insert into t select g, repeat('x', g % 100) from generate_series(1, 20000) g").await?;
    assert_eq!(api.state(&project.id, &project.endpoint).await?, "active");
    let digest = "select md5(string_agg(t::text, ',' order by id)) from t";
    let before = sql::ask(&project.uri, digest).await?;

    api.suspend(&project.id, &project.endpoint).await?;
    assert!(processes::postgres_below(&cluster.runtime_dir()).is_empty(), "no postgres while asleep");
    assert!(!cluster.runtime_dir().join(&project.endpoint).exists(), "no compute directory while asleep");
    assert_eq!(sql::ask(&project.uri, digest).await?, before, "the same after a wake");

    // A point in time and a position, both before a delete.
    let client = sql::connect(&project.uri).await?;
    let lsn = sql::value(&client, "select pg_current_wal_flush_lsn()").await?;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let time = sql::value(
        &client,
        "select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')",
    )
    .await?;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    client.batch_execute("delete from t where id <= 5000").await?;
    drop(client);

    let count = "select count(*) from t";
    let at_lsn = api.create_branch(&project.id, json!({"parent_id": project.branch, "parent_lsn": lsn})).await?;
    let at_time =
        api.create_branch(&project.id, json!({"parent_id": project.branch, "parent_timestamp": time})).await?;
    let head = api.create_branch(&project.id, json!({"parent_id": project.branch})).await?;
    assert_eq!(sql::ask(&at_lsn.uri, digest).await?, before, "branch at an LSN");
    assert_eq!(sql::ask(&at_time.uri, digest).await?, before, "branch at a time");
    assert_eq!(sql::ask(&head.uri, count).await?, "15000", "branch from head");

    sql::psql(&head.uri, "insert into t values (0, 'only here')").await?;
    assert_eq!(sql::ask(&project.uri, count).await?, "15000", "the parent does not see its child's rows");
    // A branch of a branch.
    let grandchild = api.create_branch(&project.id, json!({"parent_id": head.id})).await?;
    assert_eq!(sql::ask(&grandchild.uri, count).await?, "15001", "a branch of a branch");

    let path = format!("/projects/{}/branches/{}", project.id, head.id);
    let (status, _) = api.call("DELETE".parse()?, &path, None).await?;
    assert!((400..500).contains(&status), "a branch with children is not deleted: {status}");
    assert_eq!(sql::ask(&head.uri, count).await?, "15001", "and keeps working");

    restart_everything(cluster, &project.uri, count).await
}

/// Ctrl-C, then `up` again: everything is there.
async fn restart_everything(cluster: &mut Cluster, uri: &str, count: &str) -> anyhow::Result<()> {
    cluster.down().await?;
    assert!(processes::postgres_below(&cluster.runtime_dir()).is_empty(), "no postgres after Ctrl-C");
    cluster.up().await?;
    assert_eq!(sql::ask(uri, count).await?, "15000", "there after a restart of everything");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_endpoint_is_put_to_sleep() -> anyhow::Result<()> {
    let cluster = Cluster::start(ClusterOptions::default()).await?;
    let api = cluster.api()?;
    let project = api.create_project("idle").await?;
    let path = format!("/projects/{}/endpoints/{}", project.id, project.endpoint);
    api.ok("PATCH".parse()?, &path, Some(json!({"endpoint": {"suspend_timeout_seconds": 2}}))).await?;

    let client = sql::connect(&project.uri).await?;
    client.batch_execute("begin; create table t(a int)").await?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(api.state(&project.id, &project.endpoint).await?, "active", "an open transaction keeps it awake");
    client.batch_execute("commit").await?;
    api.wait_state(&project.id, &project.endpoint, "idle", Duration::from_secs(20)).await?;
    assert_eq!(sql::ask(&project.uri, "select count(*) from t").await?, "0", "wakes again");
    Ok(())
}
