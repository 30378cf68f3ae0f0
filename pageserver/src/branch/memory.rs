//! Values that are not in a layer file yet.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use rustc_hash::FxHashMap;
use types::Lsn;

use super::batch::{BatchPut, BatchValue, PutBatch};
use crate::{
    layer::Found,
    storage::{Key, StoredRecord, Value},
};

/// What a value costs besides its content, about: its place among its key's values, which have room for more.
const ENTRY_OVERHEAD_BYTES: usize = 56;
/// What a key costs, about: its places in both maps, and the list of its values.
const KEY_OVERHEAD_BYTES: usize = 192;

/// A page gets an image in memory after so many records.
const RECORDS_PER_IMAGE: u32 = 64;
/// So many images wait to be made at most; the chains of other pages go on until there is room.
const MOST_LONG_CHAINS: usize = 4096;

/// Sizes of the first and of later pieces of memory in which the bytes of small batches are kept: a branch with little WAL
/// takes little.
const PIECE_BYTES: Range<usize> = 2 << 10..64 << 10;
/// A batch with at least so many is a piece as it is.
const BIG_BATCH_BYTES: usize = PIECE_BYTES.end / 2;

/// Values by (key, LSN) in memory.
#[derive(Default)]
pub struct MemoryLayer {
    /// Where each key's values are. Most values are about a key that is here already: the order of keys is apart.
    places: FxHashMap<Key, usize>,
    order: BTreeMap<Key, usize>,
    values: Vec<Versions>,
    raws: Raws,
    images: Vec<Bytes>,
    bytes: usize,
    max_lsn: Lsn,
    /// Records that are to be replaced by the pages they make, oldest first.
    long_chains: VecDeque<(Key, Lsn)>,
}

/// The values of a key.
struct Versions {
    /// Oldest first.
    values: Vec<(Lsn, Stored)>,
    /// Records in memory since the last image, one that waits to be made included.
    chain: u32,
}

/// A value without its bytes.
#[derive(Clone, Copy)]
enum Stored {
    Tombstone,
    /// No bytes: of a page, zeroes.
    EmptyImage,
    /// Its number among the images.
    Image(u32),
    Record {
        will_init: bool,
        start_lsn: Lsn,
        raw: Raw,
    },
}

/// Where a record's bytes are.
#[derive(Clone, Copy)]
struct Raw {
    piece: u32,
    at: u32,
    bytes: u32,
}

impl Stored {
    /// [`Value::is_initial`].
    fn is_initial(self) -> bool {
        match self {
            Stored::Tombstone | Stored::EmptyImage | Stored::Image(_) => true,
            Stored::Record { will_init, .. } => will_init,
        }
    }
}

/// Records' bytes.
#[derive(Default)]
struct Raws {
    pieces: Vec<Bytes>,
    /// The content of the piece with this number, which is empty in the list: more is added.
    open: Option<(u32, Vec<u8>)>,
    /// Of the last open piece.
    piece_bytes: usize,
}

impl Raws {
    /// Takes the bytes of a batch; answers in which piece and where they begin.
    fn take(&mut self, raws: &mut Vec<u8>) -> (u32, u32) {
        if raws.len() >= BIG_BATCH_BYTES {
            self.pieces.push(Bytes::from(std::mem::take(raws)));
            return (self.pieces.len() as u32 - 1, 0);
        }
        if self.open.as_ref().is_some_and(|(_, open)| open.capacity() - open.len() < raws.len())
            && let Some((number, full)) = self.open.take()
        {
            self.pieces[number as usize] = Bytes::from(full);
        }
        let (pieces, piece_bytes) = (&mut self.pieces, &mut self.piece_bytes);
        let (number, open) = self.open.get_or_insert_with(|| {
            *piece_bytes = (*piece_bytes * 2).clamp(PIECE_BYTES.start, PIECE_BYTES.end);
            pieces.push(Bytes::new());
            (pieces.len() as u32 - 1, Vec::with_capacity((*piece_bytes).max(raws.len())))
        });
        let at = open.len() as u32;
        open.append(raws);
        (*number, at)
    }

    fn get(&self, raw: Raw) -> Bytes {
        let range = raw.at as usize..(raw.at + raw.bytes) as usize;
        match &self.open {
            Some((number, open)) if *number == raw.piece => Bytes::copy_from_slice(&open[range]),
            _ => self.pieces[raw.piece as usize].slice(range),
        }
    }
}

impl MemoryLayer {
    /// Adds a batch's values, each over one with the same key and LSN, and empties it. `chain_before`: [`MemoryLayer::chain`]
    /// in the memory layers before.
    pub fn append(&mut self, batch: &mut PutBatch, chain_before: impl Fn(Key) -> u32) {
        let (piece, begin) = self.raws.take(&mut batch.raws);
        for put in batch.puts.drain(..) {
            self.bytes += put.weight() + ENTRY_OVERHEAD_BYTES;
            let BatchPut { key, lsn, value } = put;
            let stored = match value {
                BatchValue::Tombstone => Stored::Tombstone,
                BatchValue::Image(content) => self.keep_image(content),
                BatchValue::Record { will_init, start_lsn, raw } => {
                    Stored::Record { will_init, start_lsn, raw: Raw { piece, at: begin + raw.at, bytes: raw.bytes } }
                }
            };
            self.put(key, lsn, stored, &chain_before);
        }
        batch.clear();
    }

