//! Directory listings that show relations too.

use std::{
    cell::UnsafeCell,
    io::{Cursor, Write},
};

use libc::{DIR, dirent};
use page_cache::{
    Errno,
    protocol::{LISTED_REL_BYTES, decode_listed},
    types::{Oid, REL_SEGMENT_BLOCKS, RelTag},
};

use crate::{agent, postgres, runtime::Runtime};

/// Directories with relations that a process reads at once; Postgres reads one or two.
const MAX_OPEN: usize = 32;

/// A directory being read: behind its real entries come those of the relations.
struct Listing {
    dir: *mut DIR,
    spc: Oid,
    db: Oid,
    /// Forks and how many segment files each has; asked for when the real entries are through.
    forks: Option<Vec<(RelTag, u32)>>,
    /// The next entry: index of the fork, number of the segment.
    next: (usize, u32),
    entry: dirent,
}

struct Table(UnsafeCell<[Option<Box<Listing>>; MAX_OPEN]>);
// SAFETY: Postgres has one thread, and no signal handler of a backend reads directories.
unsafe impl Sync for Table {}

static TABLE: Table = Table(UnsafeCell::new([const { None }; MAX_OPEN]));

fn table() -> &'static mut [Option<Box<Listing>>; MAX_OPEN] {
    // SAFETY: see `Table`; no reference outlives one call.
    unsafe { &mut *TABLE.0.get() }
}

fn listing(dir: *mut DIR) -> Option<&'static mut Box<Listing>> {
    table().iter_mut().flatten().find(|listing| listing.dir == dir)
}

/// Notes that `dir` is a database directory. False when too many are open.
pub fn opened(dir: *mut DIR, spc: Oid, db: Oid) -> bool {
    let Some(place) = table().iter_mut().find(|place| place.is_none()) else { return false };
    // SAFETY: all zeroes is a valid entry.
    let entry = unsafe { std::mem::zeroed() };
    *place = Some(Box::new(Listing { dir, spc, db, forks: None, next: (0, 0), entry }));
    true
}

/// Forgets a directory.
pub fn closed(dir: *mut DIR) {
    if let Some(place) = table().iter_mut().find(|place| place.as_ref().is_some_and(|listing| listing.dir == dir)) {
        *place = None;
    }
}

/// The next relation file of `dir`; null at the end, or when it is no database directory.
pub fn next_entry(runtime: &Runtime, dir: *mut DIR) -> Result<*mut dirent, Errno> {
    let Some(listing) = listing(dir) else { return Ok(std::ptr::null_mut()) };
    if listing.forks.is_none() {
        let wanted = !postgres::is_postmaster();
        listing.forks = Some(if wanted { runtime.forks_in(listing.spc, listing.db)? } else { Vec::new() });
    }
    let (index, segment) = listing.next;
    let forks = listing.forks.as_deref().unwrap_or_default();
    let Some((rel, segments)) = forks.get(index) else { return Ok(std::ptr::null_mut()) };
    listing.next = if segment + 1 < *segments { (index, segment + 1) } else { (index + 1, 0) };
    fill(&mut listing.entry, rel, segment);
    Ok(&raw mut listing.entry)
}

fn fill(entry: &mut dirent, rel: &RelTag, segment: u32) {
    let mut name = Cursor::new([0u8; 64]);
    // Ten digits, a suffix, ten digits: always fits.
    let _ = write!(name, "{}{}", rel.rel, rel.fork.suffix());
    if segment > 0 {
        let _ = write!(name, ".{segment}");
    }
    entry.d_ino = u64::from(rel.rel) << 24 | (rel.fork as u64) << 20 | u64::from(segment) | 1 << 63;
    entry.d_reclen = size_of::<dirent>() as u16;
    entry.d_type = libc::DT_REG;
    entry.d_name.fill(0);
    for (to, from) in entry.d_name.iter_mut().zip(name.get_ref()) {
        *to = from.cast_signed();
    }
}

impl Runtime {
    /// The forks of a database directory that exist, with how many files each has: what storage lists, but as Postgres
    /// has left it, and what Postgres has made since.
    fn forks_in(&self, spc: Oid, db: Oid) -> Result<Vec<(RelTag, u32)>, Errno> {
        let listed = agent::list_rels(self.socket, spc, db)?;
        let mut rels = Vec::with_capacity(listed.len() / LISTED_REL_BYTES);
        for bytes in listed.as_chunks::<LISTED_REL_BYTES>().0 {
            let (rel, fork, blocks) = decode_listed(bytes).ok_or(Errno(libc::EIO))?;
            let rel = RelTag { spc, db, rel, fork };
            self.shared.learn_rel(&rel, Some(blocks))?;
            rels.push(rel);
        }
        self.shared.for_each_rel_in(spc, db, |rel| rels.push(rel))?;
        rels.sort_unstable();
        rels.dedup();
        let mut forks = Vec::with_capacity(rels.len());
        for rel in rels {
            if let Some(blocks) = self.state(&rel)?.blocks {
                forks.push((rel, blocks.div_ceil(REL_SEGMENT_BLOCKS).max(1)));
            }
        }
        Ok(forks)
    }
}
