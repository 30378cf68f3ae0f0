//! The library's side: WAL from segment files, applied to pages that are all kept in memory.

use std::{
    collections::HashMap,
    fs::File,
    hash::BuildHasherDefault,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, ensure};
use memmap2::{Advice, MmapMut, MmapOptions};
use redo_oracle::store::relation_path;
use rustc_hash::FxHasher;
use types::{ForkNumber, Lsn, PAGE_BYTES, PageTag, REL_SEGMENT_BLOCKS, RelTag};
use wal::{CheckPoint, DecodedRecord, ForEachError, OwnedRecord, WalStreamDecoder, v15::rmgr};
use wal_redo::{
    Change, SlruKind, checkpoint, commit_ts_changes, each_change, redo_page, redo_slru_page, tracks_commit_ts,
};

type Page = [u8; PAGE_BYTES];
type Fast = BuildHasherDefault<FxHasher>;

/// Records in the chain whose application is timed.
const CHAIN_RECORDS: usize = 60;
/// Pages whose chains are timed.
const CHAIN_PAGES: usize = 33;
const CHAIN_ROUNDS: u32 = 1_000;
const CHAIN_BATCHES: u32 = 21;
/// WAL is taken in pieces of this size.
const PIECE_BYTES: usize = 256 << 10;
const RECENT_FORKS: usize = 64;
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
    let mut at = start;
    'segments: while let Ok(segment) = File::open(data_dir.join("pg_wal").join(at.segment_file_name())) {
        // SAFETY: nothing but this program knows the directory, and the server that wrote the file is gone.
        let segment = unsafe { MmapOptions::new().populate().map(&segment)? };
        for piece in segment[at.segment_offset() as usize..].chunks(PIECE_BYTES) {
            let counted = |record: &DecodedRecord<'_>| {
                records += 1;
                f(record)
            };
            match decoder.feed_each(at, piece, counted) {
                Ok(()) => at += piece.len() as u64,
                // A server that was killed leaves zeroes or an old segment's content behind its WAL.
                Err(ForEachError::Decode(_end)) => break 'segments,
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
}

/// All pages in memory, as Postgres has them in shared buffers.
struct Memory {
    data_dir: PathBuf,
    spare: Spare,
    /// Forks that were asked for, with their places in `forks`: a load's records are about a few.
    recent: [Option<(RelTag, usize)>; RECENT_FORKS],
    places: HashMap<RelTag, usize, Fast>,
    forks: Vec<Fork>,
    slru: HashMap<(SlruKind, u32), Box<Page>, Fast>,
}

/// The pages of one fork, those that were asked for and their neighbours.
struct Fork {
    rel: RelTag,
    /// From here on, blocks are not those of the file.
    file_end: u32,
    runs: Vec<Option<Run>>,
}

/// [`RUN_BLOCKS`] pages.
struct Run {
    bytes: MmapMut,
    /// Pages from here on are empty ones, whatever their memory holds.
    end: usize,
}

/// Memory for runs of pages that an earlier replay used: what it takes the kernel (and the host of a virtual machine) to hand out
/// memory for the first time is none of redo's.
#[derive(Default)]
pub(super) struct Spare(Vec<MmapMut>);

impl Spare {
    /// Memory for a run; its content is what was there before.
    fn take(&mut self) -> anyhow::Result<MmapMut> {
        if let Some(run) = self.0.pop() {
            return Ok(run);
        }
        let run = MmapMut::map_anon(RUN_BLOCKS * PAGE_BYTES)?;
        // One large page of the processor's where there are any, as Postgres can have its buffers.
        let _no_large_pages_then = run.advise(Advice::HugePage);
        Ok(run)
    }
}

impl Replay {
    /// Begins with a stopped server's files and the counters of its control file.
    pub(super) fn new(data_dir: PathBuf, counters: CheckPoint, spare: Spare) -> Replay {
        let (places, forks, slru) = (HashMap::default(), Vec::new(), HashMap::default());
        let memory = Memory { data_dir, spare, recent: [None; RECENT_FORKS], places, forks, slru };
        Replay { memory, counters }
    }

    /// Of memory, as far as pages were asked for or read with others.
    pub(super) fn page_bytes(&self) -> usize {
        let runs = self.memory.forks.iter().flat_map(|fork| &fork.runs).flatten();
        runs.map(|run| run.end * PAGE_BYTES).sum()
    }

    /// Ends with all memory spare.
    pub(super) fn into_spare(self) -> Spare {
        let Memory { mut spare, forks, .. } = self.memory;
        spare.0.extend(forks.into_iter().flat_map(|fork| fork.runs).flatten().map(|run| run.bytes));
        spare
    }

    /// Does all that the record says.
    pub(super) fn apply(&mut self, record: &DecodedRecord<'_>) -> anyhow::Result<()> {
        let memory = &mut self.memory;
        let mut outcome = Ok(());
        each_change(record, |change| {
            if outcome.is_ok() {
                outcome = memory.apply(&change, record);
            }
        })?;
        outcome?;
        if tracks_commit_ts(&self.counters) {
            for change in commit_ts_changes(record, &self.counters)? {
                self.memory.apply(&change, record)?;
            }
        }
        checkpoint::advance(&mut self.counters, record);
        Ok(())
    }
}

