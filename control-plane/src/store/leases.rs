//! Rows of `leases`: positions that garbage collection keeps though they are outside the history window.

use rusqlite::{Connection, OptionalExtension, Row};
use types::{BranchRef, Lsn};

use super::{from_ms, lsn, lsn_column, now_ms, parsed};
use crate::problem::Problem;

/// A lease's row.
#[derive(Debug, Clone)]
pub struct LeaseRow {
    /// A UUID.
    pub id: String,
    /// The branch that has the position.
    pub branch: BranchRef,
    /// The position.
    pub lsn: Lsn,
    /// Until when it holds.
    pub expires_at: String,
}

fn from_row(row: &Row<'_>) -> rusqlite::Result<LeaseRow> {
    Ok(LeaseRow {
        id: row.get("id")?,
        branch: BranchRef { project: parsed(row, "project_id")?, branch: parsed(row, "branch_id")? },
        lsn: lsn(row, "lsn")?,
        expires_at: from_ms(row.get("expires_ms")?),
    })
}

/// Holds a position for so many seconds from now. Leases whose time is over are removed on the way.
pub fn insert(db: &Connection, branch: &BranchRef, lsn: Lsn, seconds: u64) -> Result<LeaseRow, Problem> {
    super::branches::get(db, &branch.project, &branch.branch)?;
    db.execute("DELETE FROM leases WHERE expires_ms <= ?", [now_ms()])?;
    let id = uuid::Uuid::new_v4().to_string();
    let expires_ms = now_ms().saturating_add_unsigned(seconds.saturating_mul(1000));
    db.execute(
        "INSERT INTO leases (id, project_id, branch_id, lsn, expires_ms) VALUES (?, ?, ?, ?, ?)",
        (&id, branch.project.as_str(), branch.branch.as_str(), lsn_column(lsn), expires_ms),
    )?;
    Ok(LeaseRow { id, branch: branch.clone(), lsn, expires_at: from_ms(expires_ms) })
}

/// A branch's leases that hold, in order of their positions.
pub fn list(db: &Connection, branch: &BranchRef) -> Result<Vec<LeaseRow>, Problem> {
    super::branches::get(db, &branch.project, &branch.branch)?;
    let sql = "SELECT * FROM leases WHERE branch_id = ? AND project_id = ? AND expires_ms > ? ORDER BY lsn, expires_ms";
    let mut statement = db.prepare_cached(sql)?;
    let rows = statement.query_map((branch.branch.as_str(), branch.project.as_str(), now_ms()), from_row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The positions of a branch that a lease holds now, each once, in order.
pub fn held(db: &Connection, branch: &BranchRef) -> Result<Vec<Lsn>, Problem> {
    let mut positions: Vec<Lsn> = list(db, branch)?.into_iter().map(|row| row.lsn).collect();
    positions.dedup();
    Ok(positions)
}

/// Ends a lease.
pub fn remove(db: &Connection, branch: &BranchRef, id: &str) -> Result<LeaseRow, Problem> {
    let sql = "DELETE FROM leases WHERE id = ? AND branch_id = ? AND project_id = ? RETURNING *";
    let removed = db.query_row(sql, (id, branch.branch.as_str(), branch.project.as_str()), from_row).optional()?;
    removed.ok_or_else(|| Problem::not_found("lease", id))
}
