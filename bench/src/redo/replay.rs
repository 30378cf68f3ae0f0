//! The library's side: WAL from segment files, applied to pages that are all kept in memory.

use std::{
    collections::HashMap,
    fs::File,
    hash::BuildHasherDefault,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, bail, ensure};
use memmap2::{Advice, MmapMut};
use redo_oracle::store::relation_path;
use rustc_hash::FxHasher;
use types::{ForkNumber, Lsn, PAGE_BYTES, PageTag, REL_SEGMENT_BLOCKS, RelTag, WAL_SEGMENT_BYTES};
use wal::{CheckPoint, DecodedRecord, ForEachError, OwnedRecord, WalStreamDecoder, v15::rmgr};
use wal_redo::{
    Change, ChangeList, SlruKind, append_changes, checkpoint, commit_ts_changes, redo_page, redo_slru_page,
    tracks_commit_ts,
};

type Page = [u8; PAGE_BYTES];
type Fast = BuildHasherDefault<FxHasher>;

/// Records in the chain whose application is timed.
const CHAIN_RECORDS: usize = 60;
const CHAIN_ROUNDS: u32 = 20_000;
/// WAL comes from its files in pieces of this size.
const READ_BYTES: usize = 256 << 10;
/// Pages are read and kept in runs of so many: 2 MiB.
const RUN_BLOCKS: usize = 256;

