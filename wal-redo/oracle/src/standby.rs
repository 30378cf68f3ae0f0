//! Page for page: what the library made of a base backup and WAL, against the files of a stock standby that replayed the same.
//!
//! Both did redo and nothing else, so nearly nothing may differ: not the LSN, not a command id. Left out are only free space
//! maps, which the library does not make, and unlogged relations, which have no WAL. Blotted out are the checksum, the hole
//! of a page, and hint bits that the standby's own catalog reads have set.

use types::{ForkNumber, PAGE_BYTES, PageTag, RelTag};
use wal::v15::rmgr;

use crate::{Oracle, Page, describe, kind_of_page, mask, state::State, store::read_file_page};
use std::path::Path;

impl Oracle {
    pub(crate) fn compare_with_standby(&mut self, standby: &Path) {
        let truth = State::of(standby);
        self.report.standby_compared += truth.slru.len() as u64;
        let problems = self.state.differences(&truth, standby);
        self.report.standby_mismatches += problems.len() as u64;
        problems.into_iter().for_each(|problem| self.report.problem(|| format!("standby: {problem}")));
        let unlogged = |rel: &RelTag| truth.rels.contains_key(&rel.with_fork(ForkNumber::Init));
        for (rel, size) in &truth.rels {
            if rel.fork == ForkNumber::Fsm || (rel.fork != ForkNumber::Init && unlogged(rel)) {
                continue;
            }
            (0..*size).for_each(|block| self.compare_block(standby, PageTag { rel: *rel, block }));
        }
    }

    fn compare_block(&mut self, standby: &Path, tag: PageTag) {
        let theirs = read_file_page(standby, &tag).expect("a block within its fork's size");
        let (mut theirs, mut ours) = (blotted(&theirs, &tag), blotted(&self.store.read(&tag), &tag));
        if self.hints_are_logged && is_all_visible(&theirs) && kind_of_page(&theirs) == rmgr::HEAP {
            // Then alone a heap page that becomes all-visible moves its LSN (`heap_xlog_visible`).
            theirs[0..8].fill(0);
            ours[0..8].fill(0);
        }
        self.report.standby_compared += 1;
        if let Some(difference) = describe(&ours, &theirs) {
            self.report.standby_mismatches += 1;
            self.report.problem(|| format!("standby: {tag}: {difference}"));
        }
    }
}

/// `PD_ALL_VISIBLE`.
fn is_all_visible(page: &Page) -> bool {
    page[10] & 0x04 != 0
}

fn blotted(page: &Page, tag: &PageTag) -> Page {
    let mut page = *page;
    let is_new = page[14..16] == [0, 0];
    // The whole of a visibility map lies where other pages have their hole.
    if is_new || tag.rel.fork == ForkNumber::Vm {
        page[8..10].fill(0);
        return if page[10..].iter().all(|byte| *byte == 0) { [0; PAGE_BYTES] } else { page };
    }
    page[8..10].fill(0);
    mask::hole(&mut page);
    match kind_of_page(&page) {
        rmgr::HEAP => mask::heap_hints(&mut page),
        rmgr::GIST => mask::gist_tuples_deleted(&mut page),
        _has_no_hints => {}
    }
    page
}
