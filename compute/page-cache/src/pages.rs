//! Pages: looking them up, depositing clean ones, keeping written ones, making room.

use std::sync::atomic::Ordering::*;

use crc32c::crc32c;
use types::{BlockNumber, ForkNumber, PAGE_BYTES, PageTag, RelTag};

use crate::{
    Page,
    layout::*,
    page::Keep,
    shared::Shared,
    sys::{self, Errno},
};

/// How many kept pages one reclaim lets go, so that the next writers need not search.
const RECLAIM_BATCH: u32 = 256;

/// Clean pages may be over their bound by this share of it before they are cut back.
const TRIM_SLACK_SHARE: u32 = 8;

/// Tries to find a slot while others take them away.
const SLOT_ATTEMPTS: u32 = 8;

/// How much one search for kept pages that may go does at most.
#[derive(Debug, Clone, Copy)]
struct Sweep {
    /// Slots that are looked at.
    slots: u32,
    /// Pages that are let go.
    pages: u32,
}

impl Shared {
    /// Copies a cached page to `page`; false when it is not cached.
    pub fn read(&self, tag: &PageTag, page: &mut Page) -> Result<bool, Errno> {
        let bucket = self.bucket_of(hash_page(tag));
        let guard = self.lock_bucket(bucket)?;
        let Some(index) = self.find(bucket, tag) else { return Ok(false) };
        self.slot(index).referenced.store(1, Relaxed);
        let whole = sys::read_exact_at(self.pages_fd, page, slot_offset(index)).is_ok();
        if whole && crc32c(page) == self.slot(index).crc.load(Relaxed) {
            return Ok(true);
        }
        self.lose_damaged(bucket, index, tag)?;
        drop(guard);
        self.free_slot(index).map(|()| false)
    }

    /// Forgets a page whose bytes are not what was written, if storage can tell it again; else `EIO`. The bucket's lock is
    /// held; the slot is the caller's.
    fn lose_damaged(&self, bucket: u32, index: u32, tag: &PageTag) -> Result<(), Errno> {
        let (header, slot) = (self.header(), self.slot(index));
        header.damaged.fetch_add(1, Relaxed);
        let clean = slot.state.load(Relaxed) == SlotState::Clean as u32;
        let told_by_wal = self.may_go(index, header.horizon.load(Acquire), header.shipped.load(Acquire), true);
        if !clean && !told_by_wal {
            return Err(Errno(libc::EIO));
        }
        self.drop_mark(tag).fetch_max(slot.insert.load(Relaxed), Relaxed);
        self.unlink_slot(bucket, index);
        let count = if clean { &header.clean_count } else { &header.kept_count };
        count.fetch_sub(1, Relaxed);
        Ok(())
    }

    /// True when the page is cached.
    pub fn contains(&self, tag: &PageTag) -> Result<bool, Errno> {
        let bucket = self.bucket_of(hash_page(tag));
        let _guard = self.lock_bucket(bucket)?;
        Ok(self.find(bucket, tag).is_some())
    }

    /// Deposits a page as storage describes it at `as_of` or later; an older version than one that Postgres wrote is
    /// refused. Returns whether it was taken: no room is no error.
    pub fn deposit(&self, tag: &PageTag, page: &Page, as_of: u64) -> Result<bool, Errno> {
        if self.contains(tag)? {
            return Ok(false);
        }
        let Some(fresh) = self.slot_for_clean(0)? else { return Ok(false) };
        let stored = sys::write_all_at(self.pages_fd, page, slot_offset(fresh)).is_ok();
        self.link_deposit(fresh, tag, page, stored, as_of)
    }

    /// Makes a slot that a clean page was to be written to that page's, or nobody's when it was not, or is known better by now.
    pub(crate) fn link_deposit(
        &self,
        fresh: u32,
        tag: &PageTag,
        page: &Page,
        stored: bool,
        as_of: u64,
    ) -> Result<bool, Errno> {
        let bucket = self.bucket_of(hash_page(tag));
        let guard = self.lock_bucket(bucket)?;
        let newest_dropped = self.drop_mark(tag).load(Relaxed);
        let good = stored
            && newest_dropped <= as_of
            && self.find(bucket, tag).is_none()
            && self.rel_takes_deposit(tag, as_of)?;
        if good {
            self.link(bucket, fresh, tag, crc32c(page), SlotState::Clean, Keep { lsn: 0, insert: 0, soft: false });
            self.header().clean_count.fetch_add(1, Relaxed);
            return Ok(true);
        }
        drop(guard);
        self.free_slot(fresh)?;
        Ok(false)
    }

