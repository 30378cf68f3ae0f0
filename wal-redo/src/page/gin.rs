//! Redo of GIN indexes (`access/gin/ginxlog.c`).

use types::{BlockNumber, PAGE_BYTES};
use wal::{BlockRef, DecodedRecord};

use super::{
    PageLsn,
    cursor::Cursor,
    fault::Fault,
    gin_posting as posting, index_tuple,
    page_ops::{HEADER_BYTES, Page, Place},
    tuple::item_pointer,
};

const CREATE_PTREE: u8 = 0x10;
const INSERT: u8 = 0x20;
const SPLIT: u8 = 0x30;
const VACUUM_PAGE: u8 = 0x40;
const DELETE_PAGE: u8 = 0x50;
const UPDATE_META_PAGE: u8 = 0x60;
const INSERT_LISTPAGE: u8 = 0x70;
const DELETE_LISTPAGE: u8 = 0x80;
const VACUUM_DATA_LEAF_PAGE: u8 = 0x90;

/// Bits of a page's `flags`.
const DATA: u16 = 1 << 0;
const LEAF: u16 = 1 << 1;
const DELETED: u16 = 1 << 2;
const META: u16 = 1 << 3;
const LIST: u16 = 1 << 4;
const LIST_FULLROW: u16 = 1 << 5;
const INCOMPLETE_SPLIT: u16 = 1 << 6;
const COMPRESSED: u16 = 1 << 7;

/// Flags of `ginxlogInsert`.
const INSERT_IS_DATA: u16 = 0x01;
const INSERT_IS_LEAF: u16 = 0x02;

/// What a record does to one segment of a leaf's posting lists (`GIN_SEGMENT_*`).
const SEGMENT_DELETE: u8 = 1;
const SEGMENT_INSERT: u8 = 2;
const SEGMENT_REPLACE: u8 = 3;
const SEGMENT_ADDITEMS: u8 = 4;

/// `sizeof(GinPageOpaqueData)`.
const OPAQUE_BYTES: usize = 8;
/// `sizeof(GinMetaPageData)`.
const META_BYTES: usize = 56;
/// Data pages start with their right bound, an aligned pointer.
const DATA_START: usize = HEADER_BYTES + 8;
/// `sizeof(PostingItem)`.
const POSTING_ITEM_BYTES: usize = 10;
const INVALID_BLOCK: BlockNumber = BlockNumber::MAX;

/// Applies the record to the page of this block reference.
pub(super) fn redo(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<PageLsn, Fault> {
    match (record.rmgr_info(), block.id) {
        (CREATE_PTREE, 0) => create_posting_tree(page, record)?,
        (INSERT, 0) => insert(page, record, block)?,
        (INSERT, 1) | (SPLIT, 3) => {
            let flags = flags(page)?;
            set_flags(page, flags & !INCOMPLETE_SPLIT)?;
        }
        (SPLIT | VACUUM_PAGE, _) => return Err("a GIN record that must have a full-page image, without one".into()),
        (VACUUM_DATA_LEAF_PAGE, 0) => recompress(page, block.data)?,
        (DELETE_PAGE, 0) => mark_deleted(page, DeletePage::read(record)?.delete_xid)?,
        (DELETE_PAGE, 1) => delete_posting_item(page, DeletePage::read(record)?.parent_offset)?,
        (DELETE_PAGE, 2) => set_right_link(page, DeletePage::read(record)?.right_link)?,
        (UPDATE_META_PAGE, 0) => restore_meta(page, UpdateMeta::read(record)?.metadata)?,
        (UPDATE_META_PAGE, 1) => update_tail(page, record, block)?,
        (INSERT_LISTPAGE, 0) => insert_list_page(page, record, block)?,
        (DELETE_LISTPAGE, 0) => restore_meta(page, Cursor::new(record.main_data).take(META_BYTES)?)?,
        (DELETE_LISTPAGE, _deleted) => init(page, DELETED)?,
        (_operation, id) => return Err(format!("a GIN record that has no use for its block {id}").into()),
    }
    Ok(PageLsn::Set)
}

fn flags(page: &Page<'_>) -> Result<u16, Fault> {
    page.u16_at(page.special_of(OPAQUE_BYTES)? + 6)
}

fn set_flags(page: &mut Page<'_>, flags: u16) -> Result<(), Fault> {
    let special = page.special_of(OPAQUE_BYTES)?;
    page.set_u16_at(special + 6, flags)
}

fn set_right_link(page: &mut Page<'_>, block: BlockNumber) -> Result<(), Fault> {
    let special = page.special_of(OPAQUE_BYTES)?;
    page.set_u32_at(special, block)
}

/// `maxoff`: posting items on an inner data page, heap tuples on a list page.
fn count(page: &Page<'_>) -> Result<u16, Fault> {
    page.u16_at(page.special_of(OPAQUE_BYTES)? + 4)
}

fn set_count(page: &mut Page<'_>, count: u16) -> Result<(), Fault> {
    let special = page.special_of(OPAQUE_BYTES)?;
    page.set_u16_at(special + 4, count)
}

/// `GinInitPage`.
fn init(page: &mut Page<'_>, flags: u16) -> Result<(), Fault> {
    page.init(OPAQUE_BYTES);
    set_flags(page, flags)?;
    set_right_link(page, INVALID_BLOCK)
}

/// Replaces what a data page holds behind its right bound.
fn set_data(page: &mut Page<'_>, data: &[u8]) -> Result<(), Fault> {
    let end = DATA_START + data.len();
    if end > page.special_of(OPAQUE_BYTES)? {
        return Err(format!("{} bytes do not fit into a data page", data.len()).into());
    }
    page.write(DATA_START, data)?;
    page.set_lower(end);
    Ok(())
}

fn create_posting_tree(page: &mut Page<'_>, record: &DecodedRecord<'_>) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let bytes = main.u32()?;
    init(page, DATA | LEAF | COMPRESSED)?;
    set_data(page, main.take(bytes as usize)?)
}

