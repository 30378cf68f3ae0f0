//! Branches: made from a parent at its head, at a position or at a time; deleted with their computes.

use std::{sync::Arc, time::Duration};

use control_plane_api::v2::{BranchCreated, BranchFields, BranchRequest};
use time::{OffsetDateTime, format_description::well_known::Rfc3339, macros::datetime};
use types::{BranchId, BranchRef, EndpointId, Lsn, ProjectId};
use wire::pageserver::BranchPoint;

use crate::{
    address::Login,
    app::{self, App},
    compute::SuspendReason,
    endpoint_rules::{self, WantedEndpoint},
    names,
    problem::Problem,
    store::{
        Store,
        branches::{self, BranchRow, NewBranch},
        catalog, endpoints,
        operations::{self, Action},
        projects,
    },
};

/// Storage that has not answered by then may be waiting for WAL that nobody tells it about.
const STORAGE_PATIENCE: Duration = Duration::from_secs(1);
/// WAL counts microseconds from here.
const POSTGRES_EPOCH: OffsetDateTime = datetime!(2000-01-01 0:00 UTC);

/// Where on its parent a branch is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Point {
    Head,
    Lsn(Lsn),
    /// Microseconds since 2000.
    Time(i64),
}

impl Point {
    fn new(fields: &BranchFields) -> Result<Point, Problem> {
        match (&fields.parent_lsn, &fields.parent_timestamp) {
            (None, None) => Ok(Point::Head),
            (Some(_), Some(_)) => Err(Problem::Invalid("give parent_lsn or parent_timestamp, not both".into())),
            (Some(lsn), None) => lsn.parse().map(Point::Lsn).map_err(|e| Problem::Invalid(e.to_string())),
            (None, Some(text)) => {
                let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| {
                    let example = "such as 2024-05-01T12:00:00Z";
                    Problem::Invalid(format!("parent_timestamp must be an RFC 3339 time {example}"))
                })?;
                if time > OffsetDateTime::now_utc() {
                    return Err(Problem::Invalid("parent_timestamp is in the future".into()));
                }
                wal_time(time).map(Point::Time).ok_or_else(|| Problem::Invalid("parent_timestamp is too old".into()))
            }
        }
    }
}

/// Microseconds since 2000, as in WAL.
fn wal_time(time: OffsetDateTime) -> Option<i64> {
    i64::try_from((time - POSTGRES_EPOCH).whole_microseconds()).ok()
}

/// What a new branch's rows are made from.
struct Begun {
    parent: BranchRow,
    branch: BranchRef,
    operation: String,
}

/// Makes a branch, with an endpoint when one is asked for. Nothing is started: the endpoint wakes at its first connection.
pub async fn create(app: &Arc<App>, project: ProjectId, request: BranchRequest) -> Result<BranchCreated, Problem> {
    let point = Point::new(&request.branch)?;
    if request.endpoints.len() > 1 {
        return Err(Problem::Invalid("a branch has at most one endpoint (of type read_write)".into()));
    }
    let endpoint = request.endpoints.into_iter().next().map(WantedEndpoint::new).transpose()?;
    // What is begun is finished or undone even if the one who asked for it is gone.
    let (app, fields) = (Arc::clone(app), request.branch);
    let task = tokio::spawn(async move {
        let begun = begin(&app, project, fields).await?;
        match make(&app, &begun, point, endpoint).await {
            Ok(created) => Ok(created),
            Err(problem) => {
                let branch = begun.branch.clone();
                app.store.call(move |db| branches::force_deleting(db, &branch)).await?;
                finish_deletion(&app, &begun.branch).await?;
                Err(problem)
            }
        }
    });
    task.await.unwrap_or_else(|e| Err(Problem::Internal(format!("branch creation: {e}"))))
}

