//! How large a branch is: current at any time, and for a branch that nobody uses told from its manifest alone.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::timeout;
use types::{BranchRef, Lsn};
use wire::pageserver::BranchSizes;

use super::{Branch, Branches, Tip};
use crate::{error::StorageError, remote::Manifest};

/// Longest wait for WAL that is still on its way; sizes without it are shown then.
const WAL_WAIT: Duration = Duration::from_secs(1);

impl Branches {
    /// As of `up_to` or later. A branch that is not attached stays so, unless its manifest is older than that or does not
    /// know the logical size: then that is found out, and kept in a manifest.
    pub async fn sizes(self: &Arc<Self>, name: &BranchRef, up_to: Lsn) -> Result<BranchSizes, StorageError> {
        if let Some(branch) = self.peek(name) {
            return branch.sizes(up_to).await;
        }
        let (_, manifest) =
            self.shared().remote.manifest(name).await?.ok_or_else(|| StorageError::NoBranch(name.clone()))?;
        if manifest.remote_consistent_lsn >= up_to
            && let Some(sizes) = told_by(&manifest)
        {
            return Ok(sizes);
        }
        let branch = self.get(name).await?;
        let sizes = branch.sizes(up_to).await?;
        branch.store_logical_bytes().await?;
        Ok(sizes)
    }
}

fn told_by(manifest: &Manifest) -> Option<BranchSizes> {
    let end = manifest.remote_consistent_lsn;
    Some(BranchSizes {
        last_record_lsn: end,
        logical_bytes: manifest.logical_bytes?,
        history_bytes: end.0.saturating_sub(manifest.gc_cutoff_lsn.max(manifest.start_lsn).0),
        stored_bytes: manifest.layers.iter().map(|layer| layer.size_bytes).sum(),
    })
}

impl Branch {
    async fn sizes(self: &Arc<Self>, up_to: Lsn) -> Result<BranchSizes, StorageError> {
        match timeout(WAL_WAIT, self.wait_for(up_to)).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(error)) => tracing::debug!(branch = %self.name, %error, "sizes without the newest WAL"),
        }
        let logical_bytes = self.logical_bytes().await?;
        let (end, start) = (self.tip().last_record_lsn, self.gc_cutoff().max(self.start_lsn()));
        let stored = self.state.read().layers.iter().map(|layer| layer.meta.size_bytes).sum();
        Ok(BranchSizes {
            last_record_lsn: end,
            logical_bytes,
            history_bytes: end.0.saturating_sub(start.0),
            stored_bytes: stored,
        })
    }

    /// The logical size as of `tip`; `None` when it is not known or WAL is just coming in.
    pub(super) fn logical_bytes_at(&self, tip: Tip) -> Option<u64> {
        let _quiet = self.ingest.try_lock().ok()?;
        let known = self.logical_bytes_known.load(Ordering::Acquire) && self.tip() == tip;
        known.then(|| self.logical_bytes.load(Ordering::Relaxed))
    }

    /// Writes a manifest that knows the logical size, if that is all that is missing from the one there is.
    async fn store_logical_bytes(self: &Arc<Self>) -> Result<(), StorageError> {
        let mut flush = self.flush.lock().await;
        if !self.is_clean() {
            return Ok(());
        }
        self.claim(&mut flush).await?;
        let tip = self.tip();
        self.write_manifest(&mut flush, tip).await
    }
}
