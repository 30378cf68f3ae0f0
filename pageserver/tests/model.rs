//! Random histories of puts, uploads, restarts and branches against a model that keeps everything in a list.

mod cluster;
mod reference;

use std::sync::Arc;

use bytes::Bytes;
use cluster::{branch_ref, branches, memory_remote, put_root};
use dormouse_pageserver::{
    branch::{Branch, Branches},
    error::StorageError,
    remote::Remote,
};
use proptest::prelude::*;
use reference::{Model, ModelBranch, START, Values, apply, first_record, key, page_tag, tuning};
use types::PAGE_BYTES;
use wire::pageserver::BranchPoint;

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

struct World {
    remote: Arc<Remote>,
    branches: Arc<Branches>,
    generation: u32,
    model: Model,
}

impl World {
    async fn new() -> World {
        let remote = memory_remote();
        let root = branch_ref("p", "root");
        put_root(&remote, &root, START).await;
        let branches = branches(&remote, 1, tuning());
        let branch = branches.get(&root).await.expect("root");
        let (lsn, values) = first_record();
        apply(&branch, lsn, &values);
        branch.flush().await.expect("flush");
        World { remote, branches, generation: 1, model: Model { branches: vec![ModelBranch::root(root)] } }
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
        let children = self.model.child_lsns(index);
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
        let expected = self.model.read(index, number, at);
        let what = format!("{} key {number} at {at}", branch.name());
        if number < 6 {
            let read = asked_again(&branch, || branch.read_value(key(number), at)).await;
            assert_eq!(read, expected.map(|byte| Bytes::from(vec![byte])), "{what}");
        } else {
            let tags = [page_tag(number)];
            let read = asked_again(&branch, || branch.get_pages(&tags, at)).await;
            assert_eq!(read[0][0], expected.unwrap_or(0), "{what}");
            assert!(read[0].len() == PAGE_BYTES && read[0].iter().all(|byte| *byte == read[0][0]), "{what}");
        }
        let listed = asked_again(&branch, || branch.scan(key(0), key(5), at)).await;
        let live = (0..6).filter(|number| self.model.read(index, *number, at).is_some()).count();
        assert_eq!(listed.len(), live, "{what}");
    }
}

/// Removed objects go at once here, so a read may meet a merge in the background; then it is to be told so.
async fn asked_again<T>(branch: &Arc<Branch>, ask: impl AsyncFn() -> Result<T, StorageError>) -> T {
    loop {
        let answer = ask().await;
        match branch.or_stale(answer).await {
            Err(StorageError::Stale(_)) => {}
            other => return other.expect("read"),
        }
    }
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
