//! How far back a branch reaches: its project's window, positions by time, leases, branches of branches.

use std::time::Duration;

use e2e::{Cluster, ClusterOptions, api::text, sql};
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_reaches_as_far_as_the_window_and_leases_say() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = window(&cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn window(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("window").await?;
    let path = format!("/projects/{}", project.id);
    let shown = api.ok("GET".parse()?, &path, None).await?;
    assert_eq!(shown["project"]["history_retention_seconds"], 7 * 86_400, "seven days unless it is said");

    // Four states, a second and more apart.
    sql::psql(&project.uri, "create table t (a int)").await?;
    let client = sql::connect(&project.uri).await?;
    let mut states = Vec::new();
    for state in 0..4 {
        client.batch_execute(&format!("insert into t values ({state})")).await?;
        let lsn = sql::value(&client, "select pg_current_wal_flush_lsn()").await?;
        tokio::time::sleep(Duration::from_millis(1200)).await;
        let now = "select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
        states.push((lsn, sql::value(&client, now).await?));
    }
    let branches = format!("{path}/branches");
    let history = format!("{branches}/{}/history", project.branch);
    let (lsn, time) = &states[1];
    let by_time = api.ok("GET".parse()?, &format!("{history}?timestamp={time}"), None).await?;
    let found = text(&by_time, "/history/lsn")?;
    let at = api.create_branch(&project.id, json!({"parent_id": project.branch, "parent_lsn": found})).await?;
    assert_eq!(sql::ask(&at.uri, "select max(a) from t").await?, "1", "{by_time}");
    let by_lsn = api.ok("GET".parse()?, &format!("{history}?lsn={lsn}"), None).await?;
    let back = text(&by_lsn, "/history/timestamp")?;
    assert!(back < *time && back > states[0].1, "{by_lsn} but between {} and {time}", states[0].1);

    // A branch of a branch of a branch, at past points of theirs.
    let child = api.create_branch(&project.id, json!({"parent_id": project.branch, "parent_lsn": states[2].0})).await?;
    sql::psql(&child.uri, "insert into t values (10)").await?;
    let grandchild = api.create_branch(&project.id, json!({"parent_id": child.id})).await?;
    sql::psql(&grandchild.uri, "insert into t values (20)").await?;
    let youngest = api.create_branch(&project.id, json!({"parent_id": grandchild.id})).await?;
    assert_eq!(sql::ask(&youngest.uri, "select string_agg(a::text, ' ' order by a) from t").await?, "0 1 2 10 20");
    // A point of the youngest from before it existed is one of main's.
    let old = json!({"parent_id": youngest.id, "parent_timestamp": states[0].1});
    let old = api.ok("POST".parse()?, &branches, Some(json!({"branch": old}))).await?;
    assert_eq!(text(&old, "/branch/parent_id")?, project.branch);

    // A lease holds the first state; the window then shrinks to nothing.
    let lease = json!({"lease": {"lsn": states[0].0, "seconds": 600}});
    let leased = api.ok("POST".parse()?, &format!("{branches}/{}/leases", project.branch), Some(lease)).await?;
    set_window(&api, &path, 1).await?;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    for point in [json!({"parent_lsn": states[1].0}), json!({"parent_timestamp": states[1].1})] {
        let (status, answer) = api.call("POST".parse()?, &branches, Some(json!({"branch": point}))).await?;
        let message = text(&answer, "/message")?;
        assert!(status == 400 && message.contains("1 second") && message.contains("history window"), "{answer}");
    }
    let body = json!({"branch": {"parent_lsn": states[0].0}});
    api.ok("POST".parse()?, &branches, Some(body.clone())).await?;
    let id = text(&leased, "/lease/id")?;
    api.ok("DELETE".parse()?, &format!("{branches}/{}/leases/{id}", project.branch), None).await?;
    let (status, _) = api.call("POST".parse()?, &branches, Some(body)).await?;
    assert_eq!(status, 400, "the lease is over");
    let newest = api.create_branch(&project.id, json!({"parent_id": project.branch})).await?;
    assert_eq!(sql::ask(&newest.uri, "select max(a) from t").await?, "3", "the newest state is always there");

    let (status, refused) = api.call("DELETE".parse()?, &format!("{branches}/{}", child.id), None).await?;
    let message = text(&refused, "/message")?;
    assert!(status == 409 && message.contains(&grandchild.id), "the refusal names the child: {refused}");
    Ok(())
}

async fn set_window(api: &e2e::Api, project: &str, seconds: u64) -> anyhow::Result<Value> {
    let body = json!({"project": {"history_retention_seconds": seconds}});
    api.ok("PATCH".parse()?, project, Some(body)).await
}
