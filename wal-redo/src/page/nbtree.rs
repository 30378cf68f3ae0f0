//! Redo of B-trees (`access/nbtree/nbtxlog.c`).

use types::BlockNumber;
use wal::{
    BlockRef, DecodedRecord,
    v15::btree::{
        BtreeDedup, BtreeDedupInterval, BtreeDelete, BtreeInsert, BtreeMarkPageHalfdead, BtreeMetadata, BtreeNewroot,
        BtreeSplit, BtreeUnlinkPage, BtreeVacuum, DEDUP, DELETE, INSERT_LEAF, INSERT_META, INSERT_POST, INSERT_UPPER,
        MARK_PAGE_HALFDEAD, META_CLEANUP, NEWROOT, REUSE_PAGE, SPLIT_L, SPLIT_R, UNLINK_PAGE, UNLINK_PAGE_META, VACUUM,
    },
};

use super::{
    PageLsn,
    cursor::{Cursor, u16s},
    fault::{Fault, whole},
    index_tuple::{self, split_all, split_first},
    nbtree_posting as posting,
    page_ops::{HEADER_BYTES, Page, Place},
    tuple::item_pointer,
};

/// Bits of `btpo_flags`.
const LEAF: u16 = 1 << 0;
const ROOT: u16 = 1 << 1;
const DELETED: u16 = 1 << 2;
const META: u16 = 1 << 3;
const HALF_DEAD: u16 = 1 << 4;
const HAS_GARBAGE: u16 = 1 << 6;
const INCOMPLETE_SPLIT: u16 = 1 << 7;
const HAS_FULLXID: u16 = 1 << 8;

/// `sizeof(BTPageOpaqueData)`.
const OPAQUE_BYTES: usize = 16;
const BTREE_MAGIC: u32 = 0x0005_3162;
/// `sizeof(BTMetaPageData)`.
const META_BYTES: usize = 48;

