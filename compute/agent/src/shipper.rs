//! Ships the WAL that Postgres writes to the safekeepers, and says when a quorum holds it.

use std::sync::Arc;

use bytes::Bytes;
use page_cache::PageCache;
use parking_lot::Mutex as SyncMutex;
use safekeeper_client::WalProposer;
use tokio::{sync::Mutex, time::Instant};
use types::Lsn;
use wal::encode::encode_record;

use crate::local_wal::{LocalWal, LocalWalError};

/// WAL cannot be made durable by waiting.
#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    /// A newer compute has the branch.
    #[error("fenced by a newer term: {0}")]
    Fenced(String),
    /// The local files.
    #[error(transparent)]
    Local(#[from] LocalWalError),
    /// A file that may not be kept under this path.
    #[error(transparent)]
    Path(#[from] wal_redo::AuxPathError),
}

/// Ships WAL. Calls may come from many backends at once.
pub struct WalShipper {
    local: Mutex<LocalWal>,
    proposer: WalProposer,
    cache: PageCache,
    waits: SyncMutex<Waits>,
}

/// Who waits for a quorum, and since when.
#[derive(Debug, Default)]
struct Waits {
    count: usize,
    since: Option<Instant>,
}

impl WalShipper {
    /// Ships what `local` reads, behind what `proposer` already has.
    pub fn new(local: LocalWal, proposer: WalProposer, cache: PageCache) -> Arc<Self> {
        Arc::new(Self { local: Mutex::new(local), proposer, cache, waits: SyncMutex::default() })
    }

    /// Returns when a quorum holds every whole record in the local files: its end.
    pub async fn sync(&self) -> Result<Lsn, ShipError> {
        let (end, horizon) = {
            let mut local = self.local.lock().await;
            while let Some(batch) = local.read_new()? {
                self.append(batch.begin, batch.bytes)?;
            }
            (local.position(), local.horizon())
        };
        self.wait(end).await?;
        self.cache.set_shipped(end);
        self.cache.set_horizon(horizon);
        Ok(end)
    }

    /// Writes a record of the agent's own behind everything that Postgres, which has ended, has written.
    pub async fn append_file(&self, path: &str, content: &[u8], system_identifier: u64) -> Result<Lsn, ShipError> {
        let message = wal_redo::aux_file_main_data(path, content)?;
        let record = wal_redo::aux_file_record(&message);
        // Taken until the end: the local files have nothing behind this position any more.
        let local = self.local.lock().await;
        let encoded = encode_record(local.position(), local.last_record(), system_identifier, &record);
        self.append(encoded.begin, encoded.bytes)?;
        self.wait(encoded.end_lsn).await?;
        Ok(encoded.end_lsn)
    }

    /// How long the longest-waiting caller has been waiting for a quorum, in milliseconds; 0 when nobody waits.
    pub fn waiting_ms(&self) -> u64 {
        self.waits.lock().since.map_or(0, |since| since.elapsed().as_millis() as u64)
    }

    fn append(&self, begin: Lsn, wal: Bytes) -> Result<(), ShipError> {
        self.proposer.append(begin, wal).map_err(|fenced| ShipError::Fenced(fenced.to_string()))
    }

    async fn wait(&self, end: Lsn) -> Result<(), ShipError> {
        if self.proposer.commit_lsn() >= end {
            return Ok(());
        }
        let _waiting = Waiting::new(&self.waits);
        self.proposer.wait_committed(end).await.map_err(|fenced| ShipError::Fenced(fenced.to_string()))
    }
}

/// Counts one caller as waiting as long as it lives.
struct Waiting<'a>(&'a SyncMutex<Waits>);

impl<'a> Waiting<'a> {
    fn new(waits: &'a SyncMutex<Waits>) -> Self {
        let mut now = waits.lock();
        now.count += 1;
        now.since.get_or_insert_with(Instant::now);
        Self(waits)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut now = self.0.lock();
        now.count -= 1;
        // Something was committed (or given up): the others' wait counts from here.
        now.since = (now.count > 0).then(Instant::now);
    }
}
