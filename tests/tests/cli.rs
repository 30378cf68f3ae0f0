//! The command line, as a person at a terminal uses it.

use anyhow::Context;
use e2e::{Cluster, ClusterOptions};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_does_the_daily_work() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = daily_work(&cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn daily_work(cluster: &Cluster) -> anyhow::Result<()> {
    let made = json(cluster, &["projects", "create", "--name", "daily"]).await?;
    let project = e2e::api::text(&made, "/project/id")?;
    let listed = dormouse(cluster, &["projects", "list"]).await?;
    assert!(listed.contains(&project) && listed.contains("daily"), "{listed}");

    let uri = dormouse(cluster, &["connection-string", "main"]).await?;
    assert!(uri.trim().starts_with("postgresql://"), "{uri}");
    let answer =
        dormouse(cluster, &["psql", "main", "--", "-X", "-A", "-t", "-c", "create table t as select 7 a"]).await?;
    assert!(answer.contains("SELECT 1"), "{answer}");

    dormouse(cluster, &["branches", "create", "--name", "feature", "--parent", "main"]).await?;
    let answer = dormouse(cluster, &["psql", "feature", "--", "-X", "-A", "-t", "-c", "select a from t"]).await?;
    assert_eq!(answer.trim(), "7");
    let branches = dormouse(cluster, &["branches", "list"]).await?;
    assert!(branches.contains("feature") && branches.contains("main"), "{branches}");
    let endpoints = dormouse(cluster, &["endpoints", "list"]).await?;
    assert_eq!(endpoints.matches("ep-").count(), 2, "{endpoints}");

    let header = branches.lines().next().unwrap_or_default();
    assert!(header.contains("DATA") && branches.contains("MiB"), "sizes are shown: {branches}");
    let history = json(cluster, &["branches", "history", "main"]).await?;
    let lsn = e2e::api::text(&history, "/history/end_lsn")?;
    dormouse(cluster, &["psql", "main", "--", "-X", "-c", "drop table t"]).await?;
    dormouse(cluster, &["branches", "lease", "create", "main", "--at-lsn", &lsn, "--for", "1h"]).await?;
    dormouse(cluster, &["branches", "restore", "main", "--at-lsn", &lsn, "--keep-as", "dropped"]).await?;
    let answer = dormouse(cluster, &["psql", "main", "--", "-X", "-A", "-t", "-c", "select a from t"]).await?;
    assert_eq!(answer.trim(), "7", "restored in place");
    dormouse(cluster, &["projects", "update", "daily", "--history-retention", "1d"]).await?;
    let projects = dormouse(cluster, &["projects", "list"]).await?;
    assert!(projects.contains("1day"), "{projects}");
    dormouse(cluster, &["projects", "update", "daily", "--allow-ip", "192.0.2.0/24", "--allow-ip", "2001:db8::1"])
        .await?;
    let refused = dormouse(cluster, &["psql", "main", "--", "-X", "-c", "select 1"]).await.expect_err("from elsewhere");
    assert!(refused.to_string().contains("address 127.0.0.1 is not allowed"), "{refused}");
    let projects = dormouse(cluster, &["projects", "list"]).await?;
    assert!(projects.contains("192.0.2.0/24, 2001:db8::1"), "{projects}");
    dormouse(cluster, &["projects", "update", "daily", "--allow-any-ip"]).await?;
    dormouse(cluster, &["psql", "main", "--", "-X", "-c", "select 1"]).await?;
    let keys = "https://auth.example.com/jwks.json";
    let made = json(cluster, &["jwks", "add", keys, "--audience", "shop", "--role", "web", "--branch", "main"]).await?;
    let listed = dormouse(cluster, &["jwks", "list"]).await?;
    assert!(listed.contains(keys) && listed.contains("auth.example.com") && listed.contains("web"), "{listed}");
    dormouse(cluster, &["jwks", "delete", &e2e::api::text(&made, "/jwks/id")?]).await?;
    assert!(!dormouse(cluster, &["jwks", "list"]).await?.contains(keys));
    let help = dormouse(cluster, &["branches", "restore", "--help"]).await?;
    assert!(help.contains("Examples:") && help.contains("--keep-as"), "{help}");

    dormouse(cluster, &["branches", "delete", "feature"]).await?;
    let branches = dormouse(cluster, &["branches", "list"]).await?;
    assert!(!branches.contains("feature"), "{branches}");
    let error = dormouse(cluster, &["branches", "delete", "feature"]).await.expect_err("it is gone");
    assert!(error.to_string().contains("feature"), "{error}");
    dormouse(cluster, &["projects", "delete", &project]).await?;
    assert!(!dormouse(cluster, &["projects", "list"]).await?.contains(&project));
    Ok(())
}

async fn json(cluster: &Cluster, arguments: &[&str]) -> anyhow::Result<serde_json::Value> {
    let text = dormouse(cluster, &[arguments, &["--output", "json"]].concat()).await?;
    serde_json::from_str(&text).with_context(|| text.clone())
}

async fn dormouse(cluster: &Cluster, arguments: &[&str]) -> anyhow::Result<String> {
    cluster.command_line(arguments).await
}
