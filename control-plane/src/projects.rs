//! Projects: made as a branch of the template, deleted with all their branches.

use std::sync::Arc;

use control_plane_api::v2::{ProjectCreated, ProjectEnvelope, ProjectFields, ProjectSettings};
use types::{BranchId, BranchRef, EndpointId, ProjectId};
use wire::pageserver::BranchPoint;

use crate::{
    address::Login,
    allowed_ips,
    app::{self, App, PG_VERSION},
    branching, endpoint_rules, names,
    problem::Problem,
    storage,
    store::{
        branches::{self, BranchRow, NewBranch},
        catalog, endpoints,
        operations::{self, Action},
        projects,
    },
};

const DEFAULT_BRANCH: &str = "main";
/// Seven days.
const DEFAULT_HISTORY_SECONDS: u64 = 7 * 86_400;
const MAX_HISTORY_SECONDS: u64 = 30 * 86_400;

/// A request for a project, checked and with all defaults filled in.
#[derive(Clone)]
struct Wanted {
    id: ProjectId,
    name: String,
    branch: BranchRef,
    branch_name: String,
    endpoint: EndpointId,
    role: String,
    password: String,
    database: String,
    suspend_timeout_seconds: i64,
    history_retention_seconds: u64,
    settings: ProjectSettings,
    start_compute: bool,
}

impl Wanted {
    fn new(fields: ProjectFields) -> Result<Wanted, Problem> {
        if let Some(version) = fields.pg_version.filter(|version| *version != PG_VERSION) {
            return Err(Problem::Invalid(format!("pg_version {version} is not offered; {PG_VERSION} is")));
        }
        let first = fields.branch.unwrap_or_default();
        let database = first.database_name.unwrap_or_else(|| storage::DEFAULT_DATABASE.into());
        names::check_database(&database)?;
        let role = first.role_name.unwrap_or_else(|| format!("{database}_owner"));
        names::check_role(&role)?;
        let branch_name = names::check_title("branch", first.name.as_deref().unwrap_or(DEFAULT_BRANCH))?;
        let id = names::project_id();
        let name = names::check_title("project", fields.name.as_deref().unwrap_or(id.as_str()))?;
        let defaults = fields.default_endpoint_settings.unwrap_or_default();
        Ok(Wanted {
            branch: BranchRef { project: id.clone(), branch: names::branch_id() },
            id,
            name,
            branch_name,
            endpoint: names::endpoint_id(),
            role,
            password: names::password(),
            database,
            suspend_timeout_seconds: endpoint_rules::check_suspend_timeout(defaults.suspend_timeout_seconds)?
                .unwrap_or(0),
            history_retention_seconds: check_history(fields.history_retention_seconds)?
                .unwrap_or(DEFAULT_HISTORY_SECONDS),
            settings: ProjectSettings { allowed_ips: allowed_ips::check(fields.settings)? },
            start_compute: fields.start_compute.unwrap_or(true),
        })
    }
}

fn check_history(seconds: Option<u64>) -> Result<Option<u64>, Problem> {
    match seconds {
        Some(seconds) if seconds > MAX_HISTORY_SECONDS => {
            Err(Problem::Invalid(format!("history_retention_seconds must be at most {MAX_HISTORY_SECONDS}")))
        }
        other => Ok(other),
    }
}

/// Makes a project with its first branch, role, database and endpoint, and begins to wake it unless that is not wanted: its
/// role and database are made inside Postgres at the first wake.
pub async fn create(app: &Arc<App>, fields: ProjectFields) -> Result<ProjectCreated, Problem> {
    let wanted = Wanted::new(fields)?;
    let new = wanted.clone();
    let operation = app.store.call(move |db| insert(db, &new)).await?;
    let made = app.storage.create_branch(&wanted.branch, &storage::template(), BranchPoint::Head).await;
    let start = match made {
        Ok(start) => start,
        Err(problem) => {
            // It may have been made all the same, and the answer lost.
            let id = wanted.id.clone();
            app.store.call(move |db| projects::mark_deleting(db, &id)).await?;
            let (app, id) = (Arc::clone(app), wanted.id);
            tokio::spawn(async move {
                if let Err(error) = finish_deletion(&app, &id).await {
                    tracing::warn!(project = %id, %error, "a project that could not be made is removed at the next start");
                }
            });
            return Err(problem);
        }
    };
    let new = wanted.clone();
    let rows = app.store.call(move |db| {
        let branch = branches::made(db, &new.branch, start, false)?;
        operations::end(db, &operation, None)?;
        Ok((
            projects::get(db, &new.id)?,
            branch,
            endpoints::get(db, &new.id, &new.endpoint)?,
            catalog::roles(db, &new.branch.branch)?,
            catalog::databases(db, &new.branch.branch)?,
            operations::get(db, &new.id, &operation)?,
        ))
    });
    let (project, branch, endpoint, roles, databases, operation) = rows.await?;
    tracing::info!(project = %project.id, branch = %wanted.branch.branch, lsn = %start, "project was made");
    let mut operations = vec![operation];
    if wanted.start_compute {
        operations.push(app.computes.wake_in_background(&wanted.branch, &endpoint.id).await?);
    }
    let login =
        Login { endpoint: &endpoint.id, role: &wanted.role, password: &wanted.password, database: &wanted.database };
    Ok(ProjectCreated {
        connection_uris: vec![app.address.connection(login)],
        project: app.project(project),
        roles: roles.into_iter().map(|row| app::role(row, true)).collect(),
        databases: databases.into_iter().map(app::database).collect(),
        operations,
        branch: app.branch(branch),
        endpoints: vec![app.endpoint(endpoint)],
    })
}

