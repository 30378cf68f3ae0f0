//! The object store, and the caches in front of it.

mod disk_cache;
mod manifest;
mod names;

pub use bucket::{ObjectStoreConfig, ObjectStoreConfigError, open_local, open_s3};
pub use disk_cache::DiskCache;
pub use manifest::{Ancestor, Manifest, ManifestError};
pub use names::{BranchNames, layer_generation, layer_name};

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bucket::{broke_off, is_unanswered, reason_of, whole, with_jitter};
use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutPayload, path::Path};
use parking_lot::Mutex;
use types::{BranchRef, Generation};

use crate::{error::StorageError, layer::Block};

/// Longest wait for the probe at the start.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);
/// Pauses before a listing that lags is asked for again.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_LIST_PAUSE: Duration = Duration::from_secs(6);
/// Whole layers that are downloaded at a time.
const DOWNLOADS: usize = 4;

/// The object store of an installation. Shared by all branches; never cloned, always behind an `Arc`.
pub struct Remote {
    store: Arc<dyn ObjectStore>,
    /// Whole layers on the local disk.
    pub disk: DiskCache,
    /// Decompressed blocks of layers by (layer id, block number).
    pub blocks: moka::future::Cache<(u64, u32), Arc<Block>, rustc_hash::FxBuildHasher>,
    downloads: Arc<tokio::sync::Semaphore>,
    downloading: Arc<Mutex<HashSet<Path>>>,
    layer_numbers: AtomicU64,
    put_bytes: AtomicU64,
    /// Tags of listings say nothing.
    tags_differ: AtomicBool,
}

impl Remote {
    /// Opens the store; nothing is sent yet. `block_cache_bytes` bounds the memory of decompressed blocks.
    pub fn open(
        config: &ObjectStoreConfig,
        disk: DiskCache,
        block_cache_bytes: u64,
    ) -> Result<Remote, ObjectStoreConfigError> {
        Ok(Remote::over(config.open()?, disk, block_cache_bytes))
    }

    /// Over any store.
    pub fn over(store: Arc<dyn ObjectStore>, disk: DiskCache, block_cache_bytes: u64) -> Remote {
        let blocks = moka::future::Cache::builder()
            .max_capacity(block_cache_bytes)
            .weigher(|_, block: &Arc<Block>| u32::try_from(block.weight()).unwrap_or(u32::MAX))
            .build_with_hasher(rustc_hash::FxBuildHasher);
        let downloads = Arc::new(tokio::sync::Semaphore::new(DOWNLOADS));
        Remote {
            store,
            disk,
            blocks,
            downloads,
            downloading: Arc::default(),
            layer_numbers: AtomicU64::new(0),
            put_bytes: AtomicU64::new(0),
            tags_differ: AtomicBool::new(false),
        }
    }

