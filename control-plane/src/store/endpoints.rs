//! Rows of `endpoints`.

use control_plane_api::v2::EndpointSettings;
use rusqlite::{Connection, OptionalExtension, Row, types::Type};
use types::{BranchId, BranchRef, EndpointId, ProjectId};

use super::{is_taken, now, parsed};
use crate::{compute::AgentProcess, problem::Problem};

/// An endpoint's row.
#[derive(Debug, Clone)]
pub struct EndpointRow {
    /// Its id.
    pub id: EndpointId,
    /// Its branch.
    pub branch: BranchRef,
    /// Its owner's name for it.
    pub name: Option<String>,
    /// Nobody may log in.
    pub disabled: bool,
    /// Seconds; 0 default, -1 never.
    pub suspend_timeout_seconds: i64,
    /// Settings for Postgres.
    pub settings: EndpointSettings,
    /// The agent that was started for it and not seen to end.
    pub agent: Option<AgentProcess>,
    /// Last seen active.
    pub last_active: Option<String>,
    /// When its compute was last started.
    pub started_at: Option<String>,
    /// When it last fell asleep.
    pub suspended_at: Option<String>,
    /// When it was made.
    pub created_at: String,
    /// When it was last changed.
    pub updated_at: String,
}

fn from_row(row: &Row<'_>) -> rusqlite::Result<EndpointRow> {
    let settings: String = row.get("settings")?;
    let settings = serde_json::from_str(&settings)
        .map_err(|e| rusqlite::Error::FromSqlConversionFailure(0, Type::Text, Box::new(e)))?;
    let pid: Option<u32> = row.get("agent_pid")?;
    let started: Option<i64> = row.get("agent_started")?;
    Ok(EndpointRow {
        id: parsed(row, "id")?,
        branch: BranchRef { project: parsed(row, "project_id")?, branch: parsed(row, "branch_id")? },
        name: row.get("name")?,
        disabled: row.get("disabled")?,
        suspend_timeout_seconds: row.get("suspend_timeout_seconds")?,
        settings,
        agent: pid.zip(started).map(|(pid, ticks)| AgentProcess { pid, started_ticks: ticks.cast_unsigned() }),
        last_active: row.get("last_active")?,
        started_at: row.get("started_at")?,
        suspended_at: row.get("suspended_at")?,
        created_at: row.get("created_at")?,
        updated_at: row.get("updated_at")?,
    })
}

fn settings_text(settings: &EndpointSettings) -> Result<String, Problem> {
    serde_json::to_string(settings).map_err(|e| Problem::Internal(format!("settings: {e}")))
}

/// Makes a branch's endpoint. Refused when it has one.
pub fn insert(
    db: &Connection,
    id: &EndpointId,
    branch: &BranchRef,
    name: Option<&str>,
    suspend_timeout_seconds: i64,
    settings: &EndpointSettings,
) -> Result<EndpointRow, Problem> {
    let now = now();
    let inserted = db.execute(
        "INSERT INTO endpoints (id, project_id, branch_id, name, disabled, suspend_timeout_seconds, settings, created_at,
         updated_at) VALUES (?1, ?2, ?3, ?4, 0, ?5, ?6, ?7, ?7)",
        (
            id.as_str(),
            branch.project.as_str(),
            branch.branch.as_str(),
            name,
            suspend_timeout_seconds,
            settings_text(settings)?,
            &now,
        ),
    );
    match inserted {
        Ok(_) => get(db, &branch.project, id),
        Err(e) if is_taken(&e) => Err(Problem::Conflict {
            code: "READ_WRITE_ENDPOINT_ALREADY_EXISTS",
            message: format!("branch {} has a read_write endpoint already", branch.branch),
        }),
        Err(e) => Err(e.into()),
    }
}

/// An endpoint of a project.
pub fn get(db: &Connection, project: &ProjectId, id: &EndpointId) -> Result<EndpointRow, Problem> {
    super::projects::get(db, project)?;
    find(db, id)?.filter(|e| e.branch.project == *project).ok_or_else(|| Problem::not_found("endpoint", id))
}

/// An endpoint of any project.
pub fn find(db: &Connection, id: &EndpointId) -> Result<Option<EndpointRow>, Problem> {
    Ok(db.prepare_cached("SELECT * FROM endpoints WHERE id = ?")?.query_row([id.as_str()], from_row).optional()?)
}

/// A branch's endpoint.
pub fn of_branch(db: &Connection, branch: &BranchId) -> Result<Option<EndpointRow>, Problem> {
    Ok(db.query_row("SELECT * FROM endpoints WHERE branch_id = ?", [branch.as_str()], from_row).optional()?)
}

/// A project's endpoints in order of creation.
pub fn list(db: &Connection, project: &ProjectId) -> Result<Vec<EndpointRow>, Problem> {
    super::projects::get(db, project)?;
    let mut statement = db.prepare("SELECT * FROM endpoints WHERE project_id = ? ORDER BY seq")?;
    let rows = statement.query_map([project.as_str()], from_row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Endpoints whose agent was not seen to end.
pub fn with_agents(db: &Connection) -> Result<Vec<EndpointRow>, Problem> {
    let mut statement = db.prepare("SELECT * FROM endpoints WHERE agent_pid IS NOT NULL ORDER BY seq")?;
    let rows = statement.query_map([], from_row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Changes what its owner may change.
pub fn update(db: &Connection, row: &EndpointRow) -> Result<EndpointRow, Problem> {
    db.execute(
        "UPDATE endpoints SET name = ?, disabled = ?, suspend_timeout_seconds = ?, settings = ?, updated_at = ? WHERE id = ?",
        (
            &row.name,
            row.disabled,
            row.suspend_timeout_seconds,
            settings_text(&row.settings)?,
            now(),
            row.id.as_str(),
        ),
    )?;
    get(db, &row.branch.project, &row.id)
}

/// Removes it.
pub fn remove(db: &Connection, id: &EndpointId) -> Result<(), Problem> {
    db.execute("DELETE FROM endpoints WHERE id = ?", [id.as_str()])?;
    Ok(())
}

/// An agent is being started: durable before it is told what to do.
pub fn agent_started(db: &Connection, id: &EndpointId, agent: AgentProcess) -> Result<(), Problem> {
    db.execute(
        "UPDATE endpoints SET agent_pid = ?, agent_started = ? WHERE id = ?",
        (agent.pid, agent.started_ticks.cast_signed(), id.as_str()),
    )?;
    Ok(())
}

/// Its compute takes connections.
pub fn awake(db: &Connection, id: &EndpointId) -> Result<(), Problem> {
    db.execute("UPDATE endpoints SET started_at = ?1, last_active = ?1 WHERE id = ?2", (now(), id.as_str()))?;
    Ok(())
}

/// Its agent is gone.
pub fn asleep(db: &Connection, id: &EndpointId, last_active: Option<String>) -> Result<(), Problem> {
    db.execute(
        "UPDATE endpoints SET agent_pid = NULL, agent_started = NULL, suspended_at = ?,
         last_active = coalesce(?, last_active) WHERE id = ?",
        (now(), last_active, id.as_str()),
    )?;
    Ok(())
}
