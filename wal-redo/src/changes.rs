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
    rmgr_changes(record).map_err(|problem| UnknownRecord {
        lsn: record.start_lsn,
        rmgr: record.rmgr,
        info: record.info,
        problem,
    })
}

fn rmgr_changes(record: &DecodedRecord<'_>) -> Changes {
    match record.rmgr {
        rmgr::XLOG => xlog_changes(record),
        rmgr::XACT => state_changes::xact(record),
        rmgr::SMGR => state_changes::smgr(record),
        rmgr::CLOG => state_changes::clog(record),
        rmgr::DBASE => state_changes::dbase(record),
        rmgr::TBLSPC => state_changes::tblspc(record),
        rmgr::MULTIXACT => state_changes::multixact(record),
        rmgr::RELMAP => state_changes::relmap(record),
        rmgr::STANDBY => known(record, 0xF0, &[0x00, 0x10, 0x20], |_| Ok(ChangeList::new())),
        rmgr::HEAP2 => heap2_changes(record),
        rmgr::HEAP => heap_changes(record),
        rmgr::BTREE => pages_if(record, record.rmgr_info() <= btree::META_CLEANUP),
        rmgr::HASH => pages_if(record, record.rmgr_info() <= 0xC0),
        rmgr::GIN => pages_if(record, (0x10..=0x90).contains(&record.rmgr_info())),
        rmgr::GIST => known(record, 0xF0, &[0x00, 0x10, 0x20, 0x30, 0x60, 0x70], pages),
        rmgr::SEQ => known(record, 0xF0, &[state::seq::LOG], pages),
        rmgr::SPGIST => pages_if(record, (0x10..=0x80).contains(&record.rmgr_info())),
        // The highest bit tells that a page is initialised.
        rmgr::BRIN => pages_if(record, record.rmgr_info() & 0x70 <= 0x50),
        rmgr::COMMIT_TS => state_changes::commit_ts(record),
        // Progress of logical replication: it lives in files that this compute's successor doesn't get.
        rmgr::REPLORIGIN => {
            known(record, 0xF0, &[state::replorigin::SET, state::replorigin::DROP], |_| Ok(ChangeList::new()))
        }
        rmgr::GENERIC => known(record, 0xF0, &[0x00], pages),
        rmgr::LOGICALMSG => known(record, 0xF0, &[state::logicalmsg::MESSAGE], crate::aux_file::changes),
        RmgrId(rmgr::MIN_CUSTOM..) => Err("an extension's own resource manager, which cannot be replayed"),
        RmgrId(_) => Err("no resource manager of PostgreSQL 15"),
    }
}

/// A change for every page the record refers to.
pub(crate) fn pages(record: &DecodedRecord<'_>) -> Changes {
    Ok(record.blocks.iter().map(page).collect())
}

fn page(block: &wal::BlockRef<'_>) -> Change {
    Change::Page { tag: block.tag(), will_init: block.will_init || block.applies_image() }
}

fn pages_if(record: &DecodedRecord<'_>, known: bool) -> Changes {
    if known { pages(record) } else { Err(UNKNOWN_INFO) }
}

/// `changes` of a record whose info, under the mask, is one of those listed.
fn known(record: &DecodedRecord<'_>, mask: u8, infos: &[u8], changes: fn(&DecodedRecord<'_>) -> Changes) -> Changes {
    if infos.contains(&(record.info & mask)) { changes(record) } else { Err(UNKNOWN_INFO) }
}

fn xlog_changes(record: &DecodedRecord<'_>) -> Changes {
    match record.rmgr_info() {
        xlog::FPI if record.blocks.iter().all(|block| block.image.is_some()) => pages(record),
        xlog::FPI => Err("a full-page image record without its image"),
        // Without full_page_writes a hint is logged without an image: nothing to replay.
        xlog::FPI_FOR_HINT => Ok(record.blocks.iter().filter(|block| block.image.is_some()).map(page).collect()),
        // Counters and settings: see `checkpoint`.
        xlog::CHECKPOINT_SHUTDOWN
        | xlog::CHECKPOINT_ONLINE
        | xlog::NEXTOID
        | xlog::PARAMETER_CHANGE
        | xlog::FPW_CHANGE => Ok(ChangeList::new()),
        xlog::NOOP | xlog::SWITCH | xlog::RESTORE_POINT | xlog::BACKUP_END => Ok(ChangeList::new()),
        xlog::END_OF_RECOVERY | xlog::OVERWRITE_CONTRECORD => Ok(ChangeList::new()),
        _ => Err(UNKNOWN_INFO),
    }
}

fn heap_changes(record: &DecodedRecord<'_>) -> Changes {
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
        _ => return pages(record),
    };
    pages_and_map(record, cleared)
}

fn heap2_changes(record: &DecodedRecord<'_>) -> Changes {
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
        _ => return pages(record),
    };
    pages_and_map(record, [(0, cleared), (0, 0)])
}

/// The record's pages, and the visibility map's pages that the flagged (non-zero) heap pages have bits on.
fn pages_and_map(record: &DecodedRecord<'_>, cleared: [(u8, u8); 2]) -> Changes {
    let mut changes = ChangeList::new();
    for (block_id, flag) in cleared {
        if flag != 0 {
            let heap_page = record.block(block_id).ok_or("a heap record without its page")?;
            let change = Change::Page { tag: map_page(heap_page.rel, heap_page.block), will_init: false };
            if !changes.contains(&change) {
                changes.push(change);
            }
        }
    }
    changes.extend(record.blocks.iter().map(page));
    Ok(changes)
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
