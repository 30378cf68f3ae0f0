//! How many records a page needs replayed, and images put where it would be more than [`MAX_CHAIN`].
//!
//! Postgres writes no full-page images here, so a page that is changed often would need ever more records. Each stored
//! record carries how deep it may lie at most; as memory is written out, a record that would lie too deep is replaced by the
//! page it makes, at the same position. In memory every 64th record of a page is replaced so, in the background: what needs
//! records from memory and from layers needs no more than 64 of each.

use std::sync::{Arc, atomic::Ordering};

use bytes::Bytes;
use futures::StreamExt;
use types::Lsn;

use super::{Branch, Frozen};
use crate::{
    error::StorageError,
    layer::{BuiltLayer, Effort, LayerBuilder},
    read::{redo, zero_page},
    storage::{Key, StoredRecord, Value},
};

/// Most records that are replayed to make a page from layers.
pub const MAX_CHAIN: u8 = 64;

/// A memory layer is made into a file by so many threads at a time...
const BUILD_THREADS: usize = 2;
/// ... and in so many parts, so that they end at about the same time,
const PARTS: usize = 8;
/// unless it is smaller than this.
const SMALL_BYTES: usize = 4 << 20;

/// The versions of one page on their way into a layer, oldest first.
struct Chain {
    key: Key,
    /// The newest value's.
    depth: u8,
    base: Base,
    /// Records since the base.
    since: Vec<(Lsn, StoredRecord)>,
}

/// What the records that follow are applied to.
enum Base {
    /// The page as it was before these values.
    Before(Lsn),
    /// This page.
    Page(Bytes),
}

impl Branch {
    /// A memory layer as a file, with images where chains would get too long. Made by a few threads, each with keys of its own.
    pub(super) async fn build_layer(self: &Arc<Self>, frozen: &Arc<Frozen>) -> Result<BuiltLayer, StorageError> {
        let build = |(first, last)| {
            let (branch, frozen) = (self.clone(), frozen.clone());
            self.shared.background.run(async move { branch.build_part(&frozen, first, last).await })
        };
        let parts = frozen.values.ranges(if frozen.values.bytes() < SMALL_BYTES { 1 } else { PARTS });
        let mut parts = futures::stream::iter(parts).map(build).buffered(BUILD_THREADS);
        let mut layer = LayerBuilder::default();
        while let Some(part) = parts.next().await {
            layer.append(part?);
        }
        Ok(layer.finish())
    }

    /// Makes the images that memory waits for, unless somebody does. What can't be made stays as it is: it is tried again as
    /// memory is written out.
    pub fn shorten_chains(self: &Arc<Self>) {
        if !self.state.read().open.has_long_chains() || self.shortening.swap(true, Ordering::AcqRel) {
            return;
        }
        let branch = self.clone();
        tokio::spawn(async move {
            let shortened = branch.shared.background.run(branch.clone().make_waiting_images()).await;
            branch.shortening.store(false, Ordering::Release);
            // What came in between found it taken.
            if shortened.is_ok() {
                branch.shorten_chains();
            }
        });
    }

    async fn make_waiting_images(self: Arc<Self>) -> Result<(), StorageError> {
        loop {
            let next = self.state.write().open.take_long_chain();
            let Some((key, lsn)) = next else { return Ok(()) };
            match self.read_page(key, lsn).await {
                Ok(page) => self.replace_record(key, lsn, page),
                Err(error) => {
                    tracing::debug!(branch = %self.name, %key, %lsn, %error, "no image was made in memory")
                }
            }
        }
    }

    fn replace_record(&self, key: Key, lsn: Lsn, page: Bytes) {
        let mut state = self.state.write();
        state.open.replace_record(key, lsn, page);
        self.count_memory(&state);
    }

    async fn build_part(
        self: &Arc<Self>,
        frozen: &Frozen,
        first: Key,
        last: Key,
    ) -> Result<LayerBuilder, StorageError> {
        let mut builder = LayerBuilder::with_effort(Effort::Little);
        let mut chain: Option<Chain> = None;
        for (key, lsn, value) in frozen.values.scan(first, last) {
            if !key.is_page() {
                builder.add(key, lsn, &value);
                continue;
            }
            let mut known = match chain.take().filter(|chain| chain.key == key) {
                Some(chain) => chain,
                None => {
                    let start = frozen.values.leading_records(key);
                    let before = Lsn(lsn.0 - 1);
                    let depth = if start == 0 { 0 } else { self.depth_before(key, before, start).await? };
                    Chain { key, depth, base: Base::Before(before), since: Vec::new() }
                }
            };
            let stored = self.store_in_chain(&mut known, lsn, value).await?;
            builder.add(key, lsn, &stored);
            chain = Some(known);
        }
        Ok(builder)
    }

