//! Which descriptors stand for relation files and for WAL.

use std::cell::UnsafeCell;

use page_cache::types::{ForkNumber, RelTag};

use crate::path::Segment;

/// Descriptors from here on are never ours. Postgres's `max_files_per_process` is 1000 unless set higher.
const MAX_FDS: usize = 65_536;

/// What a descriptor stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fd {
    /// A segment of a fork, at a position for `read`, `write` and `lseek`.
    Segment(Segment, u64),
    /// A WAL segment file.
    Wal,
    /// Nothing of ours.
    Other,
}

/// All zeroes is "other": the table costs memory only where it is used.
#[derive(Clone, Copy)]
struct Entry {
    kind: u8,
    rel: RelTag,
    segment: u32,
    position: u64,
}

const KIND_OTHER: u8 = 0;
const KIND_SEGMENT: u8 = 1;
const KIND_WAL: u8 = 2;

const OTHER: Entry =
    Entry { kind: KIND_OTHER, rel: RelTag { spc: 0, db: 0, rel: 0, fork: ForkNumber::Main }, segment: 0, position: 0 };

struct Table(UnsafeCell<[Entry; MAX_FDS]>);
// SAFETY: Postgres has one thread; a signal handler closes and opens no descriptor that the interrupted call works on.
unsafe impl Sync for Table {}

static TABLE: Table = Table(UnsafeCell::new([OTHER; MAX_FDS]));

fn entry(fd: i32) -> Option<*mut Entry> {
    let index = usize::try_from(fd).ok().filter(|index| *index < MAX_FDS)?;
    // SAFETY: the index lies within the array.
    Some(unsafe { TABLE.0.get().cast::<Entry>().add(index) })
}

/// What `fd` stands for.
pub fn get(fd: i32) -> Fd {
    let Some(entry) = entry(fd) else { return Fd::Other };
    // SAFETY: `entry` points into the table.
    let entry = unsafe { entry.read() };
    match entry.kind {
        KIND_SEGMENT => Fd::Segment(Segment { rel: entry.rel, number: entry.segment }, entry.position),
        KIND_WAL => Fd::Wal,
        _ => Fd::Other,
    }
}

/// Notes what `fd` stands for; false when its number is too high to be noted.
pub fn set(fd: i32, stands_for: Fd) -> bool {
    let Some(entry) = entry(fd) else { return stands_for == Fd::Other };
    let value = match stands_for {
        Fd::Segment(segment, position) => {
            Entry { kind: KIND_SEGMENT, rel: segment.rel, segment: segment.number, position }
        }
        Fd::Wal => Entry { kind: KIND_WAL, ..OTHER },
        Fd::Other => OTHER,
    };
    // SAFETY: `entry` points into the table.
    unsafe { entry.write(value) };
    true
}