async fn begin(app: &App, project: ProjectId, fields: BranchFields) -> Result<Begun, Problem> {
    let id = names::branch_id();
    let name = names::check_title("branch", fields.name.as_deref().unwrap_or(id.as_str()))?;
    let parent_id = fields.parent_id.map(|text| BranchId::new(&text)).transpose();
    let parent_id = parent_id.map_err(|e| Problem::Invalid(format!("parent_id: {e}")))?;
    let begun = app.store.call(move |db| {
        let parent = match parent_id {
            Some(id) => branches::get(db, &project, &id)?,
            None => branches::default(db, &project)?,
        };
        let branch = BranchRef { project, branch: id };
        let new = NewBranch {
            branch: branch.clone(),
            name,
            parent: Some(parent.branch.branch.clone()),
            parent_timestamp: fields.parent_timestamp,
            is_default: false,
            protected: fields.protected.unwrap_or(false),
        };
        branches::insert(db, &new)?;
        let operation = operations::begin(db, &branch, None, Action::CreateTimeline)?.id;
        Ok(Begun { parent, branch, operation })
    });
    begun.await
}

async fn make(
    app: &App,
    begun: &Begun,
    point: Point,
    endpoint: Option<WantedEndpoint>,
) -> Result<BranchCreated, Problem> {
    let head = app.computes.head(&begun.parent.branch).await?;
    let (ancestor, lsn) = match point {
        Point::Head => (begun.parent.clone(), head),
        Point::Lsn(lsn) => at_lsn(app, begun.parent.clone(), head, lsn).await?,
        Point::Time(timestamp_us) => at_time(app, begun.parent.clone(), head, timestamp_us).await?,
    };
    let creation = app.storage.create_branch(&begun.branch, &ancestor.branch, BranchPoint::Lsn(lsn));
    let start = patiently(app, &ancestor.branch, creation).await?;
    tracing::info!(branch = %begun.branch, ancestor = %ancestor.branch, lsn = %start, "branch was made");
    let branch = begun.branch.clone();
    let parent = begun.parent.clone();
    let operation = begun.operation.clone();
    let rows = app.store.call(move |db| {
        catalog::inherit(db, &parent.branch.branch, &branch.branch)?;
        // Rows and data agree only at the head, and only if no change was on its way.
        let now = branches::get(db, &branch.project, &parent.branch.branch)?;
        let settled = now.catalog_version == parent.catalog_version && parent.catalog_version <= parent.catalog_applied;
        let row = branches::made(db, &branch, start, settled && point == Point::Head)?;
        let endpoint = endpoint.map(|wanted| wanted.insert(db, &branch)).transpose()?;
        operations::end(db, &operation, None)?;
        let operation = operations::get(db, &branch.project, &operation)?;
        Ok((row, endpoint, operation, catalog::roles(db, &branch.branch)?, catalog::databases(db, &branch.branch)?))
    });
    let (row, endpoint, operation, roles, databases) = rows.await?;
    let mut connection_uris = Vec::new();
    if let (Some(endpoint), Some(database)) = (&endpoint, databases.first())
        && let Some(role) = roles.iter().find(|role| role.name == database.owner)
    {
        let login =
            Login { endpoint: &endpoint.id, role: &role.name, password: &role.password, database: &database.name };
        connection_uris.push(app.address.connection(login));
    }
    Ok(BranchCreated {
        branch: app.branch(row),
        endpoints: endpoint.into_iter().map(|row| app.endpoint(row)).collect(),
        operations: vec![operation],
        roles: roles.into_iter().map(|row| app::role(row, false)).collect(),
        databases: databases.into_iter().map(app::database).collect(),
        connection_uris,
    })
}

/// The branch in whose own history `lsn` is: the parent, or the one it was itself made from.
async fn at_lsn(app: &App, parent: BranchRow, head: Lsn, lsn: Lsn) -> Result<(BranchRow, Lsn), Problem> {
    if lsn > head {
        return Err(Problem::Invalid(format!("parent_lsn {lsn} is after the end of the parent's history, {head}")));
    }
    let mut ancestor = parent;
    while lsn < ancestor.start_lsn {
        let start = ancestor.start_lsn;
        let too_old = || Problem::Invalid(format!("parent_lsn {lsn} is before the start of the history, {start}"));
        ancestor = parent_of(app, &ancestor).await?.ok_or_else(too_old)?;
    }
    Ok((ancestor, lsn))
}

