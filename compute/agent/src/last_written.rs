//! Where each page, relation size and relation was last changed, as an upper bound in constant memory.
//!
//! The pageserver need not have ingested all WAL to answer a read, only what may have changed the thing that is read. Buckets
//! of a hash hold the highest position of everything that falls into them: never too low, seldom much too high.

use std::{
    collections::hash_map::DefaultHasher,
    hash::{Hash, Hasher},
    sync::atomic::{AtomicU64, Ordering},
};

use types::{ForkNumber, Lsn, PageTag, RelTag};
use wal_redo::Change;

const PAGE_BUCKETS: usize = 65_536;
const REL_BUCKETS: usize = 4_096;

/// Upper bounds of the last change, for any number of readers beside one writer.
pub struct LastWritten {
    /// By page: records that change it.
    pages: Buckets,
    /// By fork: records that may change its size.
    sizes: Buckets,
    /// By fork: creation, truncation and removal, which change pages without naming them.
    shapes: Buckets,
    /// Everything: whole databases that came or went, and records that are not understood.
    floor: AtomicU64,
}

impl LastWritten {
    /// Nothing has changed since `start`, where the compute's WAL begins.
    pub fn new(start: Lsn) -> Self {
        Self {
            pages: Buckets::new(PAGE_BUCKETS),
            sizes: Buckets::new(REL_BUCKETS),
            shapes: Buckets::new(REL_BUCKETS),
            floor: AtomicU64::new(start.0),
        }
    }

    /// Where the page's content as WAL describes it may have changed last.
    pub fn page(&self, tag: &PageTag) -> Lsn {
        self.pages.get(tag).max(self.shapes.get(&tag.rel)).max(self.floor())
    }

    /// Where the fork's size may have changed last.
    pub fn rel_size(&self, rel: &RelTag) -> Lsn {
        self.sizes.get(rel).max(self.shapes.get(rel)).max(self.floor())
    }

    /// Anything may have changed at `lsn`.
    pub fn raise_floor(&self, lsn: Lsn) {
        self.floor.fetch_max(lsn.0, Ordering::Relaxed);
    }

    /// Takes note of one effect of the record that ends at `end`.
    pub fn apply(&self, end: Lsn, change: &Change) {
        match change {
            Change::Page { tag, will_init: _ } => {
                self.pages.raise(tag, end);
                self.sizes.raise(&tag.rel, end);
            }
            Change::CreateRel(rel) | Change::TruncateRel { rel, blocks: _ } => self.shapes.raise(rel, end),
            Change::DropRel(rel) => {
                ForkNumber::ALL.iter().for_each(|fork| self.shapes.raise(&rel.with_fork(*fork), end));
            }
            Change::CreateDatabase { .. }
            | Change::CopyDatabase { .. }
            | Change::DropDatabase { .. }
            | Change::DropTablespace { .. } => self.raise_floor(end),
            // A running Postgres keeps these in its own data directory and never asks for them again.
            Change::SlruPage { .. }
            | Change::SlruTruncate { .. }
            | Change::RelationMap { .. }
            | Change::TwoPhaseCreate { .. }
            | Change::TwoPhaseRemove { .. }
            | Change::CreateTablespace { .. }
            | Change::Commit { .. }
            | Change::AdvanceOrigin { .. }
            | Change::DropOrigin { .. }
            | Change::AuxFile { .. } => {}
        }
    }

    fn floor(&self) -> Lsn {
        Lsn(self.floor.load(Ordering::Relaxed))
    }
}

struct Buckets(Box<[AtomicU64]>);

impl Buckets {
    fn new(count: usize) -> Self {
        Self((0..count).map(|_| AtomicU64::new(0)).collect())
    }

    fn bucket<K: Hash>(&self, key: &K) -> &AtomicU64 {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        &self.0[(hasher.finish() % self.0.len() as u64) as usize]
    }

    fn get<K: Hash>(&self, key: &K) -> Lsn {
        Lsn(self.bucket(key).load(Ordering::Relaxed))
    }

    fn raise<K: Hash>(&self, key: &K, lsn: Lsn) {
        self.bucket(key).fetch_max(lsn.0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rel(rel: u32) -> RelTag {
        RelTag { spc: 1663, db: 5, rel, fork: ForkNumber::Main }
    }

    fn page(number: u32, block: u32) -> PageTag {
        PageTag { rel: rel(number), block }
    }

    #[test]
    fn a_page_is_as_old_as_its_last_record() {
        let last = LastWritten::new(Lsn(100));
        last.apply(Lsn(200), &Change::Page { tag: page(1, 0), will_init: false });
        assert_eq!(last.page(&page(1, 0)), Lsn(200));
        assert_eq!(last.page(&page(1, 1)), Lsn(100));
        assert_eq!(last.rel_size(&rel(1)), Lsn(200));
        assert_eq!(last.rel_size(&rel(2)), Lsn(100));
    }

    #[test]
    fn truncation_touches_every_page_of_the_fork() {
        let last = LastWritten::new(Lsn(100));
        last.apply(Lsn(300), &Change::TruncateRel { rel: rel(1), blocks: 3 });
        assert_eq!(last.page(&page(1, 70_000)), Lsn(300));
        assert_eq!(last.rel_size(&rel(1)), Lsn(300));
        assert_eq!(last.page(&page(2, 0)), Lsn(100));
    }

    #[test]
    fn a_dropped_relation_loses_all_forks() {
        let last = LastWritten::new(Lsn(100));
        last.apply(Lsn(300), &Change::DropRel(rel(1)));
        assert_eq!(last.rel_size(&rel(1).with_fork(ForkNumber::Vm)), Lsn(300));
    }

    #[test]
    fn a_new_database_touches_everything_and_nothing_goes_back() {
        let last = LastWritten::new(Lsn(100));
        last.apply(Lsn(400), &Change::CreateDatabase { spc: 1663, db: 9 });
        last.apply(Lsn(350), &Change::Page { tag: page(1, 0), will_init: false });
        assert_eq!(last.page(&page(1, 0)), Lsn(400));
    }
}
