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
    /// By ascending LSN; those of the same by ascending keys.
    images: Vec<(Lsn, Vec<Arc<Layer>>)>,
}

/// Where to look, in this order.
pub struct SearchPath {
    /// Newest first.
    pub deltas: Vec<Arc<Layer>>,
    /// Only what the deltas have after this counts: what is older is in the image already. (A delta may begin before an
    /// image and end behind it: a database copy stores values ahead of its record, and deltas are merged.)
    pub deltas_after: Lsn,
    /// The newest one that speaks for the key.
    pub image: Option<Arc<Layer>>,
}

impl SearchPath {
    /// The layers in order, with the position after which each counts.
    pub fn layers(&self, after: Lsn) -> impl Iterator<Item = (&Arc<Layer>, Lsn)> {
        let deltas = self.deltas.iter().map(|layer| (layer, self.deltas_after));
        deltas.chain(self.image.iter().map(move |layer| (layer, after)))
    }

    fn is_same(&self, other: &SearchPath) -> bool {
        let layers = |path: &SearchPath| path.deltas.iter().chain(&path.image).map(Arc::as_ptr).collect::<Vec<_>>();
        self.deltas_after == other.deltas_after && layers(self) == layers(other)
    }
}

/// Keys that have the same search path, both ends included.
pub struct Segment {
    /// The first key.
    pub first: Key,
    /// The last key.
    pub last: Key,
    /// Where to look.
    pub path: SearchPath,
}

impl LayerSet {
    /// From a manifest's layers.
    pub fn new(layers: impl IntoIterator<Item = Arc<Layer>>) -> LayerSet {
        let (mut deltas, mut all_images): (Vec<_>, Vec<_>) =
            layers.into_iter().partition(|layer: &Arc<Layer>| layer.meta.kind == LayerKind::Delta);
        deltas.sort_by_key(|layer| layer.meta.end_lsn);
        all_images.sort_by_key(|layer| (layer.meta.end_lsn, layer.meta.first_key));
        let mut images: Vec<(Lsn, Vec<Arc<Layer>>)> = Vec::new();
        for image in all_images {
            match images.last_mut() {
                Some((lsn, group)) if *lsn == image.meta.end_lsn => group.push(image),
                _other => images.push((image.meta.end_lsn, vec![image])),
            }
        }
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
        self.deltas.iter().chain(self.images.iter().flat_map(|(_, group)| group))
    }

    /// What a manifest says about them.
    pub fn metas(&self) -> Vec<LayerMeta> {
        self.iter().map(|layer| layer.meta.clone()).collect()
    }

    /// Where the values of `key` in `(after, at]` are, back to the newest image.
    pub fn search(&self, key: Key, after: Lsn, at: Lsn) -> SearchPath {
        let image = self.newest_image(key, at).filter(|image| image.meta.end_lsn > after).cloned();
        let after = image.as_ref().map_or(after, |image| image.meta.end_lsn);
        let newest_first = self.deltas.iter().rev().take_while(|layer| layer.meta.end_lsn > after);
        let wanted = newest_first.filter(|layer| layer.meta.start_lsn < at && layer.meta.covers(&key));
        SearchPath { deltas: wanted.cloned().collect(), deltas_after: after, image }
    }

    /// The keys `first..=last` divided into ranges that have the same search path.
    pub fn segments(&self, first: Key, last: Key, after: Lsn, at: Lsn) -> Vec<Segment> {
        let counts = |layer: &&Arc<Layer>| layer.meta.start_lsn <= at && layer.meta.end_lsn > after;
        let overlapping = self.iter().filter(counts).filter(|l| l.meta.first_key <= last && l.meta.last_key >= first);
        let edges = overlapping.flat_map(|layer| [Some(layer.meta.first_key), layer.meta.last_key.next()]);
        let mut starts: Vec<Key> = edges.flatten().filter(|key| *key > first && *key <= last).collect();
        starts.push(first);
        starts.sort_unstable();
        starts.dedup();
        let ends = starts.iter().skip(1).filter_map(Key::previous).chain([last]).collect::<Vec<_>>();
        let mut segments: Vec<Segment> = Vec::new();
        for (first, last) in starts.into_iter().zip(ends) {
            let path = self.search(first, after, at);
            match segments.last_mut() {
                Some(before) if before.path.is_same(&path) => before.last = last,
                _other => segments.push(Segment { first, last, path }),
            }
        }
        segments
    }

