//! From a client's first packet at the proxy to its first row, the compute asleep.

use std::time::Instant;

use e2e::{Cluster, ClusterOptions, sql};

use crate::{Samples, bare::BareServer};

/// Wakes an endpoint `rounds` times, in turn with starts of a stock server.
pub async fn run(rounds: usize) -> anyhow::Result<()> {
    println!(
        "wake: {rounds} wakes through the proxy (TLS, SCRAM), in turn with a stock postgres from exec to first row"
    );
    let mut cluster = Cluster::start(ClusterOptions { warm: true, ..ClusterOptions::default() }).await?;
    let bare_server = BareServer::create()?;
    let api = cluster.api()?;
    let project = api.create_project("wake").await?;
    // The first start also makes the roles and the database.
    sql::ask(&project.uri, "create table t as select g from generate_series(1, 10000) g").await.or_else(no_row)?;
    bare_server.start_to_first_row().await?;

    let (mut wake, mut bare) = (Samples::default(), Samples::default());
    for round in 1..=rounds {
        api.suspend(&project.id, &project.endpoint).await?;
        let start = Instant::now();
        let row = sql::ask(&project.uri, "select 1").await?;
        let took = start.elapsed();
        anyhow::ensure!(row == "1", "the first row was {row}");
        wake.add(took);
        let peer = bare_server.start_to_first_row().await?;
        bare.add(peer);
        println!("round {round}: wake {:.1} ms, bare {:.1} ms", took.as_secs_f64() * 1e3, peer.as_secs_f64() * 1e3);
    }
    cluster.down().await?;
    let (wake_p50, bare_p50) = (wake.percentile_ms(50), bare.percentile_ms(50));
    println!(
        "wake_p50_ms={wake_p50:.1} wake_p99_ms={:.1} bare_p50_ms={bare_p50:.1} wake_ratio_p50={:.2}",
        wake.percentile_ms(99),
        wake_p50 / bare_p50
    );
    Ok(())
}

/// `create table` answers no row: that is no error here.
fn no_row(error: anyhow::Error) -> anyhow::Result<String> {
    if error.to_string().starts_with("no row") { Ok(String::new()) } else { Err(error) }
}
