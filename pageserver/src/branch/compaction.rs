//! Image sets, so that chains of records stay short and searches open few layers.

use std::{collections::BTreeSet, sync::Arc};

use types::{BlockNumber, Lsn, RelTag};

use super::{Branch, flush::FlushState};
use crate::{
    error::StorageError,
    layer::{Layer, LayerBuilder, LayerKind, LayerSet},
    storage::{Key, Kind, Value},
};

/// What is known of a branch's layers when it is decided whether to make an image set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompactionInput {
    /// Delta layers since the newest image set.
    pub deltas: usize,
    /// Their size.
    pub delta_bytes: u64,
    /// Size of the newest image set.
    pub image_bytes: u64,
    /// How many deltas call for an image set.
    pub deltas_per_image: usize,
}

/// True when it is time: enough deltas, and either much new data beside the last image set or very many deltas. Pure.
pub fn should_compact(input: &CompactionInput) -> bool {
    let enough = input.deltas >= input.deltas_per_image;
    let worth_it = input.delta_bytes >= input.image_bytes / 3;
    enough && (worth_it || input.deltas >= 8 * input.deltas_per_image)
}

impl Branch {
    pub(super) fn compaction_input(&self, at: Lsn) -> CompactionInput {
        let layers = self.state.read().layers.clone();
        let image = layers.newest_image(at);
        let since = image.unwrap_or(Lsn(0));
        let size = |layer: &Arc<Layer>| layer.meta.size_bytes;
        CompactionInput {
            deltas: layers.deltas_after(since).count(),
            delta_bytes: layers.deltas_after(since).map(size).sum(),
            image_bytes: image.map_or(0, |lsn| layers.images_at(lsn).map(size).sum()),
            deltas_per_image: self.shared.tuning.deltas_per_image,
        }
    }

    /// Uploads an image set as of `at`: every key the branch itself has changed. One layer file at a time is in memory.
    pub(super) async fn make_images(
        self: &Arc<Self>,
        flush: &mut FlushState,
        at: Lsn,
    ) -> Result<Vec<Arc<Layer>>, StorageError> {
        let layers = self.state.read().layers.clone();
        let mut keys = KeyMerge::new(&layers, at);
        let mut images = Vec::new();
        let mut builder = LayerBuilder::default();
        let mut size_of: Option<(RelTag, Option<BlockNumber>)> = None;
        while let Some(key) = keys.next(self).await? {
            let Some(value) = self.image_of(key, at, &mut size_of).await? else { continue };
            builder.add(key, at, &value);
            if builder.bytes_so_far() >= self.shared.tuning.image_layer_bytes {
                let full = std::mem::take(&mut builder);
                images.extend(self.upload_image(flush, full, at).await?);
            }
        }
        images.extend(self.upload_image(flush, builder, at).await?);
        tracing::info!(branch = %self.name, lsn = %at, layers = images.len(), "image layers made");
        Ok(images)
    }

    async fn upload_image(
        &self,
        flush: &mut FlushState,
        builder: LayerBuilder,
        at: Lsn,
    ) -> Result<Option<Arc<Layer>>, StorageError> {
        let Some(built) = builder.finish() else { return Ok(None) };
        Ok(Some(self.upload_layer(flush, built, LayerKind::Image, at, at).await?))
    }

    /// What the key is as of `at`; `None` when it needs no value in an image set.
    async fn image_of(
        self: &Arc<Self>,
        key: Key,
        at: Lsn,
        size_of: &mut Option<(RelTag, Option<BlockNumber>)>,
    ) -> Result<Option<Value>, StorageError> {
        match key.kind {
            Kind::CommitTime => Ok(None),
            Kind::RelPage => {
                let Some(rel) = key.rel_tag() else { return Ok(None) };
                let size = match size_of {
                    Some((known, size)) if *known == rel => *size,
                    _ => size_of.insert((rel, self.rel_size(rel, at).await?)).1,
                };
                // A block past the end is never read, and gets new content before it can be.
                if size.is_none_or(|size| key.block >= size) {
                    return Ok(None);
                }
                Ok(Some(Value::Image(self.read_page(key, at).await?)))
            }
            Kind::SlruPage => match self.newest(key, at).await? {
                Value::Tombstone => Ok(Some(Value::Tombstone)),
                Value::Image(_) | Value::Record(_) => Ok(Some(Value::Image(self.read_page(key, at).await?))),
            },
            Kind::ControlFile
            | Kind::CheckPoint
            | Kind::RelationMap
            | Kind::Database
            | Kind::Tablespace
            | Kind::TwoPhase
            | Kind::AuxFile
            | Kind::RelSize => Ok(Some(self.read_value(key, at).await?.map_or(Value::Tombstone, Value::Image))),
        }
    }

    /// The newest value of a key as of `at`, ancestors not included.
    async fn newest(self: &Arc<Self>, key: Key, at: Lsn) -> Result<Value, StorageError> {
        Ok(self.scan(key, key, at).await?.remove(&key).unwrap_or(Value::Tombstone))
    }
}

/// The keys of a branch's layers since the last image set (included), ascending, each once. Holds one block's keys of
/// each layer.
struct KeyMerge {
    sources: Vec<KeySource>,
}

struct KeySource {
    layer: Arc<Layer>,
    next_block: usize,
    /// Ascending; the next one last.
    waiting: Vec<Key>,
}

impl KeyMerge {
    fn new(layers: &LayerSet, at: Lsn) -> KeyMerge {
        let image = layers.newest_image(at);
        let deltas = layers.deltas_after(image.unwrap_or(Lsn(0)));
        let images = image.into_iter().flat_map(|lsn| layers.images_at(lsn));
        let source = |layer: &Arc<Layer>| KeySource { layer: layer.clone(), next_block: 0, waiting: Vec::new() };
        KeyMerge { sources: deltas.chain(images).map(source).collect() }
    }

    async fn next(&mut self, branch: &Branch) -> Result<Option<Key>, StorageError> {
        let mut heads = BTreeSet::new();
        for source in &mut self.sources {
            if source.waiting.is_empty()
                && let Some(mut keys) = source.layer.keys_of_block(&branch.shared.remote, source.next_block).await?
            {
                keys.reverse();
                source.waiting = keys;
                source.next_block += 1;
            }
            heads.extend(source.waiting.last());
        }
        let Some(smallest) = heads.into_iter().next() else { return Ok(None) };
        for source in &mut self.sources {
            source.skip(smallest, branch).await?;
        }
        Ok(Some(smallest))
    }
}

impl KeySource {
    /// Goes past a key, which may go on in the next block.
    async fn skip(&mut self, key: Key, branch: &Branch) -> Result<(), StorageError> {
        while self.waiting.last() == Some(&key) {
            self.waiting.pop();
            if self.waiting.is_empty()
                && let Some(mut keys) = self.layer.keys_of_block(&branch.shared.remote, self.next_block).await?
            {
                keys.reverse();
                self.waiting = keys;
                self.next_block += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_set_is_made_when_it_is_worth_it() {
        let input = |deltas, delta_bytes, image_bytes| CompactionInput {
            deltas,
            delta_bytes,
            image_bytes,
            deltas_per_image: 8,
        };
        assert!(!should_compact(&input(7, 1000, 0)));
        assert!(should_compact(&input(8, 1000, 0)));
        assert!(!should_compact(&input(8, 100, 1000)));
        assert!(should_compact(&input(8, 400, 1000)));
        assert!(should_compact(&input(64, 1, 1000)));
    }
}
