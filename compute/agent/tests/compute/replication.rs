//! Logical replication out of and into a branch, with a stock server at the other end, over sleeps and crashes.

use std::time::{Duration, Instant};

use crate::world::{self, Compute, ComputeOptions, World, WorldOptions};
use tokio_postgres::Client;
use types::Lsn;

/// Everything that is waited for comes within this.
const A_WHILE: Duration = Duration::from_secs(60);

/// Enough for the pageserver to write out and for all safekeepers to hear of it.
const FORGETTING: Duration = Duration::from_secs(9);

const LOGICAL: &[(&str, &str)] =
    &[("wal_level", "logical"), ("wal_retrieve_retry_interval", "200ms"), ("wal_receiver_status_interval", "0")];

async fn wake(world: &World) -> Compute {
    world.compute("r", ComputeOptions { settings: LOGICAL, ..ComputeOptions::default() }).await
}

/// A world in which safekeepers forget soon.
async fn forgetful_world(max_slot_wal_mib: u32) -> World {
    World::start_with(WorldOptions { forgetful: true, max_slot_wal_mib, ..WorldOptions::default() }).await
}

/// Waits until a query has this one row of numbers.
pub async fn wait_for(sql: &Client, query: &str, expected: &[i64]) {
    let began = Instant::now();
    loop {
        let row = world::row(sql, query).await;
        if row == expected {
            return;
        }
        if began.elapsed() > A_WHILE {
            let state = "SELECT s::text FROM pg_stat_subscription s UNION ALL SELECT s::text FROM pg_subscription_rel s \
                UNION ALL SELECT s::text FROM pg_show_replication_origin_status() s \
                UNION ALL SELECT s::text FROM pg_replication_slots s";
            let rows = sql.simple_query(state).await.expect("state");
            panic!("{query}: {row:?} instead of {expected:?}: {rows:?}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Runs statements, each on its own.
pub async fn run(sql: &Client, statements: &[&str]) {
    for statement in statements {
        sql.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
}

/// Writes more WAL than a segment has, so that a safekeeper could forget some while the compute runs.
async fn write_segments(sql: &Client, count: usize) {
    for _ in 0..count {
        run(
            sql,
            &["CREATE TABLE IF NOT EXISTS noise (i int)", "INSERT INTO noise VALUES (1)", "SELECT pg_switch_wal()"],
        )
        .await;
    }
}

const ROWS: &str = "SELECT count(*), count(DISTINCT i), coalesce(sum(i), 0) FROM t";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscriber_misses_nothing_over_sleeps_and_crashes() {
    let world = forgetful_world(2048).await;
    let stock = world.stock("");
    let subscriber = stock.connect().await;
    let mut compute = wake(&world).await;
    let sql = compute.connect("postgres").await;
    run(&sql, &["CREATE TABLE t (i bigint)", "INSERT INTO t SELECT generate_series(1, 1000)"]).await;
    run(&sql, &["CREATE PUBLICATION p FOR TABLE t"]).await;
    let connection = format!("host={} port=5432 user=dormouse_admin dbname=postgres", compute.directory().display());
    let subscribe = format!("CREATE SUBSCRIPTION s CONNECTION '{connection}' PUBLICATION p");
    run(&subscriber, &["CREATE TABLE t (i bigint)", &subscribe]).await;
    wait_for(&subscriber, ROWS, &[1000, 1000, 500_500]).await;

    // What is written while nobody subscribes waits in the slot, also where safekeepers could have forgotten it.
    run(&subscriber, &["ALTER SUBSCRIPTION s DISABLE"]).await;
    run(&sql, &["INSERT INTO t SELECT generate_series(1001, 2000)"]).await;
    write_segments(&sql, 3).await;
    tokio::time::sleep(FORGETTING).await;
    compute.stop().await;
    tokio::time::sleep(FORGETTING).await;
    let mut compute = wake(&world).await;
    let sql = compute.connect("postgres").await;
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 's' AND wal_status = 'reserved'";
    assert_eq!(world::row(&sql, slots).await, [1]);
    run(&sql, &["INSERT INTO t SELECT generate_series(2001, 3000)"]).await;
    run(&subscriber, &["ALTER SUBSCRIPTION s ENABLE"]).await;
    wait_for(&subscriber, ROWS, &[3000, 3000, 3000 * 3001 / 2]).await;

    // Crashes while it follows.
    let mut last = 3000;
    for round in 0..3 {
        let sql = compute.connect("postgres").await;
        for _ in 0..40 {
            run(&sql, &[&format!("INSERT INTO t SELECT generate_series({}, {})", last + 1, last + 25)]).await;
            last += 25;
        }
        tokio::time::sleep(Duration::from_millis(100 * round)).await;
        compute.kill().await;
        compute = wake(&world).await;
        wait_for(&subscriber, ROWS, &[last, last, last * (last + 1) / 2]).await;
    }

    // A slot that is gone holds nothing back, and a crash does not bring it back.
    let slots = "SELECT count(*) FROM pg_replication_slots";
    let sql = compute.connect("postgres").await;
    assert_eq!(world::row(&sql, slots).await, [1]);
    run(&subscriber, &["DROP SUBSCRIPTION s"]).await;
    compute.kill().await;
    let mut compute = wake(&world).await;
    let sql = compute.connect("postgres").await;
    assert_eq!(world::row(&sql, slots).await, [0]);
    let end = compute.stop().await;
    let began = Instant::now();
    while world.oldest_wal().await < end {
        assert!(began.elapsed() < A_WHILE, "safekeepers keep WAL for a slot that was dropped");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_branch_that_subscribes_applies_each_transaction_once() {
    let world = World::start().await;
    let stock = world.stock("");
    let publisher = stock.connect().await;
    run(&publisher, &["CREATE TABLE t (i bigint)", "CREATE PUBLICATION p FOR TABLE t"]).await;
    let mut compute = wake(&world).await;
    let sql = compute.connect("postgres").await;
    let connection = format!("host={} port=5432 user=dormouse_admin dbname=postgres", stock.directory.display());
    let subscribe = format!("CREATE SUBSCRIPTION s CONNECTION '{connection}' PUBLICATION p");
    run(&sql, &["CREATE TABLE t (i bigint)", &subscribe]).await;
    // While a table is copied at first, a worker drops its slot at the publisher before its own commit is durable: a crash in
    // that moment leaves the table unfinished, on any server. A synchronous commit ends that moment.
    wait_for(&sql, "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate = 'r'", &[1]).await;
    run(&sql, &["CREATE TABLE synced (i int)"]).await;
    // The publisher hears nothing back (`wal_receiver_status_interval` is 0): what is not to be applied twice, only the
    // branch itself knows.
    let mut last = 0;
    for round in 0..6 {
        let sql = compute.connect("postgres").await;
        for _ in 0..50 {
            run(&publisher, &[&format!("INSERT INTO t SELECT generate_series({}, {})", last + 1, last + 10)]).await;
            last += 10;
        }
        let seen = world::row(&sql, ROWS).await;
        eprintln!("round {round}: {} of {last} rows applied", seen[0]);
        wait_for(&sql, "SELECT (count(*) > 0)::int FROM t", &[1]).await;
        if round % 2 == 0 {
            compute.kill().await;
        } else {
            compute.stop().await;
        }
        compute = wake(&world).await;
        let sql = compute.connect("postgres").await;
        wait_for(&sql, ROWS, &[last, last, last * (last + 1) / 2]).await;
    }
    // A subscription that is gone leaves no progress behind.
    let sql = compute.connect("postgres").await;
    run(&sql, &["DROP SUBSCRIPTION s"]).await;
    compute.kill().await;
    let mut compute = wake(&world).await;
    let sql = compute.connect("postgres").await;
    assert_eq!(world::row(&sql, "SELECT count(*) FROM pg_show_replication_origin_status()").await, [0]);
    compute.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn decoding_goes_on_where_it_was_over_rewritten_catalogues() {
    let world = forgetful_world(2048).await;
    let mut compute = wake(&world).await;
    let sql = compute.connect("postgres").await;
    run(&sql, &["CREATE TABLE t (i bigint)", "SELECT pg_create_logical_replication_slot('s', 'test_decoding')"]).await;
    // A transaction that changes a catalogue and then uses it is decoded by the rows' places, which a rewrite changes.
    run(
        &sql,
        &[
            "BEGIN",
            "ALTER TABLE t ADD COLUMN a text",
            "INSERT INTO t VALUES (1, 'one')",
            "ALTER TABLE t ADD COLUMN b text",
            "INSERT INTO t VALUES (2, 'two', 'zwei')",
            "COMMIT",
            "VACUUM FULL pg_attribute",
            "VACUUM FULL pg_class",
        ],
    )
    .await;
    compute.kill().await;
    let mut compute = wake(&world).await;
    let sql = compute.connect("postgres").await;
    run(&sql, &["INSERT INTO t VALUES (3, 'three', 'drei')"]).await;
    compute.stop().await;
    let mut compute = wake(&world).await;
    let sql = compute.connect("postgres").await;
    let decoded = |function: &str| {
        format!(
            "SELECT count(*), count(*) FILTER (WHERE data LIKE '%''zwei''%'), \
             count(*) FILTER (WHERE data LIKE '%i[bigint]:3 a[text]:''three'' b[text]:''drei''%') \
             FROM {function}('s', NULL, NULL, 'include-xids', '0', 'skip-empty-xacts', '1') WHERE data LIKE 'table public.t:%'"
        )
    };
    let all = [3, 1, 1];
    assert_eq!(world::row(&sql, &decoded("pg_logical_slot_peek_changes")).await, all);
    assert_eq!(world::row(&sql, &decoded("pg_logical_slot_get_changes")).await, all);
    compute.stop().await;
    let mut compute = wake(&world).await;
    let sql = compute.connect("postgres").await;
    assert_eq!(world::row(&sql, &decoded("pg_logical_slot_get_changes")).await, [0, 0, 0], "what was taken is taken");
    compute.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_whose_wal_is_gone_says_so() {
    let world = forgetful_world(20).await;
    let mut compute = wake(&world).await;
    let sql = compute.connect("postgres").await;
    run(&sql, &["CREATE TABLE t (i bigint)", "SELECT pg_create_logical_replication_slot('s', 'test_decoding')"]).await;
    run(&sql, &["SELECT pg_create_physical_replication_slot('standby', true)", "INSERT INTO t VALUES (1)"]).await;
    // Three segments are more than the slot may keep.
    write_segments(&sql, 3).await;
    compute.stop().await;
    tokio::time::sleep(FORGETTING).await;
    let mut compute = wake(&world).await;
    let sql = compute.connect("postgres").await;
    let lost = "SELECT count(*) FROM pg_replication_slots WHERE wal_status = 'lost' AND restart_lsn IS NULL";
    assert_eq!(world::row(&sql, lost).await, [2]);
    let refused = sql.batch_execute("SELECT pg_logical_slot_get_changes('s', NULL, NULL)").await.expect_err("lost");
    let message = refused.as_db_error().expect("an answer").message().to_owned();
    assert_eq!(message, "can no longer get changes from replication slot \"s\"");
    run(&sql, &["SELECT pg_drop_replication_slot('s')", "SELECT pg_drop_replication_slot('standby')"]).await;
    compute.stop().await;
}

/// Two slots, then parts of a table whose WAL they need; a place in the middle of each part. The compute is stopped.
async fn slots_that_need(world: &World, parts: usize) -> Vec<Lsn> {
    let mut compute = wake(world).await;
    let sql = compute.connect("postgres").await;
    // A standby's slot needs WAL from the start of the last checkpoint's segment on; of the first segment the branch has only a part.
    run(&sql, &["CREATE TABLE t (i bigint, filler text)", "SELECT pg_switch_wal()", "CHECKPOINT"]).await;
    run(&sql, &["SELECT pg_create_logical_replication_slot('s', 'test_decoding')"]).await;
    run(&sql, &["SELECT pg_create_physical_replication_slot('standby', true)"]).await;
    let mut places = Vec::new();
    for part in 0..parts {
        let begin = compute.status().await.commit_lsn;
        let insert = format!("INSERT INTO t SELECT {part}, repeat('x', 1000) FROM generate_series(1, 1000)");
        run(&sql, &[&insert]).await;
        let end = compute.status().await.commit_lsn;
        places.push(Lsn(begin.0.midpoint(end.0)));
    }
    compute.stop().await;
    places
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_get_wal_from_whoever_has_it_whole() {
    let world = World::start().await;
    let places = slots_that_need(&world, 3).await;
    // Whomever it comes from has bad WAL somewhere.
    for (index, place) in places.iter().enumerate() {
        world.rot(index as u64 + 1, *place);
    }
    let mut compute = wake(&world).await;
    let sql = compute.connect("postgres").await;
    let changes = "SELECT count(*) FROM pg_logical_slot_get_changes('s', NULL, NULL, 'skip-empty-xacts', '1') \
        WHERE data LIKE 'table public.t: INSERT:%'";
    assert_eq!(world::row(&sql, changes).await, [3000]);
    let kept = "SELECT count(*), count(restart_lsn) FROM pg_replication_slots WHERE wal_status <> 'lost'";
    assert_eq!(world::row(&sql, kept).await, [2, 2]);
    compute.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_whose_wal_has_rotted_everywhere_is_lost_and_the_compute_starts() {
    let world = World::start().await;
    let places = slots_that_need(&world, 2).await;
    (1..=3).for_each(|safekeeper| world.rot(safekeeper, places[0]));
    let mut compute = wake(&world).await;
    let sql = compute.connect("postgres").await;
    let lost = "SELECT count(*) FROM pg_replication_slots WHERE wal_status = 'lost'";
    assert_eq!(world::row(&sql, lost).await, [2]);
    assert_eq!(world::row(&sql, "SELECT count(*) FROM t").await, [2000]);
    compute.stop().await;
}
