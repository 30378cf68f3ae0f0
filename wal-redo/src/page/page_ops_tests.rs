//! What the page operations do at their edges; Postgres itself checks the rest (`tests/consistency.rs`).

use super::*;

fn with_items(count: u8) -> [u8; PAGE_BYTES] {
    let mut bytes = [0; PAGE_BYTES];
    let mut page = Page::new(&mut bytes);
    page.init(16);
    for number in 1..=count {
        page.add_item(&[number; 20], Place::Shifting(number.into())).expect("fits");
    }
    bytes
}

fn contents(page: &Page<'_>) -> Vec<u8> {
    (1..=page.max_offset()).map(|number| page.item(number).expect("stored")[0]).collect()
}

#[test]
fn items_are_put_in_between_and_taken_out() {
    let mut bytes = with_items(6);
    let mut page = Page::new(&mut bytes);
    page.add_item(&[9; 5], Place::Shifting(2)).expect("fits");
    assert_eq!(contents(&page), [1, 9, 2, 3, 4, 5, 6]);
    page.index_tuple_delete(1).expect("deletes");
    page.index_multi_delete(&[2, 4, 5]).expect("deletes");
    assert_eq!(contents(&page), [9, 3, 6]);
    page.index_tuple_overwrite(2, &[7; 40]).expect("overwrites");
    assert_eq!(contents(&page), [9, 7, 6]);
    assert_eq!(page.upper(), page.special() - 8 - 40 - 24);
    page.index_tuple_delete_no_compact(1).expect("deletes");
    assert_eq!((page.max_offset(), page.item_id(1).expect("there").state()), (3, LineState::Unused));
}

#[test]
fn an_item_that_stays_in_its_place_still_gets_its_new_number() {
    let mut bytes = [0; PAGE_BYTES];
    let mut page = Page::new(&mut bytes);
    page.init(16);
    // The first one added lies at the page's end, and comes last.
    for value in 1..=6 {
        page.add_item(&[value; 20], Place::Shifting(1)).expect("fits");
    }
    page.index_multi_delete(&[1, 2, 3, 5]).expect("deletes");
    assert_eq!(contents(&page), [3, 1]);
    page.index_tuple_delete(1).expect("deletes");
    assert_eq!((contents(&page), page.upper()), (vec![1], page.special() - 24));
    for value in 2..=5 {
        page.add_item(&[value; 20], Place::Shifting(1)).expect("fits");
    }
    page.index_multi_delete(&[1, 2, 3, 4]).expect("deletes");
    assert_eq!((contents(&page), page.upper()), (vec![1], page.special() - 24));
}

#[test]
fn heap_pages_lose_unused_line_pointers_at_their_end() {
    let mut bytes = with_items(5);
    let mut page = Page::new(&mut bytes);
    for number in [2, 4, 5] {
        page.set_item_id(number, ItemId::UNUSED).expect("there");
    }
    page.repair_fragmentation().expect("packs");
    assert_eq!((page.max_offset(), page.flags() & HAS_FREE_LINES), (3, HAS_FREE_LINES));
    assert_eq!(page.upper(), page.special() - 48);
    page.set_item_id(1, ItemId::UNUSED).expect("there");
    page.set_item_id(3, ItemId::UNUSED).expect("there");
    page.truncate_line_pointers().expect("truncates");
    assert_eq!((page.max_offset(), page.flags() & HAS_FREE_LINES), (1, HAS_FREE_LINES));
    page.add_item(&[3; 8], Place::Heap(1)).expect("fits");
    assert_eq!(contents(&page), [3]);
}

#[test]
fn nothing_outside_of_a_page_is_touched() {
    let mut bytes = with_items(3);
    let mut page = Page::new(&mut bytes);
    assert!(page.item(0).is_err() && page.item(4).is_err());
    assert!(page.add_item(&[0; 8], Place::Shifting(5)).is_err());
    assert!(page.add_item(&[0; 8190], Place::Shifting(4)).is_err());
    assert!(page.index_multi_delete(&[3, 2, 1]).is_err());
    page.set_item_id(1, ItemId::normal(8184, 100)).expect("there");
    assert!(page.item(1).is_err() && page.index_tuple_delete(1).is_err() && page.repair_fragmentation().is_err());
    page.set_lower(9000);
    assert!(page.add_item(&[0; 8], Place::Shifting(1)).is_err() && page.truncate_line_pointers().is_err());
    let mut new = [0; PAGE_BYTES];
    assert!(Page::new(&mut new).add_item(&[0; 8], Place::Heap(1)).is_err());
}

#[test]
fn transaction_ids_wrap_around() {
    assert!(xid_precedes(u32::MAX - 5, 10) && !xid_precedes(10, u32::MAX - 5));
    assert!(xid_precedes(2, 3) && xid_precedes(2, u32::MAX));
}
