//! One record's bytes, taken apart (`DecodeXLogRecord` in `access/transam/xlogreader.c`).

use smallvec::SmallVec;
use types::{ForkNumber, Lsn, PAGE_BYTES, RelTag};

use crate::{
    record::{BlockImage, BlockRef, DecodedRecord, ImageCompression, RmgrId},
    v15::wal::{
        BLOCK_ID_DATA_LONG, BLOCK_ID_DATA_SHORT, BLOCK_ID_ORIGIN, BLOCK_ID_TOPLEVEL_XID, MAX_BLOCK_ID,
        RECORD_HEADER_BYTES, RecordHeader, bkpblock, bkpimage,
    },
};

/// Takes apart the record at `start_lsn`, given whole and without WAL page headers. Its CRC is not looked at: that is
/// [`crate::stream::WalStreamDecoder`]'s part. Errors say what is wrong with it; they never depend on bytes outside `raw`.
pub fn decode_record(start_lsn: Lsn, end_lsn: Lsn, raw: &[u8]) -> Result<DecodedRecord<'_>, String> {
    let header = RecordHeader::from_prefix(raw).ok_or("shorter than a record header")?;
    if header.xl_tot_len as usize != raw.len() {
        return Err(format!("xl_tot_len {} but {} bytes", { header.xl_tot_len }, raw.len()));
    }
    let headers = Headers::parse(raw)?;
    let mut at = headers.end;
    let mut take = |length: usize| {
        let slice = &raw[at..at + length];
        at += length;
        slice
    };
    let blocks = headers
        .blocks
        .into_iter()
        .map(|block| BlockRef {
            id: block.id,
            rel: block.rel,
            block: block.block,
            will_init: block.flags & bkpblock::WILL_INIT != 0,
            image: block.image.map(|image| BlockImage {
                bytes: take(image.length),
                hole_offset: image.hole_offset,
                hole_length: image.hole_length,
                apply: image.info & bkpimage::APPLY != 0,
                compression: image.compression,
            }),
            data: take(block.data_length),
            has_data: block.flags & bkpblock::HAS_DATA != 0,
        })
        .collect();
    let main_data = take(headers.main_length);
    Ok(DecodedRecord {
        start_lsn,
        end_lsn,
        prev_lsn: Lsn(header.xl_prev),
        xid: header.xl_xid,
        rmgr: RmgrId(header.xl_rmid),
        info: header.xl_info,
        blocks,
        main_data,
        origin: headers.origin,
        raw,
    })
}

/// What the headers of a record say, before its data are cut out.
struct Headers {
    blocks: SmallVec<[BlockHeader; 2]>,
    main_length: usize,
    origin: Option<u16>,
    /// Offset of the first byte behind the headers.
    end: usize,
}

struct BlockHeader {
    id: u8,
    flags: u8,
    data_length: usize,
    image: Option<ImageHeader>,
    rel: RelTag,
    block: u32,
}

struct ImageHeader {
    length: usize,
    hole_offset: u16,
    hole_length: u16,
    info: u8,
    compression: ImageCompression,
}

impl Headers {
    /// Reads headers until the data they announce fill the record. On success the announced data fit exactly.
    fn parse(raw: &[u8]) -> Result<Headers, String> {
        let mut cursor = Cursor { bytes: raw, at: RECORD_HEADER_BYTES };
        let mut headers = Headers { blocks: SmallVec::new(), main_length: 0, origin: None, end: 0 };
        let mut data_total = 0usize;
        while cursor.left() > data_total {
            match cursor.u8()? {
                BLOCK_ID_DATA_SHORT => {
                    headers.main_length = usize::from(cursor.u8()?);
                    data_total += headers.main_length;
                    break;
                }
                BLOCK_ID_DATA_LONG => {
                    headers.main_length = cursor.u32()? as usize;
                    data_total += headers.main_length;
                    break;
                }
                BLOCK_ID_ORIGIN => headers.origin = Some(cursor.u16()?),
                // Which top-level transaction a subtransaction belongs to: only logical decoding asks.
                BLOCK_ID_TOPLEVEL_XID => drop(cursor.u32()?),
                id if id <= MAX_BLOCK_ID => {
                    let last = headers.blocks.last();
                    if last.is_some_and(|last| last.id >= id) {
                        return Err(format!("out-of-order block id {id}"));
                    }
                    let block = BlockHeader::parse(id, &mut cursor, last.map(|last| last.rel))?;
                    data_total += block.data_length + block.image.as_ref().map_or(0, |image| image.length);
                    headers.blocks.push(block);
                }
                id => return Err(format!("invalid block id {id}")),
            }
        }
        if cursor.left() != data_total {
            return Err(format!("{} bytes of data where its headers announce {data_total}", cursor.left()));
        }
        headers.end = cursor.at;
        Ok(headers)
    }
}

impl BlockHeader {
    fn parse(id: u8, cursor: &mut Cursor<'_>, previous: Option<RelTag>) -> Result<BlockHeader, String> {
        let flags = cursor.u8()?;
        let fork = ForkNumber::try_from(flags & bkpblock::FORK_MASK).map_err(|error| error.to_string())?;
        let data_length = usize::from(cursor.u16()?);
        if (flags & bkpblock::HAS_DATA != 0) != (data_length > 0) {
            return Err(format!("block {id}: data flag and data length {data_length} disagree"));
        }
        let image = if flags & bkpblock::HAS_IMAGE != 0 { Some(ImageHeader::parse(id, cursor)?) } else { None };
        let rel = if flags & bkpblock::SAME_REL != 0 {
            let previous = previous.ok_or_else(|| format!("block {id}: same relation as none"))?;
            previous.with_fork(fork)
        } else {
            RelTag { spc: cursor.u32()?, db: cursor.u32()?, rel: cursor.u32()?, fork }
        };
        Ok(BlockHeader { id, flags, data_length, image, rel, block: cursor.u32()? })
    }
}

impl ImageHeader {
    fn parse(id: u8, cursor: &mut Cursor<'_>) -> Result<ImageHeader, String> {
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
        Ok(ImageHeader { length: usize::from(length), hole_offset, hole_length, info, compression })
    }
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let taken = self.bytes[self.at..].first_chunk::<N>().ok_or("its headers run past its end")?;
        self.at += N;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, String> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, String> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.take().map(u32::from_le_bytes)
    }
}
