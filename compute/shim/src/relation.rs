//! File operations on segments of relation forks.

use page_cache::{
    Errno, Keep, Page, PageOrigin, RelState, is_zero, keep_for,
    types::{BlockNumber, ForkNumber, PAGE_BYTES, PageTag, REL_SEGMENT_BLOCKS, RelTag},
};

use crate::{agent, path::Segment, postgres, runtime::Runtime};

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
                Ok(page) => self.read_page(&tag, &state, page)?,
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
        } else if state.unlogged {
            self.shared.keep(tag, page, Keep::FOR_EVER)?;
        } else {
            self.shared.keep(tag, page, keep_for(page, tag.rel.fork, origin, insert, self.shared.shipped()))?;
        }
        if extends { self.shared.grow_rel(&tag.rel, tag.block + 1, insert) } else { Ok(()) }
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
    use super::*;

    #[test]
    fn a_fork_is_cut_into_segments() {
        let rel = RelTag { spc: 1663, db: 5, rel: 7, fork: ForkNumber::Main };
        let lengths = |blocks: Option<u32>| {
            let state = RelState { blocks, unlogged: false, trunc_to: 0, trunc_lsn: 0 };
            [0, 1, 2].map(|number| bytes_of(&Segment { rel, number }, &state))
        };
        const GIB: u64 = 1 << 30;
        assert_eq!(lengths(None), [None, None, None]);
        assert_eq!(lengths(Some(0)), [Some(0), None, None]);
        assert_eq!(lengths(Some(131_072)), [Some(GIB), None, None]);
        assert_eq!(lengths(Some(131_073)), [Some(GIB), Some(8192), None]);
        assert_eq!(lengths(Some(262_145)), [Some(GIB), Some(GIB), Some(8192)]);
    }
}