    /// Stores a page that Postgres wrote. `ENOSPC` when the budget of kept pages is used up or the disk is full.
    pub fn keep(&self, tag: &PageTag, page: &Page, keep: Keep) -> Result<(), Errno> {
        if self.overwrite_kept(tag, page, keep)? {
            return Ok(());
        }
        self.take_kept_credit()?;
        let stored = self.keep_with_credit(tag, page, keep);
        if !matches!(stored, Ok(true)) {
            self.header().kept_count.fetch_sub(1, Relaxed);
        }
        stored.map(drop)
    }

    /// Stores a page unless one is cached; for the first pages of an unlogged relation.
    pub fn keep_if_absent(&self, tag: &PageTag, page: &Page, keep: Keep) -> Result<(), Errno> {
        if self.contains(tag)? { Ok(()) } else { self.keep(tag, page, keep) }
    }

    /// Shows the kept pages of a fork whose loss would cost only a gap or space: sequences (main forks) and free space maps.
    /// For when Postgres has ended.
    pub fn for_each_soft(&self, fork: ForkNumber, mut visit: impl FnMut(PageTag, &Page)) -> Result<(), Errno> {
        let used = self.header().fresh_slot.load(Relaxed).min(self.sizes.slots());
        let mut page = [0; PAGE_BYTES];
        for index in 0..used {
            let soft = self.slot(index).state.load(Relaxed) == SlotState::Soft as u32;
            if let Some(tag) = self.peek(index).filter(|tag| soft && tag.rel.fork == fork)
                && self.read(&tag, &mut page)?
            {
                visit(tag, &page);
            }
        }
        Ok(())
    }

    /// Shows the clean pages: name, slot and checksum. For when Postgres has ended.
    pub fn for_each_clean(&self, mut visit: impl FnMut(PageTag, u32, u32)) {
        let used = self.header().fresh_slot.load(Relaxed).min(self.sizes.slots());
        for index in 0..used {
            let slot = self.slot(index);
            if slot.state.load(Relaxed) == SlotState::Clean as u32
                && let Some(tag) = self.peek(index)
            {
                visit(tag, index, slot.crc.load(Relaxed));
            }
        }
    }

    /// Gives the room of all slots that hold no clean page back to the file system. For when Postgres has ended.
    pub fn give_back_others(&self) -> Result<(), Errno> {
        let used = self.header().fresh_slot.load(Relaxed).min(self.sizes.slots());
        let mut others = (0..used).filter(|index| self.slot(*index).state.load(Relaxed) != SlotState::Clean as u32);
        others.try_for_each(|index| sys::punch(self.pages_fd, slot_offset(index), PAGE_BYTES as u64))
    }

    /// Takes over pages that are in the pages file already, each in a slot of its own, as clean ones; as many as there may
    /// be. For before anybody else knows of the cache. `EINVAL` for slots that do not exist or come twice or out of order.
    pub fn adopt(&self, pages: impl Iterator<Item = (PageTag, u32, u32)>) -> Result<u32, Errno> {
        let (header, invalid) = (self.header(), Errno(libc::EINVAL));
        let mut adopted = 0;
        for (tag, index, crc) in pages.take(header.clean_bound.load(Relaxed) as usize) {
            let mut fresh = header.fresh_slot.load(Relaxed);
            if index < fresh || index >= self.sizes.slots() {
                return Err(invalid);
            }
            while fresh <= index {
                self.store_slot(fresh)?;
                if fresh < index {
                    self.free_slot(fresh)?;
                }
                fresh += 1;
            }
            header.fresh_slot.store(fresh, Relaxed);
            let bucket = self.bucket_of(hash_page(&tag));
            if self.find(bucket, &tag).is_some() {
                return Err(invalid);
            }
            self.link(bucket, index, &tag, crc, SlotState::Clean, Keep { lsn: 0, insert: 0, soft: false });
            adopted += 1;
        }
        header.clean_count.store(adopted, Relaxed);
        Ok(adopted)
    }

