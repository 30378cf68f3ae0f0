//! Whether the disk takes what it is given. While it does not, the safekeeper acknowledges nothing, and says why when it is asked.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::{task::spawn_blocking, time::sleep};
use tracing::{error, info};

/// How often a disk that has failed is tried again.
const PROBE_INTERVAL: Duration = Duration::from_secs(2);
/// As much as the largest message that has to be written.
const PROBE_BYTES: usize = 1 << 20;
const PROBE_NAME: &str = "probe";

/// What is known of the data directory's disk.
#[derive(Default)]
pub(crate) struct Health {
    trouble: Mutex<Option<String>>,
}

impl Health {
    /// A write, or an fsync, failed.
    pub fn failed(&self, reason: &str) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if trouble.is_none() {
            error!(error = reason, "the disk does not take WAL: this safekeeper steps aside until it does");
        }
        *trouble = Some(reason.to_owned());
    }

    /// Why WAL is not taken; `None` when it is.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tries the disk again and again while it fails. Never ends.
    pub async fn watch(&self, data_dir: PathBuf) {
        loop {
            sleep(PROBE_INTERVAL).await;
            if self.trouble().is_none() {
                continue;
            }
            let directory = data_dir.clone();
            match spawn_blocking(move || probe(&directory)).await {
                Ok(Ok(())) => {
                    *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    info!("the disk takes WAL again");
                }
                Ok(Err(error)) => self.failed(&format!("write {}: {error}", data_dir.display())),
                Err(_stopping) => return,
            }
        }
    }
}

/// Writes as WAL is written.
fn probe(directory: &Path) -> std::io::Result<()> {
    let path = directory.join(PROBE_NAME);
    let written = File::create(&path).and_then(|mut file| {
        file.write_all(&vec![0; PROBE_BYTES])?;
        file.sync_data()
    });
    let removed = std::fs::remove_file(&path);
    written.and(removed)
}

/// Bytes that can still be written below a directory; zero when that can't be known.
pub(crate) fn free_bytes(directory: &Path) -> u64 {
    rustix::fs::statvfs(directory).map_or(0, |disk| disk.f_bavail.saturating_mul(disk.f_frsize))
}
