//! Taking WAL from safekeepers: from another one, and later from all again, where one has given bytes that are no WAL.

use std::sync::Arc;

use safekeeper_client::{BadWal, Distrust, WalChunk, WalReadError, WalReader, WalReaderConfig};
use tokio::{
    sync::watch,
    time::{Duration, Instant, MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;
use types::{Lsn, NodeId};

use super::{
    Branch,
    wal_feed::{FAILURE_PAUSE, FeedEnd, WalSource},
};
use crate::error::StorageError;

/// How often an open stream looks whether it is time to write out or to close.
const TICK: Duration = Duration::from_millis(500);
/// How long others than those whose WAL is bad are tried before all are again; and how long nobody is asked when all have bad WAL.
const DISTRUST: Duration = Duration::from_secs(5);

/// Why no more is taken from one reader.
enum ReaderEnd {
    Feed(FeedEnd),
    Bad(BadWal),
    /// All are distrusted, or the others have had enough time.
    NoneLeft,
}

impl From<FeedEnd> for ReaderEnd {
    fn from(end: FeedEnd) -> ReaderEnd {
        ReaderEnd::Feed(end)
    }
}

impl Branch {
    /// Takes WAL until the stream is of no use, or is closed.
    pub(super) async fn feed_until_end(
        self: &Arc<Self>,
        source: WalSource,
        mut reports: watch::Receiver<Lsn>,
        cancel: &CancellationToken,
    ) -> FeedEnd {
        let config =
            WalReaderConfig { branch: self.name.clone(), safekeepers: source.safekeepers, token: source.token };
        let mut distrust = Distrust::default();
        loop {
            if let Err(error) = self.restart_ingest().await {
                return FeedEnd::Failed(error.to_string());
            }
            let avoided = distrust.nodes().to_vec();
            let patience = (!avoided.is_empty()).then_some(DISTRUST);
            let mut reader = WalReader::avoiding(config.clone(), self.tip().last_record_lsn, avoided);
            // Known since ingestion was restarted; a branch that is not written to must be told too.
            reader.report(self.forgettable_lsn());
            let pause = match self.feed_from(&mut reader, &mut reports, patience, cancel).await {
                ReaderEnd::Feed(end) => return end,
                ReaderEnd::Bad(bad) => {
                    let one_is_known = bad.givers.len() == 1;
                    self.note_bad(&mut distrust, bad);
                    if one_is_known {
                        continue;
                    }
                    FAILURE_PAUSE
                }
                ReaderEnd::NoneLeft => {
                    if !self.complain(&std::mem::take(&mut distrust)) {
                        continue;
                    }
                    // Files may be repaired, and who is away may come back.
                    DISTRUST
                }
            };
            tokio::select! {
                () = sleep(pause) => {}
                () = cancel.cancelled() => return FeedEnd::Cancelled,
            }
        }
    }

    fn note_bad(&self, distrust: &mut Distrust, bad: BadWal) {
        let (tip, is_known) = (self.tip().last_record_lsn, self.progress.borrow().rotten.is_some());
        if !is_known {
            let branch = &self.name;
            tracing::warn!(%branch, safekeepers = ?bad.givers, lsn = %tip, reason = bad.reason, "bad WAL, others are asked for it");
        }
        distrust.note(tip, bad);
    }

    /// Tells that no safekeeper gives WAL that is any, and answers whether it is so; who waits for it waits on.
    fn complain(&self, distrust: &Distrust) -> bool {
        let Some(complaint) = distrust.complaint(self.tip().last_record_lsn) else { return false };
        let complaint: Arc<str> = complaint.into();
        let known = self.progress.borrow().rotten.clone();
        if known.is_none() {
            tracing::error!(branch = %self.name, complaint = %complaint, "no WAL can be taken; it is tried again");
        }
        self.progress.send_modify(|progress| {
            progress.rotten = Some(Arc::clone(&complaint));
            progress.trouble = Some(complaint);
        });
        true
    }

    /// Takes what one reader gives; for so long only, while somebody is avoided.
    async fn feed_from(
        self: &Arc<Self>,
        reader: &mut WalReader,
        reports: &mut watch::Receiver<Lsn>,
        patience: Option<Duration>,
        cancel: &CancellationToken,
    ) -> ReaderEnd {
        let (began, begin) = (Instant::now(), self.tip().last_record_lsn);
        let (mut last_progress, mut tip) = (began, begin);
        // Of the record that is not whole yet.
        let mut givers = Vec::new();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = cancel.cancelled() => return FeedEnd::Cancelled.into(),
                chunk = reader.next() => {
                    let chunk = match chunk {
                        Ok(chunk) => chunk,
                        Err(error) => return self.reading_ended(error).await,
                    };
                    if !chunk.bytes.is_empty() {
                        last_progress = Instant::now();
                        if let Err(error) = self.take(&chunk, &mut tip, &mut givers).await {
                            return match error {
                                StorageError::Undecodable { reason, .. } => ReaderEnd::Bad(BadWal { givers, reason }),
                                error => FeedEnd::Failed(error.to_string()).into(),
                            };
                        }
                    }
                    let told = chunk.commit_lsn.is_valid().then_some(chunk.commit_lsn);
                    self.progress.send_modify(|progress| {
                        if progress.rotten.is_none() || tip > begin {
                            (progress.rotten, progress.trouble) = (None, None);
                        }
                        progress.commit_lsn = told.or(progress.commit_lsn);
                    });
                }
                Ok(()) = reports.changed() => reader.report(*reports.borrow_and_update()),
                _ = tick.tick() => {
                    if patience.is_some_and(|patience| began.elapsed() >= patience) {
                        return ReaderEnd::NoneLeft;
                    }
                    if let Some(end) = self.tick(last_progress).await {
                        return end.into();
                    }
                }
            }
        }
    }

    async fn reading_ended(self: &Arc<Self>, error: WalReadError) -> ReaderEnd {
        match error {
            WalReadError::NoneLeft => return ReaderEnd::NoneLeft,
            WalReadError::Trimmed { .. } => self.forget_if_clean().await,
            WalReadError::Denied(_) | WalReadError::Failed(_) => {}
        }
        FeedEnd::Failed(error.to_string()).into()
    }

    /// Ingests a chunk and keeps the account of who has given what is behind the last whole record.
    async fn take(
        self: &Arc<Self>,
        chunk: &WalChunk,
        tip: &mut Lsn,
        givers: &mut Vec<NodeId>,
    ) -> Result<(), StorageError> {
        if !givers.contains(&chunk.node) {
            givers.push(chunk.node);
        }
        let ingested = self.ingest_wal(chunk.begin, &chunk.bytes).await;
        let now = self.tip().last_record_lsn;
        if now > *tip {
            (*tip, *givers) = (now, vec![chunk.node]);
        }
        ingested?;
        // What is committed ends where a record does. If none does, the length that a record gives has rotted.
        let end = chunk.begin + chunk.bytes.len() as u64;
        if end == chunk.commit_lsn && now < end {
            return Err(self.undecodable(format!("no record ends at {end}, where what is committed does")));
        }
        Ok(())
    }

    pub(super) fn undecodable(&self, reason: String) -> StorageError {
        StorageError::Undecodable { branch: self.name.clone(), at: self.tip().last_record_lsn, reason }
    }
}
