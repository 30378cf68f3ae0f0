//! Which layers of a branch no read can need any more. Pure.
//!
//! A read of a key as of `r` looks at the newest image layer over the key at or before `r`, and at the deltas with
//! something behind that image and at or before `r`. A layer may go when no *allowed* read looks at it. Allowed are all
//! positions from the cutoff on, and single ones before it: where children left the branch, and leases.

use types::Lsn;

use super::plan::cells;
use crate::{
    layer::{LayerKind, LayerMeta},
    storage::Key,
};

/// What garbage collection of one branch has to know.
#[derive(Clone, Copy, Debug)]
pub struct GcInput<'a> {
    /// All layers of the branch.
    pub layers: &'a [LayerMeta],
    /// Every position from here on stays readable. At most the end of what is in layers.
    pub cutoff_lsn: Lsn,
    /// Where children left the branch. Those before the cutoff stay readable, at exactly these positions.
    pub child_lsns: &'a [Lsn],
    /// Positions that somebody has asked to keep readable for a time, at exactly these.
    pub leases: &'a [Lsn],
}

/// The indexes, ascending, of layers that may go, all of them at once. What this gives stays right when only some of
/// them go, and when later images come.
pub fn garbage(input: &GcInput<'_>) -> Vec<usize> {
    let mut points: Vec<Lsn> = input.child_lsns.iter().chain(input.leases).copied().collect();
    points.push(input.cutoff_lsn);
    points.sort_unstable();
    let mut images: Vec<&LayerMeta> = input.layers.iter().filter(|layer| layer.kind == LayerKind::Image).collect();
    images.sort_unstable_by_key(|image| image.first_key);
    let dispensable = |layer: &LayerMeta| {
        let Some(at) = first_read(layer, input.cutoff_lsn, &points) else { return false };
        // Of an image, another one must be newer: it does not stand in for itself.
        let from = if layer.kind == LayerKind::Image { Lsn(layer.end_lsn.0 + 1) } else { layer.end_lsn };
        let standing_in = images.iter().filter(|image| image.end_lsn >= from && image.end_lsn <= at);
        cover(standing_in.copied(), layer.first_key, layer.last_key)
    };
    (0..input.layers.len()).filter(|index| dispensable(&input.layers[*index])).collect()
}

/// Images for the sake of garbage collection must let go of at least so much.
const LEAST_FREED_BYTES: u64 = 1 << 20;

/// True when images of all cells as of the cutoff would let go of at least as much as the newest images take: a measure of
/// what the new ones will take.
pub fn images_pay(input: &GcInput<'_>, cuts: &[Key]) -> bool {
    let bytes_of = |layers: &[LayerMeta], indexes: Vec<usize>| -> u64 {
        indexes.into_iter().map(|index| layers[index].size_bytes).sum()
    };
    let images = cells(cuts).map(|cell| LayerMeta {
        name: String::new(),
        kind: LayerKind::Image,
        level: 0,
        first_key: cell.first,
        last_key: cell.last,
        start_lsn: input.cutoff_lsn,
        end_lsn: input.cutoff_lsn,
        size_bytes: 0,
        index_offset: 0,
        entries: 0,
    });
    let with_images: Vec<LayerMeta> = input.layers.iter().cloned().chain(images).collect();
    let then = bytes_of(&with_images, garbage(&GcInput { layers: &with_images, ..*input }));
    let freed = then.saturating_sub(bytes_of(input.layers, garbage(input)));
    let newest = input.layers.iter().filter(|layer| layer.kind == LayerKind::Image).map(|image| image.end_lsn).max();
    let taken: u64 = input
        .layers
        .iter()
        .filter(|layer| Some(layer.end_lsn) == newest && layer.kind == LayerKind::Image)
        .map(|image| image.size_bytes)
        .sum();
    freed >= LEAST_FREED_BYTES.max(taken)
}

