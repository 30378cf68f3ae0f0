//! WAL in, values out: records are decoded, planned ([`plan`]) and applied to the branch in batches of whole records.

mod copy;
mod plan;
mod slots;

pub use plan::{DatabaseCopy, PlanError, Planner};

use std::sync::Arc;

use types::Lsn;
use wal::{CheckPoint, DecodedRecord, ForEachError, WalStreamDecoder};

use crate::{
    branch::{Branch, PutBatch, Tip},
    error::StorageError,
    storage::{Key, Kind, Value, decode_origin, decode_rel_size},
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
    /// The bytes are no records: whoever gave them may have kept them badly, and others may have them whole.
    Undecodable(String),
    /// A record is whole and can't be understood. For good.
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
struct Batch {
    puts: PutBatch,
    /// As of the last record that was planned.
    tip: Tip,
    /// Whether any was since the batch was applied.
    has_records: bool,
}

/// Why decoding stands still for a moment, or ends.
enum Pause {
    /// The record can't be planned; nothing of it is in the batch.
    Unknown(PlanError),
    /// The record copies databases. What it stores by itself, and the branch's tip with it, are not in the batch.
    Copies(Vec<DatabaseCopy>, PutBatch, Tip),
    /// The batch is to be applied.
    Full,
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
        for (key, value) in branch.scan(Key::of(Kind::CheckPoint), Key::last_of(Kind::CheckPoint), at).await? {
            if let (Some(origin), Value::Image(content)) = (key.origin_number(), value) {
                planner.load_origin(origin, decode_origin(&content).ok_or_else(|| damaged(&key.to_string()))?);
            }
        }
        for (key, value) in branch.scan(Key::of(Kind::AuxFile), Key::last_of(Kind::AuxFile), at).await? {
            if let Value::Image(content) = value {
                planner.load_file(&postcard::from_bytes(&content).map_err(|_| damaged(&key.to_string()))?);
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

    /// The oldest WAL that the branch's own replication slots need; `None` when there are none.
    pub fn slots_need(&self, branch: &Branch) -> Option<Lsn> {
        let limit = branch.shared().tuning.max_slot_wal_bytes;
        let oldest = Lsn(branch.tip().last_record_lsn.0.saturating_sub(limit));
        self.planner.slots_need(branch.start_lsn().max(oldest))
    }

    /// Decodes the bytes that follow those before and applies all records that are whole now. After an error the state
    /// must be loaded anew; records before the one that failed are applied.
    pub async fn feed(&mut self, branch: &Arc<Branch>, begin: Lsn, bytes: &[u8]) -> Result<(), IngestError> {
        let mut batch = Batch { puts: PutBatch::default(), tip: branch.tip(), has_records: false };
        let mut rest = bytes;
        loop {
            batch.puts.reserve(rest.len().min(BATCH_BYTES), BATCH_PUTS);
            let at = begin + (bytes.len() - rest.len()) as u64;
            let planner = &mut self.planner;
            let outcome = self.decoder.feed_each(at, rest, |record| batch.add(planner, record));
            let taken = self.decoder.fed_until().0.saturating_sub(at.0) as usize;
            rest = &rest[taken.min(rest.len())..];
            match outcome {
                Ok(()) => break,
                Err(ForEachError::Decode(error)) => {
                    batch.apply(branch);
                    return Err(IngestError::Undecodable(format!("WAL can't be decoded: {error}")));
                }
                Err(ForEachError::Stopped(Pause::Unknown(error))) => {
                    batch.apply(branch);
                    return Err(IngestError::Stopped(error.to_string()));
                }
                Err(ForEachError::Stopped(Pause::Copies(copies, own, tip))) => {
                    // A copy reads pages as of the record before, so all of that must be visible.
                    batch.apply(branch);
                    for copy in copies {
                        copy::copy_database(branch, &copy, tip.last_record_lsn).await?;
                    }
                    batch.take(own, tip);
                }
                Err(ForEachError::Stopped(Pause::Full)) => {
                    batch.apply(branch);
                    branch.make_room().await;
                    tokio::task::yield_now().await;
                }
            }
        }
        batch.apply(branch);
        Ok(())
    }
}

impl Batch {
    /// Plans one record into the batch.
    fn add(&mut self, planner: &mut Planner, record: &DecodedRecord<'_>) -> Result<(), Pause> {
        let before = self.puts.mark();
        let copies = match planner.plan(record, self.tip.last_record_lsn, &mut self.puts) {
            Ok(copies) => copies,
            Err(error) => {
                drop(self.puts.split_off(before));
                return Err(Pause::Unknown(error));
            }
        };
        let tip = Tip {
            last_record_lsn: record.end_lsn,
            prev_record_lsn: record.start_lsn,
            last_commit_us: planner.last_commit_us(),
        };
        if !copies.is_empty() {
            return Err(Pause::Copies(copies, self.puts.split_off(before), tip));
        }
        (self.tip, self.has_records) = (tip, true);
        if self.is_full() { Err(Pause::Full) } else { Ok(()) }
    }

    /// Takes one record's values; there are no others.
    fn take(&mut self, puts: PutBatch, tip: Tip) {
        self.puts = puts;
        (self.tip, self.has_records) = (tip, true);
    }

    fn is_full(&self) -> bool {
        self.puts.len() >= BATCH_PUTS || self.puts.weight() >= BATCH_BYTES
    }

    fn apply(&mut self, branch: &Arc<Branch>) {
        if std::mem::take(&mut self.has_records) {
            branch.apply_batch(&mut self.puts, self.tip);
            branch.shorten_chains();
        }
    }
}
