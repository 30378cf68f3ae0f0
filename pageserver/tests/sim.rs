//! Crashes anywhere: pageservers over an object store that fails, one taking over from another that may still be running, killed
//! at any request. What the newest one reads, at any position, is compared with a plain list of records.
//!
//! `DORMOUSE_SIM_SEED=n` runs one seed, `DORMOUSE_SIM_SEEDS=n` so many; the last line tells how many were run and what was wrong.

mod cluster;
mod faulty_store;
mod reference;

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use cluster::{branch_ref, branches, put_root};
use dormouse_pageserver::{
    branch::{Branch, Branches},
    check::{Repair, check_project},
    error::StorageError,
    remote::{DiskCache, Remote},
};
use faulty_store::{Bucket, FaultyStore, Rng};
use reference::{KEYS, Model, ModelBranch, START, apply, key, page_tag, tuning};
use types::{Lsn, PAGE_BYTES, ProjectId};
use wire::pageserver::BranchPoint;

const STEPS_PER_SEED: usize = 120;
/// As part of the ordinary tests.
const SEEDS: u64 = 12;
const FAULT_PERCENT: u64 = 4;
/// Times that a read is asked again when the store fails.
const READ_ATTEMPTS: usize = 100;
/// Small: layers fall out of it all the time.
const DISK_CACHE_BYTES: u64 = 6 << 10;

/// One process: its way to the store and what it has in memory.
struct Pageserver {
    store: Arc<FaultyStore>,
    branches: Arc<Branches>,
    _disk: tempfile::TempDir,
}

struct World {
    rng: Rng,
    bucket: Arc<Bucket>,
    generation: u32,
    owner: Pageserver,
    /// Was deposed, does not know it, and goes on.
    zombie: Option<Pageserver>,
    model: Model,
    /// By branch: up to here safekeepers may have forgotten the WAL.
    reported: Vec<Lsn>,
    /// Children that may be there: of which branch, and where they left it.
    half_made: Vec<(usize, Lsn)>,
    /// Layers that garbage collection took out.
    collected: usize,
    wrong: Vec<String>,
}

fn pageserver(bucket: &Arc<Bucket>, generation: u32, seed: u64) -> Pageserver {
    let store = FaultyStore::new(bucket.clone(), seed, FAULT_PERCENT);
    let disk = tempfile::tempdir().expect("directory");
    let cache = DiskCache::open(Path::new(disk.path()), DISK_CACHE_BYTES).expect("disk cache");
    // Next to no blocks in memory: layers are read from the disk or the store again and again.
    let remote = Arc::new(Remote::over(store.clone(), cache, 1 << 10));
    Pageserver { store, branches: branches(&remote, generation, tuning()), _disk: disk }
}

/// The store without faults.
fn quiet(bucket: &Arc<Bucket>) -> Remote {
    Remote::over(FaultyStore::new(bucket.clone(), 0, 0), DiskCache::disabled(), 0)
}

impl World {
    async fn new(seed: u64) -> World {
        let bucket = Arc::new(Bucket::default());
        let root = branch_ref("p", "root");
        let owner = pageserver(&bucket, 1, seed);
        put_root(&quiet(&bucket), &root, START).await;
        let model = Model { branches: vec![ModelBranch::root(root)] };
        let (rng, wrong) = (Rng(seed ^ 0xD0), Vec::new());
        World {
            rng,
            bucket,
            generation: 1,
            owner,
            zombie: None,
            model,
            reported: vec![START],
            half_made: Vec::new(),
            collected: 0,
            wrong,
        }
    }

    async fn step(&mut self) {
        let index = self.rng.below(self.model.branches.len());
        let of_zombie = self.rng.chance(25);
        match self.rng.below(100) {
            0..30 => self.record(index),
            30..45 => self.flush(index, of_zombie).await,
            45..55 => self.compact(index, of_zombie).await,
            55..63 => self.collect(index, of_zombie).await,
            63..67 => self.branch(index).await,
            67..72 => self.crash(index).await,
            72..75 => self.take_over(true),
            _ => self.check(index).await,
        }
        if self.owner.store.is_gone() {
            self.take_over(false);
        }
    }

    fn record(&mut self, index: usize) {
        let lsn = self.model.branches[index].tip() + 40;
        let content = |rng: &mut Rng| rng.chance(80).then(|| rng.below(256) as u8);
        let values =
            (0..1 + self.rng.below(4)).map(|_| (self.rng.below(KEYS.into()) as u8, content(&mut self.rng))).collect();
        self.model.branches[index].records.push((lsn, values));
    }

