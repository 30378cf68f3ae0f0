//! What may differ between a page of the primary and the same page after redo, blotted out on both: the functions by
//! which Postgres's own consistency check masks pages (`access/common/bufmask.c` and each resource manager's `_mask`).

use types::PAGE_BYTES;
use wal::{RmgrId, v15::rmgr};

type Page = [u8; PAGE_BYTES];

const HEADER_BYTES: usize = 24;

fn u16_at(page: &Page, at: usize) -> u16 {
    u16::from_le_bytes([page[at], page[at + 1]])
}

fn and_u16(page: &mut Page, at: usize, mask: u16) {
    let masked = u16_at(page, at) & mask;
    page[at..at + 2].copy_from_slice(&masked.to_le_bytes());
}

fn lower(page: &Page) -> usize {
    u16_at(page, 12).into()
}

fn upper(page: &Page) -> usize {
    u16_at(page, 14).into()
}

fn special(page: &Page) -> usize {
    usize::from(u16_at(page, 16)).min(PAGE_BYTES - 16)
}

fn line_pointers(page: &Page) -> impl Iterator<Item = usize> + use<> {
    (HEADER_BYTES..lower(page).min(PAGE_BYTES - 3)).step_by(4)
}

fn line_pointer(page: &Page, at: usize) -> (usize, u8, usize) {
    let bits = u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
    ((bits & 0x7FFF) as usize, (bits >> 15 & 3) as u8, (bits >> 17) as usize)
}

fn lsn_and_checksum(page: &mut Page) {
    page[0..10].fill(0);
}

/// `pd_prune_xid`, and all of `pd_flags`' hints.
fn hint_bits(page: &mut Page) {
    page[20..24].fill(0);
    and_u16(page, 10, !0x0007);
}

/// What lies between `pd_lower` and `pd_upper`.
pub fn hole(page: &mut Page) {
    let (lower, upper) = (lower(page), upper(page));
    if (HEADER_BYTES..=upper).contains(&lower) && upper <= PAGE_BYTES {
        page[lower..upper].fill(0);
    }
}

fn line_pointer_flags(page: &mut Page) {
    for at in line_pointers(page) {
        // lp_flags: the top bit of the second byte and the lowest of the third.
        page[at + 1] &= 0x7F;
        page[at + 2] &= 0xFE;
    }
}

fn content(page: &mut Page) {
    page[HEADER_BYTES..].fill(0);
    page[12..16].fill(0);
}

/// `heap_mask`: command ids, hint bits of tuples, padding behind tuples.
fn heap(page: &mut Page, block: u32) {
    hint_bits(page);
    hole(page);
    for (number, at) in (1u16..).zip(line_pointers(page)) {
        let (offset, state, len) = line_pointer(page, at);
        if len == 0 || offset + len > PAGE_BYTES {
            continue;
        }
        if state == 1 && len >= 23 {
            let infomask = u16_at(page, offset + 20);
            and_u16(page, offset + 20, if infomask & 0x0300 != 0x0300 { !0xFFF0 } else { !0x0C00 });
            page[offset + 8..offset + 12].fill(0);
            if u16_at(page, offset + 16) == 0xFFFE {
                page[offset + 12..offset + 14].copy_from_slice(&((block >> 16) as u16).to_le_bytes());
                page[offset + 14..offset + 16].copy_from_slice(&(block as u16).to_le_bytes());
                page[offset + 16..offset + 18].copy_from_slice(&number.to_le_bytes());
            }
        }
        let end = (offset + len.next_multiple_of(8)).min(PAGE_BYTES);
        page[offset + len..end].fill(0);
    }
}

/// The bits of heap tuples that say whether their transactions are known to have ended, and of the page that it may be
/// worth pruning: readers set them without WAL.
pub fn heap_hints(page: &mut Page) {
    page[20..24].fill(0);
    // PD_HAS_FREE_LINES and PD_PAGE_FULL; PD_ALL_VISIBLE is no hint.
    and_u16(page, 10, !0x0003);
    for at in line_pointers(page) {
        let (offset, state, len) = line_pointer(page, at);
        if state == 1 && len >= 23 && offset + len <= PAGE_BYTES {
            let infomask = u16_at(page, offset + 20);
            and_u16(page, offset + 20, if infomask & 0x0300 != 0x0300 { !0x0F00 } else { !0x0C00 });
        }
    }
}

fn btree(page: &mut Page) {
    hint_bits(page);
    hole(page);
    let flags = special(page) + 12;
    if u16_at(page, flags) & 0x0001 != 0 {
        line_pointer_flags(page);
    }
    and_u16(page, flags, !0x0060);
    and_u16(page, flags + 2, 0);
}

fn hash(page: &mut Page) {
    hint_bits(page);
    hole(page);
    let flags = special(page) + 12;
    match u16_at(page, flags) & 0x000F {
        0 => {
            content(page);
            return;
        }
        1 | 2 => line_pointer_flags(page),
        _bitmap_or_meta => {}
    }
    and_u16(page, flags, !0x0080);
}

fn gin(page: &mut Page) {
    hint_bits(page);
    let flags = usize::from(u16_at(page, 16)).min(PAGE_BYTES - 8) + 6;
    if u16_at(page, flags) & 0x0004 != 0 {
        content(page);
    } else if lower(page) > HEADER_BYTES {
        hole(page);
    }
}

/// `F_TUPLES_DELETED` of a GiST page: 15.18 sets it, 15.20 no longer does, the library doesn't, and nothing in Postgres reads it.
pub fn gist_tuples_deleted(page: &mut Page) {
    and_u16(page, special(page) + 12, !0x0004);
}

fn gist(page: &mut Page) {
    hint_bits(page);
    hole(page);
    let special = special(page);
    page[special..special + 8].fill(0);
    if u16_at(page, special + 12) & 0x0001 != 0 {
        line_pointer_flags(page);
    }
    and_u16(page, special + 12, !0x0018);
    gist_tuples_deleted(page);
}

fn spgist(page: &mut Page) {
    hint_bits(page);
    if lower(page) >= HEADER_BYTES {
        hole(page);
    }
}

fn brin(page: &mut Page) {
    hint_bits(page);
    let kind = u16_at(page, PAGE_BYTES - 2);
    if kind == 0xF093 || (kind == 0xF091 && lower(page) > HEADER_BYTES) {
        hole(page);
    }
    and_u16(page, PAGE_BYTES - 4, !0x0001);
}

/// Masks a page as the resource manager that changed it does.
pub fn mask(page: &mut Page, rmgr: RmgrId, block: u32) {
    if upper(page) == 0 {
        return;
    }
    lsn_and_checksum(page);
    match rmgr {
        rmgr::HEAP | rmgr::HEAP2 => heap(page, block),
        rmgr::BTREE => btree(page),
        rmgr::HASH => hash(page),
        rmgr::GIN => gin(page),
        rmgr::GIST => gist(page),
        rmgr::SEQ | rmgr::GENERIC => hole(page),
        rmgr::SPGIST => spgist(page),
        rmgr::BRIN => brin(page),
        _without_a_mask => {}
    }
}

/// Masks a visibility map's page: unlike Postgres, whose mask covers all of the map, only its LSN.
pub fn mask_visibility_map(page: &mut Page) {
    lsn_and_checksum(page);
}
