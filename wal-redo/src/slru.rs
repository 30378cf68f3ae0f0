//! Redo of the SLRU areas: transaction status, multixacts, commit timestamps.

use smallvec::SmallVec;
use types::{Lsn, PAGE_BYTES};
use wal::{
    CheckPoint, DecodedRecord, RmgrId,
    v15::{
        rmgr,
        state::{MultiXactCreate, MultiXactMember, clog, commit_ts, multixact},
        xact::{self, ParsedEnd},
    },
};

use crate::{
    change::{Change, SlruKind},
    changes::{CUT_SHORT, ChangeList, UnknownRecord},
};

/// Pages of a segment file (`SLRU_PAGES_PER_SEGMENT` in `access/slru.h`).
pub const SLRU_PAGES_PER_SEGMENT: u32 = 32;

/// The record cannot be applied to the SLRU page: it is malformed, or has nothing to say about this page.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot apply the WAL record at {lsn} (resource manager {}, info {info:#04x}) to page {page_number} of {slru:?}: {problem}", rmgr.0)]
pub struct SlruRedoError {
    /// Where the record starts.
    pub lsn: Lsn,
    /// Its resource manager.
    pub rmgr: RmgrId,
    /// `xl_info`.
    pub info: u8,
    /// The area.
    pub slru: SlruKind,
    /// The page in it.
    pub page_number: u32,
    /// What is wrong.
    pub problem: &'static str,
}

const NOT_TOUCHED: &str = "the record does not change this page";

/// Applies a record to one SLRU page, as [`crate::changes`] or [`commit_ts_changes`] listed it. A page that no record has
/// touched before is one of zeroes. Applying a record twice is the same as once.
pub fn redo_slru_page(
    page: &mut [u8; PAGE_BYTES],
    slru: SlruKind,
    page_number: u32,
    record: &DecodedRecord<'_>,
) -> Result<(), SlruRedoError> {
    redo(page, slru, page_number, record).map_err(|problem| SlruRedoError {
        lsn: record.start_lsn,
        rmgr: record.rmgr,
        info: record.info,
        slru,
        page_number,
        problem,
    })
}

fn redo(
    page: &mut [u8; PAGE_BYTES],
    slru: SlruKind,
    number: u32,
    record: &DecodedRecord<'_>,
) -> Result<(), &'static str> {
    let multixact_info = (record.rmgr == rmgr::MULTIXACT).then(|| record.rmgr_info());
    let zeroes = match slru {
        SlruKind::Clog => record.rmgr == rmgr::CLOG && record.rmgr_info() == clog::ZEROPAGE,
        SlruKind::CommitTs => record.rmgr == rmgr::COMMIT_TS && record.rmgr_info() == commit_ts::ZEROPAGE,
        SlruKind::MultiXactOffsets => multixact_info == Some(multixact::ZERO_OFF_PAGE),
        SlruKind::MultiXactMembers => multixact_info == Some(multixact::ZERO_MEM_PAGE),
    };
    if zeroes {
        if zeroed_page(record) != Some(number) {
            return Err(NOT_TOUCHED);
        }
        page.fill(0);
        return Ok(());
    }
    let touched = match slru {
        SlruKind::Clog => redo_clog(page, number, &parse_end(record)?),
        SlruKind::CommitTs => redo_commit_ts(page, number, &parse_end(record)?, record.origin),
        SlruKind::MultiXactOffsets => redo_offsets(page, number, &parse_create(record)?.0),
        SlruKind::MultiXactMembers => {
            let (create, members) = parse_create(record)?;
            redo_members(page, number, create.moff, &members)
        }
    };
    if touched { Ok(()) } else { Err(NOT_TOUCHED) }
}

