//! Starts that disable the ancestor's subscriptions.

use std::time::Duration;

use crate::{
    replication::{run, wait_for},
    world::{self, Compute, ComputeOptions, World},
};

/// A subscription that runs is started within a tenth of this.
const LONG_ENOUGH: Duration = Duration::from_secs(3);

const ROWS: &str = "SELECT count(*) FROM t";

fn options(disable_subscriptions: bool) -> ComputeOptions {
    let settings = &[
        ("wal_retrieve_retry_interval", "200ms"),
        ("max_logical_replication_workers", "5"),
        ("max_prepared_transactions", "2"),
    ];
    ComputeOptions { settings, disable_subscriptions, ..ComputeOptions::default() }
}

async fn wake(world: &World, disable_subscriptions: bool) -> Compute {
    world.compute("s", options(disable_subscriptions)).await
}

/// A start that waits for a row which a prepared transaction has: longer than a subscription that could run would take to begin.
async fn wait_for_the_row_in_vain(world: &World) {
    let refused = world.try_compute("s", options(true)).await.err().expect("the row is locked");
    assert!(refused.contains("lock timeout"), "{refused}");
}

/// Ends the prepared transaction in a Postgres that runs no subscriptions.
async fn let_go_of_the_row(world: &World) {
    let settings = &[("max_logical_replication_workers", "0"), ("max_prepared_transactions", "2")];
    let mut compute = world.compute("s", ComputeOptions { settings, ..ComputeOptions::default() }).await;
    run(&compute.connect("postgres").await, &["ROLLBACK PREPARED 'x'"]).await;
    compute.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscriptions_of_an_ancestor_are_disabled_before_they_run() {
    let world = World::start().await;
    let stock = world.stock("");
    let publisher = stock.connect().await;
    run(&publisher, &["CREATE TABLE t (i int)", "CREATE PUBLICATION p FOR TABLE t"]).await;

    // A branch without any starts once, and what it then subscribes to runs.
    let term = wake(&world, false).await.ready.term;
    let mut compute = wake(&world, true).await;
    assert_eq!(compute.ready.term.0, term.0 + 1, "one start");
    assert_eq!(compute.ready.subscriptions_disabled, 0);
    let sql = compute.connect("postgres").await;
    let connection = format!("host={} port=5432 user=dormouse_admin dbname=postgres", stock.directory.display());
    let subscribe = |name: &str| {
        format!("CREATE SUBSCRIPTION {name} CONNECTION '{connection}' PUBLICATION p WITH (copy_data = false)")
    };
    run(&sql, &["CREATE TABLE t (i int)", "CREATE DATABASE d", &subscribe("s")]).await;
    run(&publisher, &["INSERT INTO t VALUES (1)"]).await;
    wait_for(&sql, ROWS, &[1]).await;
    // In whatever database, and wherever the catalogue is.
    let other = compute.connect("d").await;
    run(&other, &["CREATE TABLE t (i int)", &subscribe("other"), "VACUUM FULL pg_subscription"]).await;
    drop(other);

    run(&sql, &["BEGIN", "UPDATE pg_subscription SET subname = subname", "PREPARE TRANSACTION 'x'"]).await;
    compute.stop().await;
    let slots =
        "SELECT count(*), count(*) FILTER (WHERE active), sum(confirmed_flush_lsn - '0/0') FROM pg_replication_slots";
    wait_for(&publisher, "SELECT count(*) FROM pg_replication_slots WHERE active", &[0]).await;
    let before = world::row(&publisher, slots).await;
    run(&publisher, &["INSERT INTO t VALUES (2)"]).await;
    wait_for_the_row_in_vain(&world).await;
    assert_eq!(world::row(&publisher, slots).await, before, "a slot was used before all were disabled");
    let_go_of_the_row(&world).await;
    let mut compute = wake(&world, true).await;
    assert_eq!(compute.ready.subscriptions_disabled, 2);
    tokio::time::sleep(LONG_ENOUGH).await;
    let sql = compute.connect("postgres").await;
    let disabled = "SELECT count(*) FROM pg_subscription WHERE NOT subenabled AND subslotname = subname";
    assert_eq!(world::row(&sql, disabled).await, [2]);
    assert_eq!(world::row(&sql, ROWS).await, [1], "changes were taken from the publisher");
    assert_eq!(world::row(&publisher, slots).await, before, "a slot was used");

    // It can run what it is told to; and what is disabled stays so after a crash.
    run(&sql, &["ALTER SUBSCRIPTION s ENABLE"]).await;
    wait_for(&sql, ROWS, &[2]).await;
    compute.kill().await;
    let mut compute = wake(&world, false).await;
    let sql = compute.connect("postgres").await;
    assert_eq!(world::row(&sql, "SELECT count(*) FROM pg_subscription WHERE subenabled").await, [1]);
    compute.stop().await;
}
