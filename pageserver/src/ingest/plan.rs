//! What a record puts under which keys. Pure: the sizes and pages it has to know are kept here.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use rustc_hash::FxHashMap;
use types::{BlockNumber, ForkNumber, Lsn, Oid, PAGE_BYTES, PageTag, RelTag};
use wal::{CheckPoint, DecodedRecord};
use wal_redo::{Change, SlruKind};

use super::slots::Slots;
use crate::{
    branch::{Put, PutBatch, RawPlace},
    storage::{AuxFile, CommitTime, Key, Value, just_before},
};

/// Most blocks by which one record may extend a fork (32 GiB): more is not believed.
const MAX_GAP_BLOCKS: BlockNumber = 1 << 22;

/// The record can't be ingested.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Nobody knows what it does.
    #[error("{0}")]
    Unknown(#[from] wal_redo::UnknownRecord),
    /// Its page image can't be restored.
    #[error("record at {lsn}: page image of {tag}: {reason}")]
    Image {
        /// The record's start.
        lsn: Lsn,
        /// The page.
        tag: PageTag,
        /// What is wrong.
        reason: String,
    },
    /// It extends a fork by more than is believable.
    #[error("record at {lsn} extends {rel} from {from} to more than {to} blocks")]
    Gap {
        /// The record's start.
        lsn: Lsn,
        /// The fork.
        rel: RelTag,
        /// Its size before.
        from: BlockNumber,
        /// The block that is touched.
        to: BlockNumber,
    },
    /// A value can't be encoded.
    #[error("record at {lsn}: {reason}")]
    Encode {
        /// The record's start.
        lsn: Lsn,
        /// What is wrong.
        reason: String,
    },
}

/// A database directory that is to be copied, page by page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseCopy {
    /// Tablespace and database that is copied.
    pub from: (Oid, Oid),
    /// Tablespace and database that comes to be.
    pub to: (Oid, Oid),
    /// The source's forks and sizes.
    pub rels: Vec<(RelTag, BlockNumber)>,
}

impl DatabaseCopy {
    /// The copy of a fork of the source.
    pub fn renamed(&self, rel: RelTag) -> RelTag {
        RelTag { spc: self.to.0, db: self.to.1, ..rel }
    }
}

/// Plans record after record.
pub struct Planner {
    /// Asked for each page that a record touches; walked through only when a database is copied or dropped.
    sizes: FxHashMap<RelTag, BlockNumber>,
    /// Existing SLRU pages.
    slru: BTreeSet<(SlruKind, u32)>,
    /// How far each replication origin's transactions have been applied.
    origins: BTreeMap<u16, Lsn>,
    slots: Slots,
    checkpoint: CheckPoint,
    last_commit_us: Option<i64>,
    logical_blocks: u64,
}

/// What is the same for all changes of one record.
struct Context<'a, 'r> {
    record: &'a DecodedRecord<'r>,
    /// Its bytes, kept once for all values that hold them.
    raw: Option<RawPlace>,
    /// End of the record before.
    before: Lsn,
    puts: &'a mut PutBatch,
    copies: Vec<DatabaseCopy>,
}

impl Context<'_, '_> {
    fn put(&mut self, key: Key, value: Value) {
        self.puts.put(Put { key, lsn: self.record.end_lsn, value });
    }

    /// The record itself.
    fn put_record(&mut self, key: Key, will_init: bool) {
        let record = self.record;
        let raw = *self.raw.get_or_insert_with(|| self.puts.keep_raw(record.raw));
        self.puts.put_record(key, record.end_lsn, will_init, record.start_lsn, raw);
    }

    /// Zeroes under a page that the record finds new.
    fn put_zeroes_before(&mut self, key: Key) {
        self.puts.put(Put { key, lsn: just_before(self.record.end_lsn), value: Value::ZERO_PAGE });
    }
}

impl Planner {
    /// Without relations and SLRU pages; those are added with `load_*`.
    pub fn new(checkpoint: CheckPoint, last_commit_us: Option<i64>) -> Planner {
        Planner {
            sizes: FxHashMap::default(),
            slru: BTreeSet::new(),
            origins: BTreeMap::new(),
            slots: Slots::default(),
            checkpoint,
            last_commit_us,
            logical_blocks: 0,
        }
    }

    /// A fork that exists.
    pub fn load_rel(&mut self, rel: RelTag, blocks: BlockNumber) {
        self.logical_blocks += u64::from(blocks);
        self.sizes.insert(rel, blocks);
    }

    /// An origin's progress.
    pub fn load_origin(&mut self, origin: u16, remote_lsn: Lsn) {
        self.origins.insert(origin, remote_lsn);
    }

    /// A file that is kept.
    pub fn load_file(&mut self, file: &AuxFile) {
        self.slots.observe(&file.path, &file.content);
    }

    /// The oldest WAL from `start` on that a replication slot needs.
    pub fn slots_need(&self, start: Lsn) -> Option<Lsn> {
        self.slots.oldest(start)
    }

