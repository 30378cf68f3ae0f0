//! A branch's committed WAL in pieces, for whoever follows it, whatever protocol they are sent in: from the local segments, and from
//! the object store where these do not have it any more.

use std::{pin::Pin, sync::Arc, time::Duration};

use bucket::{StoredWalReader, WalStoreError};
use bytes::Bytes;
use safekeeper_protocol::message::{BranchStatus, MAX_WAL_BYTES_PER_MESSAGE};
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{Instant, sleep_until, timeout_at},
};
use tracing::warn;
use types::{Lsn, Membership, MembershipGeneration};

use crate::{branch::BranchView, registry::BranchHandle, storage::SegmentReader};

/// A reader is not sent small pieces of WAL more often than this: what each costs is taken from those who commit.
const PIECE_INTERVAL: Duration = Duration::from_millis(3);
/// From here on a piece of WAL is not small.
const SMALL_PIECE_BYTES: u64 = 64 * 1024;

/// Where one reader stands.
pub(crate) struct WalSource {
    handle: Arc<BranchHandle>,
    view: watch::Receiver<BranchView>,
    /// `None` while it is read from.
    segments: Option<SegmentReader>,
    /// `None` while it is read from, and when there is no object store.
    stored: Option<StoredWalReader>,
    /// Goes on where it was when the reader has been told in the meantime that the connection is alive.
    reading: Option<Reading>,
    position: Lsn,
    told: Option<MembershipGeneration>,
    next_piece: Instant,
}

/// What there is to tell a reader next.
pub(crate) enum Next {
    /// WAL, all of it committed, at most [`MAX_WAL_BYTES_PER_MESSAGE`]. The next piece follows on it.
    Wal { begin: Lsn, wal: Bytes, commit_lsn: Lsn },
    /// Nothing for as long as the reader wanted to wait.
    Nothing { commit_lsn: Lsn },
    /// The branch's membership, at first and when it changes.
    Membership(Arc<Membership>),
    /// Neither here nor in the object store is what comes next. Nothing will follow.
    Trimmed { log_start_lsn: Lsn },
    /// The branch has been deleted.
    Deleted,
    /// Its files can't be used; says why.
    Failed(String),
}

/// Why nothing more comes.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceEnd {
    #[error("the server is stopping")]
    Stopping,
    #[error("{0}")]
    Unreadable(String),
}

type Reading = Pin<Box<dyn Future<Output = (StoredWalReader, Result<Option<Bytes>, WalStoreError>)> + Send>>;

impl WalSource {
    /// The WAL from this position on.
    pub fn new(handle: Arc<BranchHandle>, from: Lsn) -> WalSource {
        let (view, stored) = (handle.view.clone(), handle.stored.clone().map(StoredWalReader::new));
        let (segments, reading, told, next_piece) = (None, None, None, Instant::now());
        WalSource { handle, view, segments, stored, reading, position: from, told, next_piece }
    }

    /// Where the next piece begins.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// What comes next, after at most so long. Cancel-safe.
    pub async fn next(&mut self, patience: Duration) -> Result<Next, SourceEnd> {
        let deadline = Instant::now() + patience;
        loop {
            let current = self.view.borrow_and_update().clone();
            let status = match current {
                BranchView::Here { status, membership, .. } => {
                    if let Some(newer) = membership.filter(|membership| self.told < Some(membership.generation)) {
                        self.told = Some(newer.generation);
                        return Ok(Next::Membership(newer));
                    }
                    status
                }
                BranchView::Loading => BranchStatus::default(),
                BranchView::Deleted => return Ok(Next::Deleted),
                BranchView::Failed(reason) => return Ok(Next::Failed(reason)),
            };
            let (commit_lsn, begin) = (status.commit_lsn, self.position);
            if begin < status.log_start_lsn {
                return match timeout_at(deadline, self.read_stored(commit_lsn)).await {
                    Ok(Ok(Some(wal))) => Ok(self.advance(wal, commit_lsn)),
                    Ok(Ok(None)) => Ok(Next::Trimmed { log_start_lsn: status.log_start_lsn }),
                    Ok(Err(error)) => {
                        warn!(lsn = %begin, %error, "WAL could not be read from the object store");
                        Err(SourceEnd::Unreadable(error.to_string()))
                    }
                    Err(_) => Ok(Next::Nothing { commit_lsn }),
                };
            }
            let is_small = commit_lsn.0.saturating_sub(begin.0) < SMALL_PIECE_BYTES;
            if begin < commit_lsn && is_small && Instant::now() < self.next_piece {
                sleep_until(self.next_piece).await;
                continue;
            }
            if begin < commit_lsn {
                let end = commit_lsn.min(begin + MAX_WAL_BYTES_PER_MESSAGE as u64);
                let wal = self.read_local(end).await?;
                self.next_piece = Instant::now() + PIECE_INTERVAL;
                return Ok(self.advance(wal, commit_lsn));
            }
            match timeout_at(deadline, self.view.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(SourceEnd::Stopping),
                Err(_) => return Ok(Next::Nothing { commit_lsn }),
            }
        }
    }

    fn advance(&mut self, wal: Bytes, commit_lsn: Lsn) -> Next {
        let begin = self.position;
        self.position = begin + wal.len() as u64;
        Next::Wal { begin, wal, commit_lsn }
    }

    async fn read_local(&mut self, end: Lsn) -> Result<Bytes, SourceEnd> {
        let begin = self.position;
        let directory = &self.handle.directory;
        let mut segments = self.segments.take().unwrap_or_else(|| SegmentReader::new(directory.clone()));
        if let Some(wal) = segments.read_cached(begin, end) {
            self.segments = Some(segments);
            return Ok(wal.into());
        }
        let read = spawn_blocking(move || {
            let wal = segments.read(begin, end);
            (segments, wal)
        });
        let (segments, wal) = read.await.map_err(|_| SourceEnd::Stopping)?;
        self.segments = Some(segments);
        // A file may have been trimmed meanwhile: the reader comes back and is told so.
        wal.map(Bytes::from).map_err(|error| SourceEnd::Unreadable(error.to_string()))
    }

    /// WAL that is not here any more; `None` when the object store does not have it either. Cancel-safe: a later call goes on.
    async fn read_stored(&mut self, commit_lsn: Lsn) -> Result<Option<Bytes>, WalStoreError> {
        if let Some(mut stored) = self.stored.take() {
            let position = self.position;
            let most = (commit_lsn.0.saturating_sub(position.0) as usize).min(MAX_WAL_BYTES_PER_MESSAGE);
            self.reading = Some(Box::pin(async move {
                let read = stored.read(position, most).await;
                (stored, read)
            }));
        }
        let Some(reading) = &mut self.reading else { return Ok(None) };
        let (stored, read) = reading.await;
        (self.stored, self.reading) = (Some(stored), None);
        read
    }
}