    fn overwrite_kept(&self, tag: &PageTag, page: &Page, keep: Keep) -> Result<bool, Errno> {
        let bucket = self.bucket_of(hash_page(tag));
        let _guard = self.lock_bucket(bucket)?;
        match self.find(bucket, tag) {
            Some(slot) if self.slot(slot).state.load(Relaxed) != SlotState::Clean as u32 => {
                sys::write_all_at(self.pages_fd, page, slot_offset(slot))?;
                self.slot(slot).crc.store(crc32c(page), Relaxed);
                self.set_keep(slot, keep);
                Ok(true)
            }
            Some(_) | None => Ok(false),
        }
    }

    /// Returns whether the credit was used: not when somebody else has made the page a kept one meanwhile.
    fn keep_with_credit(&self, tag: &PageTag, page: &Page, keep: Keep) -> Result<bool, Errno> {
        let bucket = self.bucket_of(hash_page(tag));
        if self.contains(tag)? {
            let _guard = self.lock_bucket(bucket)?;
            if let Some(slot) = self.find(bucket, tag) {
                let was_clean = self.slot(slot).state.load(Relaxed) == SlotState::Clean as u32;
                sys::write_all_at(self.pages_fd, page, slot_offset(slot))?;
                self.slot(slot).crc.store(crc32c(page), Relaxed);
                self.set_keep(slot, keep);
                if was_clean {
                    self.header().clean_count.fetch_sub(1, Relaxed);
                }
                return Ok(was_clean);
            }
        }
        let fresh = self.store_kept(page)?;
        let guard = self.lock_bucket(bucket)?;
        let Some(other) = self.find(bucket, tag) else {
            self.link(bucket, fresh, tag, crc32c(page), SlotState::Kept, keep);
            self.set_keep(fresh, keep);
            return Ok(true);
        };
        // A deposit slipped in; it is older than what we bring.
        let was_clean = self.slot(other).state.load(Relaxed) == SlotState::Clean as u32;
        self.unlink_slot(bucket, other);
        self.link(bucket, fresh, tag, crc32c(page), SlotState::Kept, keep);
        self.set_keep(fresh, keep);
        if was_clean {
            self.header().clean_count.fetch_sub(1, Relaxed);
        }
        drop(guard);
        self.free_slot(other)?;
        Ok(was_clean)
    }

    /// Forgets a page, whatever it is.
    pub fn discard(&self, tag: &PageTag) -> Result<(), Errno> {
        let bucket = self.bucket_of(hash_page(tag));
        let guard = self.lock_bucket(bucket)?;
        let Some(slot) = self.find(bucket, tag) else { return Ok(()) };
        let was_clean = self.slot(slot).state.load(Relaxed) == SlotState::Clean as u32;
        self.unlink_slot(bucket, slot);
        drop(guard);
        let count = if was_clean { &self.header().clean_count } else { &self.header().kept_count };
        count.fetch_sub(1, Relaxed);
        // Room was made: a reclaim may be worth while again.
        self.header().stuck_horizon.store(u64::MAX, Relaxed);
        self.free_slot(slot)
    }

    /// Forgets the pages `from..to` of a fork.
    pub fn discard_range(&self, rel: RelTag, from: BlockNumber, to: BlockNumber) -> Result<(), Errno> {
        self.for_each_page_of(rel, from, to, |tag| self.discard(tag))
    }

    /// Keeps the pages of a fork for ever: it turned out to be unlogged.
    pub fn pin_rel(&self, rel: RelTag, blocks: BlockNumber) -> Result<(), Errno> {
        self.for_each_page_of(rel, 0, blocks, |tag| {
            let bucket = self.bucket_of(hash_page(tag));
            let _guard = self.lock_bucket(bucket)?;
            if let Some(slot) = self.find(bucket, tag)
                && self.slot(slot).state.load(Relaxed) != SlotState::Clean as u32
            {
                self.set_keep(slot, Keep::FOR_EVER);
            }
            Ok(())
        })
    }