    fn keep_image(&mut self, content: Bytes) -> Stored {
        if content.is_empty() {
            return Stored::EmptyImage;
        }
        self.images.push(content);
        Stored::Image(self.images.len() as u32 - 1)
    }

    fn put(&mut self, key: Key, lsn: Lsn, value: Stored, chain_before: impl FnOnce(Key) -> u32) {
        self.max_lsn = self.max_lsn.max(lsn);
        let place = *self.places.entry(key).or_insert_with(|| {
            self.bytes += KEY_OVERHEAD_BYTES;
            self.order.insert(key, self.values.len());
            // Many have one value only.
            self.values.push(Versions { values: Vec::with_capacity(1), chain: chain_before(key) });
            self.values.len() - 1
        });
        let versions = &mut self.values[place];
        if versions.values.last().is_none_or(|(last, _)| *last < lsn) {
            versions.chain = if value.is_initial() { 0 } else { versions.chain + 1 };
            if versions.chain >= RECORDS_PER_IMAGE && key.is_page() && self.long_chains.len() < MOST_LONG_CHAINS {
                versions.chain = 0;
                self.long_chains.push_back((key, lsn));
            }
            return versions.values.push((lsn, value));
        }
        match versions.values.binary_search_by_key(&lsn, |(lsn, _)| *lsn) {
            Ok(at) => versions.values[at].1 = value,
            Err(at) => versions.values.insert(at, (lsn, value)),
        }
    }

    fn value(&self, stored: Stored) -> Value {
        match stored {
            Stored::Tombstone => Value::Tombstone,
            Stored::EmptyImage => Value::Image(Bytes::new()),
            Stored::Image(number) => Value::Image(self.images[number as usize].clone()),
            Stored::Record { will_init, start_lsn, raw } => {
                Value::Record(StoredRecord { will_init, depth: 0, start_lsn, raw: self.raws.get(raw) })
            }
        }
    }

    /// The next record that is to be replaced by the page it makes.
    pub fn take_long_chain(&mut self) -> Option<(Key, Lsn)> {
        self.long_chains.pop_front()
    }

    /// True when [`MemoryLayer::take_long_chain`] would tell one.
    pub fn has_long_chains(&self) -> bool {
        !self.long_chains.is_empty()
    }

    /// Replaces a record by the page that it makes; its bytes stay, as others' lie beside them. Nothing is changed when no
    /// record is there.
    pub fn replace_record(&mut self, key: Key, lsn: Lsn, page: Bytes) {
        let Some(place) = self.places.get(&key) else { return };
        let values = &self.values[*place].values;
        let Ok(at) = values.binary_search_by_key(&lsn, |(lsn, _)| *lsn) else { return };
        if let (_, Stored::Record { .. }) = values[at] {
            let place = *place;
            self.bytes += page.len();
            self.values[place].values[at].1 = self.keep_image(page);
        }
    }

    /// About how much memory it takes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// True without values.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The largest LSN of a value.
    pub fn max_lsn(&self) -> Lsn {
        self.max_lsn
    }

    /// Appends the values of `key` in `(after, at]`, newest first, up to the first that needs no older one. True when
    /// there was such a one.
    pub fn find(&self, key: Key, after: Lsn, at: Lsn, found: &mut Vec<Found>) -> bool {
        let values = self.of(key);
        let until = values.partition_point(|(lsn, _)| *lsn <= at);
        for (lsn, stored) in values[..until].iter().rev().take_while(|(lsn, _)| *lsn > after) {
            found.push((*lsn, self.value(*stored)));
            if stored.is_initial() {
                return true;
            }
        }
        false
    }

    /// Every value whose key lies in `first..=last`, in order.
    pub fn scan(&self, first: Key, last: Key) -> impl Iterator<Item = (Key, Lsn, Value)> {
        let keys = self.order.range(first..=last);
        keys.flat_map(|(key, place)| {
            self.values[*place].values.iter().map(|(lsn, stored)| (*key, *lsn, self.value(*stored)))
        })
    }

    /// Divides its keys into at most `parts` ranges with about as many each; together they are all that has values here.
    pub fn ranges(&self, parts: usize) -> Vec<(Key, Key)> {
        let keys: Vec<Key> = self.order.keys().copied().collect();
        let chunk = keys.len().div_ceil(parts.max(1)).max(1);
        keys.chunks(chunk).filter_map(|keys| Some((*keys.first()?, *keys.last()?))).collect()
    }

    /// How many records a key has here before the first value that needs no older one.
    pub fn leading_records(&self, key: Key) -> usize {
        self.of(key).iter().take_while(|(_, value)| !value.is_initial()).count()
    }

    fn of(&self, key: Key) -> &[(Lsn, Stored)] {
        self.places.get(&key).map_or(&[], |place| &self.values[*place].values)
    }

