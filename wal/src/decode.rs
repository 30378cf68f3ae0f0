//! One record's bytes, taken apart (`DecodeXLogRecord` in `access/transam/xlogreader.c`).

use types::{ForkNumber, Lsn, PAGE_BYTES, RelTag};

use crate::{
    record::{BlockImage, BlockRef, Blocks, DecodedRecord, ImageCompression, RmgrId},
    v15::wal::{
        BLOCK_ID_DATA_LONG, BLOCK_ID_DATA_SHORT, BLOCK_ID_ORIGIN, BLOCK_ID_TOPLEVEL_XID, MAX_BLOCK_ID,
        RECORD_HEADER_BYTES, RecordHeader, bkpblock, bkpimage,
    },
};

/// Takes apart the record at `start_lsn`, given whole and without WAL page headers. Its CRC is not looked at: that is
/// [`crate::stream::WalStreamDecoder`]'s part. Errors say what is wrong with it; they never depend on bytes outside `raw`.
pub fn decode_record(start_lsn: Lsn, end_lsn: Lsn, raw: &[u8]) -> Result<DecodedRecord<'_>, String> {
    let mut record = DecodedRecord::blank();
    decode_into(&mut record, start_lsn, end_lsn, raw)?;
    Ok(record)
}

/// As [`decode_record`], in the place of another record: of many records in a row, none is moved about. After an error `record` is
/// of no use.
#[inline]
pub fn decode_into<'a>(
    record: &mut DecodedRecord<'a>,
    start_lsn: Lsn,
    end_lsn: Lsn,
    raw: &'a [u8],
) -> Result<(), String> {
    let header = RecordHeader::from_prefix(raw).ok_or("shorter than a record header")?;
    if header.xl_tot_len as usize != raw.len() {
        return Err(wrong_length(header.xl_tot_len, raw.len()));
    }
    record.start_lsn = start_lsn;
    record.end_lsn = end_lsn;
    record.prev_lsn = Lsn(header.xl_prev);
    record.xid = header.xl_xid;
    record.rmgr = RmgrId(header.xl_rmid);
    record.info = header.xl_info;
    record.blocks.clear();
    record.main_data = &[];
    record.origin = None;
    record.raw = raw;
    let mut cursor = Cursor { raw, rest: &raw[RECORD_HEADER_BYTES..] };
    read_headers(&mut cursor, record)?;
    for block in &mut record.blocks {
        if let Some(image) = &mut block.image {
            image.bytes = cursor.slice(image.bytes.len())?;
        }
        block.data = cursor.slice(block.data.len())?;
    }
    record.main_data = cursor.slice(record.main_data.len())?;
    Ok(())
}

/// Reads headers until the data they announce fill the record: on success they fit exactly. All data have their length already,
/// but not their place.
#[inline]
fn read_headers<'a>(cursor: &mut Cursor<'a>, record: &mut DecodedRecord<'a>) -> Result<(), String> {
    let mut data_total = 0usize;
    while cursor.rest.len() > data_total {
        match cursor.u8()? {
            BLOCK_ID_DATA_SHORT => {
                let length = usize::from(cursor.u8()?);
                record.main_data = cursor.somewhere(length)?;
                data_total += length;
                break;
            }
            BLOCK_ID_DATA_LONG => {
                let length = cursor.u32()? as usize;
                record.main_data = cursor.somewhere(length)?;
                data_total += length;
                break;
            }
            BLOCK_ID_ORIGIN => record.origin = Some(cursor.u16()?),
            // Which top-level transaction a subtransaction belongs to: only logical decoding asks.
            BLOCK_ID_TOPLEVEL_XID => drop(cursor.u32()?),
            id if id <= MAX_BLOCK_ID => {
                data_total += read_block_header(id, cursor, &mut record.blocks)?;
            }
            id => return Err(format!("invalid block id {id}")),
        }
    }
    if cursor.rest.len() != data_total {
        let left = cursor.rest.len();
        return Err(format!("{left} bytes of data where its headers announce {data_total}"));
    }
    Ok(())
}

#[cold]
fn wrong_length(announced: u32, bytes: usize) -> String {
    format!("xl_tot_len {announced} but {bytes} bytes")
}

#[cold]
fn out_of_order(id: u8) -> String {
    format!("out-of-order block id {id}")
}

#[cold]
fn same_relation_as_none(id: u8) -> String {
    format!("block {id}: same relation as none")
}

#[cold]
fn no_fork(id: u8, flags: u8) -> String {
    format!("block {id}: no fork has the number {}", flags & bkpblock::FORK_MASK)
}

#[cold]
fn wrong_data_length(id: u8, data_length: usize) -> String {
    format!("block {id}: data flag and data length {data_length} disagree")
}

