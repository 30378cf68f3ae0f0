//! Writing a branch out: memory layers to delta layers, then the manifest, then the report to the safekeepers.

use std::sync::{Arc, atomic::Ordering};

use bytes::Bytes;
use object_store::path::Path;
use tokio::time::Instant;
use types::{Generation, Lsn};

use super::{Branch, Frozen, Tip, collect::Doomed};
use crate::{
    compaction::is_full,
    error::StorageError,
    layer::{BuiltLayer, Layer, LayerKind, LayerMeta},
    remote::{BranchNames, Manifest},
    storage::Key,
};

/// What the one who writes a branch out knows.
pub(super) struct FlushState {
    /// This generation's claim is in the object store and the branch was not changed by another since it was attached.
    claimed: bool,
    older_removed: bool,
    /// What the attached manifest said.
    attached: Manifest,
    last_flush: Instant,
    pub(super) doomed: Vec<Doomed>,
    /// The claim or manifest that was put last, and the store's tag of it.
    last_put: Option<(Path, Option<String>)>,
    /// The layers hold all that the ancestor had: the manifest names none.
    pub(super) detached: bool,
}

impl FlushState {
    pub(super) fn new(manifest: &Manifest) -> FlushState {
        let attached = manifest.clone();
        let now = Some(Instant::now());
        let doomed = manifest.doomed_layers.iter().map(|name| Doomed { name: name.clone(), since: now }).collect();
        FlushState {
            doomed,
            last_put: None,
            detached: false,
            claimed: false,
            older_removed: false,
            attached,
            last_flush: Instant::now(),
        }
    }
}

impl Branch {
    /// Writes everything ingested so far to the object store and tells the safekeepers. Answers up to where the object store
    /// now holds everything.
    pub async fn flush(self: &Arc<Self>) -> Result<Lsn, StorageError> {
        self.freeze();
        self.write_frozen().await
    }

    /// Writes the memory layers that are frozen now to the object store, while layers are merged in the background: waits
    /// for that only while there are too many small ones.
    pub(super) async fn write_frozen(self: &Arc<Self>) -> Result<Lsn, StorageError> {
        let written = self.write_frozen_here().await;
        self.or_stale(written).await
    }

    async fn write_frozen_here(self: &Arc<Self>) -> Result<Lsn, StorageError> {
        let goal = {
            let state = self.state.read();
            state.frozen.back().map_or(state.frozen_tip, |frozen| frozen.tip).last_record_lsn
        };
        while !self.is_written(goal) {
            self.write_out().await?;
            self.compact_in_background();
            if !self.is_written(goal) {
                self.room_in_level_0().await?;
            }
        }
        self.compact_in_background();
        Ok(self.remote_consistent_lsn())
    }

    fn is_written(&self, goal: Lsn) -> bool {
        let state = self.state.read();
        let waits = state.frozen.front().is_some_and(|frozen| frozen.tip.last_record_lsn <= goal);
        !waits && state.remote_consistent_lsn >= goal
    }

    /// Returns when level 0 is not full any more.
    async fn room_in_level_0(self: &Arc<Self>) -> Result<(), StorageError> {
        let is_full = || is_full(self.state.read().layers.iter().map(|layer| &layer.meta));
        while is_full() {
            let changed = self.layers_changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if !is_full() {
                break;
            }
            tokio::select! {
                () = changed => {}
                // What is going on there goes on if we leave.
                compacted = self.compact() => compacted?,
            }
        }
        Ok(())
    }

    /// Writes out what there is room for in level 0, then the manifest.
    async fn write_out(self: &Arc<Self>) -> Result<(), StorageError> {
        let mut flush = self.flush.lock().await;
        let frozen_lsn = self.state.read().frozen_tip.last_record_lsn;
        if self.frozen_layers() == 0 && self.is_written(frozen_lsn) {
            return Ok(());
        }
        self.claim(&mut flush).await?;
        while let Some(frozen) = self.oldest_frozen() {
            if is_full(self.state.read().layers.iter().map(|layer| &layer.meta)) {
                break;
            }
            let layer = self.upload_frozen(&frozen).await?;
            self.replace_frozen(layer, frozen.tip);
        }
        let tip = self.state.read().frozen_tip;
        self.write_manifest(&mut flush, tip).await?;
        flush.last_flush = Instant::now();
        self.report_consistent(&flush, tip.last_record_lsn).await?;
        self.remove_doomed(&mut flush).await?;
        self.remove_older_generations(&mut flush).await;
        Ok(())
    }

    /// Once the own manifest is there, those of older generations are of no use. Failing to is only logged.
    pub(super) async fn remove_older_generations(&self, flush: &mut FlushState) {
        if std::mem::replace(&mut flush.older_removed, true) {
            return;
        }
        let remote = &self.shared.remote;
        let found = remote.list(self.names.root()).await.unwrap_or_default();
        let numbered =
            |object| BranchNames::generation_of_manifest(object).or(BranchNames::generation_of_claim(object));
        for object in found.iter().filter(|object| numbered(object).is_some_and(|old| old < self.generation)) {
            if let Err(error) = remote.delete(object).await {
                tracing::debug!(branch = %self.name, %error, "an older generation's object stays");
            }
        }
    }

