//! What a record changes, for every resource manager of PostgreSQL 15.

use smallvec::SmallVec;
use types::{ForkNumber, Lsn, PageTag, RelTag};
use wal::{
    DecodedRecord, RmgrId,
    v15::{btree, heap, rmgr, state, xlog},
};

use crate::{change::Change, state_changes};

/// A record whose effects are not known: to go on without them would lose data.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("WAL record at {lsn}, resource manager {} ({}), info {info:#04x}: {problem}", rmgr.0, rmgr_name(*.rmgr))]
pub struct UnknownRecord {
    /// Where the record starts.
    pub lsn: Lsn,
    /// Its resource manager.
    pub rmgr: RmgrId,
    /// `xl_info`.
    pub info: u8,
    /// What is wrong with it.
    pub problem: &'static str,
}

/// A record's effects, in the order in which redo performs them; most records have at most three.
pub type ChangeList = SmallVec<[Change; 3]>;

pub(crate) type Changes = Result<ChangeList, &'static str>;

pub(crate) const UNKNOWN_INFO: &str = "unknown kind of record";
pub(crate) const CUT_SHORT: &str = "shorter than its kind should be";

/// What the record changes, in the order in which redo performs it. Of commit timestamps only the zeroing and truncating of
/// pages is here; those that a commit sets are [`crate::commit_ts_changes`].
///
/// Errors on a kind of record that is not known (extensions' own resource managers among them) and on a malformed one.
pub fn changes(record: &DecodedRecord<'_>) -> Result<ChangeList, UnknownRecord> {
    let mut list = ChangeList::new();
    each_change(record, |change| list.push(change))?;
    Ok(list)
}

/// Hands out one by one what [`changes`] lists. Before an error it may have handed out some of the record's changes.
#[inline]
pub fn each_change(record: &DecodedRecord<'_>, mut f: impl FnMut(Change)) -> Result<(), UnknownRecord> {
    rmgr_changes(record, &mut f).map_err(|problem| unknown(record, problem))
}

#[cold]
fn unknown(record: &DecodedRecord<'_>, problem: &'static str) -> UnknownRecord {
    UnknownRecord { lsn: record.start_lsn, rmgr: record.rmgr, info: record.info, problem }
}

