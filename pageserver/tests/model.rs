//! Random histories of puts, uploads, restarts and branches against a model that keeps everything in a list.

mod cluster;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use cluster::{branch_ref, branches, memory_remote, put_root};
use dormouse_pageserver::{
    branch::{Branch, Branches, Put, Tip, Tuning},
    compaction::PlanLimits,
    remote::Remote,
    storage::{Key, Value},
};
use proptest::prelude::*;
use types::{BranchRef, ForkNumber, Lsn, PAGE_BYTES, PageTag, RelTag};
use wire::pageserver::BranchPoint;

const START: Lsn = Lsn(800);
/// From here on the relation has its size and pages.
const READY: Lsn = Lsn(808);
const REL: RelTag = RelTag { spc: 1663, db: 1, rel: 1, fork: ForkNumber::Main };

/// Contents by key number.
type Values = Vec<(u8, Option<u8>)>;

#[derive(Debug, Clone)]
enum Step {
    /// One record: values for some keys of a branch.
    Record {
        branch: usize,
        values: Values,
    },
    Flush {
        branch: usize,
    },
    /// Merges layers and makes images.
    Compact {
        branch: usize,
    },
    /// Drops what only older positions need, but for children.
    Collect {
        branch: usize,
        back: usize,
    },
    /// A new pageserver with a higher generation; what was not uploaded is lost and put again.
    Restart,
    Branch {
        parent: usize,
        back: usize,
    },
    Read {
        branch: usize,
        key: u8,
        back: usize,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let value = (0u8..12, prop::option::weighted(0.8, any::<u8>()));
    let step = prop_oneof![
        6 => (any::<usize>(), prop::collection::vec(value, 1..4)).prop_map(|(branch, values)| Step::Record { branch, values }),
        2 => any::<usize>().prop_map(|branch| Step::Flush { branch }),
        1 => Just(Step::Restart),
        1 => any::<usize>().prop_map(|branch| Step::Compact { branch }),
        2 => (any::<usize>(), 0usize..6).prop_map(|(branch, back)| Step::Collect { branch, back }),
        1 => (any::<usize>(), 0usize..6).prop_map(|(parent, back)| Step::Branch { parent, back }),
        8 => (any::<usize>(), 0u8..12, 0usize..8).prop_map(|(branch, key, back)| Step::Read { branch, key, back }),
    ];
    prop::collection::vec(step, 1..80)
}

/// Keys 0 to 5 are single values, 6 to 11 pages.
fn key(number: u8) -> Key {
    if number < 6 {
        Key::two_phase(u32::from(number))
    } else {
        Key::page(PageTag { rel: REL, block: u32::from(number) - 6 })
    }
}

fn value(number: u8, content: Option<u8>) -> Value {
    match content {
        Some(byte) if number < 6 => Value::Image(vec![byte].into()),
        None if number < 6 => Value::Tombstone,
        Some(byte) => Value::Image(vec![byte; PAGE_BYTES].into()),
        None => Value::ZERO_PAGE,
    }
}

struct ModelBranch {
    name: BranchRef,
    parent: Option<(usize, Lsn)>,
    start: Lsn,
    /// Nothing before it is asked for, but by children.
    cutoff: Lsn,
    records: Vec<(Lsn, Values)>,
}

impl ModelBranch {
    fn tip(&self) -> Lsn {
        self.records.last().map_or(self.start, |(lsn, _)| *lsn)
    }

    /// The position `back` records before the end, at earliest the start.
    fn position(&self, back: usize) -> Lsn {
        let at = self.records.len().checked_sub(back + 1);
        at.map_or(self.start, |at| self.records[at].0).max(READY).max(self.cutoff)
    }
}

struct Model {
    branches: Vec<ModelBranch>,
}

impl Model {
    fn read(&self, branch: usize, key: u8, at: Lsn) -> Option<Option<u8>> {
        let branch = &self.branches[branch];
        for (_, values) in branch.records.iter().rev().filter(|(lsn, _)| *lsn <= at) {
            if let Some((_, content)) = values.iter().rev().find(|(known, _)| *known == key) {
                return Some(*content);
            }
        }
        branch.parent.and_then(|(parent, lsn)| self.read(parent, key, at.min(lsn)))
    }
}

struct World {
    remote: Arc<Remote>,
    branches: Arc<Branches>,
    generation: u32,
    model: Model,
}

fn tuning() -> Tuning {
    Tuning {
        plan: PlanLimits { deltas_per_merge: 2, image_min_bytes: 3_000, cell_bytes: 1_500 },
        layer_bytes: 1_000,
        wal_wait: Duration::from_millis(10),
        removal_delay: Duration::ZERO,
        ..Tuning::default()
    }
}

impl World {
    async fn new() -> World {
        let remote = memory_remote();
        let root = branch_ref("p", "root");
        put_root(&remote, &root, START).await;
        let first = Put { key: Key::rel_size(REL), lsn: READY, value: Value::rel_size(100) };
        let branches = branches(&remote, 1, tuning());
        let branch = branches.get(&root).await.expect("root");
        // The size, and every page, exist from the start on.
        let pages = (6..12).map(|number| Put { key: key(number), lsn: READY, value: Value::ZERO_PAGE });
        branch.apply([first].into_iter().chain(pages), tip(READY));
        branch.flush().await.expect("flush");
        let zeroes = (6..12).map(|number| (number, None)).collect();
        let model =
            ModelBranch { name: root, parent: None, start: START, cutoff: START, records: vec![(READY, zeroes)] };
        World { remote, branches, generation: 1, model: Model { branches: vec![model] } }
    }

