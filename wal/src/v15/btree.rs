//! Records of the Btree resource manager (`access/nbtxlog.h`).
#![allow(missing_docs)]

use super::{RelFileNode, wire_struct};

/// Info codes.
pub const INSERT_LEAF: u8 = 0x00;
pub const INSERT_UPPER: u8 = 0x10;
pub const INSERT_META: u8 = 0x20;
pub const SPLIT_L: u8 = 0x30;
pub const SPLIT_R: u8 = 0x40;
pub const INSERT_POST: u8 = 0x50;
pub const DEDUP: u8 = 0x60;
pub const DELETE: u8 = 0x70;
pub const UNLINK_PAGE: u8 = 0x80;
pub const UNLINK_PAGE_META: u8 = 0x90;
pub const NEWROOT: u8 = 0xA0;
pub const MARK_PAGE_HALFDEAD: u8 = 0xB0;
pub const VACUUM: u8 = 0xC0;
pub const REUSE_PAGE: u8 = 0xD0;
pub const META_CLEANUP: u8 = 0xE0;

wire_struct! {
    /// `xl_btree_metadata` (28 bytes with its padding; [`BtreeMetadata::SIZE`] counts the padding).
    pub struct BtreeMetadata {
        version: u32,
        root: u32,
        level: u32,
        fastroot: u32,
        fastlevel: u32,
        last_cleanup_num_delpages: u32,
        allequalimage: u8,
        padding: [u8; 3],
    }
}
wire_struct! {
    /// `xl_btree_insert`.
    pub struct BtreeInsert { offnum: u16, }
}
wire_struct! {
    /// `xl_btree_split`.
    pub struct BtreeSplit { level: u32, firstrightoff: u16, newitemoff: u16, postingoff: u16, }
}
wire_struct! {
    /// `xl_btree_dedup`; [`BtreeDedupInterval`]s are block 0's data.
    pub struct BtreeDedup { nintervals: u16, }
}
wire_struct! {
    /// `BTDedupInterval` (`access/nbtree.h`).
    pub struct BtreeDedupInterval { baseoff: u16, nitems: u16, }
}
wire_struct! {
    /// `xl_btree_reuse_page`: nothing but a point of conflict for standbys.
    pub struct BtreeReusePage { node: RelFileNode, block: u32, latest_removed_full_xid: u64, }
}
wire_struct! {
    /// `xl_btree_vacuum`; offsets and [`BtreeUpdate`]s are block 0's data.
    pub struct BtreeVacuum { ndeleted: u16, nupdated: u16, }
}
wire_struct! {
    /// `xl_btree_delete`; offsets and [`BtreeUpdate`]s are block 0's data.
    pub struct BtreeDelete { latest_removed_xid: u32, ndeleted: u16, nupdated: u16, }
}
wire_struct! {
    /// `xl_btree_update`; `ndeletedtids` u16 offsets follow.
    pub struct BtreeUpdate { ndeletedtids: u16, }
}
wire_struct! {
    /// `xl_btree_mark_page_halfdead`.
    pub struct BtreeMarkPageHalfdead {
        poffset: u16,
        padding: u16,
        leafblk: u32,
        leftblk: u32,
        rightblk: u32,
        topparent: u32,
    }
}
wire_struct! {
    /// `xl_btree_unlink_page`.
    pub struct BtreeUnlinkPage {
        leftsib: u32,
        rightsib: u32,
        level: u32,
        padding: u32,
        safexid: u64,
        leafleftsib: u32,
        leafrightsib: u32,
        leaftopparent: u32,
    }
}
wire_struct! {
    /// `xl_btree_newroot`.
    pub struct BtreeNewroot { rootblk: u32, level: u32, }
}
