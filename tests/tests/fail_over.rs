//! A second pageserver on an empty disk takes a project over while the first still believes that it serves it.

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::{Context, ensure};
use e2e::{Cluster, ClusterOptions, Project, beside::AnotherPageserver, sql};
use serde_json::json;
use types::{BranchRef, Lsn};

const ROWS: &str = "select count(*) || ' ' || sum(a) from t";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_the_newest_pageserver_writes_counts() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = take_over(&cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn take_over(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let (project, other) = (api.create_project("moving").await?, api.create_project("staying").await?);
    for uri in [&project.uri, &other.uri] {
        sql::psql(uri, "create table t as select generate_series(1, 1000) a").await?;
    }
    let branch = BranchRef { project: project.id.parse()?, branch: project.branch.parse()? };
    let first = cluster.pageserver()?;
    let second = cluster.another_pageserver(2)?;
    give_to(cluster, &project, &second, 2).await?;
    ensure!(sql::ask(&project.uri, ROWS).await? == "1000 500500", "the second knows what the first had only in memory");
    let objects = Objects::of(cluster, &branch)?;

    // The first follows the WAL too, and finds out when it wants to write that it may not.
    sql::psql(&project.uri, "insert into t select generate_series(1001, 2000)").await?;
    let client = sql::connect(&project.uri).await?;
    let lsn: Lsn = sql::value(&client, "select pg_current_wal_flush_lsn()").await?.parse()?;
    drop(client);
    let refused = first.checkpoint(&branch, lsn).await.expect_err("it was deposed").to_string();
    ensure!(refused.contains("taken over"), "{refused}");
    objects.are_as_before("what the first tried")?;
    ensure!(second.client.checkpoint(&branch, lsn).await? >= lsn);
    ensure!(sql::ask(&project.uri, ROWS).await? == "2000 2001000");
    // Both run, and the first serves what is its own.
    sql::psql(&other.uri, "insert into t values (0)").await?;
    ensure!(sql::ask(&other.uri, ROWS).await? == "1001 500500");
    api.create_branch(&project.id, json!({"parent_id": project.branch})).await?;

    // The first comes back with a higher generation: it is told what others serve.
    let told = cluster.kill_service("pageserver").await?;
    ensure!(told > 0);
    let elsewhere = wait_for_refusal(cluster, &branch).await?;
    ensure!(elsewhere.contains("another pageserver"), "{elsewhere}");
    ensure!(sql::ask(&other.uri, ROWS).await? == "1001 500500");
    ensure!(sql::ask(&project.uri, ROWS).await? == "2000 2001000");

    // And on to a third, the second gone for good with all it had on its disk.
    sql::psql(&project.uri, "insert into t select generate_series(2001, 3000)").await?;
    drop(second);
    let third = cluster.another_pageserver(3)?;
    give_to(cluster, &project, &third, 3).await?;
    ensure!(sql::ask(&project.uri, ROWS).await? == "3000 4501500");
    Ok(())
}

/// `POST .../take_over`, once the pageserver has started.
async fn give_to(cluster: &Cluster, project: &Project, to: &AnotherPageserver, id: u64) -> anyhow::Result<()> {
    let path = format!("/projects/{}/take_over", project.id);
    for _ in 0..300 {
        let (status, answer) = cluster.api()?.call("POST".parse()?, &path, Some(json!({"pageserver": id}))).await?;
        match status {
            200 => return Ok(()),
            404 | 503 => tokio::time::sleep(Duration::from_millis(100)).await,
            _ => anyhow::bail!("{status} {answer}"),
        }
    }
    anyhow::bail!("pageserver {id} at {} did not start", to.client.address())
}

async fn wait_for_refusal(cluster: &Cluster, branch: &BranchRef) -> anyhow::Result<String> {
    let mut last = String::new();
    for _ in 0..200 {
        let answer = cluster.pageserver()?.branch_info(branch).await;
        last = answer.err().context("it still serves the project")?.to_string();
        if last.contains("another pageserver") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(last)
}

/// A branch's objects, with their content.
struct Objects {
    directory: std::path::PathBuf,
    content: BTreeMap<String, Vec<u8>>,
}

impl Objects {
    fn of(cluster: &Cluster, branch: &BranchRef) -> anyhow::Result<Objects> {
        let below = format!("object-store/projects/{}/branches/{}", branch.project, branch.branch);
        let directory = cluster.data_dir().join(below);
        Ok(Objects { content: read(&directory)?, directory })
    }

    /// Everything that was there is, unchanged but for what the owner's generation writes; nothing of an older one is new
    /// where a reader would look.
    fn are_as_before(&self, after: &str) -> anyhow::Result<()> {
        let now = read(&self.directory)?;
        let newest = |objects: &BTreeMap<String, Vec<u8>>| {
            objects.keys().filter(|n| n.starts_with("manifest-") && !n.ends_with("copy")).max().cloned()
        };
        let (before, owner) = (newest(&self.content), newest(&now));
        ensure!(owner >= before, "{after}: the manifest {before:?} gave way to {owner:?}");
        for (name, content) in &self.content {
            let own = owner.as_ref() == Some(name);
            let old_manifest = name.starts_with("manifest-") && !own;
            ensure!(own || old_manifest || now.get(name) == Some(content), "{after}: {name} was changed");
        }
        Ok(())
    }
}

fn read(directory: &Path) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let mut content = BTreeMap::new();
    for entry in std::fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_file() {
            content.insert(name, std::fs::read(&path)?);
        } else {
            content.extend(read(&path)?.into_iter().map(|(below, bytes)| (format!("{name}/{below}"), bytes)));
        }
    }
    Ok(content)
}
