//! WAL pages and record headers (`access/xlog_internal.h`, `access/xlogrecord.h`).

use types::{Lsn, WAL_SEGMENT_BYTES, XLOG_PAGE_BYTES};
use zerocopy::IntoBytes;

use super::wire_struct;

/// Bytes in an [`RecordHeader`] (`SizeOfXLogRecord`).
pub const RECORD_HEADER_BYTES: usize = size_of::<RecordHeader>();
/// Longest record that is believed (`XLogRecordMaxSize` of PostgreSQL 16 and later: 1020 MiB).
pub const MAX_RECORD_BYTES: usize = 1020 * 1024 * 1024;
/// Highest id of a block reference (`XLR_MAX_BLOCK_ID`).
pub const MAX_BLOCK_ID: u8 = 32;
/// Main data, length in one byte (`XLR_BLOCK_ID_DATA_SHORT`).
pub const BLOCK_ID_DATA_SHORT: u8 = 255;
/// Main data, length in four bytes (`XLR_BLOCK_ID_DATA_LONG`).
pub const BLOCK_ID_DATA_LONG: u8 = 254;
/// Replication origin (`XLR_BLOCK_ID_ORIGIN`).
pub const BLOCK_ID_ORIGIN: u8 = 253;
/// Top-level transaction (`XLR_BLOCK_ID_TOPLEVEL_XID`).
pub const BLOCK_ID_TOPLEVEL_XID: u8 = 252;
/// `xl_info`: the record carries images only for consistency checks (`XLR_CHECK_CONSISTENCY`).
pub const INFO_CHECK_CONSISTENCY: u8 = 0x02;
/// `xl_info`: the record changes files in ways block references don't tell (`XLR_SPECIAL_REL_UPDATE`).
pub const INFO_SPECIAL_REL_UPDATE: u8 = 0x01;

/// Bits of a block header's `fork_flags` (`BKPBLOCK_*`).
pub mod bkpblock {
    /// The fork number.
    pub const FORK_MASK: u8 = 0x0F;
    /// An image follows.
    pub const HAS_IMAGE: u8 = 0x10;
    /// Data follow.
    pub const HAS_DATA: u8 = 0x20;
    /// Redo makes the page anew.
    pub const WILL_INIT: u8 = 0x40;
    /// Same relation as the reference before.
    pub const SAME_REL: u8 = 0x80;
}

/// Bits of an image header's `bimg_info` (`BKPIMAGE_*`).
pub mod bkpimage {
    /// The image has a hole.
    pub const HAS_HOLE: u8 = 0x01;
    /// Redo restores it.
    pub const APPLY: u8 = 0x02;
    /// pglz.
    pub const COMPRESS_PGLZ: u8 = 0x04;
    /// LZ4.
    pub const COMPRESS_LZ4: u8 = 0x08;
    /// Zstandard.
    pub const COMPRESS_ZSTD: u8 = 0x10;
    /// Any of them.
    pub const COMPRESSION: u8 = COMPRESS_PGLZ | COMPRESS_LZ4 | COMPRESS_ZSTD;
}

/// Numbers of a WAL page header (`XLOG_PAGE_MAGIC`, `XLP_*`).
pub mod xlp {
    /// PostgreSQL 15's.
    pub const MAGIC: u16 = 0xD110;
    /// The page starts inside a record.
    pub const FIRST_IS_CONTRECORD: u16 = 0x0001;
    /// The header is a [`super::LongPageHeader`].
    pub const LONG_HEADER: u16 = 0x0002;
    /// Backup blocks are optional.
    pub const BKP_REMOVABLE: u16 = 0x0004;
    /// A record begun before this page was given up.
    pub const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x0008;
    /// All of them.
    pub const ALL_FLAGS: u16 = 0x000F;
}

wire_struct! {
    /// `XLogRecord`.
    pub struct RecordHeader {
        xl_tot_len: u32,
        xl_xid: u32,
        xl_prev: u64,
        xl_info: u8,
        xl_rmid: u8,
        padding: [u8; 2],
        /// CRC-32C of the data, then of this header up to here.
        xl_crc: u32,
    }
}

wire_struct! {
    /// `XLogPageHeaderData`, padded to a multiple of 8.
    pub struct PageHeader {
        xlp_magic: u16,
        xlp_info: u16,
        xlp_tli: u32,
        xlp_pageaddr: u64,
        /// Bytes of a record that started on an earlier page, from here on.
        xlp_rem_len: u32,
        padding: [u8; 4],
    }
}

wire_struct! {
    /// `XLogLongPageHeaderData`: a segment's first page.
    pub struct LongPageHeader {
        std: PageHeader,
        xlp_sysid: u64,
        xlp_seg_size: u32,
        xlp_xlog_blcksz: u32,
    }
}

/// Length of the header of the page that starts at `page_start`.
pub fn page_header_bytes(page_start: Lsn) -> usize {
    if page_start.segment_offset() == 0 { size_of::<LongPageHeader>() } else { size_of::<PageHeader>() }
}

/// The header of the page at `page_start`, which goes on with `remaining` bytes of a record from before (0: with none).
pub fn page_header(page_start: Lsn, remaining: u32, system_identifier: u64) -> Vec<u8> {
    let is_long = page_start.segment_offset() == 0;
    let contrecord = if remaining > 0 { xlp::FIRST_IS_CONTRECORD } else { 0 };
    let std = PageHeader {
        xlp_magic: xlp::MAGIC,
        xlp_info: contrecord | if is_long { xlp::LONG_HEADER } else { 0 },
        xlp_tli: 1,
        xlp_pageaddr: page_start.0,
        xlp_rem_len: remaining,
        padding: [0; 4],
    };
    if !is_long {
        return std.as_bytes().to_vec();
    }
    let long = LongPageHeader {
        std,
        xlp_sysid: system_identifier,
        xlp_seg_size: WAL_SEGMENT_BYTES as u32,
        xlp_xlog_blcksz: XLOG_PAGE_BYTES as u32,
    };
    long.as_bytes().to_vec()
}

/// The checksum that the record's header should carry. `record` is whole and at least a header long; shorter is 0.
#[inline]
pub fn record_crc(record: &[u8]) -> u32 {
    let covered = RECORD_HEADER_BYTES - size_of::<u32>();
    let (Some(data), Some(header)) = (record.get(RECORD_HEADER_BYTES..), record.get(..covered)) else { return 0 };
    crc32c::crc32c_append(crc32c::crc32c(data), header)
}
