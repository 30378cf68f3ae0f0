//! A week in the life of many branches, in a minute: updates, growth, cuts, drops, branches of branches, restores,
//! detachments, deletions, leases, garbage collection by a window of a day, restarts and crashes of the pageserver; all at
//! random from a seed. Afterwards every page at 1,000 random points equals the reference, sizes are right, and the object
//! store holds nothing that no branch needs.
//!
//! `DORMOUSE_WEEK_OPERATIONS` makes the week busier (default 1500 for each seed).

mod cluster;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use cluster::{branch_ref, branches, put_root};
use dormouse_pageserver::{
    branch::{Branch, Branches, Put, Tip, Tuning, branch_point},
    compaction::PlanLimits,
    error::StorageError,
    remote::{BranchNames, DiskCache, Remote},
    storage::{CommitTime, Key, Value},
};
use futures::TryStreamExt;
use object_store::{ObjectStore, memory::InMemory};
use types::{BranchRef, ForkNumber, Lsn, PAGE_BYTES, PageTag, RelTag};
use wire::pageserver::BranchPoint;

const START: Lsn = Lsn(0x10_0000);
/// End of the first record.
const FIRST: Lsn = Lsn(0x10_0040);
const DAY_US: i64 = 86_400_000_000;
const WEEK_US: i64 = 7 * DAY_US;
const RELATIONS: u32 = 6;
/// Most blocks of a relation.
const BLOCKS: u32 = 24;
const LIVE_BRANCHES: usize = 24;
/// Longer than any read takes.
const REMOVAL_DELAY: Duration = Duration::from_secs(1);
const POINTS: usize = 1000;

/// Random numbers from a seed (SplitMix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// What a record does to a branch.
#[derive(Clone, Copy)]
enum Change {
    /// A relation's blocks; `None`: dropped.
    Size(u32, Option<u32>),
    /// A page full of this number.
    Page(u32, u32, u64),
}

/// A record as the reference keeps it.
struct Record {
    lsn: Lsn,
    time_us: i64,
    changes: Vec<Change>,
}

/// A branch as the reference keeps it, also after it is deleted: others may come from it.
struct Line {
    name: BranchRef,
    /// Where it left which line.
    parent: Option<(usize, Lsn)>,
    /// The line that its storage still leans on.
    leans_on: Option<usize>,
    start: Lsn,
    records: Vec<Record>,
    cutoff: Lsn,
    /// Leased positions, and the operation at which each ends.
    leases: Vec<(Lsn, usize)>,
    alive: bool,
    /// False for what a restore left behind.
    written: bool,
}

impl Line {
    fn tip(&self) -> Lsn {
        self.records.last().map_or(self.start, |record| record.lsn)
    }
}

fn rel(number: u32) -> RelTag {
    RelTag { spc: 1663, db: 1, rel: number, fork: ForkNumber::Main }
}

fn content(fill: u64) -> Bytes {
    fill.to_le_bytes().repeat(PAGE_BYTES / 8).into()
}

/// Everything as it should be.
struct Reference {
    lines: Vec<Line>,
}

impl Reference {
    /// Sizes and pages of all relations as of a position.
    fn state(&self, line: usize, at: Lsn) -> (BTreeMap<u32, u32>, BTreeMap<(u32, u32), u64>) {
        let own = &self.lines[line];
        let (mut sizes, mut pages) =
            own.parent.map_or_else(Default::default, |(parent, left_at)| self.state(parent, at.min(left_at)));
        for change in own.records.iter().take_while(|record| record.lsn <= at).flat_map(|record| &record.changes) {
            match *change {
                Change::Size(rel, Some(blocks)) => {
                    sizes.insert(rel, blocks);
                    pages.retain(|(of, block), _| *of != rel || *block < blocks);
                }
                Change::Size(rel, None) => {
                    sizes.remove(&rel);
                    pages.retain(|(of, _), _| *of != rel);
                }
                Change::Page(rel, block, fill) => drop(pages.insert((rel, block), fill)),
            }
        }
        (sizes, pages)
    }

    fn logical_bytes(&self, line: usize) -> u64 {
        let (sizes, _) = self.state(line, Lsn::MAX);
        sizes.values().map(|blocks| u64::from(*blocks) * PAGE_BYTES as u64).sum()
    }

    fn alive(&self) -> Vec<usize> {
        (0..self.lines.len()).filter(|line| self.lines[*line].alive).collect()
    }

    fn children(&self, line: usize) -> Vec<usize> {
        self.alive().into_iter().filter(|child| self.lines[*child].leans_on == Some(line)).collect()
    }

