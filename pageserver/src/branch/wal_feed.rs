//! The WAL stream of a branch: opened when somebody needs WAL that is not ingested yet, closed when nothing happens.

use std::sync::{Arc, atomic::Ordering};

use tokio::{
    sync::watch,
    time::{Duration, Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use types::{Lsn, Member};

use super::Branch;
use crate::{
    error::StorageError,
    ingest::{Ingest, IngestError},
};

/// How long a stream that failed stays closed at least.
pub(super) const FAILURE_PAUSE: Duration = Duration::from_secs(1);
/// Ingestion waits while more memory layers than this have not been written out.
const MAX_FROZEN_LAYERS: usize = 2;
/// A branch with less than this in memory need not write it out because of others.
const SMALL_SHARE_BYTES: usize = 256 << 10;
/// Longest wait for a safekeeper to say where committed WAL ends.
const CATCH_UP_WAIT: Duration = Duration::from_secs(3);

/// The safekeepers that have WAL.
#[derive(Clone)]
pub struct WalSource {
    /// They tell of a branch's members where these are others.
    pub safekeepers: Vec<Member>,
    /// Shown to them. Never logged.
    pub token: String,
}

/// An open stream; dropping it closes it.
pub(super) struct Feed {
    cancel: CancellationToken,
    report: watch::Sender<Lsn>,
}

impl Feed {
    /// Lets the safekeepers drop WAL up to here.
    pub(super) fn report(&self, lsn: Lsn) {
        self.report.send_replace(lsn);
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// Why a stream ended.
pub(super) enum FeedEnd {
    Idle,
    Cancelled,
    Failed(String),
}

impl Branch {
    /// Opens the stream if it is not open and can be.
    pub fn open_feed(self: &Arc<Self>) {
        let Some(source) = &self.shared.wal else { return };
        let mut feed = self.feed.lock();
        if feed.is_some() || self.progress.borrow().stopped.is_some() || self.is_let_go() {
            return;
        }
        let cancel = CancellationToken::new();
        let (report, reports) = watch::channel(Lsn::INVALID);
        *feed = Some(Feed { cancel: cancel.clone(), report });
        tokio::spawn(self.clone().run_feed(source.clone(), reports, cancel));
    }

    /// Closes the stream, if it is open. What was ingested stays.
    pub fn close_feed(&self) {
        self.feed.lock().take();
    }

    /// It takes no WAL and writes nothing out any more, and who waits for it is told to ask again; the next asker attaches the
    /// branch anew, if it still exists. What is only in memory is ingested again. The caller holds `flush`, or sees to it in
    /// another way that nobody else writes under this generation before what is being written is.
    pub(super) fn retire(&self) {
        self.let_go.store(true, Ordering::Release);
        self.close_feed();
        self.progress.send_modify(|_| {});
        if let Some(registry) = self.registry.upgrade() {
            registry.forget(self);
        }
    }

    /// True while the stream is open.
    pub fn has_feed(&self) -> bool {
        self.feed.lock().is_some()
    }

    /// Ingests what is committed by now, as far as a safekeeper can be asked soon; else leaves it at what there is.
    pub async fn catch_up(self: &Arc<Self>) -> Result<(), StorageError> {
        if self.shared.wal.is_none() {
            return Ok(());
        }
        self.progress.send_modify(|progress| progress.commit_lsn = None);
        let mut progress = self.progress.subscribe();
        self.open_feed();
        let told = progress.wait_for(|now| now.commit_lsn.is_some() || now.stopped.is_some());
        let commit_lsn = match tokio::time::timeout(CATCH_UP_WAIT, told).await {
            Ok(Ok(now)) => now.commit_lsn,
            Ok(Err(_)) | Err(_) => None,
        };
        match commit_lsn {
            Some(lsn) => self.wait_for(lsn).await,
            None => Ok(()),
        }
    }

    async fn run_feed(self: Arc<Self>, source: WalSource, reports: watch::Receiver<Lsn>, cancel: CancellationToken) {
        let end = self.feed_until_end(source, reports, &cancel).await;
        self.progress.send_modify(|progress| progress.commit_lsn = None);
        match end {
            FeedEnd::Cancelled => return,
            FeedEnd::Idle => tracing::debug!(branch = %self.name, "WAL stream closed, nothing happens"),
            FeedEnd::Failed(reason) => {
                tracing::warn!(branch = %self.name, reason, "WAL stream failed");
                self.progress.send_modify(|progress| progress.trouble = Some(reason.into()));
                tokio::select! {
                    () = sleep(FAILURE_PAUSE) => {}
                    () = cancel.cancelled() => return,
                }
            }
        }
        // Only our own feed is taken away: another may have been opened after a cancellation.
        let mut feed = self.feed.lock();
        if !cancel.is_cancelled() {
            feed.take();
        }
        drop(feed);
        // Whoever came to wait while the stream was ending relies on it.
        if self.progress.receiver_count() > 0 {
            self.open_feed();
        }
    }

    /// Writes out when WAL has paused or too much time has passed; says so when the stream is of no use.
    pub(super) async fn tick(self: &Arc<Self>, last_progress: Instant) -> Option<FeedEnd> {
        let tuning = &self.shared.tuning;
        let quiet = last_progress.elapsed();
        if !self.is_clean() {
            let due = quiet >= tuning.idle_flush || self.last_flush().await.elapsed() >= tuning.max_unflushed;
            if due && let Err(error) = self.flush().await {
                tracing::warn!(branch = %self.name, %error, "could not write out; will try again");
            }
            return None;
        }
        let unused = self.last_used.lock().elapsed();
        (quiet.min(unused) >= tuning.idle_close).then_some(FeedEnd::Idle)
    }

    /// WAL that we would need was trimmed: a newer manifest must exist, which attaching again finds.
    pub(super) async fn forget_if_clean(&self) {
        let _nothing_is_written = self.flush.lock().await;
        if self.is_clean() {
            self.retire();
        }
    }

    /// Starts to decode anew at the end of the last record.
    pub(super) async fn restart_ingest(self: &Arc<Self>) -> Result<(), StorageError> {
        let mut ingest = self.ingest.lock().await;
        let state = self.ingest_state(&mut ingest).await;
        self.or_stale(state).await?.restart(self.tip().last_record_lsn);
        Ok(())
    }

    /// The ingestion state, loaded if it is not there.
    pub(super) async fn ingest_state<'a>(
        self: &Arc<Self>,
        ingest: &'a mut Option<Box<Ingest>>,
    ) -> Result<&'a mut Ingest, StorageError> {
        if ingest.is_none() {
            let loaded = Box::pin(Ingest::load(self)).await?;
            self.note_ingest(&loaded);
            *ingest = Some(Box::new(loaded));
        }
        match ingest {
            Some(ingest) => Ok(ingest),
            None => Err(StorageError::Stopping),
        }
    }

    /// Ingests WAL bytes that follow those before. Whole records are visible when it returns. A record that
    /// can't be understood ends ingestion for good; other errors leave everything as after the last record that was applied.
    pub async fn ingest_wal(self: &Arc<Self>, begin: Lsn, bytes: &[u8]) -> Result<(), StorageError> {
        let ingested = self.ingest_wal_here(begin, bytes).await;
        self.or_stale(ingested).await
    }

    async fn ingest_wal_here(self: &Arc<Self>, begin: Lsn, bytes: &[u8]) -> Result<(), StorageError> {
        let mut slot = self.ingest.lock().await;
        let ingest = self.ingest_state(&mut slot).await?;
        let outcome = Box::pin(ingest.feed(self, begin, bytes)).await;
        match outcome {
            Ok(()) => self.note_ingest(ingest),
            Err(error) => {
                *slot = None;
                return match error {
                    IngestError::Storage(error) => Err(error),
                    IngestError::Undecodable(reason) => Err(self.undecodable(reason)),
                    IngestError::Stopped(reason) => {
                        self.stop_ingest(reason.clone());
                        Err(self.stopped(self.tip().last_record_lsn, &reason))
                    }
                };
            }
        }
        drop(slot);
        self.make_room().await;
        Ok(())
    }

    /// Starts writing out when the branch has much in memory, and waits for it when it has very much, or all branches
    /// together have too much.
    pub async fn make_room(self: &Arc<Self>) {
        let (open, all) = self.memory_bytes();
        let crowded = self.shared.ingest_memory.is_over(self.shared.tuning.ingest_memory_bytes);
        let full = open >= self.shared.tuning.checkpoint_distance_bytes;
        let must_give_way = crowded && all >= SMALL_SHARE_BYTES;
        if !full && !must_give_way {
            return;
        }
        self.freeze();
        let most = if crowded { 0 } else { MAX_FROZEN_LAYERS };
        let mut writing = self.write_frozen_in_background();
        while self.frozen_layers() > most && self.progress.borrow().stopped.is_none() {
            let changed = self.layers_changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.frozen_layers() <= most {
                break;
            }
            tokio::select! {
                () = changed => {}
                outcome = &mut writing => {
                    if let Ok(Err(error)) = outcome {
                        tracing::warn!(branch = %self.name, %error, "ingestion waits until memory can be written out");
                        sleep(FAILURE_PAUSE).await;
                    }
                    writing = self.write_frozen_in_background();
                }
            }
        }
    }

    /// Goes on when its handle is dropped.
    fn write_frozen_in_background(self: &Arc<Self>) -> tokio::task::JoinHandle<Result<Lsn, StorageError>> {
        let branch = self.clone();
        tokio::spawn(async move {
            let written = branch.write_frozen().await;
            if let Err(error) = &written {
                tracing::debug!(branch = %branch.name, %error, "memory could not be written out; will be tried again");
            }
            written
        })
    }
}
