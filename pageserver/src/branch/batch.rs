//! Values that are to be stored together, with the bytes of their records behind each other: a page takes part in many
//! records, and a value for each by itself would cost as much as the record.

use bytes::Bytes;
use types::Lsn;

use crate::storage::{Key, StoredRecord, Value};

/// Short records have so many.
const WAL_BYTES_PER_PUT: usize = 64;

/// A value to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Put {
    /// Under which key.
    pub key: Key,
    /// As of where.
    pub lsn: Lsn,
    /// What.
    pub value: Value,
}

/// Values in the order in which they were added.
#[derive(Debug, Default)]
pub struct PutBatch {
    pub(super) puts: Vec<BatchPut>,
    /// Records without WAL page headers. Up to 4 GiB are kept: more than one record, the longest of which has 1 GiB.
    pub(super) raws: Vec<u8>,
    weight: usize,
}

/// Where in a batch a record's bytes are.
#[derive(Clone, Copy, Debug)]
pub struct RawPlace {
    pub(super) at: u32,
    pub(super) bytes: u32,
}

/// A place in a batch, to go back to.
#[derive(Clone, Copy, Debug)]
pub struct BatchMark {
    puts: usize,
    raws: usize,
    weight: usize,
}

#[derive(Debug)]
pub(super) struct BatchPut {
    pub(super) key: Key,
    pub(super) lsn: Lsn,
    pub(super) value: BatchValue,
}

#[derive(Debug)]
pub(super) enum BatchValue {
    Tombstone,
    Image(Bytes),
    Record { will_init: bool, start_lsn: Lsn, raw: RawPlace },
}

impl BatchPut {
    /// [`Value::weight`].
    pub(super) fn weight(&self) -> usize {
        match &self.value {
            BatchValue::Tombstone => 0,
            BatchValue::Image(content) => content.len(),
            BatchValue::Record { raw, .. } => raw.bytes as usize,
        }
    }
}

impl PutBatch {
    /// Makes room for what so many bytes of WAL put, about, but for no more than `most` values.
    pub fn reserve(&mut self, wal_bytes: usize, most: usize) {
        self.puts.reserve((wal_bytes / WAL_BYTES_PER_PUT).min(most));
        self.raws.reserve(wal_bytes);
    }

    /// Adds a value. A record's depth is not kept: it is not known in memory.
    pub fn put(&mut self, put: Put) {
        let Put { key, lsn, value } = put;
        let value = match value {
            Value::Tombstone => BatchValue::Tombstone,
            Value::Image(content) => BatchValue::Image(content),
            Value::Record(StoredRecord { will_init, start_lsn, raw, .. }) => {
                BatchValue::Record { will_init, start_lsn, raw: self.keep_raw(&raw) }
            }
        };
        self.push(BatchPut { key, lsn, value });
    }

    /// Keeps a record's bytes, for [`PutBatch::put_record`].
    pub fn keep_raw(&mut self, raw: &[u8]) -> RawPlace {
        let at = self.raws.len() as u32;
        self.raws.extend_from_slice(raw);
        RawPlace { at, bytes: raw.len() as u32 }
    }

    /// Adds a record whose bytes are kept.
    pub fn put_record(&mut self, key: Key, lsn: Lsn, will_init: bool, start_lsn: Lsn, raw: RawPlace) {
        self.push(BatchPut { key, lsn, value: BatchValue::Record { will_init, start_lsn, raw } });
    }

    fn push(&mut self, put: BatchPut) {
        self.weight += put.weight();
        self.puts.push(put);
    }

    /// How many values.
    pub fn len(&self) -> usize {
        self.puts.len()
    }

    /// True without values.
    pub fn is_empty(&self) -> bool {
        self.puts.is_empty()
    }

    /// Bytes of all values, about.
    pub fn weight(&self) -> usize {
        self.weight
    }

    /// The end, as it is now.
    pub fn mark(&self) -> BatchMark {
        BatchMark { puts: self.puts.len(), raws: self.raws.len(), weight: self.weight }
    }

    /// Takes out what was added since.
    pub fn split_off(&mut self, mark: BatchMark) -> PutBatch {
        let mut puts = self.puts.split_off(mark.puts);
        for put in &mut puts {
            if let BatchValue::Record { raw, .. } = &mut put.value {
                raw.at -= mark.raws as u32;
            }
        }
        let raws = self.raws.split_off(mark.raws);
        let weight = self.weight - mark.weight;
        self.weight = mark.weight;
        PutBatch { puts, raws, weight }
    }

    pub(super) fn clear(&mut self) {
        self.puts.clear();
        self.raws.clear();
        self.weight = 0;
    }

    /// Each value by itself, with bytes of its own.
    pub fn to_puts(&self) -> Vec<Put> {
        let value = |put: &BatchPut| match &put.value {
            BatchValue::Tombstone => Value::Tombstone,
            BatchValue::Image(content) => Value::Image(content.clone()),
            BatchValue::Record { will_init, start_lsn, raw } => {
                let raw = Bytes::copy_from_slice(&self.raws[raw.at as usize..][..raw.bytes as usize]);
                Value::Record(StoredRecord { will_init: *will_init, depth: 0, start_lsn: *start_lsn, raw })
            }
        };
        self.puts.iter().map(|put| Put { key: put.key, lsn: put.lsn, value: value(put) }).collect()
    }
}

impl FromIterator<Put> for PutBatch {
    fn from_iter<T: IntoIterator<Item = Put>>(puts: T) -> PutBatch {
        let mut batch = PutBatch::default();
        puts.into_iter().for_each(|put| batch.put(put));
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(block: u32, raw: &'static [u8]) -> Put {
        let record = StoredRecord { will_init: false, depth: 0, start_lsn: Lsn(8), raw: Bytes::from_static(raw) };
        Put { key: Key { block, ..Key::CHECKPOINT }, lsn: Lsn(64), value: Value::Record(record) }
    }

    #[test]
    fn what_is_split_off_is_whole() {
        let (before, since) = (vec![put(0, b"first"), put(1, b"")], vec![put(2, b"second"), put(3, b"third")]);
        let mut batch: PutBatch = before.iter().cloned().collect();
        let mark = batch.mark();
        since.iter().cloned().for_each(|put| batch.put(put));
        assert_eq!(batch.weight(), 16);
        let split = batch.split_off(mark);
        assert_eq!((batch.to_puts(), split.to_puts()), (before, since));
        assert_eq!((batch.weight(), split.weight()), (5, 11));
    }
}
