//! Everything that is not the content of relation pages: SLRU pages, sizes of relations, relation maps, two-phase files and the
//! checkpoint's counters, made from a stock server's WAL and compared with its files after it has stopped.

#[path = "../../wal/tests/support/mod.rs"]
mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use dormouse_wal_redo::{Change, SlruKind, changes, checkpoint, commit_ts_changes, redo_slru_page, truncation_removes};
use support::{Cluster, WORKLOAD, segments, succeed};
use types::{ForkNumber, Lsn, PAGE_BYTES, REL_SEGMENT_BLOCKS, RelTag};
use wal::{CheckPoint, ControlFile, DecodedRecord, WalDecodeError, WalStreamDecoder};

const SETTINGS: &str = "wal_level = logical\nmax_prepared_transactions = 10\nwal_keep_size = 2GB\nmax_wal_size = 4GB\n\
                        shared_buffers = 16MB\nfsync = off\nfull_page_writes = off";

/// More transactions than a clog page (32768) or commit-timestamp page (819) holds, more multixacts than an offsets page (2048)
/// and members than a members page (1636), then everything frozen and truncated.
const MANY_IDS: &str = r#"
CREATE TABLE locked (id int PRIMARY KEY);
INSERT INTO locked SELECT generate_series(1, 2500);
CREATE TABLE noise (a int);
DO $$ BEGIN FOR i IN 1..34000 LOOP INSERT INTO noise VALUES (i); COMMIT; END LOOP; END $$;
DO $$ BEGIN FOR i IN 1..2200 LOOP PERFORM 1 FROM locked WHERE id = i FOR KEY SHARE;
  BEGIN UPDATE locked SET id = id WHERE id = i; EXCEPTION WHEN OTHERS THEN NULL; END; COMMIT; END LOOP; END $$;
BEGIN; DO $$ BEGIN FOR i IN 1..2000 LOOP BEGIN INSERT INTO noise VALUES (i); EXCEPTION WHEN OTHERS THEN NULL; END; END LOOP; END $$; COMMIT;
"#;

#[derive(Default)]
struct Model {
    counters: Option<CheckPoint>,
    slru: BTreeMap<(SlruKind, u32), Box<[u8; PAGE_BYTES]>>,
    rels: BTreeMap<RelTag, u32>,
    databases: BTreeSet<(u32, u32)>,
    maps: BTreeMap<(u32, u32), Bytes>,
    two_phase: BTreeMap<u32, Bytes>,
    commits: usize,
}

impl Model {
    /// What a stopped cluster's files hold.
    fn of(cluster: &Cluster) -> Model {
        let data = cluster.data();
        let mut model = Model { counters: Some(control(cluster).checkpoint()), ..Model::default() };
        for kind in SlruKind::ALL {
            for (name, bytes) in files(&data.join(kind.directory())) {
                let segment = u32::from_str_radix(&name, 16).expect("a segment's name");
                for (index, page) in bytes.chunks_exact(PAGE_BYTES).enumerate() {
                    model.slru.insert((kind, segment * 32 + index as u32), Box::new(page.try_into().expect("a page")));
                }
            }
        }
        model.scan_directory(&data.join("global"), 1664, 0);
        for entry in fs::read_dir(data.join("base")).expect("base") {
            let path = entry.expect("an entry").path();
            let number = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            // Beside the databases there is `pgsql_tmp`.
            let Some(db) = number else { continue };
            model.databases.insert((1663, db));
            model.scan_directory(&path, 1663, db);
        }
        for (name, bytes) in files(&data.join("pg_twophase")) {
            model.two_phase.insert(u32::from_str_radix(&name, 16).expect("an xid"), bytes.into());
        }
        model
    }

    fn scan_directory(&mut self, dir: &Path, spc: u32, db: u32) {
        for (name, bytes) in files(dir) {
            if name == "pg_filenode.map" {
                self.maps.insert((spc, db), bytes.into());
            } else if let Some((rel, segment)) = parse_rel_file(&name, spc, db) {
                let end = segment * REL_SEGMENT_BLOCKS + (bytes.len() / PAGE_BYTES) as u32;
                let size = self.rels.entry(rel).or_default();
                *size = end.max(*size);
            }
        }
    }

