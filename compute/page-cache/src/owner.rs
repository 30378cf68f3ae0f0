//! The agent's handle on the page cache.

use std::{io, path::PathBuf};
use types::{BlockNumber, Lsn, PAGE_BYTES, PageTag, RelTag};

/// Where the cache lives and how large it may grow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageCacheConfig {
    /// The index: a file on tmpfs.
    pub shm_path: PathBuf,
    /// The pages: a plain file of 8 KiB slots.
    pub pages_path: PathBuf,
    /// Bytes of pages that can be fetched again.
    pub clean_bytes: u64,
    /// Bytes of pages that must be kept.
    pub kept_bytes: u64,
}

/// What the cache holds now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageCacheStats {
    /// Bytes of pages that can be fetched again.
    pub clean_bytes: u64,
    /// Bytes of pages that must be kept.
    pub kept_bytes: u64,
    /// Relation forks known.
    pub rels: u64,
}

/// A cheap clone handle.
#[derive(Debug, Clone)]
pub struct PageCache {}

impl PageCache {
    /// Creates both files anew.
    pub fn create(_config: &PageCacheConfig) -> io::Result<PageCache> {
        Err(io::Error::other("unfinished"))
    }
    /// Start LSN of the oldest transaction in progress, else the shipped end.
    pub fn set_horizon(&self, _lsn: Lsn) {}
    /// End of the WAL that a quorum holds (and so storage can describe pages at). Call before [`Self::set_horizon`].
    pub fn set_shipped(&self, _lsn: Lsn) {}
    /// Relations that have an init fork; before Postgres starts.
    pub fn set_unlogged(&self, _rels: &[RelTag]) -> io::Result<()> {
        Ok(())
    }
    /// Deposits a page as of the shipped LSN; before Postgres starts.
    pub fn prefill_page(&self, _tag: PageTag, _page: &[u8; PAGE_BYTES]) -> io::Result<()> {
        Ok(())
    }
    /// Deposits a fork's size; before Postgres starts.
    pub fn prefill_rel_size(&self, _rel: RelTag, _blocks: Option<BlockNumber>) -> io::Result<()> {
        Ok(())
    }
    /// What it holds.
    pub fn stats(&self) -> PageCacheStats {
        PageCacheStats::default()
    }
}
