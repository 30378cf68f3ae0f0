//! A branch: its values in memory and in layers, how far it has ingested WAL, and what its ancestor is.

mod background;
mod batch;
mod chains;
mod collect;
mod compaction;
mod detach;
mod flush;
mod history;
mod memory;
mod registry;
mod sizes;
mod wal_feed;
mod wal_reading;

pub use background::Background;
pub use batch::{BatchMark, Put, PutBatch, RawPlace};
pub use chains::MAX_CHAIN;
pub use collect::Collected;
pub use flush::prepare_layer;
pub use history::branch_point;
pub use memory::{IngestMemory, MemoryLayer};
pub use registry::Branches;
pub use wal_feed::WalSource;

use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use types::{BranchRef, Generation, Lsn, ProjectId};
use wire::pageserver::BaseFiles;

use crate::{
    compaction::PlanLimits,
    error::StorageError,
    ingest::Ingest,
    layer::{Layer, LayerSet},
    read::PageCache,
    remote::{Ancestor, BranchNames, Manifest, Remote},
    storage::Key,
};

/// What all branches of a pageserver share.
pub struct Shared {
    /// The object store.
    pub remote: Arc<Remote>,
    /// Pages as they were last made.
    pub pages: PageCache,
    /// Under which generation this pageserver started; see [`Branches::generation`] for that of now.
    pub generation: Generation,
    /// Projects that other pageservers serve.
    pub elsewhere: HashSet<ProjectId>,
    /// Sizes and times.
    pub tuning: Tuning,
    /// How much of what was ingested is in memory.
    pub ingest_memory: IngestMemory,
    /// Where WAL comes from; `None`: nowhere (tests feed bytes themselves).
    pub wal: Option<WalSource>,
    /// Long computations.
    pub background: Background,
}

/// Sizes and times that tests and flags set.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// Values in memory are written out when they take this much. Default 128 MiB.
    pub checkpoint_distance_bytes: usize,
    /// And when all branches together have more than this in memory. Default 1 GiB.
    pub ingest_memory_bytes: usize,
    /// And when no WAL has come for so long. Default 5 s.
    pub idle_flush: Duration,
    /// And at the latest so long after the last time. Default 60 s.
    pub max_unflushed: Duration,
    /// A WAL stream without progress and without anybody who asks is closed after this. Default 60 s.
    pub idle_close: Duration,
    /// A branch nobody asks about is dropped from memory after this. Default 5 min.
    pub idle_detach: Duration,
    /// Longest wait for WAL on behalf of a request. Default 30 s.
    pub wal_wait: Duration,
    /// The most WAL that a replication slot keeps on the safekeepers. Default 2 GiB.
    pub max_slot_wal_bytes: u64,
    /// When layers are merged and images made.
    pub plan: PlanLimits,
    /// Layers that compaction makes are cut at this size. Default 64 MiB.
    pub layer_bytes: usize,
    /// An object that no manifest names any more is deleted after this, so that whoever reads it now can finish. Default
    /// 10 min.
    pub removal_delay: Duration,
}

impl Default for Tuning {
    fn default() -> Tuning {
        Tuning {
            checkpoint_distance_bytes: 128 << 20,
            ingest_memory_bytes: 1 << 30,
            idle_flush: Duration::from_secs(5),
            max_unflushed: Duration::from_secs(60),
            idle_close: Duration::from_secs(60),
            idle_detach: Duration::from_secs(300),
            wal_wait: Duration::from_secs(30),
            max_slot_wal_bytes: 2 << 30,
            plan: PlanLimits::default(),
            layer_bytes: 64 << 20,
            removal_delay: Duration::from_secs(600),
        }
    }
}

/// All WAL may go, as far as replication slots are concerned.
const NO_SLOT_NEEDS_WAL: u64 = u64::MAX;