    /// An SLRU page that exists.
    pub fn load_slru(&mut self, slru: SlruKind, page: u32) {
        self.slru.insert((slru, page));
    }

    /// Sum of all forks' sizes.
    pub fn logical_blocks(&self) -> u64 {
        self.logical_blocks
    }

    /// All forks and their sizes, in no order.
    fn rels(&self) -> impl Iterator<Item = (RelTag, BlockNumber)> {
        self.sizes.iter().map(|(rel, blocks)| (*rel, *blocks))
    }

    /// Time of the latest commit.
    pub fn last_commit_us(&self) -> Option<i64> {
        self.last_commit_us
    }

    /// Appends what the record stores; `before` is the end of the record before it. Databases that have to be copied are
    /// returned: their sizes are planned, their pages are the caller's part. After an error the planner is of no more use.
    pub fn plan(
        &mut self,
        record: &DecodedRecord<'_>,
        before: Lsn,
        puts: &mut PutBatch,
    ) -> Result<Vec<DatabaseCopy>, PlanError> {
        if wal_redo::checkpoint::advance(&mut self.checkpoint, record) {
            let value = Value::Image(Bytes::copy_from_slice(&self.checkpoint.to_bytes()));
            puts.put(Put { key: Key::CHECKPOINT, lsn: record.end_lsn, value });
        }
        let timestamps = wal_redo::commit_ts_changes(record, &self.checkpoint)?;
        let mut context = Context { record, raw: None, before, puts, copies: Vec::new() };
        let mut planned = Ok(());
        wal_redo::each_change(record, |change| {
            if planned.is_ok() {
                planned = self.plan_change(change, &mut context);
            }
        })?;
        planned?;
        for change in timestamps {
            self.plan_change(change, &mut context)?;
        }
        Ok(context.copies)
    }

    fn plan_change(&mut self, change: Change, context: &mut Context<'_, '_>) -> Result<(), PlanError> {
        match change {
            Change::Page { tag, will_init } => self.plan_page(tag, will_init, context)?,
            Change::SlruPage { slru, page, will_init } => self.plan_slru_page(slru, page, will_init, context),
            Change::SlruTruncate { slru, cutoff_page } => self.truncate_slru(slru, cutoff_page, context),
            Change::CreateRel(rel) => {
                if !self.sizes.contains_key(&rel) {
                    self.set_size(rel, 0, context);
                }
            }
            Change::TruncateRel { rel, blocks } => {
                if self.sizes.get(&rel).is_some_and(|size| *size > blocks) {
                    self.set_size(rel, blocks, context);
                }
            }
            Change::DropRel(rel) => {
                ForkNumber::ALL.iter().for_each(|fork| self.drop_fork(rel.with_fork(*fork), context))
            }
            Change::CreateDatabase { spc, db } => context.put(Key::database(spc, db), Value::Image(Bytes::new())),
            Change::CopyDatabase { src_spc, src_db, spc, db } => {
                self.copy_database((src_spc, src_db), (spc, db), context);
            }
            Change::DropDatabase { spc, db } => self.drop_database(spc, db, context),
            Change::RelationMap { spc, db, content } => {
                context.put(Key::relation_map(spc, db), Value::Image(content.into()));
            }
            Change::TwoPhaseCreate { xid, content } => {
                context.put(Key::two_phase(xid), Value::Image(content.into()));
            }
            Change::TwoPhaseRemove { xid } => context.put(Key::two_phase(xid), Value::Tombstone),
            Change::CreateTablespace { oid, path } => {
                context.put(Key::tablespace(oid), Value::Image(String::from(path).into()))
            }
            Change::DropTablespace { oid } => context.put(Key::tablespace(oid), Value::Tombstone),
            Change::Commit { timestamp_us } => self.plan_commit(timestamp_us, context),
            Change::AdvanceOrigin { origin, remote_lsn, force } => {
                self.advance_origin(origin, remote_lsn, force, context);
            }
            Change::DropOrigin { origin } => {
                if self.origins.remove(&origin).is_some() {
                    context.put(Key::origin(origin), Value::Tombstone);
                }
            }
            Change::AuxFile { path, content } => {
                self.slots.observe(&path, &content);
                let key = Key::aux_file(&path);
                let value = if content.is_empty() {
                    Value::Tombstone
                } else {
                    let encoded =
                        postcard::to_stdvec(&AuxFile { path: path.into(), content: content.into() }).map_err(
                            |error| PlanError::Encode { lsn: context.record.start_lsn, reason: error.to_string() },
                        )?;
                    Value::Image(encoded.into())
                };
                context.put(key, value);
            }
        }
        Ok(())
    }