    /// Readers find the layer instead of the oldest frozen memory layer.
    fn replace_frozen(&self, layer: Option<Arc<Layer>>, tip: Tip) {
        {
            let mut state = self.state.write();
            state.layers = Arc::new(state.layers.with(layer));
            state.frozen.pop_front();
            state.frozen_tip = tip;
            self.count_memory(&state);
        }
        self.layers_changed.notify_waiters();
    }

    /// Turns the open memory layer into a frozen one; readers go on seeing it.
    pub(super) fn freeze(&self) {
        let mut state = self.state.write();
        let before = state.frozen.back().map_or(state.frozen_tip, |frozen| frozen.tip);
        if state.open.is_empty() && state.tip == before {
            return;
        }
        let values = std::mem::take(&mut state.open);
        let frozen = Frozen { values, start_lsn: before.last_record_lsn, tip: state.tip };
        state.frozen.push_back(Arc::new(frozen));
    }

    /// How many memory layers wait to be written.
    pub fn frozen_layers(&self) -> usize {
        self.state.read().frozen.len()
    }

    /// True when the object store holds everything that was ingested.
    pub fn is_clean(&self) -> bool {
        let state = self.state.read();
        let uploaded = state.frozen.is_empty() && state.open.is_empty();
        uploaded && state.tip.last_record_lsn == state.remote_consistent_lsn
    }

    /// When something was last written out (or the branch attached).
    pub(super) async fn last_flush(&self) -> Instant {
        self.flush.lock().await.last_flush
    }

    fn oldest_frozen(&self) -> Option<Arc<Frozen>> {
        self.state.read().frozen.front().cloned()
    }

    /// Makes the branch this generation's before there is anything to write.
    pub(super) async fn claim_now(&self) -> Result<(), StorageError> {
        let mut flush = self.flush.lock().await;
        self.claim(&mut flush).await
    }

    /// Once per attachment, before the first write: puts the claim, then makes sure that no newer generation has one
    /// and that the manifest is still the one that was attached. An older generation that finishes a write after that
    /// sees the claim and does not tell the safekeepers, so the WAL it wrote out stays for us.
    pub(super) async fn claim(&self, flush: &mut FlushState) -> Result<(), StorageError> {
        if self.is_let_go() {
            return Err(StorageError::Stale(self.name.clone()));
        }
        if flush.claimed {
            return Ok(());
        }
        let own = self.generation;
        let claim = self.names.claim(own);
        let tag = self.shared.remote.put(&claim, Bytes::new()).await?;
        flush.last_put = Some((claim, tag));
        let found = self.check_not_deposed(flush).await?;
        match self.shared.remote.manifest_among(&self.name, &found).await? {
            None => return Err(StorageError::NoBranch(self.name.clone())),
            Some((_, manifest)) if manifest == flush.attached => flush.claimed = true,
            Some((generation, _)) => {
                self.stop_ingest(format!("generation {generation} has written meanwhile; attach the branch again"));
                self.retire();
                return Err(StorageError::Deposed { branch: self.name.clone(), own: own.0, newer: generation.0 });
            }
        }
        Ok(())
    }

    /// True when somebody else has written to the branch or one it comes from since they were attached: what was read then
    /// may be gone. The next asker attaches them again.
    pub async fn forget_if_changed(&self) -> Result<bool, StorageError> {
        let mut changed = self.is_changed().await?;
        if let Some(ancestor) = self.known_ancestor() {
            changed |= Box::pin(ancestor.forget_if_changed()).await?;
        }
        if changed {
            let _nothing_is_written = self.flush.lock().await;
            self.retire();
        }
        Ok(changed)
    }

    /// When something stored is not as it should be: whether that is because others have taken its place while it was looked
    /// for, or because the branch is to be attached anew.
    pub async fn or_stale<T>(&self, outcome: Result<T, StorageError>) -> Result<T, StorageError> {
        match outcome {
            Err(StorageError::Damaged { object, .. })
                if self.has_replaced(&object) || self.forget_if_changed().await? =>
            {
                Err(StorageError::Stale(self.name.clone()))
            }
            other => other,
        }
    }

    /// True for a layer file of this branch or one it comes from in which nobody looks any more.
    fn has_replaced(&self, object: &str) -> bool {
        if !self.names.is_layer(object) {
            return self.known_ancestor().is_some_and(|ancestor| ancestor.has_replaced(object));
        }
        !self.state.read().layers.iter().any(|layer| layer.object().as_ref() == object)
    }

    async fn is_changed(&self) -> Result<bool, StorageError> {
        let flush = self.flush.lock().await;
        if flush.claimed {
            self.check_not_deposed(&flush).await?;
            return Ok(false);
        }
        let stored = self.shared.remote.manifest(&self.name).await?;
        Ok(stored.is_none_or(|(_, manifest)| manifest != flush.attached))
    }

