//! In-place restore: a branch keeps its id, name and endpoint and gets another timeline; the old one lives on under another
//! name. And detaching: a branch gets all its data to itself.

use std::sync::Arc;

use control_plane_api::v2::{BranchEnvelope, RestoreRequest};
use types::{BranchId, BranchRef, Lsn};
use wire::pageserver::BranchPoint;

use crate::{
    app::App,
    branching,
    compute::SuspendReason,
    history::{self, Point, Position},
    names,
    problem::Problem,
    store::{
        branches::{self, BranchRow, NewBranch, Restored},
        endpoints,
        operations::{self, Action},
        query_cache,
    },
};

/// Sets a branch back to a point of its own history, or to one of another branch's. What it was stays as a branch of its
/// own under the name asked for; without a name it is deleted. Its compute is put to sleep; the next connection wakes it on
/// the restored state.
pub async fn restore(app: &Arc<App>, branch: BranchRef, request: RestoreRequest) -> Result<BranchEnvelope, Problem> {
    let wanted = Wanted::new(app, branch, request).await?;
    // What is begun is finished or undone even if the one who asked for it is gone.
    let app = Arc::clone(app);
    let task = tokio::spawn(async move {
        let begun = begin(&app, &wanted).await?;
        match exchange(&app, &wanted, &begun).await {
            Ok(answer) => Ok(answer),
            Err(problem) => {
                // Nothing was exchanged: the row of the old state still stands for the new timeline.
                let old = begun.old.clone();
                app.store.call(move |db| branches::force_deleting(db, &old)).await?;
                branching::finish_deletion(&app, &begun.old).await?;
                let (operation, error) = (begun.operation, problem.to_string());
                app.store.call(move |db| operations::end(db, &operation, Some(&error))).await?;
                Err(problem)
            }
        }
    });
    task.await.unwrap_or_else(|e| Err(Problem::Internal(format!("restore: {e}"))))
}

/// A request that was checked, and the point it means.
struct Wanted {
    target: BranchRow,
    position: Position,
    /// Restored from another branch: its roles and databases come with it.
    catalog_from: Option<BranchId>,
    keep_as: Option<String>,
    timestamp: Option<String>,
}

/// What the database knows of a restore before storage does.
struct Begun {
    /// The branch that will have the old state.
    old: BranchRef,
    operation: String,
}

impl Wanted {
    async fn new(app: &App, branch: BranchRef, request: RestoreRequest) -> Result<Wanted, Problem> {
        let point = Point::new(
            ("source_lsn", request.source_lsn.as_deref()),
            ("source_timestamp", request.source_timestamp.as_deref()),
        )?;
        let source = BranchId::new(&request.source_branch_id);
        let source = source.map_err(|e| Problem::Invalid(format!("source_branch_id: {e}")))?;
        let keep_as = request.preserve_under_name.map(|name| names::check_title("branch", &name)).transpose()?;
        let wanted = branch.clone();
        let rows = app.store.call(move |db| {
            let target = branches::get(db, &wanted.project, &wanted.branch)?;
            let children = branches::children(db, &wanted.branch)?;
            Ok((target, branches::get(db, &wanted.project, &source)?, children))
        });
        let (target, source, children) = rows.await?;
        let from_itself = source.branch == target.branch;
        if from_itself && point == Point::Head {
            return Err(Problem::Invalid("say to which point: source_lsn or source_timestamp".into()));
        }
        if keep_as.is_none() && (from_itself || !children.is_empty()) {
            let reason = if from_itself { "the restored branch is made from it" } else { "it has children" };
            return Err(Problem::Invalid(format!("preserve_under_name is missing: the old state must stay, {reason}")));
        }
        let head = app.computes.head(&source.branch).await?;
        let catalog_from = (!from_itself).then(|| source.branch.branch.clone());
        let position = history::locate(app, source, head, point).await?;
        Ok(Wanted { target, position, catalog_from, keep_as, timestamp: request.source_timestamp })
    }
}

