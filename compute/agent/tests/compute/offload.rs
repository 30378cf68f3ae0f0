//! A pageserver that gets no WAL for long, and catches up from what safekeepers have copied to the object store.

use std::time::Duration;

use crate::world::{self, ComputeOptions, World, WorldOptions};
use types::WAL_SEGMENT_BYTES;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pageserver_that_was_away_catches_up_from_copied_wal() {
    let world = World::start_with(WorldOptions { offloading: true, ..WorldOptions::default() }).await;
    let settings: &[_] = &[("autovacuum", "off"), ("shared_buffers", "256MB")];
    let mut compute = world.compute("o", ComputeOptions { settings, ..ComputeOptions::default() }).await;
    let sql = compute.connect("postgres").await;
    sql.batch_execute("CREATE TABLE t (i int, filler text)").await.expect("create");
    let start = compute.status().await.commit_lsn;
    world.stall_ingestion(true);
    let mut most = 0;
    for part in 0..110 {
        let insert = format!("INSERT INTO t SELECT {part}, repeat('x', 1000) FROM generate_series(1, 1000)");
        sql.batch_execute(&insert).await.expect("insert");
        most = world.local_wal_bytes().max(most);
    }
    let written = compute.status().await.commit_lsn.0 - start.0;
    println!("written={written} most_local_bytes={most}");
    assert!(written > 6 * WAL_SEGMENT_BYTES, "{written} bytes of WAL");
    assert!(most <= 4 * WAL_SEGMENT_BYTES, "{most} bytes on one disk");
    // Whoever had opened its stream before is given up as silent.
    tokio::time::sleep(Duration::from_secs(6)).await;
    world.stall_ingestion(false);
    compute.stop().await;

    // Another host, whose page cache is empty: every page is the pageserver's.
    let mut compute = world.compute("elsewhere", ComputeOptions::default()).await;
    let sql = compute.connect("postgres").await;
    let rows = "SELECT count(*), count(DISTINCT i), sum(i), sum(length(filler)) FROM t";
    assert_eq!(world::row(&sql, rows).await, [110_000, 110, 1000 * 109 * 55, 110_000_000]);
    compute.stop().await;
}
