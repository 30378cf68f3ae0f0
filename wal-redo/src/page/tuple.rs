//! The header of a heap tuple (`HeapTupleHeaderData` in `access/htup_details.h`), read and changed in place.

use std::ops::Range;

use types::BlockNumber;
use wal::v15::heap::infobits;

use super::{
    cursor::Cursor,
    fault::Fault,
    page_ops::{LineState, Page, Place},
};

/// `SizeofHeapTupleHeader`: the fixed part, before the null bitmap.
pub(super) const HEADER_BYTES: usize = 23;
/// `MaxHeapTupleSize`.
const MAX_BYTES: usize = 8160;

const AT_XMIN: usize = 0;
const AT_XMAX: usize = 4;
const AT_FIELD3: usize = 8;
const AT_CTID: usize = 12;
const AT_INFOMASK2: usize = 18;
const AT_INFOMASK: usize = 20;
const AT_HOFF: usize = 22;

/// Bits of `t_infomask`.
pub(super) mod infomask {
    pub(crate) const XMAX_KEYSHR_LOCK: u16 = 0x0010;
    pub(crate) const COMBOCID: u16 = 0x0020;
    pub(crate) const XMAX_EXCL_LOCK: u16 = 0x0040;
    pub(crate) const XMAX_LOCK_ONLY: u16 = 0x0080;
    pub(crate) const XMAX_COMMITTED: u16 = 0x0400;
    pub(crate) const XMAX_INVALID: u16 = 0x0800;
    pub(crate) const XMAX_IS_MULTI: u16 = 0x1000;
    /// `HEAP_MOVED`: either half of an old `VACUUM FULL`'s move.
    pub(crate) const MOVED: u16 = 0xC000;
    /// `HEAP_LOCK_MASK`.
    pub(crate) const LOCK_MASK: u16 = XMAX_KEYSHR_LOCK | XMAX_EXCL_LOCK;
    /// `HEAP_XMAX_BITS`.
    pub(crate) const XMAX_BITS: u16 = XMAX_COMMITTED | XMAX_INVALID | XMAX_IS_MULTI | LOCK_MASK | XMAX_LOCK_ONLY;
}

/// Bits of `t_infomask2`.
pub(super) mod infomask2 {
    pub(crate) const KEYS_UPDATED: u16 = 0x2000;
    pub(crate) const HOT_UPDATED: u16 = 0x4000;
}

/// An item pointer (`ItemPointerData`): block, then offset number.
pub(super) fn item_pointer(block: BlockNumber, offset_number: u16) -> [u8; 6] {
    let (high, low) = (((block >> 16) as u16).to_le_bytes(), (block as u16).to_le_bytes());
    let number = offset_number.to_le_bytes();
    [high[0], high[1], low[0], low[1], number[0], number[1]]
}

/// The `t_ctid` of a row that an update moved to another partition (`ItemPointerSetMovedPartitions`).
pub(super) const MOVED_PARTITIONS: [u8; 6] = [0xFF, 0xFF, 0xFF, 0xFF, 0xFD, 0xFF];

/// A tuple on a page.
pub(super) struct Tuple<'t> {
    bytes: &'t mut [u8],
}

impl<'t> Tuple<'t> {
    /// The tuple of a normal line pointer, its header wholly there.
    pub(super) fn on_page<'p>(page: &'t mut Page<'p>, offset_number: u16) -> Result<Tuple<'t>, Fault> {
        if page.item_id(offset_number)?.state() != LineState::Normal {
            return Err(format!("line pointer {offset_number} is not a normal one").into());
        }
        let range = page.item_range(offset_number)?;
        let bytes = page.slice_mut(range)?;
        if bytes.len() < HEADER_BYTES {
            return Err(format!("tuple {offset_number} is shorter than a tuple header").into());
        }
        Ok(Tuple { bytes })
    }

    fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn set_u16_at(&mut self, at: usize, value: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn set_u32_at(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    pub(super) fn infomask(&self) -> u16 {
        self.u16_at(AT_INFOMASK)
    }

    pub(super) fn set_infomask(&mut self, bits: u16) {
        self.set_u16_at(AT_INFOMASK, bits);
    }

    pub(super) fn set_infomask2(&mut self, bits: u16) {
        self.set_u16_at(AT_INFOMASK2, bits);
    }

    /// Where the user's data starts in the tuple; errors when that is not inside it.
    pub(super) fn data_offset(&self) -> Result<usize, Fault> {
        let hoff = usize::from(self.bytes[AT_HOFF]);
        if hoff < HEADER_BYTES || hoff > self.bytes.len() {
            return Err(format!("t_hoff {hoff} is not inside the tuple").into());
        }
        Ok(hoff)
    }

    /// The user's data.
    pub(super) fn data_mut(&mut self) -> Result<&mut [u8], Fault> {
        let hoff = self.data_offset()?;
        Ok(&mut self.bytes[hoff..])
    }

    pub(super) fn set_xmin(&mut self, xid: u32) {
        self.set_u32_at(AT_XMIN, xid);
    }

    pub(super) fn set_xmax(&mut self, xid: u32) {
        self.set_u32_at(AT_XMAX, xid);
    }

    /// `HeapTupleHeaderSetXvac`.
    pub(super) fn set_xvac(&mut self, xid: u32) {
        self.set_u32_at(AT_FIELD3, xid);
    }

    /// `HeapTupleHeaderSetCmax(FirstCommandId, false)`: WAL carries no command ids.
    pub(super) fn reset_cmax(&mut self) {
        self.set_u32_at(AT_FIELD3, 0);
        self.set_infomask(self.infomask() & !infomask::COMBOCID);
    }

    pub(super) fn set_ctid(&mut self, pointer: [u8; 6]) {
        self.bytes[AT_CTID..AT_CTID + 6].copy_from_slice(&pointer);
    }

    pub(super) fn set_hot_updated(&mut self, on: bool) {
        let bits = self.u16_at(AT_INFOMASK2) & !infomask2::HOT_UPDATED;
        self.set_infomask2(if on { bits | infomask2::HOT_UPDATED } else { bits });
    }

    /// Replaces all that the masks say about xmax by what the record says: clears `HEAP_XMAX_BITS` and `HEAP_MOVED`,
    /// then `fix_infomask_from_infobits`.
    pub(super) fn replace_xmax_bits(&mut self, set: u8) {
        const MASK: [(u8, u16); 4] = [
            (infobits::XMAX_IS_MULTI, infomask::XMAX_IS_MULTI),
            (infobits::XMAX_LOCK_ONLY, infomask::XMAX_LOCK_ONLY),
            (infobits::XMAX_EXCL_LOCK, infomask::XMAX_EXCL_LOCK),
            (infobits::XMAX_KEYSHR_LOCK, infomask::XMAX_KEYSHR_LOCK),
        ];
        let kept = self.infomask() & !(infomask::XMAX_BITS | infomask::MOVED);
        let added = MASK.iter().filter(|(bit, _)| set & bit != 0).fold(0, |all, (_, mask)| all | mask);
        self.set_infomask(kept | added);
        let kept2 = self.u16_at(AT_INFOMASK2) & !infomask2::KEYS_UPDATED;
        let added2 = if set & infobits::KEYS_UPDATED != 0 { infomask2::KEYS_UPDATED } else { 0 };
        self.set_infomask2(kept2 | added2);
    }

    /// `HEAP_XMAX_IS_LOCKED_ONLY`.
    pub(super) fn xmax_is_locked_only(&self) -> bool {
        let bits = self.infomask();
        bits & infomask::XMAX_LOCK_ONLY != 0
            || bits & (infomask::XMAX_IS_MULTI | infomask::LOCK_MASK) == infomask::XMAX_EXCL_LOCK
    }
}

/// What a record keeps of a new tuple's header (`xl_heap_header`).
pub(super) struct NewTuple {
    pub(super) infomask2: u16,
    pub(super) infomask: u16,
    pub(super) hoff: u8,
}

impl NewTuple {
    pub(super) fn read(cursor: &mut Cursor<'_>) -> Result<NewTuple, Fault> {
        Ok(NewTuple { infomask2: cursor.u16()?, infomask: cursor.u16()?, hoff: cursor.u8()? })
    }

    /// Adds a tuple with a body (all behind the fixed header) of so many bytes, as redo makes it: command id 0. Where the body is to
    /// be written.
    pub(super) fn add_to(
        &self,
        page: &mut Page<'_>,
        offset_number: u16,
        body_bytes: usize,
        xmin: u32,
        xmax: u32,
        ctid: [u8; 6],
    ) -> Result<Range<usize>, Fault> {
        let bytes = HEADER_BYTES + body_bytes;
        if bytes > MAX_BYTES || usize::from(self.hoff) > bytes {
            return Err(format!("a tuple of {bytes} bytes with t_hoff {}", self.hoff).into());
        }
        let slot = page.add_slot(bytes, Place::Heap(offset_number))?;
        let body = slot.start + HEADER_BYTES..slot.end;
        let mut header = Tuple { bytes: page.slice_mut(slot)? };
        header.set_xmin(xmin);
        header.set_xmax(xmax);
        header.set_u32_at(AT_FIELD3, 0);
        header.set_ctid(ctid);
        header.set_infomask2(self.infomask2);
        header.set_infomask(self.infomask & !infomask::COMBOCID);
        header.bytes[AT_HOFF] = self.hoff;
        Ok(body)
    }
}
