//! Redo of SLRU pages, on records made by hand.

use wal::v15::xact::info;

use super::*;
use crate::{
    changes,
    test_record::{record, words, xact_end},
};

fn status(page: &[u8; PAGE_BYTES], xid: u32) -> u8 {
    page[(xid % 32768 / 4) as usize] >> (xid % 4 * 2) & 3
}

#[test]
fn a_commit_over_two_pages_marks_the_whole_tree() {
    let mut commit = record(rmgr::XACT, info::COMMIT | info::HAS_INFO, xact_end(7, &[32767, 32768, 32770]));
    commit.xid = 32766;
    let listed = changes(&commit).expect("known");
    let page = |page| Change::SlruPage { slru: SlruKind::Clog, page, will_init: false };
    assert_eq!(listed[..], [page(0), page(1), Change::Commit { timestamp_us: 7 }]);
    let mut first = [0; PAGE_BYTES];
    redo_slru_page(&mut first, SlruKind::Clog, 0, &commit).expect("applies");
    assert_eq!([32765, 32766, 32767].map(|xid| status(&first, xid)), [0, 1, 1]);
    let mut second = [0xFF; PAGE_BYTES];
    redo_slru_page(&mut second, SlruKind::Clog, 1, &commit).expect("applies");
    assert_eq!([32768, 32769, 32770].map(|xid| status(&second, xid)), [1, 3, 1]);
    assert!(redo_slru_page(&mut second, SlruKind::Clog, 2, &commit).is_err());
}

#[test]
fn an_abort_is_marked_and_sets_no_commit_timestamp() {
    let mut abort = record(rmgr::XACT, info::ABORT, 9i64.to_le_bytes().to_vec());
    abort.xid = 5;
    let mut page = [0; PAGE_BYTES];
    redo_slru_page(&mut page, SlruKind::Clog, 0, &abort).expect("applies");
    assert_eq!(status(&page, 5), 2);
    assert!(redo_slru_page(&mut page, SlruKind::CommitTs, 0, &abort).is_err());
}