    /// Goes over blocks or over slots, whichever are fewer.
    fn for_each_page_of(
        &self,
        rel: RelTag,
        from: BlockNumber,
        to: BlockNumber,
        mut visit: impl FnMut(&PageTag) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let used = self.header().fresh_slot.load(Relaxed).min(self.sizes.slots());
        if to.saturating_sub(from) <= used {
            return (from..to).try_for_each(|block| visit(&PageTag { rel, block }));
        }
        for index in 0..used {
            if let Some(tag) = self.peek(index)
                && tag.rel == rel
                && (from..to).contains(&tag.block)
            {
                visit(&tag)?;
            }
        }
        Ok(())
    }

    /// The page in a slot, read without its lock: a hint.
    fn peek(&self, index: u32) -> Option<PageTag> {
        let slot = self.slot(index);
        let fork = ForkNumber::try_from(slot.fork.load(Relaxed) as u8).ok()?;
        let rel = RelTag { spc: slot.spc.load(Relaxed), db: slot.db.load(Relaxed), rel: slot.rel.load(Relaxed), fork };
        (slot.state.load(Relaxed) != SlotState::Free as u32).then_some(PageTag { rel, block: slot.block.load(Relaxed) })
    }

    fn find(&self, bucket: u32, tag: &PageTag) -> Option<u32> {
        let mut index = self.bucket(bucket).load(Relaxed);
        while index != NONE {
            if self.peek(index).as_ref() == Some(tag) {
                return Some(index);
            }
            index = self.slot(index).next.load(Relaxed);
        }
        None
    }

    /// Puts a filled slot into its bucket; the bucket's lock is held.
    fn link(&self, bucket: u32, index: u32, tag: &PageTag, crc: u32, state: SlotState, keep: Keep) {
        let slot = self.slot(index);
        slot.crc.store(crc, Relaxed);
        slot.spc.store(tag.rel.spc, Relaxed);
        slot.db.store(tag.rel.db, Relaxed);
        slot.rel.store(tag.rel.rel, Relaxed);
        slot.fork.store(tag.rel.fork as u32, Relaxed);
        slot.block.store(tag.block, Relaxed);
        slot.lsn.store(keep.lsn, Relaxed);
        slot.insert.store(keep.insert, Relaxed);
        slot.referenced.store(1, Relaxed);
        slot.next.store(self.bucket(bucket).load(Relaxed), Relaxed);
        slot.state.store(state as u32, Release);
        self.bucket(bucket).store(index, Relaxed);
    }

    fn set_keep(&self, index: u32, keep: Keep) {
        let slot = self.slot(index);
        slot.lsn.store(keep.lsn, Relaxed);
        slot.insert.store(keep.insert, Relaxed);
        slot.referenced.store(1, Relaxed);
        slot.state.store(if keep.soft { SlotState::Soft } else { SlotState::Kept } as u32, Relaxed);
    }

    /// Takes a slot out of its bucket, whose lock is held.
    fn unlink_slot(&self, bucket: u32, index: u32) {
        let next = self.slot(index).next.load(Relaxed);
        let mut link = self.bucket(bucket);
        while link.load(Relaxed) != index {
            link = &self.slot(link.load(Relaxed)).next;
        }
        link.store(next, Relaxed);
        self.slot(index).state.store(SlotState::Free as u32, Relaxed);
    }

    fn free_slot(&self, index: u32) -> Result<(), Errno> {
        let _guard = self.lock_free()?;
        let head = self.header().free_slot.swap(index, Relaxed);
        self.slot(index).next.store(head, Relaxed);
        Ok(())
    }

    /// A slot nobody uses, or `None` when all are taken.
    fn unused_slot(&self) -> Result<Option<u32>, Errno> {
        let _guard = self.lock_free()?;
        let header = self.header();
        let freed = header.free_slot.load(Relaxed);
        if freed != NONE {
            header.free_slot.store(self.slot(freed).next.load(Relaxed), Relaxed);
            return Ok(Some(freed));
        }
        let fresh = header.fresh_slot.load(Relaxed);
        if fresh == self.sizes.slots() || self.store_slot(fresh).is_err() {
            return Ok(None);
        }
        header.fresh_slot.store(fresh + 1, Relaxed);
        Ok(Some(fresh))
    }