    /// The branch on a pageserver, with all records that there are: safekeepers have those that were not reported.
    async fn fed(&mut self, index: usize, of_zombie: bool) -> Result<Arc<Branch>, StorageError> {
        let known = &self.model.branches[index];
        let server = if of_zombie { self.zombie.as_ref().unwrap_or(&self.owner) } else { &self.owner };
        let mut branch = server.branches.get(&known.name).await?;
        let mut from = branch.tip().last_record_lsn;
        if from < self.reported[index] && std::ptr::eq(server, &self.owner) {
            // The WAL from there on is gone: somebody has uploaded it since this was attached, as attaching again shows.
            if branch.forget_if_changed().await? {
                branch = server.branches.get(&known.name).await?;
                from = branch.tip().last_record_lsn;
            }
            if from < self.reported[index] {
                self.wrong.push(format!("{}: WAL from {from} to {} is lost", known.name, self.reported[index]));
            }
        }
        if from >= self.reported[index] {
            known.records.iter().filter(|(lsn, _)| *lsn > from).for_each(|(lsn, values)| apply(&branch, *lsn, values));
        }
        Ok(branch)
    }

    async fn flush(&mut self, index: usize, of_zombie: bool) {
        if let Ok(branch) = self.fed(index, of_zombie).await
            && let Ok(lsn) = branch.flush().await
        {
            self.reported[index] = self.reported[index].max(lsn);
        }
    }

    async fn compact(&mut self, index: usize, of_zombie: bool) {
        if let Ok(branch) = self.fed(index, of_zombie).await {
            let _ = branch.compact().await;
        }
    }

    async fn collect(&mut self, index: usize, of_zombie: bool) {
        let cutoff = self.model.branches[index].position(self.rng.below(6));
        let mut children = self.model.child_lsns(index);
        children.extend(self.half_made.iter().filter(|(parent, _)| *parent == index).map(|(_, lsn)| *lsn));
        let Ok(branch) = self.fed(index, of_zombie).await else { return };
        // It may have been done although it failed.
        self.model.branches[index].cutoff = cutoff;
        if let Ok(collected) = branch.collect_garbage(cutoff, &children, &[]).await {
            self.collected += collected.layers;
        }
    }

    async fn branch(&mut self, parent: usize) {
        if self.model.branches.len() >= 5 {
            return;
        }
        let at = self.model.branches[parent].position(self.rng.below(6));
        let name = branch_ref("p", &format!("b{}-{}", self.model.branches.len(), self.rng.next()));
        let ancestor = self.model.branches[parent].name.clone();
        if self.fed(parent, false).await.is_err() {
            return;
        }
        match self.owner.branches.create(&name, &ancestor, BranchPoint::Lsn(at)).await {
            Ok(lsn) => {
                assert_eq!(lsn, at);
                self.model.branches.push(ModelBranch::child(name, parent, at));
                self.reported.push(at);
            }
            // It may have been made. Nobody uses it, but it stays a child.
            Err(_failed) => self.half_made.push((parent, at)),
        }
    }

    /// The process is gone at one of its next requests, whatever it is doing.
    async fn crash(&mut self, index: usize) {
        self.owner.store.kill_after(self.rng.below(25));
        for _ in 0..20 {
            match self.rng.below(3) {
                0 => self.flush(index, false).await,
                1 => self.compact(index, false).await,
                _ => self.collect(index, false).await,
            }
            self.record(index);
            if self.owner.store.is_gone() {
                return;
            }
        }
        self.owner.store.kill();
    }

    /// A new pageserver on an empty disk, with a higher generation. The old one may go on.
    fn take_over(&mut self, old_goes_on: bool) {
        self.generation += 1;
        let new = pageserver(&self.bucket, self.generation, self.rng.next());
        let old = std::mem::replace(&mut self.owner, new);
        match old_goes_on {
            true => self.zombie = Some(old),
            false => old.store.kill(),
        }
    }

