//! Merging deltas and making images, as the planner says, in the background and with little in memory.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use tokio::task::JoinSet;
use types::{BlockNumber, Lsn, RelTag};

use super::Branch;
use crate::{
    compaction::{Cell, Job, MergePart, PlanInput, cuts_after_image, next_job},
    error::StorageError,
    layer::{
        BuiltLayer, Layer, LayerBuilder, LayerKind, LayerMeta, LayerSet, MergeStream, Merged, SearchPath, Segment,
        StoredBlock,
    },
    read::{redo, zero_page},
    storage::{Key, Kind, StoredRecord, Value},
};

/// Layers that are uploaded while the next one is being made.
const CONCURRENT_UPLOADS: usize = 2;
/// Pages that are made at a time.
const PAGES_PER_BATCH: usize = 128;
/// A block that is not full is written for the sake of at least so many that can be taken over as they are.
const BLOCKS_PER_SHORT_ONE: usize = 4;

impl Branch {
    /// Does what the planner says until it says nothing more. One at a time: who comes meanwhile waits and then looks again.
    pub async fn compact(self: &Arc<Self>) -> Result<(), StorageError> {
        let branch = self.clone();
        let done = self.shared.background.run(async move { branch.compact_here().await }).await;
        self.or_stale(done).await
    }

    /// Starts [`Branch::compact`] if there is something to do and it is not running.
    pub(super) fn compact_in_background(self: &Arc<Self>) {
        if self.next_job().is_none() || self.compacting.try_lock().is_err() {
            return;
        }
        let branch = self.clone();
        tokio::spawn(async move {
            match branch.compact().await {
                Ok(()) | Err(StorageError::Stopping) => {}
                Err(error) => tracing::warn!(branch = %branch.name, %error, "compaction failed; will try again"),
            }
        });
    }

    async fn compact_here(self: &Arc<Self>) -> Result<(), StorageError> {
        let _alone = self.compacting.lock().await;
        while let Some((job, layers, metas)) = self.next_job() {
            // Nothing is made for a branch that is not ours any more.
            self.claim(&mut *self.flush.lock().await).await?;
            match job {
                Job::Merge { deltas, parts } => self.merge(&layers, &metas, &deltas, parts).await?,
                Job::Image { cell, lsn } => self.make_images(&layers, cell, lsn).await?,
            }
        }
        Ok(())
    }

    fn next_job(&self) -> Option<(Job, Arc<LayerSet>, Vec<LayerMeta>)> {
        let (layers, cuts, tip) = {
            let state = self.state.read();
            (state.layers.clone(), state.cuts.clone(), state.frozen_tip)
        };
        let metas = layers.metas();
        let limits = self.shared.tuning.plan;
        let job = next_job(&PlanInput { layers: &metas, cuts: &cuts, lsn: tip.last_record_lsn, limits })?;
        Some((job, layers, metas))
    }

    async fn merge(
        self: &Arc<Self>,
        layers: &LayerSet,
        metas: &[LayerMeta],
        deltas: &[usize],
        parts: Vec<MergePart>,
    ) -> Result<(), StorageError> {
        let by_name: HashMap<&str, &Arc<Layer>> =
            layers.iter().map(|layer| (layer.meta.name.as_str(), layer)).collect();
        let layer_of = |index: &usize| by_name.get(metas[*index].name.as_str()).map(|layer| Arc::clone(layer));
        let mut uploads = Uploads::new(self);
        let mut gone: Vec<usize> = deltas.to_vec();
        for part in parts {
            gone.extend(&part.carried);
            // Newest first: of equal positions the newer one counts.
            let mut inputs: Vec<Arc<Layer>> = deltas.iter().chain(&part.carried).filter_map(layer_of).collect();
            inputs.sort_by_key(|layer| std::cmp::Reverse(layer.meta.end_lsn));
            let merged = self.merge_part(&part, inputs, &mut uploads).await?;
            tracing::debug!(branch = %self.name, level = part.level, values = merged, "deltas merged");
        }
        let gone: Vec<&LayerMeta> = gone.iter().map(|index| &metas[*index]).collect();
        self.publish(&gone, uploads.finish().await?, &[]).await
    }