/// The first allowed position as of which a read would look at the layer, if nothing newer stood in for it. `None` when
/// positions right behind its start are allowed, so that it has to stay. Where something stands in for it at the first
/// such position, it does at all later ones too.
fn first_read(layer: &LayerMeta, cutoff: Lsn, points: &[Lsn]) -> Option<Lsn> {
    let (first_point, in_window) = match layer.kind {
        LayerKind::Delta => (points.partition_point(|point| *point <= layer.start_lsn), cutoff <= layer.start_lsn),
        LayerKind::Image => (points.partition_point(|point| *point < layer.end_lsn), cutoff < layer.end_lsn),
    };
    points.get(first_point).copied().filter(|_| !in_window)
}

/// True when the layers' ranges, given by ascending first key, leave no key of `first..=last` out.
pub(super) fn cover<'a>(layers: impl Iterator<Item = &'a LayerMeta>, first: Key, last: Key) -> bool {
    let mut next = first;
    for layer in layers {
        if layer.first_key > next {
            return false;
        }
        if layer.last_key >= last {
            return true;
        }
        if layer.last_key >= next {
            let Some(behind) = layer.last_key.next() else { return true };
            next = behind;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Kind;
    use proptest::prelude::*;

    const KEYS: u32 = 8;
    const POSITIONS: u64 = 24;

    fn key(block: u32) -> Key {
        Key { block, ..Key::of(Kind::RelPage) }
    }

    fn layer(kind: LayerKind, keys: (u32, u32), lsns: (u64, u64)) -> LayerMeta {
        LayerMeta {
            name: format!("{kind:?} {keys:?} {lsns:?}"),
            kind,
            level: 0,
            first_key: key(keys.0),
            last_key: key(keys.1),
            start_lsn: Lsn(lsns.0),
            end_lsn: Lsn(lsns.1),
            size_bytes: 1,
            index_offset: 0,
            entries: 1,
        }
    }

    fn delta(keys: (u32, u32), lsns: (u64, u64)) -> LayerMeta {
        layer(LayerKind::Delta, keys, lsns)
    }

    fn image(keys: (u32, u32), lsn: u64) -> LayerMeta {
        layer(LayerKind::Image, keys, (lsn, lsn))
    }

    fn collect(layers: &[LayerMeta], cutoff: u64, children: &[u64], leases: &[u64]) -> Vec<usize> {
        let lsns = |from: &[u64]| from.iter().copied().map(Lsn).collect::<Vec<_>>();
        let (children, leases) = (lsns(children), lsns(leases));
        garbage(&GcInput { layers, cutoff_lsn: Lsn(cutoff), child_lsns: &children, leases: &leases })
    }

    #[test]
    fn what_an_image_before_the_cutoff_stands_in_for_may_go() {
        let layers = [image((0, 7), 4), delta((0, 7), (4, 8)), image((0, 7), 8), delta((0, 7), (8, 12))];
        assert_eq!(collect(&layers, 7, &[], &[]), Vec::<usize>::new());
        assert_eq!(collect(&layers, 8, &[], &[]), vec![0, 1]);
        assert_eq!(collect(&layers, 12, &[], &[]), vec![0, 1]);
    }

    #[test]
    fn children_and_leases_keep_just_what_they_read() {
        let layers = [image((0, 7), 4), delta((0, 7), (4, 8)), image((0, 7), 8), delta((0, 7), (8, 12))];
        assert_eq!(collect(&layers, 12, &[6], &[]), Vec::<usize>::new());
        assert_eq!(collect(&layers, 12, &[], &[4]), vec![1]);
        assert_eq!(collect(&layers, 12, &[3], &[]), vec![0, 1], "nothing was there before the first image");
        assert_eq!(collect(&layers, 12, &[8], &[9]), vec![0, 1]);
    }

    #[test]
    fn images_are_made_for_garbage_that_is_worth_it() {
        let sized = |layer: LayerMeta, size_bytes| LayerMeta { size_bytes, ..layer };
        let pays = |layers: &[LayerMeta], cutoff, children: &[Lsn]| {
            let input = GcInput { layers, cutoff_lsn: Lsn(cutoff), child_lsns: children, leases: &[] };
            images_pay(&input, &[key(4)])
        };
        let all = (0, 7);
        let deltas = [(0, 8), (8, 16)].map(|lsns| sized(delta(all, lsns), 700_000));
        assert!(pays(&deltas, 16, &[]), "both go");
        assert!(!pays(&deltas, 15, &[]), "only one would");
        assert!(!pays(&deltas, 16, &[Lsn(8)]), "a child keeps it");
        let with_image = [&deltas[..], &[sized(image(all, 4), 2_000_000)]].concat();
        assert!(pays(&with_image, 16, &[]), "the old image goes too");
        let beyond = [&deltas[..], &[sized(image(all, 20), 2_000_000)]].concat();
        assert!(!pays(&beyond, 16, &[]), "new images would take more than they let go");
    }

    #[test]
    fn images_of_parts_stand_in_together_or_not_at_all() {
        let parts = [image((0, 3), 10), image((4, 7), 11), delta((0, 7), (0, 8))];
        assert_eq!(collect(&parts, 11, &[], &[]), vec![2]);
        assert_eq!(collect(&parts, 10, &[], &[]), Vec::<usize>::new());
        let gap = [image((0, 3), 10), image((5, 7), 10), delta((0, 7), (0, 8))];
        assert_eq!(collect(&gap, 12, &[], &[]), Vec::<usize>::new());
    }

    /// Which layers a read looks at, told independently of the planner.
    fn read(layers: &[&LayerMeta], key: Key, at: u64) -> Vec<String> {
        let over = |layer: &&&LayerMeta| layer.covers(&key);
        let images = layers.iter().filter(over).filter(|l| l.kind == LayerKind::Image && l.end_lsn.0 <= at);
        let newest = images.max_by_key(|image| image.end_lsn);
        let after = newest.map_or(0, |image| image.end_lsn.0);
        let deltas = layers.iter().filter(over).filter(|l| l.kind == LayerKind::Delta);
        let deltas = deltas.filter(|delta| delta.end_lsn.0 > after && delta.start_lsn.0 < at);
        let mut names: Vec<String> = deltas.chain(newest).map(|layer| layer.name.clone()).collect();
        names.sort();
        names
    }

    fn layers() -> impl Strategy<Value = Vec<LayerMeta>> {
        let keys = (0..KEYS, 0..KEYS).prop_map(|(a, b)| (a.min(b), a.max(b)));
        let one = (any::<bool>(), keys, 0..POSITIONS, 2..6u64).prop_map(|(is_image, keys, lsn, length)| {
            if is_image { image(keys, lsn) } else { delta(keys, (lsn, lsn + length)) }
        });
        // A delta covers positions at which no record ends. No two images over a key as of the same position: the one is then the other.
        prop::collection::vec(one, 0..24).prop_map(|mut layers| {
            layers.sort_by_key(|layer| layer.name.clone());
            let mut kept: Vec<LayerMeta> = Vec::new();
            for layer in layers {
                let clashes = |known: &LayerMeta| {
                    known.name == layer.name
                        || (known.kind == LayerKind::Image
                            && layer.kind == LayerKind::Image
                            && known.end_lsn == layer.end_lsn
                            && known.first_key <= layer.last_key
                            && known.last_key >= layer.first_key)
                };
                if !kept.iter().any(clashes) {
                    kept.push(layer);
                }
            }
            kept
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_allowed_read_looks_elsewhere_afterwards(
            layers in layers(),
            cutoff in 0..POSITIONS + 6,
            children in prop::collection::vec(0..POSITIONS + 6, 0..3),
            leases in prop::collection::vec(0..POSITIONS + 6, 0..3),
        ) {
            let gone = collect(&layers, cutoff, &children, &leases);
            let before: Vec<&LayerMeta> = layers.iter().collect();
            let after: Vec<&LayerMeta> =
                layers.iter().enumerate().filter(|(index, _)| !gone.contains(index)).map(|(_, layer)| layer).collect();
            let points = (cutoff..POSITIONS + 8).chain(children).chain(leases);
            let mut looked_at = std::collections::BTreeSet::new();
            for at in points {
                for block in 0..KEYS {
                    let names = read(&before, key(block), at);
                    prop_assert_eq!(&names, &read(&after, key(block), at));
                    looked_at.extend(names);
                }
            }
            // And nothing more is kept than what some allowed read looks at.
            for layer in after {
                prop_assert!(looked_at.contains(&layer.name), "{} is kept for nothing", layer.name);
            }
        }
    }
}
