//! A pageserver that falls behind slows commits down, and in the end holds them up, so that nothing grows without bound.

use std::time::{Duration, Instant};

use crate::world::{self, ComputeOptions, World};
use tokio::time::timeout;

const MIB: u64 = 1 << 20;
const MAX_LAG_MIB: u64 = 64;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_wait_for_a_stalled_pageserver_and_go_on_with_it() {
    let world = World::start().await;
    let settings: &[_] = &[("dormouse.max_ingest_lag_mib", "64"), ("autovacuum", "off"), ("shared_buffers", "256MB")];
    let mut compute = world.compute("b", ComputeOptions { settings, ..ComputeOptions::default() }).await;
    let sql = compute.connect("postgres").await;
    sql.batch_execute("CREATE TABLE t (i int, filler text)").await.expect("create");
    // So that the agent has seen the setting.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let start = compute.status().await.commit_lsn;
    // What it reads is in memory: pages that WAL on its way has changed could not be had from a stalled pageserver anyway.
    let reader = compute.connect("postgres").await;
    let read = "SELECT count(*) FROM pg_stat_activity WHERE false";
    assert_eq!(world::row(&reader, read).await, [0]);

    world.stall_ingestion(true);
    let writer = tokio::spawn(async move {
        let mut took = Vec::new();
        for part in 0..200 {
            let began = Instant::now();
            let insert = format!("INSERT INTO t SELECT {part}, repeat('x', 1000) FROM generate_series(1, 1000)");
            sql.batch_execute(&insert).await.expect("insert");
            took.push(began.elapsed());
        }
        (sql, took)
    });
    // Longer than a stream takes to be given up as silent.
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(!writer.is_finished(), "200 MB were committed with {MAX_LAG_MIB} allowed");
    let status = compute.status().await;
    let lag = status.commit_lsn.0 - start.0;
    assert!((MAX_LAG_MIB / 2 * MIB..(MAX_LAG_MIB + 20) * MIB).contains(&lag), "{} MiB", lag / MIB);
    let problem = status.problem.expect("it is told");
    assert!(problem.starts_with("commits wait: the pageserver has been"), "{problem}");
    let answer = timeout(Duration::from_secs(5), world::row(&reader, read));
    assert_eq!(answer.await.expect("reading goes on"), [0]);

    world.stall_ingestion(false);
    let (sql, took) = timeout(Duration::from_secs(120), writer).await.expect("it goes on").expect("writer");
    assert!(took.iter().max() > Some(&Duration::from_secs(5)), "{took:?}");
    assert_eq!(world::row(&sql, "SELECT count(*) FROM t").await, [200_000]);
    assert_eq!(compute.status().await.problem, None);

    // A stop does not wait for a pageserver that is behind.
    world.stall_ingestion(true);
    let big = "INSERT INTO t SELECT 0, repeat('x', 1000) FROM generate_series(1, 200000)";
    let blocked = tokio::spawn(async move { sql.batch_execute(big).await });
    tokio::time::sleep(Duration::from_secs(10)).await;
    let began = Instant::now();
    compute.stop().await;
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    let _ = blocked.await;
    world.stall_ingestion(false);
}