    /// One cell's files of a merge; answers how many values they hold.
    async fn merge_part(
        &self,
        part: &MergePart,
        inputs: Vec<Arc<Layer>>,
        uploads: &mut Uploads,
    ) -> Result<u64, StorageError> {
        let lsns = |of: fn(&LayerMeta) -> Lsn| inputs.iter().map(move |layer| of(&layer.meta));
        let start = lsns(|meta| meta.start_lsn).min().unwrap_or_default();
        let end = lsns(|meta| meta.end_lsn).max().unwrap_or_default();
        let shape = Shape { kind: LayerKind::Delta, level: part.level, lsns: (start, end) };
        let remote = &self.shared.remote;
        let mut entries = MergeStream::open(remote, inputs, part.cell.first, part.cell.last).await?;
        let mut builder = LayerBuilder::default();
        let mut values = 0;
        loop {
            // Short blocks are left behind seldom.
            let run = if builder.is_between_blocks() { 1 } else { BLOCKS_PER_SHORT_ONE };
            let next = match entries.next_block(remote, run).await? {
                Some(block) => Next::Block(block),
                None => match entries.next(remote).await? {
                    Some(entry) => Next::Entry(entry),
                    None => break,
                },
            };
            // All values of a key are in one file.
            let full = builder.bytes_so_far() >= self.shared.tuning.layer_bytes;
            if full && builder.last_key() != Some(next.first_key()) {
                uploads.add_delta(std::mem::take(&mut builder).finish(), shape).await?;
            }
            match next {
                Next::Block(block) => {
                    builder.add_block(&block);
                    values += block.block.len() as u64;
                }
                Next::Entry(Merged { key, lsn, value }) => {
                    builder.add_encoded(key, lsn, &value);
                    values += 1;
                }
            }
        }
        uploads.add_delta(builder.finish(), shape).await?;
        Ok(values)
    }

    pub(super) async fn make_images(
        self: &Arc<Self>,
        layers: &LayerSet,
        cell: Cell,
        lsn: Lsn,
    ) -> Result<(), StorageError> {
        let mut files = ImageFiles::new(self, cell, lsn);
        let mut sizes = RelSizes::default();
        for segment in layers.segments(cell.first, cell.last, Lsn(0), lsn) {
            self.image_segment(segment, &mut files, &mut sizes).await?;
        }
        let images = files.finish().await?;
        tracing::info!(branch = %self.name, %lsn, layers = images.len(), "image layers made");
        let metas: Vec<LayerMeta> = images.iter().map(|layer| layer.meta.clone()).collect();
        let all = self.state.read().layers.metas();
        let cuts = cuts_after_image(&metas, &all, &self.shared.tuning.plan);
        self.publish(&[], images, &cuts).await
    }

    async fn image_segment(
        self: &Arc<Self>,
        segment: Segment,
        files: &mut ImageFiles,
        sizes: &mut RelSizes,
    ) -> Result<(), StorageError> {
        let SearchPath { deltas, deltas_after, image } = segment.path;
        let remote = &self.shared.remote;
        let sources = image.into_iter().chain(deltas);
        let mut entries = MergeStream::open(remote, sources, segment.first, segment.last).await?;
        let mut batch: Vec<PageVersions> = Vec::new();
        while let Some(Merged { key, lsn, value }) = entries.next(remote).await? {
            // What deltas have up to the image is in the image, or hidden by it.
            if lsn > files.lsn || lsn < deltas_after || key.kind == Kind::CommitTime {
                continue;
            }
            let Some(value) = Value::decode(value) else {
                return Err(self.unmakeable(key, lsn, "an unknown value is stored".to_owned()));
            };
            if let Some(known) = batch.last_mut().filter(|known| known.key == key) {
                known.add(lsn, value);
                continue;
            }
            if batch.len() >= PAGES_PER_BATCH {
                self.store_images(&mut batch, files).await?;
            }
            if self.is_in_images(key, files.lsn, sizes).await? {
                batch.push(PageVersions::of(key));
                batch.last_mut().into_iter().for_each(|known| known.add(lsn, value.clone()));
            }
        }
        self.store_images(&mut batch, files).await
    }

