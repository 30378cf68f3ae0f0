//! A stock server whose relations lie nowhere in its data directory does what an ordinary one does.

mod support;

use std::{fs, path::Path, sync::atomic::Ordering::*};

use support::*;

/// An ordinary server and a shimmed one that start from the same cluster.
fn pair(dir: &Path, options: &Options) -> (Server, Shimmed) {
    initdb(&dir.join("original"));
    run(std::process::Command::new("cp").arg("-a").arg(dir.join("original")).arg(dir.join("plain")));
    let plain = Server::start(dir, "plain", &options.settings, &[]);
    (plain, Shimmed::start(dir, "shimmed", options))
}

fn shimmed(dir: &Path, options: &Options) -> Shimmed {
    initdb(&dir.join("original"));
    Shimmed::start(dir, "shimmed", options)
}

fn compare(what: &str, plain: &str, shimmed: &str) {
    if plain == shimmed {
        return;
    }
    let differing = plain.lines().zip(shimmed.lines()).find(|(left, right)| left != right);
    panic!("{what}: first difference {differing:?}\n--- shimmed in full:\n{shimmed}");
}

#[test]
fn a_battery_of_sql_gives_the_same_results() {
    let dir = directory();
    let (plain, shimmed) = pair(dir.path(), &Options::default());
    let battery = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/battery.sql");
    let script = dir.path().join("battery.sql");
    fs::copy(battery, &script).expect("copy");
    give_to_postgres(&script);
    compare("battery", &plain.script(&script), &shimmed.server.script(&script));
    assert_eq!(real_relation_files(&shimmed.server.pgdata), Vec::<std::path::PathBuf>::new());
    assert!(shimmed.cache.stats().kept_bytes > 1 << 20 && shimmed.backend.wal_syncs.load(Relaxed) > 10);
    assert!(shimmed.backend.wal_announced.load(Relaxed) > 0, "the WAL of bulk loads is announced before it is synced");
    for word in ["PANIC", "invalid page", "could not read"] {
        assert!(!shimmed.server.log().contains(word), "{}", shimmed.server.log());
    }
    plain.stop();
    shimmed.stop();
}

#[test]
fn pgbench_keeps_its_books() {
    let dir = directory();
    let shimmed = shimmed(dir.path(), &Options { clean_bytes: 8 << 20, ..Options::default() });
    let server = &shimmed.server;
    run(server.client("pgbench").args(["-i", "-q", "-s", "10"]));
    let report = run(server.client("pgbench").args(["-c", "4", "-j", "2", "-t", "500"]));
    assert!(report.contains("number of transactions actually processed: 2000/2000"), "{report}");
    let sums = "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history),
        (select sum(tbalance) from pgbench_tellers) = (select sum(delta) from pgbench_history),
        (select sum(bbalance) from pgbench_branches) = (select sum(delta) from pgbench_history),
        (select count(*) from pgbench_accounts), (select count(*) from pgbench_history)";
    assert_eq!(server.sql(sums), "t|t|t|1000000|2000");
    server.sql("vacuum full; checkpoint");
    assert_eq!(server.sql(sums), "t|t|t|1000000|2000");
    shimmed.stop();
}

#[test]
fn a_base_backup_is_an_ordinary_cluster() {
    let dir = directory();
    let shimmed = shimmed(dir.path(), &Options::default());
    let server = &shimmed.server;
    server.sql("create table t as select i, md5(i::text) m from generate_series(1, 20000) i");
    server.sql("create index on t (m); vacuum t; create unlogged table u as select 1 i");
    run(server.client("pg_basebackup").args(["-X", "stream", "-c", "fast", "-D"]).arg(dir.path().join("copy")));
    run(server.client("pg_verifybackup").arg(dir.path().join("copy")));
    let copy = Server::start(dir.path(), "copy", &[], &[]);
    let sums = "set enable_seqscan = off; select count(*), min(m) from t where m > ''";
    assert_eq!(copy.sql(sums), server.sql(sums));
    assert_eq!(copy.sql("select count(*) from u"), "0");
    assert_eq!(copy.sql("create database d template template0 strategy file_copy"), "");
    copy.stop();
    shimmed.stop();
}

