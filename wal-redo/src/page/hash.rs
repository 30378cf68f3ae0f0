//! Redo of hash indexes (`access/hash/hash_xlog.c`).

use types::BlockNumber;
use wal::{BlockRef, DecodedRecord};

use super::{
    PageLsn,
    cursor::{Cursor, u16s},
    fault::Fault,
    hash_meta as meta,
    index_tuple::split_all,
    page_ops::{HEADER_BYTES, Page, Place},
};

const INIT_META_PAGE: u8 = 0x00;
const INIT_BITMAP_PAGE: u8 = 0x10;
const INSERT: u8 = 0x20;
const ADD_OVFL_PAGE: u8 = 0x30;
const SPLIT_ALLOCATE_PAGE: u8 = 0x40;
const SPLIT_PAGE: u8 = 0x50;
const SPLIT_COMPLETE: u8 = 0x60;
const MOVE_PAGE_CONTENTS: u8 = 0x70;
const SQUEEZE_PAGE: u8 = 0x80;
const DELETE: u8 = 0x90;
const SPLIT_CLEANUP: u8 = 0xA0;
const UPDATE_META_PAGE: u8 = 0xB0;
const VACUUM_ONE_PAGE: u8 = 0xC0;

/// Bits of `hasho_flag`.
const UNUSED_PAGE: u16 = 0;
const OVERFLOW_PAGE: u16 = 1 << 0;
const BITMAP_PAGE: u16 = 1 << 2;
const META_PAGE: u16 = 1 << 3;
const NEEDS_SPLIT_CLEANUP: u16 = 1 << 6;
const HAS_DEAD_TUPLES: u16 = 1 << 7;

/// `sizeof(HashPageOpaqueData)`.
const OPAQUE_BYTES: usize = 16;
const PAGE_ID: u16 = 0xFF80;
/// `InvalidBlockNumber`, and `InvalidBucket` too.
const INVALID: u32 = u32::MAX;

const UPDATES_MASKS: u8 = 1 << 0;
const UPDATES_SPLITPOINT: u8 = 1 << 1;

