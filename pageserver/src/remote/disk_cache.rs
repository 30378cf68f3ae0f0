//! Layers on the local disk: copies of whole ones, only a cache, of which any file may vanish at any time; or the object store's
//! own files, when it is a directory on this machine.

use std::{
    io::{ErrorKind, IoSliceMut},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path as FilePath, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use object_store::{local::LocalFileSystem, path::Path};
use rustix::io::{ReadWriteFlags, preadv2};

/// The cache; a clone is another handle of the same.
#[derive(Clone)]
pub struct DiskCache {
    layers: Layers,
}

#[derive(Clone)]
enum Layers {
    Elsewhere,
    Copied(Arc<Inner>),
    /// Never written nor removed here.
    InStore(Arc<LocalFileSystem>),
}

struct Inner {
    directory: PathBuf,
    /// File name to size in KiB; what falls out of it is unlinked.
    files: moka::sync::Cache<String, u32>,
}

impl DiskCache {
    /// No cache: every read goes to the object store.
    pub fn disabled() -> DiskCache {
        DiskCache { layers: Layers::Elsewhere }
    }

    /// No copies: this is the object store.
    pub fn in_store(store: LocalFileSystem) -> DiskCache {
        DiskCache { layers: Layers::InStore(Arc::new(store)) }
    }

    /// Keeps up to `limit_bytes` in `directory`, which is made. Files left by an earlier run count.
    pub fn open(directory: &FilePath, limit_bytes: u64) -> std::io::Result<DiskCache> {
        std::fs::create_dir_all(directory)?;
        let unlink_in = directory.to_owned();
        let files = moka::sync::Cache::builder()
            .max_capacity(limit_bytes / 1024)
            .weigher(|_, kib: &u32| *kib)
            // The default refuses newcomers that were asked for less often: layers would be fetched whole again and again.
            .eviction_policy(moka::policy::EvictionPolicy::lru())
            .eviction_listener(move |name: Arc<String>, _, cause| {
                if cause.was_evicted() {
                    let _ = std::fs::remove_file(unlink_in.join(name.as_str()));
                }
            })
            .build();
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(TEMPORARY) {
                std::fs::remove_file(entry.path())?;
            } else if name.contains(SEPARATOR) {
                files.insert(name, kib(entry.metadata()?.len()));
            }
        }
        files.run_pending_tasks();
        Ok(DiskCache { layers: Layers::Copied(Arc::new(Inner { directory: directory.to_owned(), files })) })
    }

    /// True when it keeps copies.
    pub fn is_enabled(&self) -> bool {
        self.copied().is_some()
    }

    fn copied(&self) -> Option<&Arc<Inner>> {
        match &self.layers {
            Layers::Copied(inner) => Some(inner),
            Layers::Elsewhere | Layers::InStore(_) => None,
        }
    }

    /// A part of an object, if it is here.
    pub async fn read(&self, object: &Path, range: Range<u64>) -> Option<Bytes> {
        if let Layers::InStore(store) = &self.layers {
            // What the kernel does not have in memory, or is not there, is asked of the store.
            return read_without_waiting(&store.path_to_filesystem(object).ok()?, &range);
        }
        let inner = self.copied()?;
        let name = file_name(object);
        inner.files.get(&name)?;
        let path = inner.directory.join(&name);
        // Most of what is asked for is in the kernel's memory: handing that over to another thread would take longer than reading it.
        if let Some(bytes) = read_without_waiting(&path, &range) {
            return Some(bytes);
        }
        let read = tokio::task::spawn_blocking(move || read_range(&path, range)).await;
        match read {
            Ok(Ok(bytes)) => Some(bytes),
            Ok(Err(error)) => {
                if error.kind() != ErrorKind::NotFound {
                    tracing::warn!(%object, %error, "local copy of a layer can't be read; dropped");
                }
                self.remove(object);
                None
            }
            Err(_stopping) => None,
        }
    }

    /// Keeps a copy. Failing to is only logged.
    pub async fn insert(&self, object: &Path, bytes: Bytes) {
        let Some(inner) = self.copied().cloned() else { return };
        let name = file_name(object);
        let path = inner.directory.join(&name);
        let weight = kib(bytes.len() as u64);
        let written = tokio::task::spawn_blocking(move || {
            let temporary = path.with_file_name(format!("{}{TEMPORARY}", path.file_name()?.to_str()?));
            let moved = std::fs::write(&temporary, &bytes).and_then(|()| std::fs::rename(&temporary, &path));
            if moved.is_err() {
                let _ = std::fs::remove_file(&temporary);
            }
            moved.err()
        });
        match written.await {
            Ok(None) => {
                inner.files.insert(name, weight);
                // Left to itself it evicts once in a while: until then the disk would hold what comes meanwhile as well.
                inner.files.run_pending_tasks();
            }
            Ok(Some(error)) => tracing::warn!(%object, %error, "layer was not kept on the local disk"),
            Err(_stopping) => {}
        }
    }

    /// Drops the copy, if there is one.
    pub fn remove(&self, object: &Path) {
        if let Some(inner) = self.copied() {
            let name = file_name(object);
            let _ = std::fs::remove_file(inner.directory.join(&name));
            inner.files.invalidate(&name);
        }
    }
}

