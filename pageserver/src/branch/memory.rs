//! Values that are not in a layer file yet.

use std::collections::BTreeMap;

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

/// What a key and its place in the map cost, about.
const ENTRY_OVERHEAD_BYTES: usize = 96;

/// Values by (key, LSN) in memory.
#[derive(Default)]
pub struct MemoryLayer {
    values: BTreeMap<(Key, Lsn), Value>,
    bytes: usize,
    max_lsn: Lsn,
}

impl MemoryLayer {
    /// Adds a value, over one with the same key and LSN.
    pub fn put(&mut self, put: Put) {
        self.bytes += put.value.weight() + ENTRY_OVERHEAD_BYTES;
        self.max_lsn = self.max_lsn.max(put.lsn);
        self.values.insert((put.key, put.lsn), put.value);
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
        if at <= after {
            return false;
        }
        for ((_, lsn), value) in self.values.range((key, Lsn(after.0 + 1))..=(key, at)).rev() {
            found.push((*lsn, value.clone()));
            if value.is_initial() {
                return true;
            }
        }
        false
    }

    /// Every value whose key lies in `first..=last`, in order.
    pub fn scan(&self, first: Key, last: Key) -> impl Iterator<Item = (Key, Lsn, &Value)> {
        self.values.range((first, Lsn(0))..=(last, Lsn::MAX)).map(|((key, lsn), value)| (*key, *lsn, value))
    }

    /// How many records a key has here before the first value that needs no older one.
    pub fn leading_records(&self, key: Key) -> usize {
        let values = self.values.range((key, Lsn(0))..=(key, Lsn::MAX));
        values.take_while(|(_, value)| !value.is_initial()).count()
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
            layer.put(Put { key, lsn: Lsn(lsn), value: Value::rel_size(lsn as u32) });
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
}
