//! Crashes anywhere: pageservers over an object store that fails, one taking over from another that may still be running, killed
//! at any request. What the newest one reads, at any position, is compared with a plain list of records. The branches ingest real
//! WAL: page images, small files, and pages that grow by hundreds of records, each of which leaves its mark.
//!
//! `DORMOUSE_SIM_SEED=n` runs one seed, `DORMOUSE_SIM_SEEDS=n` so many; the last line tells how many were run and what was wrong.

mod cluster;
mod faulty_store;
mod reference;
mod trail;

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use cluster::{branch_ref, branches, put_root};
use dormouse_pageserver::{
    branch::{Branch, Branches, Put},
    check::{Repair, check_project},
    error::StorageError,
    remote::{DiskCache, Remote},
    storage::{AuxFile, Key, Value},
};
use faulty_store::{Bucket, FaultyStore, Rng};
use reference::{KEYS, Model, ModelBranch, READY, REL, START, first_record, page_tag, tip, tuning};
use tokio::time::Instant;
use trail::{TRAILS, Trails, Wal, fresh_page, trail_tag};
use types::{Lsn, PAGE_BYTES, ProjectId};
use wal::CheckPoint;
use wire::pageserver::BranchPoint;

/// Number of the first key that is a page; those before are files.
const FIRST_PAGE: u8 = KEYS / 2;
const STEPS_PER_SEED: usize = 120;
/// As part of the ordinary tests.
const SEEDS: u64 = 12;
const FAULT_PERCENT: u64 = 4;
/// Times that a read is asked again when the store fails.
const READ_ATTEMPTS: usize = 300;
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
    /// By branch: its own WAL, from where it left its ancestor.
    wal: Vec<Wal>,
    /// By branch: what its own WAL does to the pages that grow.
    trails: Vec<Trails>,
    /// By branch: up to here safekeepers may have forgotten the WAL.
    reported: Vec<Lsn>,
    /// Children that may be there: of which branch, and where they left it.
    half_made: Vec<(usize, Lsn)>,
    /// Layers that garbage collection took out.
    collected: usize,
    wrong: Vec<String>,
}

/// The file of a number of the first half.
fn path(number: u8) -> String {
    format!("pg_stat/{number}")
}