fn rmgr_changes(record: &DecodedRecord<'_>, f: &mut impl FnMut(Change)) -> Result<(), &'static str> {
    let info = record.rmgr_info();
    match record.rmgr {
        rmgr::XLOG => xlog_changes(record, f),
        rmgr::XACT => state_changes::xact(record).map(|changes| changes.into_iter().for_each(f)),
        rmgr::SMGR => state_changes::smgr(record).map(|changes| changes.into_iter().for_each(f)),
        rmgr::CLOG => state_changes::clog(record).map(|changes| changes.into_iter().for_each(f)),
        rmgr::DBASE => state_changes::dbase(record).map(|changes| changes.into_iter().for_each(f)),
        rmgr::TBLSPC => state_changes::tblspc(record).map(|changes| changes.into_iter().for_each(f)),
        rmgr::MULTIXACT => state_changes::multixact(record).map(|changes| changes.into_iter().for_each(f)),
        rmgr::RELMAP => state_changes::relmap(record).map(|changes| changes.into_iter().for_each(f)),
        rmgr::STANDBY => if_known([0x00, 0x10, 0x20].contains(&info)),
        rmgr::HEAP2 => heap2_changes(record, f),
        rmgr::HEAP => heap_changes(record, f),
        rmgr::BTREE => pages_if(record, info <= btree::META_CLEANUP, f),
        rmgr::HASH => pages_if(record, info <= 0xC0, f),
        rmgr::GIN => pages_if(record, (0x10..=0x90).contains(&info), f),
        rmgr::GIST => pages_if(record, [0x00, 0x10, 0x20, 0x30, 0x60, 0x70].contains(&info), f),
        rmgr::SEQ => pages_if(record, info == state::seq::LOG, f),
        rmgr::SPGIST => pages_if(record, (0x10..=0x80).contains(&info), f),
        // The highest bit tells that a page is initialised.
        rmgr::BRIN => pages_if(record, info & 0x70 <= 0x50, f),
        rmgr::COMMIT_TS => state_changes::commit_ts(record).map(|changes| changes.into_iter().for_each(f)),
        rmgr::REPLORIGIN => state_changes::replication_origin(record).map(|changes| changes.into_iter().for_each(f)),
        rmgr::GENERIC => pages_if(record, info == 0x00, f),
        rmgr::LOGICALMSG => {
            if_known(info == state::logicalmsg::MESSAGE)?;
            crate::aux_file::changes(record).map(|changes| changes.into_iter().for_each(f))
        }
        RmgrId(rmgr::MIN_CUSTOM..) => Err("an extension's own resource manager, which cannot be replayed"),
        RmgrId(_) => Err("no resource manager of PostgreSQL 15"),
    }
}

/// A change for every page the record refers to.
#[inline]
fn pages(record: &DecodedRecord<'_>, f: &mut impl FnMut(Change)) {
    for block in &record.blocks {
        f(page(block));
    }
}

fn page(block: &wal::BlockRef<'_>) -> Change {
    Change::Page { tag: block.tag(), will_init: block.will_init || block.applies_image() }
}

fn pages_if(record: &DecodedRecord<'_>, known: bool, f: &mut impl FnMut(Change)) -> Result<(), &'static str> {
    if_known(known)?;
    pages(record, f);
    Ok(())
}

fn if_known(known: bool) -> Result<(), &'static str> {
    if known { Ok(()) } else { Err(UNKNOWN_INFO) }
}

fn xlog_changes(record: &DecodedRecord<'_>, f: &mut impl FnMut(Change)) -> Result<(), &'static str> {
    match record.rmgr_info() {
        xlog::FPI if record.blocks.iter().all(|block| block.image.is_some()) => pages(record, f),
        xlog::FPI => return Err("a full-page image record without its image"),
        // Without full_page_writes a hint is logged without an image: nothing to replay.
        xlog::FPI_FOR_HINT => record.blocks.iter().filter(|block| block.image.is_some()).map(page).for_each(f),
        // Counters and settings: see `checkpoint`.
        xlog::CHECKPOINT_SHUTDOWN
        | xlog::CHECKPOINT_ONLINE
        | xlog::NEXTOID
        | xlog::PARAMETER_CHANGE
        | xlog::FPW_CHANGE => {}
        xlog::NOOP | xlog::SWITCH | xlog::RESTORE_POINT | xlog::BACKUP_END => {}
        xlog::END_OF_RECOVERY | xlog::OVERWRITE_CONTRECORD => {}
        _ => return Err(UNKNOWN_INFO),
    }
    Ok(())
}

fn heap_changes(record: &DecodedRecord<'_>, f: &mut impl FnMut(Change)) -> Result<(), &'static str> {
    let data = record.main_data;
    let cleared = match record.info & heap::OPMASK {
        heap::INSERT => {
            let flags = heap::HeapInsert::from_prefix(data).ok_or(CUT_SHORT)?.flags;
            [(0, flags & heap::insert_flags::ALL_VISIBLE_CLEARED), (0, 0)]
        }
        heap::DELETE => {
            let flags = heap::HeapDelete::from_prefix(data).ok_or(CUT_SHORT)?.flags;
            [(0, flags & heap::delete_flags::ALL_VISIBLE_CLEARED), (0, 0)]
        }
        heap::UPDATE | heap::HOT_UPDATE => {
            let flags = heap::HeapUpdate::from_prefix(data).ok_or(CUT_SHORT)?.flags;
            let old = u8::from(record.block(1).is_some());
            [
                (old, flags & heap::update_flags::OLD_ALL_VISIBLE_CLEARED),
                (0, flags & heap::update_flags::NEW_ALL_VISIBLE_CLEARED),
            ]
        }
        heap::LOCK => {
            let flags = heap::HeapLock::from_prefix(data).ok_or(CUT_SHORT)?.flags;
            [(0, flags & heap::LOCK_ALL_FROZEN_CLEARED), (0, 0)]
        }
        // The mask leaves only TRUNCATE (for logical decoding), CONFIRM and INPLACE.
        _ => {
            pages(record, f);
            return Ok(());
        }
    };
    pages_and_map(record, cleared, f)
}

fn heap2_changes(record: &DecodedRecord<'_>, f: &mut impl FnMut(Change)) -> Result<(), &'static str> {
    let cleared = match record.info & heap::OPMASK {
        heap::heap2::MULTI_INSERT => {
            let flags = heap::HeapMultiInsert::from_prefix(record.main_data).ok_or(CUT_SHORT)?.flags;
            flags & heap::insert_flags::ALL_VISIBLE_CLEARED
        }
        heap::heap2::LOCK_UPDATED => {
            let flags = heap::HeapLockUpdated::from_prefix(record.main_data).ok_or(CUT_SHORT)?.flags;
            flags & heap::LOCK_ALL_FROZEN_CLEARED
        }
        // The mask leaves PRUNE, VACUUM, FREEZE_PAGE, VISIBLE (which names its map page), REWRITE and NEW_CID (for logical
        // decoding, without pages).
        _ => {
            pages(record, f);
            return Ok(());
        }
    };
    pages_and_map(record, [(0, cleared), (0, 0)], f)
}

/// The record's pages, and the visibility map's pages that the flagged (non-zero) heap pages have bits on.
fn pages_and_map(
    record: &DecodedRecord<'_>,
    cleared: [(u8, u8); 2],
    f: &mut impl FnMut(Change),
) -> Result<(), &'static str> {
    let mut last = None;
    for (block_id, flag) in cleared {
        if flag != 0 {
            let heap_page = record.block(block_id).ok_or("a heap record without its page")?;
            let tag = map_page(heap_page.rel, heap_page.block);
            if last.replace(tag) != Some(tag) {
                f(Change::Page { tag, will_init: false });
            }
        }
    }
    pages(record, f);
    Ok(())
}

/// The visibility map's page that has a heap page's bits.
pub(crate) fn map_page(heap: RelTag, heap_block: u32) -> PageTag {
    PageTag { rel: heap.with_fork(ForkNumber::Vm), block: heap::vm::page_of(heap_block) }
}

fn rmgr_name(rmgr: RmgrId) -> &'static str {
    if rmgr.0 >= rmgr::MIN_CUSTOM { "custom" } else { rmgr::name(rmgr).unwrap_or("unknown") }
}

#[cfg(test)]
mod tests;
