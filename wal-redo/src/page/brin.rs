//! Redo of BRIN indexes (`access/brin/brin_xlog.c`).

use types::PAGE_BYTES;
use wal::{BlockRef, DecodedRecord};

use super::{
    PageLsn,
    cursor::Cursor,
    fault::Fault,
    page_ops::{HEADER_BYTES, Page, Place},
    tuple::item_pointer,
};

/// `XLOG_BRIN_OPMASK`.
const OPMASK: u8 = 0x70;
/// `XLOG_BRIN_INIT_PAGE`.
const INIT_PAGE: u8 = 0x80;
const CREATE_INDEX: u8 = 0x00;
const INSERT: u8 = 0x10;
const UPDATE: u8 = 0x20;
const SAMEPAGE_UPDATE: u8 = 0x30;
const REVMAP_EXTEND: u8 = 0x40;
const DESUMMARIZE: u8 = 0x50;

/// `sizeof(BrinSpecialSpace)`; the page's kind is its last two bytes.
const OPAQUE_BYTES: usize = 8;
const KIND_META: u16 = 0xF091;
const KIND_REVMAP: u16 = 0xF092;
const KIND_REGULAR: u16 = 0xF093;
const META_MAGIC: u32 = 0xA810_9CFA;
/// `sizeof(BrinMetaPageData)`.
const META_BYTES: usize = 16;
/// `REVMAP_PAGE_MAXITEMS`.
const REVMAP_ITEMS: u32 = ((PAGE_BYTES - HEADER_BYTES - OPAQUE_BYTES) / 6) as u32;

/// Applies the record to the page of this block reference.
pub(super) fn redo(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<PageLsn, Fault> {
    let mut main = Cursor::new(record.main_data);
    match (record.rmgr_info() & OPMASK, block.id) {
        (CREATE_INDEX, 0) => create_index(page, main)?,
        (INSERT | UPDATE, 0) => insert(page, record, block)?,
        (INSERT | UPDATE, 1) => {
            let insert = Insert::read(record)?;
            let regular = record.block(0).ok_or("a BRIN insertion without its page")?;
            set_pointer(page, insert.pages_per_range, insert.heap_block, item_pointer(regular.block, insert.offset))?;
        }
        (UPDATE, 2) => page.index_tuple_delete_no_compact(main.u16()?)?,
        (SAMEPAGE_UPDATE, 0) => page.index_tuple_overwrite(main.u16()?, block.data)?,
        (REVMAP_EXTEND, 0) => {
            page.special_of(OPAQUE_BYTES)?;
            page.set_u32_at(HEADER_BYTES + 12, main.u32()?)?;
            page.set_lower(HEADER_BYTES + META_BYTES);
        }
        (REVMAP_EXTEND, 1) => init(page, KIND_REVMAP)?,
        (DESUMMARIZE, 0) => {
            let (pages_per_range, heap_block) = (main.u32()?, main.u32()?);
            set_pointer(page, pages_per_range, heap_block, item_pointer(u32::MAX, 0))?;
        }
        (DESUMMARIZE, 1) => {
            main.skip(8)?;
            page.index_tuple_delete_no_compact(main.u16()?)?;
        }
        (_operation, id) => return Err(format!("a BRIN record that has no use for its block {id}").into()),
    }
    Ok(PageLsn::Set)
}

fn init(page: &mut Page<'_>, kind: u16) -> Result<(), Fault> {
    page.init(OPAQUE_BYTES);
    page.set_u16_at(PAGE_BYTES - 2, kind)
}

/// `brin_metapage_init`.
fn create_index(page: &mut Page<'_>, mut main: Cursor<'_>) -> Result<(), Fault> {
    let (pages_per_range, version) = (main.u32()?, main.u16()?);
    init(page, KIND_META)?;
    for (index, number) in [META_MAGIC, version.into(), pages_per_range, 0].into_iter().enumerate() {
        page.set_u32_at(HEADER_BYTES + index * 4, number)?;
    }
    page.set_lower(HEADER_BYTES + META_BYTES);
    Ok(())
}

/// `xl_brin_insert`, which is also the second part of `xl_brin_update`.
struct Insert {
    heap_block: u32,
    pages_per_range: u32,
    offset: u16,
}

impl Insert {
    fn read(record: &DecodedRecord<'_>) -> Result<Insert, Fault> {
        let mut main = Cursor::new(record.main_data);
        if record.rmgr_info() & OPMASK == UPDATE {
            main.skip(4)?; // oldOffnum, and padding.
        }
        Ok(Insert { heap_block: main.u32()?, pages_per_range: main.u32()?, offset: main.u16()? })
    }
}

fn insert(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<(), Fault> {
    if record.rmgr_info() & INIT_PAGE != 0 {
        init(page, KIND_REGULAR)?;
    }
    page.add_item(block.data, Place::Overwriting(Insert::read(record)?.offset)).map(|_| ())
}

/// Sets the range map's pointer to a range's summary (`brinSetHeapBlockItemptr`).
fn set_pointer(page: &mut Page<'_>, pages_per_range: u32, heap_block: u32, pointer: [u8; 6]) -> Result<(), Fault> {
    let range = heap_block.checked_div(pages_per_range).ok_or("a BRIN range of no pages")?;
    page.special_of(OPAQUE_BYTES)?;
    page.write(HEADER_BYTES + (range % REVMAP_ITEMS) as usize * 6, &pointer)
}
