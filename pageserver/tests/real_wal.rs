//! A stock server's cluster and WAL: imported, ingested, and compared with what the server itself left on disk.

mod cluster;
mod pages;

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Instant};

use bytes::Bytes;
use cluster::{Cluster, branch_ref, branches, memory_remote};
use dormouse_pageserver::{
    base_files::base_files,
    branch::{Branch, Branches, MAX_CHAIN, Tuning},
    compaction::PlanLimits,
    remote::Remote,
    storage::{Key, Kind},
    template,
};
use pages::Contents;
use types::{BranchRef, ForkNumber, Lsn, PAGE_BYTES, PageTag, RelTag, oids};
use wal::{CheckPoint, ControlFile, WalDecodeError, WalStreamDecoder};
use wire::pageserver::{BaseFiles, BranchPoint};

struct Imported {
    remote: Arc<Remote>,
    branches: Arc<Branches>,
    template: BranchRef,
    lsn: Lsn,
}

async fn import(cluster: &Cluster, tuning: Tuning) -> Imported {
    let remote = memory_remote();
    let template = branch_ref("dormouse-template", "pg15");
    let lsn = template::import(&remote, &template, &cluster.pgdata(), |_, _| {}).await.expect("import");
    let again = template::import(&remote, &template, Path::new("/nonexistent"), |_, _| {}).await;
    assert_eq!(again.expect("already there"), lsn);
    let branches = branches(&remote, 1, tuning);
    Imported { remote, branches, template, lsn }
}

/// All forks in a data directory and their bytes.
fn relations(pgdata: &Path) -> BTreeMap<RelTag, Vec<u8>> {
    let mut relations = BTreeMap::new();
    let mut add = |spc, db, directory: &Path| {
        for entry in std::fs::read_dir(directory).expect("directory") {
            let entry = entry.expect("entry");
            let name = entry.file_name().into_string().expect("utf-8");
            let (number, suffix) = name.split_at(name.find(|c: char| !c.is_ascii_digit()).unwrap_or(name.len()));
            let fork = ForkNumber::ALL.into_iter().find(|fork| fork.suffix() == suffix);
            if let (Ok(rel), Some(fork)) = (number.parse(), fork) {
                relations.insert(RelTag { spc, db, rel, fork }, std::fs::read(entry.path()).expect("read"));
            }
        }
    };
    add(oids::GLOBAL_TABLESPACE, 0, &pgdata.join("global"));
    for entry in std::fs::read_dir(pgdata.join("base")).expect("base") {
        let entry = entry.expect("entry");
        if let Ok(db) = entry.file_name().to_str().expect("utf-8").parse() {
            add(oids::DEFAULT_TABLESPACE, db, &entry.path());
        }
    }
    relations
}

async fn read_relation(branch: &Arc<Branch>, rel: RelTag, at: Lsn) -> Option<Vec<Bytes>> {
    let blocks = branch.rel_size(rel, at).await.expect("size")?;
    let tags: Vec<_> = (0..blocks).map(|block| PageTag { rel, block }).collect();
    Some(branch.get_pages(&tags, at).await.expect("pages"))
}

/// The base files are those of the data directory.
fn compare_base_files(files: &BaseFiles, pgdata: &Path) {
    for file in &files.files {
        let on_disk = std::fs::read(pgdata.join(&file.path)).unwrap_or_else(|error| panic!("{}: {error}", file.path));
        let length = file.content.len().min(on_disk.len());
        assert!(file.content[..length] == on_disk[..length], "{} differs", file.path);
        let rest = if file.content.len() > length { &file.content[length..] } else { &on_disk[length..] };
        assert!(rest.iter().all(|byte| *byte == 0), "{} differs in length", file.path);
    }
    for directory in &files.directories {
        assert!(pgdata.join(directory).is_dir(), "{directory}");
    }
    let mut expected: Vec<String> = vec!["PG_VERSION".to_owned(), "global/pg_filenode.map".to_owned()];
    for directory in std::fs::read_dir(pgdata.join("base")).expect("base") {
        let name = directory.expect("entry").file_name().into_string().expect("utf-8");
        if name != "pgsql_tmp" {
            expected.extend([format!("base/{name}/PG_VERSION"), format!("base/{name}/pg_filenode.map")]);
        }
    }
    for slru in ["pg_xact", "pg_multixact/offsets", "pg_multixact/members", "pg_twophase"] {
        for file in std::fs::read_dir(pgdata.join(slru)).expect("directory") {
            expected.push(format!("{slru}/{}", file.expect("entry").file_name().into_string().expect("utf-8")));
        }
    }
    for path in expected {
        assert!(files.files.iter().any(|file| file.path == path), "{path} is missing");
    }
}