/// A branch that is attached to this pageserver.
pub struct Branch {
    name: BranchRef,
    /// Unique in this process: names the branch in caches.
    id: u64,
    shared: Arc<Shared>,
    /// Under which generation it is written.
    generation: Generation,
    registry: Weak<Branches>,
    names: BranchNames,
    /// `None` from the start (a template) or since it was detached.
    ancestor: RwLock<Option<Ancestor>>,
    /// As it was last attached; looked for again once it is let go.
    attached_ancestor: RwLock<Option<Arc<Branch>>>,
    start_lsn: Lsn,
    state: RwLock<State>,
    progress: watch::Sender<Progress>,
    /// Memory was written out, or layers were put in place of others.
    layers_changed: Notify,
    /// What the branch has in memory, as counted in [`Shared::ingest_memory`].
    counted_bytes: AtomicUsize,
    /// Who ingests holds it; `None` until the first WAL.
    ingest: tokio::sync::Mutex<Option<Box<Ingest>>>,
    flush: tokio::sync::Mutex<flush::FlushState>,
    /// Held by the one who merges layers and makes images. Taken before `flush`.
    compacting: tokio::sync::Mutex<()>,
    feed: Mutex<Option<wal_feed::Feed>>,
    /// Somebody makes the images that memory waits for.
    shortening: AtomicBool,
    last_used: Mutex<Instant>,
    base_files: Mutex<Option<Arc<BaseFiles>>>,
    logical_bytes: AtomicU64,
    logical_bytes_known: AtomicBool,
    /// It takes no WAL and writes nothing any more: the branch is deleted, or is to be attached anew. Set while `flush` is held,
    /// so that no write goes on when somebody else attaches it.
    let_go: AtomicBool,
    /// Where the WAL begins that replication slots still need; [`NO_SLOT_NEEDS_WAL`], or 0 until that is known.
    slots_need: AtomicU64,
    /// The manifest was written since it was copied to where attaching looks first.
    copy_is_old: AtomicBool,
}

/// What changes as WAL is ingested. Held locked only for moments.
struct State {
    open: MemoryLayer,
    /// Oldest first; being written out.
    frozen: VecDeque<Arc<Frozen>>,
    layers: Arc<LayerSet>,
    /// Where cells of keys begin that are compacted apart.
    cuts: Arc<[Key]>,
    /// As of the last whole record ingested.
    tip: Tip,
    /// As of the newest frozen layer, or the manifest.
    frozen_tip: Tip,
    remote_consistent_lsn: Lsn,
    /// Layers that only older positions need may be gone.
    gc_cutoff_lsn: Lsn,
    /// Positions before the cutoff that children and leases keep readable.
    held_lsns: Vec<Lsn>,
}

impl State {
    fn memory_bytes(&self) -> usize {
        self.open.bytes() + self.frozen.iter().map(|frozen| frozen.values.bytes()).sum::<usize>()
    }
}

impl Drop for Branch {
    fn drop(&mut self) {
        self.shared.ingest_memory.change(*self.counted_bytes.get_mut(), 0);
    }
}

/// A memory layer that gets no more values.
struct Frozen {
    values: MemoryLayer,
    start_lsn: Lsn,
    tip: Tip,
}

/// What must be known at the end of ingested WAL to go on from there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tip {
    /// End of the last record.
    pub last_record_lsn: Lsn,
    /// Start of the last record; invalid when not known.
    pub prev_record_lsn: Lsn,
    /// Time of the latest commit among the branch's own records.
    pub last_commit_us: Option<i64>,
}

/// How far ingestion is, for those who wait.
#[derive(Clone, Debug)]
struct Progress {
    last_record_lsn: Lsn,
    /// Why ingestion stopped for good.
    stopped: Option<Arc<str>>,
    /// Why no safekeeper's WAL can be taken at the moment; it is tried again.
    rotten: Option<Arc<str>>,
    /// What the WAL's source complains of at the moment.
    trouble: Option<Arc<str>>,
    /// The end of committed WAL, when a safekeeper has told.
    commit_lsn: Option<Lsn>,
}

/// A consistent view for one read.
pub struct ReadView {
    /// The layers; what was in memory is already found.
    pub layers: Arc<LayerSet>,
}

impl std::fmt::Debug for Branch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Branch").field("name", &self.name).field("tip", &self.tip()).finish_non_exhaustive()
    }
}

