//! Compressed posting lists of GIN (`access/gin/ginpostinglist.c`): one heap pointer, then differences as varbytes.

use super::{fault::Fault, tuple::item_pointer};

/// `MaxHeapTuplesPerPageBits`: the offset number's share of a pointer packed into an integer.
const OFFSET_BITS: u32 = 11;
/// `offsetof(GinPostingList, bytes)`: the first pointer and `nbytes`.
const HEADER_BYTES: usize = 8;
/// `MaxBytesPerInteger`.
const MAX_VARBYTES: usize = 7;

/// Bytes of the segment at the front of the data, padding included (`SizeOfGinPostingList`).
pub(super) fn segment_bytes(data: &[u8]) -> Result<usize, Fault> {
    let field = data.get(6..8).ok_or("a posting list segment is shorter than its header")?;
    let bytes = HEADER_BYTES + usize::from(u16::from_le_bytes([field[0], field[1]])).next_multiple_of(2);
    if bytes > data.len() { Err("a posting list segment is longer than its page".into()) } else { Ok(bytes) }
}

/// A pointer of 6 bytes as an integer that sorts like it.
fn pack(pointer: &[u8]) -> u64 {
    let part = |at: usize| u64::from(u16::from_le_bytes([pointer[at], pointer[at + 1]]));
    (part(0) << 16 | part(2)) << OFFSET_BITS | part(4)
}

/// Pointers of 6 bytes each, packed.
pub(super) fn pack_all(pointers: &[u8]) -> Vec<u64> {
    pointers.chunks_exact(6).map(pack).collect()
}

/// The pointers of one segment, packed.
pub(super) fn decode(segment: &[u8]) -> Result<Vec<u64>, Fault> {
    segment_bytes(segment)?;
    let mut value = pack(segment);
    let mut pointers = vec![value];
    let len = usize::from(u16::from_le_bytes([segment[6], segment[7]]));
    let mut bytes = segment[HEADER_BYTES..HEADER_BYTES + len].iter();
    while let Some(first) = bytes.next() {
        let (mut delta, mut byte, mut shift) = (u64::from(first & 0x7F), *first, 0);
        while byte & 0x80 != 0 {
            shift += 7;
            byte = *bytes.next().ok_or("a posting list ends inside of a number")?;
            if shift / 7 >= MAX_VARBYTES {
                return Err("a posting list holds a number that is too large".into());
            }
            delta |= u64::from(byte & 0x7F) << shift;
        }
        value = value.wrapping_add(delta);
        pointers.push(value);
    }
    Ok(pointers)
}

/// One segment of these ascending packed pointers (`ginCompressPostingList`).
pub(super) fn encode(pointers: &[u64]) -> Result<Vec<u8>, Fault> {
    let (first, rest) = pointers.split_first().ok_or("a posting list without pointers")?;
    let mut segment = item_pointer((first >> OFFSET_BITS) as u32, (first & ((1 << OFFSET_BITS) - 1)) as u16).to_vec();
    segment.extend([0, 0]);
    let mut previous = *first;
    for pointer in rest {
        let mut delta = pointer.checked_sub(previous).ok_or("pointers of a posting list are not ascending")?;
        while delta > 0x7F {
            segment.push(0x80 | (delta & 0x7F) as u8);
            delta >>= 7;
        }
        segment.push(delta as u8);
        previous = *pointer;
    }
    let len = u16::try_from(segment.len() - HEADER_BYTES).map_err(|_| "a posting list does not fit into a page")?;
    segment[6..8].copy_from_slice(&len.to_le_bytes());
    if len % 2 != 0 {
        segment.push(0);
    }
    Ok(segment)
}

/// Both lists in one, what is in both only once (`ginMergeItemPointers`).
pub(super) fn merge(one: &[u64], other: &[u64]) -> Vec<u64> {
    let mut merged = Vec::with_capacity(one.len() + other.len());
    merged.extend_from_slice(one);
    merged.extend_from_slice(other);
    merged.sort_unstable();
    merged.dedup();
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_come_back_from_their_encoding() {
        let pointers: Vec<u64> = [1, 2, 130, 20_000, 20_001, 1 << 30, (u64::from(u32::MAX) << 11) | 5].to_vec();
        let segment = encode(&pointers).expect("encodes");
        assert_eq!(segment.len() % 2, 0);
        assert_eq!(segment_bytes(&segment).expect("whole"), segment.len());
        assert_eq!(decode(&segment).expect("decodes"), pointers);
        assert_eq!(merge(&[1, 5, 9], &[2, 5, 10]), [1, 2, 5, 9, 10]);
    }

    #[test]
    fn damage_is_an_error() {
        assert!(segment_bytes(&[0; 7]).is_err() && segment_bytes(&[0, 0, 0, 0, 1, 0, 9, 0]).is_err());
        assert!(decode(&[0, 0, 0, 0, 1, 0, 2, 0, 0x80, 0x80]).is_err());
        assert!(decode(&[0, 0, 0, 0, 1, 0, 8, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 1]).is_err());
        assert!(encode(&[]).is_err() && encode(&[5, 4]).is_err());
    }
}