/// Applies the record to the page of this block reference.
pub(super) fn redo(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<PageLsn, Fault> {
    match (record.rmgr_info(), block.id) {
        (INIT_META_PAGE, 0) => init_meta(page, record)?,
        (INIT_BITMAP_PAGE, 0) => init_bitmap(page, Cursor::new(record.main_data).u16()?)?,
        (INIT_BITMAP_PAGE, 1) => meta::add_first_bitmap(page)?,
        (INSERT, 0) => drop(page.add_item(block.data, Place::Shifting(Cursor::new(record.main_data).u16()?))?),
        (INSERT, 1) => meta::change_tuple_count(page, 1.0)?,
        (ADD_OVFL_PAGE, id) => add_overflow_page(page, record, block, id)?,
        (SPLIT_ALLOCATE_PAGE, id) => split_allocate(page, record, block, id)?,
        (SPLIT_COMPLETE, 0 | 1) => split_complete(page, record, block.id)?,
        // The primary bucket page is in these records only to be locked.
        (MOVE_PAGE_CONTENTS | SQUEEZE_PAGE | DELETE, 0) => return Ok(PageLsn::Keep),
        (MOVE_PAGE_CONTENTS, 1) => add_moved(page, block, Cursor::new(record.main_data).u16()?)?,
        (MOVE_PAGE_CONTENTS, 2) => page.index_multi_delete(&u16s(block.data))?,
        (SQUEEZE_PAGE, id) => squeeze(page, record, block, id)?,
        (DELETE, 1) => delete(page, record, block)?,
        (SPLIT_CLEANUP, 0) => clear_flag(page, NEEDS_SPLIT_CLEANUP)?,
        (UPDATE_META_PAGE, 0) => meta::set_tuple_count(page, Cursor::new(record.main_data).take(8)?)?,
        (VACUUM_ONE_PAGE, 0) => {
            page.index_multi_delete(&vacuumed(record)?)?;
            clear_flag(page, HAS_DEAD_TUPLES)?;
        }
        (VACUUM_ONE_PAGE, 1) => meta::change_tuple_count(page, -(vacuumed(record)?.len() as f64))?,
        (SPLIT_PAGE, _) => return Err("a hash split without a full-page image".into()),
        (_operation, id) => return Err(format!("a hash record that has no use for its block {id}").into()),
    }
    Ok(PageLsn::Set)
}

/// What the record does to a page besides its full-page image, which was taken before bucket flags changed.
pub(super) fn redo_after_image(
    page: &mut Page<'_>,
    record: &DecodedRecord<'_>,
    block: &BlockRef<'_>,
) -> Result<(), Fault> {
    match (record.rmgr_info(), block.id) {
        (SPLIT_ALLOCATE_PAGE, 0) => split_allocate(page, record, block, 0),
        (SPLIT_COMPLETE, 0 | 1) => split_complete(page, record, block.id),
        _image_is_all => Ok(()),
    }
}

fn set_prev(page: &mut Page<'_>, block: BlockNumber) -> Result<(), Fault> {
    let special = page.special_of(OPAQUE_BYTES)?;
    page.set_u32_at(special, block)
}

fn set_next(page: &mut Page<'_>, block: BlockNumber) -> Result<(), Fault> {
    let special = page.special_of(OPAQUE_BYTES)?;
    page.set_u32_at(special + 4, block)
}

fn set_flags(page: &mut Page<'_>, flags: u16) -> Result<(), Fault> {
    let special = page.special_of(OPAQUE_BYTES)?;
    page.set_u16_at(special + 12, flags)
}

fn clear_flag(page: &mut Page<'_>, flag: u16) -> Result<(), Fault> {
    let special = page.special_of(OPAQUE_BYTES)?;
    let flags = page.u16_at(special + 12)?;
    set_flags(page, flags & !flag)
}

/// An empty page with this special area (`_hash_initbuf`); its next page is none.
fn init(page: &mut Page<'_>, prev: BlockNumber, bucket: u32, flags: u16) -> Result<(), Fault> {
    page.init(OPAQUE_BYTES);
    let special = page.special();
    set_prev(page, prev)?;
    set_next(page, INVALID)?;
    page.set_u32_at(special + 8, bucket)?;
    set_flags(page, flags)?;
    page.set_u16_at(special + 14, PAGE_ID)
}

fn init_meta(page: &mut Page<'_>, record: &DecodedRecord<'_>) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let tuples = f64::from_bits(main.u64()?);
    let (procedure, fill_factor) = (main.u32()?, main.u16()?);
    init(page, INVALID, INVALID, META_PAGE)?;
    meta::init(page, tuples, procedure, fill_factor)
}

/// `_hash_initbitmapbuffer`: all overflow pages in use.
fn init_bitmap(page: &mut Page<'_>, bytes: u16) -> Result<(), Fault> {
    init(page, INVALID, INVALID, BITMAP_PAGE)?;
    let end = HEADER_BYTES + usize::from(bytes);
    if end > page.special() {
        return Err(format!("a bitmap of {bytes} bytes does not fit into a page").into());
    }
    page.slice_mut(HEADER_BYTES..end)?.fill(0xFF);
    page.set_lower(end);
    Ok(())
}

/// Sets or clears the bit whose number is the block's data.
fn change_bitmap(page: &mut Page<'_>, block: &BlockRef<'_>, set: bool) -> Result<(), Fault> {
    let bit = Cursor::new(block.data).u32()?;
    let special = page.special_of(OPAQUE_BYTES)?;
    let at = HEADER_BYTES + (bit / 8) as usize;
    if at >= special {
        return Err(format!("bit {bit} is not in a bitmap page").into());
    }
    let byte = &mut page.bytes_mut()[at];
    *byte = if set { *byte | 1 << (bit % 8) } else { *byte & !(1 << (bit % 8)) };
    Ok(())
}