/// As a template's import leaves it: counters, the size and every page.
fn first_puts() -> Vec<Put> {
    let put = |key, value| Put { key, lsn: READY, value };
    let counters = Value::Image(Bytes::from_static(&[0; CheckPoint::SIZE]));
    let zeroes = first_record().1.into_iter().map(|(number, _)| put(Key::page(page_tag(number)), Value::ZERO_PAGE));
    let trails =
        (0..TRAILS).map(|number| put(Key::page(trail_tag(number)), Value::Image(fresh_page().to_vec().into())));
    let others = [put(Key::CHECKPOINT, counters), put(Key::rel_size(REL), Value::rel_size(100))];
    zeroes.chain(trails).chain(others).collect()
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
            wal: vec![Wal::new(READY)],
            trails: vec![Trails::default()],
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

    /// Some values, and often more of a page that grows.
    fn record(&mut self, index: usize) {
        let wal = &mut self.wal[index];
        let values: Vec<(u8, Option<u8>)> = (0..1 + self.rng.below(4))
            .map(|_| (self.rng.below(KEYS.into()) as u8, self.rng.chance(80).then(|| self.rng.below(256) as u8)))
            .collect();
        for (number, content) in &values {
            match number {
                0..FIRST_PAGE => wal.file(&path(*number), content.as_slice()),
                _page => wal.image(page_tag(*number), &[content.unwrap_or(0); PAGE_BYTES]),
            };
        }
        let number = self.rng.below(TRAILS);
        for _ in 0..self.rng.below(40) {
            self.trails[index].step(wal, number, &mut self.rng);
        }
        let lsn = wal.end();
        self.model.branches[index].records.push((lsn, values));
    }

    /// The branch on a pageserver, with all records that there are: safekeepers have those that were not reported.
    async fn fed(&mut self, index: usize, of_zombie: bool) -> Result<Arc<Branch>, StorageError> {
        // Ancestors must have what this one inherits, as their WAL streams would see to; ingestion starts from it.
        let parents = |index: &usize| self.model.branches[*index].parent.map(|(parent, _)| parent);
        let mut line: Vec<usize> = std::iter::successors(parents(&index), parents).collect();
        while let Some(ancestor) = line.pop() {
            self.fed_alone(ancestor, of_zombie).await?;
        }
        self.fed_alone(index, of_zombie).await
    }

    async fn fed_alone(&mut self, index: usize, of_zombie: bool) -> Result<Arc<Branch>, StorageError> {
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
            if from < READY {
                branch.apply(first_puts(), tip(READY));
            }
            let wal = self.wal[index].since(from.max(READY));
            if !wal.is_empty() {
                branch.ingest_wal(from.max(READY), wal).await?;
            }
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
                self.wal.push(Wal::new(at));
                self.trails.push(Trails::default());
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
        let number = self.rng.below(usize::from(KEYS) + TRAILS) as u8;
        let expected = self.expected(index, number, at);
        let what = format!("{} key {number} at {at}", self.model.branches[index].name);
        let mut last = String::new();
        for _ in 0..READ_ATTEMPTS {
            match self.read(index, number, at).await {
                Ok(read) if read == expected => return,
                Ok(read) => {
                    let differ = read.iter().zip(&expected).position(|(read, expected)| read != expected);
                    return self.wrong.push(format!("{what}: differs at {differ:?} ({} bytes)", read.len()));
                }
                Err(error @ StorageError::Damaged { .. }) => {
                    let name = self.model.branches[index].name.clone();
                    let Ok(branch) = self.owner.branches.get(&name).await else { continue };
                    // Removed objects go at once here, so a read may meet its own pageserver's compaction.
                    if let Err(error @ StorageError::Damaged { .. }) = branch.or_stale(Err::<(), _>(error)).await {
                        return self.wrong.push(format!("{what}: {error}"));
                    }
                }
                // A listing that lags does not show a branch that was just made.
                Err(
                    error @ (StorageError::Store { .. }
                    | StorageError::Deposed { .. }
                    | StorageError::NotArrived { .. }
                    | StorageError::Stale(_)
                    | StorageError::NoBranch(_)),
                ) => last = error.to_string(),
                Err(error) => return self.wrong.push(format!("{what}: {error}")),
            }
        }
        self.wrong.push(format!("{what}: no answer, {last}"));
    }

    /// A file's content; a page without its LSN.
    fn expected(&self, index: usize, number: u8, at: Lsn) -> Vec<u8> {
        if number >= KEYS {
            return self.trail(index, usize::from(number - KEYS), at)[8..].to_vec();
        }
        let content = self.model.read(index, number, at);
        if number < FIRST_PAGE { Vec::from_iter(content) } else { vec![content.unwrap_or(0); PAGE_BYTES - 8] }
    }

    fn trail(&self, index: usize, number: usize, at: Lsn) -> Box<[u8; PAGE_BYTES]> {
        let mut page = match self.model.branches[index].parent {
            Some((parent, lsn)) => self.trail(parent, number, at.min(lsn)),
            None => Box::new(fresh_page()),
        };
        self.trails[index].apply(number, at, &mut page);
        page
    }

    async fn read(&mut self, index: usize, number: u8, at: Lsn) -> Result<Vec<u8>, StorageError> {
        let branch = self.fed(index, false).await?;
        if number < FIRST_PAGE {
            let stored = branch.read_value(Key::aux_file(&path(number)), at).await?;
            let file = stored.map(|bytes| postcard::from_bytes::<AuxFile>(&bytes).expect("a file"));
            return Ok(file.map_or(Vec::new(), |file| file.content.to_vec()));
        }
        let tag = if number < KEYS { page_tag(number) } else { trail_tag((number - KEYS).into()) };
        let page = branch.get_pages(&[tag], at).await?.remove(0);
        assert_eq!(page.len(), PAGE_BYTES);
        Ok(page[8..].to_vec())
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

    /// Nothing computes any more when the runtime ends.
    async fn stop(&self) {
        for pageserver in std::iter::once(&self.owner).chain(&self.zombie) {
            pageserver.branches.stop_background(Instant::now() + Duration::from_secs(60)).await;
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
            world.stop().await;
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
