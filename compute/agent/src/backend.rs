//! Answers the shim: pages and sizes from the pageserver, WAL syncs by the quorum.

use std::{future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use page_cache::PageCache;
use pageserver_client::{ClientError, PageserverClient};
use parking_lot::Mutex;
use safekeeper_client::WalProposer;
use shim_server::{BackendError, ShimBackend};
use tokio_util::sync::CancellationToken;
use types::{BlockNumber, BranchRef, Lsn, Oid, PageTag, RelTag};
use wire::pageserver::ReadLsn;

use crate::{
    last_written::LastWritten,
    shipper::{ShipError, WalShipper},
};

/// First and longest pause between two attempts at the pageserver.
const RETRY_MIN: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_secs(1);

/// The agent as the shim sees it.
pub struct AgentBackend {
    /// The branch that is served.
    pub branch: BranchRef,
    /// Where its pages are.
    pub pageserver: PageserverClient,
    /// The same by a connection of its own, for what is read ahead: by other threads, and long answers hold up nothing else.
    pub pageserver_ahead: PageserverClient,
    /// The term's proposer.
    pub proposer: WalProposer,
    /// What the compute knows of pages and sizes.
    pub cache: PageCache,
    /// Ships WAL.
    pub shipper: Arc<WalShipper>,
    /// Which reads must wait for which WAL.
    pub last_written: Arc<LastWritten>,
    /// Why the pageserver does not answer, when it does not.
    pub storage_problem: Mutex<Option<String>>,
    /// Cancelled when reads shall fail rather than wait: Postgres cannot stop while a backend waits for a page.
    pub give_up_reads: CancellationToken,
    /// Cancelled once Postgres is gone.
    pub stopping: CancellationToken,
}

impl AgentBackend {
    /// Reads at the end of what a quorum holds.
    ///
    /// What is asked for is never newer: Postgres evicts a page only after its WAL has been synced, and answers reads of
    /// what it has not evicted from memory. So a bucket that was raised by WAL still on its way counts as committed.
    fn read_at(&self, last_change: Lsn) -> ReadLsn {
        let request = self.proposer.commit_lsn();
        ReadLsn { request, not_modified_since: last_change.min(request) }
    }

    /// Repeats a call while waiting can help.
    async fn retrying<T, F>(&self, what: &str, call: impl Fn() -> F) -> Result<T, BackendError>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let mut pause = RETRY_MIN;
        loop {
            let error = tokio::select! {
                answer = call() => match answer {
                    Ok(answer) => break self.done(pause, answer),
                    Err(error) => error,
                },
                () = self.give_up_reads.cancelled() => return Err(BackendError::Stopping),
            };
            if let Some(reason) = self.proposer.fenced() {
                return Err(BackendError::Fenced(reason));
            }
            if !error.is_retryable() {
                tracing::error!(%error, "cannot read {what}");
                return Err(BackendError::Storage(format!("{what}: {error}")));
            }
            if pause == RETRY_MIN {
                tracing::warn!(%error, "reading {what}: trying again");
            }
            *self.storage_problem.lock() = Some(error.to_string());
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.give_up_reads.cancelled() => return Err(BackendError::Stopping),
            }
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    fn done<T>(&self, pause: Duration, answer: T) -> Result<T, BackendError> {
        if pause > RETRY_MIN {
            *self.storage_problem.lock() = None;
        }
        Ok(answer)
    }

    /// The page and those behind it, all as of one position: the position and the pages.
    async fn read_pages(
        &self,
        pageserver: &PageserverClient,
        tags: &[PageTag],
    ) -> Result<(Lsn, Vec<Bytes>), BackendError> {
        let last_change = tags.iter().map(|tag| self.last_written.page(tag)).max().unwrap_or(Lsn::INVALID);
        let at = self.read_at(last_change);
        let what = tags.first().map_or_else(String::new, PageTag::to_string);
        let call = || pageserver.get_pages(&self.branch, tags.to_vec(), at);
        let pages = self.retrying(&what, call).await?;
        Ok((at.request, pages))
    }
}

#[async_trait]
impl ShimBackend for AgentBackend {
    async fn get_page(&self, tag: PageTag) -> Result<Bytes, BackendError> {
        let (_, pages) = self.read_pages(&self.pageserver, &[tag]).await?;
        let page = pages.into_iter().next();
        page.ok_or_else(|| BackendError::Storage(format!("{tag}: the pageserver sent no page")))
    }

    async fn get_pages_ahead(&self, tags: Vec<PageTag>) -> Result<Vec<(PageTag, Bytes)>, BackendError> {
        let (as_of, pages) = self.read_pages(&self.pageserver_ahead, &tags).await?;
        // A page that another backend may have changed meanwhile, or that does not exist yet, is not sent ahead.
        let current = |tag: &PageTag| self.last_written.page(tag) <= as_of;
        let useful = |(tag, page): &(PageTag, Bytes)| current(tag) && page.iter().any(|byte| *byte != 0);
        Ok(tags.into_iter().zip(pages).filter(useful).collect())
    }

    async fn rel_size(&self, rel: RelTag) -> Result<Option<BlockNumber>, BackendError> {
        let at = self.read_at(self.last_written.rel_size(&rel));
        self.retrying(&format!("size of {rel}"), || self.pageserver.rel_size(&self.branch, rel, at)).await
    }

    async fn list_rels(&self, spc: Oid, db: Oid) -> Result<Vec<(RelTag, BlockNumber)>, BackendError> {
        let at = self.read_at(Lsn::MAX);
        let what = format!("relations of database {spc}/{db}");
        self.retrying(&what, || self.pageserver.list_rels(&self.branch, spc, db, at)).await
    }

    async fn sync_wal(&self) -> Result<(), BackendError> {
        match self.shipper.sync().await {
            Ok(_) => Ok(()),
            Err(ShipError::Fenced(reason)) => Err(BackendError::Fenced(reason)),
            Err(error @ ShipError::Local(_)) => {
                tracing::error!(%error, "cannot ship WAL");
                Err(BackendError::Storage(error.to_string()))
            }
        }
    }

    async fn wal_written(&self) {
        if let Err(error) = self.shipper.ship_ahead().await {
            tracing::debug!(%error, "cannot ship WAL ahead of its sync");
        }
    }
}
