//! A WAL record, decoded.

use smallvec::SmallVec;
use types::{BlockNumber, Lsn, PageTag, RelTag};

/// Number of a resource manager (`access/rmgrlist.h`). 128 and above are an extension's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RmgrId(pub u8);

/// One whole record, its CRC checked (`XLogRecord` in `access/xlogrecord.h`, decoded as by `DecodeXLogRecord`).
///
/// All byte fields are slices of `raw`, which belongs to somebody else: taking a record apart copies nothing and, with up
/// to two blocks, allocates nothing. What is to outlive those bytes is an [`OwnedRecord`].
#[derive(Clone, Debug)]
pub struct DecodedRecord<'a> {
    /// Where its header starts.
    pub start_lsn: Lsn,
    /// Where it ends, aligned to 8: what Postgres puts into `pd_lsn` of the pages it touches (`EndRecPtr`). A record
    /// that ends with its page ends at the next page's start, before that page's header.
    pub end_lsn: Lsn,
    /// `xl_prev`: start of the record before.
    pub prev_lsn: Lsn,
    /// `xl_xid`; 0 when none.
    pub xid: u32,
    /// `xl_rmid`.
    pub rmgr: RmgrId,
    /// `xl_info`, all eight bits: the high four are the resource manager's.
    pub info: u8,
    /// Block references in `block_id` order (ids may have gaps: see [`BlockRef::id`]).
    pub blocks: Blocks<'a>,
    /// The record's own data ("main data").
    pub main_data: &'a [u8],
    /// Replication origin, when the record carries one.
    pub origin: Option<u16>,
    /// The record's bytes, header first, freed of WAL page headers and padding: `xl_tot_len` bytes.
    pub raw: &'a [u8],
}

/// A record's block references; most records have at most two.
pub type Blocks<'a> = SmallVec<[BlockRef<'a>; 2]>;

impl<'a> DecodedRecord<'a> {
    /// No record: a place for one, for [`crate::decode_into`].
    pub fn blank() -> DecodedRecord<'a> {
        DecodedRecord {
            start_lsn: Lsn(0),
            end_lsn: Lsn(0),
            prev_lsn: Lsn(0),
            xid: 0,
            rmgr: RmgrId(0),
            info: 0,
            blocks: Blocks::new(),
            main_data: &[],
            origin: None,
            raw: &[],
        }
    }

    /// `xl_info` without the bits that belong to the WAL machinery (`XLR_INFO_MASK`, the low four).
    pub fn rmgr_info(&self) -> u8 {
        self.info & 0xF0
    }

    /// The block reference of this id.
    pub fn block(&self, id: u8) -> Option<&BlockRef<'a>> {
        self.blocks.iter().find(|block| block.id == id)
    }

    /// The same for a shorter time, which a record does not become by itself ([`Blocks`] are invariant).
    pub fn reborrow(&self) -> DecodedRecord<'_> {
        DecodedRecord { blocks: self.blocks.iter().copied().collect(), ..*self }
    }

    /// A copy with bytes of its own.
    pub fn to_owned(&self) -> OwnedRecord {
        OwnedRecord { start_lsn: self.start_lsn, end_lsn: self.end_lsn, raw: self.raw.into() }
    }
}

/// A whole record's bytes and place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedRecord {
    /// Where its header starts.
    pub start_lsn: Lsn,
    /// Where it ends, aligned to 8.
    pub end_lsn: Lsn,
    /// Its bytes, as [`DecodedRecord::raw`].
    pub raw: Box<[u8]>,
}

impl OwnedRecord {
    /// Takes it apart again. Errors only if it was not made by [`DecodedRecord::to_owned`].
    pub fn decode(&self) -> Result<DecodedRecord<'_>, String> {
        crate::decode_record(self.start_lsn, self.end_lsn, &self.raw)
    }

    /// As [`decode`](Self::decode), in the place of another record.
    pub fn decode_into<'a>(&'a self, record: &mut DecodedRecord<'a>) -> Result<(), String> {
        crate::decode_into(record, self.start_lsn, self.end_lsn, &self.raw)
    }
}

/// A record's reference to one page (`XLogRecordBlockHeader`).
#[derive(Clone, Copy, Debug)]
pub struct BlockRef<'a> {
    /// `id`, 0 to 32.
    pub id: u8,
    /// The page's fork.
    pub rel: RelTag,
    /// The page.
    pub block: BlockNumber,
    /// `BKPBLOCK_WILL_INIT`: redo makes the page from nothing.
    pub will_init: bool,
    /// The full-page image, when there is one.
    pub image: Option<BlockImage<'a>>,
    /// The block's data; empty when there is none.
    pub data: &'a [u8],
    /// `BKPBLOCK_HAS_DATA`.
    pub has_data: bool,
}

impl BlockRef<'_> {
    /// The page that is referred to.
    pub fn tag(&self) -> PageTag {
        PageTag { rel: self.rel, block: self.block }
    }

    /// True when redo restores the page from the image (`BKPIMAGE_APPLY`) instead of applying the record.
    pub fn applies_image(&self) -> bool {
        self.image.as_ref().is_some_and(|image| image.apply)
    }
}

/// How a page image is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageCompression {
    /// As it is.
    None,
    /// `pglz`, Postgres's own.
    Pglz,
    /// LZ4 block.
    Lz4,
    /// Zstandard frame.
    Zstd,
}

/// A full-page image as it stands in the record (`XLogRecordBlockImageHeader`).
#[derive(Clone, Copy, Debug)]
pub struct BlockImage<'a> {
    /// The stored bytes, without the hole and perhaps compressed.
    pub bytes: &'a [u8],
    /// Where the hole starts in the page; 0 when there is none.
    pub hole_offset: u16,
    /// The hole's length in bytes; 0 when there is none.
    pub hole_length: u16,
    /// Redo puts the image in place. False for images that only serve `wal_consistency_checking`.
    pub apply: bool,
    /// How `bytes` is compressed.
    pub compression: ImageCompression,
}
