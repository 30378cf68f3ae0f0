//! Rows of `projects`.

use control_plane_api::v2::ProjectSettings;
use rusqlite::{Connection, OptionalExtension, Row, types::Type};
use types::ProjectId;

use super::{Page, Paged, now, parsed};
use crate::problem::Problem;

/// A project's row.
#[derive(Debug, Clone)]
pub struct ProjectRow {
    /// Order of creation.
    pub seq: i64,
    /// Its id.
    pub id: ProjectId,
    /// Its owner's name for it.
    pub name: String,
    /// True once its deletion has begun.
    pub deleting: bool,
    /// What new endpoints start with: seconds, 0 default, -1 never.
    pub default_suspend_timeout_seconds: i64,
    /// How far back branches may be made, seconds.
    pub history_retention_seconds: u64,
    /// Who may reach it.
    pub settings: ProjectSettings,
    /// When it was made.
    pub created_at: String,
    /// When it was last changed.
    pub updated_at: String,
}

fn from_row(row: &Row<'_>) -> rusqlite::Result<ProjectRow> {
    let settings: String = row.get("settings")?;
    let settings = serde_json::from_str(&settings)
        .map_err(|e| rusqlite::Error::FromSqlConversionFailure(0, Type::Text, Box::new(e)))?;
    Ok(ProjectRow {
        seq: row.get("seq")?,
        id: parsed(row, "id")?,
        name: row.get("name")?,
        deleting: row.get::<_, String>("state")? == "deleting",
        default_suspend_timeout_seconds: row.get("default_suspend_timeout_seconds")?,
        history_retention_seconds: row.get::<_, i64>("history_retention_seconds")?.cast_unsigned(),
        settings,
        created_at: row.get("created_at")?,
        updated_at: row.get("updated_at")?,
    })
}

fn settings_text(settings: &ProjectSettings) -> Result<String, Problem> {
    serde_json::to_string(settings).map_err(|e| Problem::Internal(format!("settings: {e}")))
}

/// A project, also one that is being deleted.
pub fn find(db: &Connection, id: &ProjectId) -> Result<Option<ProjectRow>, Problem> {
    Ok(db.query_row("SELECT * FROM projects WHERE id = ?", [id.as_str()], from_row).optional()?)
}

/// A project that is not being deleted.
pub fn get(db: &Connection, id: &ProjectId) -> Result<ProjectRow, Problem> {
    find(db, id)?.filter(|p| !p.deleting).ok_or_else(|| Problem::not_found("project", id))
}

/// Makes a project.
pub fn insert(
    db: &Connection,
    id: &ProjectId,
    name: &str,
    default_suspend_timeout_seconds: i64,
    history_retention_seconds: u64,
    settings: &ProjectSettings,
) -> Result<ProjectRow, Problem> {
    let now = now();
    db.execute(
        "INSERT INTO projects (id, name, state, default_suspend_timeout_seconds, history_retention_seconds, settings,
         created_at, updated_at) VALUES (?1, ?2, 'ready', ?3, ?4, ?5, ?6, ?6)",
        (
            id.as_str(),
            name,
            default_suspend_timeout_seconds,
            history_retention_seconds.cast_signed(),
            settings_text(settings)?,
            &now,
        ),
    )?;
    get(db, id)
}

/// Changes what may be changed.
pub fn update(db: &Connection, row: &ProjectRow) -> Result<ProjectRow, Problem> {
    db.execute(
        "UPDATE projects SET name = ?, default_suspend_timeout_seconds = ?, history_retention_seconds = ?, settings = ?,
         updated_at = ? WHERE id = ?",
        (
            &row.name,
            row.default_suspend_timeout_seconds,
            row.history_retention_seconds.cast_signed(),
            settings_text(&row.settings)?,
            now(),
            row.id.as_str(),
        ),
    )?;
    get(db, &row.id)
}

/// Begins its deletion.
pub fn mark_deleting(db: &Connection, id: &ProjectId) -> Result<(), Problem> {
    db.execute("UPDATE projects SET state = 'deleting', updated_at = ? WHERE id = ?", (now(), id.as_str()))?;
    Ok(())
}

/// Ends its deletion; its branches are gone already.
pub fn remove(db: &Connection, id: &ProjectId) -> Result<(), Problem> {
    db.execute("DELETE FROM operations WHERE project_id = ?", [id.as_str()])?;
    db.execute("DELETE FROM projects WHERE id = ?", [id.as_str()])?;
    Ok(())
}

/// Projects in order of creation, those being deleted left out; `search` is a part of name or id.
pub fn list(db: &Connection, page: Page, search: &str) -> Result<Paged<ProjectRow>, Problem> {
    let mut statement = db.prepare_cached(
        "SELECT * FROM projects WHERE seq > ?1 AND state = 'ready' AND (?2 = '' OR instr(name, ?2) OR instr(id, ?2))
         ORDER BY seq LIMIT ?3",
    )?;
    let rows = statement.query_map((page.after.unwrap_or(0), search, page.limit), from_row)?;
    let rows: Vec<ProjectRow> = rows.collect::<Result<_, _>>()?;
    let next = (rows.len() == page.limit as usize).then(|| rows.last().map(|r| r.seq)).flatten();
    Ok((rows, next))
}

/// Projects whose deletion was begun and not ended.
pub fn deleting(db: &Connection) -> Result<Vec<ProjectId>, Problem> {
    let mut statement = db.prepare("SELECT id FROM projects WHERE state = 'deleting'")?;
    let rows = statement.query_map([], |row| parsed(row, "id"))?;
    Ok(rows.collect::<Result<_, _>>()?)
}