/// Appends a block reference; how many bytes of data and image it announces.
///
/// All its fields are numbers until it is put together where it stays: parts that are written one by one and moved as one cost more
/// than all else here (the processor can't forward such stores).
#[inline]
fn read_block_header<'a>(id: u8, cursor: &mut Cursor<'a>, blocks: &mut Blocks<'a>) -> Result<usize, String> {
    let last = blocks.last();
    if last.is_some_and(|last| last.id >= id) {
        return Err(out_of_order(id));
    }
    let [flags, data_low, data_high] = *cursor.take()?;
    let Ok(fork) = ForkNumber::try_from(flags & bkpblock::FORK_MASK) else { return Err(no_fork(id, flags)) };
    let data_length = usize::from(u16::from_le_bytes([data_low, data_high]));
    let has_data = flags & bkpblock::HAS_DATA != 0;
    if has_data != (data_length > 0) {
        return Err(wrong_data_length(id, data_length));
    }
    let image = if flags & bkpblock::HAS_IMAGE != 0 { Some(read_image_header(id, cursor)?) } else { None };
    let (spc, db, rel, block);
    if flags & bkpblock::SAME_REL != 0 {
        let previous = last.ok_or_else(|| same_relation_as_none(id))?;
        (spc, db, rel) = (previous.rel.spc, previous.rel.db, previous.rel.rel);
        block = cursor.u32()?;
    } else {
        [spc, db, rel, block] = cursor.u32s()?;
    }
    let will_init = flags & bkpblock::WILL_INIT != 0;
    let data = cursor.somewhere(data_length)?;
    blocks.push(BlockRef { id, rel: RelTag { spc, db, rel, fork }, block, will_init, image: None, data, has_data });
    let Some(image) = image else { return Ok(data_length) };
    if let Some(block) = blocks.last_mut() {
        block.image = Some(image);
    }
    Ok(data_length + image.bytes.len())
}

fn read_image_header<'a>(id: u8, cursor: &mut Cursor<'a>) -> Result<BlockImage<'a>, String> {
    let length = cursor.u16()?;
    let hole_offset = cursor.u16()?;
    let info = cursor.u8()?;
    let has_hole = info & bkpimage::HAS_HOLE != 0;
    let compression = match info & bkpimage::COMPRESSION {
        0 => ImageCompression::None,
        bkpimage::COMPRESS_PGLZ => ImageCompression::Pglz,
        bkpimage::COMPRESS_LZ4 => ImageCompression::Lz4,
        bkpimage::COMPRESS_ZSTD => ImageCompression::Zstd,
        several => return Err(format!("block {id}: image compression bits {several:#04x}")),
    };
    let page = PAGE_BYTES as u16;
    let hole_length = match compression {
        ImageCompression::None => {
            page.checked_sub(length).ok_or_else(|| format!("block {id}: image of {length} bytes"))?
        }
        _ if has_hole => cursor.u16()?,
        _ => 0,
    };
    let wrong = if has_hole {
        hole_offset == 0 || hole_length == 0 || length == page
    } else {
        hole_offset != 0 || hole_length != 0
    };
    let compressed_whole = compression != ImageCompression::None && length >= page;
    if wrong || compressed_whole || u32::from(hole_offset) + u32::from(hole_length) > u32::from(page) {
        return Err(format!("block {id}: image of {length} bytes with a hole of {hole_length} at {hole_offset}"));
    }
    let apply = info & bkpimage::APPLY != 0;
    let bytes = cursor.somewhere(length.into())?;
    Ok(BlockImage { bytes, hole_offset, hole_length, apply, compression })
}

struct Cursor<'a> {
    raw: &'a [u8],
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// Bytes of this length, which stand for those that are only found once all headers are read.
    #[inline]
    fn somewhere(&self, length: usize) -> Result<&'a [u8], String> {
        self.raw.get(..length).ok_or_else(past_the_end)
    }

    #[inline]
    fn take<const N: usize>(&mut self) -> Result<&'a [u8; N], String> {
        let Some((taken, rest)) = self.rest.split_first_chunk::<N>() else { return Err(past_the_end()) };
        self.rest = rest;
        Ok(taken)
    }

    #[inline]
    fn slice(&mut self, length: usize) -> Result<&'a [u8], String> {
        let Some((taken, rest)) = self.rest.split_at_checked(length) else { return Err(past_the_end()) };
        self.rest = rest;
        Ok(taken)
    }

    #[inline]
    fn u8(&mut self) -> Result<u8, String> {
        self.take::<1>().map(|[byte]| *byte)
    }

    #[inline]
    fn u16(&mut self) -> Result<u16, String> {
        self.take().map(|bytes| u16::from_le_bytes(*bytes))
    }

    #[inline]
    fn u32(&mut self) -> Result<u32, String> {
        self.take().map(|bytes| u32::from_le_bytes(*bytes))
    }

    #[inline]
    fn u32s(&mut self) -> Result<[u32; 4], String> {
        let bytes = self.take::<16>()?;
        let all = u128::from_le_bytes(*bytes);
        Ok([all as u32, (all >> 32) as u32, (all >> 64) as u32, (all >> 96) as u32])
    }
}

#[cold]
fn past_the_end() -> String {
    "its headers run past its end".to_owned()
}