/// Decodes all WAL behind `start` in a data directory; how many records, of how many bytes.
pub(super) fn each_record(
    data_dir: &Path,
    start: Lsn,
    mut f: impl FnMut(&DecodedRecord<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<(u64, u64)> {
    let mut decoder = WalStreamDecoder::new(start);
    let mut records = 0;
    let mut piece = vec![0; READ_BYTES];
    let mut at = start;
    let mut end_of_wal = false;
    while !end_of_wal {
        let Ok(segment) = File::open(data_dir.join("pg_wal").join(at.segment_file_name())) else { break };
        let segment_end = at.segment_start() + WAL_SEGMENT_BYTES;
        while at < segment_end && !end_of_wal {
            let length = READ_BYTES.min((segment_end.0 - at.0) as usize);
            segment.read_exact_at(&mut piece[..length], at.segment_offset())?;
            decoder.feed(at, &piece[..length]);
            at += length as u64;
            let counted = |record: &DecodedRecord<'_>| {
                records += 1;
                f(record)
            };
            match decoder.for_each_record(counted) {
                Ok(()) => {}
                // A server that was killed leaves zeroes or an old segment's content behind its WAL.
                Err(ForEachError::Decode(_end)) => end_of_wal = true,
                Err(ForEachError::Stopped(error)) => return Err(error),
            }
        }
    }
    Ok((records, decoder.position().0 - start.0))
}

/// Applies records.
pub(super) struct Replay {
    memory: Memory,
    counters: CheckPoint,
    /// Empty between records.
    changes: ChangeList,
}

/// All pages in memory, as Postgres has them in shared buffers.
struct Memory {
    data_dir: PathBuf,
    /// The fork that was asked for last, by its place in `forks`: records of one fork come in runs.
    last: Option<(RelTag, usize)>,
    places: HashMap<RelTag, usize, Fast>,
    forks: Vec<Fork>,
    slru: HashMap<(SlruKind, u32), Box<Page>, Fast>,
}

/// The pages of one fork, those that were asked for and their neighbours.
struct Fork {
    rel: RelTag,
    /// From here on, blocks are not those of the file.
    file_end: u32,
    runs: Vec<Option<MmapMut>>,
}

impl Replay {
    /// Begins with a stopped server's files and the counters of its control file.
    pub(super) fn new(data_dir: PathBuf, counters: CheckPoint) -> Replay {
        let (places, forks, slru) = (HashMap::default(), Vec::new(), HashMap::default());
        let memory = Memory { data_dir, last: None, places, forks, slru };
        Replay { memory, counters, changes: ChangeList::new() }
    }

    /// Does all that the record says.
    pub(super) fn apply(&mut self, record: &DecodedRecord<'_>) -> anyhow::Result<()> {
        append_changes(record, &mut self.changes)?;
        if tracks_commit_ts(&self.counters) {
            self.changes.extend(commit_ts_changes(record, &self.counters)?);
        }
        for change in &self.changes {
            self.memory.apply(change, record)?;
        }
        self.changes.clear();
        checkpoint::advance(&mut self.counters, record);
        Ok(())
    }
}

impl Memory {
    fn apply(&mut self, change: &Change, record: &DecodedRecord<'_>) -> anyhow::Result<()> {
        match change {
            Change::Page { tag, .. } => redo_page(self.page(tag)?, tag, record)?,
            Change::SlruPage { slru, page, .. } => {
                let bytes = self.slru.entry((*slru, *page)).or_insert_with(|| Box::new([0; PAGE_BYTES]));
                redo_slru_page(bytes, *slru, *page, record)?;
            }
            Change::TruncateRel { rel, blocks } => {
                let place = self.place(*rel);
                self.forks[place].truncate(*blocks);
            }
            Change::DropRel(rel) => {
                for fork in ForkNumber::ALL {
                    let place = self.place(rel.with_fork(fork));
                    self.forks[place].truncate(0);
                }
            }
            _kept_elsewhere => {}
        }
        Ok(())
    }

    fn page(&mut self, tag: &PageTag) -> anyhow::Result<&mut Page> {
        let place = match self.last {
            Some((rel, place)) if rel == tag.rel => place,
            _another => self.place(tag.rel),
        };
        self.forks[place].page(&self.data_dir, tag.block)
    }

    fn place(&mut self, rel: RelTag) -> usize {
        let forks = &mut self.forks;
        let place = *self.places.entry(rel).or_insert_with(|| {
            forks.push(Fork { rel, file_end: u32::MAX, runs: Vec::new() });
            forks.len() - 1
        });
        self.last = Some((rel, place));
        place
    }
}

impl Fork {
    fn page(&mut self, data_dir: &Path, block: u32) -> anyhow::Result<&mut Page> {
        let (run, index) = (block as usize / RUN_BLOCKS, block as usize % RUN_BLOCKS);
        if self.runs.get(run).is_none_or(Option::is_none) {
            self.read(data_dir, run)?;
        }
        let pages = self.runs.get_mut(run).and_then(Option::as_mut);
        pages.and_then(|pages| pages[index * PAGE_BYTES..].first_chunk_mut()).context("a run of pages is cut short")
    }

    /// Reads a run of pages; those that the file does not have are zeroes.
    #[cold]
    fn read(&mut self, data_dir: &Path, run: usize) -> anyhow::Result<()> {
        let first = (run * RUN_BLOCKS) as u32;
        // Zeroes, in one large page of the processor's where there are any, as Postgres can have its buffers.
        let mut bytes = MmapMut::map_anon(RUN_BLOCKS * PAGE_BYTES)?;
        let _no_large_pages_then = bytes.advise(Advice::HugePage);
        let there = self.file_end.saturating_sub(first).min(RUN_BLOCKS as u32) as usize * PAGE_BYTES;
        let mut got = 0;
        let path = relation_path(data_dir, &self.rel, first / REL_SEGMENT_BLOCKS);
        if let Some(file) = path.and_then(|path| File::open(path).ok()) {
            let offset = u64::from(first % REL_SEGMENT_BLOCKS) * PAGE_BYTES as u64;
            while got < there {
                match file.read_at(&mut bytes[got..there], offset + got as u64)? {
                    0 => break,
                    more => got += more,
                }
            }
        }
        if self.runs.len() <= run {
            self.runs.resize_with(run + 1, || None);
        }
        self.runs[run] = Some(bytes);
        Ok(())
    }

    fn truncate(&mut self, blocks: u32) {
        self.file_end = self.file_end.min(blocks);
        let (run, index) = (blocks as usize / RUN_BLOCKS, blocks as usize % RUN_BLOCKS);
        if let Some(Some(pages)) = self.runs.get_mut(run) {
            pages[index * PAGE_BYTES..].fill(0);
        }
        self.runs.truncate(run + 1);
    }
}

/// Microseconds to make a page from an image and [`CHAIN_RECORDS`] heap records that follow it in real WAL, from their bytes on as a
/// pageserver has them: taking them apart is part of it.
pub(super) fn chain(data_dir: &Path, start: Lsn, counters: CheckPoint) -> anyhow::Result<f64> {
    let mut replay = Replay::new(data_dir.to_owned(), counters);
    let mut chains: HashMap<PageTag, (Box<Page>, Vec<OwnedRecord>), Fast> = HashMap::default();
    let mut found = None;
    each_record(data_dir, start, |record| {
        if found.is_none() && [rmgr::HEAP, rmgr::HEAP2].contains(&record.rmgr) {
            for block in record.blocks.iter().filter(|block| block.rel.fork == ForkNumber::Main) {
                let tag = block.tag();
                let image = Box::new(*replay.memory.page(&tag)?);
                let (_, records) = chains.entry(tag).or_insert((image, Vec::new()));
                records.push(record.to_owned());
                if records.len() == CHAIN_RECORDS {
                    found = chains.remove(&tag).map(|(image, records)| (tag, image, records));
                    break;
                }
            }
        }
        replay.apply(record)
    })?;
    let Some((tag, image, records)) = found else { bail!("no page has {CHAIN_RECORDS} records") };
    let began = Instant::now();
    let mut page = image.clone();
    for _ in 0..CHAIN_ROUNDS {
        page.copy_from_slice(&image[..]);
        for record in &records {
            redo_page(&mut page, &tag, &record.decode().map_err(anyhow::Error::msg)?)?;
        }
        ensure!(std::hint::black_box(&page)[14..16] != [0, 0], "an empty page");
    }
    Ok(began.elapsed().as_secs_f64() * 1e6 / f64::from(CHAIN_ROUNDS))
}
