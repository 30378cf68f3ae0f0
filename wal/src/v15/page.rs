//! The header of a relation page (`storage/bufpage.h`, `PageHeaderData`) and its line pointers (`storage/itemid.h`).

use types::{Lsn, PAGE_BYTES};

/// Bytes before the line pointers (`SizeOfPageHeaderData`).
pub const PAGE_HEADER_BYTES: usize = 24;
/// `pd_pagesize_version` of an initialised page: 8192 bytes, layout version 4.
pub const PAGE_SIZE_VERSION: u16 = 0x2004;
/// `PD_HAS_FREE_LINES`.
pub const PD_HAS_FREE_LINES: u16 = 0x0001;
/// `PD_PAGE_FULL`.
pub const PD_PAGE_FULL: u16 = 0x0002;
/// `PD_ALL_VISIBLE`.
pub const PD_ALL_VISIBLE: u16 = 0x0004;

const LSN_AT: usize = 0;
const FLAGS_AT: usize = 10;
const LOWER_AT: usize = 12;
const UPPER_AT: usize = 14;
const SPECIAL_AT: usize = 16;
const SIZE_VERSION_AT: usize = 18;
const PRUNE_XID_AT: usize = 20;

/// Reading a page's header fields.
pub trait PageRead {
    /// The page.
    fn page(&self) -> &[u8; PAGE_BYTES];

    /// Two bytes at an offset. Panics when they lie outside the page.
    fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.page()[at], self.page()[at + 1]])
    }
    /// Four bytes at an offset. Panics when they lie outside the page.
    fn u32_at(&self, at: usize) -> u32 {
        u32::from(self.u16_at(at)) | u32::from(self.u16_at(at + 2)) << 16
    }
    /// `pd_lsn`.
    fn pd_lsn(&self) -> Lsn {
        Lsn(u64::from(self.u32_at(LSN_AT)) << 32 | u64::from(self.u32_at(LSN_AT + 4)))
    }
    /// `pd_flags`.
    fn pd_flags(&self) -> u16 {
        self.u16_at(FLAGS_AT)
    }
    /// `pd_lower`.
    fn pd_lower(&self) -> u16 {
        self.u16_at(LOWER_AT)
    }
    /// `pd_upper`.
    fn pd_upper(&self) -> u16 {
        self.u16_at(UPPER_AT)
    }
    /// `pd_special`.
    fn pd_special(&self) -> u16 {
        self.u16_at(SPECIAL_AT)
    }
    /// `pd_prune_xid`.
    fn pd_prune_xid(&self) -> u32 {
        self.u32_at(PRUNE_XID_AT)
    }
    /// `PageIsNew`: never initialised.
    fn is_new(&self) -> bool {
        self.pd_upper() == 0
    }
}

/// Writing a page's header fields.
pub trait PageWrite: PageRead {
    /// The page.
    fn page_mut(&mut self) -> &mut [u8; PAGE_BYTES];

    /// Sets two bytes at an offset. Panics when they lie outside the page.
    fn set_u16_at(&mut self, at: usize, value: u16) {
        self.page_mut()[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    /// Sets four bytes at an offset. Panics when they lie outside the page.
    fn set_u32_at(&mut self, at: usize, value: u32) {
        self.page_mut()[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    /// Sets `pd_lsn`.
    fn set_pd_lsn(&mut self, lsn: Lsn) {
        self.set_u32_at(LSN_AT, (lsn.0 >> 32) as u32);
        self.set_u32_at(LSN_AT + 4, lsn.0 as u32);
    }
    /// Sets `pd_flags`.
    fn set_pd_flags(&mut self, flags: u16) {
        self.set_u16_at(FLAGS_AT, flags);
    }
    /// Sets `pd_lower`.
    fn set_pd_lower(&mut self, lower: u16) {
        self.set_u16_at(LOWER_AT, lower);
    }
    /// Sets `pd_upper`.
    fn set_pd_upper(&mut self, upper: u16) {
        self.set_u16_at(UPPER_AT, upper);
    }
    /// Sets `pd_special`.
    fn set_pd_special(&mut self, special: u16) {
        self.set_u16_at(SPECIAL_AT, special);
    }
    /// Sets `pd_prune_xid`.
    fn set_pd_prune_xid(&mut self, xid: u32) {
        self.set_u32_at(PRUNE_XID_AT, xid);
    }
    /// `PageInit`: an empty page with a special area of `special_bytes` (rounded up to 8).
    fn init_page(&mut self, special_bytes: usize) {
        let special = (PAGE_BYTES - ((special_bytes + 7) & !7)) as u16;
        self.page_mut().fill(0);
        self.set_pd_lower(PAGE_HEADER_BYTES as u16);
        self.set_pd_upper(special);
        self.set_pd_special(special);
        self.set_u16_at(SIZE_VERSION_AT, PAGE_SIZE_VERSION);
    }
}

impl PageRead for [u8; PAGE_BYTES] {
    fn page(&self) -> &[u8; PAGE_BYTES] {
        self
    }
}

impl PageWrite for [u8; PAGE_BYTES] {
    fn page_mut(&mut self) -> &mut [u8; PAGE_BYTES] {
        self
    }
}
