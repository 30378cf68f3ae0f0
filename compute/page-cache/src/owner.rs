//! The agent's handle on the page cache.

use std::{
    ffi::CString,
    io::{self, IoSlice},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::*},
};

use types::{BlockNumber, ForkNumber, Lsn, PAGE_BYTES, PageTag, RelTag};

use crate::{
    Page,
    asleep::{self, Entry},
    layout::{DEFAULT_MAX_RELS, Sizes},
    pages::slot_offset,
    shared::Shared,
    sys,
};

/// Where the cache lives and how large it may grow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageCacheConfig {
    /// The index: a file on tmpfs that takes room as the cache fills: about 50 bytes for each page, and 2 MB.
    pub shm_path: PathBuf,
    /// The pages: a plain file of 8 KiB slots that grows as needed, up to both budgets together.
    pub pages_path: PathBuf,
    /// Budget in bytes for pages that can be fetched again, as long as [`PageCache::set_clean_bytes`] says nothing else.
    pub clean_bytes: u64,
    /// Budget in bytes for pages that must be kept. When it is used up, statements that write fail with "disk full".
    pub kept_bytes: u64,
}

/// The budget for clean pages may be raised to so many times what it was when the cache was made: the index has room for them.
const CLEAN_HEADROOM: u64 = 4;

/// Slots that one call looks at for kept pages that may go.
const RELEASE_SLOTS: u32 = 262_144;

/// Pages that one call lets go.
const TRIM_PAGES: u32 = 65_536;

/// What the cache holds now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageCacheStats {
    /// Bytes of pages that can be fetched again.
    pub clean_bytes: u64,
    /// Bytes of pages that must be kept. Some of them may be free to go: they go when the budget is used up.
    pub kept_bytes: u64,
    /// Entries in use of the table of relation forks.
    pub rels: u64,
    /// Pages whose bytes were not what had been written: fetched again where storage knows them, else errors.
    pub damaged_pages: u64,
}

/// The agent's handle; clones are cheap and mean the same cache.
#[derive(Clone)]
pub struct PageCache {
    shared: Arc<Shared>,
}

impl PageCache {
    /// Creates an empty cache, replacing both files. They are private to the user that the process runs as.
    pub fn create(config: &PageCacheConfig) -> io::Result<PageCache> {
        Self::create_with_max_rels(config, DEFAULT_MAX_RELS)
    }

    /// As [`PageCache::create`], for a chosen number of relation forks known at once (default 131072).
    pub fn create_with_max_rels(config: &PageCacheConfig, max_rels: u32) -> io::Result<PageCache> {
        Self::make(config, max_rels, true)
    }

    /// Creates a cache that has the pages of one that fell asleep, whose list `asleep` is ([`PageCache::fall_asleep`]); its
    /// pages file is in place. What is wrong with single pages is found when they are read.
    pub fn wake(config: &PageCacheConfig, asleep: &[u8]) -> io::Result<PageCache> {
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        let (_, entries) = asleep::decode(asleep).ok_or_else(invalid)?;
        let cache = Self::make(config, DEFAULT_MAX_RELS, false)?;
        cache.shared.adopt(entries.iter().map(|entry| (entry.tag, entry.slot, entry.crc)))?;
        Ok(cache)
    }

