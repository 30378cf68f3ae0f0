//! Pages of the visibility map (`access/heap/visibilitymap.c`): two bits per heap page, in no record of their own.
//!
//! Heap records that make a page less visible name only the heap page; the map's page follows from its number.

use types::{BlockNumber, PageTag};
use wal::{
    DecodedRecord,
    v15::{
        heap::{
            HeapDelete, HeapInsert, HeapLock, HeapLockUpdated, HeapMultiInsert, HeapUpdate, LOCK_ALL_FROZEN_CLEARED,
            delete_flags, heap2, insert_flags, update_flags,
            vm::{ALL_FROZEN, HEAP_BLOCKS_PER_PAGE, VALID_BITS, byte_of, page_of, shift_of},
            {DELETE, HOT_UPDATE, INSERT, LOCK, OPMASK, UPDATE},
        },
        rmgr,
    },
};

use super::{
    PageLsn,
    cursor::Cursor,
    fault::{Fault, whole},
    page_ops::Page,
};

/// `XLOG_SMGR_TRUNCATE`.
const SMGR_TRUNCATE: u8 = 0x20;
/// `SMGR_TRUNCATE_VM`.
const TRUNCATES_VM: u32 = 0x0002;

/// Applies to a map page a record that does not refer to it: a heap record that clears bits, or the heap's truncation.
/// `None` when the record does not change the page.
pub(super) fn redo_implied(
    page: &mut Page<'_>,
    tag: &PageTag,
    record: &DecodedRecord<'_>,
) -> Result<Option<PageLsn>, Fault> {
    if record.rmgr == rmgr::SMGR {
        return truncate(page, tag, record);
    }
    let cleared = cleared_bits(record)?;
    let main_fork = tag.rel.with_fork(types::ForkNumber::Main);
    let mut touched = false;
    for (block_id, bits) in cleared.into_iter().flatten() {
        let block = record.block(block_id).ok_or("a heap record without its block")?;
        if block.rel != main_fork || page_of(block.block) != tag.block {
            continue;
        }
        ensure_initialised(page);
        let (at, shift) = (byte_of(block.block), shift_of(block.block));
        page.bytes_mut()[at] &= !(bits << shift);
        touched = true;
    }
    // Clearing bits does not move the map page's LSN.
    Ok(touched.then_some(PageLsn::Keep))
}

/// Sets a heap page's bits on its map page. Returns whether Postgres counts that as a change.
pub(super) fn set(
    page: &mut Page<'_>,
    map_block: BlockNumber,
    heap_block: BlockNumber,
    flags: u8,
) -> Result<bool, Fault> {
    if page_of(heap_block) != map_block {
        return Err(format!("heap page {heap_block} is not described by map page {map_block}").into());
    }
    ensure_initialised(page);
    let flags = flags & VALID_BITS;
    let (at, shift) = (byte_of(heap_block), shift_of(heap_block));
    let byte = &mut page.bytes_mut()[at];
    let changed = flags != *byte >> shift & VALID_BITS;
    *byte |= flags << shift;
    Ok(changed)
}

/// Which bits a heap record clears, by the id of the block reference to the heap page.
fn cleared_bits(record: &DecodedRecord<'_>) -> Result<[Option<(u8, u8)>; 2], Fault> {
    let when = |set: bool, block_id: u8, bits: u8| set.then_some((block_id, bits));
    let data = record.main_data;
    Ok(match (record.rmgr, record.rmgr_info() & OPMASK) {
        (rmgr::HEAP, INSERT) => {
            let flags = whole(HeapInsert::from_prefix(data))?.flags;
            [when(flags & insert_flags::ALL_VISIBLE_CLEARED != 0, 0, VALID_BITS), None]
        }
        (rmgr::HEAP, DELETE) => {
            let flags = whole(HeapDelete::from_prefix(data))?.flags;
            [when(flags & delete_flags::ALL_VISIBLE_CLEARED != 0, 0, VALID_BITS), None]
        }
        (rmgr::HEAP, UPDATE | HOT_UPDATE) => {
            let flags = whole(HeapUpdate::from_prefix(data))?.flags;
            let old_id = u8::from(record.block(1).is_some());
            [
                when(flags & update_flags::OLD_ALL_VISIBLE_CLEARED != 0, old_id, VALID_BITS),
                when(flags & update_flags::NEW_ALL_VISIBLE_CLEARED != 0, 0, VALID_BITS),
            ]
        }
        (rmgr::HEAP, LOCK) => {
            let flags = whole(HeapLock::from_prefix(data))?.flags;
            [when(flags & LOCK_ALL_FROZEN_CLEARED != 0, 0, ALL_FROZEN), None]
        }
        (rmgr::HEAP2, heap2::MULTI_INSERT) => {
            let flags = whole(HeapMultiInsert::from_prefix(data))?.flags;
            [when(flags & insert_flags::ALL_VISIBLE_CLEARED != 0, 0, VALID_BITS), None]
        }
        (rmgr::HEAP2, heap2::LOCK_UPDATED) => {
            let flags = whole(HeapLockUpdated::from_prefix(data))?.flags;
            [when(flags & LOCK_ALL_FROZEN_CLEARED != 0, 0, ALL_FROZEN), None]
        }
        _clears_nothing => [None, None],
    })
}

/// The heap was truncated: bits of pages beyond its new end are cleared (`visibilitymap_prepare_truncate`).
fn truncate(page: &mut Page<'_>, tag: &PageTag, record: &DecodedRecord<'_>) -> Result<Option<PageLsn>, Fault> {
    if record.rmgr_info() != SMGR_TRUNCATE {
        return Ok(None);
    }
    let mut main = Cursor::new(record.main_data);
    let (blocks, spc, db, rel, flags) = (main.u32()?, main.u32()?, main.u32()?, main.u32()?, main.u32()?);
    let same_rel = (spc, db, rel) == (tag.rel.spc, tag.rel.db, tag.rel.rel);
    if !same_rel || flags & TRUNCATES_VM == 0 || page_of(blocks) != tag.block {
        return Ok(None);
    }
    if blocks.is_multiple_of(HEAP_BLOCKS_PER_PAGE) {
        // The map page itself goes.
        return Ok(None);
    }
    ensure_initialised(page);
    let (at, shift) = (byte_of(blocks), shift_of(blocks));
    let bytes = page.bytes_mut();
    bytes[at + 1..].fill(0);
    bytes[at] &= (1 << shift) - 1;
    Ok(Some(PageLsn::Keep))
}

fn ensure_initialised(page: &mut Page<'_>) {
    if page.is_new() {
        page.init(0);
    }
}
