//! `pgbench`, beside a stock server that is as durable: read-only in memory, read-only with ten times the memory, TPC-B.

use crate::peer::{Copies, Pair, median, pgbench};

const SETTINGS: &[(&str, &str)] = &[("shared_buffers", "48MB"), ("max_wal_size", "1GB"), ("wal_level", "replica")];

/// Fits in shared buffers.
const SMALL_SCALE: &str = "2";
/// Ten times shared buffers.
const LARGE_SCALE: &str = "32";

struct Load {
    name: &'static str,
    database: &'static str,
    arguments: &'static [&'static str],
}

const LOADS: &[Load] = &[
    Load { name: "ro_cached", database: "small", arguments: &["-S", "-M", "prepared", "-c", "2", "-j", "2"] },
    Load { name: "ro_large", database: "large", arguments: &["-S", "-M", "prepared", "-c", "2", "-j", "2"] },
    Load { name: "tpcb1", database: "large", arguments: &["-M", "prepared", "-c", "1"] },
    Load { name: "tpcb16", database: "large", arguments: &["-M", "prepared", "-c", "16", "-j", "2"] },
];

/// Runs each load (of these, if any are named) `rounds` times on both, in turn, `seconds` each.
pub async fn run(rounds: usize, seconds: u32, only: &[String]) -> anyhow::Result<()> {
    let unknown = only.iter().find(|name| LOADS.iter().all(|load| load.name != *name));
    anyhow::ensure!(unknown.is_none(), "there is no load {unknown:?}");
    println!(
        "oltp: pgbench on a compute (three safekeepers) and on a stock server with ANY 1 of two pg_receivewal --synchronous"
    );
    let pair = Pair::start(SETTINGS, Copies::Two).await?;
    let targets = pair.targets();
    for target in &targets {
        for (database, scale) in [("small", SMALL_SCALE), ("large", LARGE_SCALE)] {
            e2e::stock::run(target.client("createdb")?.arg(database))?;
            pgbench(target, database, &["-i", "-q", "-s", scale])?;
            e2e::stock::run(target.client("psql")?.args(["-qXc", "checkpoint", database]))?;
        }
    }
    let seconds = seconds.to_string();
    let mut figures = Vec::new();
    for load in LOADS.iter().filter(|load| only.is_empty() || only.iter().any(|name| name == load.name)) {
        for target in &targets {
            // Warm, both.
            pgbench(target, load.database, &[&["-S", "-n", "-c", "2", "-T", "4"][..]].concat())?;
        }
        let mut ratios = Vec::new();
        for round in 1..=rounds {
            let mut tps = [0.0; 2];
            for (target, tps) in targets.iter().zip(&mut tps) {
                *tps = pgbench(target, load.database, &[load.arguments, &["-n", "-T", &seconds]].concat())?;
            }
            println!("{} round {round}: stock {:.0} tps, dormouse {:.0} tps", load.name, tps[0], tps[1]);
            ratios.push(tps[1] / tps[0]);
        }
        figures.push(format!("{}_ratio={:.2}", load.name, median(ratios)));
    }
    pair.stop().await?;
    println!("{}", figures.join(" "));
    Ok(())
}