#[tokio::test]
async fn an_imported_cluster_reads_back_as_it_is() {
    let Some(cluster) = Cluster::init() else { return };
    let imported = import(&cluster, Tuning::default()).await;
    let project = branch_ref("p", "main");
    let lsn = imported.branches.create(&project, &imported.template, BranchPoint::Head).await.expect("create");
    assert_eq!(lsn, imported.lsn);
    let branch = imported.branches.get(&project).await.expect("attach");
    let expected = relations(&cluster.pgdata());
    let listed = branch.scan(Key::of(Kind::RelSize), Key::last_of(Kind::RelSize), lsn).await.expect("scan");
    assert_eq!(
        listed.keys().filter_map(Key::rel_tag).collect::<Vec<_>>(),
        expected.keys().copied().collect::<Vec<_>>()
    );
    for (rel, content) in expected {
        let pages = read_relation(&branch, rel, lsn).await.expect("exists");
        assert!(pages.concat() == content, "{rel} differs");
    }
    let started = Instant::now();
    let files = base_files(&branch, lsn).await.expect("base files");
    println!("base files in {:?}", started.elapsed());
    compare_base_files(&files, &cluster.pgdata());
    assert_eq!(files.control_file, std::fs::read(cluster.pgdata().join("global/pg_control")).expect("read"));
    let control = ControlFile::parse(&files.control_file).expect("control file");
    assert_eq!(files.prev_record_lsn, control.checkpoint_lsn());
    assert_eq!(files.checkpoint, &control.checkpoint().to_bytes()[..]);
    let running = branch.logical_bytes().await.expect("size");
    assert!((20 << 20..60 << 20).contains(&running), "{running}");
}

const WORKLOAD: &str = include_str!("sql/workload.sql");

