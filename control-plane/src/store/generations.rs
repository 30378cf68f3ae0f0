//! Rows of `generations`: pageservers, the numbers under which they write, and which projects were given to which.

use rusqlite::{Connection, OptionalExtension};
use types::{Generation, NodeId, ProjectId};

use super::parsed;
use crate::problem::Problem;

/// Hands out a generation larger than any before. Durable when the transaction is.
pub fn take(db: &Connection, pageserver: NodeId, address: &str) -> Result<Generation, Problem> {
    let last: u32 = db.query_row("SELECT coalesce(max(generation), 0) FROM generations", [], |row| row.get(0))?;
    let next = last.checked_add(1).ok_or_else(|| Problem::Internal("generations are used up".into()))?;
    db.execute(
        "INSERT OR REPLACE INTO generations (pageserver, generation, address) VALUES (?, ?, ?)",
        (pageserver.0.cast_signed(), next, address),
    )?;
    Ok(Generation(next))
}

/// Where a pageserver is reached that has taken a generation before.
pub fn address(db: &Connection, pageserver: NodeId) -> Result<String, Problem> {
    let sql = "SELECT address FROM generations WHERE pageserver = ? AND address <> ''";
    let found = db.query_row(sql, [pageserver.0.cast_signed()], |row| row.get(0)).optional()?;
    found.ok_or_else(|| Problem::not_found("pageserver", pageserver))
}

/// Projects that were given to other pageservers than this one.
pub fn elsewhere(db: &Connection, pageserver: NodeId) -> Result<Vec<ProjectId>, Problem> {
    let mut statement = db.prepare("SELECT id FROM projects WHERE pageserver IS NOT NULL AND pageserver <> ?")?;
    let rows = statement.query_map([pageserver.0.cast_signed()], |row| parsed(row, "id"))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Gives a project to a pageserver.
pub fn place(db: &Connection, project: &ProjectId, pageserver: NodeId) -> Result<(), Problem> {
    super::projects::get(db, project)?;
    db.execute("UPDATE projects SET pageserver = ? WHERE id = ?", (pageserver.0.cast_signed(), project.as_str()))?;
    Ok(())
}

/// Projects that were given to a pageserver, and where that is reached.
pub fn placements(db: &Connection) -> Result<Vec<(ProjectId, String)>, Problem> {
    let mut statement = db.prepare(
        "SELECT projects.id AS id, generations.address AS address FROM projects JOIN generations USING (pageserver)",
    )?;
    let rows = statement.query_map([], |row| Ok((parsed(row, "id")?, row.get("address")?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}
