//! Redo checked against Postgres: every record of a `pg_wal` is applied by the library, and each page it touched is
//! compared with the image that Postgres logged of the same page (`wal_consistency_checking = all`); at the end, all
//! pages are compared with the files that a stopped server left, and with those of a standby that has replayed the same WAL.
//!
//! What it takes: a data directory's copy from before, and the data directory after a clean stop, all WAL kept.

pub mod damage;
pub mod mask;
pub mod names;
mod standby;
pub mod state;
pub mod store;

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    fmt, fs,
    io::Read,
    path::Path,
};

use damage::Damage;
use state::State;
use store::Store;
use types::{ForkNumber, Lsn, PAGE_BYTES, PageTag, RelTag, WAL_SEGMENT_BYTES};
use wal::{
    ControlFile, DecodedRecord, ForEachError, RmgrId, WalDecodeError, WalStreamDecoder,
    v15::{RelFileNode, heap::vm, rmgr, state::ParameterChange, xlog},
};
use wal_redo::{Change, ChangeList, RedoError, changes, redo_page, restore_image};

type Page = [u8; PAGE_BYTES];

/// How many mismatches and errors are described in full.
const DESCRIBED: usize = 20;

/// Of how many applications of a record to a page one is repeated with damage.
const DAMAGE_EVERY: u64 = 61;

/// What happened to the records of one kind.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Records.
    pub records: u64,
    /// Pages that redo changed by the record itself, without a full-page image.
    pub redone: u64,
    /// Pages restored from a full-page image.
    pub restored: u64,
    /// Redone pages that were compared with Postgres's image of them.
    pub compared: u64,
    /// Compared pages that differed.
    pub mismatches: u64,
    /// Pages that redo refused.
    pub errors: u64,
}

impl Counts {
    fn add(&mut self, other: &Counts) {
        self.records += other.records;
        self.redone += other.redone;
        self.restored += other.restored;
        self.compared += other.compared;
        self.mismatches += other.mismatches;
        self.errors += other.errors;
    }
}

/// The outcome of a check.
#[derive(Debug, Default)]
pub struct Report {
    /// By record kind.
    pub kinds: BTreeMap<String, Counts>,
    /// The first mismatches and errors, described.
    pub problems: Vec<String>,
    /// Pages compared with the stopped server's files.
    pub final_compared: u64,
    /// Those that differed.
    pub final_mismatches: u64,
    /// Blocks and pages of a standby that were compared: relations, SLRU areas.
    pub standby_compared: u64,
    /// Those that differed, and missing or needless files.
    pub standby_mismatches: u64,
    /// What differs of all that is not relation pages: SLRU pages, sizes, maps, databases, two-phase files, counters.
    pub state_mismatches: u64,
}

impl Report {
    /// True when nothing differed and nothing was refused.
    pub fn is_clean(&self) -> bool {
        self.mismatches() == 0
    }

    /// How many comparisons failed, refused records among them.
    pub fn mismatches(&self) -> u64 {
        let of_records: u64 = self.kinds.values().map(|counts| counts.mismatches + counts.errors).sum();
        of_records + self.final_mismatches + self.standby_mismatches + self.state_mismatches
    }

    /// How many records were applied.
    pub fn records(&self) -> u64 {
        self.kinds.values().map(|counts| counts.records).sum()
    }

    /// Adds another check's outcome.
    pub fn add(&mut self, other: Report) {
        for (kind, counts) in other.kinds {
            self.kinds.entry(kind).or_default().add(&counts);
        }
        self.problems.extend(other.problems);
        self.final_compared += other.final_compared;
        self.final_mismatches += other.final_mismatches;
        self.standby_compared += other.standby_compared;
        self.standby_mismatches += other.standby_mismatches;
        self.state_mismatches += other.state_mismatches;
    }

    /// How many pages of such records were compared.
    pub fn compared(&self, kind: &str) -> u64 {
        self.kinds.get(kind).map_or(0, |counts| counts.compared)
    }

    fn problem(&mut self, text: impl FnOnce() -> String) {
        if self.problems.len() < DESCRIBED {
            self.problems.push(text());
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<32} {:>9} {:>9} {:>9} {:>9} {:>7}",
            "record", "records", "redone", "restored", "compared", "bad"
        )?;
        for (kind, c) in &self.kinds {
            let bad = c.mismatches + c.errors;
            writeln!(f, "{kind:<32} {:>9} {:>9} {:>9} {:>9} {bad:>7}", c.records, c.redone, c.restored, c.compared)?;
        }
        writeln!(
            f,
            "pages compared with the files at the end: {}, bad {}",
            self.final_compared, self.final_mismatches
        )?;
        writeln!(f, "pages compared with a standby's: {}, bad {}", self.standby_compared, self.standby_mismatches)?;
        writeln!(
            f,
            "everything else (SLRU pages, sizes, maps, two-phase files, counters): bad {}",
            self.state_mismatches
        )?;
        self.problems.iter().try_for_each(|problem| writeln!(f, "- {problem}"))
    }
}

