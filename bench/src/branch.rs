//! Creating a branch: it must not depend on how large the database is.

use std::time::Instant;

use e2e::{Cluster, ClusterOptions, sql};
use serde_json::json;

use crate::Samples;

/// Creates `rounds` branches of a small and of a large database, in turn.
pub async fn run(rounds: usize, large_scale: u32) -> anyhow::Result<()> {
    println!("branch: {rounds} branches of a large database, in turn with as many of a 10 MB one");
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let api = cluster.api()?;
    let small = api.create_project("small").await?;
    sql::psql(&small.uri, "create table t as select g, repeat('x', 90) from generate_series(1, 20000) g").await?;
    let large = api.create_project("large").await?;
    sql::pgbench(&large.uri, &["-i", "-q", "-s", &large_scale.to_string()]).await?;
    for (name, project) in [("small", &small), ("large", &large)] {
        let size = sql::ask(&project.uri, "select pg_size_pretty(pg_database_size(current_database()))").await?;
        println!("{name}: {size}");
    }
    let (mut small_times, mut large_times) = (Samples::default(), Samples::default());
    for round in 1..=rounds {
        for (project, times) in [(&small, &mut small_times), (&large, &mut large_times)] {
            let path = format!("/projects/{}/branches", project.id);
            let body = json!({"branch": {"name": format!("b{round}"), "parent_id": project.branch}});
            let start = Instant::now();
            let made = api.ok("POST".parse()?, &path, Some(body)).await?;
            times.add(start.elapsed());
            let id = e2e::api::text(&made, "/branch/id")?;
            api.ok("DELETE".parse()?, &format!("{path}/{id}"), None).await?;
        }
    }
    cluster.down().await?;
    let (small_p50, large_p50) = (small_times.percentile_ms(50), large_times.percentile_ms(50));
    println!(
        "branch_p50_ms={large_p50:.2} branch_p99_ms={:.2} branch_small_p50_ms={small_p50:.2} branch_size_ratio={:.2}",
        large_times.percentile_ms(99),
        large_p50 / small_p50
    );
    Ok(())
}