impl Memory {
    #[inline(always)]
    fn apply(&mut self, change: &Change, record: &DecodedRecord<'_>) -> anyhow::Result<()> {
        match change {
            Change::Page { tag, will_init } => redo_page(self.page(tag, *will_init)?, tag, record)?,
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

    /// The page's content is unspecified when it is about to be made from nothing.
    #[inline(always)]
    fn page(&mut self, tag: &PageTag, will_init: bool) -> anyhow::Result<&mut Page> {
        let place = self.place(tag.rel);
        self.forks[place].page(&self.data_dir, &mut self.spare, tag.block, will_init)
    }

    #[inline(always)]
    fn place(&mut self, rel: RelTag) -> usize {
        let recent = &mut self.recent[(rel.rel as usize * 4 + rel.fork as usize) % RECENT_FORKS];
        if let Some((_, place)) = recent.filter(|(at, _)| *at == rel) {
            return place;
        }
        let forks = &mut self.forks;
        let place = *self.places.entry(rel).or_insert_with(|| {
            forks.push(Fork { rel, file_end: u32::MAX, runs: Vec::new() });
            forks.len() - 1
        });
        *recent = Some((rel, place));
        place
    }
}

impl Fork {
    #[inline(always)]
    fn page(&mut self, data_dir: &Path, spare: &mut Spare, block: u32, will_init: bool) -> anyhow::Result<&mut Page> {
        let (run, index) = (block as usize / RUN_BLOCKS, block as usize % RUN_BLOCKS);
        if self.runs.get(run).is_none_or(Option::is_none) {
            self.read(data_dir, spare, run)?;
        }
        let run = self.runs.get_mut(run).and_then(Option::as_mut).context("a run of pages is not there")?;
        if index >= run.end {
            let zeroes_until = index + usize::from(!will_init);
            run.bytes[run.end * PAGE_BYTES..zeroes_until * PAGE_BYTES].fill(0);
            run.end = index + 1;
        }
        run.bytes[index * PAGE_BYTES..].first_chunk_mut().context("a run of pages is cut short")
    }

    /// Reads a run of pages; those that the file does not have are zeroes.
    #[cold]
    fn read(&mut self, data_dir: &Path, spare: &mut Spare, run: usize) -> anyhow::Result<()> {
        let first = (run * RUN_BLOCKS) as u32;
        let mut bytes = spare.take()?;
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
        let end = got.div_ceil(PAGE_BYTES);
        bytes[got..end * PAGE_BYTES].fill(0);
        if self.runs.len() <= run {
            self.runs.resize_with(run + 1, || None);
        }
        self.runs[run] = Some(Run { bytes, end });
        Ok(())
    }

    fn truncate(&mut self, blocks: u32) {
        self.file_end = self.file_end.min(blocks);
        let (run, index) = (blocks as usize / RUN_BLOCKS, blocks as usize % RUN_BLOCKS);
        if let Some(Some(pages)) = self.runs.get_mut(run) {
            pages.end = pages.end.min(index);
        }
        self.runs.truncate(run + 1);
    }
}

/// Microseconds to make a page from an image and [`CHAIN_RECORDS`] heap records that follow it in real WAL, from their bytes on as a
/// pageserver has them (taking them apart is part of it): for each of the first [`CHAIN_PAGES`] pages that have so many, sorted.
pub(super) fn chains(data_dir: &Path, start: Lsn, counters: CheckPoint) -> anyhow::Result<Vec<f64>> {
    let mut replay = Replay::new(data_dir.to_owned(), counters, Spare::default());
    let mut begun: HashMap<PageTag, (Box<Page>, Vec<OwnedRecord>), Fast> = HashMap::default();
    let mut whole: Vec<Chain> = Vec::new();
    each_record(data_dir, start, |record| {
        if whole.len() < CHAIN_PAGES && [rmgr::HEAP, rmgr::HEAP2].contains(&record.rmgr) {
            for block in record.blocks.iter().filter(|block| block.rel.fork == ForkNumber::Main) {
                let tag = block.tag();
                if whole.iter().any(|chain| chain.tag == tag) {
                    continue;
                }
                let image = Box::new(*replay.memory.page(&tag, false)?);
                let (_, records) = begun.entry(tag).or_insert((image, Vec::new()));
                records.push(record.to_owned());
                if records.len() == CHAIN_RECORDS {
                    whole.extend(begun.remove(&tag).map(|(image, records)| Chain { tag, image, records }));
                }
            }
        }
        replay.apply(record)
    })?;
    ensure!(!whole.is_empty(), "no page has {CHAIN_RECORDS} records");
    let mut took = whole.iter().map(Chain::microseconds).collect::<anyhow::Result<Vec<f64>>>()?;
    took.sort_by(f64::total_cmp);
    Ok(took)
}

/// A page before its records.
struct Chain {
    tag: PageTag,
    image: Box<Page>,
    records: Vec<OwnedRecord>,
}

impl Chain {
    /// The median of some batches.
    fn microseconds(&self) -> anyhow::Result<f64> {
        let mut page = self.image.clone();
        let mut took = Vec::new();
        for _ in 0..CHAIN_BATCHES {
            let began = Instant::now();
            for _ in 0..CHAIN_ROUNDS {
                page.copy_from_slice(&self.image[..]);
                let mut decoded = DecodedRecord::blank();
                for record in &self.records {
                    record.decode_into(&mut decoded).map_err(anyhow::Error::msg)?;
                    redo_page(&mut page, &self.tag, &decoded)?;
                }
                ensure!(std::hint::black_box(&page)[14..16] != [0, 0], "an empty page");
            }
            took.push(began.elapsed().as_secs_f64() * 1e6 / f64::from(CHAIN_ROUNDS));
        }
        took.sort_by(f64::total_cmp);
        Ok(took[took.len() / 2])
    }
}
