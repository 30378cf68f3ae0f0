//! The published serverless driver against a whole installation, over HTTP and over WebSocket; a crowd of functions that
//! wakes a sleeping database.

use std::time::{Duration, Instant};

use anyhow::ensure;
use e2e::{Cluster, ClusterOptions, http::HttpSql, node};
use futures::future::try_join_all;
use serde_json::json;

/// What `tests/clients/serverless.mjs` does.
const WORKS: usize = 19;

/// Functions that begin at the same time.
const CROWD: usize = 2000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_published_driver_works_unmodified() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    driver(&cluster).await.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn driver(cluster: &Cluster) -> anyhow::Result<()> {
    let project = cluster.api()?.create_project("driver").await?;
    let mut command = node::program("node")?;
    command.arg(e2e::repository().join("tests/clients/serverless.mjs"));
    node::about(&mut command, cluster, &project);
    let outcomes = node::outcomes(command).await?;
    ensure!(outcomes.len() == WORKS, "{outcomes:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_of_functions_wakes_a_sleeping_database_once() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    crowd(&cluster).await.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn crowd(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("crowd").await?;
    let http = HttpSql::one_shot(cluster, &project)?;
    http.rows("create table visits (n int)", json!([])).await?;
    let before =
        http.rows("select pg_postmaster_start_time()::text t, current_setting('max_connections') m", json!([])).await?;
    ensure!(before[0]["m"] == "100", "{before}");
    api.suspend(&project.id, &project.endpoint).await?;

    // A failed login wakes nothing, whoever sends it.
    let mut stranger = project.clone();
    stranger.uri = stranger.uri.replace(":", "x:").replacen("postgresqlx:", "postgresql:", 1);
    let refused = HttpSql::one_shot(cluster, &stranger)?.send(&[], &json!({"query": "select 1"})).await?;
    ensure!(refused.body["code"] == "28P01", "{}", refused.body);
    ensure!(api.state(&project.id, &project.endpoint).await? == "idle", "a failed login woke it");

    let invoke = |number: usize| {
        let http = &http;
        async move {
            let begun = Instant::now();
            let text = "insert into visits values ($1) returning pg_postmaster_start_time()::text t";
            let rows = http.rows(text, json!([number])).await?;
            anyhow::Ok((begun.elapsed(), rows[0]["t"].clone()))
        }
    };
    let answers = try_join_all((0..CROWD).map(invoke)).await?;
    ensure!(answers.iter().all(|(_, start)| *start == answers[0].1), "one wake for all");
    ensure!(answers[0].1 != before[0]["t"], "it had slept");
    let counted = http.rows("select count(distinct n)::int n from visits", json!([])).await?;
    ensure!(counted[0]["n"] == CROWD, "{counted}");
    let mut times: Vec<Duration> = answers.into_iter().map(|(took, _)| took).collect();
    times.sort();
    let percentile = |percent: usize| times[(times.len() * percent).div_ceil(100) - 1].as_millis();
    println!("crowd={CROWD} burst_p50_ms={} burst_p99_ms={}", percentile(50), percentile(99));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_answer_wakes_nothing_and_is_invalidated_through_the_api() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    kept_answers(&cluster).await.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn kept_answers(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("kept").await?;
    let endpoint = format!("/projects/{}/endpoints/{}", project.id, project.endpoint);
    let http = HttpSql::new(cluster, &project)?;
    http.rows("create table prices (cents int)", json!([])).await?;
    http.rows("insert into prices values (250)", json!([])).await?;
    let settings = json!({"endpoint": {"settings": {"query_cache": {"max_age": 600}}}});
    api.ok("PATCH".parse()?, &endpoint, Some(settings)).await?;
    // Proxies hear of it within a second.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let ask = async |wish: &str| {
        let answer = http.send(&[("Dormouse-Cache", wish)], &json!({"query": "select cents from prices"})).await?;
        let outcome = answer.headers.get("dormouse-cache").and_then(|value| value.to_str().ok()).unwrap_or_default();
        anyhow::Ok((outcome.to_owned(), answer.body["rows"][0]["cents"].as_i64()))
    };
    let kept = |outcome: &str, cents: i64| (outcome.to_owned(), Some(cents));
    ensure!(ask("tag=prices").await? == kept("miss", 250));
    http.send(&[("Dormouse-Cache", "no-store")], &json!({"query": "update prices set cents = 260"})).await?;
    api.suspend(&project.id, &project.endpoint).await?;
    ensure!(ask("tag=prices").await? == kept("hit", 250));
    ensure!(api.state(&project.id, &project.endpoint).await? == "idle", "a kept answer woke it");

    let invalidate = format!("{endpoint}/query_cache/invalidate");
    for (body, wish) in [(Some(json!({"tags": ["prices"]})), "tag=prices"), (None, "tag=prices")] {
        api.ok("POST".parse()?, &invalidate, body).await?;
        tokio::time::sleep(Duration::from_millis(1100)).await;
        ensure!(ask(wish).await? == kept("miss", 260));
        ensure!(ask(wish).await? == kept("hit", 260));
    }
    Ok(())
}
