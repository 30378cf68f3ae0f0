//! Safekeepers whose files have rotted, and a pageserver that has to have their WAL.

use std::time::Duration;

use crate::world::{self, Compute, ComputeOptions, World};
use tokio_postgres::Client;
use types::Lsn;

/// A world whose pageserver has not got the WAL of `parts` parts of a table, and a place in the middle of each.
async fn unread_wal(parts: usize) -> (World, Compute, Client, Vec<Lsn>) {
    let world = World::start().await;
    let settings: &[_] = &[("autovacuum", "off"), ("shared_buffers", "256MB")];
    let compute = world.compute("r", ComputeOptions { settings, ..ComputeOptions::default() }).await;
    let sql = compute.connect("postgres").await;
    sql.batch_execute("CREATE TABLE t (i int, filler text)").await.expect("create");
    world.stall_ingestion(true);
    let mut places = Vec::new();
    for part in 0..parts {
        let begin = compute.status().await.commit_lsn;
        let insert = format!("INSERT INTO t SELECT {part}, repeat('x', 1000) FROM generate_series(1, 1000)");
        sql.batch_execute(&insert).await.expect("insert");
        let end = compute.status().await.commit_lsn;
        places.push(Lsn(begin.0.midpoint(end.0)));
    }
    (world, compute, sql, places)
}

/// The pageserver gets WAL again, and none that was on its way before the files rotted.
async fn go_on(world: &World) {
    // Streams that were opened before are given up as silent.
    tokio::time::sleep(Duration::from_secs(6)).await;
    world.stall_ingestion(false);
}

async fn until_ingested(world: &World, end: Lsn) {
    let ingested = async {
        while world.branch_info().await.last_record_lsn < end {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), ingested).await.expect("it is ingested in time");
    assert_eq!(world.branch_info().await.ingest_error, None);
}

/// Read on another host, whose page cache is empty: every page is the pageserver's.
async fn assert_rows(world: &World, parts: i64) {
    let mut compute = world.compute("elsewhere", ComputeOptions::default()).await;
    let sql = compute.connect("postgres").await;
    let rows = "SELECT count(*), count(DISTINCT i), sum(length(filler)) FROM t WHERE filler = repeat('x', 1000)";
    assert_eq!(world::row(&sql, rows).await, [1000 * parts, parts, 1_000_000 * parts]);
    compute.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_rotted_on_one_safekeeper_is_read_from_another() {
    let (world, mut compute, sql, places) = unread_wal(3).await;
    let end = compute.status().await.commit_lsn;
    // Whomever it reads from comes upon bad WAL.
    for (index, place) in places.iter().enumerate() {
        world.rot(index as u64 + 1, *place);
    }
    go_on(&world).await;
    until_ingested(&world, end).await;
    drop(sql);
    compute.stop().await;
    assert_rows(&world, 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_rotted_everywhere_is_told_and_taken_once_it_is_whole_again() {
    let (world, mut compute, sql, places) = unread_wal(2).await;
    let (end, place) = (compute.status().await.commit_lsn, places[1]);
    (1..=3).for_each(|safekeeper| world.rot(safekeeper, place));
    go_on(&world).await;
    let told = async {
        loop {
            let info = world.branch_info().await;
            assert!(info.last_record_lsn <= place, "a record was made of rotten WAL");
            if let Some(error) = info.ingest_error {
                return error;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let error = tokio::time::timeout(Duration::from_secs(60), told).await.expect("it is told");
    assert!(["1", "2", "3"].iter().all(|node| error.contains(node)), "{error}");
    println!("{error}");
    // The same bits again: it is as it was.
    world.rot(2, place);
    until_ingested(&world, end).await;
    drop(sql);
    compute.stop().await;
    assert_rows(&world, 2).await;
}
