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
    header: &'t mut [u8; HEADER_BYTES],
    /// All behind the fixed header.
    body: &'t mut [u8],
}

impl<'t> Tuple<'t> {
    /// The tuple of a normal line pointer, its header wholly there.
    pub(super) fn on_page<'p>(page: &'t mut Page<'p>, offset_number: u16) -> Result<Tuple<'t>, Fault> {
        let id = page.item_id(offset_number)?;
        if id.state() != LineState::Normal {
            return Err(not_normal(offset_number));
        }
        let range = page.storage_of(offset_number, id)?;
        Tuple::at(page, range).ok_or_else(|| too_short(offset_number))
    }

    fn at<'p>(page: &'t mut Page<'p>, range: Range<usize>) -> Option<Tuple<'t>> {
        let (header, body) = page.bytes_mut().get_mut(range)?.split_first_chunk_mut()?;
        Some(Tuple { header, body })
    }

    fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.header[at], self.header[at + 1]])
    }

    fn set_u16_at(&mut self, at: usize, value: u16) {
        self.header[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn set_u32_at(&mut self, at: usize, value: u32) {
        self.header[at..at + 4].copy_from_slice(&value.to_le_bytes());
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

    /// Where the user's data starts in the body; errors when that is not inside it.
    pub(super) fn data_offset(&self) -> Result<usize, Fault> {
        let hoff = self.header[AT_HOFF];
        let offset = usize::from(hoff).checked_sub(HEADER_BYTES).filter(|offset| *offset <= self.body.len());
        offset.ok_or_else(|| no_place_for_data(hoff))
    }

    /// The user's data.
    pub(super) fn data_mut(&mut self) -> Result<&mut [u8], Fault> {
        let offset = self.data_offset()?;
        Ok(&mut self.body[offset..])
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
        self.header[AT_CTID..AT_CTID + 6].copy_from_slice(&pointer);
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
pub(super) struct NewTuple<'d> {
    /// `t_infomask2` and `t_infomask`, in this order in a tuple too.
    masks: &'d [u8; 4],
    pub(super) hoff: u8,
}

impl<'d> NewTuple<'d> {
    pub(super) fn read(cursor: &mut Cursor<'d>) -> Result<NewTuple<'d>, Fault> {
        Ok(NewTuple { masks: cursor.array_ref()?, hoff: cursor.u8()? })
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
            return Err(no_tuple(bytes, self.hoff));
        }
        let slot = page.add_slot(bytes, Place::Heap(offset_number))?;
        let body = slot.start + HEADER_BYTES..slot.end;
        let mut tuple = Tuple::at(page, slot).ok_or_else(|| too_short(offset_number))?;
        tuple.set_xmin(xmin);
        tuple.set_xmax(xmax);
        tuple.set_u32_at(AT_FIELD3, 0);
        tuple.set_ctid(ctid);
        let masks = u32::from_le_bytes(*self.masks) & !(u32::from(infomask::COMBOCID) << 16);
        tuple.set_u32_at(AT_INFOMASK2, masks);
        tuple.header[AT_HOFF] = self.hoff;
        Ok(body)
    }
}

#[cold]
fn not_normal(offset_number: u16) -> Fault {
    format!("line pointer {offset_number} is not a normal one").into()
}

#[cold]
fn too_short(offset_number: u16) -> Fault {
    format!("tuple {offset_number} is shorter than a tuple header").into()
}

#[cold]
fn no_place_for_data(hoff: u8) -> Fault {
    format!("t_hoff {hoff} is not inside the tuple").into()
}

#[cold]
fn no_tuple(bytes: usize, hoff: u8) -> Fault {
    format!("a tuple of {bytes} bytes with t_hoff {hoff}").into()
}
