//! Redo of the records that need no index or heap knowledge: sequences, generic deltas, full-page images.

use wal::{
    BlockRef, DecodedRecord,
    v15::xlog::{FPI, FPI_FOR_HINT},
};

use super::{
    PageLsn,
    cursor::Cursor,
    fault::Fault,
    page_ops::{HEADER_BYTES, Page, Place},
};

/// `SEQ_MAGIC` of `commands/sequence.c`, in the special area.
const SEQUENCE_MAGIC: u32 = 0x1717;
/// `XLOG_SEQ_LOG`.
const SEQUENCE_LOG: u8 = 0x00;
/// `sizeof(RelFileNode)`: what precedes the tuple in `xl_seq_rec`.
const SEQUENCE_HEADER_BYTES: usize = 12;

/// `seq_redo` in `commands/sequence.c`: the page is made anew around the record's tuple.
pub(super) fn redo_sequence(page: &mut Page<'_>, record: &DecodedRecord<'_>) -> Result<PageLsn, Fault> {
    if record.rmgr_info() != SEQUENCE_LOG {
        return Err(Fault::Unsupported("an unknown sequence operation"));
    }
    let mut main = Cursor::new(record.main_data);
    main.skip(SEQUENCE_HEADER_BYTES)?;
    page.init(4);
    page.set_u32_at(page.special(), SEQUENCE_MAGIC)?;
    page.add_item(main.rest(), Place::Shifting(1))?;
    Ok(PageLsn::Set)
}

/// `generic_redo` in `access/transam/generic_xlog.c`: fragments (offset, length, bytes) overwrite the page.
pub(super) fn redo_generic(page: &mut Page<'_>, block: &BlockRef<'_>) -> Result<PageLsn, Fault> {
    let mut data = Cursor::new(block.data);
    while !data.is_empty() {
        let (offset, length) = (data.u16()?, data.u16()?);
        page.write(offset.into(), data.take(length.into())?)?;
    }
    let (lower, upper) = (page.lower(), page.upper());
    if lower < HEADER_BYTES || lower > upper {
        return Err(format!("after the delta pd_lower is {lower} and pd_upper {upper}").into());
    }
    page.slice_mut(lower..upper)?.fill(0);
    Ok(PageLsn::Set)
}

/// `xlog_redo` of the records that are nothing but full-page images, for a block without one that applies.
pub(super) fn redo_xlog(record: &DecodedRecord<'_>) -> Result<PageLsn, Fault> {
    match record.rmgr_info() {
        // Such a block is in the record only to be named.
        FPI_FOR_HINT => Ok(PageLsn::Keep),
        FPI => Err("a full-page image record without an image".into()),
        _other => Err(Fault::Unsupported("an XLOG record with a block reference")),
    }
}