#[test]
fn commit_timestamps_are_ten_bytes_each_and_only_when_tracked() {
    let mut commit = record(rmgr::XACT, info::COMMIT, 0x0102_0304i64.to_le_bytes().to_vec());
    commit.xid = 820;
    let mut checkpoint = CheckPoint::from_bytes(&[0; 88]).expect("88 bytes");
    assert_eq!(commit_ts_changes(&commit, &checkpoint), Ok(ChangeList::new()));
    checkpoint.oldest_commit_ts_xid = 3;
    let change = Change::SlruPage { slru: SlruKind::CommitTs, page: 1, will_init: false };
    assert_eq!(commit_ts_changes(&commit, &checkpoint), Ok(smallvec::smallvec![change]));
    let mut page = [0; PAGE_BYTES];
    redo_slru_page(&mut page, SlruKind::CommitTs, 1, &commit).expect("applies");
    assert_eq!(page[10..20], [4, 3, 2, 1, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_multixact_writes_its_members_and_the_next_ones_offset() {
    // The last multixact of an offsets page, its members over two members pages (1636 members in a page).
    let data = words(&[2047, 1635, 2, 100, 4, 101, 5]);
    let create = record(rmgr::MULTIXACT, multixact::CREATE_ID, data);
    let page = |slru, page| Change::SlruPage { slru, page, will_init: false };
    let (offsets, members) = (SlruKind::MultiXactOffsets, SlruKind::MultiXactMembers);
    assert_eq!(
        changes(&create).expect("known")[..],
        [page(offsets, 0), page(offsets, 1), page(members, 0), page(members, 1)]
    );
    let mut bytes = [0; PAGE_BYTES];
    redo_slru_page(&mut bytes, offsets, 0, &create).expect("applies");
    assert_eq!(bytes[8188..], 1635u32.to_le_bytes());
    let mut bytes = [0; PAGE_BYTES];
    redo_slru_page(&mut bytes, offsets, 1, &create).expect("applies");
    assert_eq!(bytes[..4], 1637u32.to_le_bytes());
    let mut bytes = [0; PAGE_BYTES];
    redo_slru_page(&mut bytes, members, 0, &create).expect("applies");
    // The last of 409 groups of 20 bytes, its last member.
    assert_eq!(bytes[8160..8180], [0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 100, 0, 0, 0]);
    let mut bytes = [0; PAGE_BYTES];
    redo_slru_page(&mut bytes, members, 1, &create).expect("applies");
    assert_eq!(bytes[..8], [5, 0, 0, 0, 101, 0, 0, 0]);
}

#[test]
fn the_last_multixact_and_the_last_member_are_followed_by_the_first() {
    // Its members are the last two there can be and, round the end, number 0.
    let data = words(&[u32::MAX, u32::MAX - 1, 3, 100, 4, 101, 5, 102, 1]);
    let create = record(rmgr::MULTIXACT, multixact::CREATE_ID, data);
    let (last_offsets, last_members) = (u32::MAX / 2048, u32::MAX / 1636);
    let page = |slru, page| Change::SlruPage { slru, page, will_init: false };
    let expected = [
        page(SlruKind::MultiXactOffsets, last_offsets),
        page(SlruKind::MultiXactOffsets, 0),
        page(SlruKind::MultiXactMembers, last_members),
        page(SlruKind::MultiXactMembers, 0),
    ];
    assert_eq!(changes(&create).expect("known")[..], expected);
    let redone = |slru, number| {
        let mut page = [0; PAGE_BYTES];
        redo_slru_page(&mut page, slru, number, &create).expect("applies");
        page
    };
    let offset = |page: &[u8; PAGE_BYTES], index: usize| {
        u32::from_le_bytes(page[index * 4..index * 4 + 4].try_into().expect("four bytes"))
    };
    assert_eq!(offset(&redone(SlruKind::MultiXactOffsets, last_offsets), 2047), u32::MAX - 1);
    // Multixact 0 is never handed out: the next is 1, and its members start at 1.
    let first = redone(SlruKind::MultiXactOffsets, 0);
    assert_eq!((offset(&first, 0), offset(&first, 1)), (0, 1));
    // A group is four flag bytes and four transaction ids.
    let first = redone(SlruKind::MultiXactMembers, 0);
    assert_eq!((first[0], offset(&first, 1), offset(&first, 2)), (1, 102, 0));
}

#[test]
fn a_multixact_that_claims_more_members_than_it_has_is_refused() {
    let create = record(rmgr::MULTIXACT, multixact::CREATE_ID, words(&[1, 1, u32::MAX, 100, 4]));
    assert!(changes(&create).is_err());
    assert!(redo_slru_page(&mut [0; PAGE_BYTES], SlruKind::MultiXactOffsets, 0, &create).is_err());
}

#[test]
fn a_page_is_zeroed() {
    let zero = record(rmgr::CLOG, clog::ZEROPAGE, words(&[4]));
    assert_eq!(
        changes(&zero).expect("known")[..],
        [Change::SlruPage { slru: SlruKind::Clog, page: 4, will_init: true }]
    );
    let mut page = [1; PAGE_BYTES];
    assert!(redo_slru_page(&mut page, SlruKind::Clog, 3, &zero).is_err());
    redo_slru_page(&mut page, SlruKind::Clog, 4, &zero).expect("applies");
    assert_eq!(page, [0; PAGE_BYTES]);
}

#[test]
fn truncation_removes_whole_segments_before_the_cutoff() {
    for slru in SlruKind::ALL {
        assert!(truncation_removes(slru, 0, 32), "{slru:?}");
        assert!(truncation_removes(slru, 1, 70), "{slru:?}");
        assert!(!truncation_removes(slru, 0, 31), "{slru:?}");
        assert!(!truncation_removes(slru, 2, 70), "{slru:?}");
    }
    // Transaction ids go round: page 131071 is the last, and comes before page 0.
    assert!(truncation_removes(SlruKind::Clog, 131_071 / 32, 0));
    assert!(!truncation_removes(SlruKind::Clog, 0, 131_071));
}
