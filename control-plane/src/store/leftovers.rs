//! Rows of `leftovers`: deleted timelines of which a safekeeper has not said that it has deleted them.

use rusqlite::{Connection, Row};
use types::{BranchRef, Member, NodeId};

use super::parsed;
use crate::problem::Problem;

/// What one safekeeper may still have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// The timeline.
    pub timeline: BranchRef,
    /// The safekeeper, where it is reached now.
    pub safekeeper: Member,
}

/// These safekeepers may still have a timeline that was deleted.
pub fn note(db: &Connection, timeline: &BranchRef, nodes: &[NodeId]) -> Result<(), Problem> {
    let mut statement =
        db.prepare_cached("INSERT OR IGNORE INTO leftovers (project_id, timeline, node) VALUES (?, ?, ?)")?;
    for node in nodes {
        statement.execute((timeline.project.as_str(), timeline.branch.as_str(), node.0.cast_signed()))?;
    }
    Ok(())
}

/// The first so many of each safekeeper. What those had that the installation has no more is forgotten.
pub fn first(db: &Connection, of_each: u32) -> Result<Vec<Leftover>, Problem> {
    db.execute("DELETE FROM leftovers WHERE node NOT IN (SELECT node FROM safekeepers)", [])?;
    let mut statement = db.prepare_cached(
        "SELECT project_id, timeline, node, address
         FROM (SELECT *, row_number() OVER (PARTITION BY node ORDER BY timeline) AS place FROM leftovers)
         JOIN safekeepers USING (node) WHERE place <= ? ORDER BY node, timeline",
    )?;
    let from_row = |row: &Row<'_>| {
        let timeline = BranchRef { project: parsed(row, "project_id")?, branch: parsed(row, "timeline")? };
        let node = NodeId(row.get::<_, i64>("node")?.cast_unsigned());
        Ok(Leftover { timeline, safekeeper: Member { node, address: row.get("address")? } })
    };
    let rows = statement.query_map([of_each], from_row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The safekeeper has deleted it.
pub fn done(db: &Connection, leftover: &Leftover) -> Result<(), Problem> {
    db.execute(
        "DELETE FROM leftovers WHERE timeline = ? AND node = ?",
        (leftover.timeline.branch.as_str(), leftover.safekeeper.node.0.cast_signed()),
    )?;
    Ok(())
}
