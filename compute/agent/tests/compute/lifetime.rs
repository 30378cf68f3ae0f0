//! From a start to an end: what is there after a sleep, a crash, and on another compute.

use std::time::Duration;

use crate::world::{self, ComputeOptions, World};
use tokio::time::timeout;

const A_WHILE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_written_is_there_after_a_sleep() {
    let world = World::start().await;
    let mut compute = world.compute("a", ComputeOptions::default()).await;
    let sql = compute.connect("postgres").await;
    sql.batch_execute(
        "CREATE TABLE kept (id int PRIMARY KEY, body text);
         INSERT INTO kept SELECT g, repeat('x', 100) FROM generate_series(1, 50000) g;
         UPDATE kept SET body = 'changed' WHERE id % 7 = 0;
         DELETE FROM kept WHERE id % 11 = 0;
         CREATE INDEX ON kept (body, id);
         CREATE UNLOGGED TABLE scratch (i int);
         INSERT INTO scratch SELECT generate_series(1, 1000);
         CREATE TABLE gone (i int); DROP TABLE gone;
         CREATE SEQUENCE counter; SELECT nextval('counter');",
    )
    .await
    .expect("write");
    let sum = "SELECT count(*), sum(id), count(*) FILTER (WHERE body = 'changed') FROM kept";
    let before = world::row(&sql, sum).await;
    assert_eq!(before[0], 50_000 - 4_545);
    let end = compute.stop().await;
    assert!(!compute.directory().exists(), "a clean stop leaves nothing");

    // Little memory: most pages come from the pageserver, and evicted ones from the page cache.
    let options = ComputeOptions { settings: &[("shared_buffers", "1MB")], ..ComputeOptions::default() };
    let mut compute = world.compute("a", options).await;
    assert_eq!(compute.ready.start_lsn, end);
    let sql = compute.connect("postgres").await;
    assert_eq!(world::row(&sql, sum).await, before);
    assert_eq!(world::row(&sql, "SELECT count(*) FROM scratch").await, [0]);
    let indexed = "SET enable_seqscan = off; SET enable_bitmapscan = off";
    sql.batch_execute(indexed).await.expect("set");
    assert_eq!(world::row(&sql, "SELECT count(*) FROM kept WHERE body = 'changed'").await, [before[2]]);
    let statistics = "SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = 'kept'";
    assert_eq!(world::row(&sql, statistics).await, [50_000], "statistics survive a clean stop");
    let next = world::row(&sql, "SELECT nextval('counter')").await;
    assert!(next[0] > 1, "a sequence never goes back");
    for statement in ["UPDATE kept SET body = body || '!'", "VACUUM kept", "CHECKPOINT"] {
        sql.batch_execute(statement).await.expect(statement);
    }
    let changed = world::row(&sql, "SELECT count(*), sum(id), sum(length(body)) FROM kept").await;
    compute.stop().await;

    let mut compute = world.compute("a", ComputeOptions::default()).await;
    let sql = compute.connect("postgres").await;
    assert_eq!(world::row(&sql, "SELECT count(*), sum(id), sum(length(body)) FROM kept").await, changed);
    compute.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn segment_switches_prepared_transactions_and_copied_databases_survive() {
    let world = World::start().await;
    let mut compute = world.compute("p", ComputeOptions::default()).await;
    let sql = compute.connect("postgres").await;
    sql.batch_execute("CREATE TABLE t (i int); INSERT INTO t VALUES (1)").await.expect("write");
    sql.batch_execute("SELECT pg_switch_wal()").await.expect("switch");
    sql.batch_execute("INSERT INTO t VALUES (2)").await.expect("write");
    for statement in ["BEGIN", "INSERT INTO t VALUES (40)", "SAVEPOINT s", "INSERT INTO t VALUES (60)"] {
        sql.batch_execute(statement).await.expect(statement);
    }
    sql.batch_execute("PREPARE TRANSACTION 'kept'").await.expect("prepare");
    sql.batch_execute("CREATE DATABASE by_wal").await.expect("create");
    sql.batch_execute("CREATE DATABASE by_file STRATEGY file_copy").await.expect("create");
    sql.batch_execute("SELECT pg_switch_wal()").await.expect("switch");
    compute.stop().await;
    let mut compute = world.compute("p", ComputeOptions::default()).await;
    let sql = compute.connect("postgres").await;
    assert_eq!(world::row(&sql, "SELECT count(*), sum(i) FROM t").await, [2, 3]);
    sql.batch_execute("COMMIT PREPARED 'kept'").await.expect("commit");
    assert_eq!(world::row(&sql, "SELECT count(*), sum(i) FROM t").await, [4, 103]);
    for database in ["by_wal", "by_file"] {
        let sql = compute.connect(database).await;
        assert_eq!(world::row(&sql, "SELECT count(*) FROM pg_class WHERE relname = 'pg_class'").await, [1]);
        sql.batch_execute("CREATE TABLE t AS SELECT attrelid, attname FROM pg_attribute").await.expect(database);
    }
    compute.kill().await;
    let mut compute = world.compute("p", ComputeOptions::default()).await;
    let sql = compute.connect("by_file").await;
    assert!(world::row(&sql, "SELECT count(*) FROM t").await[0] > 1000);
    compute.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_that_fit_nowhere_come_back_from_storage() {
    let world = World::start().await;
    let options =
        ComputeOptions { settings: &[("shared_buffers", "1MB")], cache_bytes: Some(6 << 20), ..Default::default() };
    let mut compute = world.compute("s", options).await;
    let sql = compute.connect("postgres").await;
    sql.batch_execute("CREATE TABLE t (id int PRIMARY KEY, n int, filler text)").await.expect("create");
    // A page may be let go only once its transaction has ended: many small ones write far more than the budget.
    for part in 0..40 {
        let insert = format!(
            "INSERT INTO t SELECT g, 0, repeat(g::text, 120) FROM generate_series({}, {}) g",
            part * 500,
            part * 500 + 499
        );
        sql.batch_execute(&insert).await.expect("insert");
    }
    for round in 1..=3 {
        // An update puts new versions wherever there is room: 300 rows may touch 600 pages.
        for first in (0..20_000).step_by(300) {
            let update = format!("UPDATE t SET n = n + id WHERE id BETWEEN {first} AND {first} + 299");
            sql.batch_execute(&update).await.unwrap_or_else(|error| panic!("round {round}: {error:?}"));
        }
        let seen = world::row(&sql, "SELECT count(*), sum(n::int8), count(DISTINCT id) FROM t").await;
        assert_eq!(seen, [20_000, round * 19_999 * 10_000, 20_000]);
        let whole = "SELECT count(*) FROM t WHERE filler <> repeat(id::text, 120)";
        assert_eq!(world::row(&sql, whole).await, [0]);
        sql.batch_execute("VACUUM t").await.expect("vacuum");
    }
    // One transaction that writes more than may be kept: its statement fails, nothing else does.
    let full = sql.batch_execute("UPDATE t SET filler = filler || '!'").await.expect_err("over the budget");
    assert_eq!(full.code(), Some(&tokio_postgres::error::SqlState::DISK_FULL), "{full:?}");
    assert_eq!(world::row(&sql, "SELECT count(*), sum(n::int8) FROM t").await, [20_000, 3 * 19_999 * 10_000]);
    sql.batch_execute("UPDATE t SET filler = '' WHERE id < 100").await.expect("the session goes on");
    compute.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_rows_survive_a_kill() {
    let world = World::start().await;
    let mut compute = world.compute("k", ComputeOptions::default()).await;
    compute.connect("postgres").await.batch_execute("CREATE TABLE t (i int)").await.expect("create");
    for round in 0..3 {
        let sql = compute.connect("postgres").await;
        let writer = tokio::spawn(async move {
            let mut acknowledged = 0;
            while sql.execute("INSERT INTO t VALUES ($1)", &[&acknowledged]).await.is_ok() {
                acknowledged += 1;
            }
            acknowledged
        });
        tokio::time::sleep(Duration::from_millis(300 + 100 * round)).await;
        compute.kill().await;
        let acknowledged: i32 = timeout(A_WHILE, writer).await.expect("the connection ends").expect("writer");
        eprintln!("round {round}: {acknowledged} commits before the kill");
        assert!(acknowledged > 0, "something was written");
        compute = world.compute("k", ComputeOptions::default()).await;
        let sql = compute.connect("postgres").await;
        let query = format!("SELECT count(*) FROM t WHERE i < {acknowledged}");
        assert_eq!(world::row(&sql, &query).await, [i64::from(acknowledged)], "round {round}");
        sql.batch_execute("TRUNCATE t").await.expect("truncate");
    }
    compute.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_compute_fences_the_first() {
    let world = World::start().await;
    let mut first = world.compute("one", ComputeOptions::default()).await;
    let old = first.connect("postgres").await;
    old.batch_execute("CREATE TABLE t (i int); INSERT INTO t VALUES (1)").await.expect("write");
    let mut second = world.compute("two", ComputeOptions::default()).await;
    assert!(second.ready.term > first.ready.term);
    let refused = timeout(A_WHILE, old.batch_execute("INSERT INTO t VALUES (2)")).await.expect("an answer");
    assert!(refused.is_err(), "nothing is acknowledged behind the fence");
    let status = timeout(A_WHILE, first.exit()).await.expect("the first compute ends");
    assert!(!status.success());
    assert!(!first.directory().exists(), "it cleans up");
    let sql = second.connect("postgres").await;
    assert_eq!(world::row(&sql, "SELECT count(*), sum(i) FROM t").await, [1, 1]);
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_and_databases_are_made_and_idleness_is_told() {
    let world = World::start().await;
    let mut compute = world.compute("c", ComputeOptions { catalog: true, ..ComputeOptions::default() }).await;
    let sql = compute.connect_as("alice", "main").await;
    sql.batch_execute("CREATE TABLE t (i int); INSERT INTO t VALUES (1); CREATE ROLE helper").await.expect("owner");
    let refused = sql.batch_execute("GRANT pg_execute_server_program TO alice").await;
    assert!(refused.is_err(), "no way to the host");
    let (status, body) = compute.http("POST", "/apply", &world::catalog_json("bob", "other")).await;
    assert_eq!(status, 200, "{body}");
    let (status, body) = compute.http("POST", "/apply", &world::catalog_json("dormouse_admin", "other")).await;
    assert_eq!(status, 400, "{body}");
    compute.connect_as("bob", "other").await.batch_execute("CREATE TABLE t (i int)").await.expect("owner");

    sql.batch_execute("BEGIN; INSERT INTO t VALUES (2)").await.expect("open transaction");
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    assert_eq!(compute.status().await.idle_ms, 0, "an open transaction is activity");
    sql.batch_execute("COMMIT").await.expect("commit");
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    let status = compute.status().await;
    assert!((1_000..10_000).contains(&status.idle_ms), "{status:?}");
    assert_eq!(status.connections, 1, "{status:?}");
    assert!(status.running && status.problem.is_none(), "{status:?}");
    compute.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crashed_backend_ends_the_compute_and_loses_nothing() {
    let world = World::start().await;
    let mut compute = world.compute("x", ComputeOptions::default()).await;
    let sql = compute.connect("postgres").await;
    sql.batch_execute("CREATE TABLE t AS SELECT g FROM generate_series(1, 1000) g").await.expect("write");
    let backend = world::row(&sql, "SELECT pg_backend_pid()").await[0];
    let pid = nix::unistd::Pid::from_raw(backend as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("kill");
    let status = timeout(A_WHILE, compute.exit()).await.expect("the compute ends");
    assert!(!status.success() && !compute.directory().exists());
    let mut compute = world.compute("x", ComputeOptions::default()).await;
    let sql = compute.connect("postgres").await;
    assert_eq!(world::row(&sql, "SELECT count(*) FROM t").await, [1000]);
    // SIGTERM is a clean stop too.
    let pid = nix::unistd::Pid::from_raw(compute.ready.agent_pid as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("terminate");
    assert!(timeout(A_WHILE, compute.exit()).await.expect("the compute ends").success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_start_says_why() {
    let world = World::start().await;
    let refused = world.try_compute("t", ComputeOptions { token: Some("x.y.z"), ..Default::default() }).await;
    let error = refused.err().expect("a bad token");
    assert!(error.starts_with("election:"), "{error}");
    let settings: &[_] = &[("fsync", "off")];
    let refused = world.try_compute("t", ComputeOptions { settings, ..Default::default() }).await;
    assert!(refused.err().expect("a fixed setting").contains("fsync may not be changed"));
    let settings: &[_] = &[("shared_buffers", "nonsense")];
    let refused = world.try_compute("t", ComputeOptions { settings, ..Default::default() }).await;
    let error = refused.err().expect("a bad value");
    assert!(error.contains("invalid value for parameter"), "{error}");
    let mut compute = world.compute("t", ComputeOptions::default()).await;
    let refused = world.try_compute("t", ComputeOptions::default()).await;
    assert!(refused.err().expect("in use").contains("another compute is running"));
    assert!(compute.directory().exists());
    compute.stop().await;
}
