//! Branches: made from a parent at its head, at a position or at a time; deleted with their computes.

use std::sync::Arc;

use control_plane_api::v2::{BranchCreated, BranchFields, BranchRequest};
use types::{BranchId, BranchRef, EndpointId, ProjectId};
use wire::pageserver::BranchPoint;

use crate::{
    address::Login,
    app::{self, App},
    compute::SuspendReason,
    endpoint_rules::{self, WantedEndpoint},
    history::{self, Point, Position},
    names,
    problem::Problem,
    store::{
        Store,
        branches::{self, BranchRow, NewBranch},
        catalog, endpoints, leftovers, memberships,
        operations::{self, Action},
        projects,
    },
};

/// What a new branch's rows are made from.
struct Begun {
    parent: BranchRow,
    branch: BranchRef,
    operation: String,
}

/// Makes a branch, with an endpoint when one is asked for. Nothing is started: the endpoint wakes at its first connection.
pub async fn create(app: &Arc<App>, project: ProjectId, request: BranchRequest) -> Result<BranchCreated, Problem> {
    let point = Point::of_branch(&request.branch)?;
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
    let Position { branch: ancestor, lsn } = history::locate(app, begun.parent.clone(), head, point).await?;
    // A new branch and its timeline have the same name.
    let creation = app.storage.create_branch(&begun.branch, &ancestor.timeline, BranchPoint::Lsn(lsn));
    let start = history::patiently(app, &ancestor.branch, creation).await?;
    tracing::info!(branch = %begun.branch, ancestor = %ancestor.branch, lsn = %start, "branch was made");
    let branch = begun.branch.clone();
    let parent = begun.parent.clone();
    let operation = begun.operation.clone();
    let rows = app.store.call(move |db| {
        catalog::inherit(db, &parent.branch.branch, &branch.branch)?;
        // Rows and data agree only at the head, and only if no change was on its way.
        let now = branches::get(db, &branch.project, &parent.branch.branch)?;
        let settled = now.catalog_version == parent.catalog_version && parent.catalog_version <= parent.catalog_applied;
        branches::set_parent(db, &branch, &ancestor.branch.branch)?;
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
    let wanted = branch.clone();
    let row = app.store.call(move |db| branches::find(db, &wanted.project, &wanted.branch)).await?;
    let Some(row) = row else { return Ok(()) };
    let timeline = row.timeline.branch.clone();
    let safekeepers = app.store.call(move |db| memberships::everybody(db, &timeline)).await?;
    let left = app.storage.delete_branch(&row.timeline, &safekeepers).await?;
    let wanted = branch.clone();
    let endpoint: Option<EndpointId> = app
        .store
        .call(move |db| {
            let endpoint = endpoints::of_branch(db, &wanted.branch)?.map(|row| row.id);
            leftovers::note(db, &row.timeline, &left)?;
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