    /// A position of the branch's own that is promised to be readable.
    fn position(&self, line: usize, dice: &mut Dice) -> Lsn {
        let own = &self.lines[line];
        let oldest = own.cutoff.max(own.start);
        let held = own.leases.iter().map(|(lsn, _)| *lsn);
        let kept = own.records.iter().map(|record| record.lsn).filter(|lsn| *lsn >= oldest);
        let positions: Vec<Lsn> = held.chain([oldest]).chain(kept).collect();
        positions[dice.below(positions.len())]
    }
}

struct Week {
    dice: Dice,
    store: Arc<InMemory>,
    remote: Arc<Remote>,
    branches: Arc<Branches>,
    generation: u32,
    reference: Reference,
    clock_us: i64,
    operation: usize,
}

fn tuning() -> Tuning {
    let plan = PlanLimits { deltas_per_merge: 2, image_min_bytes: 20_000, cell_bytes: 10_000 };
    Tuning { plan, layer_bytes: 10_000, removal_delay: REMOVAL_DELAY, ..Tuning::default() }
}

impl Week {
    async fn begin(seed: u64) -> Week {
        let store = Arc::new(InMemory::new());
        let remote = Arc::new(Remote::over(store.clone(), DiskCache::disabled(), 16 << 20));
        let name = branch_ref("week", "root");
        put_root(&remote, &name, START).await;
        let branches = branches(&remote, 1, tuning());
        // What a branch's counters are is not asked for here, but they are there in every branch.
        let counters = Put { key: Key::CHECKPOINT, lsn: FIRST, value: Value::Image(vec![0; 88].into()) };
        let first = Tip { last_record_lsn: FIRST, prev_record_lsn: START, last_commit_us: None };
        let branch = branches.get(&name).await.expect("attach");
        branch.apply([counters], first);
        branch.flush().await.expect("flush");
        let root = Line {
            name,
            parent: None,
            leans_on: None,
            start: START,
            records: vec![Record { lsn: FIRST, time_us: 0, changes: Vec::new() }],
            cutoff: START,
            leases: Vec::new(),
            alive: true,
            written: true,
        };
        let reference = Reference { lines: vec![root] };
        Week { dice: Dice(seed), store, remote, branches, generation: 1, reference, clock_us: DAY_US, operation: 0 }
    }

    async fn branch(&self, line: usize) -> Arc<Branch> {
        self.branches.get(&self.reference.lines[line].name).await.expect("attached")
    }

    fn any_alive(&mut self) -> usize {
        let alive = self.reference.alive();
        alive[self.dice.below(alive.len())]
    }

    async fn operate(&mut self, operations: usize) {
        for operation in 0..operations {
            self.operation = operation;
            self.clock_us += self.dice.below((2 * WEEK_US) as usize / operations) as i64;
            match self.dice.below(100) {
                0..70 => self.record().await,
                70..78 => drop(self.flush_any().await),
                78..83 => self.collect_any().await,
                83..88 => self.make_branch(true).await,
                88..90 => self.make_branch(false).await,
                90..92 => self.detach_any().await,
                92..95 => self.delete_any().await,
                95..97 => self.lease_any(),
                97..99 => self.restart(true).await,
                _ => self.restart(false).await,
            }
            if operation % 25 == 0 {
                let line = self.any_alive();
                self.check_point(line).await;
            }
        }
    }

    /// One record of a branch that is written to.
    async fn record(&mut self) {
        let line = self.any_alive();
        if !self.reference.lines[line].written {
            return;
        }
        let (sizes, _) = self.reference.state(line, Lsn::MAX);
        let number = 1 + self.dice.below(RELATIONS as usize) as u32;
        let blocks = sizes.get(&number).copied();
        let changes = self.changes(number, blocks);
        let mut lsn = Lsn(self.reference.lines[line].tip().0 + 32 + 8 * self.dice.below(200) as u64);
        while branch_point(lsn) != lsn {
            lsn.0 += 8;
        }
        let record = Record { lsn, time_us: self.clock_us, changes };
        let before = self.reference.lines[line].tip();
        apply(&*self.branch(line).await, &record, before);
        self.reference.lines[line].records.push(record);
        self.branch(line).await.set_logical_bytes(self.reference.logical_bytes(line));
    }

    fn changes(&mut self, number: u32, blocks: Option<u32>) -> Vec<Change> {
        let fill = self.dice.next();
        match (blocks, self.dice.below(20)) {
            (None, _) | (Some(0), _) => vec![Change::Size(number, Some(1)), Change::Page(number, 0, fill)],
            (Some(_), 0) => vec![Change::Size(number, None)],
            (Some(blocks), 1) => vec![Change::Size(number, Some(self.dice.below(blocks as usize) as u32))],
            (Some(blocks), 2..8) if blocks < BLOCKS => {
                // What was there before a cut must not come back: each new block gets content.
                let more = 1 + self.dice.below((BLOCKS - blocks) as usize) as u32;
                let grown = (blocks..blocks + more).map(|block| Change::Page(number, block, fill.rotate_left(block)));
                [Change::Size(number, Some(blocks + more))].into_iter().chain(grown).collect()
            }
            (Some(blocks), _) => vec![Change::Page(number, self.dice.below(blocks as usize) as u32, fill)],
        }
    }

