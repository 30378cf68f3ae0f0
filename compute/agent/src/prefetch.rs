//! Notices sequential reads.

use types::{BlockNumber, PageTag, RelTag};

/// Blocks asked for ahead of a sequential reader.
pub const PREFETCH_BLOCKS: u32 = 15;

/// A run this long is sequential.
const RUN_BLOCKS: u32 = 2;

/// Forks that are watched at a time.
const WATCHED: usize = 64;

/// Remembers where recent readers of a few forks were.
#[derive(Debug, Default)]
pub struct SequentialReads {
    runs: Vec<Run>,
    next_victim: usize,
}

#[derive(Debug)]
struct Run {
    rel: RelTag,
    /// The block that would continue the run: the one behind the last that was asked for or sent ahead.
    expected: BlockNumber,
    length: u32,
}

impl SequentialReads {
    /// Takes note of a read; how many following blocks to send ahead.
    ///
    /// A block that was sent ahead is found in the cache and never asked for, so the reader's next question comes right
    /// behind those.
    pub fn observe(&mut self, tag: &PageTag) -> u32 {
        let Some(run) = self.runs.iter_mut().find(|run| run.rel == tag.rel) else {
            self.watch(tag);
            return 0;
        };
        run.length = if run.expected == tag.block { run.length.saturating_add(1) } else { 1 };
        let ahead = if run.length >= RUN_BLOCKS { PREFETCH_BLOCKS } else { 0 };
        run.expected = tag.block.saturating_add(1 + ahead);
        ahead
    }

    fn watch(&mut self, tag: &PageTag) {
        let run = Run { rel: tag.rel, expected: tag.block.saturating_add(1), length: 1 };
        if self.runs.len() < WATCHED {
            self.runs.push(run);
        } else {
            self.runs[self.next_victim] = run;
            self.next_victim = (self.next_victim + 1) % WATCHED;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::ForkNumber;

    fn tag(rel: u32, block: u32) -> PageTag {
        PageTag { rel: RelTag { spc: 1663, db: 5, rel, fork: ForkNumber::Main }, block }
    }

    #[test]
    fn a_scan_is_read_ahead_and_random_reads_are_not() {
        let mut reads = SequentialReads::default();
        assert_eq!(reads.observe(&tag(1, 0)), 0);
        assert_eq!(reads.observe(&tag(1, 1)), PREFETCH_BLOCKS);
        assert_eq!(reads.observe(&tag(1, 2 + PREFETCH_BLOCKS)), PREFETCH_BLOCKS);
        assert_eq!(reads.observe(&tag(1, 5)), 0);
        assert_eq!(reads.observe(&tag(1, 900)), 0);
    }

    #[test]
    fn forks_do_not_disturb_each_other() {
        let mut reads = SequentialReads::default();
        reads.observe(&tag(1, 0));
        reads.observe(&tag(2, 7));
        assert_eq!(reads.observe(&tag(1, 1)), PREFETCH_BLOCKS);
        (10..10 + 2 * WATCHED as u32).for_each(|rel| assert_eq!(reads.observe(&tag(rel, 0)), 0));
        assert_eq!(reads.runs.len(), WATCHED);
    }
}
