//! Records of the Heap and Heap2 resource managers (`access/heapam_xlog.h`).
#![allow(missing_docs)]

use super::{RelFileNode, wire_struct};

/// Info codes of Heap, under [`OPMASK`].
pub const INSERT: u8 = 0x00;
pub const DELETE: u8 = 0x10;
pub const UPDATE: u8 = 0x20;
pub const TRUNCATE: u8 = 0x30;
pub const HOT_UPDATE: u8 = 0x40;
pub const CONFIRM: u8 = 0x50;
pub const LOCK: u8 = 0x60;
pub const INPLACE: u8 = 0x70;
/// The operation's bits, of Heap and of Heap2.
pub const OPMASK: u8 = 0x70;
/// Redo makes the page anew.
pub const INIT_PAGE: u8 = 0x80;

/// Info codes of Heap2, under [`OPMASK`].
pub mod heap2 {
    pub const REWRITE: u8 = 0x00;
    pub const PRUNE: u8 = 0x10;
    pub const VACUUM: u8 = 0x20;
    pub const FREEZE_PAGE: u8 = 0x30;
    pub const VISIBLE: u8 = 0x40;
    pub const MULTI_INSERT: u8 = 0x50;
    pub const LOCK_UPDATED: u8 = 0x60;
    pub const NEW_CID: u8 = 0x70;
}

/// Flags of [`HeapInsert`] and [`HeapMultiInsert`] (`XLH_INSERT_*`).
pub mod insert_flags {
    pub const ALL_VISIBLE_CLEARED: u8 = 1 << 0;
    pub const LAST_IN_MULTI: u8 = 1 << 1;
    pub const IS_SPECULATIVE: u8 = 1 << 2;
    pub const CONTAINS_NEW_TUPLE: u8 = 1 << 3;
    pub const ON_TOAST_RELATION: u8 = 1 << 4;
    pub const ALL_FROZEN_SET: u8 = 1 << 5;
}

/// Flags of [`HeapUpdate`] (`XLH_UPDATE_*`).
pub mod update_flags {
    pub const OLD_ALL_VISIBLE_CLEARED: u8 = 1 << 0;
    pub const NEW_ALL_VISIBLE_CLEARED: u8 = 1 << 1;
    pub const CONTAINS_OLD_TUPLE: u8 = 1 << 2;
    pub const CONTAINS_OLD_KEY: u8 = 1 << 3;
    pub const CONTAINS_NEW_TUPLE: u8 = 1 << 4;
    pub const PREFIX_FROM_OLD: u8 = 1 << 5;
    pub const SUFFIX_FROM_OLD: u8 = 1 << 6;
}

/// Flags of [`HeapDelete`] (`XLH_DELETE_*`).
pub mod delete_flags {
    pub const ALL_VISIBLE_CLEARED: u8 = 1 << 0;
    pub const CONTAINS_OLD_TUPLE: u8 = 1 << 1;
    pub const CONTAINS_OLD_KEY: u8 = 1 << 2;
    pub const IS_SUPER: u8 = 1 << 3;
    pub const IS_PARTITION_MOVE: u8 = 1 << 4;
}

/// Bits of `infobits_set` (`XLHL_*`).
pub mod infobits {
    pub const XMAX_IS_MULTI: u8 = 0x01;
    pub const XMAX_LOCK_ONLY: u8 = 0x02;
    pub const XMAX_EXCL_LOCK: u8 = 0x04;
    pub const XMAX_KEYSHR_LOCK: u8 = 0x08;
    pub const KEYS_UPDATED: u8 = 0x10;
}

/// Flag of [`HeapLock`] and [`HeapLockUpdated`] (`XLH_LOCK_ALL_FROZEN_CLEARED`).
pub const LOCK_ALL_FROZEN_CLEARED: u8 = 0x01;

/// Flags of [`HeapFreezeTuple`] (`XLH_FREEZE_XVAC`, `XLH_INVALID_XVAC`).
pub const FREEZE_XVAC: u8 = 0x02;
pub const INVALID_XVAC: u8 = 0x04;

