//! The branches that are attached, and making and removing branches.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use parking_lot::Mutex;
use tokio::{
    sync::OnceCell,
    time::{Instant, MissedTickBehavior, interval, timeout_at},
};
use tokio_util::sync::CancellationToken;
use types::{BranchId, BranchRef, Generation, Lsn, ProjectId};
use wire::pageserver::{BranchPoint, GarbageReport};

use super::{Branch, Shared, branch_point};
use crate::{
    error::StorageError,
    remote::{Ancestor, BranchNames, Manifest},
};

/// How often idle branches are looked for.
const HOUSEKEEPING_INTERVAL: Duration = Duration::from_secs(10);
/// Branches that are written out at a time at the end.
const CONCURRENT_FLUSHES: usize = 16;

/// Children whose manifests are looked at a time.
const CONCURRENT_CHECKS: usize = 16;
/// Children that a refusal names.
const NAMED_CHILDREN: usize = 10;

type Slot = Arc<OnceCell<Arc<Branch>>>;

/// All branches that this pageserver has attached.
pub struct Branches {
    shared: Arc<Shared>,
    /// Grows when a project is taken over.
    generation: AtomicU32,
    /// Projects that were elsewhere when this pageserver started.
    taken_over: Mutex<HashSet<ProjectId>>,
    slots: Mutex<HashMap<BranchRef, Slot>>,
    /// Branches whose children or existence are being changed.
    changing: Mutex<HashSet<BranchRef>>,
    changed: tokio::sync::Notify,
}

impl Branches {
    /// Under which generation branches that are attached now are written.
    pub fn generation(&self) -> Generation {
        Generation(self.generation.load(Ordering::Acquire))
    }

    /// Serves a project from now on that another pageserver may still believe to be its own: claims each of its branches
    /// under a generation higher than any before. When this returns, nothing that the other one writes counts any more.
    /// Errors leave the branches claimed that were; repeating it is harmless.
    pub async fn take_over(self: &Arc<Self>, project: &ProjectId, generation: Generation) -> Result<(), StorageError> {
        self.generation.fetch_max(generation.0, Ordering::AcqRel);
        self.taken_over.lock().insert(project.clone());
        // Branches of this project that were attached under an older generation would be deposed by our own claims.
        for branch in self.attached().into_iter().filter(|branch| branch.name().project == *project) {
            branch.retire();
        }
        let names = self.shared.remote.list_below(&BranchNames::all_of(project)).await?;
        let branches = names.iter().filter_map(|name| name.parse::<BranchId>().ok());
        let claims: Vec<_> =
            branches.map(|branch| self.clone().claim_branch(BranchRef { project: project.clone(), branch })).collect();
        let claimed: Vec<()> = futures::stream::iter(claims).buffer_unordered(CONCURRENT_CHECKS).try_collect().await?;
        tracing::info!(%project, %generation, branches = claimed.len(), "project taken over");
        Ok(())
    }

