//! A branch's layers, and which of them a search has to open. Pure.

use std::{collections::HashSet, sync::Arc};

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

/// Where to look, in this order.
pub struct SearchPath {
    /// Newest first.
    pub deltas: Vec<Arc<Layer>>,
    /// Only what the deltas have after this counts: what is older is in the image set already. (A delta may begin before
    /// an image set and end behind it: a database copy stores values ahead of its record.)
    pub deltas_after: Lsn,
    /// Of one image set.
    pub images: Vec<Arc<Layer>>,
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

    /// The same without those of these names.
    pub fn without(&self, names: &HashSet<&str>) -> LayerSet {
        LayerSet::new(self.iter().filter(|layer| !names.contains(layer.meta.name.as_str())).cloned())
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
        let deltas = self.deltas.iter().rev().filter(|layer| wanted(&layer.meta)).cloned().collect();
        let of_image = image.into_iter().flat_map(|lsn| self.images_at(lsn));
        let images = of_image.filter(|layer| overlaps(&layer.meta)).cloned().collect();
        SearchPath { deltas, deltas_after: after, images }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::path::Path;

    fn layer(kind: LayerKind, start: u64, end: u64) -> Arc<Layer> {
        let meta = LayerMeta {
            name: format!("{start}-{end}"),
            kind,
            level: 0,
            first_key: Key::MIN,
            last_key: Key::MAX,
            start_lsn: Lsn(start),
            end_lsn: Lsn(end),
            size_bytes: 1,
            index_offset: 0,
            entries: 1,
        };
        Layer::new(meta, Path::from("x"))
    }

    fn ends(layers: &[Arc<Layer>]) -> Vec<u64> {
        layers.iter().map(|layer| layer.meta.end_lsn.0).collect()
    }

    #[test]
    fn a_search_ends_at_the_newest_image_set_that_is_not_too_new() {
        let deltas = [(0, 10), (10, 20), (20, 35), (30, 40)].map(|(start, end)| layer(LayerKind::Delta, start, end));
        let images = [10, 30].map(|lsn| layer(LayerKind::Image, lsn, lsn));
        let set = LayerSet::new(deltas.into_iter().chain(images));
        let search = |after, at| {
            let path = set.search(Key::MIN, Key::MAX, Lsn(after), Lsn(at));
            (ends(&path.deltas), path.deltas_after.0, ends(&path.images))
        };
        assert_eq!(search(0, 25), (vec![35, 20], 10, vec![10]));
        assert_eq!(search(12, 25), (vec![35, 20], 12, vec![]));
        assert_eq!(search(0, 9), (vec![10], 0, vec![]));
        // The third delta begins before the image set: what it has up to there must not be taken for newer.
        assert_eq!(search(0, 40), (vec![40, 35], 30, vec![30]));
    }
}
