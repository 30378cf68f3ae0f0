//! Pages that had to make way come back as WAL describes them, and nobody can tell.

mod support;

use std::{fs, path::Path};

use support::{replay::Replayed, *};

fn start(dir: &Path, options: &Options) -> Shimmed<Replayed> {
    Shimmed::start_on(dir, "shimmed", options, |cache| {
        Replayed::new(&dir.join("original"), &dir.join("shimmed"), cache)
    })
}

fn small(kept_bytes: u64) -> Options {
    let settings = ["shared_buffers=1MB", "autovacuum=off", "wal_keep_size=1GB"].map(str::to_owned).to_vec();
    Options { settings, clean_bytes: 2 << 20, kept_bytes }
}

#[test]
fn a_battery_of_sql_within_a_small_budget() {
    let dir = directory();
    initdb(&dir.path().join("original"));
    run(std::process::Command::new("cp").arg("-a").arg(dir.path().join("original")).arg(dir.path().join("plain")));
    let options = small(24 << 20);
    let plain = Server::start(dir.path(), "plain", &options.settings, &[]);
    let shimmed = start(dir.path(), &options);
    let script = dir.path().join("battery.sql");
    fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/battery.sql"), &script).expect("copy");
    give_to_postgres(&script);
    let (left, right) = (plain.script(&script), shimmed.server.script(&script));
    let differing = left.lines().zip(right.lines()).find(|(left, right)| left != right);
    assert!(left == right, "first difference: {differing:?}\n{right}");
    assert!(shimmed.backend.pages_read() > 2000, "{} pages read", shimmed.backend.pages_read());
    plain.stop();
    shimmed.stop();
}

#[test]
fn pgbench_within_a_small_budget() {
    let dir = directory();
    initdb(&dir.path().join("original"));
    let shimmed = start(dir.path(), &Options { clean_bytes: 1 << 20, ..small(4 << 20) });
    let server = &shimmed.server;
    run(server.client("pgbench").args(["-i", "-q", "-I", "dt"]));
    server.sql("insert into pgbench_branches values (1, 0); insert into pgbench_tellers select i, 1, 0 from generate_series(1, 10) i");
    // What one transaction writes must fit the budget.
    for batch in 0..20 {
        let first = batch * 5000 + 1;
        server.sql(&format!(
            "insert into pgbench_accounts select i, 1, 0, 'x' from generate_series({first}, {first} + 4999) i"
        ));
    }
    run(server.client("pgbench").args(["-i", "-q", "-I", "p"]));
    for _ in 0..3 {
        run(server.client("pgbench").args(["-n", "-c", "4", "-j", "2", "-t", "1000"]));
        let sums = "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history),
            (select sum(tbalance) from pgbench_tellers) = (select sum(delta) from pgbench_history),
            (select count(*) from pgbench_accounts)";
        assert_eq!(server.sql(sums), "t|t|100000");
        server.sql("vacuum pgbench_accounts; create extension if not exists amcheck");
        let checks = "select bt_index_parent_check('pgbench_accounts_pkey', true); select count(*) from verify_heapam('pgbench_accounts')";
        assert_eq!(server.sql(checks), "\n0");
    }
    assert!(shimmed.backend.pages_read() > 1000, "{} pages read", shimmed.backend.pages_read());
    shimmed.stop();
}

#[test]
#[ignore = "minutes: `make regress` runs it"]
fn the_core_regression_suite_within_a_small_budget() {
    let dir = directory();
    initdb(&dir.path().join("original"));
    run(std::process::Command::new("cp").arg("-a").arg(dir.path().join("original")).arg(dir.path().join("plain")));
    let options = small(64 << 20);
    let plain = Server::start(dir.path(), "plain", &options.settings, &[]);
    let shimmed = start(dir.path(), &options);
    regress::compare(dir.path(), &plain, &shimmed.server);
    eprintln!("{} pages read", shimmed.backend.pages_read());
    plain.stop();
    shimmed.stop();
}