    async fn flush_any(&mut self) -> usize {
        let line = self.any_alive();
        self.branch(line).await.flush().await.expect("flush");
        line
    }

    async fn collect_any(&mut self) {
        let line = self.flush_any().await;
        self.collect(line).await;
    }

    async fn collect(&mut self, line: usize) {
        let (since_us, operation) = (self.clock_us - DAY_US, self.operation);
        let own = &mut self.reference.lines[line];
        own.leases.retain(|(_, until)| *until > operation);
        let leases: Vec<Lsn> = own.leases.iter().map(|(lsn, _)| *lsn).collect();
        let name = own.name.clone();
        let report = self.branches.collect_garbage(&name, since_us, &leases).await.expect("collect");
        let own = &mut self.reference.lines[line];
        let old = own.records.iter().take_while(|record| record.time_us <= since_us).last();
        own.cutoff = own.cutoff.max(old.map_or(own.start, |record| record.lsn));
        assert_eq!(report.start_lsn, own.cutoff, "{name}");
    }

    /// A branch of a branch; or a restore, after which the one that it was made from is kept as it was.
    async fn make_branch(&mut self, parent_goes_on: bool) {
        if self.reference.alive().len() >= LIVE_BRANCHES {
            return;
        }
        let parent = self.any_alive();
        let at = self.reference.position(parent, &mut self.dice);
        let name = branch_ref("week", &format!("b{}", self.reference.lines.len()));
        let ancestor = self.reference.lines[parent].name.clone();
        let made = self.branches.create(&name, &ancestor, BranchPoint::Lsn(at)).await.expect("create");
        assert_eq!(made, at);
        self.reference.lines[parent].written &= parent_goes_on;
        self.reference.lines.push(Line {
            name,
            parent: Some((parent, at)),
            leans_on: Some(parent),
            start: at,
            records: Vec::new(),
            cutoff: at,
            leases: Vec::new(),
            alive: true,
            written: true,
        });
    }

    async fn detach_any(&mut self) {
        let line = self.any_alive();
        self.branches.detach(&self.reference.lines[line].name).await.expect("detach");
        self.reference.lines[line].leans_on = None;
    }

    async fn delete_any(&mut self) {
        if self.reference.alive().len() == 1 {
            return;
        }
        let line = self.any_alive();
        let deleted = self.branches.delete(&self.reference.lines[line].name).await;
        match self.reference.children(line).first() {
            Some(_) => assert!(matches!(deleted, Err(StorageError::Conflict(_))), "{deleted:?}"),
            None => {
                deleted.expect("delete");
                self.reference.lines[line].alive = false;
            }
        }
    }

    fn lease_any(&mut self) {
        let line = self.any_alive();
        let at = self.reference.position(line, &mut self.dice);
        let until = self.operation + 1 + self.dice.below(200);
        self.reference.lines[line].leases.push((at, until));
    }

    /// Another pageserver with nothing on its disk. What the one before had only in memory comes again, as from safekeepers.
    async fn restart(&mut self, cleanly: bool) {
        // The one before is really gone, not only deposed: nothing of it still runs.
        for branch in self.branches.attached() {
            if cleanly {
                branch.flush().await.expect("flush");
            }
            branch.compact().await.expect("compact");
        }
        if cleanly {
            self.branches.shut_down(tokio::time::Instant::now() + Duration::from_secs(60)).await;
        }
        self.generation += 1;
        self.branches = branches(&self.remote, self.generation, tuning());
        for line in self.reference.alive() {
            let branch = self.branch(line).await;
            let stored = branch.tip().last_record_lsn;
            assert!(!cleanly || stored == self.reference.lines[line].tip(), "a clean stop stores everything");
            let own = &self.reference.lines[line];
            let mut before = stored;
            for record in own.records.iter().filter(|record| record.lsn > stored) {
                apply(&branch, record, before);
                before = record.lsn;
            }
            if before > stored {
                branch.set_logical_bytes(self.reference.logical_bytes(line));
            }
        }
    }

