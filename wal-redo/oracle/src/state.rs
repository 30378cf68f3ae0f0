//! Everything that is not the content of relation pages, as WAL makes it and as a stopped server's files have it: SLRU pages,
//! sizes of relations, relation maps, databases, two-phase files, the checkpoint's counters.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use types::{ForkNumber, PAGE_BYTES, PageTag, REL_SEGMENT_BLOCKS, RelTag, oids};
use wal::{CheckPoint, DecodedRecord};
use wal_redo::{Change, SlruKind, checkpoint, commit_ts_changes, redo_slru_page, truncation_removes};

use crate::{
    control_file,
    store::{read_file_page, tablespaces},
};

/// One of WAL's making, or a stopped server's.
#[derive(Default)]
pub struct State {
    /// `None` only before there is any.
    pub counters: Option<CheckPoint>,
    /// By area and page number.
    pub slru: BTreeMap<(SlruKind, u32), Box<[u8; PAGE_BYTES]>>,
    /// Sizes in blocks.
    pub rels: BTreeMap<RelTag, u32>,
    /// By tablespace and database.
    pub databases: BTreeSet<(u32, u32)>,
    /// Contents of `pg_filenode.map`, by tablespace and database.
    pub maps: BTreeMap<(u32, u32), Bytes>,
    /// By transaction.
    pub two_phase: BTreeMap<u32, Bytes>,
    /// How many commits were seen.
    pub commits: usize,
}

impl State {
    /// What a stopped server's files hold. Panics when they can't be read.
    pub fn of(data: &Path) -> State {
        let mut model = State { counters: Some(control_file(data).checkpoint()), ..State::default() };
        for kind in SlruKind::ALL {
            for (name, bytes) in files(&data.join(kind.directory())) {
                let segment = u32::from_str_radix(&name, 16).expect("a segment's name");
                for (index, page) in bytes.chunks_exact(PAGE_BYTES).enumerate() {
                    model.slru.insert((kind, segment * 32 + index as u32), Box::new(page.try_into().expect("a page")));
                }
            }
        }
        model.scan_directory(&data.join("global"), oids::GLOBAL_TABLESPACE, 0);
        model.scan_tablespace(&data.join("base"), oids::DEFAULT_TABLESPACE);
        for (spc, directory) in tablespaces(data) {
            model.scan_tablespace(&directory, spc);
        }
        for (name, bytes) in files(&data.join("pg_twophase")) {
            model.two_phase.insert(u32::from_str_radix(&name, 16).expect("an xid"), bytes.into());
        }
        model
    }

