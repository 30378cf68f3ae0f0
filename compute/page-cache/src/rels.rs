//! Relation forks: whether they exist, how long they are, what storage knows of them.

use std::sync::atomic::Ordering::*;

use types::{BlockNumber, ForkNumber, Oid, PageTag, RelTag};

use crate::{layout::*, shared::Shared, sys::Errno};

/// What is known of a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelState {
    /// Blocks; `None` when the fork does not exist.
    pub blocks: Option<BlockNumber>,
    /// Storage knows nothing of it: its pages live here only.
    pub unlogged: bool,
    /// Where it was cut off last,
    pub trunc_to: BlockNumber,
    /// and where WAL ended then. While storage has not got that far, blocks from `trunc_to` on that are not cached are
    /// zeroes.
    pub trunc_lsn: u64,
}

/// An unlogged fork that is still to be made from its init fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitingReset;

impl Shared {
    /// What is known of a fork; `None` when nothing is.
    pub fn rel_state(&self, rel: &RelTag) -> Result<Option<Result<RelState, WaitingReset>>, Errno> {
        let bucket = self.rel_bucket_of(hash_rel(rel));
        let _guard = self.lock_rel_bucket(bucket)?;
        Ok(self.find_rel(bucket, rel).map(|index| state_of(self.rel(index))))
    }

    /// Notes what storage says, unless something is known already. `ENOSPC` when the table is full.
    pub fn learn_rel(&self, rel: &RelTag, blocks: Option<BlockNumber>) -> Result<(), Errno> {
        self.with_rel(rel, |_| Ok(()), |entry| set_size(entry, blocks)).map(drop)
    }

    /// Makes a fork that does not exist; false when it does. `insert` is WAL's end in memory, here and below.
    pub fn create_rel(&self, rel: &RelTag, insert: u64) -> Result<bool, Errno> {
        let unlogged = rel.fork != ForkNumber::Main
            && rel.fork != ForkNumber::Init
            && matches!(self.rel_state(&rel.with_fork(ForkNumber::Main))?, Some(Ok(RelState { unlogged: true, .. })));
        let create = |entry: &Rel| {
            if entry.state.load(Relaxed) == REL_PRESENT {
                return Ok(false);
            }
            set_size(entry, Some(0));
            self.note_cut(entry, 0, insert);
            let known_unlogged = entry.flags.load(Relaxed) & FLAG_UNLOGGED;
            entry.flags.store(FLAG_CHANGED | known_unlogged | if unlogged { FLAG_UNLOGGED } else { 0 }, Relaxed);
            Ok(true)
        };
        self.with_rel(rel, create, |entry| set_size(entry, None))
    }

    /// Lengthens a fork to `blocks` at least. `ENOENT` when it does not exist.
    pub fn grow_rel(&self, rel: &RelTag, blocks: BlockNumber, insert: u64) -> Result<(), Errno> {
        self.change_rel(rel, insert, |entry| {
            entry.blocks.fetch_max(blocks, Relaxed);
        })
    }

    /// Cuts a fork to `blocks` at most; its pages are still to be discarded. `ENOENT` when it does not exist.
    pub fn cut_rel(&self, rel: &RelTag, blocks: BlockNumber, insert: u64) -> Result<(), Errno> {
        self.change_rel(rel, insert, |entry| {
            entry.blocks.fetch_min(blocks, Relaxed);
            self.note_cut(entry, blocks, insert);
        })
    }

    /// Removes a fork; its pages are still to be discarded. `ENOENT` when it does not exist.
    pub fn remove_rel(&self, rel: &RelTag, insert: u64) -> Result<(), Errno> {
        self.change_rel(rel, insert, |entry| {
            self.note_cut(entry, 0, insert);
            set_size(entry, None);
            entry.flags.store(FLAG_CHANGED, Relaxed);
        })
    }

    /// Notes that storage knows nothing of a fork. With `reset`, an existing main fork starts as its init fork.
    pub fn set_rel_unlogged(&self, rel: &RelTag, reset: bool) -> Result<(), Errno> {
        let present = rel.fork == ForkNumber::Main;
        let mark = |entry: &Rel| {
            let reset_flag = if reset && present { FLAG_RESET } else { 0 };
            entry.flags.store(FLAG_CHANGED | FLAG_UNLOGGED | reset_flag, Relaxed);
            if reset {
                set_size(entry, present.then_some(0));
            }
            Ok(())
        };
        self.with_rel(rel, mark, |entry| set_size(entry, None))
    }