    /// Every page as of a random position.
    async fn check_point(&mut self, line: usize) {
        let at = self.reference.position(line, &mut self.dice);
        let (sizes, pages) = self.reference.state(line, at);
        let branch = self.branch(line).await;
        let what = format!("{} at {at} of {}", branch.name(), branch.tip().last_record_lsn);
        for number in 1..=RELATIONS {
            let size = branch.rel_size(rel(number), at).await.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(size, sizes.get(&number).copied(), "{what}: relation {number}");
        }
        let tags: Vec<PageTag> =
            pages.keys().map(|(number, block)| PageTag { rel: rel(*number), block: *block }).collect();
        for some in tags.chunks(200) {
            let read = branch.get_pages(some, at).await.unwrap_or_else(|error| panic!("{what}: {error}"));
            for (tag, page) in some.iter().zip(read) {
                assert!(page == content(pages[&(tag.rel.rel, tag.block)]), "{what}: {tag:?}");
            }
        }
    }

    async fn end(mut self) {
        self.operation = usize::MAX;
        for line in self.reference.alive() {
            let branch = self.branch(line).await;
            branch.flush().await.expect("flush");
            branch.compact().await.expect("compact");
        }
        for _ in 0..2 {
            for line in self.reference.alive() {
                self.collect(line).await;
            }
            // The second time removes the objects of what the first took out.
            tokio::time::sleep(REMOVAL_DELAY).await;
        }
        for _ in 0..POINTS {
            let line = self.any_alive();
            self.check_point(line).await;
        }
        self.check_store().await;
    }

    /// Sizes, told by manifests alone, and what lies in the object store.
    async fn check_store(&mut self) {
        let listed: Vec<_> = self.store.list(None).try_collect().await.expect("list");
        let mut unexplained: BTreeMap<String, u64> =
            listed.iter().map(|object| (object.location.to_string(), object.size)).collect();
        let fresh = branches(&self.remote, self.generation + 1, tuning());
        for line in self.reference.alive() {
            let own = &self.reference.lines[line];
            let names = BranchNames::new(&own.name);
            let (generation, manifest) = self.remote.manifest(&own.name).await.expect("get").expect("exists");
            let layers: u64 = manifest
                .layers
                .iter()
                .map(|layer| names.layer(&layer.name))
                .map(|object| {
                    unexplained.remove(object.as_ref()).unwrap_or_else(|| panic!("{object} is named and not there"))
                })
                .sum();
            let children = self.reference.children(line);
            let registered =
                children.iter().map(|child| &self.reference.lines[*child]).map(|c| names.child(&c.name, c.start));
            for object in registered.chain([names.manifest(generation)]) {
                assert!(unexplained.remove(object.as_ref()).is_some(), "{object} is missing");
            }
            unexplained.retain(|object, _| !object.starts_with(&format!("{}/claim-", names.root())));
            unexplained.remove(names.manifest_copy().as_ref());
            let sizes = fresh.sizes(&own.name, own.tip()).await.expect("sizes");
            let history = own.tip().0 - own.cutoff.max(own.start).0;
            let expected = (own.tip(), self.reference.logical_bytes(line), history, layers);
            let told = (sizes.last_record_lsn, sizes.logical_bytes, sizes.history_bytes, sizes.stored_bytes);
            assert_eq!(told, expected, "{}", own.name);
        }
        let left: BTreeSet<&String> = unexplained.keys().collect();
        assert!(left.is_empty(), "nothing needs {left:?}");
    }
}

fn apply(branch: &Branch, record: &Record, before: Lsn) {
    let commit = CommitTime { timestamp_us: record.time_us, before };
    let puts = record.changes.iter().map(|change| match *change {
        Change::Size(number, Some(blocks)) => (Key::rel_size(rel(number)), Value::rel_size(blocks)),
        Change::Size(number, None) => (Key::rel_size(rel(number)), Value::Tombstone),
        Change::Page(number, block, fill) => {
            (Key::page(PageTag { rel: rel(number), block }), Value::Image(content(fill)))
        }
    });
    let puts = puts.chain([(CommitTime::key(record.time_us), commit.to_value())]);
    let tip = Tip {
        last_record_lsn: record.lsn,
        prev_record_lsn: Lsn(record.lsn.0 - 8),
        last_commit_us: Some(record.time_us),
    };
    branch.apply(puts.map(|(key, value)| Put { key, lsn: record.lsn, value }), tip);
}

fn operations() -> usize {
    let asked = std::env::var("DORMOUSE_WEEK_OPERATIONS").ok().and_then(|text| text.parse().ok());
    asked.unwrap_or(1500)
}

async fn week(seed: u64) {
    let mut week = Week::begin(seed).await;
    week.operate(operations()).await;
    week.end().await;
}

#[tokio::test]
async fn a_quiet_week() {
    week(1).await;
}

#[tokio::test]
async fn another_week() {
    week(20_261_126).await;
}
