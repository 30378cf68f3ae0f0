//! A storage in memory that knows nothing but WAL: what is dropped from the page cache comes back as WAL describes it.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::Ordering::*},
};

use async_trait::async_trait;
use dormouse_shim_server::{BackendError, PageCache, ShimBackend};
use types::{BlockNumber, ForkNumber, Lsn, Oid, PAGE_BYTES, PageTag, RelTag};
use wal::{
    DecodedRecord, WalStreamDecoder,
    v15::{
        rmgr,
        state::{RunningXacts, standby},
        xact,
    },
};
use wal_redo::Change;

use super::PlainDirectory;

type Page = [u8; PAGE_BYTES];

/// Serves the relations of a cluster that nobody runs, as changed by the WAL in another's `pg_wal`.
pub struct Replayed {
    base: PlainDirectory,
    pg_wal: PathBuf,
    cache: PageCache,
    replay: Mutex<(WalStreamDecoder, State)>,
}

struct State {
    pages: HashMap<PageTag, Box<Page>>,
    /// Forks that are not as in the base: `None` when they are gone.
    sizes: HashMap<RelTag, Option<BlockNumber>>,
    /// Blocks from here on are not those of the base.
    base_ends: HashMap<RelTag, BlockNumber>,
    /// Transactions in progress, by id, with the start of their first record.
    open: BTreeMap<u32, Lsn>,
}

impl Replayed {
    pub fn new(base: &Path, pgdata: &Path, cache: &PageCache) -> Arc<Replayed> {
        let control = fs::read(base.join("global/pg_control")).expect("control file");
        let control = wal::control_file::ControlFile::parse(&control).expect("valid");
        // The shutdown checkpoint changes no page; replay starts with it.
        let start = control.checkpoint_lsn();
        cache.set_horizon(start);
        Arc::new(Replayed {
            base: PlainDirectory::new(base),
            pg_wal: pgdata.join("pg_wal"),
            cache: cache.clone(),
            replay: Mutex::new((
                WalStreamDecoder::new(start),
                State {
                    pages: HashMap::new(),
                    sizes: HashMap::new(),
                    base_ends: HashMap::new(),
                    open: BTreeMap::new(),
                },
            )),
        })
    }

    pub fn pages_read(&self) -> u64 {
        self.base.pages_read.load(Relaxed)
    }

    fn replay(&self) -> Result<(), BackendError> {
        let (decoder, state) = &mut *self.replay.lock().expect("lock");
        decoder.rewind();
        loop {
            let at = decoder.fed_until();
            let mut bytes = vec![0; 1 << 18];
            let Ok(file) = fs::File::open(self.pg_wal.join(at.segment_file_name())) else { break };
            let count = file.read_at(&mut bytes, at.segment_offset()).expect("readable");
            if count == 0 {
                break;
            }
            decoder.feed(at, &bytes[..count]);
            // An error is the end of what was written so far.
            let more = loop {
                match decoder.poll_record() {
                    Ok(Some(record)) => state.apply(&self.base, &record).map_err(BackendError::Storage)?,
                    Ok(None) => break true,
                    Err(_) => break false,
                }
            };
            if !more {
                break;
            }
        }
        let position = decoder.position();
        self.cache.set_shipped(position);
        self.cache.set_horizon(state.open.values().min().copied().unwrap_or(position));
        Ok(())
    }
}

impl State {
    fn apply(&mut self, base: &PlainDirectory, record: &DecodedRecord<'_>) -> Result<(), String> {
        for change in wal_redo::changes(record).map_err(|error| error.to_string())? {
            match change {
                Change::Page { tag, will_init } => self.apply_page(base, record, &tag, will_init)?,
                Change::CreateRel(rel) if self.size(base, &rel).is_none() => self.set_size(rel, Some(0)),
                Change::CreateRel(_) => {}
                Change::TruncateRel { rel, blocks } => {
                    let size = self.size(base, &rel).map(|size| size.min(blocks));
                    self.cut(rel, blocks);
                    self.set_size(rel, size);
                }
                Change::DropRel(rel) => ForkNumber::ALL.iter().for_each(|fork| self.drop_fork(rel.with_fork(*fork))),
                Change::CopyDatabase { src_spc, src_db, spc, db } => {
                    self.copy_database(base, (src_spc, src_db), (spc, db))
                }
                Change::DropDatabase { spc, db } => {
                    self.list(base, spc, db).into_iter().for_each(|(rel, _)| self.drop_fork(rel));
                }
                _ => {}
            }
        }
        self.track(record);
        Ok(())
    }

    fn track(&mut self, record: &DecodedRecord<'_>) {
        if record.xid != 0 {
            self.open.entry(record.xid).or_insert(record.start_lsn);
        }
        if let Some(end) = xact::parse_end(record).expect("a transaction's end") {
            self.open.remove(&end.xid);
            self.open.retain(|xid, _| !end.subxacts.contains(xid));
        }
        if record.rmgr == rmgr::STANDBY && record.rmgr_info() == standby::RUNNING_XACTS {
            let running = RunningXacts::from_prefix(record.main_data).expect("running transactions");
            self.open.retain(|xid, _| *xid >= running.oldest_running_xid);
        }
    }