    /// A block past its fork's end is never read, and gets new content before it can be.
    async fn is_in_images(self: &Arc<Self>, key: Key, lsn: Lsn, sizes: &mut RelSizes) -> Result<bool, StorageError> {
        let (Kind::RelPage, Some(rel)) = (key.kind, key.rel_tag()) else { return Ok(true) };
        if sizes.rel != Some(rel) {
            *sizes = RelSizes { blocks: self.rel_size(rel, lsn).await?.unwrap_or(0), rel: Some(rel) };
        }
        Ok(key.block < sizes.blocks)
    }

    async fn store_images(
        self: &Arc<Self>,
        batch: &mut Vec<PageVersions>,
        files: &mut ImageFiles,
    ) -> Result<(), StorageError> {
        let lsn = files.lsn;
        let inherited: Vec<Key> = batch.iter().filter(|page| page.initial.is_none()).map(|page| page.key).collect();
        let mut bases = Vec::new();
        if let Some(first) = inherited.first() {
            bases = match self.ancestor_ready().await? {
                Some((ancestor, at)) => ancestor.read_pages(&inherited, at.min(lsn)).await?,
                None => return Err(self.unmakeable(*first, lsn, "nothing is stored to start from".to_owned())),
            };
        }
        let mut bases = bases.into_iter();
        for PageVersions { key, initial, records } in batch.drain(..) {
            let value = match initial.or_else(|| bases.next().map(|page| Initial::Value(Value::Image(page)))) {
                Some(Initial::Value(value)) if records.is_empty() => value,
                Some(Initial::Value(Value::Image(page))) if !page.is_empty() => {
                    self.replay_image(key, lsn, page, records).await?
                }
                Some(Initial::Record | Initial::Value(Value::Image(_))) => {
                    self.replay_image(key, lsn, zero_page(), records).await?
                }
                Some(Initial::Value(_)) | None => {
                    return Err(self.unmakeable(key, lsn, "records follow a page's removal".to_owned()));
                }
            };
            // Without an ancestor nothing can come back that a tombstone would have to hide.
            if value != Value::Tombstone || self.ancestor().is_some() {
                files.add(key, &compact_page(key, value)).await?;
            }
        }
        Ok(())
    }

    async fn replay_image(
        &self,
        key: Key,
        lsn: Lsn,
        base: Bytes,
        records: Vec<(Lsn, StoredRecord)>,
    ) -> Result<Value, StorageError> {
        let made = redo::replay(key, base, records).await;
        Ok(Value::Image(made.map_err(|reason| self.unmakeable(key, lsn, reason))?))
    }

    /// Puts new layers in place of old ones, in memory and in the manifest.
    async fn publish(
        self: &Arc<Self>,
        gone: &[&LayerMeta],
        new: Vec<Arc<Layer>>,
        cuts: &[Key],
    ) -> Result<(), StorageError> {
        let mut flush = self.flush.lock().await;
        self.claim(&mut flush).await?;
        if !cuts.is_empty() {
            let mut state = self.state.write();
            let mut all = state.cuts.to_vec();
            all.extend_from_slice(cuts);
            all.sort_unstable();
            all.dedup();
            state.cuts = all.into();
        }
        self.replace_layers(&mut flush, gone, new).await?;
        self.check_not_deposed(&flush).await?;
        self.remove_doomed(&mut flush).await
    }
}

/// A page of zeroes is stored as an empty image.
fn compact_page(key: Key, value: Value) -> Value {
    match value {
        Value::Image(page) if key.kind == Kind::RelPage && page == zero_page() => Value::ZERO_PAGE,
        other => other,
    }
}

/// The size of the fork that was asked for last: keys come fork by fork.
#[derive(Default)]
struct RelSizes {
    rel: Option<RelTag>,
    blocks: BlockNumber,
}

/// The newest state of a key: what needs no older value, and the records after it.
struct PageVersions {
    key: Key,
    initial: Option<Initial>,
    records: Vec<(Lsn, StoredRecord)>,
}

enum Initial {
    /// The first record makes the page from nothing.
    Record,
    Value(Value),
}