fn parse_end(record: &DecodedRecord<'_>) -> Result<ParsedEnd, &'static str> {
    xact::parse_end(record)?.ok_or(NOT_TOUCHED)
}

fn parse_create(record: &DecodedRecord<'_>) -> Result<(MultiXactCreate, Vec<MultiXactMember>), &'static str> {
    if record.rmgr != rmgr::MULTIXACT || record.rmgr_info() != multixact::CREATE_ID {
        return Err(NOT_TOUCHED);
    }
    MultiXactCreate::members(record.main_data).ok_or(CUT_SHORT)
}

/// The page that a record of the kind "zero this page" names.
pub(crate) fn zeroed_page(record: &DecodedRecord<'_>) -> Option<u32> {
    let page = record.main_data.first_chunk().map(|page| i32::from_le_bytes(*page))?;
    u32::try_from(page).ok()
}

/// The transaction and its subtransactions; none of a transaction without an id.
fn xids(end: &ParsedEnd) -> impl Iterator<Item = u32> {
    std::iter::once(end.xid).filter(|xid| *xid != 0).chain(end.subxacts.iter().copied())
}

/// The pages that hold the entries of the transactions that end, each once, in ascending order.
pub(crate) fn pages_of(end: &ParsedEnd, xacts_per_page: u32) -> SmallVec<[u32; 2]> {
    let mut pages: SmallVec<[u32; 2]> = xids(end).map(|xid| xid / xacts_per_page).collect();
    pages.sort_unstable();
    pages.dedup();
    pages
}

/// Two bits per transaction. The intermediate "sub-committed" of a tree that spans pages never shows: a record is applied whole.
fn redo_clog(page: &mut [u8; PAGE_BYTES], number: u32, end: &ParsedEnd) -> bool {
    const COMMITTED: u8 = 1;
    const ABORTED: u8 = 2;
    let status = if end.committed { COMMITTED } else { ABORTED };
    let mut touched = false;
    for xid in xids(end).filter(|xid| xid / clog::XACTS_PER_PAGE == number) {
        let index = xid % clog::XACTS_PER_PAGE;
        let shift = index % 4 * 2;
        let byte = &mut page[(index / 4) as usize];
        *byte = *byte & !(3 << shift) | status << shift;
        touched = true;
    }
    touched
}

fn redo_commit_ts(page: &mut [u8; PAGE_BYTES], number: u32, end: &ParsedEnd, origin: Option<u16>) -> bool {
    let timestamp_us = end.origin.map_or(end.timestamp_us, |(_, timestamp_us)| timestamp_us);
    let mut touched = false;
    for xid in xids(end).filter(|xid| end.committed && xid / commit_ts::XACTS_PER_PAGE == number) {
        let at = (xid % commit_ts::XACTS_PER_PAGE) as usize * commit_ts::ENTRY_BYTES;
        page[at..at + 8].copy_from_slice(&timestamp_us.to_le_bytes());
        page[at + 8..at + 10].copy_from_slice(&origin.unwrap_or(0).to_le_bytes());
        touched = true;
    }
    touched
}

/// What a new multixact writes into the offsets area: where its members start, and where the next one's will.
pub(crate) fn offset_entries(create: &MultiXactCreate) -> [(u32, u32); 2] {
    let next = create.mid.wrapping_add(1).max(1);
    // Offset 0 means "not set" and is skipped.
    let next_offset = create.moff.wrapping_add(create.nmembers).max(1);
    [(create.mid, create.moff), (next, next_offset)]
}

fn redo_offsets(page: &mut [u8; PAGE_BYTES], number: u32, create: &MultiXactCreate) -> bool {
    let mut touched = false;
    for (multi, offset) in offset_entries(create) {
        if multi / multixact::OFFSETS_PER_PAGE == number {
            let at = (multi % multixact::OFFSETS_PER_PAGE) as usize * 4;
            page[at..at + 4].copy_from_slice(&offset.to_le_bytes());
            touched = true;
        }
    }
    touched
}

fn redo_members(page: &mut [u8; PAGE_BYTES], number: u32, first: u32, members: &[MultiXactMember]) -> bool {
    let mut touched = false;
    for (index, member) in members.iter().enumerate() {
        let offset = first.wrapping_add(index as u32);
        if offset / multixact::MEMBERS_PER_PAGE != number {
            continue;
        }
        let group = offset / multixact::MEMBERS_PER_GROUP % multixact::GROUPS_PER_PAGE * multixact::GROUP_BYTES;
        let in_group = offset % multixact::MEMBERS_PER_GROUP;
        let xid_at = (group + multixact::MEMBERS_PER_GROUP + in_group * 4) as usize;
        // One flag byte a member, in the order of the members.
        page[(group + in_group) as usize] = member.status as u8;
        page[xid_at..xid_at + 4].copy_from_slice(&{ member.xid }.to_le_bytes());
        touched = true;
    }
    touched
}

/// The commit timestamp pages that a record sets. Empty unless commits are being timestamped, which `checkpoint`, the
/// counters as of this record, tells ([`tracks_commit_ts`]).
pub fn commit_ts_changes(record: &DecodedRecord<'_>, checkpoint: &CheckPoint) -> Result<ChangeList, UnknownRecord> {
    if !tracks_commit_ts(checkpoint) {
        return Ok(ChangeList::new());
    }
    let end = xact::parse_end(record).map_err(|problem| UnknownRecord {
        lsn: record.start_lsn,
        rmgr: record.rmgr,
        info: record.info,
        problem,
    })?;
    let pages = end.filter(|end| end.committed).map(|end| pages_of(&end, commit_ts::XACTS_PER_PAGE));
    let change = |page| Change::SlruPage { slru: SlruKind::CommitTs, page, will_init: false };
    Ok(pages.unwrap_or_default().into_iter().map(change).collect())
}

/// True while `track_commit_timestamp` is on.
pub fn tracks_commit_ts(checkpoint: &CheckPoint) -> bool {
    checkpoint.oldest_commit_ts_xid != 0
}

/// True when truncating to `cutoff_page` removes this segment: all its pages are before the cutoff, in the area's own circular order
/// (`SlruMayDeleteSegment`).
pub fn truncation_removes(slru: SlruKind, segment: u32, cutoff_page: u32) -> bool {
    let first = segment.wrapping_mul(SLRU_PAGES_PER_SEGMENT);
    let last = first.wrapping_add(SLRU_PAGES_PER_SEGMENT - 1);
    precedes(slru, first, cutoff_page) && precedes(slru, last, cutoff_page)
}

/// The areas' `PagePrecedes` functions.
fn precedes(slru: SlruKind, left: u32, right: u32) -> bool {
    // The second number skips ids that are never handed out.
    let (per_page, skipped) = match slru {
        SlruKind::Clog => (clog::XACTS_PER_PAGE, 4),
        SlruKind::CommitTs => (commit_ts::XACTS_PER_PAGE, 4),
        SlruKind::MultiXactOffsets => (multixact::OFFSETS_PER_PAGE, 2),
        SlruKind::MultiXactMembers => (multixact::MEMBERS_PER_PAGE, 0),
    };
    let left = left.wrapping_mul(per_page).wrapping_add(skipped);
    let right = right.wrapping_mul(per_page).wrapping_add(skipped);
    let before = |other: u32| (left.wrapping_sub(other) as i32) < 0;
    before(right) && before(right.wrapping_add(per_page - 1))
}

#[cfg(test)]
mod tests;
