//! Who may ask what, and who answers it.

use std::sync::Arc;

use futures::StreamExt;
use types::{BranchId, BranchRef, Lsn, Oid, PageTag, RelTag};
use wire::{
    Claims,
    pageserver::{
        BranchInfo, BranchSizes, ErrorKind, MAX_BRANCHES_PER_REQUEST, MAX_PAGES_PER_REQUEST, PageserverError, ReadLsn,
        Request, RequestBody, ResponseBody,
    },
};

use crate::{
    base_files::base_files,
    branch::{Branch, Branches},
    error::StorageError,
    server::fair::FairTurns,
    storage::{Key, Kind, Value, decode_rel_size},
};

/// Branches of one request whose sizes are looked up at a time.
const CONCURRENT_SIZES: usize = 16;

/// Requests that make pages at a time, of all projects together.
const PAGE_TURNS: usize = 32;
/// Pages made in one turn; a larger request takes several.
const PAGES_PER_TURN: usize = 64;

/// Answers requests.
pub struct Handler {
    branches: Arc<Branches>,
    turns: Arc<FairTurns>,
}

impl Handler {
    /// For these branches.
    pub fn new(branches: Arc<Branches>) -> Handler {
        Handler { branches, turns: FairTurns::new(PAGE_TURNS) }
    }

    /// One request of a connection with these claims.
    pub async fn handle(&self, claims: &Claims, request: Request) -> Result<ResponseBody, PageserverError> {
        let for_compute = match &request.body {
            RequestBody::GetPages { .. }
            | RequestBody::RelSize { .. }
            | RequestBody::ListRels { .. }
            | RequestBody::Ingested { .. }
            | RequestBody::BaseFiles { .. } => true,
            RequestBody::CreateBranch { .. }
            | RequestBody::DeleteBranch
            | RequestBody::BranchInfo
            | RequestBody::LsnByTimestamp { .. }
            | RequestBody::TimestampByLsn { .. }
            | RequestBody::CollectGarbage { .. }
            | RequestBody::DetachBranch
            | RequestBody::Sizes { .. }
            | RequestBody::TakeOver { .. }
            | RequestBody::Checkpoint { .. } => false,
        };
        let allowed = claims.is_service() || (for_compute && claims.allows_branch(&request.branch));
        if !allowed {
            let message = format!("the token does not allow this on branch {}", request.branch);
            return Err(PageserverError { kind: ErrorKind::Denied, message });
        }
        let mut answer = Box::pin(self.answer(&request.branch, request.body)).await;
        if let Err(StorageError::Damaged { .. }) = answer {
            // Perhaps another pageserver had the branch until lately, and has put other layers in place of those we knew.
            answer = self.branches.get(&request.branch).await?.or_stale(answer).await;
        }
        answer.map_err(|error| {
            let error = PageserverError::from(error);
            if error.kind == ErrorKind::Corrupt {
                tracing::error!(branch = %request.branch, error = %error.message, "request failed");
            }
            error
        })
    }

    async fn answer(&self, name: &BranchRef, body: RequestBody) -> Result<ResponseBody, StorageError> {
        match body {
            RequestBody::GetPages { pages, at } => {
                let branch = self.branches.get(name).await?;
                self.get_pages(&branch, &pages, at).await
            }
            RequestBody::RelSize { rel, at } => {
                let branch = self.branches.get(name).await?;
                let lsn = branch.resolve(at).await?;
                Ok(ResponseBody::RelSize(branch.rel_size(rel, lsn).await?))
            }
            RequestBody::ListRels { spc, db, at } => {
                let branch = self.branches.get(name).await?;
                list_rels(&branch, spc, db, at).await
            }
            RequestBody::BaseFiles { at } => {
                let branch = self.branches.get(name).await?;
                let files = base_files(&branch, at).await?;
                Ok(ResponseBody::BaseFiles(Box::new(files.as_ref().clone())))
            }
            RequestBody::Ingested { committed } => {
                let branch = self.branches.get(name).await?;
                let ingested = branch.tip().last_record_lsn;
                if ingested < committed {
                    branch.open_feed();
                }
                Ok(ResponseBody::Lsn(ingested))
            }
            RequestBody::CreateBranch { ancestor, at } => {
                let lsn = self.branches.create(name, &ancestor, at).await?;
                Ok(ResponseBody::BranchCreated { lsn })
            }
            RequestBody::DeleteBranch => {
                self.branches.delete(name).await?;
                Ok(ResponseBody::Done)
            }
            RequestBody::BranchInfo => branch_info(&self.branches.get(name).await?).await,
            RequestBody::LsnByTimestamp { timestamp_us } => {
                let branch = self.branches.get(name).await?;
                branch.catch_up().await?;
                Ok(ResponseBody::Lsn(branch.lsn_by_timestamp(timestamp_us).await?))
            }
            RequestBody::TimestampByLsn { lsn } => {
                let branch = self.branches.get(name).await?;
                branch.wait_for(lsn).await?;
                Ok(ResponseBody::Timestamp(branch.timestamp_by_lsn(lsn).await?))
            }
            RequestBody::CollectGarbage { since_us, leases } => {
                Ok(ResponseBody::GarbageCollected(self.branches.collect_garbage(name, since_us, &leases).await?))
            }
            RequestBody::DetachBranch => {
                self.branches.detach(name).await?;
                Ok(ResponseBody::Done)
            }
            RequestBody::Sizes { branches } => self.sizes(name, branches).await,
            RequestBody::TakeOver { generation } => {
                self.branches.take_over(&name.project, generation).await?;
                Ok(ResponseBody::Done)
            }
            RequestBody::Checkpoint { up_to } => {
                let branch = self.branches.get(name).await?;
                branch.wait_for(up_to).await?;
                Ok(ResponseBody::Lsn(branch.flush().await?))
            }
        }
    }

