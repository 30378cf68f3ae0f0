//! The mapping of the shared index, and access to its parts.

use std::{
    ffi::CStr,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::*},
};

use types::PageTag;

use crate::{
    layout::*,
    lock::{Guard, Lock},
    sys::{self, Errno},
};

/// One process's view of the cache. In `postgres` it lives as long as the process and is inherited over forks.
pub struct Shared {
    base: *mut u8,
    offsets: Offsets,
    pub(crate) sizes: Sizes,
    pub(crate) pages_fd: i32,
    index_fd: i32,
    /// How long to wait for a lock; `None` in Postgres, where the holder is as mortal as the one who waits.
    wait_limit_ms: Option<u32>,
}

// SAFETY: everything behind `base` is atomics and locks.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// How long the agent waits for a lock that a killed backend may never release.
const AGENT_WAIT_MS: u32 = 2000;

impl Shared {
    /// Maps what the agent created. `EPROTO` when it is no index of this build.
    pub fn open(index: &CStr, pages: &CStr) -> Result<Shared, Errno> {
        let fd = sys::open(index, libc::O_RDWR, 0)?;
        let (base, sizes) = Self::map_existing(fd).inspect_err(|_| sys::close(fd))?;
        let pages_fd = sys::open(pages, libc::O_RDWR, 0).inspect_err(|_| sys::close(fd))?;
        Ok(Shared { base, offsets: Offsets::new(&sizes), sizes, pages_fd, index_fd: fd, wait_limit_ms: None })
    }

    fn map_existing(fd: i32) -> Result<(*mut u8, Sizes), Errno> {
        let head = sys::map(fd, size_of::<Header>())?;
        // SAFETY: the mapping holds a header (a shorter file would fault; the agent makes none).
        let header = unsafe { &*head.cast::<Header>() };
        let known = header.magic.load(Acquire) == MAGIC;
        let sizes = header.sizes;
        sys::unmap(head, size_of::<Header>());
        if !known {
            return Err(Errno(libc::EPROTO));
        }
        Ok((sys::map(fd, Offsets::new(&sizes).total)?, sizes))
    }

    /// Creates an empty cache in two files, of which the index is replaced. With `replace` the pages are too, else what is
    /// in their slots is still there.
    pub fn create(index: &CStr, pages: &CStr, sizes: Sizes, replace: bool) -> Result<Shared, Errno> {
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC;
        let offsets = Offsets::new(&sizes);
        let pages_fd = sys::open(pages, if replace { flags } else { libc::O_RDWR }, 0o600)?;
        let fd = sys::open(index, flags, 0o600).inspect_err(|_| sys::close(pages_fd))?;
        let mapped = sys::set_length(fd, offsets.total as u64)
            .and_then(|()| sys::allocate(fd, 0, offsets.sparse as u64))
            .and_then(|()| sys::map(fd, offsets.total));
        let base = mapped.inspect_err(|_| [fd, pages_fd].into_iter().for_each(sys::close))?;
        let shared = Shared { base, offsets, sizes, pages_fd, index_fd: fd, wait_limit_ms: Some(AGENT_WAIT_MS) };
        shared.initialise()?;
        Ok(shared)
    }

    /// A fresh file is all zeroes, which is right for locks, counts, chains and entries. Number 0 of slots and entries is
    /// counted as used.
    fn initialise(&self) -> Result<(), Errno> {
        // SAFETY: nobody else has this mapping yet; the header lies at its start.
        unsafe { (&raw mut (*self.base.cast::<Header>()).sizes).write(self.sizes) };
        let header = self.header();
        header.stuck_horizon.store(u64::MAX, Relaxed);
        header.clean_bound.store(self.sizes.clean_limit, Relaxed);
        header.fresh_slot.store(NONE + 1, Relaxed);
        header.fresh_rel.store(NONE + 1, Relaxed);
        self.store_slot(NONE)?;
        self.store_rel(NONE)?;
        self.rel(NONE).state.store(REL_TAKEN, Relaxed);
        header.magic.store(MAGIC, Release);
        Ok(())
    }

