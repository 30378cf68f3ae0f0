//! Redo of the heap's everyday records (`heap_redo` in `access/heap/heapam.c`).

use std::ops::Range;

use wal::{
    BlockRef, DecodedRecord,
    v15::heap::{
        CONFIRM, DELETE, HOT_UPDATE, HeapConfirm, HeapDelete, HeapInplace, HeapInsert, HeapLock, HeapUpdate, INIT_PAGE,
        INPLACE, INSERT, LOCK, OPMASK, TRUNCATE, UPDATE, delete_flags, insert_flags, update_flags,
    },
};

use super::{
    PageLsn,
    cursor::Cursor,
    fault::{Fault, whole},
    page_ops::Page,
    tuple::{HEADER_BYTES, MOVED_PARTITIONS, NewTuple, Tuple, item_pointer},
};

/// Applies the record to the page of this block reference.
pub(super) fn redo(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<PageLsn, Fault> {
    match record.rmgr_info() & OPMASK {
        INSERT => insert(page, record, block),
        DELETE => delete(page, record, block),
        UPDATE => update(page, record, block, false),
        HOT_UPDATE => update(page, record, block, true),
        TRUNCATE => return Err(Fault::Unsupported("heap truncate with a block reference")),
        CONFIRM => confirm(page, record, block),
        LOCK => lock(page, record, block),
        INPLACE => inplace(page, record, block),
        _unknown => return Err(Fault::Unsupported("an unknown heap operation")),
    }?;
    Ok(PageLsn::Set)
}

fn insert(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let HeapInsert { offnum, flags } = whole(HeapInsert::from_prefix(record.main_data))?;
    if record.rmgr_info() & INIT_PAGE != 0 {
        page.init(0);
    }
    let mut data = Cursor::new(block.data);
    let header = NewTuple::read(&mut data)?;
    let body = data.rest();
    let slot = header.add_to(page, offnum, body.len(), record.xid, 0, item_pointer(block.block, offnum))?;
    page.write(slot.start, body)?;
    if flags & insert_flags::ALL_VISIBLE_CLEARED != 0 {
        page.set_all_visible(false);
    }
    Ok(())
}

fn delete(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let HeapDelete { xmax, offnum, infobits_set, flags } = whole(HeapDelete::from_prefix(record.main_data))?;
    let mut tuple = Tuple::on_page(page, offnum)?;
    tuple.replace_xmax_bits(infobits_set);
    tuple.set_hot_updated(false);
    if flags & delete_flags::IS_SUPER == 0 {
        tuple.set_xmax(xmax);
    } else {
        tuple.set_xmin(0);
    }
    tuple.reset_cmax();
    let moved = flags & delete_flags::IS_PARTITION_MOVE != 0;
    tuple.set_ctid(if moved { MOVED_PARTITIONS } else { item_pointer(block.block, offnum) });
    page.set_prunable(record.xid);
    if flags & delete_flags::ALL_VISIBLE_CLEARED != 0 {
        page.set_all_visible(false);
    }
    Ok(())
}

/// Block 0 is the new tuple's page, block 1 the old one's; without block 1 both are on the one page.
fn update(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>, hot: bool) -> Result<(), Fault> {
    let header = whole(HeapUpdate::from_prefix(record.main_data))?;
    let new_block = record.block(0).ok_or("an update without block 0")?;
    let same_page = record.block(1).is_none();
    let new_ctid = item_pointer(new_block.block, header.new_offnum);
    let mut old_tuple = 0..0;
    if same_page || block.id == 1 {
        old_tuple = update_old(page, record, &header, new_ctid, hot)?;
    }
    if block.id == 0 {
        if !same_page && record.rmgr_info() & INIT_PAGE != 0 {
            page.init(0);
        }
        update_new(page, record, &header, new_ctid, old_tuple)?;
    }
    Ok(())
}

/// Marks the old version as updated and returns where it stands in the page.
fn update_old(
    page: &mut Page<'_>,
    record: &DecodedRecord<'_>,
    header: &HeapUpdate,
    new_ctid: [u8; 6],
    hot: bool,
) -> Result<Range<usize>, Fault> {
    let mut tuple = Tuple::on_page(page, header.old_offnum)?;
    tuple.replace_xmax_bits(header.old_infobits_set);
    tuple.set_hot_updated(hot);
    tuple.set_xmax(header.old_xmax);
    tuple.reset_cmax();
    tuple.set_ctid(new_ctid);
    tuple.data_offset()?;
    page.set_prunable(record.xid);
    if header.flags & update_flags::OLD_ALL_VISIBLE_CLEARED != 0 {
        page.set_all_visible(false);
    }
    page.item_range(header.old_offnum)
}

/// Adds the new version, of which the record may leave out what the old one starts or ends with.
fn update_new(
    page: &mut Page<'_>,
    record: &DecodedRecord<'_>,
    header: &HeapUpdate,
    new_ctid: [u8; 6],
    old_tuple: Range<usize>,
) -> Result<(), Fault> {
    let block = record.block(0).ok_or("an update without block 0")?;
    let mut data = Cursor::new(block.data);
    let prefix_bytes = if header.flags & update_flags::PREFIX_FROM_OLD != 0 { data.u16()? } else { 0 };
    let suffix_bytes = if header.flags & update_flags::SUFFIX_FROM_OLD != 0 { data.u16()? } else { 0 };
    let new = NewTuple::read(&mut data)?;
    // The prefix goes between the null bitmap, which the record holds, and the rest of the data.
    let bitmap = if prefix_bytes > 0 {
        let len = usize::from(new.hoff).checked_sub(HEADER_BYTES).ok_or("t_hoff is inside the tuple header")?;
        data.take(len)?
    } else {
        &[]
    };
    let (prefix, suffix) = kept_of_old(page, old_tuple, prefix_bytes.into(), suffix_bytes.into())?;
    let rest = data.rest();
    let body_bytes = bitmap.len() + prefix.len() + rest.len() + suffix.len();
    let slot = new.add_to(page, header.new_offnum, body_bytes, record.xid, header.new_xmax, new_ctid)?;
    let (prefix_at, rest_at) = (slot.start + bitmap.len(), slot.start + bitmap.len() + prefix.len());
    page.write(slot.start, bitmap)?;
    page.copy_within(prefix, prefix_at)?;
    page.write(rest_at, rest)?;
    page.copy_within(suffix, rest_at + rest.len())?;
    if header.flags & update_flags::NEW_ALL_VISIBLE_CLEARED != 0 {
        page.set_all_visible(false);
    }
    Ok(())
}

/// Where the old tuple's bytes stand that the new one starts and ends with.
fn kept_of_old(
    page: &Page<'_>,
    old_tuple: Range<usize>,
    prefix_bytes: usize,
    suffix_bytes: usize,
) -> Result<(Range<usize>, Range<usize>), Fault> {
    if prefix_bytes == 0 && suffix_bytes == 0 {
        return Ok((0..0, 0..0));
    }
    let hoff = page.slice(old_tuple.clone())?.get(HEADER_BYTES - 1).copied().unwrap_or(0);
    let data_at = old_tuple.start + usize::from(hoff);
    let prefix = data_at..data_at + prefix_bytes;
    let suffix = old_tuple.end.saturating_sub(suffix_bytes)..old_tuple.end;
    if prefix.end > old_tuple.end || suffix_bytes > old_tuple.len() {
        return Err("an update takes more from the old tuple than there is".into());
    }
    Ok((prefix, suffix))
}

/// A speculative insertion (`ON CONFLICT`) becomes a real one.
fn confirm(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let HeapConfirm { offnum } = whole(HeapConfirm::from_prefix(record.main_data))?;
    Tuple::on_page(page, offnum)?.set_ctid(item_pointer(block.block, offnum));
    Ok(())
}

fn lock(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let HeapLock { locking_xid, offnum, infobits_set, .. } = whole(HeapLock::from_prefix(record.main_data))?;
    let mut tuple = Tuple::on_page(page, offnum)?;
    tuple.replace_xmax_bits(infobits_set);
    if tuple.xmax_is_locked_only() {
        tuple.set_hot_updated(false);
        tuple.set_ctid(item_pointer(block.block, offnum));
    }
    tuple.set_xmax(locking_xid);
    tuple.reset_cmax();
    Ok(())
}

fn inplace(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let HeapInplace { offnum } = whole(HeapInplace::from_prefix(record.main_data))?;
    let mut tuple = Tuple::on_page(page, offnum)?;
    let data = tuple.data_mut()?;
    if data.len() != block.data.len() {
        return Err(format!("an in-place update of {} bytes by {}", data.len(), block.data.len()).into());
    }
    data.copy_from_slice(block.data);
    Ok(())
}