    /// An unlogged relation's init fork (`rel`) was removed: forks that do not exist are nothing special any more.
    pub fn forget_unlogged(&self, rel: &RelTag) -> Result<(), Errno> {
        for fork in [ForkNumber::Main, ForkNumber::Fsm, ForkNumber::Vm] {
            let other = rel.with_fork(fork);
            let bucket = self.rel_bucket_of(hash_rel(&other));
            let _guard = self.lock_rel_bucket(bucket)?;
            if let Some(index) = self.find_rel(bucket, &other)
                && self.rel(index).state.load(Relaxed) == REL_ABSENT
            {
                self.rel(index).flags.store(FLAG_CHANGED, Relaxed);
            }
        }
        Ok(())
    }

    /// Ends a reset: the pages are in place.
    pub fn finish_reset(&self, rel: &RelTag, blocks: BlockNumber) -> Result<(), Errno> {
        self.change_rel(rel, 0, |entry| {
            if entry.flags.fetch_and(!FLAG_RESET, Relaxed) & FLAG_RESET != 0 {
                entry.blocks.store(blocks, Relaxed);
            }
        })
    }

    /// The forks of a database directory that are known to exist.
    pub fn for_each_rel_in(&self, spc: Oid, db: Oid, mut visit: impl FnMut(RelTag)) -> Result<(), Errno> {
        let used = self.header().fresh_rel.load(Relaxed).min(self.sizes.rels);
        for index in 0..used {
            let entry = self.rel(index);
            let Some(rel) = peek_rel(entry) else { continue };
            if (rel.spc, rel.db) != (spc, db) {
                continue;
            }
            let guard = self.lock_rel_bucket(self.rel_bucket_of(hash_rel(&rel)))?;
            let exists = peek_rel(entry) == Some(rel) && entry.state.load(Relaxed) == REL_PRESENT;
            drop(guard);
            if exists {
                visit(rel);
            }
        }
        Ok(())
    }

    /// May a page as of `as_of` go into the cache? Not when the fork is shorter or was cut after that. The page's bucket
    /// is locked: whoever cuts a fork changes its size first and discards pages then.
    pub(crate) fn rel_takes_deposit(&self, tag: &PageTag, as_of: u64) -> Result<bool, Errno> {
        Ok(match self.rel_state(&tag.rel)? {
            // Nobody has changed a fork of which nothing is known.
            None => true,
            Some(Err(WaitingReset)) => false,
            Some(Ok(state)) => {
                !state.unlogged && state.blocks.is_some_and(|blocks| tag.block < blocks) && state.trunc_lsn <= as_of
            }
        })
    }

    fn note_cut(&self, entry: &Rel, blocks: BlockNumber, insert: u64) {
        let earlier_is_known = entry.trunc_lsn.load(Relaxed) <= self.shipped();
        let to = if earlier_is_known { blocks } else { blocks.min(entry.trunc_to.load(Relaxed)) };
        entry.trunc_to.store(to, Relaxed);
        entry.trunc_lsn.store(insert, Relaxed);
        entry.change_lsn.store(insert, Relaxed);
    }

    fn change_rel(&self, rel: &RelTag, insert: u64, change: impl FnOnce(&Rel)) -> Result<(), Errno> {
        let bucket = self.rel_bucket_of(hash_rel(rel));
        let _guard = self.lock_rel_bucket(bucket)?;
        let index = self.find_rel(bucket, rel).ok_or(Errno(libc::ENOENT))?;
        let entry = self.rel(index);
        if entry.state.load(Relaxed) != REL_PRESENT {
            return Err(Errno(libc::ENOENT));
        }
        entry.flags.fetch_or(FLAG_CHANGED, Relaxed);
        entry.change_lsn.fetch_max(insert, Relaxed);
        change(entry);
        Ok(())
    }

    /// Works on a fork's entry, made by `start` when there is none.
    fn with_rel<T>(
        &self,
        rel: &RelTag,
        work: impl Fn(&Rel) -> Result<T, Errno>,
        start: impl FnOnce(&Rel),
    ) -> Result<T, Errno> {
        let bucket = self.rel_bucket_of(hash_rel(rel));
        {
            let _guard = self.lock_rel_bucket(bucket)?;
            if let Some(index) = self.find_rel(bucket, rel) {
                return work(self.rel(index));
            }
        }
        let fresh = self.unused_rel()?;
        let _guard = self.lock_rel_bucket(bucket)?;
        if let Some(index) = self.find_rel(bucket, rel) {
            // Somebody else was faster; ours stays linked nowhere until the clock finds it.
            self.rel(fresh).state.store(REL_FREE, Relaxed);
            return work(self.rel(index));
        }
        let entry = self.rel(fresh);
        entry.spc.store(rel.spc, Relaxed);
        entry.db.store(rel.db, Relaxed);
        entry.rel.store(rel.rel, Relaxed);
        entry.fork.store(rel.fork as u32, Relaxed);
        entry.flags.store(0, Relaxed);
        entry.trunc_to.store(0, Relaxed);
        entry.trunc_lsn.store(0, Relaxed);
        entry.change_lsn.store(0, Relaxed);
        start(entry);
        entry.next.store(self.rel_bucket(bucket).load(Relaxed), Relaxed);
        self.rel_bucket(bucket).store(fresh, Relaxed);
        work(entry)
    }