    fn apply(&mut self, record: &DecodedRecord) {
        let counters = self.counters.as_mut().expect("counters");
        let mut listed = changes(record).expect("a known record");
        listed.extend(commit_ts_changes(record, counters).expect("a valid record"));
        checkpoint::advance(counters, record);
        for change in listed {
            self.apply_change(record, change);
        }
    }

    fn apply_change(&mut self, record: &DecodedRecord, change: Change) {
        match change {
            Change::Page { tag, .. } => {
                let size = self.rels.entry(tag.rel).or_default();
                *size = (tag.block + 1).max(*size);
            }
            Change::SlruPage { slru, page, .. } => {
                let bytes = self.slru.entry((slru, page)).or_insert_with(|| Box::new([0; PAGE_BYTES]));
                redo_slru_page(bytes, slru, page, record).expect("it applies");
            }
            Change::SlruTruncate { slru, cutoff_page } => {
                self.slru.retain(|(kind, page), _| *kind != slru || !truncation_removes(slru, page / 32, cutoff_page));
            }
            Change::CreateRel(rel) => drop(self.rels.entry(rel).or_default()),
            Change::TruncateRel { rel, blocks } => {
                if let Some(size) = self.rels.get_mut(&rel) {
                    *size = blocks.min(*size);
                }
            }
            Change::DropRel(rel) => self.rels.retain(|known, _| known.with_fork(ForkNumber::Main) != rel),
            Change::CreateDatabase { spc, db } => drop(self.databases.insert((spc, db))),
            Change::CopyDatabase { src_spc, src_db, spc, db } => {
                self.databases.insert((spc, db));
                let source = self.rels.iter().filter(|(rel, _)| (rel.spc, rel.db) == (src_spc, src_db));
                let copies: Vec<_> = source.map(|(rel, size)| (RelTag { spc, db, ..*rel }, *size)).collect();
                self.rels.extend(copies);
                self.maps.insert((spc, db), self.maps[&(src_spc, src_db)].clone());
            }
            Change::DropDatabase { spc, db } => {
                self.databases.remove(&(spc, db));
                self.maps.remove(&(spc, db));
                self.rels.retain(|rel, _| (rel.spc, rel.db) != (spc, db));
            }
            Change::RelationMap { spc, db, content } => drop(self.maps.insert((spc, db), content)),
            Change::TwoPhaseCreate { xid, content } => drop(self.two_phase.insert(xid, content)),
            Change::TwoPhaseRemove { xid } => drop(self.two_phase.remove(&xid)),
            Change::Commit { timestamp_us } => {
                assert!(timestamp_us > 0);
                self.commits += 1;
            }
            Change::CreateTablespace { .. } | Change::DropTablespace { .. } | Change::AuxFile { .. } => {
                panic!("the workload has none: {change:?}")
            }
        }
    }
}

fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry").path());
    let name = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
    entries.filter(|path| path.is_file()).map(|path| (name(&path), fs::read(&path).expect("a file"))).collect()
}

/// `16384`, `16384.1`, `16384_vm`: which fork and segment.
fn parse_rel_file(name: &str, spc: u32, db: u32) -> Option<(RelTag, u32)> {
    let (name, segment) = match name.split_once('.') {
        Some((name, segment)) => (name, segment.parse().ok()?),
        None => (name, 0),
    };
    let (number, fork) = match name.split_once('_') {
        Some((number, suffix)) => {
            let fork = ForkNumber::ALL.into_iter().find(|fork| fork.suffix().strip_prefix('_') == Some(suffix))?;
            (number, fork)
        }
        None => (name, ForkNumber::Main),
    };
    Some((RelTag { spc, db, rel: number.parse().ok()?, fork }, segment))
}

fn control(cluster: &Cluster) -> ControlFile {
    ControlFile::parse(&fs::read(cluster.data().join("global/pg_control")).expect("pg_control")).expect("valid")
}

/// All records from one place on.
fn records(cluster: &Cluster, start: Lsn) -> Vec<DecodedRecord> {
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
                Ok(Some(record)) => records.push(record),
                Ok(None) => break,
                Err(WalDecodeError::EndOfWal { .. }) => return records,
                Err(error) => panic!("{error}"),
            }
        }
    }
    panic!("the WAL has no end")
}