#[test]
fn a_full_budget_fails_the_statement_and_not_the_session() {
    let dir = directory();
    let shimmed = shimmed(dir.path(), &Options { kept_bytes: 12 << 20, ..Options::default() });
    let server = &shimmed.server;
    server.sql("create table small (i int)");
    let (out, error) =
        server.try_sql("create table big as select i, repeat('x', 500) from generate_series(1, 100000) i");
    assert!(error.contains("No space left on device"), "{out} {error}");
    // The failed table's pages are gone with it.
    assert_eq!(server.sql("insert into small select generate_series(1, 1000); select count(*) from small"), "1000");
    let script = dir.path().join("session.sql");
    fs::write(&script, "create table big as select i, repeat('x', 500) from generate_series(1, 100000) i;\nselect 'alive' || count(*) from small;\n").expect("script");
    give_to_postgres(&script);
    let said = server.script(&script);
    assert!(said.contains("No space left on device") && said.contains("alive1000"), "{said}");
    assert!(!server.log().contains("PANIC"), "{}", server.log());
    shimmed.stop();
}

#[test]
fn a_refused_wal_sync_ends_the_server() {
    let dir = directory();
    let mut shimmed = shimmed(dir.path(), &Options::default());
    shimmed.server.sql("create table t (i int)");
    shimmed.backend.fail_wal.store(true, Relaxed);
    let (_, error) = shimmed.server.try_sql("insert into t values (1)");
    assert!(!error.is_empty());
    assert!(!shimmed.server.wait().success());
    assert!(shimmed.server.log().contains("PANIC:  could not fdatasync file"), "{}", shimmed.server.log());
}

#[test]
fn a_page_that_cannot_be_had_is_an_error_and_nothing_else() {
    let dir = directory();
    let shimmed = shimmed(dir.path(), &Options::default());
    assert_eq!(shimmed.server.sql("select 1"), "1");
    shimmed.backend.fail_pages.store(true, Relaxed);
    let (out, error) = shimmed.server.try_sql("select count(*) > 1000 from pg_description");
    assert!(
        out.is_empty() && error.contains("could not read block") && error.contains("Input/output error"),
        "{error}"
    );
    shimmed.backend.fail_pages.store(false, Relaxed);
    assert_eq!(shimmed.server.sql("select count(*) > 1000 from pg_description"), "t");
    shimmed.stop();
}

#[test]
fn unlogged_relations_start_as_their_init_forks() {
    let dir = directory();
    initdb(&dir.path().join("original"));
    let before = Server::start(dir.path(), "original", &[], &[]);
    before.sql(
        "create unlogged table u (i int primary key, v text); create index on u using gin (to_tsvector('simple', v))",
    );
    before.sql("insert into u select i, 'w' || i from generate_series(1, 1000) i; vacuum u");
    before.stop();
    let shimmed = Shimmed::start(dir.path(), "shimmed", &Options::default());
    let server = &shimmed.server;
    assert_eq!(server.sql("select count(*) from u"), "0");
    server.sql("insert into u select i, 'w' || i from generate_series(1, 5000) i");
    let by_index = "set enable_seqscan = off; select count(*) from u where to_tsvector('simple', v) @@ 'w77'";
    assert_eq!(server.sql(by_index), "1");
    assert_eq!(server.sql("set enable_seqscan = off; select v from u where i = 4321"), "w4321");
    server.sql("vacuum u; checkpoint; drop table u; checkpoint");
    assert_eq!(server.sql("select pg_database_size('postgres') > 6000000"), "t");
    shimmed.stop();
}

#[test]
#[ignore = "minutes: `make regress` runs it"]
fn the_core_regression_suite_gives_the_same_results() {
    let dir = directory();
    let options = Options { settings: vec!["shared_buffers=4MB".to_owned()], ..Options::default() };
    let (plain, shimmed) = pair(dir.path(), &options);
    regress::compare(dir.path(), &plain, &shimmed.server);
    plain.stop();
    shimmed.stop();
}