    fn apply_page(
        &mut self,
        base: &PlainDirectory,
        record: &DecodedRecord<'_>,
        tag: &PageTag,
        will_init: bool,
    ) -> Result<(), String> {
        let mut page = if will_init { Box::new([0; PAGE_BYTES]) } else { self.page(base, tag) };
        wal_redo::redo_page(&mut page, tag, record).map_err(|error| error.to_string())?;
        let size = self.size(base, &tag.rel).unwrap_or(0);
        self.cut(tag.rel, size.max(tag.block));
        self.pages.insert(*tag, page);
        self.set_size(tag.rel, Some(size.max(tag.block + 1)));
        Ok(())
    }

    fn page(&self, base: &PlainDirectory, tag: &PageTag) -> Box<Page> {
        if let Some(page) = self.pages.get(tag) {
            return page.clone();
        }
        let in_base = self.base_ends.get(&tag.rel).is_none_or(|end| tag.block < *end);
        Box::new(if in_base { base.page(tag) } else { [0; PAGE_BYTES] })
    }

    fn size(&self, base: &PlainDirectory, rel: &RelTag) -> Option<BlockNumber> {
        self.sizes.get(rel).copied().unwrap_or_else(|| base.size(rel))
    }

    fn set_size(&mut self, rel: RelTag, blocks: Option<BlockNumber>) {
        self.sizes.insert(rel, blocks);
    }

    /// Forgets the pages from `blocks` on.
    fn cut(&mut self, rel: RelTag, blocks: BlockNumber) {
        let end = self.base_ends.entry(rel).or_insert(BlockNumber::MAX);
        if blocks < *end || self.sizes.get(&rel).copied().flatten().is_some_and(|size| blocks < size) {
            *end = blocks.min(*end);
            self.pages.retain(|tag, _| tag.rel != rel || tag.block < blocks);
        }
    }

    fn drop_fork(&mut self, rel: RelTag) {
        self.cut(rel, 0);
        self.set_size(rel, None);
    }

    fn list(&self, base: &PlainDirectory, spc: Oid, db: Oid) -> Vec<(RelTag, BlockNumber)> {
        let known = self.sizes.iter().filter(|(rel, _)| (rel.spc, rel.db) == (spc, db));
        let mut all: BTreeMap<RelTag, Option<BlockNumber>> =
            base.list(spc, db).into_iter().map(|(rel, blocks)| (rel, Some(blocks))).collect();
        all.extend(known.map(|(rel, blocks)| (*rel, *blocks)));
        all.into_iter().filter_map(|(rel, blocks)| Some((rel, blocks?))).collect()
    }

    fn copy_database(&mut self, base: &PlainDirectory, from: (Oid, Oid), to: (Oid, Oid)) {
        for (rel, blocks) in self.list(base, from.0, from.1) {
            let copy = RelTag { spc: to.0, db: to.1, ..rel };
            for block in 0..blocks {
                let page = self.page(base, &PageTag { rel, block });
                self.pages.insert(PageTag { rel: copy, block }, page);
            }
            self.set_size(copy, Some(blocks));
        }
    }
}

#[async_trait]
impl ShimBackend for Replayed {
    async fn get_page(&self, tag: PageTag) -> Result<bytes::Bytes, BackendError> {
        self.base.pages_read.fetch_add(1, Relaxed);
        let (_, state) = &*self.replay.lock().expect("lock");
        let size = state.size(&self.base, &tag.rel).unwrap_or(0);
        let read = || bytes::Bytes::copy_from_slice(state.page(&self.base, &tag).as_slice());
        Ok(if tag.block < size { read() } else { vec![0; PAGE_BYTES].into() })
    }

    async fn get_pages_ahead(&self, tags: Vec<PageTag>) -> Result<Vec<(PageTag, bytes::Bytes)>, BackendError> {
        let (_, state) = &*self.replay.lock().expect("lock");
        let exists = |tag: &PageTag| tag.block < state.size(&self.base, &tag.rel).unwrap_or(0);
        let read = |tag| (tag, bytes::Bytes::copy_from_slice(state.page(&self.base, &tag).as_slice()));
        Ok(tags.into_iter().filter(exists).map(read).collect())
    }

    async fn rel_size(&self, rel: RelTag) -> Result<Option<BlockNumber>, BackendError> {
        Ok(self.replay.lock().expect("lock").1.size(&self.base, &rel))
    }

    async fn list_rels(&self, spc: Oid, db: Oid) -> Result<Vec<(RelTag, BlockNumber)>, BackendError> {
        Ok(self.replay.lock().expect("lock").1.list(&self.base, spc, db))
    }

    async fn sync_wal(&self) -> Result<(), BackendError> {
        let result = self.replay();
        if let Err(error) = &result {
            eprintln!("replay: {error}");
        }
        result
    }

    async fn wal_written(&self) {}
}