/// Applies all WAL of `after` to the pages of `before`, comparing as described above. Panics when the directories
/// cannot be read or the WAL ends with anything but its proper end: that is no outcome of redo.
pub fn check(before: &Path, after: &Path) -> Report {
    check_with_standby(before, after, None)
}

/// [`check`], and then everything compared with a standby's files: it started as `before`, replayed all the WAL, and was
/// stopped.
pub fn check_with_standby(before: &Path, after: &Path, standby: Option<&Path>) -> Report {
    for directory in [before, after] {
        assert!(control_file(directory).is_shut_down(), "the server of {directory:?} was stopped cleanly");
    }
    let start = control_file(before).checkpoint_lsn();
    let end = control_file(after).checkpoint_lsn();
    let mut oracle = Oracle {
        store: Store::new(before),
        state: State::of(before),
        changed_by: BTreeMap::new(),
        emptied_maps: BTreeSet::new(),
        damage: Damage::default(),
        hints_are_logged: false,
        report: Report::default(),
    };
    let mut decoder = WalStreamDecoder::new(start);
    let mut last = start;
    'segments: for number in start.segment_number().. {
        let segment = Lsn(number * WAL_SEGMENT_BYTES);
        let path = after.join("pg_wal").join(segment.segment_file_name());
        let Ok(mut file) = fs::File::open(&path) else { break };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).expect("a WAL segment is readable");
        let skipped = decoder.fed_until().0.saturating_sub(segment.0) as usize;
        for (at, chunk) in (skipped..).step_by(1 << 20).zip(bytes[skipped.min(bytes.len())..].chunks(1 << 20)) {
            let decoded = decoder.feed_each(segment + at as u64, chunk, |record| {
                last = record.start_lsn;
                if last != end {
                    oracle.apply(record);
                }
                Ok::<(), Infallible>(())
            });
            match decoded {
                Ok(()) => {}
                Err(ForEachError::Decode(WalDecodeError::EndOfWal { .. } | WalDecodeError::Invalid { .. }))
                    if last == end =>
                {
                    break 'segments;
                }
                Err(error) => panic!("{error} (the last good record is at {last}, the checkpoint at {end})"),
            }
        }
    }
    assert_eq!(last, end, "WAL is read up to the shutdown checkpoint");
    oracle.compare_with_files(after);
    oracle.compare_state(after);
    if let Some(standby) = standby {
        oracle.compare_with_standby(standby);
    }
    oracle.report
}

/// A stopped server's control file. Panics when there is none.
pub fn control_file(data_dir: &Path) -> ControlFile {
    let bytes = fs::read(data_dir.join("global/pg_control")).expect("pg_control is readable");
    ControlFile::parse(&bytes).expect("pg_control is valid")
}

struct Oracle {
    store: Store,
    state: State,
    /// Which resource manager changed the page last: it knows what to mask.
    changed_by: BTreeMap<PageTag, RmgrId>,
    /// Pages of visibility maps whose bits Postgres has not logged: `CREATE DATABASE … STRATEGY wal_log` logs them as
    /// standard pages, and the whole map lies between `pd_lower` and `pd_upper`. Redo makes an empty map of that.
    emptied_maps: BTreeSet<PageTag>,
    damage: Damage,
    /// The server has run with `wal_log_hints`.
    hints_are_logged: bool,
    report: Report,
}

impl Oracle {
    /// Does what [`changes`] says of the record, then compares the pages of which it holds Postgres's image.
    fn apply(&mut self, record: &DecodedRecord<'_>) {
        let mut counts = Counts { records: 1, ..Counts::default() };
        if record.rmgr == rmgr::XLOG && record.rmgr_info() == xlog::PARAMETER_CHANGE {
            let settings = ParameterChange::from_prefix(record.main_data).expect("a whole record");
            self.hints_are_logged |= settings.wal_log_hints != 0;
        }
        let list = changes(record).unwrap_or_else(|error| {
            counts.errors += 1;
            self.report.problem(|| error.to_string());
            ChangeList::new()
        });
        if let Err(problem) = self.state.apply(record, &list) {
            counts.errors += 1;
            self.report.problem(|| problem);
        }
        let mut touched = BTreeSet::new();
        for change in list {
            match change {
                Change::Page { tag, will_init } => {
                    touched.insert(tag);
                    self.redo(&tag, will_init, record, &mut counts);
                }
                Change::TruncateRel { rel, blocks } => self.store.truncate(rel, blocks),
                Change::DropRel(rel) => self.store.drop_rel(rel),
                Change::CopyDatabase { src_spc, src_db, spc, db } => {
                    self.store.copy_database((src_spc, src_db), (spc, db));
                }
                _not_about_pages => {}
            }
        }
        for block in &record.blocks {
            if block.image.as_ref().is_some_and(|image| !image.apply) {
                self.compare(block, record, &mut counts);
            }
        }
        self.check_completeness(record, &touched, &mut counts);
        self.report.kinds.entry(names::name(record)).or_default().add(&counts);
    }

