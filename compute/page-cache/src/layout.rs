//! What lies where in the shared index.

use std::sync::atomic::{AtomicU32, AtomicU64};

use types::{PAGE_BYTES, PageTag, RelTag};

use crate::{lock::Lock, sys::Errno};

/// `DORMOUSE` and the layout's version: both ends come from one build, a mismatch is a mix-up of files.
pub const MAGIC: u64 = u64::from_le_bytes(*b"DORMIDX3");

/// No slot, no entry: the end of a chain. Zero, so that a fresh file says it everywhere; number 0 is never used.
pub const NONE: u32 = 0;

/// Slots and relation entries that are given storage at a time.
pub const SLOT_CHUNK: u32 = 4096;
/// See [`SLOT_CHUNK`].
pub const REL_CHUNK: u32 = 2048;

/// Most pages, and most relation forks.
const MAX_COUNT: u32 = u32::MAX / 4;

/// Locks over the page index, each for a share of its buckets.
pub const PAGE_STRIPES: u32 = 1024;

/// Locks over the relation table.
pub const REL_STRIPES: u32 = 256;

/// Entries of the table of newest dropped versions.
pub const DROP_MARKS: u32 = 65_536;

/// Slots or entries for each bucket when the cache is full.
const SLOTS_PER_BUCKET: u32 = 8;

/// Relation forks that can be known at once. Those nobody has changed make way for others.
pub const DEFAULT_MAX_RELS: u32 = 131_072;

/// The start of the index.
#[repr(C, align(64))]
pub struct Header {
    /// [`MAGIC`], written last.
    pub magic: AtomicU64,
    /// Sizes; constant once created.
    pub sizes: Sizes,
    /// See [`crate::PageCache::set_horizon`].
    pub horizon: AtomicU64,
    /// See [`crate::PageCache::set_shipped`].
    pub shipped: AtomicU64,
    /// Pages that can be fetched again: at most, for now.
    pub clean_bound: AtomicU32,
    /// Pages whose bytes were found to be others than were written.
    pub damaged: AtomicU32,
    /// Pages that can be fetched again.
    pub clean_count: AtomicU32,
    /// Pages that must be kept.
    pub kept_count: AtomicU32,
    /// Slots from here on were never used.
    pub fresh_slot: AtomicU32,
    /// First of the chain of freed slots.
    pub free_slot: AtomicU32,
    /// Where eviction looks next.
    pub slot_clock: AtomicU32,
    /// Where reclaiming of kept pages looks next.
    pub kept_clock: AtomicU32,
    /// As `fresh_slot`, for relation entries.
    pub fresh_rel: AtomicU32,
    /// As `slot_clock`, for relation entries.
    pub rel_clock: AtomicU32,
    /// Slots below have storage behind them. Changed under `free_lock`, as is `stored_rels`.
    pub stored_slots: AtomicU32,
    /// As `stored_slots`, for relation entries.
    pub stored_rels: AtomicU32,
    /// The last reclaim that found nothing saw this horizon and this shipped end.
    pub stuck_horizon: AtomicU64,
    /// See `stuck_horizon`.
    pub stuck_shipped: AtomicU64,
    /// Guards the chain of freed slots, and the allocation of more.
    pub free_lock: Lock,
}

/// How much of everything.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Pages that can be fetched again: at most, whatever the bound is set to.
    pub clean_limit: u32,
    /// Pages that must be kept: at most.
    pub kept_limit: u32,
    /// Entries for relation forks, the unused one included.
    pub rels: u32,
    /// Keeps the struct's size a multiple of eight.
    pub unused: u32,
}

impl Sizes {
    /// Slots in the pages file, the unused one included.
    pub fn slots(&self) -> u32 {
        self.clean_limit + self.kept_limit + 1
    }

    /// Sizes for budgets in bytes; `EINVAL` when there is room for no page, or for more than the index can count.
    pub fn new(clean_bytes: u64, kept_bytes: u64, rels: u32) -> Result<Sizes, Errno> {
        let pages = |bytes: u64| u32::try_from(bytes / PAGE_BYTES as u64).ok().filter(|n| *n < MAX_COUNT);
        let invalid = Errno(libc::EINVAL);
        let sizes = Sizes {
            clean_limit: pages(clean_bytes).ok_or(invalid)?,
            kept_limit: pages(kept_bytes).ok_or(invalid)?,
            rels: rels.saturating_add(1),
            unused: 0,
        };
        if sizes.slots() == 1 || rels == 0 || rels > MAX_COUNT { Err(invalid) } else { Ok(sizes) }
    }
}