async fn at_time(app: &App, parent: BranchRow, head: Lsn, timestamp_us: i64) -> Result<(BranchRow, Lsn), Problem> {
    let (mut ancestor, mut end) = (parent, head);
    loop {
        refuse_before_root(&ancestor, timestamp_us)?;
        let search = app.storage.lsn_by_timestamp(&ancestor.branch, timestamp_us, end);
        let found = patiently(app, &ancestor.branch, search).await;
        let reason = match found {
            Ok(lsn) if lsn >= ancestor.start_lsn => return Ok((ancestor, lsn.min(end))),
            Ok(lsn) => format!("its state is that of {lsn}, in the history of its own parent"),
            Err(Problem::Invalid(reason)) => reason,
            Err(problem) => return Err(problem),
        };
        // Before this branch was made it was its parent, up to where it left it.
        end = ancestor.start_lsn;
        ancestor = parent_of(app, &ancestor)
            .await?
            .ok_or_else(|| Problem::Invalid(format!("parent_timestamp is not in the branch's history: {reason}")))?;
    }
}

/// A root branch has no commits from before it was made: the template's state is not a point of its history.
fn refuse_before_root(branch: &BranchRow, timestamp_us: i64) -> Result<(), Problem> {
    let made = OffsetDateTime::parse(&branch.created_at, &Rfc3339).ok().filter(|_| branch.parent.is_none());
    let made_us = made.and_then(wal_time);
    match made_us {
        Some(made_us) if timestamp_us < made_us => {
            Err(Problem::Invalid(format!("parent_timestamp is before the start of the history, {}", branch.created_at)))
        }
        Some(_) | None => Ok(()),
    }
}

/// Waits for storage, which may be waiting for WAL of a sleeping branch: after a while its end is settled again.
async fn patiently<T>(
    app: &App,
    branch: &BranchRef,
    request: impl Future<Output = Result<T, Problem>>,
) -> Result<T, Problem> {
    let nudge = async {
        tokio::time::sleep(STORAGE_PATIENCE).await;
        if let Err(error) = app.computes.settle_again(branch).await {
            tracing::warn!(%branch, %error, "settling a branch whose WAL does not arrive");
        }
        std::future::pending().await
    };
    tokio::select! {
        done = request => done,
        never = nudge => never,
    }
}

async fn parent_of(app: &App, row: &BranchRow) -> Result<Option<BranchRow>, Problem> {
    let Some(parent) = row.parent.clone() else { return Ok(None) };
    let project = row.branch.project.clone();
    app.store.call(move |db| branches::get(db, &project, &parent).map(Some)).await
}

/// Deletes a branch unless it has children or is the default, the root or protected.
pub async fn delete(app: &Arc<App>, branch: BranchRef) -> Result<(BranchRow, String), Problem> {
    let wanted = branch.clone();
    let begun = app.store.call(move |db| {
        let row = branches::mark_deleting(db, &wanted)?;
        Ok((row, operations::begin(db, &wanted, None, Action::DeleteTimeline)?.id))
    });
    let (row, operation) = begun.await?;
    let (app, id) = (Arc::clone(app), operation.clone());
    let task = tokio::spawn(async move {
        let finished = finish_deletion(&app, &branch).await;
        let error = finished.as_ref().err().map(ToString::to_string);
        app.store.call(move |db| operations::end(db, &id, error.as_deref())).await?;
        finished
    });
    task.await.unwrap_or_else(|e| Err(Problem::Internal(format!("branch deletion: {e}"))))?;
    Ok((row, operation))
}