    /// Gives slot `index`, the next to be used, storage: to touch a hole when the file system is full would end the
    /// process. The lock of the free chain is held. `ENOSPC` when there is no room.
    pub(crate) fn store_slot(&self, index: u32) -> Result<(), Errno> {
        let stored = &self.header().stored_slots;
        self.store::<Slot>(stored, index, SLOT_CHUNK, self.offsets.slots, self.sizes.slots())
    }

    /// As [`Shared::store_slot`], for a relation entry.
    pub(crate) fn store_rel(&self, index: u32) -> Result<(), Errno> {
        let stored = &self.header().stored_rels;
        self.store::<Rel>(stored, index, REL_CHUNK, self.offsets.rels, self.sizes.rels)
    }

    fn store<T>(&self, stored: &AtomicU32, index: u32, chunk: u32, start: usize, count: u32) -> Result<(), Errno> {
        let from = stored.load(Relaxed);
        if index < from {
            return Ok(());
        }
        let to = index.saturating_add(chunk).min(count);
        let at = |index: u32| (start + index as usize * size_of::<T>()) as u64;
        sys::allocate(self.index_fd, at(from), at(to) - at(from))?;
        stored.store(to, Release);
        Ok(())
    }

    /// What storage can describe pages at: WAL that a quorum holds.
    pub fn shipped(&self) -> u64 {
        self.header().shipped.load(Acquire)
    }

    pub(crate) fn header(&self) -> &Header {
        // SAFETY: the mapping starts with a header.
        unsafe { &*self.base.cast() }
    }

    /// The `index`-th `T` of the array at `start`, which has `count`.
    fn item<T>(&self, start: usize, index: u32, count: u32) -> &T {
        assert!(index < count, "index within the shared array");
        // SAFETY: `Offsets` reserved `count` items of `T` at `start`, aligned to 64; all are atomics.
        unsafe { &*self.base.add(start).cast::<T>().add(index as usize) }
    }

    pub(crate) fn slot(&self, index: u32) -> &Slot {
        self.item(self.offsets.slots, index, self.sizes.slots())
    }

    pub(crate) fn rel(&self, index: u32) -> &Rel {
        self.item(self.offsets.rels, index, self.sizes.rels)
    }

    pub(crate) fn bucket(&self, bucket: u32) -> &AtomicU32 {
        self.item(self.offsets.buckets, bucket, self.offsets.n_buckets)
    }

    pub(crate) fn rel_bucket(&self, bucket: u32) -> &AtomicU32 {
        self.item(self.offsets.rel_buckets, bucket, self.offsets.n_rel_buckets)
    }

    pub(crate) fn bucket_of(&self, hash: u64) -> u32 {
        (hash >> 16) as u32 & (self.offsets.n_buckets - 1)
    }

    pub(crate) fn rel_bucket_of(&self, hash: u64) -> u32 {
        (hash >> 16) as u32 & (self.offsets.n_rel_buckets - 1)
    }

    /// The newest WAL position that a dropped version of such a page may hold (pages share marks).
    pub(crate) fn drop_mark(&self, tag: &PageTag) -> &AtomicU64 {
        self.item(self.offsets.drop_marks, hash_page(tag) as u32 % DROP_MARKS, DROP_MARKS)
    }

    pub(crate) fn lock_bucket(&self, bucket: u32) -> Result<Guard<'_>, Errno> {
        self.item::<Lock>(self.offsets.page_locks, bucket % PAGE_STRIPES, PAGE_STRIPES).lock(self.wait_limit_ms)
    }

    pub(crate) fn lock_rel_bucket(&self, bucket: u32) -> Result<Guard<'_>, Errno> {
        self.item::<Lock>(self.offsets.rel_locks, bucket % REL_STRIPES, REL_STRIPES).lock(self.wait_limit_ms)
    }

    pub(crate) fn lock_free(&self) -> Result<Guard<'_>, Errno> {
        self.header().free_lock.lock(self.wait_limit_ms)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        sys::unmap(self.base, self.offsets.total);
        sys::close(self.pages_fd);
        sys::close(self.index_fd);
    }
}
