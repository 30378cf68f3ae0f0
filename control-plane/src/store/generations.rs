//! Rows of `generations`: numbers under which pageservers write.

use rusqlite::Connection;
use types::{Generation, NodeId};

use crate::problem::Problem;

/// Hands out a generation larger than any before. Durable when the transaction is.
pub fn take(db: &Connection, pageserver: NodeId) -> Result<Generation, Problem> {
    let last: u32 = db.query_row("SELECT coalesce(max(generation), 0) FROM generations", [], |row| row.get(0))?;
    let next = last.checked_add(1).ok_or_else(|| Problem::Internal("generations are used up".into()))?;
    db.execute(
        "INSERT OR REPLACE INTO generations (pageserver, generation) VALUES (?, ?)",
        (pageserver.0.cast_signed(), next),
    )?;
    Ok(Generation(next))
}