    #[cfg(test)]
    pub(crate) fn shared_for_test(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    fn make(config: &PageCacheConfig, max_rels: u32, replace: bool) -> io::Result<PageCache> {
        let most_clean = config.clean_bytes.saturating_mul(CLEAN_HEADROOM);
        let sizes = Sizes::new(most_clean, config.kept_bytes, max_rels)?;
        let shared = Shared::create(&c_path(&config.shm_path)?, &c_path(&config.pages_path)?, sizes, replace)?;
        let cache = PageCache { shared: Arc::new(shared) };
        cache.set_clean_bytes(config.clean_bytes);
        Ok(cache)
    }

    /// For when Postgres has ended and storage has all WAL up to `end`: leaves in the pages file only what is as WAL says at
    /// `end`, and answers the list of it, which `label` goes into.
    pub fn fall_asleep(&self, end: Lsn, label: &str) -> io::Result<Vec<u8>> {
        self.set_horizon(end);
        self.shared.release(u32::MAX)?;
        while self.shared.trim(TRIM_PAGES)? > 0 {}
        let mut entries = Vec::new();
        self.shared.for_each_clean(|tag, slot, crc| entries.push(Entry { tag, slot, crc }));
        self.shared.give_back_others()?;
        Ok(asleep::encode(label, &entries))
    }

    /// Changes the budget for pages that can be fetched again: at least a page, at most four times what the cache was made
    /// with. [`PageCache::trim`] makes it so.
    pub fn set_clean_bytes(&self, bytes: u64) {
        self.shared.set_clean_bound(u32::try_from(bytes / PAGE_BYTES as u64).unwrap_or(u32::MAX));
    }

    /// Makes pages that need not be kept any longer clean, then lets clean pages go when they are well over their budget (some
    /// ten thousand at a time), and gives their room on disk back. Returns how many. For calling now and then.
    pub fn trim(&self) -> io::Result<u32> {
        self.shared.release(RELEASE_SLOTS)?;
        Ok(self.shared.trim(TRIM_PAGES)?)
    }

    /// Publishes the start LSN of the first WAL record of the oldest transaction in progress, else the shipped end. Never
    /// goes back. Call [`PageCache::set_shipped`] too: kept pages are let go only when both allow it.
    pub fn set_horizon(&self, lsn: Lsn) {
        self.shared.header().shipped.fetch_max(lsn.0, Release);
        self.shared.header().horizon.fetch_max(lsn.0, Release);
    }

    /// Publishes the end of the WAL that a quorum holds: pages fetched from now on must be as WAL up to here says, or later.
    /// Never goes back.
    pub fn set_shipped(&self, lsn: Lsn) {
        self.shared.header().shipped.fetch_max(lsn.0, Release);
    }

    /// What [`PageCache::set_shipped`] published last.
    pub fn shipped(&self) -> Lsn {
        Lsn(self.shared.shipped())
    }

    /// Names the relations that have an init fork (any fork of them will do), before Postgres starts: their main forks
    /// start as their init forks, the others are absent.
    pub fn set_unlogged(&self, rels: &[RelTag]) -> io::Result<()> {
        for rel in rels {
            for fork in [ForkNumber::Main, ForkNumber::Fsm, ForkNumber::Vm] {
                self.shared.set_rel_unlogged(&rel.with_fork(fork), true)?;
            }
        }
        Ok(())
    }

    /// Deposits a page as of the shipped LSN; before Postgres starts. No room is no error.
    pub fn prefill_page(&self, tag: PageTag, page: &[u8; PAGE_BYTES]) -> io::Result<()> {
        Ok(self.shared.deposit(&tag, page, self.shared.shipped()).map(drop)?)
    }

    /// Deposits a fork's size (`None`: it does not exist); before Postgres starts.
    pub fn prefill_rel_size(&self, rel: RelTag, blocks: Option<BlockNumber>) -> io::Result<()> {
        Ok(self.shared.learn_rel(&rel, blocks)?)
    }

    /// Deposits a page that was fetched when `as_of` was shipped; refused (without error) when Postgres knows better.
    pub fn deposit(&self, tag: PageTag, page: &Page, as_of: Lsn) -> io::Result<bool> {
        Ok(self.shared.deposit(&tag, page, as_of.0)?)
    }

    /// [`PageCache::deposit`] for many pages (at most 1024); those whose slots lie together are written together. Answers how
    /// many were taken.
    pub fn deposit_many(&self, pages: &[(PageTag, &Page)], as_of: Lsn) -> io::Result<usize> {
        let shared = &*self.shared;
        let mut slots: Vec<(u32, &PageTag, &Page)> = Vec::with_capacity(pages.len());
        let mut outcome = Ok(0);
        for (tag, page) in pages {
            let taken = slots.len();
            match shared.contains(tag).and_then(|there| if there { Ok(None) } else { shared.slot_for_clean(taken) }) {
                Ok(slot) => slots.extend(slot.map(|slot| (slot, tag, *page))),
                Err(errno) => {
                    outcome = Err(errno);
                    break;
                }
            }
        }
        slots.sort_unstable_by_key(|(slot, ..)| *slot);
        for run in slots.chunk_by(|(before, ..), (slot, ..)| before + 1 == *slot) {
            let parts: Vec<IoSlice<'_>> = run.iter().map(|(_, _, page)| IoSlice::new(*page)).collect();
            let stored = sys::write_parts_at(shared.pages_fd, &parts, slot_offset(run[0].0)).is_ok();
            for (slot, tag, page) in run {
                let linked = shared.link_deposit(*slot, tag, page, stored, as_of.0);
                outcome = outcome.and_then(|taken| linked.map(|linked| taken + usize::from(linked)));
            }
        }
        Ok(outcome?)
    }

    /// The pages that WAL does not fully tell, as Postgres left them: of sequences (main forks) or of free space maps. For
    /// when it has ended. At most `limit`.
    pub fn soft_pages(&self, fork: ForkNumber, limit: usize) -> io::Result<Vec<(PageTag, Page)>> {
        let mut pages = Vec::new();
        self.shared.for_each_soft(fork, |tag, page| {
            if pages.len() < limit {
                pages.push((tag, *page));
            }
        })?;
        Ok(pages)
    }

    /// Copies a cached page; false when it is not cached.
    pub fn read(&self, tag: PageTag, page: &mut Page) -> io::Result<bool> {
        Ok(self.shared.read(&tag, page)?)
    }

    /// Blocks of a fork, as far as is known without asking; `None` when nothing is known or it does not exist.
    pub fn rel_blocks(&self, rel: RelTag) -> io::Result<Option<BlockNumber>> {
        let state = self.shared.rel_state(&rel)?;
        Ok(state.and_then(Result::ok).filter(|state| !state.unlogged).and_then(|state| state.blocks))
    }

    /// True when the page is cached.
    pub fn contains(&self, tag: PageTag) -> io::Result<bool> {
        Ok(self.shared.contains(&tag)?)
    }

    /// What it holds.
    pub fn stats(&self) -> PageCacheStats {
        let header = self.shared.header();
        let bytes = |pages: u32| u64::from(pages) * PAGE_BYTES as u64;
        PageCacheStats {
            clean_bytes: bytes(header.clean_count.load(Relaxed)),
            kept_bytes: bytes(header.kept_count.load(Relaxed)),
            rels: u64::from(header.fresh_rel.load(Relaxed)) - 1,
            damaged_pages: u64::from(header.damaged.load(Relaxed)),
        }
    }
}

impl std::fmt::Debug for PageCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageCache").field("stats", &self.stats()).finish()
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}
