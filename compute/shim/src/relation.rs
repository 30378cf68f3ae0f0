//! File operations on segments of relation forks.

use page_cache::{
    Errno, Keep, Page, PageOrigin, RelState, is_zero, keep_for,
    types::{BlockNumber, ForkNumber, PAGE_BYTES, PageTag, REL_SEGMENT_BLOCKS, RelTag},
};

use crate::{agent, path::Segment, postgres, readahead, runtime::Runtime};

const PAGE: u64 = PAGE_BYTES as u64;

/// How `open` was asked to treat what is, or is not, there.
#[derive(Debug, Clone, Copy)]
pub struct OpenMode {
    /// `O_CREAT`
    pub create: bool,
    /// `O_EXCL`
    pub exclusive: bool,
    /// `O_TRUNC`
    pub truncate: bool,
}

impl Runtime {
    /// Does to the fork what opening the segment does.
    pub fn open_segment(&self, segment: &Segment, mode: OpenMode) -> Result<(), Errno> {
        let exists = self.segment_bytes(segment)?.is_some();
        match (exists, mode.create) {
            (true, true) if mode.exclusive => return Err(Errno(libc::EEXIST)),
            (false, false) => return Err(Errno(libc::ENOENT)),
            (false, true) => self.create(&segment.rel)?,
            (true, _) => {}
        }
        if mode.truncate { self.truncate_segment(segment, 0) } else { Ok(()) }
    }

    /// Length of the segment's file; `None` when there is none.
    pub fn segment_bytes(&self, segment: &Segment) -> Result<Option<u64>, Errno> {
        Ok(bytes_of(segment, &self.state(&segment.rel)?))
    }

    /// What is known of a fork, after asking if need be.
    pub fn state(&self, rel: &RelTag) -> Result<RelState, Errno> {
        loop {
            match self.shared.rel_state(rel)? {
                Some(Ok(state)) => return Ok(state),
                Some(Err(_waiting)) => self.reset(rel)?,
                None => {
                    let blocks = agent::rel_size(self.socket, rel)?;
                    self.shared.learn_rel(rel, blocks)?;
                }
            }
        }
    }

    /// Copies from the segment's file; short at its end.
    pub fn read_segment(&self, segment: &Segment, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
        let state = self.state(&segment.rel)?;
        let length = bytes_of(segment, &state).unwrap_or(0);
        let wanted = length.saturating_sub(offset).min(buf.len() as u64) as usize;
        let mut done = 0;
        while done < wanted {
            let at = offset + done as u64;
            let tag = PageTag { rel: segment.rel, block: segment.first_block() + (at / PAGE) as BlockNumber };
            let within = (at % PAGE) as usize;
            let count = (PAGE_BYTES - within).min(wanted - done);
            let target = &mut buf[done..done + count];
            match <&mut Page>::try_from(&mut *target) {
                Ok(page) => {
                    if !state.unlogged && readahead::observe(&tag) {
                        agent::read_ahead(self.socket, &tag);
                    }
                    self.read_page(&tag, &state, page)?;
                }
                Err(_partial) => {
                    let mut page = [0; PAGE_BYTES];
                    self.read_page(&tag, &state, &mut page)?;
                    target.copy_from_slice(&page[within..within + count]);
                }
            }
            done += count;
        }
        Ok(wanted)
    }

    fn read_page(&self, tag: &PageTag, state: &RelState, page: &mut Page) -> Result<(), Errno> {
        // Before looking: a page that is dropped after this is described by WAL up to a later point, at which the agent
        // then answers.
        let shipped = self.shared.shipped();
        if self.shared.read(tag, page)? {
            return Ok(());
        }
        let cut_unseen = state.trunc_lsn > shipped && tag.block >= state.trunc_to;
        if state.unlogged || cut_unseen {
            page.fill(0);
            return Ok(());
        }
        if tag.rel.fork == ForkNumber::Vm {
            postgres::flush_wal_inserted(shipped);
        }
        agent::get_page(self.socket, tag, page)?;
        // A cache that takes no more pages is no reason to fail.
        let _ = self.shared.deposit(tag, page, shipped);
        Ok(())
    }