    /// Every page that `redo_page` would change is one that [`changes`] lists.
    fn check_completeness(&mut self, record: &DecodedRecord<'_>, touched: &BTreeSet<PageTag>, counts: &mut Counts) {
        // Of hints that were logged without an image there is nothing to redo.
        let referred = record.blocks.iter().filter(|block| record.rmgr != rmgr::XLOG || block.image.is_some());
        let implied = visibility_map_pages(record).into_iter().filter(|tag| {
            let redone = redo_page(&mut self.store.read(tag), tag, record);
            !matches!(redone, Err(RedoError::NotTouched { .. }))
        });
        let expected: BTreeSet<PageTag> = referred.map(|block| block.tag()).chain(implied).collect();
        if expected != *touched {
            counts.errors += 1;
            self.report.problem(|| format!("{}: changes {touched:?} instead of {expected:?}", names::name(record)));
        }
    }

    fn redo(&mut self, tag: &PageTag, will_init: bool, record: &DecodedRecord<'_>, counts: &mut Counts) {
        let block = record.blocks.iter().find(|block| block.tag() == *tag);
        // Where the page is made anew, its old content must not matter.
        let mut page = if will_init { Box::new([0xA5; PAGE_BYTES]) } else { self.store.read(tag) };
        self.damage.try_some(DAMAGE_EVERY, &page, tag, record);
        if let Err(error) = redo_page(&mut page, tag, record) {
            counts.errors += 1;
            self.report.problem(|| format!("{}: {error}", names::name(record)));
            // Go on from Postgres's page, so that one failure is counted once.
            let healed = block.filter(|block| block.image.is_some()).map(|block| restore_image(block, &mut page));
            if !matches!(healed, Some(Ok(()))) {
                return;
            }
        } else if block.is_some_and(|block| block.applies_image()) {
            counts.restored += 1;
            if tag.rel.fork == ForkNumber::Vm && record.rmgr == rmgr::XLOG {
                self.emptied_maps.insert(*tag);
            }
        } else {
            counts.redone += 1;
        }
        self.store.write(*tag, page);
        self.changed_by.insert(*tag, record.rmgr);
    }

    fn compare(&mut self, block: &wal::BlockRef<'_>, record: &DecodedRecord<'_>, counts: &mut Counts) {
        let tag = block.tag();
        let mut theirs = Box::new([0; PAGE_BYTES]);
        if let Err(error) = restore_image(block, &mut theirs) {
            counts.errors += 1;
            self.report.problem(|| error.to_string());
            return;
        }
        counts.compared += 1;
        let mut ours = self.store.read(&tag);
        self.fill_emptied_map(&tag, &mut ours, &theirs);
        if let Some(difference) = difference(&ours, &theirs, record.rmgr, &tag) {
            counts.mismatches += 1;
            let name = names::name(record);
            self.report.problem(|| format!("{name} at {}, block {} ({tag}): {difference}", record.start_lsn, block.id));
            self.store.write(tag, theirs);
        }
    }

    /// Where Postgres has not logged a map's bits, redo may lack some, but must not have one too many.
    fn fill_emptied_map(&self, tag: &PageTag, ours: &mut Page, theirs: &Page) {
        if self.emptied_maps.contains(tag) && ours.iter().zip(theirs).skip(24).all(|(ours, theirs)| ours & !theirs == 0)
        {
            ours[24..].copy_from_slice(&theirs[24..]);
        }
    }

    /// What is not relation pages, against the files of the stopped server.
    fn compare_state(&mut self, data_dir: &Path) {
        let problems = self.state.differences(&State::of(data_dir), data_dir);
        self.report.state_mismatches += problems.len() as u64;
        problems.into_iter().for_each(|problem| self.report.problem(|| problem));
    }

