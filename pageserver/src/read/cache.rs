//! Pages as they were last made, to start from.

use bytes::Bytes;
use rustc_hash::FxBuildHasher;
use types::{Lsn, PAGE_BYTES};

use crate::storage::Key;

/// What an entry costs besides its page, about.
const OVERHEAD_BYTES: u32 = 160;

/// The newest version that was made of each page, within a bound of memory.
pub struct PageCache {
    pages: moka::sync::Cache<(u64, Key), (Lsn, Bytes), FxBuildHasher>,
}

impl PageCache {
    /// Bounded by `bytes`.
    pub fn new(bytes: u64) -> PageCache {
        let weigh = |_: &(u64, Key), _: &(Lsn, Bytes)| PAGE_BYTES as u32 + OVERHEAD_BYTES;
        let pages = moka::sync::Cache::builder().max_capacity(bytes).weigher(weigh);
        PageCache { pages: pages.build_with_hasher(FxBuildHasher) }
    }

    /// The version that is kept: as of which LSN, and the page.
    pub fn get(&self, branch_id: u64, key: Key) -> Option<(Lsn, Bytes)> {
        self.pages.get(&(branch_id, key))
    }

    /// Keeps a version, unless a newer one is there.
    pub fn insert(&self, branch_id: u64, key: Key, lsn: Lsn, page: Bytes) {
        let newer_is_there = self.pages.get(&(branch_id, key)).is_some_and(|(known, _)| known >= lsn);
        if !newer_is_there {
            self.pages.insert((branch_id, key), (lsn, page));
        }
    }
}
