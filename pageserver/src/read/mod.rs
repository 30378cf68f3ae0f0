//! Reading a branch as of an LSN: single values, pages (made from an image and the records after it), ranges of keys.
//!
//! All positions given here must have been ingested: [`resolve`](Branch::resolve) sees to that for requests.

mod cache;
mod pages;
pub(crate) mod redo;

pub use cache::PageCache;

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use types::{BlockNumber, Lsn, PAGE_BYTES, RelTag};
use wire::pageserver::ReadLsn;

use crate::{
    branch::Branch,
    error::StorageError,
    layer::Found,
    storage::{Key, Value, decode_rel_size},
};

static ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// A page of zeroes.
pub fn zero_page() -> Bytes {
    Bytes::from_static(&ZERO_PAGE)
}

impl Branch {
    /// As of which position to answer: waits for what the asker knows to have happened.
    pub async fn resolve(self: &Arc<Self>, at: ReadLsn) -> Result<Lsn, StorageError> {
        if at.request < at.not_modified_since {
            return Err(StorageError::Invalid(format!(
                "a read as of {} can't need WAL up to {}",
                at.request, at.not_modified_since
            )));
        }
        self.wait_for(at.not_modified_since).await?;
        let last = self.tip().last_record_lsn;
        if at.request > last && at.request != Lsn::MAX {
            // Not waited for, but the next request will probably need it.
            self.open_feed();
        }
        let lsn = at.request.min(last);
        if lsn < self.start_lsn() || !self.is_kept(lsn) {
            return Err(self.outside_history(lsn));
        }
        Ok(lsn)
    }

    /// The error for a position that this branch does not have.
    pub fn outside_history(&self, lsn: Lsn) -> StorageError {
        let (start, end) = (self.start_lsn().max(self.gc_cutoff()), self.tip().last_record_lsn);
        StorageError::Invalid(format!("{lsn} is outside the history of branch {}: {start} to {end}", self.name()))
    }

    /// Blocks in a fork; `None` when it does not exist.
    pub async fn rel_size(self: &Arc<Self>, rel: RelTag, at: Lsn) -> Result<Option<BlockNumber>, StorageError> {
        let key = Key::rel_size(rel);
        let Some(content) = self.read_value(key, at).await? else { return Ok(None) };
        let size = decode_rel_size(&content);
        Ok(Some(size.ok_or_else(|| self.unmakeable(key, at, "the stored size is malformed".to_owned()))?))
    }

    /// The content under a key that holds no records; `None` when there is nothing.
    pub async fn read_value(self: &Arc<Self>, key: Key, at: Lsn) -> Result<Option<Bytes>, StorageError> {
        let (found, _) = self.find(key, Lsn(0), at).await?;
        match found.into_iter().next() {
            Some((_, Value::Image(content))) => Ok(Some(content)),
            Some((_, Value::Tombstone)) => Ok(None),
            Some((_, Value::Record(_))) => Err(self.unmakeable(key, at, "a record is stored".to_owned())),
            None => match self.ancestor_ready().await? {
                Some((ancestor, lsn)) => Box::pin(ancestor.read_value(key, at.min(lsn))).await,
                None => Ok(None),
            },
        }
    }

    pub(crate) fn unmakeable(&self, key: Key, lsn: Lsn, reason: String) -> StorageError {
        StorageError::Unmakeable { branch: self.name().clone(), what: key.to_string(), lsn, reason }
    }

    /// The branch's own values of a key in `(after, at]`, newest first, and whether the last needs no older one.
    pub(crate) async fn find(&self, key: Key, after: Lsn, at: Lsn) -> Result<(Vec<Found>, bool), StorageError> {
        let mut found = Vec::new();
        let mut complete = false;
        let view = self.view(|memory| complete = complete || memory.find(key, after, at, &mut found));
        if !complete {
            let path = view.layers.search(key, after, at);
            for (layer, after) in path.layers(after) {
                if layer.find(&self.shared().remote, key, after, at, &mut found).await? {
                    complete = true;
                    break;
                }
            }
        }
        Ok((found, complete))
    }

    /// What stands under the keys `first..=last`, ancestors included. A page's value is its newest one, which may be a
    /// record: only its existence is meant.
    pub async fn scan(self: &Arc<Self>, first: Key, last: Key, at: Lsn) -> Result<BTreeMap<Key, Value>, StorageError> {
        let mut all = BTreeMap::new();
        let mut branch = self.clone();
        let mut at = at;
        loop {
            for (key, (_, value)) in branch.scan_own(first, last, at).await? {
                all.entry(key).or_insert(value);
            }
            let Some((ancestor, lsn)) = branch.ancestor_ready().await? else { break };
            at = at.min(lsn);
            branch = ancestor;
        }
        all.retain(|_, value| *value != Value::Tombstone);
        Ok(all)
    }

    async fn scan_own(&self, first: Key, last: Key, at: Lsn) -> Result<BTreeMap<Key, Found>, StorageError> {
        let mut newest: BTreeMap<Key, Found> = BTreeMap::new();
        let mut keep = |key: Key, lsn: Lsn, value: Value| {
            if lsn <= at && newest.get(&key).is_none_or(|(known, _)| *known < lsn) {
                newest.insert(key, (lsn, value));
            }
        };
        let view = self.view(|memory| memory.scan(first, last).for_each(|(key, lsn, value)| keep(key, lsn, value)));
        for segment in view.layers.segments(first, last, Lsn(0), at) {
            for (layer, floor) in segment.path.layers(Lsn(0)) {
                // What a delta has up to the image is in the image, or hidden by it.
                let newer = |key: Key, lsn: Lsn, value: Value| {
                    if lsn > floor {
                        keep(key, lsn, value)
                    }
                };
                layer.scan(&self.shared().remote, segment.first, segment.last, newer).await?;
            }
        }
        Ok(newest)
    }
}