/// Applies the record to the page of this block reference.
pub(super) fn redo(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<PageLsn, Fault> {
    match (record.rmgr_info(), block.id) {
        (INSERT_LEAF | INSERT_UPPER | INSERT_META, 0) => insert(page, record, block)?,
        (INSERT_POST, 0) => insert_post(page, record, block)?,
        (INSERT_UPPER | INSERT_META | NEWROOT, 1) | (SPLIT_L | SPLIT_R, 3) => clear_incomplete_split(page)?,
        (INSERT_META | NEWROOT, 2) | (UNLINK_PAGE_META, 4) | (META_CLEANUP, 0) => restore_meta(page, block)?,
        (SPLIT_L, 0) => split_left(page, record, block, true)?,
        (SPLIT_R, 0) => split_left(page, record, block, false)?,
        (SPLIT_L | SPLIT_R, 1) => split_right(page, record, block)?,
        (SPLIT_L | SPLIT_R, 2) => Opaque::of(page)?.set_prev(split_blocks(record)?.right)?,
        (DEDUP, 0) => dedup(page, record, block)?,
        (VACUUM | DELETE, 0) => delete_items(page, record, block)?,
        (MARK_PAGE_HALFDEAD, 0) => mark_halfdead_leaf(page, record)?,
        (MARK_PAGE_HALFDEAD, 1) => mark_halfdead_parent(page, record)?,
        (UNLINK_PAGE | UNLINK_PAGE_META, 0) => unlink_target(page, record)?,
        (UNLINK_PAGE | UNLINK_PAGE_META, 1) => Opaque::of(page)?.set_next(unlink_of(record)?.rightsib)?,
        (UNLINK_PAGE | UNLINK_PAGE_META, 2) => Opaque::of(page)?.set_prev(unlink_of(record)?.leftsib)?,
        (UNLINK_PAGE | UNLINK_PAGE_META, 3) => unlink_leaf(page, record)?,
        (NEWROOT, 0) => newroot(page, record, block)?,
        (REUSE_PAGE, _) => return Err(Fault::Unsupported("btree page reuse with a block reference")),
        (_operation, id) => return Err(format!("a btree record that has no use for its block {id}").into()),
    }
    Ok(PageLsn::Set)
}

/// A page's special area (`BTPageOpaqueData`).
struct Opaque<'o, 'p> {
    page: &'o mut Page<'p>,
    at: usize,
}

impl<'o, 'p> Opaque<'o, 'p> {
    fn of(page: &'o mut Page<'p>) -> Result<Opaque<'o, 'p>, Fault> {
        let at = page.special_of(OPAQUE_BYTES)?;
        Ok(Opaque { page, at })
    }

    fn set_prev(&mut self, block: BlockNumber) -> Result<(), Fault> {
        self.page.set_u32_at(self.at, block)
    }

    fn next(&self) -> Result<BlockNumber, Fault> {
        self.page.u32_at(self.at + 4)
    }

    fn set_next(&mut self, block: BlockNumber) -> Result<(), Fault> {
        self.page.set_u32_at(self.at + 4, block)
    }

    fn set_level(&mut self, level: u32) -> Result<(), Fault> {
        self.page.set_u32_at(self.at + 8, level)
    }

    fn flags(&self) -> Result<u16, Fault> {
        self.page.u16_at(self.at + 12)
    }

    fn set_flags(&mut self, flags: u16) -> Result<(), Fault> {
        self.page.set_u16_at(self.at + 12, flags)
    }

    fn clear_cycle_id(&mut self) -> Result<(), Fault> {
        self.page.set_u16_at(self.at + 14, 0)
    }

    /// Offset number of the first item that is not the high key (`P_FIRSTDATAKEY`).
    fn first_data_key(&self) -> Result<u16, Fault> {
        Ok(if self.next()? == 0 { 1 } else { 2 })
    }
}

/// Makes an empty page with these links (`_bt_pageinit` and what its callers set).
fn init(page: &mut Page<'_>, prev: BlockNumber, next: BlockNumber, level: u32, flags: u16) -> Result<(), Fault> {
    page.init(OPAQUE_BYTES);
    let mut opaque = Opaque::of(page)?;
    opaque.set_prev(prev)?;
    opaque.set_next(next)?;
    opaque.set_level(level)?;
    opaque.set_flags(flags)
}

fn insert(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let BtreeInsert { offnum } = whole(BtreeInsert::from_prefix(record.main_data))?;
    page.add_item(block.data, Place::Shifting(offnum)).map(|_| ())
}

/// An insertion that splits a posting list: the new tuple's and the list's pointers are exchanged.
fn insert_post(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let BtreeInsert { offnum } = whole(BtreeInsert::from_prefix(record.main_data))?;
    let mut data = Cursor::new(block.data);
    let posting_offset = data.u16()?;
    let mut new_item = data.rest().to_vec();
    let range = page.item_range(offnum.saturating_sub(1))?;
    let replaced = posting::swap(&mut new_item, page.slice(range.clone())?, posting_offset)?;
    page.write(range.start, &replaced)?;
    page.add_item(&new_item, Place::Shifting(offnum)).map(|_| ())
}

fn clear_incomplete_split(page: &mut Page<'_>) -> Result<(), Fault> {
    let mut opaque = Opaque::of(page)?;
    let flags = opaque.flags()?;
    opaque.set_flags(flags & !INCOMPLETE_SPLIT)
}

/// The meta page, made anew from `xl_btree_metadata` (`_bt_restore_meta`).
fn restore_meta(page: &mut Page<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let new = whole(BtreeMetadata::from_prefix(block.data))?;
    init(page, 0, 0, 0, META)?;
    let mut meta = [0; META_BYTES];
    let BtreeMetadata { version, root, level, fastroot, fastlevel, last_cleanup_num_delpages, .. } = new;
    let numbers = [BTREE_MAGIC, version, root, level, fastroot, fastlevel, last_cleanup_num_delpages];
    for (at, number) in numbers.into_iter().enumerate() {
        meta[at * 4..at * 4 + 4].copy_from_slice(&number.to_le_bytes());
    }
    // btm_last_cleanup_num_heap_tuples is no longer used, and always this.
    meta[32..40].copy_from_slice(&(-1.0f64).to_le_bytes());
    meta[40] = u8::from(new.allequalimage != 0);
    page.write(HEADER_BYTES, &meta)?;
    page.set_lower(HEADER_BYTES + META_BYTES);
    Ok(())
}

fn leaf_flag(level: u32) -> u16 {
    if level == 0 { LEAF } else { 0 }
}

/// The pages that a split links.
struct SplitBlocks {
    left: BlockNumber,
    right: BlockNumber,
    /// The old right sibling; 0 when there is none.
    sibling: BlockNumber,
}

fn split_blocks(record: &DecodedRecord<'_>) -> Result<SplitBlocks, Fault> {
    let number = |id: u8| record.block(id).map(|block| block.block);
    Ok(SplitBlocks {
        left: number(0).ok_or("a split without its left page")?,
        right: number(1).ok_or("a split without its right page")?,
        sibling: number(2).unwrap_or(0),
    })
}

fn split_right(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let split = whole(BtreeSplit::from_prefix(record.main_data))?;
    let blocks = split_blocks(record)?;
    init(page, blocks.left, blocks.sibling, split.level, leaf_flag(split.level))?;
    restore_items(page, block.data)
}

/// Adds the items of a page image's upper part: the last one comes first there (`_bt_restore_page`).
fn restore_items(page: &mut Page<'_>, data: &[u8]) -> Result<(), Fault> {
    for (index, item) in split_all(data)?.into_iter().rev().enumerate() {
        page.add_item(item, Place::Shifting(index as u16 + 1))?;
    }
    Ok(())
}

/// The left page is rebuilt in item order on a fresh page, as `_bt_split` does, so that its bytes come out the same.
fn split_left(
    page: &mut Page<'_>,
    record: &DecodedRecord<'_>,
    block: &BlockRef<'_>,
    new_item_on_left: bool,
) -> Result<(), Fault> {
    let split = whole(BtreeSplit::from_prefix(record.main_data))?;
    let first_data_key = Opaque::of(page)?.first_data_key()?;
    let mut data: &[u8] = block.data;
    let mut new_item = None;
    let mut replaced_posting = None;
    if new_item_on_left || split.postingoff != 0 {
        let (item, rest) = split_first(data)?;
        let mut item = item.to_vec();
        data = rest;
        if split.postingoff != 0 {
            let number = split.newitemoff.saturating_sub(1);
            replaced_posting = Some((number, posting::swap(&mut item, page.item(number)?, split.postingoff)?));
        }
        new_item = Some(item).filter(|_| new_item_on_left);
    }
    let (high_key, rest) = split_first(data)?;
    if !rest.is_empty() {
        return Err("a split's left page has more data than items".into());
    }
    let mut bytes = page.temp_copy_special()?;
    let mut left = Page::new(&mut bytes);
    let append = |left: &mut Page<'_>, item: &[u8]| left.add_item(item, Place::Shifting(left.max_offset() + 1));
    append(&mut left, high_key)?;
    for number in first_data_key..split.firstrightoff {
        if let Some((replaced, item)) = &replaced_posting
            && *replaced == number
        {
            append(&mut left, item)?;
            continue;
        }
        if let Some(item) = &new_item
            && split.newitemoff == number
        {
            append(&mut left, item)?;
        }
        append(&mut left, page.item(number)?)?;
    }
    if let Some(item) = &new_item
        && split.newitemoff == split.firstrightoff.max(first_data_key)
    {
        append(&mut left, item)?;
    }
    *page.bytes_mut() = *bytes;
    let right = split_blocks(record)?.right;
    let mut opaque = Opaque::of(page)?;
    opaque.set_flags(INCOMPLETE_SPLIT | leaf_flag(split.level))?;
    opaque.set_next(right)?;
    opaque.clear_cycle_id()
}

/// Merges runs of equal tuples into posting lists (`btree_xlog_dedup`).
fn dedup(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let BtreeDedup { nintervals } = whole(BtreeDedup::from_prefix(record.main_data))?;
    let mut data = Cursor::new(block.data);
    let intervals = data.take(usize::from(nintervals) * BtreeDedupInterval::SIZE)?;
    let intervals = intervals.chunks_exact(BtreeDedupInterval::SIZE).filter_map(BtreeDedupInterval::from_prefix);
    let first_data_key = Opaque::of(page)?.first_data_key()?;
    let mut bytes = page.temp_copy_special()?;
    let mut fresh = Page::new(&mut bytes);
    if first_data_key == 2 {
        fresh.add_item(page.item(1)?, Place::Shifting(1))?;
    }
    let mut intervals = intervals.peekable();
    let mut number = first_data_key;
    while number <= page.max_offset() {
        let items =
            intervals.next_if(|interval| interval.baseoff == number).map_or(1, |interval| interval.nitems.max(1));
        let place = Place::Shifting(fresh.max_offset() + 1);
        let base = page.item(number)?;
        if items == 1 {
            fresh.add_item(base.get(..index_tuple::size(base)?).ok_or("an index tuple is cut short")?, place)?;
        } else {
            let mut pointers = Vec::new();
            for merged in number..number.saturating_add(items) {
                pointers.extend_from_slice(posting::pointers(page.item(merged)?)?);
            }
            fresh.add_item(&posting::form(base, &pointers)?, place)?;
        }
        number = number.saturating_add(items);
    }
    if intervals.next().is_some() {
        return Err("a deduplication names items that are not on the page".into());
    }
    *page.bytes_mut() = *bytes;
    clear_garbage(page)
}

fn clear_garbage(page: &mut Page<'_>) -> Result<(), Fault> {
    let mut opaque = Opaque::of(page)?;
    let flags = opaque.flags()?;
    opaque.set_flags(flags & !HAS_GARBAGE)
}

/// `btree_xlog_vacuum` and `btree_xlog_delete`: some posting lists lose pointers, some items go.
fn delete_items(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let (deleted_count, updated_count) = if record.rmgr_info() == DELETE {
        let BtreeDelete { ndeleted, nupdated, .. } = whole(BtreeDelete::from_prefix(record.main_data))?;
        (ndeleted, nupdated)
    } else {
        let BtreeVacuum { ndeleted, nupdated } = whole(BtreeVacuum::from_prefix(record.main_data))?;
        (ndeleted, nupdated)
    };
    let mut data = Cursor::new(block.data);
    let deleted = data.u16s(deleted_count.into())?;
    for number in data.u16s(updated_count.into())? {
        let removed_count = data.u16()?;
        let removed = u16s(data.take(usize::from(removed_count) * 2)?);
        let updated = posting::without(page.item(number)?, &removed)?;
        page.index_tuple_overwrite(number, &updated)?;
    }
    page.index_multi_delete(&deleted)?;
    clear_garbage(page)
}

/// The parent loses the right sibling's entry, whose downlink takes the removed page's place.
fn mark_halfdead_parent(page: &mut Page<'_>, record: &DecodedRecord<'_>) -> Result<(), Fault> {
    let number = whole(BtreeMarkPageHalfdead::from_prefix(record.main_data))?.poffset;
    let next = number.checked_add(1).ok_or("an offset number that is too large")?;
    let right = index_tuple::block(page.item(next)?)?;
    let range = page.item_range(number)?;
    index_tuple::set_block(page.slice_mut(range)?, right)?;
    page.index_tuple_delete(next)
}

fn mark_halfdead_leaf(page: &mut Page<'_>, record: &DecodedRecord<'_>) -> Result<(), Fault> {
    let leaf = whole(BtreeMarkPageHalfdead::from_prefix(record.main_data))?;
    half_dead_page(page, leaf.leftblk, leaf.rightblk, leaf.topparent)
}

/// An empty leaf whose dummy high key holds the link to the topmost page that goes with it.
fn half_dead_page(
    page: &mut Page<'_>,
    left: BlockNumber,
    right: BlockNumber,
    top_parent: BlockNumber,
) -> Result<(), Fault> {
    init(page, left, right, 0, HALF_DEAD | LEAF)?;
    let mut high_key = [0; index_tuple::HEADER_BYTES];
    high_key[..6].copy_from_slice(&item_pointer(top_parent, 0));
    let info = index_tuple::HEADER_BYTES as u16 | posting::ALT_TID;
    high_key[6..].copy_from_slice(&info.to_le_bytes());
    page.add_item(&high_key, Place::Shifting(1)).map(|_| ())
}

fn unlink_of(record: &DecodedRecord<'_>) -> Result<BtreeUnlinkPage, Fault> {
    whole(BtreeUnlinkPage::from_prefix(record.main_data))
}

fn unlink_target(page: &mut Page<'_>, record: &DecodedRecord<'_>) -> Result<(), Fault> {
    let unlink = unlink_of(record)?;
    let flags = DELETED | HAS_FULLXID | leaf_flag(unlink.level);
    init(page, unlink.leftsib, unlink.rightsib, unlink.level, flags)?;
    // The transaction after whose end the page may be reused takes the place of items (BTPageSetDeleted).
    page.write(HEADER_BYTES, &{ unlink.safexid }.to_le_bytes())?;
    page.set_lower(HEADER_BYTES + 8);
    page.set_upper(page.special());
    Ok(())
}

fn unlink_leaf(page: &mut Page<'_>, record: &DecodedRecord<'_>) -> Result<(), Fault> {
    let unlink = unlink_of(record)?;
    half_dead_page(page, unlink.leafleftsib, unlink.leafrightsib, unlink.leaftopparent)
}

fn newroot(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let BtreeNewroot { level, .. } = whole(BtreeNewroot::from_prefix(record.main_data))?;
    init(page, 0, 0, level, ROOT | leaf_flag(level))?;
    if level > 0 { restore_items(page, block.data) } else { Ok(()) }
}