impl Branch {
    /// From its manifest.
    fn attach(
        name: BranchRef,
        manifest: Manifest,
        shared: Arc<Shared>,
        generation: Generation,
        registry: Weak<Branches>,
    ) -> Arc<Branch> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let names = BranchNames::new(&name);
        let layers = manifest.layers.iter().map(|meta| Layer::new(meta.clone(), names.layer(&meta.name)));
        let tip = Tip {
            last_record_lsn: manifest.remote_consistent_lsn,
            prev_record_lsn: manifest.prev_record_lsn,
            last_commit_us: manifest.last_commit_us,
        };
        let state = State {
            open: MemoryLayer::default(),
            frozen: VecDeque::new(),
            layers: Arc::new(LayerSet::new(layers)),
            cuts: manifest.cuts.clone().into(),
            tip,
            frozen_tip: tip,
            remote_consistent_lsn: manifest.remote_consistent_lsn,
            gc_cutoff_lsn: manifest.gc_cutoff_lsn,
            held_lsns: manifest.held_lsns.clone(),
        };
        let last_record_lsn = tip.last_record_lsn;
        let progress = Progress { last_record_lsn, stopped: None, rotten: None, trouble: None, commit_lsn: None };
        let logical_bytes = manifest.logical_bytes;
        Arc::new(Branch {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            shared,
            generation,
            registry,
            names,
            ancestor: RwLock::new(manifest.ancestor.clone()),
            attached_ancestor: RwLock::new(None),
            start_lsn: manifest.start_lsn,
            state: RwLock::new(state),
            progress: watch::Sender::new(progress),
            layers_changed: Notify::new(),
            counted_bytes: AtomicUsize::new(0),
            ingest: tokio::sync::Mutex::new(None),
            flush: tokio::sync::Mutex::new(flush::FlushState::new(&manifest)),
            compacting: tokio::sync::Mutex::new(()),
            feed: Mutex::new(None),
            shortening: AtomicBool::new(false),
            last_used: Mutex::new(Instant::now()),
            base_files: Mutex::new(None),
            logical_bytes: AtomicU64::new(logical_bytes.unwrap_or(0)),
            logical_bytes_known: AtomicBool::new(logical_bytes.is_some()),
            let_go: AtomicBool::new(false),
            slots_need: AtomicU64::new(0),
            copy_is_old: AtomicBool::new(false),
            name,
        })
    }

    /// Which branch.
    pub fn name(&self) -> &BranchRef {
        &self.name
    }

    /// Names it in caches.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What all branches share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Under which generation it is written.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Where its own history starts.
    pub fn start_lsn(&self) -> Lsn {
        self.start_lsn
    }

    /// Where it left which branch.
    pub fn ancestor(&self) -> Option<Ancestor> {
        self.ancestor.read().clone()
    }

    /// As of the last whole record ingested.
    pub fn tip(&self) -> Tip {
        self.state.read().tip
    }

    /// Everything up to here is in the object store.
    pub fn remote_consistent_lsn(&self) -> Lsn {
        self.state.read().remote_consistent_lsn
    }

    /// Why ingestion stopped, when it did: for good, or until a safekeeper gives good WAL.
    pub fn ingest_error(&self) -> Option<String> {
        let progress = self.progress.borrow();
        progress.stopped.as_deref().or(progress.rotten.as_deref()).map(str::to_owned)
    }

    /// The last answer to a base files request.
    pub fn base_files_cache(&self) -> &Mutex<Option<Arc<BaseFiles>>> {
        &self.base_files
    }

    /// Notes that somebody asks.
    pub fn touch(&self) {
        *self.last_used.lock() = Instant::now();
    }

    /// The ancestor, attached and ingested up to where this branch left it; `None` for a template.
    pub async fn ancestor_ready(&self) -> Result<Option<(Arc<Branch>, Lsn)>, StorageError> {
        let Some(ancestor) = self.ancestor() else { return Ok(None) };
        let branch = match self.known_ancestor() {
            Some(branch) => branch,
            None => {
                let registry = self.registry.upgrade().ok_or(StorageError::Stopping)?;
                let attached = Box::pin(registry.get(&ancestor.branch)).await.map_err(|error| match error {
                    StorageError::NoBranch(missing) => StorageError::Damaged {
                        object: missing.to_string(),
                        reason: format!("the ancestor of {} is gone", self.name),
                    },
                    other => other,
                })?;
                *self.attached_ancestor.write() = Some(attached.clone());
                attached
            }
        };
        branch.touch();
        Box::pin(branch.wait_for(ancestor.lsn)).await?;
        Ok(Some((branch, ancestor.lsn)))
    }

    /// The ancestor as it was last attached, unless it was let go since: its layers may be gone.
    fn known_ancestor(&self) -> Option<Arc<Branch>> {
        self.attached_ancestor.read().clone().filter(|branch| !branch.is_let_go())
    }

    fn is_let_go(&self) -> bool {
        self.let_go.load(Ordering::Acquire)
    }

    /// Returns once everything up to `lsn` is ingested; opens the WAL stream for that if need be. Errors when it does
    /// not come in time or WAL could not be understood.
    pub async fn wait_for(self: &Arc<Self>, lsn: Lsn) -> Result<(), StorageError> {
        if self.progress.borrow().last_record_lsn >= lsn {
            return Ok(());
        }
        // In this order: a stream that is just ending is opened again if somebody waits.
        let mut progress = self.progress.subscribe();
        self.open_feed();
        let waiting = progress.wait_for(|now| now.last_record_lsn >= lsn || now.stopped.is_some() || self.is_let_go());
        let limit = self.shared.tuning.wal_wait;
        let outcome = tokio::time::timeout(limit, waiting).await.map(|now| now.map(|now| now.clone()));
        let now = match outcome {
            Ok(Ok(now)) => now,
            Ok(Err(_closed)) => return Err(StorageError::Stopping),
            Err(_elapsed) => {
                let now = self.progress.borrow().clone();
                return Err(StorageError::NotArrived {
                    branch: self.name.clone(),
                    wanted: lsn,
                    have: now.last_record_lsn,
                    waited_s: limit.as_secs(),
                    detail: now.trouble.map(|trouble| format!(": {trouble}")).unwrap_or_default(),
                });
            }
        };
        match now.stopped {
            _ if now.last_record_lsn >= lsn => Ok(()),
            Some(reason) => Err(self.stopped(now.last_record_lsn, &reason)),
            None => Err(StorageError::Stale(self.name.clone())),
        }
    }

    fn stopped(&self, at: Lsn, reason: &str) -> StorageError {
        StorageError::IngestStopped { branch: self.name.clone(), at, reason: reason.to_owned() }
    }

    /// Calls `look` with the memory layers, newest first, and returns the layers as they are at the same moment.
    pub fn view(&self, mut look: impl FnMut(&MemoryLayer)) -> ReadView {
        let state = self.state.read();
        look(&state.open);
        state.frozen.iter().rev().for_each(|frozen| look(&frozen.values));
        ReadView { layers: state.layers.clone() }
    }

    /// Stores the values of whole records up to the new tip.
    pub fn apply(&self, puts: impl IntoIterator<Item = Put>, tip: Tip) {
        self.apply_batch(&mut puts.into_iter().collect(), tip);
    }

    /// As [`Branch::apply`]; the batch is empty then.
    pub fn apply_batch(&self, batch: &mut PutBatch, tip: Tip) {
        {
            let mut state = self.state.write();
            let State { open, frozen, .. } = &mut *state;
            open.append(batch, |key| frozen.iter().rev().find_map(|frozen| frozen.values.chain(key)).unwrap_or(0));
            assert!(tip.last_record_lsn >= state.tip.last_record_lsn, "{}: ingestion went backwards", self.name);
            state.tip = tip;
            self.count_memory(&state);
        }
        self.progress.send_modify(|progress| progress.last_record_lsn = tip.last_record_lsn);
    }

    /// Counts what the branch has in memory now among that of all branches.
    fn count_memory(&self, state: &State) {
        let bytes = state.memory_bytes();
        let before = self.counted_bytes.swap(bytes, Ordering::Relaxed);
        self.shared.ingest_memory.change(before, bytes);
    }

    /// Bytes in the open memory layer, and in all.
    pub fn memory_bytes(&self) -> (usize, usize) {
        let state = self.state.read();
        (state.open.bytes(), state.memory_bytes())
    }

    /// Ends ingestion for good: reads beyond the last record get this error.
    pub fn stop_ingest(&self, reason: String) {
        tracing::error!(branch = %self.name, lsn = %self.tip().last_record_lsn, reason, "ingestion stopped");
        self.progress.send_modify(|progress| {
            progress.stopped.get_or_insert(reason.into());
        });
    }

    /// Up to where the safekeepers may forget WAL: the object store has everything before, and no replication slot needs
    /// it, whose compute would have to fetch it. Invalid until that is known.
    pub fn forgettable_lsn(&self) -> Lsn {
        self.remote_consistent_lsn().min(Lsn(self.slots_need.load(Ordering::Acquire)))
    }

    /// Publishes what ingestion knows of the branch as a whole.
    fn note_ingest(&self, ingest: &Ingest) {
        self.set_logical_bytes(ingest.logical_bytes());
        // Whole segments: a standby asks for WAL from a segment's start.
        let need = ingest.slots_need(self).map_or(NO_SLOT_NEEDS_WAL, |lsn| lsn.segment_start().0);
        self.slots_need.store(need, Ordering::Release);
    }

    /// Publishes the sum of all relations' sizes.
    pub fn set_logical_bytes(&self, bytes: u64) {
        self.logical_bytes.store(bytes, Ordering::Relaxed);
        self.logical_bytes_known.store(true, Ordering::Release);
    }

    /// The sum of all relations' sizes in bytes.
    pub async fn logical_bytes(self: &Arc<Self>) -> Result<u64, StorageError> {
        if !self.logical_bytes_known.load(Ordering::Acquire) {
            let mut ingest = self.ingest.lock().await;
            self.ingest_state(&mut ingest).await?;
        }
        Ok(self.logical_bytes.load(Ordering::Relaxed))
    }
}
