//! Notices that this process reads a fork in order: the agent is told now and then, so that it fetches what follows.

use std::cell::UnsafeCell;

use page_cache::types::{BlockNumber, ForkNumber, PageTag, RelTag};

/// Forks that a process reads in order at the same time.
const STREAMS: usize = 8;

/// A run this long is no coincidence.
const RUN_BLOCKS: u32 = 2;

/// The agent is told of every so many blocks of a run: the number of a batch.
const HINT_EVERY: BlockNumber = 32;

#[derive(Clone, Copy)]
struct Stream {
    rel: RelTag,
    expected: BlockNumber,
    run: u32,
}

const NOTHING: Stream = Stream { rel: RelTag { spc: 0, db: 0, rel: 0, fork: ForkNumber::Main }, expected: 0, run: 0 };

struct Streams {
    streams: [Stream; STREAMS],
    next_victim: usize,
}

struct Cell(UnsafeCell<Streams>);
// SAFETY: Postgres has one thread.
unsafe impl Sync for Cell {}

static READS: Cell = Cell(UnsafeCell::new(Streams { streams: [NOTHING; STREAMS], next_victim: 0 }));

/// Takes note of a read; true when the agent should be told.
pub fn observe(tag: &PageTag) -> bool {
    // SAFETY: Postgres has one thread, and nothing called from `observe` calls it again.
    unsafe { (*READS.0.get()).observe(tag) }
}

impl Streams {
    fn observe(&mut self, tag: &PageTag) -> bool {
        let next = tag.block.wrapping_add(1);
        if let Some(stream) = self.streams.iter_mut().find(|stream| stream.rel == tag.rel) {
            // A block that is read twice breaks no run.
            if tag.block == stream.expected.wrapping_sub(1) && stream.run > 0 {
                return false;
            }
            stream.run = if tag.block == stream.expected { stream.run.saturating_add(1) } else { 1 };
            stream.expected = next;
            return stream.run == RUN_BLOCKS || stream.run > RUN_BLOCKS && tag.block.is_multiple_of(HINT_EVERY);
        }
        self.streams[self.next_victim] = Stream { rel: tag.rel, expected: next, run: 1 };
        self.next_victim = (self.next_victim + 1) % STREAMS;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(rel: u32, block: BlockNumber) -> PageTag {
        PageTag { rel: RelTag { spc: 1663, db: 5, rel, fork: ForkNumber::Main }, block }
    }

    #[test]
    fn a_scan_is_told_of_at_its_second_block_and_at_each_batch() {
        let mut streams = Streams { streams: [NOTHING; STREAMS], next_victim: 0 };
        let told: Vec<_> = (0..100).filter(|block| streams.observe(&tag(1, *block))).collect();
        assert_eq!(told, [1, 32, 64, 96]);
    }

    #[test]
    fn random_reads_are_not_told_of_and_do_not_disturb_scans() {
        let mut streams = Streams { streams: [NOTHING; STREAMS], next_victim: 0 };
        assert!((0..50).all(|n| !streams.observe(&tag(2, n * 7919 % 1000))));
        streams.observe(&tag(1, 5));
        assert!(!streams.observe(&tag(2, 1)) && streams.observe(&tag(1, 6)) && !streams.observe(&tag(1, 6)));
        assert!(!streams.observe(&tag(1, 900)) && streams.observe(&tag(1, 901)));
    }
}