/// All rows of a new project; answers the operation that makes its storage.
fn insert(db: &rusqlite::Connection, new: &Wanted) -> Result<String, Problem> {
    let (timeout, history) = (new.suspend_timeout_seconds, new.history_retention_seconds);
    projects::insert(db, &new.id, &new.name, timeout, history, &new.settings)?;
    let branch = NewBranch {
        branch: new.branch.clone(),
        name: new.branch_name.clone(),
        parent: None,
        parent_timestamp: None,
        is_default: true,
        protected: false,
    };
    branches::insert(db, &branch)?;
    let id: &BranchId = &new.branch.branch;
    catalog::insert_role(db, id, &new.role, &new.password, &names::scram_verifier(&new.password))?;
    catalog::insert_database(db, id, &new.database, &new.role)?;
    if new.database != storage::DEFAULT_DATABASE {
        catalog::drop_unwanted_database(db, id, storage::DEFAULT_DATABASE)?;
    }
    endpoints::insert(db, &new.endpoint, &new.branch, None, new.suspend_timeout_seconds, &Default::default())?;
    Ok(operations::begin(db, &new.branch, None, Action::CreateTimeline)?.id)
}

/// Changes what may be changed.
pub async fn update(app: &App, id: ProjectId, fields: ProjectFields) -> Result<ProjectEnvelope, Problem> {
    let name = fields.name.map(|name| names::check_title("project", &name)).transpose()?;
    let history = check_history(fields.history_retention_seconds)?;
    let defaults = fields.default_endpoint_settings.unwrap_or_default();
    let timeout = endpoint_rules::check_suspend_timeout(defaults.suspend_timeout_seconds)?;
    let allowed_ips = allowed_ips::check(fields.settings)?;
    let updated = app.store.call(move |db| {
        let mut row = projects::get(db, &id)?;
        row.name = name.unwrap_or(row.name);
        row.history_retention_seconds = history.unwrap_or(row.history_retention_seconds);
        row.default_suspend_timeout_seconds = timeout.unwrap_or(row.default_suspend_timeout_seconds);
        row.settings.allowed_ips = allowed_ips.or(row.settings.allowed_ips);
        projects::update(db, &row)
    });
    Ok(ProjectEnvelope { project: app.project(updated.await?), operations: Vec::new() })
}

/// Deletes a project and everything in it. May be repeated after a failure.
pub async fn delete(app: &Arc<App>, id: ProjectId) -> Result<ProjectEnvelope, Problem> {
    let project = app.store.call(move |db| {
        let row = projects::find(db, &id)?.ok_or_else(|| Problem::not_found("project", &id))?;
        projects::mark_deleting(db, &id)?;
        Ok(row)
    });
    let project = project.await?;
    // A deletion that was begun goes on even if the one who asked for it is gone.
    let (task_app, id) = (Arc::clone(app), project.id.clone());
    let task = tokio::spawn(async move { finish_deletion(&task_app, &id).await });
    task.await.unwrap_or_else(|e| Err(Problem::Internal(format!("project deletion: {e}"))))?;
    Ok(ProjectEnvelope { project: app.project(project), operations: Vec::new() })
}

/// Deletes what is left of a project whose deletion has begun.
pub async fn finish_deletion(app: &Arc<App>, id: &ProjectId) -> Result<(), Problem> {
    let project = id.clone();
    let rows: Vec<BranchRow> = app.store.call(move |db| branches::children_first(db, &project)).await?;
    for row in rows {
        branching::finish_deletion(app, &row.branch).await?;
    }
    let project = id.clone();
    app.store.call(move |db| projects::remove(db, &project)).await?;
    tracing::info!(project = %id, "project was deleted");
    Ok(())
}