    async fn get_pages(
        &self,
        branch: &Arc<Branch>,
        tags: &[PageTag],
        at: ReadLsn,
    ) -> Result<ResponseBody, StorageError> {
        if tags.len() > MAX_PAGES_PER_REQUEST {
            let message = format!("{} pages in one request, at most {MAX_PAGES_PER_REQUEST} are allowed", tags.len());
            return Err(StorageError::Invalid(message));
        }
        // No turn is held while WAL is waited for.
        let lsn = branch.resolve(at).await?;
        let mut pages = Vec::with_capacity(tags.len());
        for some in tags.chunks(PAGES_PER_TURN) {
            let _turn = self.turns.take(&branch.name().project).await.ok_or(StorageError::Stopping)?;
            pages.extend(branch.get_pages(some, lsn).await?);
        }
        Ok(ResponseBody::Pages(pages))
    }

    async fn sizes(&self, any: &BranchRef, asked: Vec<(BranchId, Lsn)>) -> Result<ResponseBody, StorageError> {
        if asked.len() > MAX_BRANCHES_PER_REQUEST {
            let message = format!("{} branches in one request, at most {MAX_BRANCHES_PER_REQUEST}", asked.len());
            return Err(StorageError::Invalid(message));
        }
        let one = |(branch, up_to)| {
            let name = BranchRef { project: any.project.clone(), branch };
            sizes_of(&self.branches, name, up_to)
        };
        let all: Vec<_> = asked.into_iter().map(one).collect();
        Ok(ResponseBody::Sizes(futures::stream::iter(all).buffered(CONCURRENT_SIZES).collect().await))
    }
}

async fn sizes_of(branches: &Arc<Branches>, name: BranchRef, up_to: Lsn) -> Option<BranchSizes> {
    match branches.sizes(&name, up_to).await {
        Ok(sizes) => Some(sizes),
        Err(error) => {
            tracing::debug!(branch = %name, %error, "sizes are not known");
            None
        }
    }
}

async fn list_rels(branch: &Arc<Branch>, spc: Oid, db: Oid, at: ReadLsn) -> Result<ResponseBody, StorageError> {
    let lsn = branch.resolve(at).await?;
    let first = Key { spc, db, ..Key::of(Kind::RelSize) };
    let last = Key { spc, db, ..Key::last_of(Kind::RelSize) };
    let forks = branch.scan(first, last, lsn).await?;
    let sized = forks.iter().filter_map(|(key, value)| match value {
        Value::Image(content) => Some((key.rel_tag()?, decode_rel_size(content)?)),
        Value::Tombstone | Value::Record(_) => None,
    });
    Ok(ResponseBody::Rels(sized.collect::<Vec<(RelTag, u32)>>()))
}

async fn branch_info(branch: &Arc<Branch>) -> Result<ResponseBody, StorageError> {
    Ok(ResponseBody::BranchInfo(BranchInfo {
        last_record_lsn: branch.tip().last_record_lsn,
        remote_consistent_lsn: branch.remote_consistent_lsn(),
        ancestor: branch.ancestor().map(|ancestor| (ancestor.branch, ancestor.lsn)),
        generation: branch.generation(),
        logical_size_bytes: branch.logical_bytes().await?,
        ingest_error: branch.ingest_error(),
    }))
}