impl PageVersions {
    fn of(key: Key) -> PageVersions {
        PageVersions { key, initial: None, records: Vec::new() }
    }

    fn add(&mut self, lsn: Lsn, value: Value) {
        if value.is_initial() {
            self.records.clear();
            self.initial = Some(Initial::Record);
        }
        match value {
            Value::Tombstone | Value::Image(_) => self.initial = Some(Initial::Value(value)),
            Value::Record(record) => self.records.push((lsn, record)),
        }
    }
}

/// What the files of a job have in common.
#[derive(Clone, Copy)]
struct Shape {
    kind: LayerKind,
    level: u8,
    lsns: (Lsn, Lsn),
}

/// What comes next in a merge.
enum Next {
    /// Nothing else is among its entries: it is taken as it is stored.
    Block(StoredBlock),
    Entry(Merged),
}

impl Next {
    fn first_key(&self) -> Key {
        match self {
            Next::Block(block) => block.handle.first.0,
            Next::Entry(entry) => entry.key,
        }
    }
}

/// Layers on their way to the object store, a few at a time.
struct Uploads {
    branch: Arc<Branch>,
    running: JoinSet<Result<Arc<Layer>, StorageError>>,
    done: Vec<Arc<Layer>>,
}

impl Uploads {
    fn new(branch: &Arc<Branch>) -> Uploads {
        Uploads { branch: branch.clone(), running: JoinSet::new(), done: Vec::new() }
    }

    async fn add_delta(&mut self, built: BuiltLayer, shape: Shape) -> Result<(), StorageError> {
        match built.keys {
            Some(keys) => self.add(built, shape, keys).await,
            None => Ok(()),
        }
    }

    async fn add(&mut self, built: BuiltLayer, shape: Shape, keys: (Key, Key)) -> Result<(), StorageError> {
        while self.running.len() >= CONCURRENT_UPLOADS {
            self.join_one().await?;
        }
        let branch = self.branch.clone();
        let upload = async move { branch.upload_layer(built, (shape.kind, shape.level), shape.lsns, keys).await };
        self.running.spawn(upload);
        Ok(())
    }

    async fn join_one(&mut self) -> Result<(), StorageError> {
        if let Some(joined) = self.running.join_next().await {
            self.done.push(joined.map_err(|_| StorageError::Stopping)??);
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<Vec<Arc<Layer>>, StorageError> {
        while !self.running.is_empty() {
            self.join_one().await?;
        }
        self.done.sort_by_key(|layer| layer.meta.first_key);
        Ok(self.done)
    }
}

/// Image layers that together speak for all keys of a cell.
pub(super) struct ImageFiles {
    uploads: Uploads,
    builder: LayerBuilder,
    /// The first key that no finished file speaks for.
    next_key: Key,
    last: Key,
    lsn: Lsn,
    file_bytes: usize,
}

impl ImageFiles {
    pub(super) fn new(branch: &Arc<Branch>, cell: Cell, lsn: Lsn) -> ImageFiles {
        ImageFiles {
            uploads: Uploads::new(branch),
            builder: LayerBuilder::default(),
            next_key: cell.first,
            last: cell.last,
            lsn,
            file_bytes: branch.shared.tuning.layer_bytes,
        }
    }

    fn shape(&self) -> Shape {
        Shape { kind: LayerKind::Image, level: 0, lsns: (self.lsn, self.lsn) }
    }

    pub(super) async fn add(&mut self, key: Key, value: &Value) -> Result<(), StorageError> {
        if self.builder.bytes_so_far() >= self.file_bytes
            && let Some(end) = key.previous()
        {
            let full = std::mem::take(&mut self.builder).finish();
            self.uploads.add(full, self.shape(), (self.next_key, end)).await?;
            self.next_key = key;
        }
        self.builder.add(key, self.lsn, value);
        Ok(())
    }

    pub(super) async fn finish(mut self) -> Result<Vec<Arc<Layer>>, StorageError> {
        let rest = std::mem::take(&mut self.builder).finish();
        let shape = self.shape();
        self.uploads.add(rest, shape, (self.next_key, self.last)).await?;
        self.uploads.finish().await
    }
}
