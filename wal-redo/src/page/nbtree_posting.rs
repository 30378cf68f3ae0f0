//! Posting lists: B-tree leaf tuples that hold many heap pointers for one key (`access/nbtree/nbtdedup.c`).
//!
//! In such a tuple `t_info` has [`ALT_TID`], the pointer's offset number holds [`IS_POSTING`] and the count, and its
//! block number the place of the list in the tuple.

use super::{
    fault::Fault,
    index_tuple::{self, SIZE_MASK, TID_BYTES},
    page_ops::maxalign,
    tuple::item_pointer,
};

/// `INDEX_ALT_TID_MASK` in `t_info`.
pub(super) const ALT_TID: u16 = 0x2000;
/// `BT_IS_POSTING` in the pointer's offset number.
const IS_POSTING: u16 = 0x2000;
/// `BT_OFFSET_MASK`.
const COUNT_MASK: u16 = 0x0FFF;

fn is_posting(tuple: &[u8]) -> Result<bool, Fault> {
    Ok(index_tuple::info(tuple)? & ALT_TID != 0 && index_tuple::offset_number(tuple)? & IS_POSTING != 0)
}

/// Where the list starts in the tuple; for a plain tuple, its size.
fn key_bytes(tuple: &[u8]) -> Result<usize, Fault> {
    let bytes = if is_posting(tuple)? { index_tuple::block(tuple)? as usize } else { index_tuple::size(tuple)? };
    if bytes < index_tuple::HEADER_BYTES || bytes > tuple.len() {
        return Err(format!("the key of an index tuple ends at {bytes} of {} bytes", tuple.len()).into());
    }
    Ok(bytes)
}

/// The tuple's heap pointers, one or many, of 6 bytes each.
pub(super) fn pointers(tuple: &[u8]) -> Result<&[u8], Fault> {
    let own = tuple.get(..TID_BYTES).ok_or("an index tuple is shorter than its header")?;
    if !is_posting(tuple)? {
        return Ok(own);
    }
    let start = key_bytes(tuple)?;
    let count = usize::from(index_tuple::offset_number(tuple)? & COUNT_MASK);
    tuple.get(start..start + count * TID_BYTES).ok_or_else(|| "a posting list is longer than its tuple".into())
}

/// A tuple with the base's key and these pointers: plain for one, a posting list for more (`_bt_form_posting`).
pub(super) fn form(base: &[u8], pointers: &[u8]) -> Result<Vec<u8>, Fault> {
    let key_bytes = key_bytes(base)?;
    let count = pointers.len() / TID_BYTES;
    let size = if count > 1 { maxalign(key_bytes + pointers.len()) } else { key_bytes };
    if count == 0 || count > usize::from(COUNT_MASK) || size > usize::from(SIZE_MASK) {
        return Err(format!("a posting list of {count} pointers").into());
    }
    let mut tuple = base[..key_bytes].to_vec();
    tuple.resize(size, 0);
    let other_info = index_tuple::info(base)? & !SIZE_MASK;
    let info = if count > 1 {
        tuple[..TID_BYTES].copy_from_slice(&item_pointer(key_bytes as u32, count as u16 | IS_POSTING));
        tuple[key_bytes..key_bytes + pointers.len()].copy_from_slice(pointers);
        other_info | ALT_TID
    } else {
        tuple[..TID_BYTES].copy_from_slice(pointers);
        other_info & !ALT_TID
    };
    tuple[6..8].copy_from_slice(&(info | size as u16).to_le_bytes());
    Ok(tuple)
}

/// The tuple without the pointers at these ascending places of its list (`_bt_update_posting`).
pub(super) fn without(tuple: &[u8], removed: &[u16]) -> Result<Vec<u8>, Fault> {
    if !is_posting(tuple)? {
        return Err("pointers are removed from a tuple that is not a posting list".into());
    }
    let mut removed = removed.iter().copied().peekable();
    let mut kept = Vec::new();
    for (place, pointer) in (0u16..).zip(pointers(tuple)?.chunks_exact(TID_BYTES)) {
        if removed.next_if_eq(&place).is_none() {
            kept.extend_from_slice(pointer);
        }
    }
    if removed.next().is_some() {
        return Err("pointers are removed that a posting list does not have".into());
    }
    form(tuple, &kept)
}

/// The new tuple's pointer goes into the list at `place`, and the list's last one into the new tuple; returns the
/// changed list tuple (`_bt_swap_posting`).
pub(super) fn swap(new_item: &mut [u8], posting: &[u8], place: u16) -> Result<Vec<u8>, Fault> {
    let list = pointers(posting)?;
    let (place, count) = (usize::from(place), list.len() / TID_BYTES);
    if !is_posting(posting)? || place == 0 || place >= count || new_item.len() < TID_BYTES {
        return Err(format!("a posting list of {count} pointers cannot be split at {place}").into());
    }
    let start = key_bytes(posting)?;
    let (at, last) = (start + place * TID_BYTES, start + (count - 1) * TID_BYTES);
    let mut changed = posting.to_vec();
    changed.copy_within(at..last, at + TID_BYTES);
    changed[at..at + TID_BYTES].copy_from_slice(&new_item[..TID_BYTES]);
    new_item[..TID_BYTES].copy_from_slice(&posting[last..last + TID_BYTES]);
    Ok(changed)
}
