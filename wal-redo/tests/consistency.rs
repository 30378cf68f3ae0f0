//! The library's redo against Postgres's own pages, record by record (see the crate `redo-oracle`).

#[path = "../../wal/tests/support/mod.rs"]
mod support;

use redo_oracle::{Report, check};
use support::{Cluster, succeed};

/// What every run needs: images of all touched pages in every record, and all WAL kept.
const CHECKING: &str = "wal_consistency_checking = all\nautovacuum = off\nfsync = off\nwal_keep_size = 100GB\n\
                        max_wal_size = 20GB\nmax_connections = 30";

fn run(settings: &str, workload: impl FnOnce(&Cluster)) -> Report {
    let mut cluster = Cluster::init();
    cluster.configure(CHECKING);
    cluster.configure(settings);
    let before = cluster.copy();
    cluster.start();
    workload(&cluster);
    cluster.stop("fast");
    let report = check(&before.data(), &cluster.data());
    println!("{settings}\n{report}");
    report
}

fn pgbench(cluster: &Cluster, arguments: &[&str]) {
    succeed(cluster.client("pgbench").args(arguments).arg("postgres"));
}

fn assert_covers(report: &Report, kinds: &[&str]) {
    assert!(report.is_clean(), "redo differs from Postgres:\n{report}");
    let missing: Vec<_> = kinds.iter().filter(|kind| report.compared(kind) == 0).collect();
    assert!(missing.is_empty(), "the workload wrote no {missing:?}");
}

#[test]
fn heap_and_btree() {
    let report = run("full_page_writes = off\nwal_level = logical", |cluster| {
        cluster.sql(include_str!("sql/heap.sql"));
        cluster.sql(include_str!("sql/btree.sql"));
    });
    assert_covers(
        &report,
        &[
            "Heap/INSERT",
            "Heap/INSERT+INIT",
            "Heap/DELETE",
            "Heap/UPDATE",
            "Heap/UPDATE+INIT",
            "Heap/HOT_UPDATE",
            "Heap/HEAP_CONFIRM",
            "Heap/LOCK",
            "Heap/INPLACE",
            "Heap2/PRUNE",
            "Heap2/VACUUM",
            "Heap2/FREEZE_PAGE",
            "Heap2/VISIBLE",
            "Heap2/MULTI_INSERT",
            "Heap2/MULTI_INSERT+INIT",
            "Heap2/LOCK_UPDATED",
            "Btree/INSERT_LEAF",
            "Btree/INSERT_UPPER",
            "Btree/SPLIT_L",
            "Btree/SPLIT_R",
            "Btree/INSERT_POST",
            "Btree/DEDUP",
            "Btree/DELETE",
            "Btree/UNLINK_PAGE",
            "Btree/NEWROOT",
            "Btree/MARK_PAGE_HALFDEAD",
            "Btree/VACUUM",
            "Sequence/LOG",
        ],
    );
}

#[test]
fn other_index_types() {
    let report = run("full_page_writes = off", |cluster| drop(cluster.sql(include_str!("sql/indexes.sql"))));
    assert_covers(
        &report,
        &[
            "Hash/INIT_META_PAGE",
            "Hash/INIT_BITMAP_PAGE",
            "Hash/INSERT",
            "Hash/ADD_OVFL_PAGE",
            "Hash/SPLIT_ALLOCATE_PAGE",
            "Hash/SPLIT_COMPLETE",
            "Hash/MOVE_PAGE_CONTENTS",
            "Hash/SQUEEZE_PAGE",
            "Hash/DELETE",
            "Hash/UPDATE_META_PAGE",
            "Hash/VACUUM_ONE_PAGE",
            "Gin/CREATE_PTREE",
            "Gin/INSERT",
            "Gin/DELETE_PAGE",
            "Gin/UPDATE_META_PAGE",
            "Gin/INSERT_LISTPAGE",
            "Gin/DELETE_LISTPAGE",
            "Gin/VACUUM_DATA_LEAF_PAGE",
            "Gist/PAGE_UPDATE",
            "Gist/DELETE",
            "Gist/PAGE_SPLIT",
            "Gist/PAGE_DELETE",
            "SPGist/ADD_LEAF",
            "SPGist/MOVE_LEAFS",
            "SPGist/ADD_NODE",
            "SPGist/SPLIT_TUPLE",
            "SPGist/PICKSPLIT",
            "SPGist/VACUUM_LEAF",
            "SPGist/VACUUM_ROOT",
            "SPGist/VACUUM_REDIRECT",
            "BRIN/CREATE_INDEX",
            "BRIN/INSERT",
            "BRIN/UPDATE",
            "BRIN/SAMEPAGE_UPDATE",
            "BRIN/REVMAP_EXTEND",
            "BRIN/DESUMMARIZE",
        ],
    );
}

#[test]
fn full_page_images_in_every_compression() {
    for compression in ["off", "pglz", "lz4", "zstd"] {
        let settings = format!("full_page_writes = on\nwal_log_hints = on\nwal_compression = {compression}");
        let report = run(&settings, |cluster| {
            pgbench(cluster, &["-i", "-q", "-s", "1"]);
            cluster.sql("CHECKPOINT");
            pgbench(cluster, &["-n", "-c", "4", "-t", "100"]);
            cluster.sql("VACUUM FREEZE; CHECKPOINT; UPDATE pgbench_branches SET bbalance = 1");
        });
        assert_covers(&report, &["Heap/INSERT", "Heap/HOT_UPDATE"]);
        assert!(report.kinds.values().map(|counts| counts.restored).sum::<u64>() > 100, "{compression}");
    }
}

#[test]
fn pgbench_with_concurrent_sessions() {
    let report = run("full_page_writes = off", |cluster| {
        pgbench(cluster, &["-i", "-q", "-s", "1", "-I", "dtgvpf"]);
        pgbench(cluster, &["-n", "-c", "8", "-T", "5"]);
        cluster.sql("VACUUM; REINDEX DATABASE postgres; VACUUM FULL pgbench_accounts");
    });
    assert_covers(&report, &["Heap/HOT_UPDATE", "Heap2/PRUNE"]);
}
