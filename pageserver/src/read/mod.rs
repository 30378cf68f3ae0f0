//! Reading a branch as of an LSN: single values, pages (made from an image and the records after it), ranges of keys.
//!
//! All positions given here must have been ingested: [`resolve`](Branch::resolve) sees to that for requests.

mod cache;
mod redo;

pub use cache::PageCache;

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    sync::Arc,
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use types::{BlockNumber, Lsn, PAGE_BYTES, PageTag, RelTag};
use wire::pageserver::ReadLsn;

use crate::{
    branch::Branch,
    error::StorageError,
    layer::Found,
    storage::{Key, StoredRecord, Value, decode_rel_size},
};

/// Pages of one request that are read at a time.
const CONCURRENT_PAGES: usize = 16;

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

    /// Pages in the order asked. Blocks past a fork's end are zeroes.
    pub async fn get_pages(self: &Arc<Self>, pages: &[PageTag], at: Lsn) -> Result<Vec<Bytes>, StorageError> {
        let mut sizes: HashMap<RelTag, BlockNumber> = HashMap::new();
        for page in pages {
            if let Entry::Vacant(unknown) = sizes.entry(page.rel) {
                unknown.insert(self.rel_size(page.rel, at).await?.unwrap_or(0));
            }
        }
        let reads: Vec<_> = pages
            .iter()
            .map(|tag| {
                let exists = sizes.get(&tag.rel).is_some_and(|size| tag.block < *size);
                self.clone().read_page_or_zeroes(*tag, exists, at)
            })
            .collect();
        futures::stream::iter(reads).buffered(CONCURRENT_PAGES).try_collect().await
    }

    async fn read_page_or_zeroes(self: Arc<Self>, tag: PageTag, exists: bool, at: Lsn) -> Result<Bytes, StorageError> {
        if exists { self.read_page(Key::page(tag), at).await } else { Ok(zero_page()) }
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

    /// A relation or SLRU page that exists as of `at`.
    pub async fn read_page(self: &Arc<Self>, key: Key, at: Lsn) -> Result<Bytes, StorageError> {
        let cache = &self.shared().pages;
        let cached = cache.get(self.id(), key).filter(|(lsn, _)| *lsn <= at);
        let after = cached.as_ref().map_or(Lsn(0), |(lsn, _)| *lsn);
        if let Some((lsn, page)) = &cached
            && *lsn == at
        {
            return Ok(page.clone());
        }
        let (mut found, complete) = self.find(key, after, at).await?;
        if found.is_empty() && cached.is_none() {
            return self.inherited_page(key, at).await;
        }
        let base = match (complete, cached) {
            (true, _) => self.initial_page(key, at, &mut found)?,
            (false, Some((_, page))) => Some(page),
            (false, None) => Some(self.inherited_page(key, at).await?),
        };
        let records: Vec<(Lsn, StoredRecord)> = found.into_iter().rev().filter_map(as_record).collect();
        let page = self.replay(key, at, base, records).await?;
        cache.insert(self.id(), key, at, page.clone());
        Ok(page)
    }

    /// The page as the ancestor had it when this branch left it.
    async fn inherited_page(self: &Arc<Self>, key: Key, at: Lsn) -> Result<Bytes, StorageError> {
        match self.ancestor_ready().await? {
            Some((ancestor, lsn)) => Box::pin(ancestor.read_page(key, at.min(lsn))).await,
            None => Err(self.unmakeable(key, at, "nothing is stored to start from".to_owned())),
        }
    }

    /// Takes the image that ends a search off it; `None` when a record makes the page from nothing.
    fn initial_page(&self, key: Key, at: Lsn, found: &mut Vec<Found>) -> Result<Option<Bytes>, StorageError> {
        match found.last() {
            Some((_, Value::Image(image))) => {
                let page = if image.is_empty() { zero_page() } else { image.clone() };
                found.pop();
                if page.len() != PAGE_BYTES {
                    return Err(self.unmakeable(key, at, format!("an image of {} bytes is stored", page.len())));
                }
                Ok(Some(page))
            }
            Some((_, Value::Record(_))) => Ok(None),
            Some((lsn, Value::Tombstone)) => Err(self.unmakeable(key, at, format!("it was removed at {lsn}"))),
            None => Err(self.unmakeable(key, at, "nothing was found".to_owned())),
        }
    }

    async fn replay(
        &self,
        key: Key,
        at: Lsn,
        base: Option<Bytes>,
        records: Vec<(Lsn, StoredRecord)>,
    ) -> Result<Bytes, StorageError> {
        let base = match base {
            Some(page) if records.is_empty() => return Ok(page),
            Some(page) => page,
            None => zero_page(),
        };
        let made = redo::replay(key, base, records).await;
        made.map_err(|reason| self.unmakeable(key, at, reason))
    }

    fn unmakeable(&self, key: Key, lsn: Lsn, reason: String) -> StorageError {
        StorageError::Unmakeable { branch: self.name().clone(), what: key.to_string(), lsn, reason }
    }

    /// The branch's own values of a key in `(after, at]`, newest first, and whether the last needs no older one.
    async fn find(&self, key: Key, after: Lsn, at: Lsn) -> Result<(Vec<Found>, bool), StorageError> {
        let mut found = Vec::new();
        let mut complete = false;
        let view = self.view(|memory| complete = complete || memory.find(key, after, at, &mut found));
        if !complete {
            let path = view.layers.search(key, key, after, at);
            let deltas = path.deltas.iter().map(|layer| (layer, path.deltas_after));
            for (layer, after) in deltas.chain(path.images.iter().map(|layer| (layer, after))) {
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
            let Some((ancestor, lsn)) = branch.ancestor_ready().await?.map(|(ancestor, lsn)| (ancestor.clone(), lsn))
            else {
                break;
            };
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
        let view =
            self.view(|memory| memory.scan(first, last).for_each(|(key, lsn, value)| keep(key, lsn, value.clone())));
        let path = view.layers.search(first, last, Lsn(0), at);
        for layer in path.deltas.iter().chain(&path.images) {
            layer.scan(&self.shared().remote, first, last, &mut keep).await?;
        }
        Ok(newest)
    }
}

fn as_record((lsn, value): Found) -> Option<(Lsn, StoredRecord)> {
    match value {
        Value::Record(record) => Some((lsn, record)),
        Value::Image(_) | Value::Tombstone => None,
    }
}
