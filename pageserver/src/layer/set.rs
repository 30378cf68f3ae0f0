//! A branch's layers, and which of them a search has to open. Pure.

use std::sync::Arc;

use types::Lsn;

use super::{Layer, LayerKind, LayerMeta};
use crate::storage::Key;

/// All layers of a branch.
#[derive(Clone, Default)]
pub struct LayerSet {
    /// By ascending end.
    deltas: Vec<Arc<Layer>>,
    /// By ascending LSN.
    images: Vec<Arc<Layer>>,
}

/// The layers to look into, in this order.
pub struct SearchPath {
    /// Newest first.
    pub layers: Vec<Arc<Layer>>,
    /// An image set was reached: what is not found in `layers` the branch itself does not have.
    pub ends_in_image: bool,
}

impl LayerSet {
    /// From a manifest's layers.
    pub fn new(layers: impl IntoIterator<Item = Arc<Layer>>) -> LayerSet {
        let (mut deltas, mut images): (Vec<_>, Vec<_>) =
            layers.into_iter().partition(|layer: &Arc<Layer>| layer.meta.kind == LayerKind::Delta);
        deltas.sort_by_key(|layer| layer.meta.end_lsn);
        images.sort_by_key(|layer| layer.meta.end_lsn);
        LayerSet { deltas, images }
    }

    /// The same with some more.
    pub fn with(&self, more: impl IntoIterator<Item = Arc<Layer>>) -> LayerSet {
        LayerSet::new(self.iter().cloned().chain(more))
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Layer>> {
        self.deltas.iter().chain(&self.images)
    }

    /// What a manifest says about them.
    pub fn metas(&self) -> Vec<LayerMeta> {
        self.iter().map(|layer| layer.meta.clone()).collect()
    }

    /// LSN of the newest image set at or before `at`.
    pub fn newest_image(&self, at: Lsn) -> Option<Lsn> {
        self.images.iter().rev().map(|layer| layer.meta.end_lsn).find(|lsn| *lsn <= at)
    }

    /// Deltas with something after `lsn`.
    pub fn deltas_after(&self, lsn: Lsn) -> impl Iterator<Item = &Arc<Layer>> {
        self.deltas.iter().filter(move |layer| layer.meta.end_lsn > lsn)
    }

    /// The image layers as of exactly `lsn`.
    pub fn images_at(&self, lsn: Lsn) -> impl Iterator<Item = &Arc<Layer>> {
        self.images.iter().filter(move |layer| layer.meta.end_lsn == lsn)
    }

    /// Where the values of the keys `first..=last` in `(after, at]` are, back to the newest image set.
    pub fn search(&self, first: Key, last: Key, after: Lsn, at: Lsn) -> SearchPath {
        let image = self.newest_image(at).filter(|lsn| *lsn > after);
        let after = image.unwrap_or(after);
        let overlaps = |meta: &LayerMeta| meta.first_key <= last && meta.last_key >= first;
        let wanted = |meta: &LayerMeta| meta.end_lsn > after && meta.start_lsn < at && overlaps(meta);
        let mut layers: Vec<_> = self.deltas.iter().rev().filter(|layer| wanted(&layer.meta)).cloned().collect();
        if let Some(lsn) = image {
            layers.extend(self.images_at(lsn).filter(|layer| overlaps(&layer.meta)).cloned());
        }
        SearchPath { layers, ends_in_image: image.is_some() }
    }
}