fn insert(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let kind = main.u16()?;
    // An insertion into an inner page ends the split of a child, whose right half the old entry then points to.
    let right_child = if kind & INSERT_IS_LEAF == 0 {
        main.skip(4)?;
        Some(u32::from(main.u16()?) << 16 | u32::from(main.u16()?))
    } else {
        None
    };
    match (kind & INSERT_IS_DATA != 0, right_child) {
        (true, None) => recompress(page, block.data),
        (true, Some(right_child)) => insert_posting_item(page, block, right_child),
        (false, right_child) => insert_entry(page, block, right_child),
    }
}

fn insert_entry(page: &mut Page<'_>, block: &BlockRef<'_>, right_child: Option<BlockNumber>) -> Result<(), Fault> {
    let mut data = Cursor::new(block.data);
    let (offset, replaces) = (data.u16()?, data.u8()? != 0);
    data.skip(1)?;
    if let Some(right_child) = right_child {
        let range = page.item_range(offset)?;
        page.write(range.start, &item_pointer(right_child, 0))?;
    }
    if replaces {
        page.index_tuple_delete(offset)?;
    }
    let tuple = data.rest();
    let tuple = tuple.get(..index_tuple::size(tuple)?).ok_or("an entry is longer than its data")?;
    page.add_item(tuple, Place::Shifting(offset)).map(|_| ())
}

/// Adds a posting item to an inner data page, before which the old one there gets the right child.
fn insert_posting_item(page: &mut Page<'_>, block: &BlockRef<'_>, right_child: BlockNumber) -> Result<(), Fault> {
    let mut data = Cursor::new(block.data);
    let offset = usize::from(data.u16()?);
    let item = data.take(POSTING_ITEM_BYTES)?;
    let count = count(page)?;
    let mut items = page.slice(DATA_START..DATA_START + usize::from(count) * POSTING_ITEM_BYTES)?.to_vec();
    let at = offset.wrapping_sub(1).saturating_mul(POSTING_ITEM_BYTES);
    let old = items.get_mut(at..at.saturating_add(4)).ok_or("a posting item is not on its page")?;
    old.copy_from_slice(&item_pointer(right_child, 0)[..4]);
    items.splice(at..at, item.iter().copied());
    set_count(page, count + 1)?;
    set_data(page, &items)
}

fn delete_posting_item(page: &mut Page<'_>, offset: u16) -> Result<(), Fault> {
    let count = count(page)?;
    if offset == 0 || offset > count {
        return Err(format!("there is no posting item {offset} (the page has {count})").into());
    }
    let mut items = page.slice(DATA_START..DATA_START + usize::from(count) * POSTING_ITEM_BYTES)?.to_vec();
    let at = (usize::from(offset) - 1) * POSTING_ITEM_BYTES;
    items.drain(at..at + POSTING_ITEM_BYTES);
    set_count(page, count - 1)?;
    set_data(page, &items)
}

/// A leaf's posting lists, with pages from before 9.4 brought to today's form.
fn segments(page: &mut Page<'_>) -> Result<Vec<u8>, Fault> {
    let flags = flags(page)?;
    if flags & COMPRESSED != 0 {
        return Ok(page.slice(DATA_START..page.lower().max(DATA_START))?.to_vec());
    }
    let count = usize::from(count(page)?);
    let pointers = posting::pack_all(page.slice(DATA_START..DATA_START + count * 6)?);
    set_flags(page, flags | COMPRESSED)?;
    set_count(page, 0)?;
    if pointers.is_empty() { Ok(Vec::new()) } else { posting::encode(&pointers) }
}