    /// Part of a new layer's name. Each is given out once in this process, and each process has a generation of its own, so
    /// that no two layers have the same name.
    pub fn next_layer_number(&self) -> u64 {
        self.layer_numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// Writes, reads and deletes a probe object. Errors when that does not work within about 10 s.
    pub async fn check(&self) -> Result<(), StorageError> {
        let probe = Path::from(format!("probe-{:x}", std::process::id()));
        let round_trip = async {
            self.put(&probe, Bytes::from_static(b"dormouse")).await?;
            let read = self.get(&probe).await?;
            self.store.delete(&probe).await.map_err(|e| failed(&probe, &e))?;
            match read {
                Some(bytes) if bytes.as_ref() == b"dormouse" => Ok(()),
                _ => Err(StorageError::Store {
                    object: probe.to_string(),
                    reason: "what was written is not what is read".to_owned(),
                }),
            }
        };
        tokio::time::timeout(CHECK_TIMEOUT, round_trip).await.unwrap_or_else(|_| {
            let reason = format!("no answer within {} s", CHECK_TIMEOUT.as_secs());
            Err(StorageError::Store { object: probe.to_string(), reason })
        })
    }

    /// Writes a whole object, over the one before. Durable when it returns. Answers the store's tag of it, if it has such.
    pub async fn put(&self, object: &Path, bytes: Bytes) -> Result<Option<String>, StorageError> {
        self.put_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let put = self.store.put(object, PutPayload::from_bytes(bytes)).await.map_err(|e| failed(object, &e))?;
        Ok(put.e_tag)
    }

    /// Bytes that were to be written since the start.
    pub fn put_bytes(&self) -> u64 {
        self.put_bytes.load(Ordering::Relaxed)
    }

    /// A whole object; `None` when there is none.
    pub async fn get(&self, object: &Path) -> Result<Option<Bytes>, StorageError> {
        let got = match self.store.get(object).await {
            Ok(got) => got,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(failed(object, &error)),
        };
        Ok(Some(got.bytes().await.map_err(|e| failed(object, &e))?))
    }

    /// A part of an object that must exist.
    pub async fn get_range(&self, object: &Path, range: std::ops::Range<u64>) -> Result<Bytes, StorageError> {
        let bytes = self.store.get_range(object, range.clone()).await.map_err(|e| match e {
            object_store::Error::NotFound { .. } => {
                StorageError::Damaged { object: object.to_string(), reason: "the object is gone".to_owned() }
            }
            other => failed(object, &other),
        })?;
        if bytes.len() as u64 != range.end - range.start {
            let reason = format!("the object ends before {}", range.end);
            return Err(StorageError::Damaged { object: object.to_string(), reason });
        }
        Ok(bytes)
    }

    /// Names of the objects directly below a prefix.
    pub async fn list(&self, prefix: &Path) -> Result<Vec<Path>, StorageError> {
        Ok(self.list_meta(prefix).await?.into_iter().map(|object| object.location).collect())
    }

    async fn list_meta(&self, prefix: &Path) -> Result<Vec<ObjectMeta>, StorageError> {
        let listed =
            whole(broke_off, || self.store.list_with_delimiter(Some(prefix))).await.map_err(|e| failed(prefix, &e))?;
        Ok(listed.objects)
    }

    /// [`Remote::list`] as of `written` or later, an object below the prefix that was put with this tag: a listing that does
    /// not show it yet lags, and is asked for again with growing pauses. Errors when it still lags after about 15 s.
    pub async fn list_since(
        &self,
        prefix: &Path,
        written: &Path,
        tag: Option<&str>,
    ) -> Result<Vec<Path>, StorageError> {
        let mut pause = FIRST_PAUSE;
        loop {
            let objects = self.list_meta(prefix).await?;
            let shown = objects.iter().find(|object| object.location == *written);
            let is_same = shown.is_some_and(|object| self.is_same_tag(object.e_tag.as_deref(), tag));
            let last_try = pause > LAST_LIST_PAUSE;
            if last_try && shown.is_some() && !is_same {
                tracing::warn!(object = %written, "the store lists other tags than it gives at a put; not compared any more");
                self.tags_differ.store(true, Ordering::Relaxed);
            }
            if is_same || (last_try && shown.is_some()) {
                return Ok(objects.into_iter().map(|object| object.location).collect());
            }
            if last_try {
                let reason = "the listing does not show it, although it was written".to_owned();
                return Err(StorageError::Store { object: written.to_string(), reason });
            }
            tokio::time::sleep(with_jitter(pause)).await;
            pause *= 2;
        }
    }

    /// Stores without tags, or with other ones in listings, are known by the name alone.
    fn is_same_tag(&self, listed: Option<&str>, put: Option<&str>) -> bool {
        let plain = |tag: &str| tag.trim_start_matches("W/").trim_matches('"').to_owned();
        match (listed, put) {
            (Some(listed), Some(put)) => self.tags_differ.load(Ordering::Relaxed) || plain(listed) == plain(put),
            _untagged => true,
        }
    }

    /// All objects below a prefix, at any depth.
    pub async fn list_all(&self, prefix: &Path) -> Result<Vec<ObjectMeta>, StorageError> {
        whole(broke_off, || self.store.list(Some(prefix)).try_collect()).await.map_err(|e| failed(prefix, &e))
    }

    /// Names of the directories directly below a prefix.
    pub async fn list_below(&self, prefix: &Path) -> Result<Vec<String>, StorageError> {
        let listed =
            whole(broke_off, || self.store.list_with_delimiter(Some(prefix))).await.map_err(|e| failed(prefix, &e))?;
        Ok(listed.common_prefixes.iter().filter_map(|path| path.filename().map(str::to_owned)).collect())
    }

    /// Removes everything below a prefix. Harmless when there is nothing.
    pub async fn delete_all(&self, prefix: &Path) -> Result<(), StorageError> {
        for object in self.list_all(prefix).await? {
            self.delete(&object.location).await?;
        }
        Ok(())
    }

    /// Removes an object. Harmless when there is none.
    pub async fn delete(&self, object: &Path) -> Result<(), StorageError> {
        self.disk.remove(object);
        match whole(is_unanswered, || self.store.delete(object)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(failed(object, &error)),
        }
    }

    /// The branch's newest manifest: the one of the highest generation. One round trip when there is a copy that is not old:
    /// the listing, which tells the newest generation, and the copy are asked for at once; a copy counts only if it says
    /// that it was made of the very object (by its entity tag) that the listing shows.
    pub async fn manifest(&self, branch: &BranchRef) -> Result<Option<(Generation, Manifest)>, StorageError> {
        let names = BranchNames::new(branch);
        let copy = names.manifest_copy();
        let (listed, copy) = tokio::join!(self.list_meta(names.root()), self.get(&copy));
        let listed = listed?;
        let manifests = listed.iter().filter_map(|object| {
            let generation = BranchNames::generation_of_manifest(&object.location)?;
            Some((generation, object.e_tag.as_deref()))
        });
        let Some((generation, tag)) = manifests.max_by_key(|(generation, _)| *generation) else { return Ok(None) };
        let copy = copy.ok().flatten().zip(tag).and_then(|(copy, tag)| manifest::copy_of(tag, &copy).ok());
        if let Some(manifest) = copy {
            return Ok(Some((generation, manifest)));
        }
        let found: Vec<Path> = listed.into_iter().map(|object| object.location).collect();
        self.manifest_among(branch, &found).await
    }

    /// [`Remote::manifest`] of what was listed.
    pub async fn manifest_among(
        &self,
        branch: &BranchRef,
        found: &[Path],
    ) -> Result<Option<(Generation, Manifest)>, StorageError> {
        let names = BranchNames::new(branch);
        let newest = found.iter().filter_map(BranchNames::generation_of_manifest).max();
        let Some(generation) = newest else { return Ok(None) };
        let object = names.manifest(generation);
        let Some(bytes) = self.get(&object).await? else { return Ok(None) };
        let manifest = Manifest::decode(&bytes)
            .map_err(|error| StorageError::Damaged { object: object.to_string(), reason: error.to_string() })?;
        Ok(Some((generation, manifest)))
    }

    /// Copies a generation's manifest to where [`Remote::manifest`] looks first. Harmless when there is none.
    pub async fn copy_manifest(&self, branch: &BranchRef, generation: Generation) -> Result<(), StorageError> {
        let names = BranchNames::new(branch);
        let object = names.manifest(generation);
        let got = match self.store.get(&object).await {
            Ok(got) => got,
            Err(object_store::Error::NotFound { .. }) => return Ok(()),
            Err(error) => return Err(failed(&object, &error)),
        };
        let Some(tag) = got.meta.e_tag.clone() else { return Ok(()) };
        let bytes = got.bytes().await.map_err(|e| failed(&object, &e))?;
        self.put(&names.manifest_copy(), manifest::copy(&tag, &bytes)).await?;
        Ok(())
    }

    /// Brings a whole layer to the local disk, if there is a disk cache and nobody does it already.
    pub fn fetch_in_background(&self, object: &Path) {
        if !self.disk.is_enabled() || !self.downloading.lock().insert(object.clone()) {
            return;
        }
        let (store, disk, object) = (self.store.clone(), self.disk.clone(), object.clone());
        let (downloads, downloading) = (self.downloads.clone(), self.downloading.clone());
        tokio::spawn(async move {
            if let Ok(_permit) = downloads.acquire().await {
                let fetched = async { store.get(&object).await?.bytes().await }.await;
                match fetched {
                    Ok(bytes) => disk.insert(&object, bytes).await,
                    Err(error) => tracing::debug!(%object, %error, "layer was not brought to the local disk"),
                }
            }
            downloading.lock().remove(&object);
        });
    }
}

fn failed(object: &Path, error: &object_store::Error) -> StorageError {
    StorageError::Store { object: object.to_string(), reason: reason_of(error) }
}
