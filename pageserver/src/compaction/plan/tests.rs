//! Random write patterns against the planner: how many layers a read looks at, and how much is rewritten.

use proptest::prelude::*;

use super::*;
use crate::storage::Kind;

/// Blocks of the one relation of the model.
const KEYS: u32 = 100;
/// Bytes of a page's image, and of a record.
const IMAGE_BYTES: u64 = 160;
const RECORD_BYTES: u64 = 10;

fn key(block: u32) -> Key {
    Key { block, ..Key::of(Kind::RelPage) }
}

/// What is written between two times that memory is written out: records for the blocks of a range, so many.
#[derive(Clone, Debug)]
struct Writes {
    first: u32,
    blocks: u32,
    records: u64,
}

/// A branch's layers, without content: a delta's size follows from its records by block.
struct Model {
    layers: Vec<LayerMeta>,
    records: Vec<[u64; KEYS as usize]>,
    cuts: Vec<Key>,
    lsn: u64,
    limits: PlanLimits,
    written_bytes: u64,
    made_bytes: u64,
}

impl Model {
    fn new(limits: PlanLimits) -> Model {
        Model { layers: vec![], records: vec![], cuts: vec![], lsn: 8, limits, written_bytes: 0, made_bytes: 0 }
    }

    fn add(&mut self, kind: LayerKind, level: u8, keys: Cell, lsns: (Lsn, Lsn), records: [u64; KEYS as usize]) {
        let size_bytes = match kind {
            LayerKind::Delta => records.iter().sum::<u64>() * RECORD_BYTES,
            LayerKind::Image => {
                let blocks = (0..KEYS).filter(|block| (keys.first..=keys.last).contains(&key(*block))).count();
                blocks as u64 * IMAGE_BYTES
            }
        };
        let name = format!("{kind:?} {level} {lsns:?} {keys:?}");
        let (start_lsn, end_lsn) = lsns;
        let (first_key, last_key) = (keys.first, keys.last);
        let rest = (0, 1);
        self.layers.push(LayerMeta {
            name,
            kind,
            level,
            first_key,
            last_key,
            start_lsn,
            end_lsn,
            size_bytes,
            index_offset: rest.0,
            entries: rest.1,
        });
        self.records.push(records);
        self.made_bytes += size_bytes;
    }

    fn write(&mut self, writes: &Writes) {
        let mut records = [0; KEYS as usize];
        for number in 0..writes.records {
            records[((u64::from(writes.first) + number % u64::from(writes.blocks)) % u64::from(KEYS)) as usize] += 1;
        }
        let start = self.lsn;
        self.lsn += 8 * writes.records;
        let all = Cell { first: Key::MIN, last: Key::MAX };
        self.written_bytes += writes.records * RECORD_BYTES;
        self.add(LayerKind::Delta, 0, all, (Lsn(start), Lsn(self.lsn)), records);
    }

    /// Does what the planner says until it says nothing.
    fn compact(&mut self) {
        for _ in 0..1000 {
            let input = PlanInput { layers: &self.layers, cuts: &self.cuts, lsn: Lsn(self.lsn), limits: self.limits };
            match next_job(&input) {
                None => return,
                Some(Job::Image { cell, lsn }) => self.make_images(cell, lsn),
                Some(Job::Merge { deltas, parts }) => self.merge(deltas, parts),
            }
            self.check();
        }
        panic!("the planner never has enough");
    }

    fn make_images(&mut self, cell: Cell, lsn: Lsn) {
        let known = self.layers.len();
        // Two files, when the cell has blocks for two.
        let blocks: Vec<u32> = (0..KEYS).filter(|b| (cell.first..=cell.last).contains(&key(*b))).collect();
        let middle = key(blocks[blocks.len() / 2]);
        let lsns = (lsn, lsn);
        if middle > cell.first {
            let last = middle.previous().expect("not the first");
            self.add(LayerKind::Image, 0, Cell { first: cell.first, last }, lsns, [0; KEYS as usize]);
        }
        self.add(LayerKind::Image, 0, Cell { first: middle, last: cell.last }, lsns, [0; KEYS as usize]);
        self.cuts.extend(cuts_after_image(&self.layers[known..], &self.layers, &self.limits));
        self.cuts.sort_unstable();
    }

