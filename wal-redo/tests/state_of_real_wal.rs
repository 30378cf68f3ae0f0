//! Everything that is not the content of relation pages: SLRU pages, sizes of relations, relation maps, two-phase files and the
//! checkpoint's counters, made from a stock server's WAL and compared with its files after it has stopped.

#[path = "../../wal/tests/support/mod.rs"]
mod support;

use std::fs;

use dormouse_wal_redo::{SlruKind, changes};
use redo_oracle::{control_file, state::State};
use support::{Cluster, WORKLOAD, program, segments, succeed};
use types::Lsn;
use wal::{OwnedRecord, WalDecodeError, WalStreamDecoder};

const SETTINGS: &str = "wal_level = logical\nmax_prepared_transactions = 10\nwal_keep_size = 2GB\nmax_wal_size = 4GB\n\
                        shared_buffers = 16MB\nfsync = off\nfull_page_writes = off";

/// More ids than a page of each SLRU area holds; then everything is frozen and truncated.
const MANY_IDS: &str = include_str!("sql/many_ids.sql");

/// All records from one place on.
fn records(cluster: &Cluster, start: Lsn) -> Vec<OwnedRecord> {
    let mut decoder = WalStreamDecoder::new(start);
    let mut records = Vec::new();
    for file in segments(&cluster.wal_dir()) {
        let name = file.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
        let at = decoder.fed_until();
        if name < at.segment_file_name() {
            continue;
        }
        assert_eq!(name, at.segment_file_name());
        decoder.feed(at, &fs::read(&file).expect("a segment")[at.segment_offset() as usize..]);
        loop {
            match decoder.poll_record() {
                Ok(Some(record)) => records.push(record.to_owned()),
                Ok(None) => break,
                Err(WalDecodeError::EndOfWal { .. }) => return records,
                Err(error) => panic!("{error}"),
            }
        }
    }
    panic!("the WAL has no end")
}

/// Runs SQL on a new cluster and compares what its WAL says with its files.
fn check(settings: &str, work: impl FnOnce(&Cluster)) -> State {
    check_on(Cluster::init(), settings, work)
}

fn check_on(mut cluster: Cluster, settings: &str, work: impl FnOnce(&Cluster)) -> State {
    cluster.configure(SETTINGS);
    cluster.configure(settings);
    let mut model = State::of(&cluster.data());
    let start = control_file(&cluster.data()).checkpoint_lsn();
    cluster.start();
    work(&cluster);
    cluster.stop("fast");
    let records = records(&cluster, start);
    let (shutdown, before) = records.split_last().expect("records");
    for record in before {
        let record = record.decode().expect("a good record");
        model.apply(&record, &changes(&record).expect("a known record")).expect("it applies");
    }
    println!("{} records, {} commits", records.len(), model.commits);

    let truth = State::of(&cluster.data());
    assert_eq!(shutdown.start_lsn, control_file(&cluster.data()).checkpoint_lsn());
    assert_eq!(model.differences(&truth, &cluster.data()), Vec::<String>::new());
    model
}

#[test]
fn a_workload_of_all_kinds() {
    let model = check("", |cluster| {
        cluster.sql(WORKLOAD);
        succeed(cluster.client("pgbench").args(["-i", "-q", "-s", "1", "postgres"]));
        succeed(cluster.client("pgbench").args(["-c", "4", "-j", "2", "-t", "100", "-n", "postgres"]));
    });
    assert_eq!(model.two_phase.len(), 1, "one transaction stays prepared");
    assert!(!model.slru.keys().any(|(kind, _)| *kind == SlruKind::CommitTs));
}

#[test]
fn many_ids_with_commit_timestamps_then_everything_frozen() {
    let model = check(
        "track_commit_timestamp = on\nautovacuum = off\nvacuum_freeze_min_age = 0\nvacuum_freeze_table_age = 0\n\
         vacuum_multixact_freeze_min_age = 0\nvacuum_multixact_freeze_table_age = 0",
        |cluster| {
            cluster.sql(MANY_IDS);
            cluster.sql("ALTER DATABASE template0 ALLOW_CONNECTIONS true");
            succeed(cluster.client("vacuumdb").args(["--all", "--freeze", "-q"]));
            cluster.sql("INSERT INTO noise VALUES (1)");
        },
    );
    let counters = model.counters.expect("counters");
    assert!(counters.next_multi > 2048 && counters.next_xid > 32768 && counters.oldest_multi > 2048, "{counters:?}");
}

/// The cluster's next multixact and member stand just before the last ones, which the first ones follow.
#[test]
fn multixacts_and_their_members_wrap_around() {
    let cluster = Cluster::init();
    let (next_multi, next_member) = (u32::MAX - 100, u32::MAX - 700);
    let ids = format!("{next_multi},{}", next_multi - 10);
    succeed(program("pg_resetwal").args(["-m", &ids, "-O", &next_member.to_string()]).arg(cluster.data()));
    // A server looks at the pages that the next ones are on; 32 pages make a segment.
    for (area, page) in [("offsets", next_multi / 2048), ("members", next_member / 1636)] {
        let pages = vec![0; (page % 32 + 1) as usize * 8192];
        cluster.write(&format!("pg_multixact/{area}/{:04X}", page / 32), &pages);
    }
    let model = check_on(cluster, "autovacuum = off", |cluster| {
        // Each row's second locker makes a multixact of two members: 500 of them pass both ends.
        cluster.sql(
            "CREATE TABLE locked (id int PRIMARY KEY);
             INSERT INTO locked SELECT generate_series(1, 500);
             DO $$ BEGIN FOR i IN 1..500 LOOP PERFORM 1 FROM locked WHERE id = i FOR KEY SHARE;
               BEGIN UPDATE locked SET id = id WHERE id = i; EXCEPTION WHEN OTHERS THEN NULL; END; COMMIT; END LOOP; END $$;",
        );
    });
    let counters = model.counters.expect("counters");
    let (next_multi, next_member) = (counters.next_multi, counters.next_multi_offset);
    assert!((300..1000).contains(&next_multi) && (200..2000).contains(&next_member), "{counters:?}");
}