    /// A slot for a clean page, if there is room. `taken` have been answered before and are not counted yet.
    pub(crate) fn slot_for_clean(&self, taken: usize) -> Result<Option<u32>, Errno> {
        let clean = self.header().clean_count.load(Relaxed).saturating_add(taken as u32);
        if clean < self.header().clean_bound.load(Relaxed)
            && let Some(slot) = self.unused_slot()?
        {
            return Ok(Some(slot));
        }
        self.evict_clean()
    }

    /// Writes a page to a slot that nobody uses. When the disk is full a clean page, or one that has become so,
    /// makes way: its slot has its room.
    fn store_kept(&self, page: &Page) -> Result<u32, Errno> {
        let mut slot = self.slot_for_kept()?;
        for _ in 0..SLOT_ATTEMPTS {
            match sys::write_all_at(self.pages_fd, page, slot_offset(slot)) {
                Ok(()) => return Ok(slot),
                Err(Errno(libc::ENOSPC)) => {
                    let mut instead = self.evict_clean()?;
                    if instead.is_none() && self.reclaim_kept()? > 0 {
                        instead = self.evict_clean()?;
                    }
                    self.free_slot(slot)?;
                    slot = instead.ok_or(Errno(libc::ENOSPC))?;
                }
                Err(errno) => {
                    self.free_slot(slot)?;
                    return Err(errno);
                }
            }
        }
        self.free_slot(slot)?;
        Err(Errno(libc::ENOSPC))
    }

    /// There is one: kept pages alone, within their budget, never fill all slots.
    fn slot_for_kept(&self) -> Result<u32, Errno> {
        for _ in 0..SLOT_ATTEMPTS {
            let header = self.header();
            // Kept pages that were let go may be more than the clean ones' bound.
            let too_many = header.clean_count.load(Relaxed) > header.clean_bound.load(Relaxed);
            if !too_many && let Some(slot) = self.unused_slot()? {
                return Ok(slot);
            }
            if let Some(slot) = self.evict_clean()? {
                return Ok(slot);
            }
            if let Some(slot) = self.unused_slot()? {
                return Ok(slot);
            }
        }
        Err(Errno(libc::ENOSPC))
    }

    /// Changes how many clean pages there may be, at most what the cache was made for. [`Shared::trim`] makes it so.
    pub fn set_clean_bound(&self, pages: u32) {
        self.header().clean_bound.store(pages.clamp(1, self.sizes.clean_limit), Relaxed);
    }

    /// Makes kept pages that may go clean ones, looking at no more than `most` slots: then they count for the clean pages'
    /// bound, and the budget of kept pages is there for those that need it. Returns how many.
    pub fn release(&self, most: u32) -> Result<u32, Errno> {
        let header = self.header();
        if header.kept_count.load(Relaxed) == 0 {
            return Ok(0);
        }
        let horizon = header.horizon.load(Acquire);
        let shipped = header.shipped.load(Acquire);
        self.reclaim_pass(horizon, shipped, false, Sweep { slots: most, pages: most })
    }

    /// Once clean pages are well over the bound: lets those over it go, at most `most`, and gives their room back to the
    /// file system. Returns how many.
    pub fn trim(&self, most: u32) -> Result<u32, Errno> {
        let header = self.header();
        let bound = header.clean_bound.load(Relaxed);
        // Room that is given back only to be taken again at once costs more than it is worth.
        if header.clean_count.load(Relaxed) <= bound.saturating_add(bound / TRIM_SLACK_SHARE) {
            return Ok(0);
        }
        for done in 0..most {
            if header.clean_count.load(Relaxed) <= header.clean_bound.load(Relaxed) {
                return Ok(done);
            }
            let Some(index) = self.evict_clean()? else { return Ok(done) };
            let punched = sys::punch(self.pages_fd, slot_offset(index), PAGE_BYTES as u64);
            self.free_slot(index)?;
            punched?;
        }
        Ok(most)
    }