/// Runs SQL on a new cluster and compares what its WAL says with its files.
fn check(settings: &str, work: impl FnOnce(&Cluster)) -> Model {
    let mut cluster = Cluster::init();
    cluster.configure(SETTINGS);
    cluster.configure(settings);
    let mut model = Model::of(&cluster);
    let start = control(&cluster).checkpoint_lsn();
    cluster.start();
    work(&cluster);
    cluster.stop("fast");
    let records = records(&cluster, start);
    let (shutdown, before) = records.split_last().expect("records");
    before.iter().for_each(|record| model.apply(record));
    println!("{} records, {} commits", records.len(), model.commits);

    let truth = Model::of(&cluster);
    assert_eq!(shutdown.start_lsn, control(&cluster).checkpoint_lsn());
    compare_counters(&model.counters.expect("counters"), &truth.counters.expect("counters"));
    compare_slru(&model, &truth);
    compare_rels(&cluster, &model, &truth);
    assert_eq!(model.databases, truth.databases);
    assert_eq!(model.maps, truth.maps);
    assert_eq!(model.two_phase, truth.two_phase);
    model
}

fn compare_counters(ours: &CheckPoint, theirs: &CheckPoint) {
    let shown = |c: &CheckPoint| {
        [
            ("next_xid", c.next_xid),
            ("next_multi", c.next_multi.into()),
            ("next_multi_offset", c.next_multi_offset.into()),
            ("oldest_multi", c.oldest_multi.into()),
            ("oldest_multi_db", c.oldest_multi_db.into()),
            ("oldest_commit_ts_xid", c.oldest_commit_ts_xid.into()),
            ("newest_commit_ts_xid", c.newest_commit_ts_xid.into()),
        ]
    };
    assert_eq!(shown(ours), shown(theirs));
    // Between checkpoints WAL tells the oldest transaction only when the clog loses a segment; an older one is safe.
    assert!(ours.oldest_xid <= theirs.oldest_xid);
    // Object ids are logged 8192 ahead.
    let ahead = ours.next_oid - theirs.next_oid;
    assert!(ahead <= 8192, "{ahead}");
}

fn compare_slru(model: &Model, truth: &Model) {
    for (key, page) in &truth.slru {
        let ours = model.slru.get(key);
        let same = ours.map_or_else(|| page.iter().all(|byte| *byte == 0), |ours| ours == page);
        assert!(same, "{key:?} differs");
    }
    let extra: Vec<_> = model.slru.keys().filter(|key| !truth.slru.contains_key(key)).collect();
    assert!(extra.is_empty(), "{extra:?} should be gone");
}

fn compare_rels(cluster: &Cluster, model: &Model, truth: &Model) {
    let unlogged = |rel: &RelTag| truth.rels.contains_key(&rel.with_fork(ForkNumber::Init));
    for (rel, size) in &truth.rels {
        if rel.fork == ForkNumber::Fsm || (unlogged(rel) && rel.fork != ForkNumber::Init) {
            continue;
        }
        let ours = model.rels.get(rel).copied();
        assert!(ours.is_some() || *size == 0 || rel.fork == ForkNumber::Vm, "{rel} is missing");
        let ours = ours.unwrap_or(0);
        assert!(ours <= *size, "{rel} has {size} blocks, not {ours}");
        // Postgres extends by pages of zeroes, and visibility maps by empty pages, without logging it.
        let dir = if rel.db == 0 { "global".to_owned() } else { format!("base/{}", rel.db) };
        let path = cluster.data().join(dir).join(format!("{}{}", rel.rel, rel.fork.suffix()));
        let header_bytes = if rel.fork == ForkNumber::Vm { 24 } else { 0 };
        let rest = &fs::read(path).expect("the file")[ours as usize * PAGE_BYTES..];
        for page in rest.chunks_exact(PAGE_BYTES) {
            let empty = page[header_bytes..].iter().all(|byte| *byte == 0);
            assert!(empty, "{rel} has {size} blocks, not {ours}");
        }
    }
    let extra: Vec<_> = model.rels.keys().filter(|rel| !truth.rels.contains_key(rel)).collect();
    assert!(extra.is_empty(), "{extra:?} should be gone");
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
