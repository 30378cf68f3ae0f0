//! Redo of GiST indexes (`access/gist/gistxlog.c`).

use types::BlockNumber;
use wal::{BlockRef, DecodedRecord};

use super::{
    PageLsn,
    cursor::Cursor,
    fault::Fault,
    index_tuple,
    page_ops::{HEADER_BYTES, Page, Place},
};

const PAGE_UPDATE: u8 = 0x00;
const DELETE: u8 = 0x10;
const PAGE_REUSE: u8 = 0x20;
const PAGE_SPLIT: u8 = 0x30;
const PAGE_DELETE: u8 = 0x60;
const ASSIGN_LSN: u8 = 0x70;

/// Bits of a page's `flags`. `F_TUPLES_DELETED` (1 << 2), which nothing reads, is no longer set by 15.20, nor here.
const LEAF: u16 = 1 << 0;
const DELETED: u16 = 1 << 1;
const FOLLOW_RIGHT: u16 = 1 << 3;
const HAS_GARBAGE: u16 = 1 << 4;

/// `sizeof(GISTPageOpaqueData)`.
const OPAQUE_BYTES: usize = 16;
const PAGE_ID: u16 = 0xFF81;
/// `GIST_ROOT_BLKNO`.
const ROOT: BlockNumber = 0;
const INVALID_BLOCK: BlockNumber = BlockNumber::MAX;

/// Applies the record to the page of this block reference.
pub(super) fn redo(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<PageLsn, Fault> {
    match (record.rmgr_info(), block.id) {
        (PAGE_UPDATE, 0) => update(page, record, block)?,
        (PAGE_UPDATE, 1) | (PAGE_SPLIT, 0) => clear_follow_right(page, record)?,
        (DELETE, 0) => delete(page, record)?,
        (PAGE_SPLIT, _half) => split(page, record, block)?,
        (PAGE_DELETE, 0) => delete_page(page, record)?,
        (PAGE_DELETE, 1) => {
            let mut main = Cursor::new(record.main_data);
            main.skip(8)?; // deleteXid
            page.index_tuple_delete(main.u16()?)?;
        }
        (PAGE_REUSE | ASSIGN_LSN, _) => return Err(Fault::Unsupported("a GiST record with a block reference")),
        (_operation, id) => return Err(format!("a GiST record that has no use for its block {id}").into()),
    }
    Ok(PageLsn::Set)
}

/// What the record does to a page besides its full-page image, which was taken before the child's split was ended.
pub(super) fn redo_after_image(
    page: &mut Page<'_>,
    record: &DecodedRecord<'_>,
    block: &BlockRef<'_>,
) -> Result<(), Fault> {
    match (record.rmgr_info(), block.id) {
        (PAGE_UPDATE, 1) | (PAGE_SPLIT, 0) => clear_follow_right(page, record),
        _image_is_all => Ok(()),
    }
}

fn change_flags(page: &mut Page<'_>, clear: u16, set: u16) -> Result<(), Fault> {
    let at = page.special_of(OPAQUE_BYTES)? + 12;
    let flags = page.u16_at(at)?;
    page.set_u16_at(at, flags & !clear | set)
}

/// `GistPageSetNSN`: an LSN, high half first.
fn set_split_lsn(page: &mut Page<'_>, lsn: u64) -> Result<(), Fault> {
    let special = page.special_of(OPAQUE_BYTES)?;
    page.set_u32_at(special, (lsn >> 32) as u32)?;
    page.set_u32_at(special + 4, lsn as u32)
}

/// Ends a child's split: its right half has its own downlink now.
fn clear_follow_right(page: &mut Page<'_>, record: &DecodedRecord<'_>) -> Result<(), Fault> {
    set_split_lsn(page, record.end_lsn.0)?;
    change_flags(page, FOLLOW_RIGHT, 0)
}

fn append_tuples(page: &mut Page<'_>, mut data: &[u8]) -> Result<(), Fault> {
    while !data.is_empty() {
        let bytes = index_tuple::size(data)?;
        let (tuple, rest) = data.split_at_checked(bytes).ok_or("a tuple is longer than the data that holds it")?;
        page.add_item(tuple, Place::Shifting(page.max_offset() + 1))?;
        data = rest;
    }
    Ok(())
}

fn update(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (deleted, inserted) = (main.u16()?, main.u16()?);
    let mut data = Cursor::new(block.data);
    if (deleted, inserted) == (1, 1) {
        // One for one is replaced in place.
        let number = data.u16()?;
        let tuple = data.clone().rest();
        return page.index_tuple_overwrite(number, data.take(index_tuple::size(tuple)?)?);
    }
    if deleted > 0 {
        page.index_multi_delete(&data.u16s(deleted.into())?)?;
    }
    append_tuples(page, data.rest())
}

/// Items known to be dead go when an insertion needs their place.
fn delete(page: &mut Page<'_>, record: &DecodedRecord<'_>) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    main.skip(4)?; // latestRemovedXid
    let count = main.u16()?;
    page.index_multi_delete(&main.u16s(count.into())?)?;
    change_flags(page, HAS_GARBAGE, 0)
}

/// One of the pages of a split, blocks 1 and up: the first is the old page or, when the root was split, the new root.
fn split(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let old_right = main.u32()?;
    main.skip(4)?;
    let (old_split_lsn, was_leaf) = (main.u64()?, main.u8()? != 0);
    main.skip(1)?;
    let (pages, marks_follow_right) = (main.u16()?, main.u8()? != 0);
    let is_root = block.block == ROOT;
    page.init(OPAQUE_BYTES);
    let special = page.special();
    page.set_u16_at(special + 14, PAGE_ID)?;
    change_flags(page, 0, if was_leaf && !is_root { LEAF } else { 0 })?;
    let mut data = Cursor::new(block.data);
    data.skip(4)?; // The number of tuples.
    append_tuples(page, data.rest())?;
    let next = record.block(block.id + 1).filter(|_| u16::from(block.id) < pages);
    let right = if is_root { INVALID_BLOCK } else { next.map_or(old_right, |next| next.block) };
    page.set_u32_at(special + 8, right)?;
    set_split_lsn(page, old_split_lsn)?;
    let splits_root = record.block(1).is_some_and(|first| first.block == ROOT);
    let follow_right = next.is_some() && !is_root && !splits_root && marks_follow_right;
    change_flags(page, 0, if follow_right { FOLLOW_RIGHT } else { 0 })
}

/// `GistPageSetDeleted`: the transaction after whose end the page may be reused takes the place of items.
fn delete_page(page: &mut Page<'_>, record: &DecodedRecord<'_>) -> Result<(), Fault> {
    change_flags(page, 0, DELETED)?;
    page.write(HEADER_BYTES, Cursor::new(record.main_data).take(8)?)?;
    page.set_lower(HEADER_BYTES + 8);
    Ok(())
}