    fn plan_page(&mut self, tag: PageTag, will_init: bool, context: &mut Context<'_, '_>) -> Result<(), PlanError> {
        self.extend_to(tag, will_init, context)?;
        // A page image is unpacked at once: a record with many would else be stored whole under each page.
        let has_image = context.record.blocks.iter().any(|block| block.tag() == tag && block.applies_image());
        if has_image {
            let mut page = Box::new([0u8; PAGE_BYTES]);
            wal_redo::redo_page(&mut page, &tag, context.record).map_err(|error| PlanError::Image {
                lsn: context.record.start_lsn,
                tag,
                reason: error.to_string(),
            })?;
            context.put(Key::page(tag), Value::Image(Bytes::copy_from_slice(&page[..])));
        } else {
            context.put_record(Key::page(tag), will_init);
        }
        Ok(())
    }

    /// Makes the fork long enough for the block. New blocks get zeroes, the block itself only if the record needs them.
    fn extend_to(&mut self, tag: PageTag, will_init: bool, context: &mut Context<'_, '_>) -> Result<(), PlanError> {
        let size = self.sizes.get(&tag.rel).copied();
        let old = size.unwrap_or(0);
        if size.is_some() && tag.block < old {
            return Ok(());
        }
        let lsn = context.record.start_lsn;
        let gap = || PlanError::Gap { lsn, rel: tag.rel, from: old, to: tag.block };
        let new = tag.block.checked_add(1).ok_or_else(gap)?;
        if new - old > MAX_GAP_BLOCKS {
            return Err(gap());
        }
        for block in old..if will_init { tag.block } else { new } {
            context.put_zeroes_before(Key::page(PageTag { block, ..tag }));
        }
        self.set_size(tag.rel, new, context);
        Ok(())
    }

    fn set_size(&mut self, rel: RelTag, blocks: BlockNumber, context: &mut Context<'_, '_>) {
        let before = self.sizes.insert(rel, blocks).unwrap_or(0);
        self.logical_blocks = self.logical_blocks + u64::from(blocks) - u64::from(before);
        context.put(Key::rel_size(rel), Value::rel_size(blocks));
    }

    fn drop_fork(&mut self, rel: RelTag, context: &mut Context<'_, '_>) {
        if let Some(blocks) = self.sizes.remove(&rel) {
            self.logical_blocks -= u64::from(blocks);
            context.put(Key::rel_size(rel), Value::Tombstone);
        }
    }

    fn rels_of(&self, spc: Oid, db: Oid) -> Vec<(RelTag, BlockNumber)> {
        let of_database = self.rels().filter(|(rel, _)| (rel.spc, rel.db) == (spc, db));
        let mut rels: Vec<_> = of_database.collect();
        rels.sort_unstable();
        rels
    }

    fn copy_database(&mut self, from: (Oid, Oid), to: (Oid, Oid), context: &mut Context<'_, '_>) {
        let copy = DatabaseCopy { from, to, rels: self.rels_of(from.0, from.1) };
        context.put(Key::database(to.0, to.1), Value::Image(Bytes::new()));
        for (rel, blocks) in &copy.rels {
            self.set_size(copy.renamed(*rel), *blocks, context);
        }
        context.copies.push(copy);
    }

    fn drop_database(&mut self, spc: Oid, db: Oid, context: &mut Context<'_, '_>) {
        for (rel, _) in self.rels_of(spc, db) {
            self.drop_fork(rel, context);
        }
        context.put(Key::relation_map(spc, db), Value::Tombstone);
        context.put(Key::database(spc, db), Value::Tombstone);
    }

    fn plan_slru_page(&mut self, slru: SlruKind, page: u32, will_init: bool, context: &mut Context<'_, '_>) {
        let key = Key::slru(slru, page);
        let is_new = self.slru.insert((slru, page));
        if is_new && !will_init {
            context.put_zeroes_before(key);
        }
        context.put_record(key, will_init);
    }

    fn truncate_slru(&mut self, slru: SlruKind, cutoff_page: u32, context: &mut Context<'_, '_>) {
        let existing = self.slru.range((slru, 0)..=(slru, u32::MAX)).map(|(_, page)| *page);
        let segment = |page: u32| page / wal_redo::SLRU_PAGES_PER_SEGMENT;
        let gone: Vec<u32> =
            existing.filter(|page| wal_redo::truncation_removes(slru, segment(*page), cutoff_page)).collect();
        for page in gone {
            self.slru.remove(&(slru, page));
            context.put(Key::slru(slru, page), Value::Tombstone);
        }
    }

    /// `replorigin_advance`: the progress of an origin goes back only by force.
    fn advance_origin(&mut self, origin: u16, remote_lsn: Lsn, force: bool, context: &mut Context<'_, '_>) {
        let known = self.origins.get(&origin).copied();
        if force || known.is_none_or(|known| known < remote_lsn) {
            self.origins.insert(origin, remote_lsn);
            context.put(Key::origin(origin), Value::origin(remote_lsn));
        }
    }

    fn plan_commit(&mut self, timestamp_us: i64, context: &mut Context<'_, '_>) {
        if self.last_commit_us.is_none_or(|last| timestamp_us > last) {
            self.last_commit_us = Some(timestamp_us);
            let commit = CommitTime { timestamp_us, before: context.before };
            context.put(CommitTime::key(timestamp_us), commit.to_value());
        }
    }
}

#[cfg(test)]
mod tests;