    async fn claim_branch(self: Arc<Self>, name: BranchRef) -> Result<(), StorageError> {
        match self.get(&name).await {
            Ok(branch) => branch.claim_now().await,
            // What a deletion left over.
            Err(StorageError::NoBranch(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// None is attached yet.
    pub fn new(shared: Arc<Shared>) -> Arc<Branches> {
        let slots = Mutex::new(HashMap::new());
        let generation = AtomicU32::new(shared.generation.0);
        let taken_over = Mutex::default();
        Arc::new(Branches {
            shared,
            generation,
            taken_over,
            slots,
            changing: Default::default(),
            changed: Default::default(),
        })
    }

    /// What all branches share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The branch, attached from the object store if it is not.
    pub async fn get(self: &Arc<Self>, name: &BranchRef) -> Result<Arc<Branch>, StorageError> {
        let slot = self.slots.lock().entry(name.clone()).or_default().clone();
        let attached = slot.get_or_try_init(async || self.attach(name).await).await;
        match attached {
            Ok(branch) => {
                branch.touch();
                Ok(branch.clone())
            }
            Err(error) => {
                let mut slots = self.slots.lock();
                if slots.get(name).is_some_and(|known| Arc::ptr_eq(known, &slot) && !known.initialized()) {
                    slots.remove(name);
                }
                Err(error)
            }
        }
    }

    async fn attach(self: &Arc<Self>, name: &BranchRef) -> Result<Arc<Branch>, StorageError> {
        if self.shared.elsewhere.contains(&name.project) && !self.taken_over.lock().contains(&name.project) {
            return Err(StorageError::Elsewhere(name.project.clone()));
        }
        let (generation, manifest) =
            self.shared.remote.manifest(name).await?.ok_or_else(|| StorageError::NoBranch(name.clone()))?;
        let own = self.generation();
        if generation > own {
            return Err(StorageError::Deposed { branch: name.clone(), own: own.0, newer: generation.0 });
        }
        tracing::debug!(branch = %name, lsn = %manifest.remote_consistent_lsn, "branch attached");
        Ok(Branch::attach(name.clone(), manifest, self.shared.clone(), own, Arc::downgrade(self)))
    }

    /// The branch if it is attached. Does not count as using it.
    pub(super) fn peek(&self, name: &BranchRef) -> Option<Arc<Branch>> {
        self.slots.lock().get(name).and_then(|slot| slot.get().cloned())
    }

    /// The next asker attaches the branch anew.
    pub(super) fn forget(&self, branch: &Branch) {
        let mut slots = self.slots.lock();
        let same = |slot: &Slot| slot.get().is_some_and(|known| known.id() == branch.id());
        if slots.get(branch.name()).is_some_and(same) {
            slots.remove(branch.name());
        }
    }

    /// Makes a child. Repeating the call answers the same; another ancestor or position is a conflict.
    pub async fn create(
        self: &Arc<Self>,
        name: &BranchRef,
        ancestor: &BranchRef,
        at: BranchPoint,
    ) -> Result<Lsn, StorageError> {
        if name == ancestor {
            return Err(StorageError::Invalid(format!("branch {name} can't be its own child")));
        }
        let parent = self.get(ancestor).await?;
        if let Some((_, existing)) = self.shared.remote.manifest(name).await? {
            return same_branch(name, &existing, ancestor, at);
        }
        let (lsn, prev_record_lsn) = leave_point(&parent, at).await?;
        // Waiting for WAL is over: only now are others kept from changing the two.
        let _changing = self.lock_for_change([name, ancestor]).await;
        if let Some((_, existing)) = self.shared.remote.manifest(name).await? {
            return same_branch(name, &existing, ancestor, at);
        }
        if parent.is_let_go() {
            return Err(StorageError::Stale(ancestor.clone()));
        }
        // Now that no garbage can be collected.
        if !parent.is_kept(lsn) {
            return Err(parent.outside_history(lsn));
        }
        let child_ancestor = Ancestor { branch: ancestor.clone(), lsn };
        let tip = parent.tip();
        let manifest = Manifest {
            logical_bytes: if tip.last_record_lsn == lsn { parent.logical_bytes_at(tip) } else { None },
            ..Manifest::new(Some(child_ancestor), lsn, prev_record_lsn)
        };
        let names = BranchNames::new(name);
        let object = names.manifest(self.generation());
        let encoded = manifest
            .encode()
            .map_err(|error| StorageError::Store { object: object.to_string(), reason: error.to_string() })?;
        // Registered first: a parent must not be removed under a child.
        self.shared.remote.put(&BranchNames::new(ancestor).child(name, lsn), Bytes::new()).await?;
        self.shared.remote.put(&object, encoded.into()).await?;
        tracing::info!(branch = %name, %ancestor, %lsn, "branch created");
        tokio::spawn(self.clone().copy_manifest(name.clone(), self.generation()));
        Ok(lsn)
    }

    /// Removes a branch without children and all its objects. Harmless when there is none.
    pub async fn delete(self: &Arc<Self>, name: &BranchRef) -> Result<(), StorageError> {
        let _changing = self.lock_for_change([name, name]).await;
        let remote = &self.shared.remote;
        let names = BranchNames::new(name);
        let manifest = remote.manifest(name).await?;
        let children = self.children(&names, name, Lsn::MAX).await?;
        if !children.is_empty() {
            let named: Vec<String> = children.iter().take(NAMED_CHILDREN).map(|(child, _)| child.to_string()).collect();
            let message = format!("branch {name} has {} child branches, such as {}", children.len(), named.join(", "));
            return Err(StorageError::Conflict(message));
        }
        let slot = self.slots.lock().remove(name);
        if let Some(branch) = slot.and_then(|slot| slot.get().cloned()) {
            branch.retire();
            // Whoever writes it out or compacts it now finishes first.
            drop(branch.compacting.lock().await);
            drop(branch.flush.lock().await);
        }
        for object in remote.list(names.root()).await? {
            remote.delete(&object).await?;
        }
        remote.delete_all(names.root()).await?;
        if let Some(ancestor) = manifest.and_then(|(_, manifest)| manifest.ancestor) {
            remote.delete(&BranchNames::new(&ancestor.branch).child(name, ancestor.lsn)).await?;
        }
        tracing::info!(branch = %name, "branch deleted");
        Ok(())
    }

    /// Registered children that left before `before` and exist, and where they left. Registrations without a branch
    /// (creation was interrupted) are removed. The caller has locked the parent for change.
    async fn children(
        &self,
        names: &BranchNames,
        parent: &BranchRef,
        before: Lsn,
    ) -> Result<Vec<(BranchRef, Lsn)>, StorageError> {
        let remote = &self.shared.remote;
        let registered = remote.list(&names.children()).await?;
        let checks = registered.into_iter().filter_map(|object| {
            let (child, lsn) = BranchNames::child_of(&object).filter(|(_, lsn)| *lsn < before)?;
            Some(async move {
                let ancestor = remote.manifest(&child).await?.and_then(|(_, manifest)| manifest.ancestor);
                if ancestor.is_some_and(|ancestor| ancestor.branch == *parent && ancestor.lsn == lsn) {
                    return Ok(Some((child, lsn)));
                }
                remote.delete(&object).await.map(|()| None)
            })
        });
        let checked = futures::stream::iter(checks).buffer_unordered(CONCURRENT_CHECKS);
        checked.try_filter_map(|child| std::future::ready(Ok(child))).try_collect().await
    }

    /// Lets go what only positions from before `since_us` need, but for those at which children left and those of `leases`.
    pub async fn collect_garbage(
        self: &Arc<Self>,
        name: &BranchRef,
        since_us: i64,
        leases: &[Lsn],
    ) -> Result<GarbageReport, StorageError> {
        let branch = self.get(name).await?;
        let cutoff = branch.window_start(since_us).await?;
        let _changing = self.lock_for_change([name, name]).await;
        let names = BranchNames::new(name);
        let cutoff = cutoff.min(branch.remote_consistent_lsn()).max(branch.gc_cutoff());
        let children: Vec<Lsn> =
            self.children(&names, name, cutoff).await?.into_iter().map(|(_, left_at)| left_at).collect();
        branch.make_images_for_collection(cutoff, &children, leases).await?;
        let collected = branch.collect_garbage(cutoff, &children, leases).await?;
        Ok(GarbageReport {
            start_lsn: branch.gc_cutoff(),
            last_record_lsn: branch.tip().last_record_lsn,
            is_held: !children.is_empty(),
            removed_layers: collected.layers as u64,
            removed_bytes: collected.bytes,
        })
    }

    /// Gives a branch all its data to itself. Harmless when it has no ancestor.
    pub async fn detach(self: &Arc<Self>, name: &BranchRef) -> Result<(), StorageError> {
        let branch = self.get(name).await?;
        let Some(ancestor) = branch.ancestor() else { return Ok(()) };
        // Waits until the ancestor has all WAL up to there.
        branch.ancestor_ready().await?;
        let _changing = self.lock_for_change([name, name]).await;
        let children = self.children(&BranchNames::new(name), name, branch.gc_cutoff()).await?;
        let held: Vec<Lsn> = children.into_iter().map(|(_, lsn)| lsn).chain(branch.held_lsns()).collect();
        branch.copy_ancestors(&held).await?;
        self.shared.remote.delete(&BranchNames::new(&ancestor.branch).child(name, ancestor.lsn)).await?;
        tracing::info!(branch = %name, ancestor = %ancestor.branch, "branch detached from its ancestor");
        Ok(())
    }

    /// Waits until nobody else changes one of these, and keeps others waiting until the guard is dropped.
    async fn lock_for_change(self: &Arc<Self>, names: [&BranchRef; 2]) -> ChangeGuard {
        loop {
            let freed = self.changed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            if self.try_lock_for_change(names) {
                return ChangeGuard { branches: self.clone(), names: names.map(BranchRef::clone) };
            }
            freed.await;
        }
    }

    fn try_lock_for_change(&self, names: [&BranchRef; 2]) -> bool {
        let mut changing = self.changing.lock();
        let free = names.iter().all(|name| !changing.contains(*name));
        if free {
            changing.extend(names.map(BranchRef::clone));
        }
        free
    }

    /// Drops branches from memory that nobody has asked about for long. Runs until cancelled.
    pub async fn keep_house(self: Arc<Self>, shutdown: CancellationToken) {
        let mut tick = interval(HOUSEKEEPING_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = tick.tick() => self.detach_idle(),
            }
        }
    }

    /// So that the next one who attaches the branch needs one round trip. Failing to costs no more than that.
    async fn copy_manifest(self: Arc<Self>, name: BranchRef, generation: Generation) {
        // Nobody deletes it meanwhile: nothing must be left of a deleted branch.
        let _changing = self.lock_for_change([&name, &name]).await;
        if let Err(error) = self.shared.remote.copy_manifest(&name, generation).await {
            tracing::debug!(branch = %name, %error, "the manifest was not copied");
        }
    }

    fn detach_idle(self: &Arc<Self>) {
        let limit = self.shared.tuning.idle_detach;
        self.slots.lock().retain(|name, slot| {
            let Some(branch) = slot.get() else { return true };
            let unused = branch.last_used.lock().elapsed() >= limit;
            // Nobody else can take a handle while the slots are locked.
            let alone = Arc::strong_count(branch) == 1 && Arc::strong_count(slot) == 1;
            let detach = unused && alone && branch.is_clean() && !branch.has_feed();
            if detach {
                tracing::debug!(branch = %name, "branch detached, nobody asks");
                if branch.copy_is_old.load(Ordering::Acquire) {
                    tokio::spawn(self.clone().copy_manifest(name.clone(), branch.generation()));
                }
            }
            !detach
        });
    }

    /// Closes all streams and writes everything out, until `deadline`. What is not written by then is ingested again.
    pub async fn shut_down(&self, deadline: Instant) {
        let attached: Vec<_> = self.slots.lock().values().filter_map(|slot| slot.get().cloned()).collect();
        attached.iter().for_each(|branch| branch.close_feed());
        let flushes = attached.into_iter().filter(|branch| !branch.is_clean()).map(|branch| async move {
            match timeout_at(deadline, branch.flush()).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::warn!(branch = %branch.name(), %error, "not written out at the end"),
                Err(_) => tracing::warn!(branch = %branch.name(), "not written out in time"),
            }
        });
        futures::stream::iter(flushes).buffer_unordered(CONCURRENT_FLUSHES).collect::<Vec<()>>().await;
        self.stop_background(deadline).await;
    }

    /// Ends merges and the like, and waits for that until `deadline`. What they have not finished is done again by whoever
    /// has the branches next.
    pub async fn stop_background(&self, deadline: Instant) {
        self.shared.background.stop(deadline).await;
    }

    /// The attached branches.
    pub fn attached(&self) -> Vec<Arc<Branch>> {
        self.slots.lock().values().filter_map(|slot| slot.get().cloned()).collect()
    }
}

struct ChangeGuard {
    branches: Arc<Branches>,
    names: [BranchRef; 2],
}

impl Drop for ChangeGuard {
    fn drop(&mut self) {
        let mut changing = self.branches.changing.lock();
        changing.retain(|name| !self.names.contains(name));
        drop(changing);
        self.branches.changed.notify_waiters();
    }
}

fn same_branch(
    name: &BranchRef,
    existing: &Manifest,
    ancestor: &BranchRef,
    at: BranchPoint,
) -> Result<Lsn, StorageError> {
    match &existing.ancestor {
        Some(known) if known.branch == *ancestor => {
            let same_point = match at {
                BranchPoint::Head => true,
                BranchPoint::Lsn(lsn) => branch_point(lsn) == known.lsn || lsn == known.lsn,
            };
            if same_point {
                return Ok(known.lsn);
            }
            Err(StorageError::Conflict(format!("branch {name} exists, from {ancestor} at {}", known.lsn)))
        }
        _ => Err(StorageError::Conflict(format!("branch {name} exists and is not a child of {ancestor}"))),
    }
}

/// The exact position at which a child leaves, and the start of the record before it if that is known.
async fn leave_point(parent: &Arc<Branch>, at: BranchPoint) -> Result<(Lsn, Lsn), StorageError> {
    let lsn = match at {
        BranchPoint::Head => parent.tip().last_record_lsn,
        BranchPoint::Lsn(lsn) if lsn < parent.start_lsn() => return Err(parent.outside_history(lsn)),
        BranchPoint::Lsn(lsn) => {
            let point = branch_point(lsn).max(parent.start_lsn());
            match parent.wait_for(point).await {
                Err(StorageError::NotArrived { .. }) => return Err(parent.outside_history(lsn)),
                other => other?,
            }
            point
        }
    };
    let tip = parent.tip();
    let prev = if tip.last_record_lsn == lsn { tip.prev_record_lsn } else { Lsn::INVALID };
    Ok((lsn, prev))
}