/// Deletes what is left of a branch whose deletion has begun. May be repeated after a failure.
pub async fn finish_deletion(app: &App, branch: &BranchRef) -> Result<(), Problem> {
    app.computes.suspend(branch, SuspendReason::Deleted).await?;
    app.storage.delete_branch(branch).await?;
    let wanted = branch.clone();
    let endpoint: Option<EndpointId> = app
        .store
        .call(move |db| {
            let endpoint = endpoints::of_branch(db, &wanted.branch)?.map(|row| row.id);
            branches::remove(db, &wanted)?;
            Ok(endpoint)
        })
        .await?;
    app.computes.forget_branch(&branch.branch);
    if let Some(endpoint) = endpoint {
        app.computes.remove_files(&endpoint).await;
    }
    tracing::info!(%branch, "branch was deleted");
    Ok(())
}

/// Changes name and protection.
pub async fn update(app: &App, branch: BranchRef, fields: BranchFields) -> Result<BranchRow, Problem> {
    let name = fields.name.map(|name| names::check_title("branch", &name)).transpose()?;
    let updated = app.store.call(move |db| {
        let mut row = branches::get(db, &branch.project, &branch.branch)?;
        row.name = name.unwrap_or(row.name);
        row.protected = fields.protected.unwrap_or(row.protected);
        branches::update(db, &row)
    });
    updated.await
}

/// What a stop of the control plane left half made or half deleted. Read before the first request is served: later rows of
/// the same states are somebody's work.
pub struct Interrupted {
    projects: Vec<ProjectId>,
    branches: Vec<BranchRow>,
}

impl Interrupted {
    /// From the store.
    pub async fn read(store: &Store) -> Result<Interrupted, Problem> {
        store
            .call(|db| Ok(Interrupted { projects: projects::deleting(db)?, branches: branches::unfinished(db)? }))
            .await
    }

    /// Half-made branches go, half-deleted ones too. May be repeated after a failure.
    pub async fn clean_up(&self, app: &Arc<App>) -> Result<(), Problem> {
        for project in &self.projects {
            crate::projects::finish_deletion(app, project).await?;
        }
        for row in &self.branches {
            finish_deletion(app, &row.branch).await?;
            if row.parent.is_none() {
                // Its project was never whole.
                let project = row.branch.project.clone();
                app.store.call(move |db| projects::remove(db, &project)).await?;
            }
        }
        Ok(())
    }
}

/// Makes an endpoint for a branch.
pub async fn create_endpoint(
    app: &App,
    project: ProjectId,
    fields: control_plane_api::v2::EndpointFields,
) -> Result<endpoints::EndpointRow, Problem> {
    let branch = fields.branch_id.clone().ok_or_else(|| Problem::Invalid("endpoint.branch_id is missing".into()))?;
    let branch = BranchId::new(&branch).map_err(|e| Problem::Invalid(format!("branch_id: {e}")))?;
    let wanted = endpoint_rules::WantedEndpoint::new(fields)?;
    let made = app.store.call(move |db| {
        let branch = branches::get(db, &project, &branch)?.branch;
        wanted.insert(db, &branch)
    });
    made.await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_checked() {
        let fields = |lsn: Option<&str>, time: Option<&str>| BranchFields {
            parent_lsn: lsn.map(str::to_owned),
            parent_timestamp: time.map(str::to_owned),
            ..Default::default()
        };
        assert_eq!(Point::new(&fields(None, None)), Ok(Point::Head));
        assert_eq!(Point::new(&fields(Some("0/10"), None)), Ok(Point::Lsn(Lsn(16))));
        assert_eq!(Point::new(&fields(None, Some("2000-01-01T00:00:01Z"))), Ok(Point::Time(1_000_000)));
        assert_eq!(Point::new(&fields(None, Some("2000-01-01T02:00:00+02:00"))), Ok(Point::Time(0)));
        for bad in
            [fields(Some("x"), None), fields(None, Some("yesterday")), fields(None, Some("2999-01-01T00:00:00Z"))]
        {
            assert!(Point::new(&bad).is_err());
        }
        assert!(Point::new(&fields(Some("0/10"), Some("2000-01-01T00:00:01Z"))).is_err());
    }
}