    /// Copies to the segment's file. When it fails half-way, what was written counts.
    pub fn write_segment(
        &self,
        segment: &Segment,
        buf: &[u8],
        offset: u64,
        origin: PageOrigin,
    ) -> Result<usize, Errno> {
        let mut done = 0;
        while done < buf.len() {
            match self.write_some(segment, &buf[done..], offset + done as u64, origin) {
                Ok(count) => done += count,
                Err(errno) if done == 0 => return Err(errno),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// Writes up to the next page boundary.
    fn write_some(&self, segment: &Segment, buf: &[u8], at: u64, origin: PageOrigin) -> Result<usize, Errno> {
        let block_in_segment = at / PAGE;
        if block_in_segment >= u64::from(REL_SEGMENT_BLOCKS) {
            return Err(Errno(libc::EFBIG));
        }
        let state = self.state(&segment.rel)?;
        let tag = PageTag { rel: segment.rel, block: segment.first_block() + block_in_segment as BlockNumber };
        let within = (at % PAGE) as usize;
        let count = (PAGE_BYTES - within).min(buf.len());
        if let Ok(page) = <&Page>::try_from(&buf[..count]) {
            self.write_page(&tag, &state, page, origin)?;
            return Ok(count);
        }
        let mut page = [0; PAGE_BYTES];
        if state.blocks.is_some_and(|blocks| tag.block < blocks) {
            self.read_page(&tag, &state, &mut page)?;
        }
        page[within..within + count].copy_from_slice(&buf[..count]);
        self.write_page(&tag, &state, &page, origin)?;
        Ok(count)
    }

    fn write_page(&self, tag: &PageTag, state: &RelState, page: &Page, origin: PageOrigin) -> Result<(), Errno> {
        // A descriptor outlived its file: dropping the page silently, as a file system would, could hide a mistake.
        let blocks = state.blocks.ok_or(Errno(libc::EIO))?;
        let insert = postgres::insert_lsn();
        let extends = tag.block >= blocks;
        if extends && is_zero(page) {
            // Nothing to keep: the agent, too, answers zeroes for what no WAL describes.
            self.shared.discard(tag)?;
        } else {
            let keep = if state.unlogged {
                Keep::FOR_EVER
            } else {
                keep_for(page, tag.rel.fork, origin, insert, self.shared.shipped())
            };
            self.keep_or_flush(tag, page, keep, insert)?;
        }
        if extends { self.shared.grow_rel(&tag.rel, tag.block + 1, insert) } else { Ok(()) }
    }

    /// When the budget is used up, pages may be waiting only for WAL that nobody has synced yet.
    fn keep_or_flush(&self, tag: &PageTag, page: &Page, keep: Keep, insert: u64) -> Result<(), Errno> {
        match self.shared.keep(tag, page, keep) {
            Err(Errno(libc::ENOSPC)) if insert > self.shared.shipped() && insert != u64::MAX => {
                postgres::flush_wal(insert);
                self.shared.keep(tag, page, keep)
            }
            done => done,
        }
    }

    /// Cuts or lengthens the segment's file. `EINVAL` when that is not a whole number of pages.
    pub fn truncate_segment(&self, segment: &Segment, length: u64) -> Result<(), Errno> {
        let blocks_in_segment = length / PAGE;
        if !length.is_multiple_of(PAGE) || blocks_in_segment > u64::from(REL_SEGMENT_BLOCKS) {
            return Err(Errno(libc::EINVAL));
        }
        let blocks = self.state(&segment.rel)?.blocks.ok_or(Errno(libc::ENOENT))?;
        let wanted = segment.first_block() + blocks_in_segment as BlockNumber;
        let insert = postgres::insert_lsn();
        if wanted < blocks {
            self.shared.cut_rel(&segment.rel, wanted, insert)?;
            self.shared.discard_range(segment.rel, wanted, blocks)
        } else if blocks_in_segment > 0 {
            self.shared.grow_rel(&segment.rel, wanted, insert)
        } else {
            Ok(())
        }
    }

    /// Lengthens the segment's file to hold `end` bytes.
    pub fn allocate_segment(&self, segment: &Segment, end: u64) -> Result<(), Errno> {
        let length = self.segment_bytes(segment)?.unwrap_or(0);
        if end > length { self.truncate_segment(segment, end.next_multiple_of(PAGE)) } else { Ok(()) }
    }

    /// Removes the segment's file. Removing the first removes the fork.
    pub fn unlink_segment(&self, segment: &Segment) -> Result<(), Errno> {
        let rel = segment.rel;
        if self.segment_bytes(segment)?.is_none() {
            return Err(Errno(libc::ENOENT));
        }
        if segment.number > 0 {
            return self.truncate_segment(segment, 0);
        }
        let blocks = self.state(&rel)?.blocks.unwrap_or(0);
        self.shared.remove_rel(&rel, postgres::insert_lsn())?;
        self.shared.discard_range(rel, 0, blocks)?;
        if rel.fork == ForkNumber::Init {
            self.shared.forget_unlogged(&rel)?;
        }
        Ok(())
    }

    fn create(&self, rel: &RelTag) -> Result<(), Errno> {
        self.shared.create_rel(rel, postgres::insert_lsn())?;
        if rel.fork != ForkNumber::Init {
            return Ok(());
        }
        for fork in [ForkNumber::Main, ForkNumber::Fsm, ForkNumber::Vm] {
            let other = rel.with_fork(fork);
            self.shared.set_rel_unlogged(&other, false)?;
            if let Some(Ok(RelState { blocks: Some(blocks), .. })) = self.shared.rel_state(&other)? {
                self.shared.pin_rel(other, blocks)?;
            }
        }
        Ok(())
    }

    /// Makes an unlogged relation's fork from its init fork. Several processes may do so at once: the pages are the same.
    fn reset(&self, rel: &RelTag) -> Result<(), Errno> {
        let init = rel.with_fork(ForkNumber::Init);
        let state = self.state(&init)?;
        let blocks = state.blocks.unwrap_or(0);
        for block in 0..blocks {
            let mut page = [0; PAGE_BYTES];
            self.read_page(&PageTag { rel: init, block }, &state, &mut page)?;
            self.shared.keep_if_absent(&PageTag { rel: *rel, block }, &page, Keep::FOR_EVER)?;
        }
        self.shared.finish_reset(rel, blocks)
    }
}

/// Length of a segment's file, given its fork's size; `None` when there is no such file.
fn bytes_of(segment: &Segment, state: &RelState) -> Option<u64> {
    let blocks = state.blocks?;
    let rest = blocks.saturating_sub(segment.first_block());
    (segment.number == 0 || rest > 0).then(|| u64::from(rest.min(REL_SEGMENT_BLOCKS)) * PAGE)
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use page_cache::{PageCache, PageCacheConfig, Shared, types::Lsn};

    use super::*;

    /// A fork that no agent need be asked about, and the cache's files.
    fn fork() -> (Runtime, PageCache, Segment) {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path =
            |name: &str| std::env::temp_dir().join(format!("dormouse-shim-{}-{count}.{name}", std::process::id()));
        let config = PageCacheConfig {
            shm_path: path("index"),
            pages_path: path("pages"),
            clean_bytes: 64 << 10,
            kept_bytes: 64 << 10,
        };
        let cache = PageCache::create(&config).expect("cache");
        let c_path = |path: &std::path::Path| CString::new(path.to_str().expect("text")).expect("no NUL");
        let shared = Shared::open(&c_path(&config.shm_path), &c_path(&config.pages_path)).expect("opens");
        for path in [&config.shm_path, &config.pages_path] {
            std::fs::remove_file(path).expect("remove");
        }
        let rel = RelTag { spc: 1663, db: 5, rel: 7, fork: ForkNumber::Main };
        cache.prefill_rel_size(rel, None).expect("room");
        (Runtime::for_test(shared), cache, Segment { rel, number: 0 })
    }

    const CREATE: OpenMode = OpenMode { create: true, exclusive: true, truncate: false };
    const OPEN: OpenMode = OpenMode { create: false, exclusive: false, truncate: false };
    const GIB: u64 = 1 << 30;

    fn write(runtime: &Runtime, segment: &Segment, byte: u8, at: u64) -> Result<usize, Errno> {
        runtime.write_segment(segment, &[byte; PAGE_BYTES], at, PageOrigin::Buffer)
    }

    #[test]
    fn a_fork_is_created_once_and_is_gone_when_unlinked() {
        let (runtime, _cache, first) = fork();
        assert_eq!(runtime.open_segment(&first, OPEN), Err(Errno(libc::ENOENT)));
        assert_eq!(runtime.open_segment(&first, CREATE), Ok(()));
        assert_eq!(runtime.open_segment(&first, CREATE), Err(Errno(libc::EEXIST)));
        assert_eq!(write(&runtime, &first, 1, 0), Ok(PAGE_BYTES));
        // As `mdunlink` does it: cut to nothing, removed at the next checkpoint.
        assert_eq!(runtime.truncate_segment(&first, 0), Ok(()));
        assert_eq!(runtime.segment_bytes(&first), Ok(Some(0)));
        assert_eq!(runtime.unlink_segment(&first), Ok(()));
        assert_eq!(runtime.unlink_segment(&first), Err(Errno(libc::ENOENT)));
        assert_eq!(write(&runtime, &first, 1, 0), Err(Errno(libc::EIO)));
        assert_eq!(runtime.open_segment(&first, CREATE), Ok(()));
        assert_eq!(runtime.read_segment(&first, &mut [0; 10], 0), Ok(0));
    }

    #[test]
    fn segments_appear_and_go_with_their_blocks() {
        let (runtime, _cache, first) = fork();
        let second = Segment { number: 1, ..first };
        runtime.open_segment(&first, CREATE).expect("creates");
        assert_eq!(write(&runtime, &first, 1, GIB), Err(Errno(libc::EFBIG)));
        assert_eq!(write(&runtime, &first, 1, GIB - PAGE), Ok(PAGE_BYTES));
        assert_eq!(runtime.open_segment(&second, OPEN), Err(Errno(libc::ENOENT)));
        assert_eq!(runtime.open_segment(&second, CREATE), Ok(()));
        assert_eq!(runtime.segment_bytes(&second), Ok(None));
        assert_eq!(write(&runtime, &second, 2, 0), Ok(PAGE_BYTES));
        assert_eq!(runtime.segment_bytes(&second), Ok(Some(PAGE)));
        let mut buf = [9; PAGE_BYTES + 10];
        assert_eq!(runtime.read_segment(&second, &mut buf, 0), Ok(PAGE_BYTES));
        assert_eq!((buf[0], buf[PAGE_BYTES - 1], buf[PAGE_BYTES]), (2, 2, 9));
        assert_eq!(runtime.unlink_segment(&second), Ok(()));
        assert_eq!(runtime.segment_bytes(&first), Ok(Some(GIB)));
        assert_eq!(runtime.truncate_segment(&first, 3 * PAGE), Ok(()));
        assert_eq!(runtime.truncate_segment(&second, 0), Ok(()));
        assert_eq!(runtime.segment_bytes(&first), Ok(Some(3 * PAGE)));
        // What was cut off is gone for good, and nobody need be asked what lies in the hole.
        assert_eq!(runtime.allocate_segment(&first, GIB), Ok(()));
        assert_eq!(runtime.read_segment(&first, &mut buf[..20], GIB - 10), Ok(10));
        assert_eq!(buf[..10], [0; 10]);
    }

    #[test]
    fn odd_lengths_are_read_and_written_too() {
        let (runtime, _cache, first) = fork();
        runtime.open_segment(&first, CREATE).expect("creates");
        let data: Vec<u8> = (0..PAGE_BYTES * 3).map(|index| index as u8 | 1).collect();
        let origin = PageOrigin::Copy;
        assert_eq!(runtime.write_segment(&first, &data, 0, origin), Ok(data.len()));
        assert_eq!(runtime.write_segment(&first, &[0xAA; 100], PAGE - 50, origin), Ok(100));
        let mut buf = vec![0; PAGE_BYTES * 4];
        assert_eq!(runtime.read_segment(&first, &mut buf, 1), Ok(data.len() - 1));
        assert_eq!(buf[PAGE_BYTES - 51..PAGE_BYTES + 49], [0xAA; 100]);
        assert_eq!((buf[0], buf[PAGE_BYTES * 3 - 2]), (data[1], data[PAGE_BYTES * 3 - 1]));
    }

    #[test]
    fn a_full_budget_is_disk_full_until_a_fork_goes() {
        let (runtime, cache, first) = fork();
        let other = Segment { rel: RelTag { rel: 8, ..first.rel }, number: 0 };
        cache.prefill_rel_size(other.rel, None).expect("room");
        runtime.open_segment(&first, CREATE).expect("creates");
        runtime.open_segment(&other, CREATE).expect("creates");
        for block in 0..8 {
            assert_eq!(write(&runtime, &first, 1, block * PAGE), Ok(PAGE_BYTES));
        }
        assert_eq!(write(&runtime, &other, 1, 0), Err(Errno(libc::ENOSPC)));
        assert_eq!(runtime.segment_bytes(&other), Ok(Some(0)));
        cache.set_horizon(Lsn(1 << 50));
        assert_eq!(write(&runtime, &other, 1, 0), Err(Errno(libc::ENOSPC)), "insert positions are unknown here");
        assert_eq!(write(&runtime, &first, 2, 0), Ok(PAGE_BYTES));
        runtime.unlink_segment(&first).expect("unlinks");
        assert_eq!(write(&runtime, &other, 1, 0), Ok(PAGE_BYTES));
        assert_eq!(cache.stats().kept_bytes, PAGE);
    }

    #[test]
    fn an_init_fork_makes_its_relation_unlogged() {
        let (runtime, cache, first) = fork();
        let init = Segment { rel: first.rel.with_fork(ForkNumber::Init), number: 0 };
        cache.prefill_rel_size(init.rel, None).expect("room");
        runtime.open_segment(&first, CREATE).expect("creates");
        runtime.open_segment(&init, CREATE).expect("creates");
        let fsm = Segment { rel: first.rel.with_fork(ForkNumber::Fsm), number: 0 };
        assert_eq!(runtime.open_segment(&fsm, OPEN), Err(Errno(libc::ENOENT)));
        assert!(runtime.state(&first.rel).expect("known").unlogged);
        runtime.unlink_segment(&first).expect("unlinks");
        runtime.unlink_segment(&init).expect("unlinks");
        runtime.open_segment(&first, CREATE).expect("creates");
        assert!(!runtime.state(&first.rel).expect("known").unlogged);
    }

    #[test]
    fn a_fork_is_cut_into_segments() {
        let rel = RelTag { spc: 1663, db: 5, rel: 7, fork: ForkNumber::Main };
        let lengths = |blocks: Option<u32>| {
            let state = RelState { blocks, unlogged: false, trunc_to: 0, trunc_lsn: 0 };
            [0, 1, 2].map(|number| bytes_of(&Segment { rel, number }, &state))
        };
        assert_eq!(lengths(None), [None, None, None]);
        assert_eq!(lengths(Some(0)), [Some(0), None, None]);
        assert_eq!(lengths(Some(131_072)), [Some(GIB), None, None]);
        assert_eq!(lengths(Some(131_073)), [Some(GIB), Some(8192), None]);
        assert_eq!(lengths(Some(262_145)), [Some(GIB), Some(GIB), Some(8192)]);
    }
}