    fn scan_tablespace(&mut self, directory: &Path, spc: u32) {
        for entry in fs::read_dir(directory).expect("a tablespace's directory") {
            let path = entry.expect("an entry").path();
            let number = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            // Beside the databases there is `pgsql_tmp`.
            let Some(db) = number else { continue };
            self.databases.insert((spc, db));
            self.scan_directory(&path, spc, db);
        }
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

    /// Does what [`wal_redo::changes`] said of the record. Errors name a record that could not be applied.
    pub fn apply(&mut self, record: &DecodedRecord<'_>, listed: &[Change]) -> Result<(), String> {
        let counters = self.counters.as_mut().expect("counters");
        let commit_ts = commit_ts_changes(record, counters).map_err(|error| error.to_string())?;
        checkpoint::advance(counters, record);
        listed.iter().chain(&commit_ts).try_for_each(|change| self.apply_change(record, change))
    }

    fn apply_change(&mut self, record: &DecodedRecord<'_>, change: &Change) -> Result<(), String> {
        match change.clone() {
            Change::Page { tag, .. } => {
                let size = self.rels.entry(tag.rel).or_default();
                *size = (tag.block + 1).max(*size);
            }
            Change::SlruPage { slru, page, .. } => {
                let bytes = self.slru.entry((slru, page)).or_insert_with(|| Box::new([0; PAGE_BYTES]));
                redo_slru_page(bytes, slru, page, record).map_err(|error| error.to_string())?;
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
            Change::RelationMap { spc, db, content } => drop(self.maps.insert((spc, db), content.into())),
            Change::TwoPhaseCreate { xid, content } => drop(self.two_phase.insert(xid, content.into())),
            Change::TwoPhaseRemove { xid } => drop(self.two_phase.remove(&xid)),
            Change::Commit { timestamp_us } => {
                assert!(timestamp_us > 0);
                self.commits += 1;
            }
            // A standby's file lags behind: it is as of its last restart point.
            Change::AdvanceOrigin { .. } | Change::DropOrigin { .. } => {}
            Change::CreateTablespace { .. } => {}
            Change::DropTablespace { oid } => self.databases.retain(|(spc, _)| *spc != oid),
            // Only Dormouse's own computes write them.
            Change::AuxFile { path, .. } => return Err(format!("{path} was kept by a stock server")),
        }
        Ok(())
    }

    /// How this, made of WAL, differs from what the files in `data` hold, a line each.
    pub fn differences(&self, truth: &State, data: &Path) -> Vec<String> {
        let mut problems = Vec::new();
        compare_counters(self, truth, &mut problems);
        compare_slru(self, truth, &mut problems);
        compare_rels(data, self, truth, &mut problems);
        let mut same = |what: &str, same: bool| {
            if !same {
                problems.push(format!("{what} differ"));
            }
        };
        same("databases", self.databases == truth.databases);
        same("relation maps", self.maps == truth.maps);
        same("two-phase files", self.two_phase == truth.two_phase);
        problems
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

fn compare_counters(model: &State, truth: &State, problems: &mut Vec<String>) {
    let (ours, theirs) = (model.counters.expect("counters"), truth.counters.expect("counters"));
    let shown = |c: CheckPoint| {
        [
            ("next_xid", c.next_xid),
            ("next_multi", c.next_multi.into()),
            ("next_multi_offset", c.next_multi_offset.into()),
            ("oldest_multi", c.oldest_multi.into()),
            ("oldest_commit_ts_xid", c.oldest_commit_ts_xid.into()),
            ("newest_commit_ts_xid", c.newest_commit_ts_xid.into()),
        ]
    };
    for (ours, theirs) in shown(ours).into_iter().zip(shown(theirs)).filter(|(ours, theirs)| ours != theirs) {
        problems.push(format!("{} is {}, not {}", ours.0, ours.1, theirs.1));
    }
    // `oldest_multi_db` is not compared: whose the oldest multixact is changes without WAL as long as it stays the oldest.
    // Between checkpoints WAL tells the oldest transaction only when the clog loses a segment; an older one is safe.
    let (our_oldest, their_oldest) = (ours.oldest_xid, theirs.oldest_xid);
    if our_oldest > their_oldest {
        problems.push(format!("oldest_xid is {our_oldest}, later than {their_oldest}"));
    }
    // Object ids are logged 8192 ahead.
    let (our_oid, their_oid) = (ours.next_oid, theirs.next_oid);
    if our_oid.wrapping_sub(their_oid) > 8192 {
        problems.push(format!("next_oid is {our_oid}, not {their_oid}"));
    }
}

fn compare_slru(model: &State, truth: &State, problems: &mut Vec<String>) {
    for (key, page) in &truth.slru {
        let ours = model.slru.get(key);
        let same = ours.map_or_else(|| page.iter().all(|byte| *byte == 0), |ours| ours == page);
        if !same {
            problems.push(format!("{key:?} differs"));
        }
    }
    let extra = model.slru.keys().filter(|key| !truth.slru.contains_key(key));
    problems.extend(extra.map(|key| format!("{key:?} should be gone")));
}

fn compare_rels(data: &Path, model: &State, truth: &State, problems: &mut Vec<String>) {
    let unlogged = |rel: &RelTag| truth.rels.contains_key(&rel.with_fork(ForkNumber::Init));
    for (rel, size) in &truth.rels {
        if rel.fork == ForkNumber::Fsm || (unlogged(rel) && rel.fork != ForkNumber::Init) {
            continue;
        }
        let known = model.rels.get(rel).copied();
        let ours = known.unwrap_or(0);
        let missing = known.is_none() && *size > 0 && rel.fork != ForkNumber::Vm;
        // Postgres extends by pages of zeroes, and visibility maps by empty pages, without logging it.
        let header_bytes = if rel.fork == ForkNumber::Vm { 24 } else { 0 };
        let empty = |block| {
            let page = read_file_page(data, &PageTag { rel: *rel, block });
            page.is_some_and(|page| page[header_bytes..].iter().all(|byte| *byte == 0))
        };
        if missing || ours > *size || !(ours..*size).all(empty) {
            problems.push(format!("{rel} has {size} blocks, not {known:?}"));
        }
    }
    let extra = model.rels.iter().filter(|(rel, size)| **size > 0 && !truth.rels.contains_key(rel));
    problems.extend(extra.map(|(rel, size)| format!("{rel} of {size} blocks should be gone")));
}