fn add_overflow_page(
    page: &mut Page<'_>,
    record: &DecodedRecord<'_>,
    block: &BlockRef<'_>,
    id: u8,
) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (bitmap_bytes, bit_found) = (main.u16()?, main.u8()? != 0);
    let number = |id: u8| record.block(id).map(|block| block.block);
    match id {
        0 => {
            let bucket = Cursor::new(block.data).u32()?;
            init(page, number(1).ok_or("an overflow page without the page before it")?, bucket, OVERFLOW_PAGE)
        }
        1 => set_next(page, number(0).ok_or("an overflow record without its page")?),
        2 => change_bitmap(page, block, true),
        3 => init_bitmap(page, bitmap_bytes),
        4 => meta::add_overflow_page(page, Cursor::new(block.data).u32()?, bit_found, number(3)),
        _unused => Err(format!("a hash record that has no use for its block {id}").into()),
    }
}

fn split_allocate(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>, id: u8) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (new_bucket, old_flags, new_flags, updates) = (main.u32()?, main.u16()?, main.u16()?, main.u8()?);
    match id {
        0 => {
            set_flags(page, old_flags)?;
            set_prev(page, new_bucket)
        }
        1 => init(page, new_bucket, new_bucket, new_flags),
        2 => {
            let mut data = Cursor::new(block.data);
            meta::set_max_bucket(page, new_bucket)?;
            if updates & UPDATES_MASKS != 0 {
                meta::set_masks(page, data.u32()?, data.u32()?)?;
            }
            if updates & UPDATES_SPLITPOINT != 0 {
                meta::set_splitpoint(page, data.u32()?, data.u32()?)?;
            }
            Ok(())
        }
        _unused => Err(format!("a hash record that has no use for its block {id}").into()),
    }
}

/// Block 0 is the old bucket, block 1 the new one.
fn split_complete(page: &mut Page<'_>, record: &DecodedRecord<'_>, id: u8) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (old_flags, new_flags) = (main.u16()?, main.u16()?);
    set_flags(page, if id == 0 { old_flags } else { new_flags })
}

/// Tuples that come from another page: their offset numbers, then they themselves.
fn add_moved(page: &mut Page<'_>, block: &BlockRef<'_>, count: u16) -> Result<(), Fault> {
    if count == 0 {
        return Ok(());
    }
    let mut data = Cursor::new(block.data);
    let places = data.u16s(count.into())?;
    let tuples = split_all(data.rest())?;
    if tuples.len() != places.len() {
        return Err(format!("{} tuples move to {} places", tuples.len(), places.len()).into());
    }
    for (tuple, place) in tuples.into_iter().zip(places) {
        page.add_item(tuple, Place::Shifting(place))?;
    }
    Ok(())
}

/// An overflow page is freed, after its tuples moved to the page of block 1.
fn squeeze(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>, id: u8) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (prev, next, count) = (main.u32()?, main.u32()?, main.u16()?);
    main.skip(1)?; // is_prim_bucket_same_wrt
    let prev_is_written = main.u8()? != 0;
    match id {
        1 => {
            add_moved(page, block, count)?;
            if prev_is_written { set_next(page, next) } else { Ok(()) }
        }
        2 => init(page, INVALID, INVALID, UNUSED_PAGE),
        3 => set_next(page, next),
        4 => set_prev(page, prev),
        5 => change_bitmap(page, block, false),
        6 => meta::set_first_free(page, Cursor::new(block.data).u32()?),
        _unused => Err(format!("a hash record that has no use for its block {id}").into()),
    }
}

fn delete(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    let clears_dead_marking = Cursor::new(record.main_data).u8()? != 0;
    page.index_multi_delete(&u16s(block.data))?;
    if clears_dead_marking { clear_flag(page, HAS_DEAD_TUPLES) } else { Ok(()) }
}

/// The offset numbers of `xl_hash_vacuum_one_page`.
fn vacuumed(record: &DecodedRecord<'_>) -> Result<Vec<u16>, Fault> {
    let mut main = Cursor::new(record.main_data);
    main.skip(4)?; // latestRemovedXid
    let count = main.u32()?;
    main.u16s(count as usize)
}
