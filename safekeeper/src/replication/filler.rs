//! What stands in a branch's first segment before the branch's first WAL.
//!
//! A branch begins where its parent, or the template, was at that moment: mostly inside a segment. Clients ask from the start of a
//! segment. What was there before is its ancestor's, none of this branch's, and nobody who follows this branch from a base backup of it
//! needs it; but readers of the segment look at its first page's header, and at that of the page where the WAL begins. So these are
//! made, and all else is zeroes, just as in the segment files that a compute starts with.

use bytes::Bytes;
use types::Lsn;
use wal::v15::wal::page_header;

/// The bytes from `begin` to `end`, both between the start of the segment and `start`, where the branch's WAL begins.
pub(super) fn before_branch(start: Lsn, begin: Lsn, end: Lsn, system_identifier: u64) -> Bytes {
    let mut bytes = vec![0; end.0.saturating_sub(begin.0) as usize];
    for page in [start.segment_start(), start.page_start()].into_iter().filter(|page| *page < start) {
        let header = page_header(page, 0, system_identifier);
        let whole = page.0..(page + header.len() as u64).0.min(start.0);
        let (from, to) = (whole.start.max(begin.0), whole.end.min(end.0));
        if from < to {
            let part = &header[(from - page.0) as usize..(to - page.0) as usize];
            bytes[(from - begin.0) as usize..(to - begin.0) as usize].copy_from_slice(part);
        }
    }
    bytes.into()
}

#[cfg(test)]
mod tests {
    use types::WAL_SEGMENT_BYTES;

    use super::*;

    #[test]
    fn it_is_what_a_compute_has_in_its_segment_however_it_is_cut() {
        let segment = 3 * WAL_SEGMENT_BYTES;
        for offset in [0x50_0028, 8192 * 3, 40, 48, 8192 + 24, WAL_SEGMENT_BYTES - 8] {
            let (first, start) = (Lsn(segment), Lsn(segment + offset));
            let whole = before_branch(start, first, start, 77);
            assert_eq!(whole.len() as u64, offset);
            let long = page_header(first, 0, 77);
            assert_eq!(whole[..40.min(offset as usize)], long[..40.min(offset as usize)]);
            let page = start.page_start();
            let mut expected = vec![0; offset as usize];
            expected[..40].copy_from_slice(&long);
            if page > first && page < start {
                let at = page.segment_offset() as usize;
                expected[at..at + 24].copy_from_slice(&page_header(page, 0, 77));
            }
            assert!(whole == expected, "{offset:#x}");
            let mut pieces = Vec::new();
            let mut at = first;
            while at < start {
                let end = Lsn((at + 8189).0.min(start.0));
                pieces.extend_from_slice(&before_branch(start, at, end, 77));
                at = end;
            }
            assert!(pieces == whole, "{offset:#x} in pieces");
        }
    }
}
