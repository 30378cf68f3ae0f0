//! A branch's committed WAL in the object store: writing, reading by position, removing.

use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, path::Path};
use types::{BranchRef, Lsn};

use crate::{
    MANIFEST_PREFIX,
    ask::{broke_off, is_unanswered, reason_of, whole},
    branch_root,
    wal_object::WalObject,
};

/// Why WAL could not be put or had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WalStoreError {
    /// The store did not do it; try again.
    #[error("object {object}: {reason}")]
    Store {
        /// Its key, or the prefix that was to be listed.
        object: String,
        /// Why.
        reason: String,
    },
    /// What the store has is not what was put there.
    #[error("object {object} is damaged: {reason}")]
    Damaged {
        /// Its key.
        object: String,
        /// What is wrong.
        reason: String,
    },
}

/// The WAL objects of one branch, `projects/<project>/branches/<branch>/wal/...`. A clone is another handle of the same.
#[derive(Clone)]
pub struct BranchWal {
    store: Arc<dyn ObjectStore>,
    root: Path,
    prefix: Path,
}

impl BranchWal {
    /// Of this branch; nothing is asked yet.
    pub fn new(store: Arc<dyn ObjectStore>, branch: &BranchRef) -> BranchWal {
        let root = branch_root(branch);
        BranchWal { store, prefix: BranchWal::prefix_of(&root), root }
    }

    /// Where the objects of the branch with this root are.
    pub fn prefix_of(root: &Path) -> Path {
        root.clone().join("wal")
    }

    /// The objects that there are, in order of their WAL.
    pub async fn list(&self) -> Result<Vec<WalObject>, WalStoreError> {
        let list = || self.store.list(Some(&self.prefix)).try_collect::<Vec<_>>();
        let found = whole(broke_off, list).await.map_err(|error| failed(&self.prefix, &error))?;
        let mut objects: Vec<WalObject> = found.iter().filter_map(|meta| WalObject::of(&meta.location)).collect();
        objects.sort_unstable();
        Ok(objects)
    }

    /// False once the branch has been deleted: no manifest is left. One request.
    pub async fn branch_exists(&self) -> Result<bool, WalStoreError> {
        let list = || self.store.list_with_delimiter(Some(&self.root));
        let found = whole(broke_off, list).await.map_err(|error| failed(&self.root, &error))?;
        let mut names = found.objects.iter().filter_map(|meta| meta.location.filename());
        Ok(names.any(|name| name.starts_with(MANIFEST_PREFIX)))
    }

    /// Writes an object that was made by [`WalObject::encode`]. Durable when it returns; harmless when it is there already.
    pub async fn put(&self, object: &WalObject, bytes: Bytes) -> Result<(), WalStoreError> {
        let key = self.key(object);
        self.store.put(&key, PutPayload::from_bytes(bytes)).await.map_err(|error| failed(&key, &error))?;
        Ok(())
    }

    /// Removes an object; harmless when it is not there.
    pub async fn delete(&self, object: &WalObject) -> Result<(), WalStoreError> {
        let key = self.key(object);
        match whole(is_unanswered, || self.store.delete(&key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(failed(&key, &error)),
        }
    }

    /// The WAL of an object; `None` when it is not there.
    pub async fn get(&self, object: &WalObject) -> Result<Option<Bytes>, WalStoreError> {
        let key = self.key(object);
        let got = match self.store.get(&key).await {
            Ok(got) => got.bytes().await.map_err(|error| failed(&key, &error))?,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(failed(&key, &error)),
        };
        let object = *object;
        let decoded = tokio::task::spawn_blocking(move || object.decode(&got)).await;
        let decoded = decoded.unwrap_or_else(|panic| Err(panic.to_string()));
        decoded.map(Some).map_err(|reason| WalStoreError::Damaged { object: key.to_string(), reason })
    }

    /// Removes what ends at or below a position; answers how many objects that were.
    pub async fn delete_below(&self, position: Lsn) -> Result<usize, WalStoreError> {
        let objects = self.list().await?;
        let old: Vec<&WalObject> = objects.iter().filter(|object| object.end <= position).collect();
        for object in &old {
            self.delete(object).await?;
        }
        Ok(old.len())
    }

    fn key(&self, object: &WalObject) -> Path {
        self.prefix.clone().join(object.name())
    }
}

/// Reads WAL by position; keeps one object, and the names of the others, in memory.
pub struct StoredWalReader {
    wal: BranchWal,
    objects: Vec<WalObject>,
    current: Option<(WalObject, Bytes)>,
}

impl StoredWalReader {
    /// Nothing is asked yet.
    pub fn new(wal: BranchWal) -> StoredWalReader {
        StoredWalReader { wal, objects: Vec::new(), current: None }
    }

    /// WAL from a position on, at most so many bytes; `None` when the store does not have it.
    pub async fn read(&mut self, position: Lsn, max_bytes: usize) -> Result<Option<Bytes>, WalStoreError> {
        if let Some(wal) = self.in_current(position, max_bytes) {
            return Ok(Some(wal));
        }
        self.current = None;
        if !self.fetch(position).await? {
            // It may have been written, or replaced by another that holds it, since the last listing.
            self.objects = self.wal.list().await?;
            self.fetch(position).await?;
        }
        Ok(self.in_current(position, max_bytes))
    }

    /// Gets the object that goes furthest; a damaged one only counts when no other has the position.
    async fn fetch(&mut self, position: Lsn) -> Result<bool, WalStoreError> {
        let mut holders: Vec<WalObject> = self.objects.iter().filter(|object| object.has(position)).copied().collect();
        holders.sort_unstable_by_key(|object| std::cmp::Reverse(object.end));
        let mut damage = None;
        for object in holders {
            match self.wal.get(&object).await {
                Ok(Some(wal)) => {
                    self.current = Some((object, wal));
                    return Ok(true);
                }
                Ok(None) => {}
                Err(error @ WalStoreError::Damaged { .. }) => damage = Some(error),
                Err(error) => return Err(error),
            }
        }
        damage.map_or(Ok(false), Err)
    }

    fn in_current(&self, position: Lsn, max_bytes: usize) -> Option<Bytes> {
        let (object, wal) = self.current.as_ref().filter(|(object, _)| object.has(position))?;
        let skipped = (position.0 - object.begin.0) as usize;
        Some(wal.slice(skipped..wal.len().min(skipped.saturating_add(max_bytes))))
    }
}

fn failed(object: &Path, error: &object_store::Error) -> WalStoreError {
    WalStoreError::Store { object: object.to_string(), reason: reason_of(error) }
}
