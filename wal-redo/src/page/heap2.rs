//! Redo of the heap's other records: pruning, freezing, visibility, multi-insert (`heap2_redo` in `heapam.c`).

use wal::{
    BlockRef, DecodedRecord,
    v15::heap::{
        FREEZE_XVAC, HeapFreezePage, HeapFreezeTuple, HeapLockUpdated, HeapMultiInsert, HeapPrune, HeapVacuum,
        HeapVisible, INIT_PAGE, INVALID_XVAC, OPMASK,
        heap2::{FREEZE_PAGE, LOCK_UPDATED, MULTI_INSERT, NEW_CID, PRUNE, REWRITE, VACUUM, VISIBLE},
        insert_flags,
    },
};

use super::{
    PageLsn,
    cursor::{Cursor, each_u16},
    fault::{Fault, whole},
    page_ops::{ItemId, Page},
    tuple::{NewTuple, Tuple, item_pointer},
    visibility_map,
};

/// `FrozenTransactionId`.
const FROZEN_XID: u32 = 2;

/// Applies the record to the page of this block reference.
pub(super) fn redo(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<PageLsn, Fault> {
    match record.rmgr_info() & OPMASK {
        PRUNE => prune(page, record, block)?,
        VACUUM => vacuum(page, record, block)?,
        FREEZE_PAGE => freeze_page(page, record, block)?,
        VISIBLE => return visible(page, record, block),
        MULTI_INSERT => multi_insert(page, record, block)?,
        LOCK_UPDATED => lock_updated(page, record)?,
        REWRITE => return Err(Fault::Unsupported("heap rewrite with a block reference")),
        NEW_CID => return Err(Fault::Unsupported("heap new_cid with a block reference")),
        _unknown => return Err(Fault::Unsupported("an unknown heap2 operation")),
    }
    Ok(PageLsn::Set)
}

/// Line pointers become redirected, dead or unused; then the page is packed (`heap_page_prune_execute`).
fn prune(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let HeapPrune { nredirected, ndead, .. } = whole(HeapPrune::from_prefix(record.main_data))?;
    let mut data = Cursor::new(block.data);
    for _ in 0..nredirected {
        let (from, to) = (data.u16()?, data.u16()?);
        page.set_item_id(from, ItemId::redirect(to))?;
    }
    for number in data.each_u16(ndead.into())? {
        page.set_item_id(number, ItemId::DEAD)?;
    }
    for number in each_u16(data.rest()) {
        page.set_item_id(number, ItemId::UNUSED)?;
    }
    page.repair_fragmentation()
}

/// Dead line pointers become unused (vacuum's second pass).
fn vacuum(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let HeapVacuum { nunused } = whole(HeapVacuum::from_prefix(record.main_data))?;
    for number in Cursor::new(block.data).each_u16(nunused.into())? {
        page.set_item_id(number, ItemId::UNUSED)?;
    }
    page.truncate_line_pointers()
}

fn freeze_page(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let HeapFreezePage { ntuples, .. } = whole(HeapFreezePage::from_prefix(record.main_data))?;
    let mut data = Cursor::new(block.data);
    for _ in 0..ntuples {
        let plan = whole(HeapFreezeTuple::from_prefix(data.take(HeapFreezeTuple::SIZE)?))?;
        let mut tuple = Tuple::on_page(page, plan.offset)?;
        tuple.set_xmax(plan.xmax);
        if plan.frzflags & FREEZE_XVAC != 0 {
            tuple.set_xvac(FROZEN_XID);
        }
        if plan.frzflags & INVALID_XVAC != 0 {
            tuple.set_xvac(0);
        }
        tuple.set_infomask(plan.t_infomask);
        tuple.set_infomask2(plan.t_infomask2);
    }
    Ok(())
}

/// Block 0 is the visibility map's page, block 1 the heap page.
fn visible(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<PageLsn, Fault> {
    if block.id != 0 {
        page.set_all_visible(true);
        // Postgres sets the heap page's LSN only when it runs with checksums or wal_log_hints.
        return Ok(PageLsn::Keep);
    }
    let HeapVisible { flags, .. } = whole(HeapVisible::from_prefix(record.main_data))?;
    let heap_block = record.block(1).ok_or("a visibility record without its heap page")?.block;
    let changed = visibility_map::set(page, block.block, heap_block, flags)?;
    Ok(if changed { PageLsn::Set } else { PageLsn::Keep })
}

fn multi_insert(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let HeapMultiInsert { flags, ntuples, .. } = whole(HeapMultiInsert::from_prefix(record.main_data))?;
    // On a page that it makes, a record lists no places: they are 1, 2, 3 and so on.
    let makes_page = record.rmgr_info() & INIT_PAGE != 0;
    let mut places = Cursor::new(record.main_data);
    places.skip(HeapMultiInsert::SIZE)?;
    if makes_page {
        page.init(0);
    }
    let mut data = Cursor::new(block.data);
    for number in 1..=ntuples {
        let offnum = if makes_page { number } else { places.u16()? };
        data.align(2);
        let len = data.u16()?;
        let header = NewTuple::read(&mut data)?;
        let body = data.take(len.into())?;
        let slot = header.add_to(page, offnum, body.len(), record.xid, 0, item_pointer(block.block, offnum))?;
        page.write(slot.start, body)?;
    }
    if !data.is_empty() {
        return Err("a multi-insert has more tuple data than tuples".into());
    }
    if flags & insert_flags::ALL_VISIBLE_CLEARED != 0 {
        page.set_all_visible(false);
    }
    if flags & insert_flags::ALL_FROZEN_SET != 0 {
        page.set_all_visible(true);
    }
    Ok(())
}

fn lock_updated(page: &mut Page<'_>, record: &DecodedRecord<'_>) -> Result<(), Fault> {
    let HeapLockUpdated { xmax, offnum, infobits_set, .. } = whole(HeapLockUpdated::from_prefix(record.main_data))?;
    let mut tuple = Tuple::on_page(page, offnum)?;
    tuple.replace_xmax_bits(infobits_set);
    tuple.set_xmax(xmax);
    Ok(())
}