    fn find_rel(&self, bucket: u32, rel: &RelTag) -> Option<u32> {
        let mut index = self.rel_bucket(bucket).load(Relaxed);
        while index != NONE {
            let entry = self.rel(index);
            if peek_rel(entry).as_ref() == Some(rel) {
                return Some(index);
            }
            index = entry.next.load(Relaxed);
        }
        None
    }

    /// An entry for our use alone: a fresh one, or that of a fork of which storage can tell as much.
    fn unused_rel(&self) -> Result<u32, Errno> {
        let header = self.header();
        let stored = loop {
            let stored = self.stored_rels()?;
            let more = |used: u32| (used < stored).then_some(used + 1);
            if let Ok(fresh) = header.fresh_rel.fetch_update(Relaxed, Relaxed, more) {
                self.rel(fresh).state.store(REL_TAKEN, Relaxed);
                return Ok(fresh);
            }
            // Others may have taken the last ones since we looked: only when no more get storage are all in use.
            if self.stored_rels()? == stored {
                break stored;
            }
        };
        for _ in 0..stored {
            let index = header.rel_clock.fetch_add(1, Relaxed) % stored;
            let entry = self.rel(index);
            if entry.state.compare_exchange(REL_FREE, REL_TAKEN, Relaxed, Relaxed).is_ok() {
                return Ok(index);
            }
            let Some(rel) = peek_rel(entry) else { continue };
            let bucket = self.rel_bucket_of(hash_rel(&rel));
            let _guard = self.lock_rel_bucket(bucket)?;
            if peek_rel(entry) == Some(rel) && self.may_forget(entry) {
                self.unlink_rel(bucket, index);
                entry.state.store(REL_TAKEN, Relaxed);
                return Ok(index);
            }
        }
        Err(Errno(libc::ENOSPC))
    }

    /// Entries that have storage, some unused if there is room for any.
    fn stored_rels(&self) -> Result<u32, Errno> {
        let header = self.header();
        let all_used = || header.fresh_rel.load(Relaxed) >= header.stored_rels.load(Acquire);
        if header.stored_rels.load(Acquire) < self.sizes.rels && all_used() {
            let _guard = self.lock_free()?;
            if all_used() {
                // Without room for more, used ones have to make way.
                let _ = self.store_rel(header.stored_rels.load(Acquire));
            }
        }
        Ok(header.stored_rels.load(Acquire))
    }

    fn may_forget(&self, entry: &Rel) -> bool {
        let flags = entry.flags.load(Relaxed);
        let changed = flags & FLAG_CHANGED != 0;
        let removed = entry.state.load(Relaxed) == REL_ABSENT && flags & FLAG_UNLOGGED == 0;
        !changed || removed && entry.change_lsn.load(Relaxed) <= self.shipped()
    }

    fn unlink_rel(&self, bucket: u32, index: u32) {
        let next = self.rel(index).next.load(Relaxed);
        let mut link = self.rel_bucket(bucket);
        while link.load(Relaxed) != index {
            link = &self.rel(link.load(Relaxed)).next;
        }
        link.store(next, Relaxed);
    }
}

fn set_size(entry: &Rel, blocks: Option<BlockNumber>) {
    entry.blocks.store(blocks.unwrap_or(0), Relaxed);
    entry.state.store(if blocks.is_some() { REL_PRESENT } else { REL_ABSENT }, Relaxed);
}

fn state_of(entry: &Rel) -> Result<RelState, WaitingReset> {
    let flags = entry.flags.load(Relaxed);
    if flags & FLAG_RESET != 0 {
        return Err(WaitingReset);
    }
    Ok(RelState {
        blocks: (entry.state.load(Relaxed) == REL_PRESENT).then(|| entry.blocks.load(Relaxed)),
        unlogged: flags & FLAG_UNLOGGED != 0,
        trunc_to: entry.trunc_to.load(Relaxed),
        trunc_lsn: entry.trunc_lsn.load(Relaxed),
    })
}

/// The fork an entry is for, read without its lock: a hint.
fn peek_rel(entry: &Rel) -> Option<RelTag> {
    let state = entry.state.load(Relaxed);
    let fork = ForkNumber::try_from(entry.fork.load(Relaxed) as u8).ok()?;
    let rel = RelTag { spc: entry.spc.load(Relaxed), db: entry.db.load(Relaxed), rel: entry.rel.load(Relaxed), fork };
    (state == REL_PRESENT || state == REL_ABSENT).then_some(rel)
}
