//! `redo_page` on records made by hand: what is asked of every kind. `tests/consistency.rs` compares the rest with Postgres.

use smallvec::smallvec;
use types::{ForkNumber, PAGE_BYTES, PageTag};
use wal::v15::{
    heap::{INIT_PAGE, INSERT, vm},
    rmgr,
};

use super::*;
use crate::test_record::{REL, block, record, words};

const TAG: PageTag = PageTag { rel: REL, block: 3 };

/// An insertion of a tuple of 5 bytes as the page's first, which clears the page's bits in the visibility map.
fn insertion(block_data: &'static [u8]) -> DecodedRecord<'static> {
    let mut insertion = record(rmgr::HEAP, INSERT | INIT_PAGE, vec![1, 0, 1]);
    insertion.xid = 700;
    insertion.blocks = smallvec![BlockRef { will_init: true, data: block_data, ..block(0, TAG.block) }];
    insertion
}

#[test]
fn an_insertion_makes_the_page_and_its_tuple() {
    let mut page = [0xEE; PAGE_BYTES];
    redo_page(&mut page, &TAG, &insertion(&[1, 0, 0, 8, 24, 0, 7, 7, 7, 7])).expect("applies");
    assert_eq!(page[0..8], [0, 0, 0, 0, 0, 2, 0, 0], "the LSN is the record's end");
    let tuple = &Page::new(&mut page).item(1).expect("stored").to_vec();
    assert_eq!(tuple[0..4], 700u32.to_le_bytes());
    assert_eq!(tuple[12..], [0, 0, 3, 0, 1, 0, 1, 0, 0, 8, 24, 0, 7, 7, 7, 7]);
}

#[test]
fn clearing_bits_of_the_visibility_map_keeps_its_lsn() {
    let map_tag = PageTag { rel: REL.with_fork(ForkNumber::Vm), block: 0 };
    let mut page = [0; PAGE_BYTES];
    Page::new(&mut page).init(0);
    page[24..].fill(0xFF);
    let before = page;
    redo_page(&mut page, &map_tag, &insertion(&[])).expect("applies");
    let changed: Vec<usize> = (0..PAGE_BYTES).filter(|at| page[*at] != before[*at]).collect();
    assert_eq!((changed, page[24]), (vec![24], 0x3F));
}

#[test]
fn a_truncation_clears_the_rest_of_the_maps_last_page() {
    let map_rel = REL.with_fork(ForkNumber::Vm);
    let blocks = vm::HEAP_BLOCKS_PER_PAGE + 5;
    let truncation = record(rmgr::SMGR, 0x20, words(&[blocks, REL.spc, REL.db, REL.rel, 7]));
    let mut page = [0; PAGE_BYTES];
    Page::new(&mut page).init(0);
    page[24..].fill(0xFF);
    redo_page(&mut page, &PageTag { rel: map_rel, block: 1 }, &truncation).expect("applies");
    assert_eq!(page[24..27], [0xFF, 0x03, 0]);
    assert!(page[27..].iter().all(|byte| *byte == 0));
    let other = PageTag { rel: map_rel, block: 0 };
    assert!(matches!(redo_page(&mut page, &other, &truncation), Err(RedoError::NotTouched { .. })));
}

#[test]
fn errors_name_page_record_and_reason() {
    let mut page = [0; PAGE_BYTES];
    let short = redo_page(&mut page, &TAG, &insertion(&[1, 0])).expect_err("cut short").to_string();
    assert_eq!(
        short,
        "cannot apply the Heap record 0x80 at 0/100 (end 0/200) to page 1663/5/16384 block 3: the record's data is \
         shorter than its contents need"
    );
    let elsewhere = PageTag { block: 4, ..TAG };
    let error = redo_page(&mut page, &elsewhere, &insertion(&[])).expect_err("another page").to_string();
    assert_eq!(error, "the Heap record 0x80 at 0/100 (end 0/200) does not change page 1663/5/16384 block 4");
    let mut custom = record(wal::RmgrId(200), 0, Vec::new());
    custom.blocks = smallvec![block(0, TAG.block)];
    let error = redo_page(&mut page, &TAG, &custom).expect_err("an extension's").to_string();
    assert!(error.ends_with("this resource manager's redo is not implemented"), "{error}");
}
