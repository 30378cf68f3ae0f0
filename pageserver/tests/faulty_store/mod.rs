//! An object store that fails: requests that are refused, puts and deletes that succeed though they look failed, listings that
//! show what there was a while ago, and a process that is gone in the middle of what it did.
#![allow(dead_code)]

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use futures::{StreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory, path::Path,
};

/// Random numbers from a seed (splitmix64).
#[derive(Debug)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// What all processes see: the objects, and what happened to them in order.
#[derive(Debug, Default)]
pub struct Bucket {
    objects: InMemory,
    changes: Mutex<Vec<(Path, Option<ObjectMeta>)>>,
}

impl Bucket {
    /// Notes what an object is now.
    async fn note(&self, location: &Path) {
        let now = self.objects.head(location).await.ok();
        self.changes().push((location.clone(), now));
    }

    fn changes(&self) -> MutexGuard<'_, Vec<(Path, Option<ObjectMeta>)>> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The objects directly below a prefix as of so many changes ago.
    fn list_lagging(&self, prefix: &Path, lag: usize) -> Vec<ObjectMeta> {
        let changes = self.changes();
        let mut then: BTreeMap<Path, ObjectMeta> = BTreeMap::new();
        for (path, meta) in &changes[..changes.len().saturating_sub(lag)] {
            match meta {
                Some(meta) => then.insert(path.clone(), meta.clone()),
                None => then.remove(path),
            };
        }
        let direct = |path: &Path| path.prefix_match(prefix).is_some_and(|parts| parts.count() == 1);
        then.into_iter().filter(|(path, _)| direct(path)).map(|(_, meta)| meta).collect()
    }
}

/// One process's way to the bucket.
#[derive(Debug)]
pub struct FaultyStore {
    bucket: Arc<Bucket>,
    rng: Mutex<Rng>,
    /// Of each hundred requests.
    fault_percent: AtomicU64,
    /// Requests until the process is gone; negative: never.
    fuse: AtomicI64,
    gone: AtomicBool,
}

impl FaultyStore {
    pub fn new(bucket: Arc<Bucket>, seed: u64, fault_percent: u64) -> Arc<FaultyStore> {
        Arc::new(FaultyStore {
            bucket,
            rng: Mutex::new(Rng(seed)),
            fault_percent: fault_percent.into(),
            fuse: AtomicI64::new(-1),
            gone: AtomicBool::new(false),
        })
    }

    /// The process is gone after so many more requests; the last of them may or may not have been done.
    pub fn kill_after(&self, requests: usize) {
        self.fuse.store(requests as i64, Ordering::SeqCst);
    }

    /// The process is gone now.
    pub fn kill(&self) {
        self.gone.store(true, Ordering::SeqCst);
    }

    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }

    pub fn set_fault_percent(&self, percent: u64) {
        self.fault_percent.store(percent, Ordering::SeqCst);
    }

    fn rng(&self) -> MutexGuard<'_, Rng> {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the request is done, and whether the asker hears of it.
    fn fate(&self) -> (bool, bool) {
        if self.is_gone() {
            return (false, false);
        }
        let mut rng = self.rng();
        if self.fuse.load(Ordering::SeqCst) >= 0 && self.fuse.fetch_sub(1, Ordering::SeqCst) == 0 {
            self.kill();
            return (rng.chance(50), false);
        }
        if rng.chance(self.fault_percent.load(Ordering::SeqCst) as usize) {
            return (rng.chance(50), false);
        }
        (true, true)
    }

    /// While there are faults at all.
    fn lag_percent(&self) -> usize {
        2 * usize::from(self.fault_percent.load(Ordering::SeqCst) > 0)
    }
}

fn failed<T>() -> Result<T> {
    Err(Error::Generic { store: "faulty", source: "503 slow down".into() })
}

impl std::fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("faulty")
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let (done, heard) = self.fate();
        if !done {
            return failed();
        }
        let result = self.bucket.objects.put_opts(location, payload, opts).await?;
        self.bucket.note(location).await;
        if heard { Ok(result) } else { failed() }
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        failed()
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        if self.fate() != (true, true) {
            return failed();
        }
        self.bucket.objects.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (done, heard) = self.fate();
        let bucket = self.bucket.clone();
        let delete = move |location: Result<Path>| {
            let bucket = bucket.clone();
            async move {
                let location = location?;
                if done {
                    bucket.objects.delete(&location).await?;
                    bucket.note(&location).await;
                }
                if heard { Ok(location) } else { failed() }
            }
        };
        locations.then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        if self.fate() != (true, true) {
            return futures::stream::once(std::future::ready(failed())).boxed();
        }
        self.bucket.objects.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        if self.fate() != (true, true) {
            return failed();
        }
        // A process sees at least the state of some moments ago; asked again, a newer one.
        let lag = if self.rng().chance(self.lag_percent()) { 1 + self.rng().below(8) } else { 0 };
        match prefix {
            Some(prefix) if lag > 0 => {
                let objects = self.bucket.list_lagging(prefix, lag);
                Ok(ListResult { objects, ..self.bucket.objects.list_with_delimiter(Some(prefix)).await? })
            }
            _fresh => self.bucket.objects.list_with_delimiter(prefix).await,
        }
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        failed()
    }
}