/// Everything from the cluster's start on, as whole records.
fn committed_wal(pgdata: &Path, from: Lsn) -> Vec<u8> {
    let mut wal = Vec::new();
    let mut decoder = WalStreamDecoder::new(from);
    let mut at = from;
    while let Ok(segment) = std::fs::read(pgdata.join("pg_wal").join(at.segment_file_name())) {
        let rest = &segment[at.segment_offset() as usize..];
        wal.extend_from_slice(rest);
        decoder.feed(at, rest);
        at += rest.len() as u64;
        loop {
            match decoder.poll_record().map(|record| record.is_some()) {
                Ok(true) => {}
                Ok(false) => break,
                Err(WalDecodeError::EndOfWal { .. }) => {
                    wal.truncate((decoder.position().0 - from.0) as usize);
                    return wal;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
    wal.truncate((decoder.position().0 - from.0) as usize);
    wal
}

/// Feeds WAL in pieces of odd sizes; the position it ends at.
async fn ingest(branch: &Arc<Branch>, from: Lsn, wal: &[u8]) -> Lsn {
    let mut at = from;
    for piece in wal.chunks(100_003) {
        branch.ingest_wal(at, piece).await.expect("ingest");
        at += piece.len() as u64;
    }
    branch.tip().last_record_lsn
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_wal_gives_the_pages_of_the_server() {
    let Some(mut cluster) = Cluster::init() else { return };
    // Small, so that layers and image sets are made on the way.
    let plan = PlanLimits { deltas_per_merge: 2, image_min_bytes: 1 << 20, cell_bytes: 1 << 20 };
    let tuning = Tuning { checkpoint_distance_bytes: 2 << 20, plan, layer_bytes: 1 << 19, ..Tuning::default() };
    let imported = import(&cluster, tuning.clone()).await;
    let project = branch_ref("p", "main");
    imported.branches.create(&project, &imported.template, BranchPoint::Head).await.expect("create");

    cluster.start(&["full_page_writes=off", "wal_keep_size=4GB", "max_wal_size=8GB", "autovacuum_naptime=5s"]);
    cluster.sql("postgres", "create database work");
    cluster.pgbench(&["-i", "-q", "-s", "2", "work"]);
    WORKLOAD.split("\n\\connect\n").for_each(|part| {
        cluster.sql("work", part);
    });
    cluster.pgbench(&["-n", "-c", "4", "-t", "300", "work"]);
    cluster.sql("postgres", "create database copied template work strategy file_copy");
    cluster.sql("copied", "delete from pgbench_accounts where aid % 3 = 0");
    cluster.sql("copied", "vacuum pgbench_accounts");
    cluster.sql("postgres", "create database gone template work strategy file_copy");
    cluster.sql("postgres", "drop database gone");
    // Left prepared; its row locks and those of a second transaction make multixacts.
    cluster.sql("work", "begin; select from items where id in (1, 2, 3, 4) for share; insert into short values (-1000); prepare transaction 'left';");
    cluster.sql(
        "work",
        "begin; select from items where id in (1, 2, 3) for key share; insert into short values (-1001); commit;",
    );
    let databases = ["postgres", "work", "copied"];
    let contents = Contents::of(&cluster, &[&databases[..], &["template1"]].concat());
    let digests: Vec<String> = databases.iter().map(|database| pages::digests(&cluster, database)).collect();
    cluster.stop();

    let branch = imported.branches.get(&project).await.expect("attach");
    let wal = committed_wal(&cluster.pgdata(), imported.lsn);
    let started = Instant::now();
    let end = ingest(&branch, imported.lsn, &wal).await;
    println!("{} MiB of WAL with small layers in {:?}", wal.len() >> 20, started.elapsed());
    let plain = branches(&imported.remote, 1, Tuning::default());
    let undisturbed = branch_ref("p", "undisturbed");
    plain.create(&undisturbed, &imported.template, BranchPoint::Head).await.expect("create");
    let undisturbed = plain.get(&undisturbed).await.expect("attach");
    let started = Instant::now();
    assert_eq!(ingest(&undisturbed, imported.lsn, &wal).await, end);
    println!("{} MiB of WAL with default settings in {:?}", wal.len() >> 20, started.elapsed());
    let started = Instant::now();
    compare_with_disk(&undisturbed, end, &cluster, &contents).await;
    println!("first reads in {:?}", started.elapsed());
    assert_eq!(end, imported.lsn + wal.len() as u64);
    compare_with_disk(&branch, end, &cluster, &contents).await;
    let uploaded = branch.flush().await.expect("flush");
    assert_eq!(uploaded, end);
    compare_counters(&base_files(&branch, end).await.expect("base files"), &cluster);
    branch.compact().await.expect("compact");
    check_chains(&branch, end).await;
    undisturbed.flush().await.expect("flush");
    check_chains(&undisturbed, end).await;

    // The same again from the object store alone, by a later generation, through a child.
    let later = branches(&imported.remote, 2, tuning);
    let child = branch_ref("p", "child");
    assert_eq!(later.create(&child, &project, BranchPoint::Lsn(end)).await.expect("create"), end);
    let child = later.get(&child).await.expect("attach");
    compare_with_disk(&child, end, &cluster, &contents).await;
    start_from_pageserver(&child, end, &cluster, &databases, &digests).await;
}

/// How many records a page from layers takes to be made, now and in the middle of the history.
async fn check_chains(branch: &Arc<Branch>, end: Lsn) {
    let middle = Lsn((branch.start_lsn().0 + end.0) / 2);
    for at in [middle, end] {
        let mut longest = 0;
        for key in branch.scan(Key::of(Kind::RelPage), Key::MAX, at).await.expect("scan").into_keys() {
            longest = longest.max(branch.chain_length(key, at).await.expect("length"));
        }
        println!("{}: at most {longest} records to make a page as of {at}", branch.name());
        // At the end there may be images of everything; in the middle of so much WAL there are not.
        let least = if at == end { 0 } else { 2 };
        assert!((least..=usize::from(MAX_CHAIN)).contains(&longest), "{longest}");
    }
}

async fn compare_with_disk(branch: &Arc<Branch>, at: Lsn, cluster: &Cluster, contents: &Contents) {
    let mut compared = 0;
    let mut differing: BTreeMap<RelTag, Vec<u32>> = BTreeMap::new();
    let unlogged = base_files(branch, at).await.expect("base files").unlogged.clone();
    for (rel, on_disk) in relations(&cluster.pgdata()) {
        // The free space map is not in WAL; unlogged relations are, but for their init fork, not either.
        let not_logged = rel.fork != ForkNumber::Init && unlogged.contains(&rel.with_fork(ForkNumber::Main));
        if rel.fork == ForkNumber::Fsm || not_logged || contents.is_sequence(rel) {
            continue;
        }
        // A visibility map without bits may never have been logged.
        let pages = read_relation(branch, rel, at).await;
        assert!(pages.is_some() || rel.fork == ForkNumber::Vm, "{rel} is missing");
        let pages = pages.unwrap_or_default();
        for (block, expected) in on_disk.chunks(PAGE_BYTES).enumerate() {
            compared += 1;
            let same = match pages.get(block) {
                Some(page) => contents.same_page(PageTag { rel, block: block as u32 }, page, expected),
                // Extended by the server, never logged.
                None => expected.iter().all(|byte| *byte == 0) || contents.is_empty_page(expected),
            };
            if !same {
                differing.entry(rel).or_default().push(block as u32);
            }
        }
    }
    println!("{compared} pages compared");
    assert!(differing.is_empty(), "{}", contents.describe(&differing));
    assert!(compared > 5000, "only {compared} pages");
}

fn compare_counters(files: &BaseFiles, cluster: &Cluster) {
    compare_base_files(files, &cluster.pgdata());
    let ours = CheckPoint::from_bytes(&files.checkpoint).expect("checkpoint");
    let control = std::fs::read(cluster.pgdata().join("global/pg_control")).expect("read");
    let theirs = ControlFile::parse(&control).expect("control file");
    assert_eq!(files.prev_record_lsn, theirs.checkpoint_lsn());
    let theirs = theirs.checkpoint();
    // WAL names object ids ahead of their use, as after a crash.
    assert!(ours.next_oid >= theirs.next_oid, "{ours:?} {theirs:?}");
    assert!(ours.next_xid == theirs.next_xid && ours.next_multi == theirs.next_multi, "{ours:?} {theirs:?}");
    assert_eq!((ours.next_multi_offset, ours.oldest_xid), (theirs.next_multi_offset, theirs.oldest_xid));
    assert!(files.files.iter().any(|file| file.path.starts_with("pg_twophase/")), "a transaction is prepared");
    assert!(!files.unlogged.is_empty());
}

/// Makes a data directory of what the pageserver has, as a compute would, and starts a stock server in it.
async fn start_from_pageserver(
    branch: &Arc<Branch>,
    at: Lsn,
    original: &Cluster,
    databases: &[&str],
    digests: &[String],
) {
    let files = base_files(branch, at).await.expect("base files");
    let mut copy = Cluster::empty();
    let pgdata = copy.pgdata();
    for directory in &files.directories {
        std::fs::create_dir_all(pgdata.join(directory)).expect("directory");
    }
    for file in &files.files {
        std::fs::write(pgdata.join(&file.path), &file.content).expect("write");
    }
    for name in ["postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf"] {
        std::fs::copy(original.pgdata().join(name), pgdata.join(name)).expect("copy");
    }
    write_relations(branch, at, &files, &pgdata).await;
    write_control(&files, &pgdata);
    std::fs::set_permissions(&pgdata, std::os::unix::fs::PermissionsExt::from_mode(0o700)).expect("mode");
    copy.own(&pgdata);
    copy.start(&["full_page_writes=off"]);
    for (database, expected) in databases.iter().zip(digests) {
        assert_eq!(pages::digests(&copy, database), *expected, "{database}");
    }
    for sql in ["commit prepared 'left'", "insert into items (body) values ('after')", "vacuum"] {
        copy.sql("work", sql);
    }
    pages::check_indexes(&copy, databases);
    copy.stop();
}

async fn write_relations(branch: &Arc<Branch>, at: Lsn, files: &BaseFiles, pgdata: &Path) {
    let forks = branch.scan(Key::of(Kind::RelSize), Key::last_of(Kind::RelSize), at).await.expect("scan");
    // An unlogged relation starts as its init fork; WAL does not even create its main one.
    let logged = forks.keys().filter_map(Key::rel_tag).map(|rel| (rel, rel));
    let reset = files.unlogged.iter().map(|main| (*main, main.with_fork(ForkNumber::Init)));
    for (rel, source) in logged.chain(reset) {
        let directory = if rel.db == 0 { "global".to_owned() } else { format!("base/{}", rel.db) };
        let content = read_relation(branch, source, at).await.expect("exists").concat();
        let name = format!("{}{}", rel.rel, rel.fork.suffix());
        std::fs::write(pgdata.join(directory).join(name), content).expect("write");
    }
}

fn write_control(files: &BaseFiles, pgdata: &Path) {
    let mut control = ControlFile::parse(&files.control_file).expect("control file");
    let start = wal::encode::record_start_at(files.lsn);
    let counters = CheckPoint::from_bytes(&files.checkpoint).expect("checkpoint").for_shutdown_at(start);
    let record = wal::checkpoint::shutdown_record(&counters);
    let system = control.system_identifier();
    let encoded = wal::encode::encode_record(files.lsn, files.prev_record_lsn, system, &record);
    control.set_shutdown_at(encoded.start_lsn, &counters);
    std::fs::write(pgdata.join("global/pg_control"), control.to_bytes()).expect("write");
    for (name, content) in wal::encode::segment_with(&encoded, system) {
        std::fs::write(pgdata.join("pg_wal").join(name), content).expect("write");
    }
}
