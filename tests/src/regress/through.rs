//! The core suite on a compute three times: directly, and through its pool in session and in transaction mode.

use std::path::Path;

use anyhow::{Context, ensure};
use reqwest::Url;

use super::{Comparison, Outcomes, Sources, Target, compare};
use crate::{Api, Cluster, ClusterOptions, Project, sql};

/// Tests that cannot be the same in transaction mode; `docs/pooling.md` has the reasons.
const EXPLAINED: &[&str] = &["constraints", "sequence", "stats"];

/// What the computes run with: whatever a test cannot set by itself.
const SETTINGS: &[(&str, &str)] =
    &[("max_connections", "60"), ("max_prepared_transactions", "100"), ("timezone", "UTC"), ("datestyle", "iso, mdy")];

/// Ways to reach a compute: name, suffix of its endpoint, more options.
const WAYS: [(&str, &str, &str); 3] = [
    ("direct", "", ""),
    ("session", "-pooler", "pool_mode=session"),
    ("transaction", "-pooler", "pool_mode=transaction"),
];

/// What came of it.
#[derive(Debug)]
pub struct Pooled {
    /// Session mode beside a direct connection.
    pub session: Comparison,
    /// Transaction mode beside a direct connection.
    pub transaction: Comparison,
    /// Tests that differ in transaction mode, and nobody has said why.
    pub unexplained: Vec<String>,
}

/// Runs the core suite in each way, on a project of its own each, since the suite leaves much behind.
pub async fn through_the_pooler(sources: &Sources, keep: &Path) -> anyhow::Result<Pooled> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = each_way(sources, keep, &cluster).await;
    let [direct, session, transaction] = outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await?;
    let session = compare("core", ("direct", &direct), ("session", &session));
    let transaction = compare("core", ("direct", &direct), ("transaction", &transaction));
    let explained = |test: &&String| !EXPLAINED.contains(&test.as_str());
    let unexplained = transaction.differing.iter().filter(explained).cloned().collect();
    Ok(Pooled { session, transaction, unexplained })
}

async fn each_way(sources: &Sources, keep: &Path, cluster: &Cluster) -> anyhow::Result<[Outcomes; 3]> {
    let mut outcomes = Vec::new();
    for (name, suffix, options) in WAYS {
        let api = cluster.api()?;
        let project = prepared(&api, cluster, name).await?;
        let endpoint = format!("{}{suffix}", project.endpoint);
        let target = target(cluster, &project, name, &format!("endpoint={endpoint} {options}"))?;
        let begun = std::time::Instant::now();
        let came = tokio::task::block_in_place(|| sources.run(&sources.core()?, &target, keep))?;
        let passed = came.passed.values().filter(|passed| **passed).count();
        println!("{name:<12} {:>4} tests: {passed} pass ({:.1} s)", came.passed.len(), begun.elapsed().as_secs_f64());
        outcomes.push(came);
        api.suspend(&project.id, &project.endpoint).await?;
    }
    outcomes.try_into().ok().context("three outcomes")
}

/// A project whose owner may do all that the core suite does.
async fn prepared(api: &Api, cluster: &Cluster, name: &str) -> anyhow::Result<Project> {
    let project = api.create_project_with(name, SETTINGS).await?;
    let found = sql::ask(&project.uri, "show max_prepared_transactions").await?;
    ensure!(found == "100", "the settings were not taken");
    let client = cluster.superuser(&project.endpoint, "postgres").await?;
    client.batch_execute(&format!("alter role \"{}\" superuser", user_and_password(&project)?.0)).await?;
    // `create_role` grants the roles through which a member reaches the host, which Dormouse has closed.
    client.batch_execute("set allow_system_table_mods = on").await?;
    let host_roles = "'pg_execute_server_program', 'pg_read_server_files', 'pg_write_server_files'";
    let open = format!("update pg_authid set rolsuper = false where rolname in ({host_roles})");
    client.batch_execute(&open).await?;
    Ok(project)
}

fn user_and_password(project: &Project) -> anyhow::Result<(String, String)> {
    let url = Url::parse(&project.uri)?;
    Ok((url.username().to_owned(), url.password().context("a password in the URI")?.to_owned()))
}

/// The proxy as libpq finds it, with `options` that lead to the endpoint.
fn target(cluster: &Cluster, project: &Project, name: &'static str, options: &str) -> anyhow::Result<Target> {
    let (superuser, password) = user_and_password(project)?;
    let environment =
        vec![("PGPASSWORD", password), ("PGSSLMODE", "disable".to_owned()), ("PGOPTIONS", options.trim().to_owned())];
    Ok(Target { name, host: "127.0.0.1".into(), port: cluster.pg_port(), environment, superuser })
}
