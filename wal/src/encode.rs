//! Records that Dormouse itself writes, laid out on WAL pages as `XLogInsertRecord` would (`access/transam/xlog.c`).

use std::borrow::Cow;

use bytes::Bytes;
use types::{Lsn, PAGE_BYTES, PageTag, XLOG_PAGE_BYTES};
use zerocopy::IntoBytes;

use crate::{
    record::RmgrId,
    v15::wal::{
        BLOCK_ID_DATA_LONG, BLOCK_ID_DATA_SHORT, RECORD_HEADER_BYTES, RecordHeader, bkpblock, bkpimage, page_header,
        page_header_bytes, record_crc,
    },
};

/// What a record to be written says.
#[derive(Clone, Debug)]
pub struct RecordToWrite<'a> {
    /// Transaction; 0 for none.
    pub xid: u32,
    /// Resource manager.
    pub rmgr: RmgrId,
    /// `xl_info`.
    pub info: u8,
    /// Main data, shorter than 4 GiB.
    pub main_data: &'a [u8],
    /// Page images, at most 33 (`XLOG_FPI`). Ids are given in order.
    pub blocks: Vec<BlockToWrite<'a>>,
}

/// A full-page image to be written.
#[derive(Clone, Copy, Debug)]
pub struct BlockToWrite<'a> {
    /// The page's name.
    pub tag: PageTag,
    /// Its content.
    pub page: &'a [u8; PAGE_BYTES],
}

/// A record on its WAL pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedRecord {
    /// Where its header starts.
    pub start_lsn: Lsn,
    /// Where it ends, aligned to 8 (`EndRecPtr`).
    pub end_lsn: Lsn,
    /// Where `bytes` starts: the position that was asked for.
    pub begin: Lsn,
    /// The WAL from `begin` to `end_lsn`: padding, page headers, the record, padding.
    pub bytes: Bytes,
}

/// Where a record written at `at` (the end of the one before) starts: behind the page header, when `at` is a page's start.
pub fn record_start_at(at: Lsn) -> Lsn {
    let at = at.align_up();
    if at.page_offset() == 0 { at + page_header_bytes(at) as u64 } else { at }
}

/// Lays a record out behind `at`. `prev_lsn` is where the record before starts, `system_identifier` goes into the header of a
/// segment's first page.
pub fn encode_record(at: Lsn, prev_lsn: Lsn, system_identifier: u64, record: &RecordToWrite<'_>) -> EncodedRecord {
    let raw = record_bytes(prev_lsn, record);
    let mut bytes = vec![0; (at.align_up().0 - at.0) as usize];
    let mut cursor = at.align_up();
    let mut left = raw.as_slice();
    while !left.is_empty() {
        if cursor.page_offset() == 0 {
            let remaining = if left.len() == raw.len() { 0 } else { left.len() as u32 };
            let header = page_header(cursor, remaining, system_identifier);
            bytes.extend_from_slice(&header);
            cursor += header.len() as u64;
        }
        let on_page = (XLOG_PAGE_BYTES - cursor.page_offset()) as usize;
        let (piece, rest) = left.split_at(on_page.min(left.len()));
        bytes.extend_from_slice(piece);
        cursor += piece.len() as u64;
        left = rest;
    }
    let end_lsn = cursor.align_up();
    bytes.resize((end_lsn.0 - at.0) as usize, 0);
    EncodedRecord { start_lsn: record_start_at(at), end_lsn, begin: at, bytes: bytes.into() }
}

/// A page as it stands in a record.
struct Image<'a> {
    bytes: Cow<'a, [u8]>,
    /// A flag of [`bkpimage`], or none.
    compression: u8,
}

impl Image<'_> {
    /// Compressed when that makes it smaller, as Postgres does with `wal_compression = lz4`. No hole is left out: pages of
    /// a free space map have content where others have free space.
    fn of(page: &[u8; PAGE_BYTES]) -> Image<'_> {
        let compressed = lz4_flex::block::compress(page);
        if compressed.len() < PAGE_BYTES {
            Image { bytes: compressed.into(), compression: bkpimage::COMPRESS_LZ4 }
        } else {
            Image { bytes: Cow::Borrowed(page), compression: 0 }
        }
    }
}

/// The record without pages around it, checksum and all.
fn record_bytes(prev_lsn: Lsn, record: &RecordToWrite<'_>) -> Vec<u8> {
    let mut raw = vec![0; RECORD_HEADER_BYTES];
    let images: Vec<_> = record.blocks.iter().map(|block| Image::of(block.page)).collect();
    for (id, (block, image)) in record.blocks.iter().zip(&images).enumerate() {
        raw.push(id as u8);
        raw.push(block.tag.rel.fork as u8 | bkpblock::HAS_IMAGE);
        raw.extend_from_slice(&0u16.to_le_bytes());
        raw.extend_from_slice(&(image.bytes.len() as u16).to_le_bytes());
        raw.extend_from_slice(&0u16.to_le_bytes());
        raw.push(bkpimage::APPLY | image.compression);
        for number in [block.tag.rel.spc, block.tag.rel.db, block.tag.rel.rel, block.tag.block] {
            raw.extend_from_slice(&number.to_le_bytes());
        }
    }
    match u8::try_from(record.main_data.len()) {
        Ok(0) => {}
        Ok(length) => raw.extend_from_slice(&[BLOCK_ID_DATA_SHORT, length]),
        Err(_) => {
            raw.push(BLOCK_ID_DATA_LONG);
            raw.extend_from_slice(&(record.main_data.len() as u32).to_le_bytes());
        }
    }
    for image in &images {
        raw.extend_from_slice(&image.bytes);
    }
    raw.extend_from_slice(record.main_data);
    let mut header = RecordHeader {
        xl_tot_len: raw.len() as u32,
        xl_xid: record.xid,
        xl_prev: prev_lsn.0,
        xl_info: record.info,
        xl_rmid: record.rmgr.0,
        padding: [0; 2],
        xl_crc: 0,
    };
    raw[..RECORD_HEADER_BYTES].copy_from_slice(header.as_bytes());
    header.xl_crc = record_crc(&raw);
    raw[..RECORD_HEADER_BYTES].copy_from_slice(header.as_bytes());
    raw
}

/// The files of `pg_wal` that a Postgres needs that starts with this record (name, content): page headers up to the record, the
/// record, and nothing of the WAL before it. A file ends with the last page that holds something of the record; the rest of its 16 MiB may
/// be made with `set_len`.
pub fn segment_with(encoded: &EncodedRecord, system_identifier: u64) -> Vec<(String, Vec<u8>)> {
    let first = encoded.begin.segment_start();
    let mut wal = Vec::new();
    let mut page = first;
    while page < encoded.begin {
        wal.extend_from_slice(&page_header(page, 0, system_identifier));
        page += XLOG_PAGE_BYTES;
        wal.resize((page.0 - first.0) as usize, 0);
    }
    wal.truncate((encoded.begin.0 - first.0) as usize);
    wal.extend_from_slice(&encoded.bytes);
    wal.resize(wal.len().next_multiple_of(XLOG_PAGE_BYTES as usize), 0);
    wal.chunks(types::WAL_SEGMENT_BYTES as usize)
        .enumerate()
        .map(|(index, chunk)| {
            let at = first + index as u64 * types::WAL_SEGMENT_BYTES;
            (at.segment_file_name(), chunk.to_vec())
        })
        .collect()
}