/// What is known of one slot of the pages file. Its bucket's lock guards it; eviction peeks without.
#[repr(C)]
pub struct Slot {
    pub spc: AtomicU32,
    pub db: AtomicU32,
    pub rel: AtomicU32,
    pub block: AtomicU32,
    pub fork: AtomicU32,
    /// One of [`SlotState`].
    pub state: AtomicU32,
    /// Used since the clock's hand last passed.
    pub referenced: AtomicU32,
    /// Next slot of the bucket, or of the chain of freed ones.
    pub next: AtomicU32,
    /// The page may go when no transaction in progress started before this LSN.
    pub lsn: AtomicU64,
    /// The page may go when storage has WAL up to here: everything that was logged when the page was written.
    pub insert: AtomicU64,
    /// CRC32C of the page's bytes.
    pub crc: AtomicU32,
    pub unused: AtomicU32,
}

/// What a slot holds.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotState {
    /// Nothing, or a page on its way in or out.
    Free = 0,
    /// A page that can be fetched again.
    Clean = 1,
    /// A page that must be kept.
    Kept = 2,
    /// A page better kept, whose loss costs space or a gap.
    Soft = 3,
}

/// What is known of one fork of a relation. Its bucket's lock guards it.
#[repr(C)]
pub struct Rel {
    pub spc: AtomicU32,
    pub db: AtomicU32,
    pub rel: AtomicU32,
    pub fork: AtomicU32,
    /// One of the `REL_` states.
    pub state: AtomicU32,
    /// The `FLAG_` bits.
    pub flags: AtomicU32,
    pub blocks: AtomicU32,
    pub next: AtomicU32,
    /// Blocks from here on were cut off when WAL ended at `trunc_lsn`.
    pub trunc_to: AtomicU32,
    pub unused: AtomicU32,
    pub trunc_lsn: AtomicU64,
    /// WAL's end at the last change.
    pub change_lsn: AtomicU64,
}

/// An entry nobody uses.
pub const REL_FREE: u32 = 0;
/// Between two uses: taken by one process, in no bucket.
pub const REL_TAKEN: u32 = 3;
/// The fork exists.
pub const REL_PRESENT: u32 = 1;
/// It is known that the fork does not exist.
pub const REL_ABSENT: u32 = 2;

/// Storage knows nothing of the fork.
pub const FLAG_UNLOGGED: u32 = 1;
/// The fork is still to be made from its relation's init fork.
pub const FLAG_RESET: u32 = 2;
/// Not as storage told it any more.
pub const FLAG_CHANGED: u32 = 4;

/// Byte offsets of the index's parts.
#[derive(Debug, Clone, Copy)]
pub struct Offsets {
    pub page_locks: usize,
    pub rel_locks: usize,
    pub drop_marks: usize,
    pub buckets: usize,
    pub slots: usize,
    pub rel_buckets: usize,
    pub rels: usize,
    /// Everything before has storage from the start.
    pub sparse: usize,
    pub total: usize,
    /// Powers of two.
    pub n_buckets: u32,
    pub n_rel_buckets: u32,
}

impl Offsets {
    /// The parts' places for given sizes.
    pub fn new(sizes: &Sizes) -> Offsets {
        // Buckets are needed from the start, all of them: chains of a few slots in a full cache keep them few.
        let n_buckets = (sizes.slots() / SLOTS_PER_BUCKET).next_power_of_two().max(PAGE_STRIPES);
        let n_rel_buckets = (sizes.rels / SLOTS_PER_BUCKET).next_power_of_two().max(REL_STRIPES);
        let mut at = size_of::<Header>();
        let mut place = |bytes: usize| {
            let start = at.next_multiple_of(64);
            at = start + bytes;
            start
        };
        let mut offsets = Offsets {
            page_locks: place(PAGE_STRIPES as usize * size_of::<Lock>()),
            rel_locks: place(REL_STRIPES as usize * size_of::<Lock>()),
            drop_marks: place(DROP_MARKS as usize * size_of::<AtomicU64>()),
            buckets: place(n_buckets as usize * size_of::<AtomicU32>()),
            rel_buckets: place(n_rel_buckets as usize * size_of::<AtomicU32>()),
            rels: place(sizes.rels as usize * size_of::<Rel>()),
            slots: place(sizes.slots() as usize * size_of::<Slot>()),
            sparse: 0,
            total: at.next_multiple_of(4096),
            n_buckets,
            n_rel_buckets,
        };
        offsets.sparse = offsets.rels;
        offsets
    }
}

fn mix(hash: u64, value: u32) -> u64 {
    let mixed = (hash ^ u64::from(value)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed ^ (mixed >> 29)
}

/// A hash of a fork's name.
pub fn hash_rel(rel: &RelTag) -> u64 {
    [rel.spc, rel.db, rel.rel, rel.fork as u32].into_iter().fold(0x5157, mix)
}

/// A hash of a page's name.
pub fn hash_page(tag: &PageTag) -> u64 {
    mix(hash_rel(&tag.rel), tag.block)
}
