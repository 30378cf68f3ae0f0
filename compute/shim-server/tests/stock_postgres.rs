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
    for word in ["PANIC", "invalid page", "could not read"] {
        assert!(!shimmed.server.log().contains(word), "{}", shimmed.server.log());
    }
    plain.stop();
    shimmed.stop();
}