    async fn branch(&self, index: usize) -> Arc<Branch> {
        self.branches.get(&self.model.branches[index].name).await.expect("attached")
    }

    async fn step(&mut self, step: Step) {
        let count = self.model.branches.len();
        match step {
            Step::Record { branch, values } => {
                let index = branch % count;
                let lsn = self.model.branches[index].tip() + 40;
                apply(&*self.branch(index).await, lsn, &values);
                self.model.branches[index].records.push((lsn, values));
            }
            Step::Flush { branch } => {
                let branch = self.branch(branch % count).await;
                assert_eq!(branch.flush().await.expect("flush"), branch.tip().last_record_lsn);
            }
            Step::Compact { branch } => self.branch(branch % count).await.compact().await.expect("compact"),
            Step::Collect { branch, back } => self.collect(branch % count, back).await,
            Step::Restart => self.restart().await,
            Step::Branch { parent, back } => {
                let parent = parent % count;
                let at = self.model.branches[parent].position(back);
                let name = branch_ref("p", &format!("b{count}"));
                let point = BranchPoint::Lsn(at);
                let ancestor = self.model.branches[parent].name.clone();
                assert_eq!(self.branches.create(&name, &ancestor, point).await.expect("create"), at);
                assert_eq!(self.branches.create(&name, &ancestor, point).await.expect("again"), at);
                let child =
                    ModelBranch { name, parent: Some((parent, at)), start: at, cutoff: at, records: Vec::new() };
                self.model.branches.push(child);
            }
            Step::Read { branch, key, back } => self.check(branch % count, key, back).await,
        }
    }

    async fn collect(&mut self, index: usize, back: usize) {
        let cutoff = self.model.branches[index].position(back);
        let children = self.model.branches.iter().filter_map(|branch| branch.parent);
        let children: Vec<Lsn> = children.filter(|(parent, _)| *parent == index).map(|(_, lsn)| lsn).collect();
        let branch = self.branch(index).await;
        branch.collect_garbage(cutoff, &children, &[]).await.expect("collect");
        self.model.branches[index].cutoff = branch.gc_cutoff();
    }

    async fn restart(&mut self) {
        // Else the old pageserver's compaction, in the background, may go on while the new one takes over.
        for branch in self.branches.attached() {
            branch.compact().await.expect("compact");
        }
        self.generation += 1;
        self.branches = branches(&self.remote, self.generation, tuning());
        for index in 0..self.model.branches.len() {
            let branch = self.branch(index).await;
            let from = branch.tip().last_record_lsn;
            for (lsn, values) in self.model.branches[index].records.iter().filter(|(lsn, _)| *lsn > from) {
                apply(&branch, *lsn, values);
            }
        }
    }

    async fn check(&self, index: usize, number: u8, back: usize) {
        let at = self.model.branches[index].position(back);
        let branch = self.branch(index).await;
        let expected = self.model.read(index, number, at).flatten();
        let what = format!("{} key {number} at {at}", branch.name());
        if number < 6 {
            let read = branch.read_value(key(number), at).await.expect("read");
            assert_eq!(read, expected.map(|byte| Bytes::from(vec![byte])), "{what}");
        } else {
            let tag = PageTag { rel: REL, block: u32::from(number) - 6 };
            let read = branch.get_pages(&[tag], at).await.expect("read");
            assert_eq!(read[0][0], expected.unwrap_or(0), "{what}");
            assert!(read[0].len() == PAGE_BYTES && read[0].iter().all(|byte| *byte == read[0][0]), "{what}");
        }
        let listed = branch.scan(key(0), key(5), at).await.expect("scan");
        let live = (0..6).filter(|number| self.model.read(index, *number, at).flatten().is_some()).count();
        assert_eq!(listed.len(), live, "{what}");
    }
}

fn tip(lsn: Lsn) -> Tip {
    Tip { last_record_lsn: lsn, prev_record_lsn: Lsn(lsn.0 - 32), last_commit_us: None }
}

fn apply(branch: &Branch, lsn: Lsn, values: &[(u8, Option<u8>)]) {
    let puts = values.iter().map(|(number, content)| Put { key: key(*number), lsn, value: value(*number, *content) });
    branch.apply(puts, tip(lsn));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn reads_agree_with_the_model(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let mut world = World::new().await;
            for step in steps {
                world.step(step).await;
            }
            for index in 0..world.model.branches.len() {
                for number in 0..12 {
                    world.check(index, number, 0).await;
                }
            }
        });
    }
}