/// Changes segments of a leaf's posting lists (`ginRedoRecompress`).
fn recompress(page: &mut Page<'_>, data: &[u8]) -> Result<(), Fault> {
    let old = segments(page)?;
    let mut rest: &[u8] = &old;
    let mut new = Vec::with_capacity(old.len() + data.len());
    let mut data = Cursor::new(data);
    let mut number = 0;
    for _ in 0..data.u16()? {
        let (target, action) = (data.u8()?, data.u8()?);
        while number < target {
            let (segment, after) = rest.split_at(posting::segment_bytes(rest)?);
            new.extend_from_slice(segment);
            (rest, number) = (after, number + 1);
        }
        if action != SEGMENT_INSERT {
            let (segment, after) = rest.split_at(posting::segment_bytes(rest)?);
            (rest, number) = (after, number.saturating_add(1));
            if action == SEGMENT_ADDITEMS {
                let added = data.u16()?;
                let added = posting::pack_all(data.take(usize::from(added) * 6)?);
                new.extend(posting::encode(&posting::merge(&added, &posting::decode(segment)?))?);
            }
        }
        match action {
            SEGMENT_INSERT | SEGMENT_REPLACE => {
                let bytes = posting::segment_bytes(data.clone().rest())?;
                new.extend_from_slice(data.take(bytes)?);
            }
            SEGMENT_DELETE | SEGMENT_ADDITEMS => {}
            other => return Err(format!("an unknown action {other} on a posting list").into()),
        }
    }
    new.extend_from_slice(rest);
    set_data(page, &new)
}

/// `ginxlogDeletePage`.
struct DeletePage {
    parent_offset: u16,
    right_link: BlockNumber,
    delete_xid: u32,
}

impl DeletePage {
    fn read(record: &DecodedRecord<'_>) -> Result<DeletePage, Fault> {
        let mut main = Cursor::new(record.main_data);
        let parent_offset = main.u16()?;
        main.skip(2)?;
        Ok(DeletePage { parent_offset, right_link: main.u32()?, delete_xid: main.u32()? })
    }
}

fn mark_deleted(page: &mut Page<'_>, delete_xid: u32) -> Result<(), Fault> {
    let flags = flags(page)?;
    set_flags(page, flags | DELETED)?;
    page.set_prune_xid(delete_xid);
    Ok(())
}

/// `ginxlogUpdateMeta`.
struct UpdateMeta<'r> {
    metadata: &'r [u8],
    prev_tail: BlockNumber,
    new_right_link: BlockNumber,
    tuples: u32,
}

impl<'r> UpdateMeta<'r> {
    fn read(record: &'r DecodedRecord<'_>) -> Result<UpdateMeta<'r>, Fault> {
        let mut main = Cursor::new(record.main_data);
        main.skip(16)?; // The relation, and padding.
        let metadata = main.take(META_BYTES)?;
        Ok(UpdateMeta { metadata, prev_tail: main.u32()?, new_right_link: main.u32()?, tuples: main.u32()? })
    }
}

fn restore_meta(page: &mut Page<'_>, metadata: &[u8]) -> Result<(), Fault> {
    // Every insertion into the pending list changes it: one that is there already needs no zeroes again.
    let opaque = [0xFF, 0xFF, 0xFF, 0xFF, 0, 0, META as u8, 0];
    let special = PAGE_BYTES - OPAQUE_BYTES;
    if !page.has_fresh_header(HEADER_BYTES + metadata.len(), special) || page.slice(special..PAGE_BYTES)? != opaque {
        init(page, META)?;
    }
    page.write(HEADER_BYTES, metadata)?;
    page.set_lower(HEADER_BYTES + metadata.len());
    Ok(())
}

/// The pending list's tail page gets tuples, or a right neighbour.
fn update_tail(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let update = UpdateMeta::read(record)?;
    if update.tuples == 0 {
        return if update.prev_tail == INVALID_BLOCK { Ok(()) } else { set_right_link(page, update.new_right_link) };
    }
    append_tuples(page, block.data, update.tuples)?;
    let count = count(page)?;
    set_count(page, count.wrapping_add(1))
}

fn append_tuples(page: &mut Page<'_>, mut data: &[u8], tuples: u32) -> Result<(), Fault> {
    for _ in 0..tuples {
        let bytes = index_tuple::size(data)?;
        let (tuple, rest) = data.split_at_checked(bytes).ok_or("a tuple is longer than the data that holds it")?;
        page.add_item(tuple, Place::Shifting(page.max_offset() + 1))?;
        data = rest;
    }
    Ok(())
}

fn insert_list_page(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (right_link, tuples) = (main.u32()?, main.u32()?);
    let is_tail = right_link == INVALID_BLOCK;
    init(page, if is_tail { LIST | LIST_FULLROW } else { LIST })?;
    set_right_link(page, right_link)?;
    set_count(page, u16::from(is_tail))?;
    append_tuples(page, block.data, tuples)
}
