//! Detaching a branch: it gets all that it reads from its ancestors to itself, so that they can be deleted.
//!
//! The branch goes on serving reads and taking WAL meanwhile. What it was at its oldest readable position, and at each
//! older one that a child or a lease keeps, is written as a whole image set; its own image layers go, for they are whole
//! only together with the ancestors.

use std::{sync::Arc, time::Duration};

use types::{BlockNumber, Lsn, PageTag, RelTag};
use wire::pageserver::MAX_PAGES_PER_REQUEST;

use super::{Branch, compaction::ImageFiles};
use crate::{
    compaction::Cell,
    error::StorageError,
    layer::{Layer, LayerKind, LayerMeta},
    storage::{Key, Kind, Value, decode_rel_size},
};

/// Reads that began before a branch was whole may still look at the ancestor for so long.
const LAST_READS: Duration = Duration::from_secs(1);

impl Branch {
    /// Copies what is needed and writes a manifest without ancestor. The caller sees to it that no garbage is collected and
    /// no child made meanwhile. `held_lsns` are positions before the cutoff that stay readable.
    pub(super) async fn copy_ancestors(self: &Arc<Self>, held_lsns: &[Lsn]) -> Result<(), StorageError> {
        if self.ancestor().is_none() {
            return Ok(());
        }
        // What is made of the branch's own values alone must not be published once nobody looks further.
        let _no_compaction = self.compacting.lock().await;
        let oldest = self.gc_cutoff().max(self.start_lsn());
        let held = held_lsns.iter().copied().filter(|lsn| *lsn < oldest && *lsn >= self.start_lsn());
        let mut points: Vec<Lsn> = held.chain([oldest]).collect();
        points.sort_unstable();
        points.dedup();
        let mut copied = Vec::new();
        for point in points {
            copied.extend(self.copy_state(point).await?);
        }
        let mut flush = self.flush.lock().await;
        self.claim(&mut flush).await?;
        flush.detached = true;
        let metas = self.state.read().layers.metas();
        let gone: Vec<&LayerMeta> = metas.iter().filter(|meta| meta.kind == LayerKind::Image).collect();
        if let Err(error) = self.replace_layers(&mut flush, &gone, copied).await {
            // Whether the manifest was written is not known: the branch is attached anew from whichever there is.
            self.retire();
            return Err(error);
        }
        drop(flush);
        tokio::time::sleep(LAST_READS).await;
        *self.ancestor.write() = None;
        Ok(())
    }

    /// The whole state as of `at`, ancestors included, as image layers that no manifest names yet.
    async fn copy_state(self: &Arc<Self>, at: Lsn) -> Result<Vec<Arc<Layer>>, StorageError> {
        let all = Cell { first: Key::MIN, last: Key::MAX };
        let mut copy = Copy { branch: self, at, files: ImageFiles::new(self, all, at) };
        for (key, value) in self.scan(Key::MIN, Key::last_of(Kind::SlruPage), at).await? {
            let content = match (key.kind, value) {
                (Kind::SlruPage, _) => self.read_page(key, at).await?,
                (_, Value::Image(content)) => content,
                (_, Value::Record(_) | Value::Tombstone) => {
                    return Err(self.uncopied(key, at, "no content is stored"));
                }
            };
            copy.add(key, Value::Image(content)).await?;
        }
        let mut forks: Vec<(RelTag, BlockNumber)> = Vec::new();
        for (key, value) in self.scan(Key::of(Kind::RelSize), Key::last_of(Kind::RelSize), at).await? {
            let size = match &value {
                Value::Image(content) => decode_rel_size(content),
                Value::Record(_) | Value::Tombstone => None,
            };
            let (Some(rel), Some(size)) = (key.rel_tag(), size) else {
                return Err(self.uncopied(key, at, "the stored size is malformed"));
            };
            forks.push((rel, size));
            copy.add(key, value).await?;
        }
        for (rel, size) in forks {
            copy.add_fork(rel, size).await?;
        }
        copy.files.finish().await
    }

    fn uncopied(&self, key: Key, lsn: Lsn, reason: &str) -> StorageError {
        let (branch, what, reason) = (self.name().clone(), key.to_string(), reason.to_owned());
        StorageError::Unmakeable { branch, what, lsn, reason }
    }
}

/// Image layers in the making; the keys come in order.
struct Copy<'a> {
    branch: &'a Arc<Branch>,
    at: Lsn,
    files: ImageFiles,
}

impl Copy<'_> {
    async fn add(&mut self, key: Key, value: Value) -> Result<(), StorageError> {
        self.files.add(key, &value).await
    }

    async fn add_fork(&mut self, rel: RelTag, size: BlockNumber) -> Result<(), StorageError> {
        let mut first = 0;
        while first < size {
            let end = size.min(first + MAX_PAGES_PER_REQUEST as BlockNumber);
            let tags: Vec<PageTag> = (first..end).map(|block| PageTag { rel, block }).collect();
            for (tag, page) in tags.iter().zip(self.branch.get_pages(&tags, self.at).await?) {
                let content = if page.iter().all(|byte| *byte == 0) { bytes::Bytes::new() } else { page };
                self.add(Key::page(*tag), Value::Image(content)).await?;
            }
            first = end;
        }
        Ok(())
    }
}