async fn begin(app: &App, wanted: &Wanted) -> Result<Begun, Problem> {
    let old = BranchRef { project: wanted.target.branch.project.clone(), branch: names::branch_id() };
    let name = wanted.keep_as.clone().unwrap_or_else(|| format!("replaced-{}", old.branch));
    let new = NewBranch {
        branch: old.clone(),
        name,
        parent: Some(wanted.position.branch.branch.branch.clone()),
        parent_timestamp: None,
        is_default: false,
        protected: false,
    };
    let target = wanted.target.branch.clone();
    app.store
        .call(move |db| {
            branches::insert(db, &new)?;
            let operation = operations::begin(db, &target, None, Action::Restore)?.id;
            Ok(Begun { old, operation })
        })
        .await
}

async fn exchange(app: &Arc<App>, wanted: &Wanted, begun: &Begun) -> Result<BranchEnvelope, Problem> {
    let (target, source) = (&wanted.target.branch, &wanted.position.branch);
    // Until the exchange is done nobody wakes the branch's compute, which would write to the old timeline.
    let paused = app.computes.pause(target, SuspendReason::Restored).await?;
    let creation = app.storage.create_branch(&begun.old, &source.timeline, BranchPoint::Lsn(wanted.position.lsn));
    let start: Lsn = history::patiently(app, &source.branch, creation).await?;
    let restored = Restored {
        target: target.clone(),
        old: begun.old.clone(),
        source: source.branch.branch.clone(),
        start,
        timestamp: wanted.timestamp.clone(),
        catalog_from: wanted.catalog_from.clone(),
    };
    let operation = begun.operation.clone();
    let done = app.store.call(move |db| {
        let row = branches::exchange_timelines(db, &restored)?;
        // What proxies have kept are answers of the old state.
        if let Some(endpoint) = endpoints::of_branch(db, &restored.target.branch)? {
            query_cache::invalidate(db, &endpoint.id, &[])?;
        }
        operations::end(db, &operation, None)?;
        Ok((row, operations::get(db, &restored.target.project, &operation)?))
    });
    let (row, operation) = done.await?;
    drop(paused);
    tracing::info!(branch = %target, source = %source.branch, lsn = %start, old = %begun.old.branch, "branch was restored");
    if wanted.keep_as.is_none() {
        discard(app, begun.old.clone());
    }
    Ok(BranchEnvelope { branch: app.branch(row), operations: vec![operation] })
}

/// Deletes the old state in the background; what a stop interrupts is finished at the next start.
fn discard(app: &Arc<App>, old: BranchRef) {
    let app = Arc::clone(app);
    tokio::spawn(async move {
        let wanted = old.clone();
        let marked = app.store.call(move |db| branches::force_deleting(db, &wanted)).await;
        let deleted = match marked {
            Ok(()) => branching::finish_deletion(&app, &old).await,
            Err(problem) => Err(problem),
        };
        if let Err(error) = deleted {
            tracing::warn!(branch = %old, %error, "the state before a restore is removed at the next start");
        }
    });
}

/// Gives a branch all its data to itself: it has no parent afterwards, and the parent can be deleted. Its history begins
/// where it left the parent. Takes as long as copying the data does; the branch stays usable.
pub async fn detach(app: &Arc<App>, branch: BranchRef) -> Result<BranchEnvelope, Problem> {
    let wanted = branch.clone();
    let begun = app.store.call(move |db| {
        let row = branches::get(db, &wanted.project, &wanted.branch)?;
        if row.parent.is_none() {
            return Err(Problem::Refused("the branch has no parent to be detached from".into()));
        }
        Ok((row, operations::begin(db, &wanted, None, Action::DetachParent)?.id))
    });
    let (row, operation) = begun.await?;
    let app = Arc::clone(app);
    let task = tokio::spawn(async move {
        let detached = app.storage.detach_branch(&row.timeline).await;
        let error = detached.as_ref().err().map(ToString::to_string);
        let done = app.store.call(move |db| {
            operations::end(db, &operation, error.as_deref())?;
            if error.is_none() {
                branches::detached(db, &branch)?;
            }
            Ok((branches::get(db, &branch.project, &branch.branch)?, operations::get(db, &branch.project, &operation)?))
        });
        let (row, operation) = done.await?;
        detached?;
        Ok(BranchEnvelope { branch: app.branch(row), operations: vec![operation] })
    });
    task.await.unwrap_or_else(|e| Err(Problem::Internal(format!("detaching: {e}"))))
}