    /// How many records a key has in memory since its last image; `None` when it has no values here.
    pub fn chain(&self, key: Key) -> Option<u32> {
        self.places.get(&key).map(|place| self.values[*place].chain)
    }
}

/// How much of what was ingested is in memory, over all branches.
#[derive(Debug, Default)]
pub struct IngestMemory(AtomicUsize);

impl IngestMemory {
    pub(super) fn change(&self, before: usize, after: usize) {
        // Wraps for a difference below zero; the sum never is.
        self.0.fetch_add(after.wrapping_sub(before), Ordering::Relaxed);
    }

    pub(super) fn is_over(&self, limit: usize) -> bool {
        self.0.load(Ordering::Relaxed) > limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::branch::Put;

    fn put(layer: &mut MemoryLayer, key: Key, lsn: u64, value: Value) {
        layer.append(&mut [Put { key, lsn: Lsn(lsn), value }].into_iter().collect(), |_| 0);
    }

    fn record(start_lsn: u64, raw: Vec<u8>) -> Value {
        Value::Record(StoredRecord { will_init: false, depth: 0, start_lsn: Lsn(start_lsn), raw: raw.into() })
    }

    #[test]
    fn records_are_what_they_were_wherever_their_bytes_are_kept() {
        let mut layer = MemoryLayer::default();
        let mut put_in = Vec::new();
        let mut lsn = 8;
        // Small batches that share pieces, big ones between them that are pieces, and several records in a batch.
        for bytes in [0, 1, 100, 3000, 40_000, 50, 2000, 70_000, 1, 30_000, 30_000, 30_000, 5] {
            let mut batch = PutBatch::default();
            for (block, fill) in [(0, lsn as u8), (1, 0xAA)] {
                let key = Key { block, ..Key::of(crate::storage::Kind::RelPage) };
                let value = record(lsn, vec![fill; bytes]);
                batch.put(Put { key, lsn: Lsn(lsn + 4), value: value.clone() });
                put_in.push((key, lsn + 4, value));
            }
            layer.append(&mut batch, |_| 0);
            assert!(batch.is_empty());
            lsn += 8;
        }
        put_in.sort_by_key(|(key, lsn, _)| (*key, *lsn));
        let all: Vec<_> = layer.scan(Key::MIN, Key::MAX).map(|(key, lsn, value)| (key, lsn.0, value)).collect();
        assert!(all == put_in);
        assert!(layer.raws.pieces.len() > 4, "{} pieces", layer.raws.pieces.len());
        let key = put_in[0].0;
        layer.replace_record(key, Lsn(20), Bytes::from_static(b"page"));
        let mut found = Vec::new();
        assert!(layer.find(key, Lsn(0), Lsn(28), &mut found));
        let expected = [(Lsn(28), record(24, vec![24; 100])), (Lsn(20), Value::Image(Bytes::from_static(b"page")))];
        assert!(found == expected);
    }

    #[test]
    fn a_search_stops_at_the_first_initial_value() {
        let mut layer = MemoryLayer::default();
        let key = Key::CHECKPOINT;
        for lsn in [8, 16, 24] {
            put(&mut layer, key, lsn, Value::rel_size(lsn as u32));
        }
        let find = |after, at| {
            let mut found = Vec::new();
            let done = layer.find(key, Lsn(after), Lsn(at), &mut found);
            (done, found.into_iter().map(|(lsn, _)| lsn.0).collect::<Vec<_>>())
        };
        assert_eq!(find(0, 20), (true, vec![16]));
        assert_eq!(find(16, 20), (false, vec![]));
        assert_eq!(find(16, 24), (true, vec![24]));
        assert_eq!(find(24, 24), (false, vec![]));
        assert_eq!(find(0, 7), (false, vec![]));
    }

    #[test]
    fn values_may_come_in_any_order_and_again() {
        let mut layer = MemoryLayer::default();
        for (key, lsn, blocks) in [(Key::CHECKPOINT, 16, 1), (Key::CONTROL_FILE, 8, 2), (Key::CHECKPOINT, 8, 3)] {
            put(&mut layer, key, lsn, Value::rel_size(blocks));
        }
        put(&mut layer, Key::CHECKPOINT, 16, Value::rel_size(4));
        let all: Vec<_> = layer.scan(Key::MIN, Key::MAX).map(|(key, lsn, value)| (key, lsn.0, value)).collect();
        let expected = [(Key::CONTROL_FILE, 8, 2), (Key::CHECKPOINT, 8, 3), (Key::CHECKPOINT, 16, 4)];
        assert_eq!(all, expected.map(|(key, lsn, blocks)| (key, lsn, Value::rel_size(blocks))));
        assert_eq!(layer.max_lsn(), Lsn(16));
        let whole = (Key::CONTROL_FILE, Key::CHECKPOINT);
        let each = vec![(Key::CONTROL_FILE, Key::CONTROL_FILE), (Key::CHECKPOINT, Key::CHECKPOINT)];
        assert_eq!([0, 1, 2, 9].map(|parts| layer.ranges(parts)), [vec![whole], vec![whole], each.clone(), each]);
    }
}
