//! A branch set back in place, its old state kept; a branch detached from what it came from; garbage that goes.

use std::path::Path;

use anyhow::Context;
use e2e::{Cluster, ClusterOptions, api::text, sql};
use serde_json::json;

const ROWS: &str = "select count(*) || ' ' || coalesce(sum(a), 0) from t";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_branch_is_restored_in_place_and_detached() -> anyhow::Result<()> {
    let environment = vec![("DORMOUSE_GC_SLACK_SECONDS".to_owned(), "0".to_owned())];
    let mut cluster = Cluster::start(ClusterOptions { environment, ..ClusterOptions::default() }).await?;
    let outcome = story(&mut cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn story(cluster: &mut Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("restore").await?;
    let (path, main) = (format!("/projects/{}/branches", project.id), &project.branch);
    sql::psql(&project.uri, "create table t as select generate_series(1, 20000) a").await?;
    let client = sql::connect(&project.uri).await?;
    let lsn = sql::value(&client, "select pg_current_wal_flush_lsn()").await?;
    client.batch_execute("delete from t where a > 100; create table later (x int)").await?;
    let child = api.create_branch(&project.id, json!({"parent_id": main})).await?;
    assert_eq!(sql::ask(&child.uri, ROWS).await?, "100 5050");

    let body = json!({"source_branch_id": main, "source_lsn": lsn, "preserve_under_name": "old"});
    let restored = api.ok("POST".parse()?, &format!("{path}/{main}/restore"), Some(body)).await?;
    let old = text(&restored, "/branch/parent_id")?;
    assert!(sql::value(&client, "select 1").await.is_err(), "connections to the old state end");
    assert_eq!(sql::ask(&project.uri, ROWS).await?, "20000 200010000", "the same connection string, the state of then");
    assert!(sql::ask(&project.uri, "select count(*) from later").await.is_err(), "made later");
    sql::psql(&project.uri, "insert into t values (0)").await?;
    let body = json!({"endpoint": {"branch_id": old, "type": "read_write"}});
    api.ok("POST".parse()?, &format!("/projects/{}/endpoints", project.id), Some(body)).await?;
    let old_uri = api.connection_uri(&project.id, &old).await?;
    assert_eq!(sql::ask(&old_uri, ROWS).await?, "100 5050", "what it was is there under another name");
    assert_eq!(sql::ask(&child.uri, ROWS).await?, "100 5050");

    // What the restored branch reads from the old state it gets to itself; likewise its child.
    let (status, _) = api.call("DELETE".parse()?, &format!("{path}/{old}"), None).await?;
    assert_eq!(status, 409, "it has children");
    for branch in [main, &child.id] {
        let detached = api.ok("POST".parse()?, &format!("{path}/{branch}/detach"), None).await?;
        assert!(detached["branch"].get("parent_id").is_none(), "{detached}");
    }
    api.ok("DELETE".parse()?, &format!("{path}/{old}"), None).await?;
    assert_eq!(sql::ask(&project.uri, ROWS).await?, "20001 200010000");
    assert_eq!(sql::ask(&child.uri, ROWS).await?, "100 5050");
    sql::psql(&child.uri, "insert into t values (7)").await?;
    cluster.down().await?;
    cluster.up().await?;
    assert_eq!(sql::ask(&project.uri, ROWS).await?, "20001 200010000", "after a restart of everything");
    assert_eq!(sql::ask(&child.uri, ROWS).await?, "101 5057");
    garbage(cluster, &project, main).await
}

/// Rewrites of every row, with no history wanted: old layers go, and nothing that is needed.
async fn garbage(cluster: &Cluster, project: &e2e::Project, main: &str) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let path = format!("/projects/{}", project.id);
    let none = json!({"project": {"history_retention_seconds": 0}});
    api.ok("PATCH".parse()?, &path, Some(none)).await?;
    let digest = sql::ask(&project.uri, ROWS).await?;
    let mut removed = 0;
    for _ in 0..12 {
        sql::psql(&project.uri, "update t set a = a").await?;
        // What a sleeping branch has goes to the object store as a layer of its own, before garbage is looked for.
        api.suspend(&project.id, &project.endpoint).await?;
        let report = api.ok("POST".parse()?, &format!("{path}/branches/{main}/collect_garbage"), None).await?;
        removed += report["removed_bytes"].as_u64().context("removed_bytes")?;
        assert_eq!(sql::ask(&project.uri, ROWS).await?, digest);
    }
    assert!(removed > 0, "nothing was collected of {} bytes", store_bytes(&cluster.data_dir())?);
    Ok(())
}

fn store_bytes(data_dir: &Path) -> anyhow::Result<u64> {
    let (mut bytes, mut open) = (0, vec![data_dir.join("object-store")]);
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())?.flatten() {
            let metadata = entry.metadata()?;
            bytes += metadata.len();
            if metadata.is_dir() {
                open.push(entry.path());
            }
        }
    }
    Ok(bytes)
}