    fn merge(&mut self, deltas: Vec<usize>, parts: Vec<MergePart>) {
        let mut gone: BTreeSet<usize> = deltas.iter().copied().collect();
        for part in parts {
            gone.extend(&part.carried);
            let inputs: Vec<usize> = deltas.iter().chain(&part.carried).copied().collect();
            let mut records = [0; KEYS as usize];
            for (block, sum) in (0..KEYS).zip(records.iter_mut()) {
                if (part.cell.first..=part.cell.last).contains(&key(block)) {
                    *sum = inputs.iter().map(|input| self.records[*input][block as usize]).sum();
                }
            }
            if records.iter().any(|records| *records > 0) {
                let start = inputs.iter().map(|input| self.layers[*input].start_lsn).min().expect("inputs");
                let end = inputs.iter().map(|input| self.layers[*input].end_lsn).max().expect("inputs");
                self.add(LayerKind::Delta, part.level, part.cell, (start, end), records);
            }
        }
        for index in gone.into_iter().rev() {
            self.layers.remove(index);
            self.records.remove(index);
        }
    }

    /// How many layers a read of any block as of any position looks at.
    fn check(&self) {
        let ends: BTreeSet<Lsn> = self.layers.iter().map(|layer| layer.end_lsn).collect();
        for block in (0..KEYS).step_by(7) {
            for at in &ends {
                let over = |layer: &&LayerMeta| layer.covers(&key(block)) && layer.start_lsn <= *at;
                let images = self.layers.iter().filter(over).filter(|l| l.kind == LayerKind::Image);
                let image = images.filter(|l| l.end_lsn <= *at).map(|l| l.end_lsn).max();
                let counts = |l: &&LayerMeta| is_delta(l) && l.start_lsn < *at && l.end_lsn > image.unwrap_or_default();
                let deltas = self.layers.iter().filter(over).filter(counts).count();
                let visited = deltas + usize::from(image.is_some());
                assert!(visited <= MAX_LAYERS_VISITED, "{visited} layers for block {block} at {at}");
            }
        }
    }
}

fn limits(deltas_per_merge: usize) -> PlanLimits {
    PlanLimits { deltas_per_merge, image_min_bytes: 2000, cell_bytes: 3000 }
}

fn writes() -> impl Strategy<Value = Writes> {
    let anywhere = (0..KEYS, prop_oneof![1u32..4, 1u32..KEYS + 1]);
    (anywhere, prop_oneof![1u64..10, 50u64..300, 200u64..1000]).prop_map(|((first, blocks), records)| Writes {
        first,
        blocks,
        records,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_read_looks_at_more_layers_than_it_may(
        pattern in prop::collection::vec((writes(), any::<bool>()), 1..150),
        deltas_per_merge in 1usize..5,
    ) {
        let mut model = Model::new(limits(deltas_per_merge));
        for (writes, lazy) in pattern {
            if !lazy || is_full(model.layers.iter()) {
                model.compact();
            }
            model.write(&writes);
            model.check();
        }
    }
}

/// Bytes made by byte of records, when each of 400 layers is what `pattern` says.
fn write_amplification(pattern: impl Fn(u32) -> Writes) -> f64 {
    let mut model = Model::new(limits(3));
    for turn in 0..400 {
        model.write(&pattern(turn));
        model.compact();
    }
    model.made_bytes as f64 / model.written_bytes as f64
}

#[test]
fn write_amplification_is_bounded_for_loads_of_every_sort() {
    let everywhere = write_amplification(|_| Writes { first: 0, blocks: KEYS, records: 200 });
    let one_page = write_amplification(|_| Writes { first: 17, blocks: 1, records: 200 });
    let growing = write_amplification(|turn| Writes { first: turn, blocks: 1, records: 200 });
    println!("bytes made by byte of records: everywhere {everywhere:.2}, one page {one_page:.2}, growing {growing:.2}");
    // Each byte is written out, merged at most three times, and in at most one image of as many bytes as the deltas.
    assert!(everywhere <= 5.0 && one_page <= 5.0 && growing <= 5.0);
}

#[test]
fn cells_are_all_keys_without_gaps() {
    let cuts = [key(10), key(20)];
    let cells: Vec<Cell> = cells(&cuts).collect();
    assert_eq!(cells[0], Cell { first: Key::MIN, last: key(9) });
    assert_eq!(cells[1], Cell { first: key(10), last: key(19) });
    assert_eq!(cells[2], Cell { first: key(20), last: Key::MAX });
}
