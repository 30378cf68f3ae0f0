//! Layers that no allowed read needs any more: out of the manifest first, out of the object store after a safe age.

use std::{collections::HashSet, sync::Arc};

use tokio::time::Instant;
use types::{Generation, Lsn};

use super::{Branch, flush::FlushState};
use crate::{
    compaction::{GcInput, cells, garbage, images_pay},
    error::StorageError,
    layer::{Layer, LayerMeta},
    remote::layer_generation,
};

/// What a collection took out of the manifest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// How many layers.
    pub layers: usize,
    /// Their size in the object store.
    pub bytes: u64,
}

/// A layer that readers don't find any more, and which is to be deleted.
pub(super) struct Doomed {
    /// Its name below the branch's `layers/`.
    pub(super) name: String,
    /// Since when the manifest does not name it; `None` while it still does.
    pub(super) since: Option<Instant>,
}

impl Branch {
    /// Takes the layers out that only positions before `cutoff_lsn` need, but for what is read as of the positions at
    /// which children left the branch, and of leases. The cutoff never goes back, and counts at most up to what the object
    /// store holds. The objects go after [`Tuning::removal_delay`](super::Tuning), at this or a later call, as long as no
    /// newer generation has claimed the branch. Errors when the object store fails or the branch was taken over; then
    /// nothing that a manifest names is gone.
    pub async fn collect_garbage(
        self: &Arc<Self>,
        cutoff_lsn: Lsn,
        child_lsns: &[Lsn],
        leases: &[Lsn],
    ) -> Result<Collected, StorageError> {
        let mut flush = self.flush.lock().await;
        let (layers, known_cutoff, known_held, consistent) = {
            let state = self.state.read();
            (state.layers.clone(), state.gc_cutoff_lsn, state.held_lsns.clone(), state.remote_consistent_lsn)
        };
        let cutoff_lsn = cutoff_lsn.min(consistent).max(known_cutoff);
        let held_lsns = held_before(cutoff_lsn, child_lsns, leases);
        let metas = layers.metas();
        let input = GcInput { layers: &metas, cutoff_lsn, child_lsns, leases };
        let gone: Vec<&LayerMeta> = garbage(&input).into_iter().map(|index| &metas[index]).collect();
        if !gone.is_empty() || cutoff_lsn > known_cutoff || held_lsns != known_held {
            self.claim(&mut flush).await?;
            {
                let mut state = self.state.write();
                state.gc_cutoff_lsn = cutoff_lsn;
                state.held_lsns = held_lsns;
            }
            self.replace_layers(&mut flush, &gone, Vec::new()).await?;
            self.remove_older_generations(&mut flush).await;
        }
        self.remove_doomed(&mut flush).await?;
        Ok(Collected { layers: gone.len(), bytes: gone.iter().map(|meta| meta.size_bytes).sum() })
    }

    /// Makes images as of the cutoff where they would let [`Branch::collect_garbage`] take out more than they are
    /// likely to take themselves: what changes little does not get images otherwise, and could never let go of anything.
    pub async fn make_images_for_collection(
        self: &Arc<Self>,
        cutoff_lsn: Lsn,
        child_lsns: &[Lsn],
        leases: &[Lsn],
    ) -> Result<(), StorageError> {
        let _alone = self.compacting.lock().await;
        let (layers, cuts, consistent) = {
            let state = self.state.read();
            (state.layers.clone(), state.cuts.clone(), state.remote_consistent_lsn)
        };
        let cutoff_lsn = cutoff_lsn.min(consistent);
        let metas = layers.metas();
        let input = GcInput { layers: &metas, cutoff_lsn, child_lsns, leases };
        if !images_pay(&input, &cuts) {
            return Ok(());
        }
        self.claim(&mut *self.flush.lock().await).await?;
        for cell in cells(&cuts) {
            self.make_images(&layers, cell, cutoff_lsn).await?;
        }
        Ok(())
    }

    /// Every position from here on is readable; before it, only those that children and leases keep.
    pub fn gc_cutoff(&self) -> Lsn {
        self.state.read().gc_cutoff_lsn
    }

    /// The positions before the cutoff that are readable all the same.
    pub fn held_lsns(&self) -> Vec<Lsn> {
        self.state.read().held_lsns.clone()
    }

    /// True when what is needed to read as of here has not been collected.
    pub fn is_kept(&self, lsn: Lsn) -> bool {
        let state = self.state.read();
        lsn >= state.gc_cutoff_lsn || state.held_lsns.binary_search(&lsn).is_ok()
    }

    /// Readers find `new` instead of `gone` from now on, and so does whoever attaches the branch: writes the manifest.
    pub(super) async fn replace_layers(
        &self,
        flush: &mut FlushState,
        gone: &[&LayerMeta],
        new: Vec<Arc<Layer>>,
    ) -> Result<(), StorageError> {
        let names: HashSet<&str> = gone.iter().map(|meta| meta.name.as_str()).collect();
        let tip = {
            let mut state = self.state.write();
            state.layers = Arc::new(state.layers.without(&names).with(new));
            state.frozen_tip
        };
        self.layers_changed.notify_waiters();
        flush.doomed.extend(names.iter().map(|name| Doomed { name: (*name).to_owned(), since: None }));
        self.write_manifest(flush, tip).await
    }

    /// Deletes the objects whose time has come. The manifest that does not name them any more is written, and whoever
    /// claims the branch after our look for claims reads that one; whoever claimed it before is seen.
    pub(super) async fn remove_doomed(&self, flush: &mut FlushState) -> Result<(), StorageError> {
        let delay = self.shared.tuning.removal_delay;
        let due = |doomed: &Doomed| doomed.since.is_some_and(|since| since.elapsed() >= delay);
        if !flush.doomed.iter().any(due) {
            return Ok(());
        }
        self.check_not_deposed(flush).await?;
        while let Some(at) = flush.doomed.iter().position(due) {
            let name = &flush.doomed[at].name;
            if removable(name, self.generation) {
                self.shared.remote.delete(&self.names.layer(name)).await?;
            }
            flush.doomed.swap_remove(at);
        }
        Ok(())
    }
}

/// The positions before the cutoff that stay readable, in order and each once.
fn held_before(cutoff: Lsn, children: &[Lsn], leases: &[Lsn]) -> Vec<Lsn> {
    let mut held: Vec<Lsn> = children.iter().chain(leases).copied().filter(|lsn| *lsn < cutoff).collect();
    held.sort_unstable();
    held.dedup();
    held
}

/// What a newer generation wrote is not ours to delete.
fn removable(layer_name: &str, own: Generation) -> bool {
    layer_generation(layer_name).is_some_and(|writer| writer <= own)
}