    /// Takes the slot of a clean page that was not used lately (CLOCK).
    fn evict_clean(&self) -> Result<Option<u32>, Errno> {
        let header = self.header();
        let used = header.fresh_slot.load(Relaxed).min(self.sizes.slots());
        for _ in 0..u64::from(used) * 2 {
            let index = header.slot_clock.fetch_add(1, Relaxed) % used;
            let slot = self.slot(index);
            if slot.state.load(Relaxed) != SlotState::Clean as u32 || slot.referenced.swap(0, Relaxed) != 0 {
                continue;
            }
            let Some(tag) = self.peek(index) else { continue };
            let bucket = self.bucket_of(hash_page(&tag));
            let _guard = self.lock_bucket(bucket)?;
            if slot.state.load(Relaxed) == SlotState::Clean as u32 && self.peek(index) == Some(tag) {
                self.drop_mark(&tag).fetch_max(slot.insert.load(Relaxed), Relaxed);
                self.unlink_slot(bucket, index);
                header.clean_count.fetch_sub(1, Relaxed);
                return Ok(Some(index));
            }
        }
        Ok(None)
    }

    /// One page more within the budget of kept pages.
    fn take_kept_credit(&self) -> Result<(), Errno> {
        let limit = self.sizes.kept_limit;
        for _ in 0..SLOT_ATTEMPTS {
            let more = |count: u32| (count < limit).then_some(count + 1);
            if self.header().kept_count.fetch_update(Relaxed, Relaxed, more).is_ok() {
                return Ok(());
            }
            if self.reclaim_kept()? == 0 {
                break;
            }
        }
        Err(Errno(libc::ENOSPC))
    }

    /// Turns kept pages that may go into clean ones. Returns how many.
    fn reclaim_kept(&self) -> Result<u32, Errno> {
        let header = self.header();
        // Horizon first: a later shipped end can only be larger.
        let horizon = header.horizon.load(Acquire);
        let shipped = header.shipped.load(Acquire);
        if header.stuck_horizon.load(Relaxed) == horizon && header.stuck_shipped.load(Relaxed) == shipped {
            return Ok(0);
        }
        for soft_too in [false, true] {
            let sweep = Sweep { slots: self.sizes.slots(), pages: RECLAIM_BATCH };
            let reclaimed = self.reclaim_pass(horizon, shipped, soft_too, sweep)?;
            if reclaimed > 0 {
                return Ok(reclaimed);
            }
        }
        header.stuck_horizon.store(horizon, Relaxed);
        header.stuck_shipped.store(shipped, Relaxed);
        Ok(0)
    }

    fn reclaim_pass(&self, horizon: u64, shipped: u64, soft_too: bool, sweep: Sweep) -> Result<u32, Errno> {
        let header = self.header();
        let used = header.fresh_slot.load(Relaxed).min(self.sizes.slots());
        let mut reclaimed = 0;
        let may_go = |index: u32| self.may_go(index, horizon, shipped, soft_too);
        for _ in 0..used.min(sweep.slots) {
            let index = header.kept_clock.fetch_add(1, Relaxed) % used;
            if !may_go(index) {
                continue;
            }
            let Some(tag) = self.peek(index) else { continue };
            let _guard = self.lock_bucket(self.bucket_of(hash_page(&tag)))?;
            if self.peek(index) == Some(tag) && may_go(index) {
                self.slot(index).state.store(SlotState::Clean as u32, Relaxed);
                header.clean_count.fetch_add(1, Relaxed);
                header.kept_count.fetch_sub(1, Relaxed);
                reclaimed += 1;
            }
            if reclaimed == sweep.pages {
                break;
            }
        }
        Ok(reclaimed)
    }
}

impl Shared {
    /// Whether WAL alone gives a kept page back (or its loss costs only space or a gap).
    fn may_go(&self, index: u32, horizon: u64, shipped: u64, soft_too: bool) -> bool {
        let slot = self.slot(index);
        let state = slot.state.load(Relaxed);
        (state == SlotState::Kept as u32 || soft_too && state == SlotState::Soft as u32)
            && slot.lsn.load(Relaxed) <= horizon
            && slot.insert.load(Relaxed) <= shipped
    }
}

pub(crate) fn slot_offset(index: u32) -> u64 {
    u64::from(index) * PAGE_BYTES as u64
}
