//! Damaged records and pages: redo may refuse them or make nonsense of them, but must not panic.

use typed_arena::Arena;
use types::{PAGE_BYTES, PageTag};
use wal::DecodedRecord;
use wal_redo::{changes, redo_page};

/// A small generator of pseudo-random numbers (xorshift), so that a run is the same every time.
pub struct Damage {
    state: u64,
    applied: u64,
}

impl Default for Damage {
    fn default() -> Damage {
        Damage { state: 0x9E37_79B9_7F4A_7C15, applied: 0 }
    }
}

impl Damage {
    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    /// Applies some damaged versions of the record, to some damaged versions of the page, for one page in `every`.
    pub fn try_some(&mut self, every: u64, page: &[u8; PAGE_BYTES], tag: &PageTag, record: &DecodedRecord<'_>) {
        self.applied += 1;
        if !self.applied.is_multiple_of(every) {
            return;
        }
        for _ in 0..8 {
            let arena = Arena::new();
            let mut damaged = record.reborrow();
            if self.below(2) == 0 {
                damaged.main_data = self.bytes(damaged.main_data, &arena);
            }
            for block in &mut damaged.blocks {
                if self.below(2) == 0 {
                    block.data = self.bytes(block.data, &arena);
                }
                if let Some(image) = &mut block.image
                    && self.below(4) == 0
                {
                    image.apply = true;
                    image.bytes = self.bytes(image.bytes, &arena);
                    image.hole_length = image.hole_length.wrapping_add(self.below(3) as u16);
                }
            }
            let mut page = *page;
            self.damage_page(&mut page);
            // Whatever comes of it.
            drop(redo_page(&mut page, tag, &damaged));
            drop(changes(&damaged));
        }
    }

    fn damage_page(&mut self, page: &mut [u8; PAGE_BYTES]) {
        match self.below(4) {
            0 => page.fill(0),
            1 => (0..64).for_each(|_| page[self.below(PAGE_BYTES)] = self.next() as u8),
            2 => (0..4).for_each(|_| page[8 + self.below(60)] = self.next() as u8),
            _as_it_is => {}
        }
    }

    /// Cut short, or with some bytes changed.
    fn bytes<'a>(&mut self, bytes: &'a [u8], arena: &'a Arena<u8>) -> &'a [u8] {
        if bytes.is_empty() || self.below(2) == 0 {
            return &bytes[..self.below(bytes.len() + 1)];
        }
        let changed = arena.alloc_extend(bytes.iter().copied());
        for _ in 0..1 + self.below(3) {
            let at = self.below(changed.len().min(40));
            changed[at] = self.next() as u8;
        }
        changed
    }
}
