//! A layer in the object store, read block by block.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use object_store::path::Path;
use tokio::sync::OnceCell;
use types::Lsn;

use super::{Block, BlockHandle, LayerDamage, LayerIndex, LayerMeta, StoredBlock};
use crate::{
    error::StorageError,
    remote::Remote,
    storage::{Key, Value},
};

/// Where a value was found and what it is.
pub type Found = (Lsn, Value);

/// A key that is looked for in several layers, newest first, and what was found so far.
pub struct Wanted {
    /// The key.
    pub key: Key,
    /// Only values after this are of interest.
    pub after: Lsn,
    /// Newest first.
    pub found: Vec<Found>,
    /// The last one found needs no older one.
    pub complete: bool,
}

/// Blocks that are read in one piece at most.
const BLOCKS_PER_READ: usize = 128;

/// So many blocks in one read are of a scan, which comes back to the outer ones at most: those between don't go to the cache.
const BLOCKS_OF_A_SCAN: usize = 4;

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
        let Some(number) = index.block_for(key, at) else { return Ok(false) };
        let block = self.block(remote, index, number).await?;
        self.find_from(remote, (number, block), (key, after, at), found).await
    }

    /// [`Layer::find`] for many keys, ascending: each block is read once, those that lie together in one piece. Only
    /// values after `floor` count.
    pub async fn find_many(
        &self,
        remote: &Remote,
        wanted: &mut [&mut Wanted],
        floor: Lsn,
        at: Lsn,
    ) -> Result<(), StorageError> {
        let open = |wanted: &Wanted| !wanted.complete && self.meta.covers(&wanted.key);
        if !wanted.iter().any(|wanted| open(wanted)) {
            return Ok(());
        }
        let index = self.index(remote).await?;
        let block_of = |wanted: &Wanted| if open(wanted) { index.block_for(wanted.key, at) } else { None };
        let mut numbers: Vec<usize> = wanted.iter().filter_map(|wanted| block_of(wanted)).collect();
        numbers.dedup();
        let blocks = self.blocks(remote, index, &numbers).await?;
        for wanted in wanted.iter_mut() {
            let Some(number) = block_of(wanted) else { continue };
            let Ok(position) = numbers.binary_search(&number) else { continue };
            let start = (number, blocks[position].clone());
            let range = (wanted.key, wanted.after.max(floor), at);
            wanted.complete = self.find_from(remote, start, range, &mut wanted.found).await?;
        }
        Ok(())
    }

    async fn find_from(
        &self,
        remote: &Remote,
        (mut number, mut block): (usize, Arc<Block>),
        (key, after, at): (Key, Lsn, Lsn),
        found: &mut Vec<Found>,
    ) -> Result<bool, StorageError> {
        loop {
            for entry in (0..block.upper_bound(key, at)).rev() {
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
            let Some(before) = number.checked_sub(1) else { return Ok(false) };
            number = before;
            block = self.block(remote, self.index(remote).await?, number).await?;
        }
    }

    /// No record of the key in this layer has a larger depth.
    pub async fn depth_bound(&self, remote: &Remote, key: Key) -> Result<u8, StorageError> {
        if !self.meta.covers(&key) {
            return Ok(0);
        }
        let index = self.index(remote).await?;
        Ok(index.block_for(key, Lsn::MAX).map_or(0, |number| index.blocks[number].max_depth))
    }

    /// The blocks from `number` on, in one read of about `bytes`, as far as they begin at or before `last`; past caches of
    /// memory. Empty behind the last one.
    pub(super) async fn read_ahead(
        &self,
        remote: &Remote,
        number: usize,
        last: Key,
        bytes: u64,
    ) -> Result<Vec<StoredBlock>, StorageError> {
        let index = self.index(remote).await?;
        let rest = index.blocks.get(number..).unwrap_or_default();
        let wanted = rest.iter().take_while(|block| block.first.0 <= last);
        let mut total = 0;
        let near = wanted.take_while(|block| {
            total += u64::from(block.stored_bytes);
            total <= bytes.max(u64::from(block.stored_bytes))
        });
        let handles: Vec<&BlockHandle> = near.collect();
        self.read_blocks(remote, &handles).await
    }

    /// The number of the first block that may hold something of keys from here on.
    pub(super) async fn first_block(&self, remote: &Remote, first: Key) -> Result<usize, StorageError> {
        Ok(self.index(remote).await?.block_for(first, Lsn(0)).unwrap_or(0))
    }

    /// Blocks next to each other in the file, in one read.
    async fn read_blocks(&self, remote: &Remote, handles: &[&BlockHandle]) -> Result<Vec<StoredBlock>, StorageError> {
        let (Some(first), Some(last)) = (handles.first(), handles.last()) else { return Ok(Vec::new()) };
        let range = first.offset..last.offset + u64::from(last.stored_bytes);
        let decode = |stored: Bytes| {
            let one = |handle: &&BlockHandle| {
                let start = (handle.offset - first.offset) as usize;
                let end = start + handle.stored_bytes as usize;
                if end > stored.len() {
                    return Err(LayerDamage("block offsets make no sense".to_owned()));
                }
                let stored = stored.slice(start..end);
                let block = Block::decode(stored.clone(), handle)?;
                Ok(StoredBlock { handle: (*handle).clone(), stored, block })
            };
            handles.iter().map(one).collect()
        };
        self.read_checked(remote, range, decode).await
    }

    /// Blocks by ascending number, through the cache; missing ones that are next to each other are read together.
    async fn blocks(
        &self,
        remote: &Remote,
        index: &LayerIndex,
        numbers: &[usize],
    ) -> Result<Vec<Arc<Block>>, StorageError> {
        if let [number] = numbers {
            return Ok(vec![self.block(remote, index, *number).await?]);
        }
        let mut blocks: Vec<Option<Arc<Block>>> = Vec::with_capacity(numbers.len());
        for number in numbers {
            blocks.push(remote.blocks.get(&(self.id, *number as u32)).await);
        }
        let mut at = 0;
        while at < numbers.len() {
            let missing = |at: &usize| blocks[*at].is_none();
            let follows = |at: &usize| *at == 0 || numbers[*at] == numbers[*at - 1] + 1;
            let run = (at..numbers.len()).take_while(|i| missing(i) && (*i == at || follows(i))).count();
            let handles: Vec<&BlockHandle> =
                numbers[at..at + run].iter().take(BLOCKS_PER_READ).map(|number| &index.blocks[*number]).collect();
            for (offset, stored) in self.read_blocks(remote, &handles).await?.into_iter().enumerate() {
                let block = Arc::new(stored.block);
                let outer = offset == 0 || offset + 1 == handles.len();
                if outer || handles.len() < BLOCKS_OF_A_SCAN {
                    remote.blocks.insert((self.id, numbers[at + offset] as u32), block.clone()).await;
                }
                blocks[at + offset] = Some(block);
            }
            at += handles.len().max(1);
        }
        Ok(blocks.into_iter().flatten().collect())
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
