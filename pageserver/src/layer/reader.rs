//! A layer in the object store, read block by block.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use object_store::path::Path;
use tokio::sync::OnceCell;
use types::Lsn;

use super::{Block, LayerDamage, LayerIndex, LayerMeta};
use crate::{
    error::StorageError,
    remote::Remote,
    storage::{Key, Value},
};

/// Where a value was found and what it is.
pub type Found = (Lsn, Value);

/// One layer; its index is loaded at the first look into it and then kept.
pub struct Layer {
    /// What the manifest says.
    pub meta: LayerMeta,
    /// Unique in this process: names the layer in caches.
    id: u64,
    object: Path,
    index: OnceCell<LayerIndex>,
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer").field("object", &self.object).finish_non_exhaustive()
    }
}

impl Layer {
    /// The layer that is (or is about to be) at `object`.
    pub fn new(meta: LayerMeta, object: Path) -> Arc<Layer> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Arc::new(Layer { meta, id, object, index: OnceCell::new() })
    }

    /// The object's name.
    pub fn object(&self) -> &Path {
        &self.object
    }

    /// Appends the values of `key` in `(after, at]`, newest first, up to the first that needs no older one. True when
    /// there was such a one.
    pub async fn find(
        &self,
        remote: &Remote,
        key: Key,
        after: Lsn,
        at: Lsn,
        found: &mut Vec<Found>,
    ) -> Result<bool, StorageError> {
        if !self.meta.covers(&key) {
            return Ok(false);
        }
        let index = self.index(remote).await?;
        let Some(mut number) = index.block_for(key, at) else { return Ok(false) };
        loop {
            let block = self.block(remote, index, number).await?;
            let upper = block.upper_bound(key, at);
            for entry in (0..upper).rev() {
                let (entry_key, lsn) = block.position(entry);
                if entry_key != key || lsn <= after {
                    return Ok(false);
                }
                let value = block.value(entry).map_err(|damage| self.damaged(damage))?;
                let initial = value.is_initial();
                found.push((lsn, value));
                if initial {
                    return Ok(true);
                }
            }
            match number.checked_sub(1) {
                Some(before) => number = before,
                None => return Ok(false),
            }
        }
    }

    /// Calls `each` with every entry whose key lies in `first..=last`, in order.
    pub async fn scan(
        &self,
        remote: &Remote,
        first: Key,
        last: Key,
        mut each: impl FnMut(Key, Lsn, Value),
    ) -> Result<(), StorageError> {
        if self.meta.first_key > last || self.meta.last_key < first {
            return Ok(());
        }
        let index = self.index(remote).await?;
        let mut number = index.block_for(first, Lsn(0)).unwrap_or(0);
        while number < index.blocks.len() && index.blocks[number].first.0 <= last {
            let block = self.block(remote, index, number).await?;
            for entry in block.lower_bound(first, Lsn(0))..block.len() {
                let (key, lsn) = block.position(entry);
                if key > last {
                    return Ok(());
                }
                each(key, lsn, block.value(entry).map_err(|damage| self.damaged(damage))?);
            }
            number += 1;
        }
        Ok(())
    }

    /// The distinct keys of one block by number; `None` behind the last block.
    pub async fn keys_of_block(&self, remote: &Remote, number: usize) -> Result<Option<Vec<Key>>, StorageError> {
        let index = self.index(remote).await?;
        if number >= index.blocks.len() {
            return Ok(None);
        }
        let block = self.block(remote, index, number).await?;
        let mut keys: Vec<Key> = (0..block.len()).map(|entry| block.position(entry).0).collect();
        keys.dedup();
        Ok(Some(keys))
    }

    async fn index(&self, remote: &Remote) -> Result<&LayerIndex, StorageError> {
        let load = async || {
            let (offset, size) = (self.meta.index_offset, self.meta.size_bytes);
            if offset >= size {
                return Err(self.damaged(LayerDamage("the manifest's sizes make no sense".to_owned())));
            }
            self.read_checked(remote, offset..size, |tail| LayerIndex::parse(&tail, offset)).await
        };
        self.index.get_or_try_init(load).await
    }

    async fn block(&self, remote: &Remote, index: &LayerIndex, number: usize) -> Result<Arc<Block>, StorageError> {
        let cache_key = (self.id, number as u32);
        if let Some(block) = remote.blocks.get(&cache_key).await {
            return Ok(block);
        }
        let handle = index.blocks[number].clone();
        let load = async {
            let range = handle.offset..handle.offset + u64::from(handle.stored_bytes);
            let block = self.read_checked(remote, range, move |stored| Block::decode(stored, &handle)).await?;
            Ok::<_, StorageError>(Arc::new(block))
        };
        // Boxed: the future is large, and misses are rare beside hits.
        let loaded = Box::pin(remote.blocks.try_get_with(cache_key, load)).await;
        loaded.map_err(|error| StorageError::clone(&error))
    }

    /// Reads a range and makes something of it. What the local copy gives wrong is asked of the object store again.
    async fn read_checked<T: Send + 'static>(
        &self,
        remote: &Remote,
        range: std::ops::Range<u64>,
        parse: impl Fn(Bytes) -> Result<T, LayerDamage> + Send + Sync,
    ) -> Result<T, StorageError> {
        if let Some(bytes) = remote.disk.read(&self.object, range.clone()).await {
            match parse(bytes) {
                Ok(parsed) => return Ok(parsed),
                Err(damage) => {
                    tracing::warn!(object = %self.object, %damage, "local copy of a layer is damaged; dropped");
                    remote.disk.remove(&self.object);
                }
            }
        }
        let bytes = remote.get_range(&self.object, range).await?;
        remote.fetch_in_background(&self.object);
        parse(bytes).map_err(|damage| self.damaged(damage))
    }

    fn damaged(&self, damage: LayerDamage) -> StorageError {
        StorageError::Damaged { object: self.object.to_string(), reason: damage.0 }
    }
}
