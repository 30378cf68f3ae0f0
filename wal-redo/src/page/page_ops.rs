//! A slotted page and the operations that redo performs on it (`storage/bufpage.h`, `storage/page/bufpage.c`).
//!
//! Every offset that comes from the page or a record is checked: a bad one is a [`Fault`], and never touches memory.

use std::ops::Range;

use smallvec::SmallVec;
use types::{Lsn, PAGE_BYTES};

use super::fault::Fault;

/// `SizeOfPageHeaderData`: the line pointers start here; contents of pages without any start here too.
pub(super) const HEADER_BYTES: usize = 24;
/// `sizeof(ItemIdData)`.
pub(super) const ITEM_ID_BYTES: usize = 4;
/// `PG_PAGE_LAYOUT_VERSION`.
const LAYOUT_VERSION: u16 = 4;
/// `MaxHeapTuplesPerPage`.
const MAX_HEAP_TUPLES: u16 = 291;

/// `PD_HAS_FREE_LINES`.
const HAS_FREE_LINES: u16 = 0x0001;
/// `PD_ALL_VISIBLE`.
const ALL_VISIBLE: u16 = 0x0004;

const AT_CHECKSUM: usize = 8;
const AT_FLAGS: usize = 10;
const AT_LOWER: usize = 12;
const AT_UPPER: usize = 14;
const AT_SPECIAL: usize = 16;
const AT_SIZE_VERSION: usize = 18;
const AT_PRUNE_XID: usize = 20;

/// Rounded up to 8 (`MAXALIGN`).
pub(super) const fn maxalign(bytes: usize) -> usize {
    (bytes + 7) & !7
}

/// State of a line pointer (`lp_flags`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LineState {
    Unused,
    Normal,
    Redirect,
    Dead,
}

/// A line pointer (`ItemIdData`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ItemId(u32);

impl ItemId {
    pub(super) const UNUSED: ItemId = ItemId(0);
    pub(super) const DEAD: ItemId = ItemId(3 << 15);

    pub(super) fn normal(offset: usize, len: usize) -> ItemId {
        ItemId((offset as u32 & 0x7FFF) | 1 << 15 | (len as u32 & 0x7FFF) << 17)
    }

    pub(super) fn redirect(to: u16) -> ItemId {
        ItemId((u32::from(to) & 0x7FFF) | 2 << 15)
    }

    pub(super) fn offset(self) -> usize {
        (self.0 & 0x7FFF) as usize
    }

    pub(super) fn len(self) -> usize {
        (self.0 >> 17) as usize
    }

    pub(super) fn state(self) -> LineState {
        match self.0 >> 15 & 3 {
            0 => LineState::Unused,
            1 => LineState::Normal,
            2 => LineState::Redirect,
            _three => LineState::Dead,
        }
    }

    pub(super) fn is_used(self) -> bool {
        self.state() != LineState::Unused
    }

    pub(super) fn has_storage(self) -> bool {
        self.len() != 0
    }

    /// The item's place in the page, with the bytes that align the next one.
    fn extent(self) -> Range<usize> {
        self.offset()..self.offset() + maxalign(self.len())
    }

    fn moved_by(self, bytes: isize) -> ItemId {
        self.at(self.offset().wrapping_add_signed(bytes))
    }

    fn at(self, offset: usize) -> ItemId {
        ItemId(self.0 & !0x7FFF | (offset as u32 & 0x7FFF))
    }

    fn with_len(self, len: usize) -> ItemId {
        ItemId(self.0 & 0x1_FFFF | (len as u32 & 0x7FFF) << 17)
    }
}

/// Where [`Page::add_item`] puts an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// At this offset number; pointers from there on move up by one (`PAI_OVERWRITE` not set).
    Shifting(u16),
    /// At this offset number, which must be unused or the next new one, on a heap page (`PAI_OVERWRITE | PAI_IS_HEAP`).
    Heap(u16),
    /// At this offset number, which must be unused or the next new one (`PAI_OVERWRITE`).
    Overwriting(u16),
}