    /// The value as it is to be stored: itself with its depth, or the page it makes.
    async fn store_in_chain(
        self: &Arc<Self>,
        chain: &mut Chain,
        lsn: Lsn,
        value: Value,
    ) -> Result<Value, StorageError> {
        let record = match value {
            Value::Tombstone | Value::Image(_) => {
                chain.depth = 0;
                chain.since.clear();
                chain.base = match &value {
                    Value::Image(image) if !image.is_empty() => Base::Page(image.clone()),
                    _nothing_on_it => Base::Page(zero_page()),
                };
                return Ok(value);
            }
            Value::Record(record) => record,
        };
        if record.will_init {
            chain.depth = 0;
            chain.since.clear();
            chain.base = Base::Page(zero_page());
        }
        chain.since.push((lsn, record.clone()));
        if chain.depth >= MAX_CHAIN
            && let Some(page) = self.make_image(chain, lsn).await?
        {
            chain.depth = 0;
            chain.since.clear();
            chain.base = Base::Page(page.clone());
            return Ok(Value::Image(page));
        }
        chain.depth = chain.depth.saturating_add(1);
        Ok(Value::Record(StoredRecord { depth: chain.depth, ..record }))
    }

    /// The page with all records of the chain; `None` when they can't be applied: that is for the reader of the page to
    /// hear, and no reason not to store them.
    async fn make_image(self: &Arc<Self>, chain: &Chain, lsn: Lsn) -> Result<Option<Bytes>, StorageError> {
        let base = match &chain.base {
            Base::Page(page) => Ok(page.clone()),
            Base::Before(before) => self.read_page(chain.key, *before).await,
        };
        let made = match base {
            Ok(base) => redo::replay(chain.key, base, chain.since.clone()).await,
            Err(error @ StorageError::Unmakeable { .. }) => Err(error.to_string()),
            Err(error) => return Err(error),
        };
        let warn = |reason| tracing::error!(branch = %self.name, key = %chain.key, %lsn, reason, "no image was made");
        Ok(made.map_err(warn).ok())
    }

    /// How many records are replayed at most to have the page as of `at`: a bound from the indexes of layers where that is
    /// good enough for so many `more`, else counted.
    async fn depth_before(self: &Arc<Self>, key: Key, at: Lsn, more: usize) -> Result<u8, StorageError> {
        let bound = self.depth_bound(key, at).await?;
        if usize::from(bound) + more <= usize::from(MAX_CHAIN) {
            return Ok(bound);
        }
        Ok(u8::try_from(self.chain_length(key, at).await?).unwrap_or(u8::MAX))
    }

    async fn depth_bound(self: &Arc<Self>, key: Key, at: Lsn) -> Result<u8, StorageError> {
        let path = self.state.read().layers.search(key, Lsn(0), at);
        let mut bound = 0;
        for layer in &path.deltas {
            bound = bound.max(layer.depth_bound(&self.shared.remote, key).await?);
        }
        if path.image.is_some() {
            return Ok(bound);
        }
        let Some((ancestor, lsn)) = self.ancestor_ready().await? else { return Ok(bound) };
        if ancestor.has_in_memory(key, at.min(lsn)) {
            return Ok(u8::MAX);
        }
        Ok(bound.max(Box::pin(ancestor.depth_bound(key, at.min(lsn))).await?))
    }

    /// How many records are replayed to make the page as of `at`.
    pub async fn chain_length(self: &Arc<Self>, key: Key, at: Lsn) -> Result<usize, StorageError> {
        let (found, complete) = self.find(key, Lsn(0), at).await?;
        let records = found.iter().filter(|(_, value)| matches!(value, Value::Record(_))).count();
        if complete {
            return Ok(records);
        }
        match self.ancestor_ready().await? {
            Some((ancestor, lsn)) => Ok(records + Box::pin(ancestor.chain_length(key, at.min(lsn))).await?),
            None => Ok(records),
        }
    }

    fn has_in_memory(&self, key: Key, at: Lsn) -> bool {
        let mut found = Vec::new();
        self.view(|memory| _ = memory.find(key, Lsn(0), at, &mut found));
        !found.is_empty()
    }
}
