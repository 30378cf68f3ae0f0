//! WAL in, values out: records are decoded, planned ([`plan`]) and applied to the branch in batches of whole records.

mod copy;
mod plan;

pub use plan::{PlanError, Planner};

use std::sync::Arc;

use types::{Lsn, RelTag};
use wal::{CheckPoint, DecodedRecord, WalStreamDecoder};

use crate::{
    branch::{Branch, Put, Tip},
    error::StorageError,
    storage::{Key, Kind, Value, decode_rel_size},
};

/// A batch is applied when it has this many values...
const BATCH_PUTS: usize = 2000;
/// ... or this many bytes of them.
const BATCH_BYTES: usize = 2 << 20;

/// Why ingestion did not go on.
#[derive(Debug)]
pub enum IngestError {
    /// Something had to be read or written and was not; trying again is right.
    Storage(StorageError),
    /// The WAL can't be understood. For good.
    Stopped(String),
}

impl From<StorageError> for IngestError {
    fn from(error: StorageError) -> IngestError {
        IngestError::Storage(error)
    }
}

/// What the one who ingests a branch knows.
pub struct Ingest {
    decoder: WalStreamDecoder,
    planner: Planner,
}

/// Values of whole records that are not visible yet.
#[derive(Default)]
struct Batch {
    puts: Vec<Put>,
    bytes: usize,
    tip: Option<Tip>,
}

impl Ingest {
    /// Reads what planning needs, as of the branch's last record.
    pub async fn load(branch: &Arc<Branch>) -> Result<Ingest, StorageError> {
        let tip = branch.tip();
        let at = tip.last_record_lsn;
        let damaged = |what: &str| StorageError::Unmakeable {
            branch: branch.name().clone(),
            what: what.to_owned(),
            lsn: at,
            reason: "no well-formed value is stored".to_owned(),
        };
        let checkpoint = branch.read_value(Key::CHECKPOINT, at).await?;
        let checkpoint = checkpoint.and_then(|bytes| CheckPoint::from_bytes(&bytes).ok());
        let checkpoint = checkpoint.ok_or_else(|| damaged("checkpoint counters"))?;
        let mut planner = Planner::new(checkpoint, tip.last_commit_us);
        for (key, value) in branch.scan(Key::of(Kind::RelSize), Key::last_of(Kind::RelSize), at).await? {
            match (key.rel_tag(), value) {
                (Some(rel), Value::Image(content)) => {
                    planner.load_rel(rel, decode_rel_size(&content).ok_or_else(|| damaged(&key.to_string()))?);
                }
                _ => return Err(damaged(&key.to_string())),
            }
        }
        for key in branch.scan(Key::of(Kind::SlruPage), Key::last_of(Kind::SlruPage), at).await?.into_keys() {
            planner.load_slru(key.slru_kind().ok_or_else(|| damaged(&key.to_string()))?, key.block);
        }
        Ok(Ingest { decoder: WalStreamDecoder::new(at), planner })
    }

    /// Forgets bytes of a record that was not whole; decoding goes on at `at`, the end of the last whole one.
    pub fn restart(&mut self, at: Lsn) {
        self.decoder = WalStreamDecoder::new(at);
    }

    /// Sum of all relations' sizes.
    pub fn logical_bytes(&self) -> u64 {
        self.planner.logical_blocks() * types::PAGE_BYTES as u64
    }

    /// Relations and their sizes as of the last record.
    pub fn rels(&self) -> impl Iterator<Item = (RelTag, u32)> {
        self.planner.rels()
    }

    /// Decodes the bytes that follow those before and applies all records that are whole now. After an error the state
    /// must be loaded anew; records before the one that failed are applied.
    pub async fn feed(&mut self, branch: &Arc<Branch>, begin: Lsn, bytes: &[u8]) -> Result<(), IngestError> {
        self.decoder.feed(begin, bytes);
        let mut batch = Batch::default();
        loop {
            let record = match self.decoder.poll_record() {
                Ok(Some(record)) => record,
                Ok(None) => break,
                Err(error) => {
                    batch.apply(branch);
                    return Err(IngestError::Stopped(format!("WAL can't be decoded: {error}")));
                }
            };
            ingest_record(&mut self.planner, branch, &record, &mut batch).await?;
            if batch.is_full() {
                batch.apply(branch);
                branch.make_room().await;
                tokio::task::yield_now().await;
            }
        }
        batch.apply(branch);
        self.make_slru_images(branch).await?;
        Ok(())
    }

    /// Puts an image where an SLRU page has gathered many records: those pages are read at each start of a compute.
    async fn make_slru_images(&mut self, branch: &Arc<Branch>) -> Result<(), StorageError> {
        let tip = branch.tip();
        let mut images = Vec::new();
        for key in self.planner.take_long_slru_chains() {
            let page = branch.read_page(key, tip.last_record_lsn).await?;
            images.push(Put { key, lsn: tip.last_record_lsn, value: Value::Image(page) });
        }
        if !images.is_empty() {
            branch.apply(images, tip);
        }
        Ok(())
    }
}

/// Plans one record into the batch; databases that it copies are copied at once.
async fn ingest_record(
    planner: &mut Planner,
    branch: &Arc<Branch>,
    record: &DecodedRecord<'_>,
    batch: &mut Batch,
) -> Result<(), IngestError> {
    let before = batch.tip.unwrap_or_else(|| branch.tip()).last_record_lsn;
    let puts_before = batch.puts.len();
    let copies = match planner.plan(record, before, &mut batch.puts) {
        Ok(copies) => copies,
        Err(error) => {
            batch.puts.truncate(puts_before);
            batch.apply(branch);
            return Err(IngestError::Stopped(error.to_string()));
        }
    };
    if !copies.is_empty() {
        // The copy reads pages as of the record before, so all of that must be visible.
        let own = batch.puts.split_off(puts_before);
        batch.apply(branch);
        batch.puts = own;
        for copy in copies {
            copy::copy_database(branch, &copy, record.end_lsn).await?;
        }
    }
    batch.bytes += batch.puts[puts_before.min(batch.puts.len())..].iter().map(|put| put.value.weight()).sum::<usize>();
    batch.tip = Some(Tip {
        last_record_lsn: record.end_lsn,
        prev_record_lsn: record.start_lsn,
        last_commit_us: planner.last_commit_us(),
    });
    Ok(())
}

impl Batch {
    fn is_full(&self) -> bool {
        self.puts.len() >= BATCH_PUTS || self.bytes >= BATCH_BYTES
    }

    fn apply(&mut self, branch: &Branch) {
        if let Some(tip) = self.tip.take() {
            branch.apply(self.puts.drain(..), tip);
            self.bytes = 0;
        }
    }
}
