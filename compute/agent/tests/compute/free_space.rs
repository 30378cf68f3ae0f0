//! Free space maps over a sleep.

use crate::world::{self, ComputeOptions, World};

const QUIET: &[(&str, &str)] = &[("autovacuum", "off")];

fn options() -> ComputeOptions {
    ComputeOptions { settings: QUIET, ..ComputeOptions::default() }
}

const BLOCKS: &str = "SELECT pg_relation_size('t') / 8192";

async fn run(sql: &tokio_postgres::Client, statements: &[&str]) {
    for statement in statements {
        sql.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
}

/// Vacuums until the table's map offers this many bytes: a snapshot of the agent's own may keep rows for a moment.
async fn vacuum_until_free(sql: &tokio_postgres::Client, bytes: i64) {
    for _ in 0..100 {
        run(sql, &["VACUUM t"]).await;
        if world::row(sql, FREE).await[0] >= bytes {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("rows that nobody sees are not removed");
}

const FREE: &str = "SELECT sum(avail) FROM pg_freespace('t')";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn freed_space_is_used_again_after_a_sleep() {
    let world = World::start().await;
    let mut compute = world.compute("f", options()).await;
    let sql = compute.connect("postgres").await;
    run(
        &sql,
        &[
            "CREATE EXTENSION pg_freespacemap",
            "CREATE TABLE t (i int, filler text)",
            "INSERT INTO t SELECT g, repeat('x', 400) FROM generate_series(1, 20000) g",
            "DELETE FROM t WHERE i % 2 = 0",
        ],
    )
    .await;
    vacuum_until_free(&sql, 10_000 * 400).await;
    let (blocks, free) = (world::row(&sql, BLOCKS).await, world::row(&sql, FREE).await);
    assert!(blocks[0] > 1000);
    compute.stop().await;
    let mut compute = world.compute("f", options()).await;
    let sql = compute.connect("postgres").await;
    assert_eq!(world::row(&sql, FREE).await, free);
    run(&sql, &["INSERT INTO t SELECT g, repeat('y', 400) FROM generate_series(1, 9000) g"]).await;
    assert_eq!(world::row(&sql, BLOCKS).await, blocks, "the table grew though half of it was free");
    compute.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_map_that_is_ahead_of_its_table_does_no_harm() {
    let world = World::start().await;
    let mut compute = world.compute("f", options()).await;
    let sql = compute.connect("postgres").await;
    run(
        &sql,
        &[
            "CREATE EXTENSION pg_freespacemap",
            "CREATE TABLE t (i int, filler text)",
            "INSERT INTO t SELECT g, repeat('x', 400) FROM generate_series(1, 20000) g",
            // The last row keeps the table as long as it is.
            "DELETE FROM t WHERE i BETWEEN 2 AND 19999",
        ],
    )
    .await;
    vacuum_until_free(&sql, 19_000 * 400).await;
    assert!(world::row(&sql, BLOCKS).await[0] > 1000);
    compute.stop().await;
    let mut compute = world.compute("f", options()).await;
    let sql = compute.connect("postgres").await;
    run(&sql, &["DELETE FROM t WHERE i = 20000"]).await;
    // A snapshot of the agent's own may keep the row visible for a moment.
    for _ in 0..100 {
        run(&sql, &["VACUUM t"]).await;
        if world::row(&sql, BLOCKS).await == [1] {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    run(&sql, &["CREATE TABLE synced (i int)"]).await;
    assert_eq!(world::row(&sql, BLOCKS).await, [1]);
    // The map as of the sleep is what storage has: it is Postgres that must not believe it.
    compute.kill().await;
    let mut compute = world.compute("f", options()).await;
    let sql = compute.connect("postgres").await;
    assert_eq!(world::row(&sql, BLOCKS).await, [1]);
    run(&sql, &["INSERT INTO t SELECT g, repeat('y', 400) FROM generate_series(1, 1000) g"]).await;
    assert_eq!(world::row(&sql, "SELECT count(*) FROM t").await, [1001]);
    assert!(world::row(&sql, BLOCKS).await[0] < 70);
    compute.stop().await;
}
