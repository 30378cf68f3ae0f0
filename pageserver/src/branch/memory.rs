//! Values that are not in a layer file yet.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use rustc_hash::FxHashMap;
use types::Lsn;

use crate::{
    layer::Found,
    storage::{Key, Value},
};

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

/// What a value costs besides its content, about: its place among its key's values, which have room for more.
const ENTRY_OVERHEAD_BYTES: usize = 96;
/// What a key costs, about: its places in both maps, and the list of its values.
const KEY_OVERHEAD_BYTES: usize = 192;

/// A page gets an image in memory after so many records.
const RECORDS_PER_IMAGE: u32 = 64;
/// So many images wait to be made at most; the chains of other pages go on until there is room.
const MOST_LONG_CHAINS: usize = 4096;

/// Values by (key, LSN) in memory.
#[derive(Default)]
pub struct MemoryLayer {
    /// Where each key's values are. Most values are about a key that is here already: the order of keys is apart.
    places: FxHashMap<Key, usize>,
    order: BTreeMap<Key, usize>,
    values: Vec<Versions>,
    bytes: usize,
    max_lsn: Lsn,
    /// Records that are to be replaced by the pages they make, oldest first.
    long_chains: VecDeque<(Key, Lsn)>,
}

/// The values of a key.
struct Versions {
    /// Oldest first.
    values: Vec<(Lsn, Value)>,
    /// Records in memory since the last image, one that waits to be made included.
    chain: u32,
}

impl MemoryLayer {
    /// Adds a value, over one with the same key and LSN. `chain_before`: [`MemoryLayer::chain`] in the memory layers before.
    pub fn put(&mut self, put: Put, chain_before: impl FnOnce(Key) -> u32) {
        let Put { key, lsn, value } = put;
        self.bytes += value.weight() + ENTRY_OVERHEAD_BYTES;
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

    /// The next record that is to be replaced by the page it makes.
    pub fn take_long_chain(&mut self) -> Option<(Key, Lsn)> {
        self.long_chains.pop_front()
    }

    /// True when [`MemoryLayer::take_long_chain`] would tell one.
    pub fn has_long_chains(&self) -> bool {
        !self.long_chains.is_empty()
    }

    /// Replaces a record by the page that it makes. Nothing is changed when no record is there.
    pub fn replace_record(&mut self, key: Key, lsn: Lsn, page: Bytes) {
        let Some(place) = self.places.get(&key) else { return };
        let values = &mut self.values[*place].values;
        if let Ok(at) = values.binary_search_by_key(&lsn, |(lsn, _)| *lsn)
            && let (_, value @ Value::Record(_)) = &mut values[at]
        {
            let weight = value.weight();
            *value = Value::Image(page);
            self.bytes = self.bytes - weight + value.weight();
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
        for (lsn, value) in values[..until].iter().rev().take_while(|(lsn, _)| *lsn > after) {
            found.push((*lsn, value.clone()));
            if value.is_initial() {
                return true;
            }
        }
        false
    }

    /// Every value whose key lies in `first..=last`, in order.
    pub fn scan(&self, first: Key, last: Key) -> impl Iterator<Item = (Key, Lsn, &Value)> {
        let keys = self.order.range(first..=last);
        keys.flat_map(|(key, place)| self.values[*place].values.iter().map(|(lsn, value)| (*key, *lsn, value)))
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

    fn of(&self, key: Key) -> &[(Lsn, Value)] {
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

    #[test]
    fn a_search_stops_at_the_first_initial_value() {
        let mut layer = MemoryLayer::default();
        let key = Key::CHECKPOINT;
        for lsn in [8, 16, 24] {
            layer.put(Put { key, lsn: Lsn(lsn), value: Value::rel_size(lsn as u32) }, |_| 0);
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
            layer.put(Put { key, lsn: Lsn(lsn), value: Value::rel_size(blocks) }, |_| 0);
        }
        layer.put(Put { key: Key::CHECKPOINT, lsn: Lsn(16), value: Value::rel_size(4) }, |_| 0);
        let all: Vec<_> = layer.scan(Key::MIN, Key::MAX).map(|(key, lsn, value)| (key, lsn.0, value.clone())).collect();
        let expected = [(Key::CONTROL_FILE, 8, 2), (Key::CHECKPOINT, 8, 3), (Key::CHECKPOINT, 16, 4)];
        assert_eq!(all, expected.map(|(key, lsn, blocks)| (key, lsn, Value::rel_size(blocks))));
        assert_eq!(layer.max_lsn(), Lsn(16));
        let whole = (Key::CONTROL_FILE, Key::CHECKPOINT);
        let each = vec![(Key::CONTROL_FILE, Key::CONTROL_FILE), (Key::CHECKPOINT, Key::CHECKPOINT)];
        assert_eq!([0, 1, 2, 9].map(|parts| layer.ranges(parts)), [vec![whole], vec![whole], each.clone(), each]);
    }
}
