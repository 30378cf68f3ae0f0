//! Pages: many at once, in one pass over memory and each layer, each block read once.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use types::{BlockNumber, Lsn, PAGE_BYTES, PageTag, RelTag};

use super::{redo, zero_page};
use crate::{
    branch::Branch,
    error::StorageError,
    layer::{Found, LayerSet, Wanted},
    storage::{Key, StoredRecord, Value},
};

/// Pages of one request that are made at a time.
const CONCURRENT_PAGES: usize = 16;
/// Pages that are looked for in one pass: their blocks are in memory together.
const PAGES_PER_PASS: usize = 256;
/// Of a pass with more keys than this, as a scan has, a page is kept only if so many records went into it: the reader keeps it itself,
/// and to make it again costs less than to keep it.
const SINGLE_PAGES: usize = 16;
const WORTH_KEEPING_RECORDS: usize = 16;
/// Keys of a pass that are at most so many blocks apart are taken for one range when layers are chosen.
const NEAR_BLOCKS: u32 = 1024;

/// A page that was looked for.
struct Search {
    wanted: Wanted,
    /// The version that was kept from an earlier read, older than what is wanted.
    cached: Option<Bytes>,
}

impl Branch {
    /// Pages in the order asked. Blocks past a fork's end are zeroes.
    pub async fn get_pages(self: &Arc<Self>, pages: &[PageTag], at: Lsn) -> Result<Vec<Bytes>, StorageError> {
        let mut sizes: HashMap<RelTag, BlockNumber> = HashMap::new();
        for page in pages {
            if let Entry::Vacant(unknown) = sizes.entry(page.rel) {
                unknown.insert(self.rel_size(page.rel, at).await?.unwrap_or(0));
            }
        }
        let exists = |tag: &&PageTag| sizes.get(&tag.rel).is_some_and(|size| tag.block < *size);
        let mut keys: Vec<Key> = pages.iter().filter(exists).map(|tag| Key::page(*tag)).collect();
        keys.sort_unstable();
        keys.dedup();
        let made = self.read_pages(&keys, at).await?;
        let in_order = pages.iter().map(|tag| match keys.binary_search(&Key::page(*tag)) {
            Ok(index) => made[index].clone(),
            Err(_past_the_end) => zero_page(),
        });
        Ok(in_order.collect())
    }

    /// A relation or SLRU page that exists as of `at`.
    pub async fn read_page(self: &Arc<Self>, key: Key, at: Lsn) -> Result<Bytes, StorageError> {
        let page = self.read_pages(&[key], at).await?.pop();
        page.ok_or_else(|| self.unmakeable(key, at, "nothing was read".to_owned()))
    }

    /// Relation or SLRU pages that exist as of `at`; the keys ascend.
    pub async fn read_pages(self: &Arc<Self>, keys: &[Key], at: Lsn) -> Result<Vec<Bytes>, StorageError> {
        let mut pages = Vec::with_capacity(keys.len());
        for keys in keys.chunks(PAGES_PER_PASS) {
            pages.append(&mut self.read_pass(keys, at).await?);
        }
        Ok(pages)
    }

    async fn read_pass(self: &Arc<Self>, keys: &[Key], at: Lsn) -> Result<Vec<Bytes>, StorageError> {
        let mut pages: Vec<Option<Bytes>> = Vec::with_capacity(keys.len());
        let mut searches = Vec::new();
        for key in keys {
            let cached = self.shared().pages.get(self.id(), *key).filter(|(lsn, _)| *lsn <= at);
            let is_it = cached.as_ref().filter(|(lsn, _)| *lsn == at);
            pages.push(is_it.map(|(_, page)| page.clone()));
            if is_it.is_none() {
                let after = cached.as_ref().map_or(Lsn(0), |(lsn, _)| *lsn);
                let wanted = Wanted { key: *key, after, found: Vec::new(), complete: false };
                searches.push(Search { wanted, cached: cached.map(|(_, page)| page) });
            }
        }
        let keep_from_records = if searches.len() > SINGLE_PAGES { WORTH_KEEPING_RECORDS } else { 0 };
        self.search(&mut searches, at).await?;
        let mut bases = self.inherited_pages(&searches, at).await?.into_iter();
        let made: Vec<_> = searches
            .into_iter()
            .map(|mut search| {
                if search.needs_inherited() {
                    search.cached = bases.next();
                }
                self.clone().make(search, at, keep_from_records)
            })
            .collect();
        let made: Vec<Bytes> = futures::stream::iter(made).buffered(CONCURRENT_PAGES).try_collect().await?;
        let mut made = made.into_iter();
        Ok(pages.into_iter().filter_map(|page| page.or_else(|| made.next())).collect())
    }