    fn newest_image(&self, key: Key, at: Lsn) -> Option<&Arc<Layer>> {
        let groups = self.images.iter().rev().skip_while(|(lsn, _)| *lsn > at);
        groups.filter_map(|(_, group)| over_key(group, key)).next()
    }
}

/// Of layers that don't overlap, by ascending keys, the one that speaks for the key.
fn over_key(layers: &[Arc<Layer>], key: Key) -> Option<&Arc<Layer>> {
    let before = layers.partition_point(|layer| layer.meta.first_key <= key).checked_sub(1)?;
    Some(&layers[before]).filter(|layer| layer.meta.covers(&key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::path::Path;

    fn key(block: u32) -> Key {
        Key { block, ..Key::of(crate::storage::Kind::RelPage) }
    }

    fn layer(kind: LayerKind, (first, last): (u32, u32), (start, end): (u64, u64)) -> Arc<Layer> {
        let meta = LayerMeta {
            name: format!("{start}-{end}"),
            kind,
            level: 0,
            first_key: key(first),
            last_key: key(last),
            start_lsn: Lsn(start),
            end_lsn: Lsn(end),
            size_bytes: 1,
            index_offset: 0,
            entries: 1,
        };
        Layer::new(meta, Path::from("x"))
    }

    fn ends(path: &SearchPath) -> (Vec<u64>, u64, Option<u64>) {
        let deltas = path.deltas.iter().map(|layer| layer.meta.end_lsn.0).collect();
        (deltas, path.deltas_after.0, path.image.as_ref().map(|image| image.meta.end_lsn.0))
    }

    #[test]
    fn a_search_ends_at_the_newest_image_that_is_not_too_new() {
        let deltas = [(0, 10), (10, 20), (20, 35), (30, 40)].map(|lsns| layer(LayerKind::Delta, (0, 9), lsns));
        let images = [10, 30].map(|lsn| layer(LayerKind::Image, (0, 9), (lsn, lsn)));
        let set = LayerSet::new(deltas.into_iter().chain(images));
        let search = |after, at| ends(&set.search(key(5), Lsn(after), Lsn(at)));
        assert_eq!(search(0, 25), (vec![35, 20], 10, Some(10)));
        assert_eq!(search(12, 25), (vec![35, 20], 12, None));
        assert_eq!(search(0, 9), (vec![10], 0, None));
        // The third delta begins before the image: what it has up to there must not be taken for newer.
        assert_eq!(search(0, 40), (vec![40, 35], 30, Some(30)));
    }

    #[test]
    fn keys_with_the_same_path_are_one_segment() {
        let set = LayerSet::new([
            layer(LayerKind::Delta, (0, 9), (0, 10)),
            layer(LayerKind::Image, (0, 3), (10, 10)),
            layer(LayerKind::Image, (4, 9), (8, 8)),
            layer(LayerKind::Delta, (6, 7), (10, 20)),
        ]);
        let segments = set.segments(key(1), key(20), Lsn(0), Lsn(30));
        let seen: Vec<_> = segments.iter().map(|s| (s.first.block, s.last.block, ends(&s.path))).collect();
        let expected = vec![
            (1, 3, (vec![], 10, Some(10))),
            (4, 5, (vec![10], 8, Some(8))),
            (6, 7, (vec![20, 10], 8, Some(8))),
            (8, 9, (vec![10], 8, Some(8))),
            (10, 20, (vec![], 0, None)),
        ];
        assert_eq!(seen, expected);
    }
}
