//! Redo of relation pages: one record, one page.
//!
//! [`redo_page`] does what Postgres's redo routines do to the one page it is given, so that a page can be brought
//! forward by itself, without the others that the record touches. There is a file per resource manager.

mod brin;
mod cursor;
mod fault;
mod gin;
mod gin_posting;
mod gist;
mod hash;
mod hash_meta;
mod heap;
mod heap2;
mod image;
mod index_tuple;
mod nbtree;
mod nbtree_posting;
mod page_ops;
mod pglz;
mod simple;
mod spgist;
mod spgist_tuple;
mod tuple;
mod visibility_map;

use types::{ForkNumber, PAGE_BYTES, PageTag};
use wal::{BlockRef, DecodedRecord, v15::rmgr};

use fault::Fault;
pub use fault::{RecordName, RedoError};
use page_ops::Page;

/// Whether a redo routine moved the page's LSN to the record's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PageLsn {
    /// As usual.
    Set,
    /// Postgres leaves it: hint-like changes, and bits of the visibility map that are cleared.
    Keep,
}

/// Applies a record to one page, which must be the version just before the record (any content where the record's
/// [`Change::Page`](crate::Change::Page) says `will_init`; zeroes where the page did not exist).
///
/// The result is what Postgres's redo leaves behind, `pd_lsn` included; the bytes of the hole between `pd_lower` and
/// `pd_upper` may differ. After an error the page's content is unspecified.
pub fn redo_page(page: &mut [u8; PAGE_BYTES], tag: &PageTag, record: &DecodedRecord<'_>) -> Result<(), RedoError> {
    let named = |fault: Fault| fault.named(tag, record);
    // Most records refer to one relation: what tells their pages apart comes first.
    let is_page = |block: &&BlockRef<'_>| block.block == tag.block && block.rel == tag.rel;
    let done = match record.blocks.iter().find(is_page) {
        Some(block) => redo_block(&mut Page::new(page), record, block).map_err(named)?,
        None if tag.rel.fork == ForkNumber::Vm => {
            let implied = visibility_map::redo_implied(&mut Page::new(page), tag, record).map_err(named)?;
            implied.ok_or(RedoError::NotTouched { tag: *tag, record: RecordName::of(record) })?
        }
        None => return Err(RedoError::NotTouched { tag: *tag, record: RecordName::of(record) }),
    };
    if done == PageLsn::Set {
        Page::new(page).set_lsn(record.end_lsn);
    }
    Ok(())
}

/// Unpacks a block's full-page image into the page (without setting `pd_lsn`), whether or not redo would apply it.
/// Errors when there is none or it is damaged.
pub fn restore_image(block: &BlockRef<'_>, page: &mut [u8; PAGE_BYTES]) -> Result<(), RedoError> {
    let fail = |reason: &str| RedoError::Image { tag: block.tag(), reason: reason.to_owned() };
    let image = block.image.as_ref().ok_or_else(|| fail("there is none"))?;
    image::restore(image, page).map_err(|fault| match fault {
        Fault::Invalid(reason) => fail(&reason),
        Fault::Unsupported(what) => fail(what),
    })
}

fn redo_block(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<PageLsn, Fault> {
    if let Some(image) = block.image.as_ref().filter(|image| image.apply) {
        image::restore(image, page.bytes_mut())?;
        match record.rmgr {
            rmgr::HASH => hash::redo_after_image(page, record, block)?,
            rmgr::GIST => gist::redo_after_image(page, record, block)?,
            _image_is_all => {}
        }
        // A page of zeroes stays one.
        return Ok(if page.is_new() { PageLsn::Keep } else { PageLsn::Set });
    }
    match record.rmgr {
        rmgr::XLOG => simple::redo_xlog(record),
        rmgr::HEAP => heap::redo(page, record, block),
        rmgr::HEAP2 => heap2::redo(page, record, block),
        rmgr::BTREE => nbtree::redo(page, record, block),
        rmgr::HASH => hash::redo(page, record, block),
        rmgr::GIN => gin::redo(page, record, block),
        rmgr::GIST => gist::redo(page, record, block),
        rmgr::SPGIST => spgist::redo(page, record, block),
        rmgr::BRIN => brin::redo(page, record, block),
        rmgr::SEQ => simple::redo_sequence(page, record),
        rmgr::GENERIC => simple::redo_generic(page, block),
        _unknown => Err(Fault::Unsupported("this resource manager's redo")),
    }
}

#[cfg(test)]
mod tests;