    /// The branch's own values, from memory and layers.
    async fn search(&self, searches: &mut [Search], at: Lsn) -> Result<(), StorageError> {
        let view = self.view(|memory| {
            for Search { wanted, .. } in searches.iter_mut().filter(|search| !search.wanted.complete) {
                wanted.complete = memory.find(wanted.key, wanted.after, at, &mut wanted.found);
            }
        });
        let mut open: Vec<&mut Wanted> =
            searches.iter_mut().map(|search| &mut search.wanted).filter(|wanted| !wanted.complete).collect();
        let mut rest = &mut open[..];
        while let Some(first) = rest.first().map(|wanted| wanted.key) {
            let near = rest.iter().take_while(|wanted| is_near(first, wanted.key)).count();
            let (group, others) = rest.split_at_mut(near);
            self.search_layers(&view.layers, group, at).await?;
            rest = others;
        }
        Ok(())
    }

    async fn search_layers(&self, layers: &LayerSet, wanted: &mut [&mut Wanted], at: Lsn) -> Result<(), StorageError> {
        let remote = &self.shared().remote;
        if let [single] = wanted {
            let path = layers.search(single.key, single.after, at);
            for (layer, floor) in path.layers(single.after) {
                single.complete = layer.find(remote, single.key, floor, at, &mut single.found).await?;
                if single.complete {
                    break;
                }
            }
            return Ok(());
        }
        let (Some(first), Some(last)) = (wanted.first().map(|w| w.key), wanted.last().map(|w| w.key)) else {
            return Ok(());
        };
        let mut rest = wanted;
        for segment in layers.segments(first, last, Lsn(0), at) {
            let within = rest.partition_point(|wanted| wanted.key <= segment.last);
            let (group, others) = rest.split_at_mut(within);
            for (layer, floor) in segment.path.layers(Lsn(0)) {
                layer.find_many(remote, group, floor, at).await?;
            }
            rest = others;
        }
        Ok(())
    }

    /// The ancestor's pages, for those searches that need one, in their order.
    async fn inherited_pages(self: &Arc<Self>, searches: &[Search], at: Lsn) -> Result<Vec<Bytes>, StorageError> {
        let needing = searches.iter().filter(|search| search.needs_inherited());
        let keys: Vec<Key> = needing.map(|search| search.wanted.key).collect();
        let Some(first) = keys.first() else { return Ok(Vec::new()) };
        match self.ancestor_ready().await? {
            Some((ancestor, lsn)) => Box::pin(ancestor.read_pages(&keys, at.min(lsn))).await,
            None => Err(self.unmakeable(*first, at, "nothing is stored to start from".to_owned())),
        }
    }

    /// The page that was looked for. It is kept when so many records went into it.
    async fn make(self: Arc<Self>, search: Search, at: Lsn, keep_from_records: usize) -> Result<Bytes, StorageError> {
        let Search { wanted: Wanted { key, mut found, complete, .. }, cached } = search;
        let base = if complete { self.initial_page(key, at, &mut found)? } else { cached };
        let records: Vec<(Lsn, StoredRecord)> = found.into_iter().rev().filter_map(as_record).collect();
        let base = match base {
            Some(page) if records.is_empty() => return Ok(page),
            Some(page) => page,
            None => zero_page(),
        };
        let is_kept = records.len() >= keep_from_records;
        let made = redo::replay(key, base, records).await;
        let page = made.map_err(|reason| self.unmakeable(key, at, reason))?;
        if is_kept {
            self.shared().pages.insert(self.id(), key, at, page.clone());
        }
        Ok(page)
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
}

impl Search {
    fn needs_inherited(&self) -> bool {
        !self.wanted.complete && self.cached.is_none()
    }
}

fn is_near(first: Key, key: Key) -> bool {
    Key { block: 0, ..first } == Key { block: 0, ..key } && key.block - first.block <= NEAR_BLOCKS
}

fn as_record((lsn, value): Found) -> Option<(Lsn, StoredRecord)> {
    match value {
        Value::Record(record) => Some((lsn, record)),
        Value::Image(_) | Value::Tombstone => None,
    }
}