wire_struct! {
    /// `xl_heap_header`.
    pub struct HeapHeader { t_infomask2: u16, t_infomask: u16, t_hoff: u8, }
}
wire_struct! {
    /// `xl_heap_insert`. Block 0's data: [`HeapHeader`] and the tuple from behind its fixed header.
    pub struct HeapInsert { offnum: u16, flags: u8, }
}
wire_struct! {
    /// `xl_heap_delete`.
    pub struct HeapDelete { xmax: u32, offnum: u16, infobits_set: u8, flags: u8, }
}
wire_struct! {
    /// `xl_heap_update`. Block 0: the new page (prefix and suffix lengths as u16 if flagged, [`HeapHeader`], tuple); block 1: the
    /// old page, if another.
    pub struct HeapUpdate {
        old_xmax: u32,
        old_offnum: u16,
        old_infobits_set: u8,
        flags: u8,
        new_xmax: u32,
        new_offnum: u16,
    }
}
wire_struct! {
    /// `xl_heap_truncate`: only logical decoding reads it.
    pub struct HeapTruncate { db_id: u32, nrelids: u32, flags: u8, }
}
wire_struct! {
    /// `xl_heap_multi_insert`; offsets follow as u16 unless the page is initialised. Block 0's data: for each tuple a
    /// [`MultiInsertTuple`], aligned to 2, and the tuple's data.
    pub struct HeapMultiInsert { flags: u8, padding: u8, ntuples: u16, }
}
wire_struct! {
    /// `xl_multi_insert_tuple`.
    pub struct MultiInsertTuple { datalen: u16, t_infomask2: u16, t_infomask: u16, t_hoff: u8, }
}
wire_struct! {
    /// `xl_heap_prune`. Block 0's data: u16 offsets: pairs (from, to) of redirects, then dead, then unused.
    pub struct HeapPrune { latest_removed_xid: u32, nredirected: u16, ndead: u16, }
}
wire_struct! {
    /// `xl_heap_vacuum`. Block 0's data: u16 offsets that become unused.
    pub struct HeapVacuum { nunused: u16, }
}
wire_struct! {
    /// `xl_heap_lock`.
    pub struct HeapLock { locking_xid: u32, offnum: u16, infobits_set: u8, flags: u8, }
}
wire_struct! {
    /// `xl_heap_lock_updated`.
    pub struct HeapLockUpdated { xmax: u32, offnum: u16, infobits_set: u8, flags: u8, }
}
wire_struct! {
    /// `xl_heap_confirm`.
    pub struct HeapConfirm { offnum: u16, }
}
wire_struct! {
    /// `xl_heap_inplace`. Block 0's data: the tuple from behind its header.
    pub struct HeapInplace { offnum: u16, }
}
wire_struct! {
    /// `xl_heap_freeze_tuple`, with the padding it has in arrays.
    pub struct HeapFreezeTuple {
        xmax: u32,
        offset: u16,
        t_infomask2: u16,
        t_infomask: u16,
        frzflags: u8,
        padding: u8,
    }
}
wire_struct! {
    /// `xl_heap_freeze_page`. Block 0's data: [`HeapFreezeTuple`]s.
    pub struct HeapFreezePage { cutoff_xid: u32, ntuples: u16, }
}
wire_struct! {
    /// `xl_heap_visible`. Block 0: the visibility map's page; block 1: the heap's.
    pub struct HeapVisible { cutoff_xid: u32, flags: u8, }
}
wire_struct! {
    /// `xl_heap_new_cid`: only logical decoding reads it.
    pub struct HeapNewCid {
        top_xid: u32,
        cmin: u32,
        cmax: u32,
        combocid: u32,
        target_node: RelFileNode,
        target_block_hi: u16,
        target_block_lo: u16,
        target_offset: u16,
    }
}

/// The visibility map (`access/visibilitymapdefs.h`, `access/heap/visibilitymap.c`): two bits per heap page.
pub mod vm {
    use types::{BlockNumber, PAGE_BYTES};

    /// `VISIBILITYMAP_ALL_VISIBLE`.
    pub const ALL_VISIBLE: u8 = 0x01;
    /// `VISIBILITYMAP_ALL_FROZEN`.
    pub const ALL_FROZEN: u8 = 0x02;
    /// `VISIBILITYMAP_VALID_BITS`.
    pub const VALID_BITS: u8 = 0x03;
    /// Heap pages that one page of the map covers.
    pub const HEAP_BLOCKS_PER_PAGE: u32 = ((PAGE_BYTES - super::super::page::PAGE_HEADER_BYTES) * 4) as u32;

    /// The map's page for a heap page.
    pub fn page_of(heap_block: BlockNumber) -> BlockNumber {
        heap_block / HEAP_BLOCKS_PER_PAGE
    }
    /// The byte for a heap page, counted from the map page's start (its header included).
    pub fn byte_of(heap_block: BlockNumber) -> usize {
        super::super::page::PAGE_HEADER_BYTES + (heap_block % HEAP_BLOCKS_PER_PAGE / 4) as usize
    }
    /// How far the heap page's bits are shifted in that byte.
    pub fn shift_of(heap_block: BlockNumber) -> u8 {
        (heap_block % 4 * 2) as u8
    }
}