    /// Compares all that redo wrote with the files of the stopped server.
    fn compare_with_files(&mut self, data_dir: &Path) {
        let mut problems = Vec::new();
        for (tag, ours) in self.store.written() {
            let mut ours = *ours;
            let rmgr = self.changed_by.get(tag).copied().unwrap_or(rmgr::XLOG);
            // Free space is logged by accident only, and a sequence's page runs behind its WAL.
            if tag.rel.fork == ForkNumber::Fsm || rmgr == rmgr::SEQ {
                continue;
            }
            // Dropped relations have no files any more.
            let Some(theirs) = store::read_file_page(data_dir, tag) else { continue };
            if is_unlogged_hint(tag, rmgr, &theirs) {
                continue;
            }
            // Full-page images do not say what kind of page they hold.
            let rmgr = if rmgr == rmgr::XLOG { kind_of_page(&theirs) } else { rmgr };
            self.fill_emptied_map(tag, &mut ours, &theirs);
            self.report.final_compared += 1;
            if let Some(difference) = difference(&ours, &theirs, rmgr, tag) {
                self.report.final_mismatches += 1;
                problems.push(format!("{tag} in the end: {difference}"));
            }
        }
        problems.into_iter().for_each(|problem| self.report.problem(|| problem));
    }
}

/// Pages that Postgres changes without WAL: the meta page of SP-GiST remembers pages with space, and SP-GiST prepares
/// empty pages for another use.
fn is_unlogged_hint(tag: &PageTag, rmgr: RmgrId, page: &Page) -> bool {
    rmgr == rmgr::SPGIST && page[12] == 24 && page[13] == 0 || kind_of_page(page) == rmgr::SPGIST && tag.block == 0
}

/// The map pages that a record may change without referring to them.
fn visibility_map_pages(record: &DecodedRecord<'_>) -> BTreeSet<PageTag> {
    let map_page = |rel: RelTag, block: u32| PageTag { rel: rel.with_fork(ForkNumber::Vm), block: vm::page_of(block) };
    match record.rmgr {
        rmgr::HEAP | rmgr::HEAP2 => {
            let heap_blocks = record.blocks.iter().filter(|block| block.rel.fork == ForkNumber::Main);
            let map_pages = heap_blocks.map(|block| map_page(block.rel, block.block));
            map_pages.filter(|tag| record.blocks.iter().all(|block| block.tag() != *tag)).collect()
        }
        rmgr::SMGR if record.rmgr_info() == 0x20 => {
            let blocks = u32::from_le_bytes(record.main_data[..4].try_into().expect("four bytes"));
            let node = RelFileNode::from_prefix(&record.main_data[4..]).expect("the record is long enough");
            BTreeSet::from([map_page(node.fork(ForkNumber::Main), blocks)])
        }
        _touches_none => BTreeSet::new(),
    }
}

/// Which resource manager's mask fits a page, from the size and tag of its special area.
fn kind_of_page(page: &Page) -> RmgrId {
    let special = usize::from(u16::from_le_bytes([page[16], page[17]]));
    let tag = u16::from_le_bytes([page[PAGE_BYTES - 2], page[PAGE_BYTES - 1]]);
    match (PAGE_BYTES.saturating_sub(special), tag) {
        (0, _) => rmgr::HEAP,
        (8, 0xF091..=0xF093) => rmgr::BRIN,
        (8, 0xFF82) => rmgr::SPGIST,
        (8, _) if page[special..special + 4] == [0x17, 0x17, 0, 0] => rmgr::SEQ,
        (8, _) => rmgr::GIN,
        (16, 0xFF80) => rmgr::HASH,
        (16, 0xFF81) => rmgr::GIST,
        (16, _) => rmgr::BTREE,
        _other => rmgr::GENERIC,
    }
}

/// How the masked pages differ; `None` when they don't.
fn difference(ours: &Page, theirs: &Page, rmgr: RmgrId, tag: &PageTag) -> Option<String> {
    let (mut ours, mut theirs) = (*ours, *theirs);
    for page in [&mut ours, &mut theirs] {
        match tag.rel.fork {
            ForkNumber::Vm => mask::mask_visibility_map(page),
            ForkNumber::Main | ForkNumber::Fsm | ForkNumber::Init => mask::mask(page, rmgr, tag.block),
        }
    }
    describe(&ours, &theirs)
}

/// Where two pages differ; `None` when they don't.
fn describe(ours: &Page, theirs: &Page) -> Option<String> {
    let differing: Vec<usize> = (0..PAGE_BYTES).filter(|at| ours[*at] != theirs[*at]).collect();
    let (first, last) = (*differing.first()?, *differing.last()?);
    let excerpt =
        |page: &Page| page[first..(first + 24).min(PAGE_BYTES)].iter().map(|b| format!("{b:02x}")).collect::<String>();
    let header = |page: &Page| page[10..20].iter().map(|b| format!("{b:02x}")).collect::<String>();
    Some(format!(
        "{} bytes differ, {first}..={last}: ours {} theirs {} (headers {} {})",
        differing.len(),
        excerpt(ours),
        excerpt(theirs),
        header(ours),
        header(theirs)
    ))
}
