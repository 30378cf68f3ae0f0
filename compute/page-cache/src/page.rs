//! How long a page that Postgres wrote must be kept: pure rules.

use types::{ForkNumber, WAL_SEGMENT_BYTES, XLOG_PAGE_BYTES};

use crate::Page;

/// LSNs below this mark something else: zero, `GistBuildLSN`, the counter of unlogged relations. A cluster's WAL starts in
/// its second segment.
const FIRST_REAL_LSN: u64 = WAL_SEGMENT_BYTES;

/// `SEQ_MAGIC` of `commands/sequence.c`, in the special space of a sequence's only page.
const SEQUENCE_MAGIC: u32 = 0x1717;

/// When a page that was written may be dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// No transaction in progress may have started before this LSN. `u64::MAX`: keep for ever.
    pub lsn: u64,
    /// Storage must have WAL up to here.
    pub insert: u64,
    /// Losing the page costs space or a gap; still only when the kept pages' budget is used up.
    pub soft: bool,
}

impl Keep {
    /// Until it is overwritten or its relation goes.
    pub const FOR_EVER: Keep = Keep { lsn: u64::MAX, insert: u64::MAX, soft: false };
}

/// How a page came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageOrigin {
    /// From a buffer: `pwrite`.
    Buffer,
    /// From a copy of the file, as `CREATE DATABASE ... STRATEGY file_copy` makes it: `write`. WAL tells of it later.
    Copy,
}

/// How long to keep a page. `insert` is WAL's end in memory at this moment, `shipped` what a quorum holds of it.
///
/// The page's own LSN does not tell all: clearing a visibility-map bit and setting a heap page's all-visible flag are
/// logged but leave the page's LSN as it was. Hence `insert`.
pub fn keep_for(page: &Page, fork: ForkNumber, origin: PageOrigin, insert: u64, shipped: u64) -> Keep {
    if fork == ForkNumber::Fsm {
        return Keep { lsn: 0, insert: 0, soft: true };
    }
    let lsn = page_lsn(page);
    match origin {
        PageOrigin::Copy => Keep { lsn: lsn.max(shipped.saturating_add(1)), insert, soft: false },
        PageOrigin::Buffer if lsn < FIRST_REAL_LSN => Keep::FOR_EVER,
        PageOrigin::Buffer => Keep { lsn, insert, soft: is_sequence(page) },
    }
}

/// True for a page that was never initialised.
pub fn is_zero(page: &[u8]) -> bool {
    // SAFETY: any bytes are a valid u64.
    let (head, words, tail) = unsafe { page.align_to::<u64>() };
    head.iter().chain(tail).all(|byte| *byte == 0) && words.iter().all(|word| *word == 0)
}

/// `GetXLogInsertRecPtr` points behind the header of a page in which nothing is yet; the end of the record before it, as
/// everybody else counts, is the page's start.
pub fn normal_insert_lsn(lsn: u64) -> u64 {
    /// `SizeOfXLogShortPHD`, `SizeOfXLogLongPHD`.
    const SHORT_HEADER: u64 = 24;
    const LONG_HEADER: u64 = 40;
    if lsn % WAL_SEGMENT_BYTES == LONG_HEADER {
        lsn - LONG_HEADER
    } else if lsn % XLOG_PAGE_BYTES == SHORT_HEADER {
        lsn - SHORT_HEADER
    } else {
        lsn
    }
}

/// `pd_lsn` of `PageHeaderData`: high half first, each in native order.
fn page_lsn(page: &Page) -> u64 {
    u64::from(word(page, 0)) << 32 | u64::from(word(page, 4))
}

fn is_sequence(page: &Page) -> bool {
    /// `pd_special` of `PageHeaderData`.
    const SPECIAL_AT: usize = 16;
    const SPECIAL_START: usize = types::PAGE_BYTES - 8;
    let special = usize::from(u16::from_ne_bytes([page[SPECIAL_AT], page[SPECIAL_AT + 1]]));
    special == SPECIAL_START && word(page, SPECIAL_START) == SEQUENCE_MAGIC
}

fn word(page: &Page, at: usize) -> u32 {
    u32::from_ne_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page_at(lsn: u64) -> Page {
        let mut page = [0; types::PAGE_BYTES];
        page[0..4].copy_from_slice(&((lsn >> 32) as u32).to_ne_bytes());
        page[4..8].copy_from_slice(&(lsn as u32).to_ne_bytes());
        page
    }

    #[test]
    fn a_logged_page_waits_for_its_transactions_and_for_storage() {
        let keep = keep_for(&page_at(0x1_0200_0000), ForkNumber::Main, PageOrigin::Buffer, 0x1_0300_0000, 0);
        assert_eq!(keep, Keep { lsn: 0x1_0200_0000, insert: 0x1_0300_0000, soft: false });
    }

    #[test]
    fn a_page_without_a_real_lsn_stays() {
        for lsn in [0, 1, 1000, FIRST_REAL_LSN - 1] {
            let keep = keep_for(&page_at(lsn), ForkNumber::Main, PageOrigin::Buffer, 1 << 40, 1 << 40);
            assert_eq!(keep, Keep::FOR_EVER, "{lsn}");
        }
    }

    #[test]
    fn a_copied_page_waits_for_the_record_of_the_copy() {
        let keep = keep_for(&page_at(0x0200_0000), ForkNumber::Main, PageOrigin::Copy, 0x0400_0000, 0x0300_0000);
        assert_eq!(keep, Keep { lsn: 0x0300_0001, insert: 0x0400_0000, soft: false });
    }

    #[test]
    fn free_space_and_sequences_are_soft() {
        assert!(keep_for(&page_at(0), ForkNumber::Fsm, PageOrigin::Buffer, 9, 9).soft);
        let mut sequence = page_at(0x0200_0000);
        sequence[16..18].copy_from_slice(&8184u16.to_ne_bytes());
        sequence[8184..8188].copy_from_slice(&0x1717u32.to_ne_bytes());
        let keep = keep_for(&sequence, ForkNumber::Main, PageOrigin::Buffer, 0x0300_0000, 0);
        assert_eq!(keep, Keep { lsn: 0x0200_0000, insert: 0x0300_0000, soft: true });
    }

    #[test]
    fn an_insert_position_behind_a_page_header_is_the_page_start() {
        assert_eq!(normal_insert_lsn(0x0100_0028), 0x0100_0000);
        assert_eq!(normal_insert_lsn(0x0100_2018), 0x0100_2000);
        assert_eq!(normal_insert_lsn(0x0100_2028), 0x0100_2028);
        assert_eq!(normal_insert_lsn(0), 0);
    }

    #[test]
    fn zero_pages_are_found() {
        let mut page = [0u8; types::PAGE_BYTES];
        assert!(is_zero(&page));
        page[8191] = 1;
        assert!(!is_zero(&page) && is_zero(&page[..8191]));
    }
}