/// A page of 8 KiB.
pub(super) struct Page<'p> {
    bytes: &'p mut [u8; PAGE_BYTES],
}

impl<'p> Page<'p> {
    pub(super) fn new(bytes: &'p mut [u8; PAGE_BYTES]) -> Page<'p> {
        Page { bytes }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8; PAGE_BYTES] {
        self.bytes
    }

    /// The bytes of this range, which must lie in the page.
    pub(super) fn slice(&self, range: Range<usize>) -> Result<&[u8], Fault> {
        self.bytes.get(range).ok_or_else(|| "an offset points outside of the page".into())
    }

    pub(super) fn slice_mut(&mut self, range: Range<usize>) -> Result<&mut [u8], Fault> {
        self.bytes.get_mut(range).ok_or_else(|| "an offset points outside of the page".into())
    }

    pub(super) fn u16_at(&self, at: usize) -> Result<u16, Fault> {
        let bytes = self.slice(at..at.saturating_add(2))?;
        Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    pub(super) fn u32_at(&self, at: usize) -> Result<u32, Fault> {
        let bytes = self.slice(at..at.saturating_add(4))?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    pub(super) fn write(&mut self, at: usize, data: &[u8]) -> Result<(), Fault> {
        self.slice_mut(at..at.saturating_add(data.len()))?.copy_from_slice(data);
        Ok(())
    }

    /// Copies bytes of the page to another place in it.
    pub(super) fn copy_within(&mut self, from: Range<usize>, to: usize) -> Result<(), Fault> {
        self.slice(from.clone())?;
        self.slice(to..to.saturating_add(from.len()))?;
        self.bytes.copy_within(from, to);
        Ok(())
    }

    pub(super) fn set_u16_at(&mut self, at: usize, value: u16) -> Result<(), Fault> {
        self.write(at, &value.to_le_bytes())
    }

    pub(super) fn set_u32_at(&mut self, at: usize, value: u32) -> Result<(), Fault> {
        self.write(at, &value.to_le_bytes())
    }

    fn header(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn set_header(&mut self, at: usize, value: usize) {
        // Callers pass offsets within the page, which fit.
        self.bytes[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    }

    pub(super) fn lower(&self) -> usize {
        self.header(AT_LOWER).into()
    }

    pub(super) fn set_lower(&mut self, lower: usize) {
        self.set_header(AT_LOWER, lower);
    }

    pub(super) fn upper(&self) -> usize {
        self.header(AT_UPPER).into()
    }

    pub(super) fn set_upper(&mut self, upper: usize) {
        self.set_header(AT_UPPER, upper);
    }

    pub(super) fn special(&self) -> usize {
        self.header(AT_SPECIAL).into()
    }

    pub(super) fn flags(&self) -> u16 {
        self.header(AT_FLAGS)
    }

    fn change_flags(&mut self, flag: u16, on: bool) {
        let flags = if on { self.flags() | flag } else { self.flags() & !flag };
        self.set_header(AT_FLAGS, flags.into());
    }

    pub(super) fn set_has_free_lines(&mut self, on: bool) {
        self.change_flags(HAS_FREE_LINES, on);
    }

    pub(super) fn set_all_visible(&mut self, on: bool) {
        self.change_flags(ALL_VISIBLE, on);
    }

    /// `PageIsNew`: never initialised.
    pub(super) fn is_new(&self) -> bool {
        self.upper() == 0
    }

    pub(super) fn set_lsn(&mut self, lsn: Lsn) {
        self.bytes[0..4].copy_from_slice(&((lsn.0 >> 32) as u32).to_le_bytes());
        self.bytes[4..8].copy_from_slice(&(lsn.0 as u32).to_le_bytes());
    }

    /// `PageSetPrunable`: remembers the oldest transaction whose end may leave something to prune.
    pub(super) fn set_prunable(&mut self, xid: u32) {
        let field: [u8; 4] = self.bytes[AT_PRUNE_XID..AT_PRUNE_XID + 4].try_into().expect("four bytes");
        let current = u32::from_le_bytes(field);
        if current == 0 || xid_precedes(xid, current) {
            self.set_prune_xid(xid);
        }
    }

    /// Sets `pd_prune_xid`.
    pub(super) fn set_prune_xid(&mut self, xid: u32) {
        self.bytes[AT_PRUNE_XID..AT_PRUNE_XID + 4].copy_from_slice(&xid.to_le_bytes());
    }

    /// `PageInit`: empty, with a special area of so many bytes (rounded up to 8) of zeroes.
    pub(super) fn init(&mut self, special_bytes: usize) {
        let special = PAGE_BYTES - maxalign(special_bytes);
        self.bytes.fill(0);
        self.set_lower(HEADER_BYTES);
        self.set_upper(special);
        self.set_header(AT_SPECIAL, special);
        self.set_header(AT_SIZE_VERSION, PAGE_BYTES | usize::from(LAYOUT_VERSION));
    }

    /// Whether the header is as [`init`](Self::init) makes it, `pd_lsn` and `pd_lower` apart, which must be this.
    pub(super) fn has_fresh_header(&self, lower: usize, special: usize) -> bool {
        let [lower, special] = [lower as u16, special as u16].map(u16::to_le_bytes);
        let version = (PAGE_BYTES as u16 | LAYOUT_VERSION).to_le_bytes();
        // pd_checksum, pd_flags, pd_lower, pd_upper, pd_special, pd_pagesize_version, pd_prune_xid.
        let header = [[0; 2], [0; 2], lower, special, special, version, [0; 2], [0; 2]];
        self.bytes[AT_CHECKSUM..HEADER_BYTES] == *header.as_flattened()
    }

    /// Starts the special area, whose size must be this (rounded up to 8).
    pub(super) fn special_of(&self, special_bytes: usize) -> Result<usize, Fault> {
        let expected = PAGE_BYTES - maxalign(special_bytes);
        if self.special() == expected {
            Ok(expected)
        } else {
            Err(format!("pd_special is {}, not {expected}: not a page of this kind", self.special()).into())
        }
    }

    /// `PageGetMaxOffsetNumber`.
    pub(super) fn max_offset(&self) -> u16 {
        let pointers = self.lower().min(PAGE_BYTES).saturating_sub(HEADER_BYTES) / ITEM_ID_BYTES;
        pointers as u16
    }

    fn item_id_at(&self, offset_number: u16) -> usize {
        HEADER_BYTES + (usize::from(offset_number) - 1) * ITEM_ID_BYTES
    }

    /// The line pointer of an existing offset number.
    pub(super) fn item_id(&self, offset_number: u16) -> Result<ItemId, Fault> {
        if offset_number == 0 || offset_number > self.max_offset() {
            return Err(no_line_pointer(offset_number, self.max_offset()));
        }
        Ok(ItemId(self.u32_at(self.item_id_at(offset_number))?))
    }

    pub(super) fn set_item_id(&mut self, offset_number: u16, id: ItemId) -> Result<(), Fault> {
        self.item_id(offset_number)?;
        self.set_u32_at(self.item_id_at(offset_number), id.0)
    }

    /// Where an item with storage lies in the page.
    pub(super) fn item_range(&self, offset_number: u16) -> Result<Range<usize>, Fault> {
        self.storage_of(offset_number, self.item_id(offset_number)?)
    }

    /// As [`item_range`](Self::item_range) for a line pointer that is known.
    pub(super) fn storage_of(&self, offset_number: u16, id: ItemId) -> Result<Range<usize>, Fault> {
        let range = id.offset()..id.offset() + id.len();
        if !id.has_storage() || range.start < HEADER_BYTES || range.end > PAGE_BYTES {
            return Err(no_storage(offset_number, range));
        }
        Ok(range)
    }

    /// An item's bytes.
    pub(super) fn item(&self, offset_number: u16) -> Result<&[u8], Fault> {
        self.slice(self.item_range(offset_number)?)
    }

    /// Errors unless the header's pointers are in order (what `bufpage.c` calls "corrupted page pointers").
    pub(super) fn check_pointers(&self) -> Result<(), Fault> {
        let (lower, upper, special) = (self.lower(), self.upper(), self.special());
        if lower < HEADER_BYTES || lower > upper || upper > special || special > PAGE_BYTES {
            let state = if self.is_new() { "the page is not initialised" } else { "corrupted page pointers" };
            return Err(format!("{state}: lower {lower}, upper {upper}, special {special}").into());
        }
        Ok(())
    }

    fn check_pointers_aligned(&self) -> Result<(), Fault> {
        self.check_pointers()?;
        if self.special().is_multiple_of(8) { Ok(()) } else { Err("pd_special is not aligned".into()) }
    }

    /// `PageAddItemExtended`.
    pub(super) fn add_item(&mut self, item: &[u8], place: Place) -> Result<(), Fault> {
        let slot = self.add_slot(item.len(), place)?;
        self.write(slot.start, item)
    }

    /// As [`add_item`](Self::add_item) for an item of so many bytes, which the caller writes where it is told.
    pub(super) fn add_slot(&mut self, item_bytes: usize, place: Place) -> Result<Range<usize>, Fault> {
        let (lower, upper) = (self.lower(), self.upper());
        self.check_pointers()?;
        let pointers_end = lower - (lower - HEADER_BYTES) % ITEM_ID_BYTES;
        let (Place::Shifting(offset_number) | Place::Heap(offset_number) | Place::Overwriting(offset_number)) = place;
        let pointer_at = HEADER_BYTES + usize::from(offset_number.wrapping_sub(1)) * ITEM_ID_BYTES;
        if pointer_at > pointers_end {
            return Err(not_next(offset_number, pointers_end));
        }
        let is_new = pointer_at == pointers_end;
        let shuffle = matches!(place, Place::Shifting(_)) && !is_new;
        if !is_new && !shuffle {
            let id = ItemId(self.u32_at(pointer_at)?);
            if id.is_used() || id.has_storage() {
                return Err(in_use(offset_number));
            }
        }
        if matches!(place, Place::Heap(_)) && offset_number > MAX_HEAP_TUPLES {
            return Err(too_many(offset_number));
        }
        let new_lower = if is_new || shuffle { lower + ITEM_ID_BYTES } else { lower };
        let aligned = maxalign(item_bytes);
        if new_lower + aligned > upper {
            return Err(no_room(item_bytes));
        }
        let item_at = upper - aligned;
        if shuffle {
            self.bytes.copy_within(pointer_at..pointers_end, pointer_at + ITEM_ID_BYTES);
        }
        self.set_u32_at(pointer_at, ItemId::normal(item_at, item_bytes).0)?;
        self.set_lower(new_lower);
        self.set_upper(item_at);
        Ok(item_at..item_at + item_bytes)
    }

    /// A copy's fresh page with this page's special area (`PageGetTempPageCopySpecial`).
    pub(super) fn temp_copy_special(&self) -> Result<Box<[u8; PAGE_BYTES]>, Fault> {
        self.check_pointers_aligned()?;
        let mut bytes = Box::new([0; PAGE_BYTES]);
        Page::new(&mut bytes).init(PAGE_BYTES - self.special());
        bytes[self.special()..].copy_from_slice(&self.bytes[self.special()..]);
        Ok(bytes)
    }

    /// The line pointer of an item that an index operation moves or removes, checked as `bufpage.c` does.
    fn index_item(&self, offset_number: u16) -> Result<ItemId, Fault> {
        let id = self.item_id(offset_number)?;
        let (offset, len) = (id.offset(), id.len());
        if offset < self.upper() || offset + maxalign(len) > self.special() || !offset.is_multiple_of(8) {
            return Err(format!("corrupted line pointer {offset_number}: offset {offset}, size {len}").into());
        }
        Ok(id)
    }

    /// Closes the gap of `size` bytes at `offset` by moving what lies below it up, and adapts the line pointers.
    fn close_gap(&mut self, offset: usize, size: isize, only_with_storage: bool) -> Result<(), Fault> {
        let upper = self.upper();
        let target = upper.checked_add_signed(size).filter(|target| target + (offset - upper) <= self.special());
        let target = target.ok_or("an item would move outside of the page")?;
        self.bytes.copy_within(upper..offset, target);
        self.set_upper(target);
        for other in 1..=self.max_offset() {
            let id = self.item_id(other)?;
            if (id.has_storage() || !only_with_storage) && id.offset() <= offset {
                self.set_item_id(other, id.moved_by(size))?;
            }
        }
        Ok(())
    }

    /// `PageIndexTupleDelete`: removes an item and its line pointer.
    pub(super) fn index_tuple_delete(&mut self, offset_number: u16) -> Result<(), Fault> {
        self.check_pointers_aligned()?;
        let id = self.index_item(offset_number)?;
        let at = self.item_id_at(offset_number);
        let lower = self.lower();
        self.bytes.copy_within(at + ITEM_ID_BYTES..lower, at);
        self.set_lower(lower - ITEM_ID_BYTES);
        self.close_gap(id.offset(), maxalign(id.len()) as isize, false)
    }

    /// `PageIndexTupleDeleteNoCompact`: removes an item; its line pointer becomes unused, or goes when it is the last.
    pub(super) fn index_tuple_delete_no_compact(&mut self, offset_number: u16) -> Result<(), Fault> {
        self.check_pointers_aligned()?;
        let id = self.index_item(offset_number)?;
        if offset_number < self.max_offset() {
            self.set_item_id(offset_number, ItemId::UNUSED)?;
        } else {
            self.set_lower(self.lower() - ITEM_ID_BYTES);
        }
        self.close_gap(id.offset(), maxalign(id.len()) as isize, true)
    }

    /// `PageIndexTupleOverwrite`: a new item in the same place, other items moved as needed.
    pub(super) fn index_tuple_overwrite(&mut self, offset_number: u16, item: &[u8]) -> Result<(), Fault> {
        self.check_pointers_aligned()?;
        let id = self.index_item(offset_number)?;
        let (old, new) = (maxalign(id.len()), maxalign(item.len()));
        if new > old + (self.upper() - self.lower()) {
            return Err(format!("a new item of {} bytes does not fit into the page", item.len()).into());
        }
        let difference = old as isize - new as isize;
        if difference != 0 {
            self.close_gap(id.offset(), difference, true)?;
        }
        let offset = id.offset().wrapping_add_signed(difference);
        self.set_item_id(offset_number, id.at(offset).with_len(item.len()))?;
        self.write(offset, item)
    }

    /// `PageIndexMultiDelete`: removes items, given in ascending order, and their line pointers.
    pub(super) fn index_multi_delete(&mut self, offset_numbers: &[u16]) -> Result<(), Fault> {
        // Postgres takes this way for up to two, and it leaves the other items in another physical order.
        if offset_numbers.len() <= 2 {
            return offset_numbers.iter().rev().try_for_each(|number| self.index_tuple_delete(*number));
        }
        self.check_pointers_aligned()?;
        let mut removed = offset_numbers.iter().copied().peekable();
        let mut items: SmallVec<[ItemId; MAX_HEAP_TUPLES as usize]> = SmallVec::new();
        for number in 1..=self.max_offset() {
            let id = self.index_item(number)?;
            if removed.peek() == Some(&number) {
                removed.next();
            } else {
                items.push(id);
            }
        }
        if removed.next().is_some() {
            return Err("offsets to delete are not ascending, or not on the page".into());
        }
        self.set_lower(HEADER_BYTES + items.len() * ITEM_ID_BYTES);
        for (number, id) in (1..).zip(&items) {
            self.set_item_id(number, *id)?;
        }
        self.compactify()
    }

    /// Packs all items against the special area, in the order of their line pointers, which then say so (`compactify_tuples`).
    fn compactify(&mut self) -> Result<(), Fault> {
        let (lower, copied_from, special) = (self.lower(), self.upper(), self.special());
        self.check_pointers()?;
        let (head, data) = self.bytes.split_at_mut(lower);
        let pointers = head[HEADER_BYTES..].as_chunks_mut::<ITEM_ID_BYTES>().0;
        let stored_in = |pointer: &[u8; ITEM_ID_BYTES]| {
            let id = ItemId(u32::from_le_bytes(*pointer));
            id.has_storage().then(|| id.extent())
        };
        // Those at the end that already stand where they belong.
        let mut upper = special;
        let is_settled = |pointer: &&[u8; ITEM_ID_BYTES]| {
            let Some(Range { start, end }) = stored_in(pointer) else { return true };
            let is_settled = end == upper;
            if is_settled {
                upper = start;
            }
            is_settled
        };
        let settled = pointers.iter().take_while(is_settled).count();
        let pointers = &mut pointers[settled..];
        // Each one in front of the one before: then all move towards the page's end and none lands on one that is still to move.
        let mut limit = upper;
        let in_place = pointers.iter().filter_map(stored_in).all(|Range { start, end }| {
            let follows = end <= limit;
            limit = start;
            follows
        });
        if in_place && limit < copied_from || upper < copied_from {
            return Err(outside("items", limit.min(upper), special));
        }
        // Else what may be overwritten before it is moved is read from a copy, outside of which no item may be.
        let scratch: SmallVec<[u8; PAGE_BYTES]> = match in_place {
            true => SmallVec::new(),
            false => SmallVec::from_slice(&data[copied_from - lower..upper - lower]),
        };
        let mut mover = Mover { data, data_at: lower, scratch: &scratch, scratch_at: copied_from };
        // Neighbours stay neighbours: they move as one. Which pointers have storage follows no pattern that a processor could guess,
        // so that those without are carried along.
        let mut run = upper..upper;
        for pointer in pointers {
            let id = ItemId(u32::from_le_bytes(*pointer));
            let source = id.extent();
            let is_stored = id.has_storage();
            if is_stored & (source.end != run.start) {
                mover.move_items(run, upper)?;
                run = source.end..source.end;
            }
            run.start = if is_stored { source.start } else { run.start };
            upper = upper.checked_sub(source.len()).ok_or_else(items_exceed_page)?;
            let moved = if is_stored { id.at(upper) } else { id };
            *pointer = moved.0.to_le_bytes();
        }
        if upper < lower {
            return Err(outside("packed items", upper, special));
        }
        mover.move_items(run, upper)?;
        self.set_upper(upper);
        Ok(())
    }

    /// `PageRepairFragmentation`: packs a heap page and drops unused line pointers from its end.
    pub(super) fn repair_fragmentation(&mut self) -> Result<(), Fault> {
        self.check_pointers_aligned()?;
        let lower = self.lower();
        let lines = self.max_offset();
        if lines > MAX_HEAP_TUPLES {
            return Err(format!("{lines} line pointers are more than a heap page may have").into());
        }
        let pointers = self.bytes[HEADER_BYTES..lower].as_chunks_mut::<ITEM_ID_BYTES>().0;
        let last_used = pointers.iter().rposition(|pointer| ItemId(u32::from_le_bytes(*pointer)).is_used());
        let last_used = last_used.map_or(0, |at| at + 1);
        // Which ones are in use follows no pattern that a processor could guess: short loops without branches, so.
        let mut used = 0;
        for pointer in &mut *pointers {
            let id = ItemId(u32::from_le_bytes(*pointer));
            let id = if id.is_used() { id } else { ItemId::UNUSED };
            *pointer = id.0.to_le_bytes();
            used += usize::from(id.is_used());
        }
        self.compactify()?;
        self.set_lower(HEADER_BYTES + last_used * ITEM_ID_BYTES);
        self.set_has_free_lines(used < last_used);
        Ok(())
    }

    /// `PageTruncateLinePointerArray`: drops unused line pointers from a heap page's end, but never the first.
    pub(super) fn truncate_line_pointers(&mut self) -> Result<(), Fault> {
        self.check_pointers()?;
        let mut last = self.max_offset();
        while last > 1 && !self.item_id(last)?.is_used() {
            last -= 1;
        }
        self.set_lower(HEADER_BYTES + usize::from(last) * ITEM_ID_BYTES);
        let mut has_free = false;
        for number in 1..=last {
            has_free |= !self.item_id(number)?.is_used();
        }
        self.set_has_free_lines(has_free);
        Ok(())
    }
}

/// Moves items of a page.
struct Mover<'p> {
    /// All of the page behind the line pointers, from `data_at` on.
    data: &'p mut [u8],
    data_at: usize,
    /// What stood at `scratch_at` before anything moved; empty when nothing is overwritten before it moves.
    scratch: &'p [u8],
    scratch_at: usize,
}

impl Mover<'_> {
    /// Copies what stands, or stood, at `source` to `to`.
    fn move_items(&mut self, source: Range<usize>, to: usize) -> Result<(), Fault> {
        if source.start == to {
            // It is where it belongs, and nothing was written there: what is written lies behind.
            return Ok(());
        }
        let to = to.checked_sub(self.data_at).ok_or_else(items_exceed_page)?;
        let target = self.data.get_mut(to..to + source.len()).ok_or_else(items_exceed_page)?;
        if self.scratch.is_empty() {
            let start = source.start.checked_sub(self.data_at).ok_or_else(items_exceed_page)?;
            self.data.get(start..start + source.len()).ok_or_else(items_exceed_page)?;
            self.data.copy_within(start..start + source.len(), to);
            return Ok(());
        }
        let stood = source.start.checked_sub(self.scratch_at).and_then(|at| self.scratch.get(at..at + source.len()));
        target.copy_from_slice(stood.ok_or_else(items_exceed_page)?);
        Ok(())
    }
}

#[cold]
fn items_exceed_page() -> Fault {
    "corrupted line pointers: items reach beyond their part of the page".into()
}

#[cold]
fn no_line_pointer(offset_number: u16, max: u16) -> Fault {
    format!("there is no line pointer {offset_number} (the page has {max})").into()
}

#[cold]
fn no_storage(offset_number: u16, range: Range<usize>) -> Fault {
    format!("line pointer {offset_number} has no valid storage ({range:?})").into()
}

#[cold]
fn outside(what: &str, start: usize, special: usize) -> Fault {
    format!("corrupted line pointers: {what} from {start} on, the special area from {special} on").into()
}

#[cold]
fn not_next(offset_number: u16, pointers_end: usize) -> Fault {
    let limit = (pointers_end - HEADER_BYTES) / ITEM_ID_BYTES + 1;
    format!("item offset {offset_number} is not in 1..={limit}").into()
}

#[cold]
fn in_use(offset_number: u16) -> Fault {
    format!("line pointer {offset_number} is in use already").into()
}

#[cold]
fn too_many(offset_number: u16) -> Fault {
    format!("line pointer {offset_number} is more than a heap page may have").into()
}

#[cold]
fn no_room(item_bytes: usize) -> Fault {
    format!("an item of {item_bytes} bytes does not fit into the page").into()
}

/// `TransactionIdPrecedes`: order modulo 2^32 among normal ids; permanent ones (below 3) come first.
fn xid_precedes(left: u32, right: u32) -> bool {
    if left < 3 || right < 3 { left < right } else { (left.wrapping_sub(right) as i32) < 0 }
}

#[cfg(test)]
#[path = "page_ops_tests.rs"]
mod tests;
