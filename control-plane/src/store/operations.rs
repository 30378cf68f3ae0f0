//! Rows of `operations`: what was done, and what still runs.

use control_plane_api::v2::Operation;
use rusqlite::{Connection, OptionalExtension, Row};
use types::{BranchRef, EndpointId, ProjectId};

use super::{Page, Paged, from_ms, now_ms, optional_parsed, parsed};
use crate::problem::Problem;

/// Operations kept for each project.
const KEPT_PER_PROJECT: i64 = 1000;

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// A branch's storage is made.
    CreateTimeline,
    /// A branch's storage is removed.
    DeleteTimeline,
    /// A compute wakes.
    StartCompute,
    /// A compute falls asleep.
    SuspendCompute,
    /// A branch gets another state.
    Restore,
    /// A branch gets all its data to itself.
    DetachParent,
    /// Roles and databases are brought to a running compute.
    ApplyConfig,
}

impl Action {
    /// Neon's name for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Action::CreateTimeline => "create_timeline",
            Action::DeleteTimeline => "delete_timeline",
            Action::StartCompute => "start_compute",
            Action::SuspendCompute => "suspend_compute",
            Action::Restore => "timeline_restore",
            Action::DetachParent => "detach_parent_branch",
            Action::ApplyConfig => "apply_config",
        }
    }
}

fn from_row(row: &Row<'_>) -> rusqlite::Result<(i64, Operation)> {
    let began: i64 = row.get("began_ms")?;
    let changed: i64 = row.get("changed_ms")?;
    let status: String = row.get("status")?;
    let operation = Operation {
        id: row.get("id")?,
        project_id: parsed(row, "project_id")?,
        branch_id: optional_parsed(row, "branch_id")?,
        endpoint_id: optional_parsed(row, "endpoint_id")?,
        action: row.get("action")?,
        error: row.get("error")?,
        failures_count: u32::from(status == "failed"),
        status,
        total_duration_ms: changed.saturating_sub(began).max(0).cast_unsigned(),
        created_at: from_ms(began),
        updated_at: from_ms(changed),
    };
    Ok((row.get("seq")?, operation))
}

/// Begins an operation.
pub fn begin(
    db: &Connection,
    branch: &BranchRef,
    endpoint: Option<&EndpointId>,
    action: Action,
) -> Result<Operation, Problem> {
    let id = uuid::Uuid::new_v4().to_string();
    db.execute(
        "INSERT INTO operations (id, project_id, branch_id, endpoint_id, action, status, began_ms, changed_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, 'running', ?6, ?6)",
        (
            &id,
            branch.project.as_str(),
            branch.branch.as_str(),
            endpoint.map(EndpointId::as_str),
            action.as_str(),
            now_ms(),
        ),
    )?;
    db.execute(
        "DELETE FROM operations WHERE project_id = ?1 AND seq <= (SELECT seq FROM operations WHERE project_id = ?1
         ORDER BY seq DESC LIMIT 1 OFFSET ?2)",
        (branch.project.as_str(), KEPT_PER_PROJECT),
    )?;
    get(db, &branch.project, &id)
}

/// Ends an operation; `error` says why it failed.
pub fn end(db: &Connection, id: &str, error: Option<&str>) -> Result<(), Problem> {
    let status = if error.is_some() { "failed" } else { "finished" };
    db.execute(
        "UPDATE operations SET status = ?, error = ?, changed_ms = ? WHERE id = ?",
        (status, error, now_ms(), id),
    )?;
    Ok(())
}

/// Fails what a stop of the control plane interrupted.
pub fn fail_interrupted(db: &Connection) -> Result<(), Problem> {
    db.execute(
        "UPDATE operations SET status = 'failed', error = 'the control plane was restarted', changed_ms = ?
         WHERE status = 'running'",
        [now_ms()],
    )?;
    Ok(())
}

/// One operation.
pub fn get(db: &Connection, project: &ProjectId, id: &str) -> Result<Operation, Problem> {
    let sql = "SELECT * FROM operations WHERE id = ? AND project_id = ?";
    let found = db.query_row(sql, (id, project.as_str()), from_row).optional()?;
    found.map(|(_, operation)| operation).ok_or_else(|| Problem::not_found("operation", id))
}

/// Operations, newest first.
pub fn list(db: &Connection, project: &ProjectId, page: Page) -> Result<Paged<Operation>, Problem> {
    super::projects::get(db, project)?;
    let sql = "SELECT * FROM operations WHERE project_id = ? AND seq < ? ORDER BY seq DESC LIMIT ?";
    let mut statement = db.prepare_cached(sql)?;
    let rows = statement.query_map((project.as_str(), page.after.unwrap_or(i64::MAX), page.limit), from_row)?;
    let rows: Vec<(i64, Operation)> = rows.collect::<Result<_, _>>()?;
    let next = (rows.len() == page.limit as usize).then(|| rows.last().map(|(seq, _)| *seq)).flatten();
    Ok((rows.into_iter().map(|(_, operation)| operation).collect(), next))
}