    async fn check(&mut self, index: usize) {
        let at = self.model.branches[index].position(self.rng.below(12));
        let number = self.rng.below(KEYS.into()) as u8;
        let expected = self.model.read(index, number, at);
        let what = format!("{} key {number} at {at}", self.model.branches[index].name);
        let mut damaged = 0;
        for _ in 0..READ_ATTEMPTS {
            match self.read(index, number, at).await {
                Ok(read) if read == expected => return,
                Ok(read) => return self.wrong.push(format!("{what}: {read:?}, not {expected:?}")),
                Err(StorageError::Damaged { object, reason }) => {
                    let name = self.model.branches[index].name.clone();
                    let Ok(branch) = self.owner.branches.get(&name).await else { continue };
                    // Removed objects go at once here, so a read may meet its own pageserver's compaction; the next does not.
                    damaged += usize::from(matches!(branch.forget_if_changed().await, Ok(false)));
                    if damaged > 3 {
                        return self.wrong.push(format!("{what}: {object}: {reason}"));
                    }
                }
                // A listing that lags does not show a branch that was just made.
                Err(
                    StorageError::Store { .. }
                    | StorageError::Deposed { .. }
                    | StorageError::NotArrived { .. }
                    | StorageError::NoBranch(_),
                ) => {}
                Err(error) => return self.wrong.push(format!("{what}: {error}")),
            }
        }
        self.wrong.push(format!("{what}: no answer"));
    }

    async fn read(&mut self, index: usize, number: u8, at: Lsn) -> Result<Option<u8>, StorageError> {
        // Ancestors must have what this one inherits, as their WAL streams would see to.
        let mut ancestor = self.model.branches[index].parent;
        while let Some((parent, _)) = ancestor {
            self.fed(parent, false).await?;
            ancestor = self.model.branches[parent].parent;
        }
        let branch = self.fed(index, false).await?;
        if number < KEYS / 2 {
            let content = branch.read_value(key(number), at).await?;
            return Ok(content.map(|bytes| bytes[0]));
        }
        let page: Bytes = branch.get_pages(&[page_tag(number)], at).await?.remove(0);
        assert!(page.len() == PAGE_BYTES && page.iter().all(|byte| *byte == page[0]));
        // Zeroes and what was never written are the same page.
        let written = self.model.read(index, number, at).is_some() || page[0] != 0;
        Ok(written.then_some(page[0]))
    }

    /// Everything once more, by a last pageserver and without faults; then no object is left that nothing refers to.
    async fn finish(&mut self) {
        self.take_over(false);
        self.zombie.iter().for_each(|zombie| zombie.store.kill());
        self.owner.store.set_fault_percent(0);
        for index in 0..self.model.branches.len() {
            for _ in 0..60 {
                self.check(index).await;
            }
            self.flush(index, false).await;
            self.compact(index, false).await;
            self.collect(index, false).await;
            self.check(index).await;
        }
        for branch in self.owner.branches.attached() {
            branch.compact().await.expect("compact");
        }
        let remote = quiet(&self.bucket);
        let project = ProjectId::new("p").expect("id");
        let repaired = check_project(&remote, &project, Repair::OlderThan(Duration::ZERO)).await.expect("check");
        let again = check_project(&remote, &project, Repair::No).await.expect("check");
        self.wrong.extend(repaired.damage);
        self.wrong.extend(again.damage);
        self.wrong.extend(again.orphans.into_iter().map(|(object, _)| format!("{object} is left")));
        for index in 0..self.model.branches.len() {
            self.check(index).await;
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn a_crash_anywhere_loses_and_invents_nothing() {
    let seeds: Vec<u64> = match number("DORMOUSE_SIM_SEED") {
        Some(seed) => vec![seed],
        None => (1..=number("DORMOUSE_SIM_SEEDS").unwrap_or(SEEDS)).collect(),
    };
    let mut wrong = Vec::new();
    let mut collected = 0;
    for seed in &seeds {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let mut world = World::new(*seed).await;
            for _ in 0..STEPS_PER_SEED {
                world.step().await;
            }
            world.finish().await;
            collected += world.collected;
            wrong.extend(world.wrong.into_iter().map(|wrong| format!("seed {seed}: {wrong}")));
        });
    }
    wrong.iter().take(20).for_each(|wrong| println!("{wrong}"));
    println!(
        "seeds={} steps={} collected={collected} wrong={}",
        seeds.len(),
        seeds.len() * STEPS_PER_SEED,
        wrong.len()
    );
    assert!(wrong.is_empty(), "{}", wrong[0]);
    assert!(
        seeds.len() < 10 || collected >= seeds.len(),
        "hardly anything was garbage: the runs show nothing of its rules"
    );
}