const TEMPORARY: &str = ".tmp";
/// Stands for the slashes of an object's name; ids and layer names don't have it.
const SEPARATOR: char = '~';

fn file_name(object: &Path) -> String {
    object.as_ref().replace('/', "~")
}

fn kib(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

/// `None` when it is not all in the kernel's memory, the file system can't tell, or anything else is the matter.
fn read_without_waiting(path: &FilePath, range: &Range<u64>) -> Option<Bytes> {
    let mut bytes = vec![0; usize::try_from(range.end.checked_sub(range.start)?).ok()?];
    let file = std::fs::File::open(path).ok()?;
    let read = preadv2(&file, &mut [IoSliceMut::new(&mut bytes)], range.start, ReadWriteFlags::NOWAIT).ok()?;
    (read == bytes.len()).then(|| bytes.into())
}

fn read_range(path: &FilePath, range: Range<u64>) -> std::io::Result<Bytes> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    std::fs::File::open(path)?.read_exact_at(&mut bytes, range.start)?;
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_copy_that_vanished_is_just_not_there() {
        let directory = tempfile::tempdir().expect("directory");
        let cache = DiskCache::open(directory.path(), 1 << 20).expect("open");
        let object = Path::from("projects/p/layers/x");
        cache.insert(&object, Bytes::from_static(b"0123456789")).await;
        assert_eq!(cache.read(&object, 2..4).await.as_deref(), Some(&b"23"[..]));
        assert_eq!(cache.read(&object, 2..40).await, None, "reading past the end drops the copy");
        cache.insert(&object, Bytes::from_static(b"0123456789")).await;
        std::fs::remove_file(directory.path().join("projects~p~layers~x")).expect("remove");
        assert_eq!(cache.read(&object, 2..4).await, None);
    }

    #[tokio::test]
    async fn the_store_s_own_files_are_read_and_left_alone() {
        let directory = tempfile::tempdir().expect("directory");
        let file = directory.path().join("projects/p/layers/x");
        std::fs::create_dir_all(file.parent().expect("parent")).expect("directories");
        std::fs::write(&file, b"0123456789").expect("write");
        let cache = DiskCache::in_store(LocalFileSystem::new_with_prefix(directory.path()).expect("store"));
        let object = Path::from("projects/p/layers/x");
        assert_eq!(cache.read(&object, 2..5).await.as_deref(), Some(&b"234"[..]));
        assert_eq!(cache.read(&object, 8..12).await, None, "beyond its end");
        assert_eq!(cache.read(&Path::from("projects/p/layers/y"), 0..1).await, None);
        cache.remove(&object);
        assert!(file.exists() && !cache.is_enabled());
    }
}