    /// Errors when a newer generation has claimed the branch, or might have: the listing must be at least as new as what
    /// was put last. Whoever claims after that reads what was put. Answers what was listed.
    pub(super) async fn check_not_deposed(&self, flush: &FlushState) -> Result<Vec<Path>, StorageError> {
        let own = self.generation;
        let remote = &self.shared.remote;
        let found = match &flush.last_put {
            Some((object, tag)) => remote.list_since(self.names.root(), object, tag.as_deref()).await?,
            None => remote.list(self.names.root()).await?,
        };
        let claims = found.iter().filter_map(BranchNames::generation_of_claim);
        let manifests = found.iter().filter_map(BranchNames::generation_of_manifest);
        match claims.chain(manifests).max() {
            Some(newer) if newer > own => {
                self.stop_ingest(format!("generation {newer} has taken over from {own}"));
                self.retire();
                Err(StorageError::Deposed { branch: self.name.clone(), own: own.0, newer: newer.0 })
            }
            _ => Ok(found),
        }
    }

    async fn upload_frozen(self: &Arc<Self>, frozen: &Arc<Frozen>) -> Result<Option<Arc<Layer>>, StorageError> {
        let built = self.build_layer(frozen).await?;
        let Some(keys) = built.keys else { return Ok(None) };
        let end = frozen.tip.last_record_lsn.max(frozen.values.max_lsn());
        let layer = self.upload_layer(built, (LayerKind::Delta, 0), (frozen.start_lsn, end), keys).await?;
        Ok(Some(layer))
    }

    /// Puts a layer file; it counts once a manifest names it.
    pub(super) async fn upload_layer(
        &self,
        built: BuiltLayer,
        sort: (LayerKind, u8),
        lsns: (Lsn, Lsn),
        keys: (Key, Key),
    ) -> Result<Arc<Layer>, StorageError> {
        let number = self.shared.remote.next_layer_number();
        let (layer, bytes) = prepare_layer(&self.names, built, sort, lsns, keys, (self.generation, number));
        self.shared.remote.put(layer.object(), bytes.clone()).await?;
        self.shared.remote.disk.insert(layer.object(), bytes).await;
        tracing::debug!(branch = %self.name, layer = layer.meta.name, bytes = layer.meta.size_bytes, "layer uploaded");
        Ok(layer)
    }

    pub(super) async fn write_manifest(&self, flush: &mut FlushState, tip: Tip) -> Result<(), StorageError> {
        let (layers, cuts, gc_cutoff_lsn, held_lsns) = {
            let state = self.state.read();
            (state.layers.metas(), state.cuts.to_vec(), state.gc_cutoff_lsn, state.held_lsns.clone())
        };
        let manifest = Manifest {
            ancestor: self.ancestor().filter(|_| !flush.detached),
            start_lsn: self.start_lsn,
            remote_consistent_lsn: tip.last_record_lsn,
            prev_record_lsn: tip.prev_record_lsn,
            last_commit_us: tip.last_commit_us,
            logical_bytes: self.logical_bytes_at(tip),
            gc_cutoff_lsn,
            held_lsns,
            cuts,
            doomed_layers: flush.doomed.iter().map(|doomed| doomed.name.clone()).collect(),
            layers,
            ..flush.attached.clone()
        };
        let object = self.names.manifest(self.generation);
        let bytes = manifest
            .encode()
            .map_err(|error| StorageError::Store { object: object.to_string(), reason: error.to_string() })?;
        self.copy_is_old.store(true, Ordering::Release);
        let tag = self.shared.remote.put(&object, bytes.into()).await?;
        flush.last_put = Some((object, tag));
        let now = Instant::now();
        flush.doomed.iter_mut().for_each(|doomed| _ = doomed.since.get_or_insert(now));
        Ok(())
    }

    /// The manifest is written: publishes that, and lets safekeepers drop the WAL if we are still the owner.
    async fn report_consistent(&self, flush: &FlushState, lsn: Lsn) -> Result<(), StorageError> {
        self.state.write().remote_consistent_lsn = lsn;
        self.check_not_deposed(flush).await?;
        if let Some(feed) = self.feed.lock().as_ref() {
            feed.report(self.forgettable_lsn());
        }
        Ok(())
    }
}

/// The layer of a file that is to be uploaded, and the file. A delta holds the keys from first to last; an image speaks for
/// all between them.
pub fn prepare_layer(
    names: &BranchNames,
    built: BuiltLayer,
    (kind, level): (LayerKind, u8),
    (start_lsn, end_lsn): (Lsn, Lsn),
    (first_key, last_key): (Key, Key),
    (generation, sequence): (Generation, u64),
) -> (Arc<Layer>, Bytes) {
    let name = crate::remote::layer_name(generation, sequence, kind, start_lsn, end_lsn);
    let object = names.layer(&name);
    let meta = LayerMeta {
        name,
        kind,
        level,
        first_key,
        last_key,
        start_lsn,
        end_lsn,
        size_bytes: built.bytes.len() as u64,
        index_offset: built.index_offset,
        entries: built.entries,
    };
    (Layer::new(meta, object), built.bytes)
}
