//! The header of an index tuple (`IndexTupleData` in `access/itup.h`): a pointer of 6 bytes, then `t_info`.

use types::BlockNumber;

use super::{fault::Fault, page_ops::maxalign, tuple::item_pointer};

/// `sizeof(IndexTupleData)`.
pub(super) const HEADER_BYTES: usize = 8;
/// `INDEX_SIZE_MASK` of `t_info`.
pub(super) const SIZE_MASK: u16 = 0x1FFF;
/// `sizeof(ItemPointerData)`.
pub(super) const TID_BYTES: usize = 6;

/// `t_info`.
pub(super) fn info(tuple: &[u8]) -> Result<u16, Fault> {
    let bytes = tuple.get(6..8).ok_or("an index tuple is shorter than its header")?;
    Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
}

/// `IndexTupleSize`: the whole tuple's bytes, as it says itself; at least its header's.
pub(super) fn size(tuple: &[u8]) -> Result<usize, Fault> {
    let size = usize::from(info(tuple)? & SIZE_MASK);
    if size < HEADER_BYTES { Err(format!("an index tuple of {size} bytes").into()) } else { Ok(size) }
}

/// The tuple at the front of the data, its size rounded up to 8, and what follows it.
pub(super) fn split_first(data: &[u8]) -> Result<(&[u8], &[u8]), Fault> {
    let size = maxalign(size(data)?);
    data.split_at_checked(size).ok_or_else(|| "an index tuple is longer than the data that holds it".into())
}

/// All tuples of the data, each rounded up to 8 bytes.
pub(super) fn split_all(mut data: &[u8]) -> Result<Vec<&[u8]>, Fault> {
    let mut tuples = Vec::new();
    while !data.is_empty() {
        let (tuple, rest) = split_first(data)?;
        tuples.push(tuple);
        data = rest;
    }
    Ok(tuples)
}

/// Block number of the pointer at the tuple's start.
pub(super) fn block(tuple: &[u8]) -> Result<BlockNumber, Fault> {
    let bytes = tuple.get(0..4).ok_or("an index tuple is shorter than its header")?;
    Ok(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16 | u32::from(u16::from_le_bytes([bytes[2], bytes[3]])))
}

/// Offset number of the pointer at the tuple's start.
pub(super) fn offset_number(tuple: &[u8]) -> Result<u16, Fault> {
    let bytes = tuple.get(4..6).ok_or("an index tuple is shorter than its header")?;
    Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
}

/// Puts a block number into the pointer at the tuple's start, the offset number stays.
pub(super) fn set_block(tuple: &mut [u8], block: BlockNumber) -> Result<(), Fault> {
    let field = tuple.get_mut(0..4).ok_or("an index tuple is shorter than its header")?;
    field.copy_from_slice(&item_pointer(block, 0)[..4]);
    Ok(())
}
