//! The same on a real S3-compatible server, and the promise that the object store is the truth.

use anyhow::Context;
use e2e::{Cluster, ClusterOptions, s3, sql};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_lives_in_s3() -> anyhow::Result<()> {
    let server = s3::S3Server::start().await?;
    let options = ClusterOptions {
        object_store: Some(format!("s3://{}/some/prefix", s3::BUCKET)),
        environment: server.environment(),
        ..ClusterOptions::default()
    };
    let mut cluster = Cluster::start(options).await?;
    let outcome = store_and_lose_disks(&mut cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn store_and_lose_disks(cluster: &mut Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("s3").await?;
    sql::pgbench(&project.uri, &["-i", "-q", "-s", "1"]).await?;
    sql::pgbench(&project.uri, &["-c", "2", "-t", "200", "-n"]).await?;
    let digest = "select md5(string_agg(a::text, ',' order by aid)) from pgbench_accounts a";
    let before = sql::ask(&project.uri, digest).await?;
    let branch = api.create_branch(&project.id, json!({"parent_id": project.branch})).await?;

    for round in 0..2 {
        api.suspend(&project.id, &project.endpoint).await?;
        cluster.kill_service("pageserver").await?;
        let disk = cluster.data_dir().join("pageserver");
        if disk.exists() {
            std::fs::remove_dir_all(&disk).with_context(|| disk.display().to_string())?;
        }
        assert_eq!(sql::ask(&project.uri, digest).await?, before, "round {round}: the parent");
        assert_eq!(sql::ask(&branch.uri, digest).await?, before, "round {round}: the branch");
    }
    cluster.down().await?;
    cluster.up().await?;
    assert_eq!(sql::ask(&project.uri, digest).await?, before, "after a restart of everything");
    Ok(())
}
