//! Rows of `query_cache_invalidations`: which kept answers to queries over HTTP are not to be used any more.

use control_plane_api::internal::QueryCache;
use rusqlite::Connection;
use types::EndpointId;

use super::endpoints::EndpointRow;
use crate::problem::Problem;

/// Tags of one endpoint that are remembered; with more of them all its answers are invalidated instead.
const TAGS_MAX: usize = 200;

/// Stands for all answers.
const ALL: &str = "";

/// What proxies are told of an endpoint.
pub fn of(db: &Connection, endpoint: &EndpointRow) -> Result<QueryCache, Problem> {
    let mut found = QueryCache { settings: endpoint.settings.query_cache, ..QueryCache::default() };
    let sql = "SELECT tag, number FROM query_cache_invalidations WHERE endpoint_id = ?";
    let mut statement = db.prepare_cached(sql)?;
    let rows =
        statement.query_map([endpoint.id.as_str()], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)))?;
    for row in rows {
        let (tag, number) = row?;
        if tag == ALL {
            found.all = number.unsigned_abs();
        } else {
            found.tags.insert(tag, number.unsigned_abs());
        }
    }
    Ok(found)
}

/// Invalidates the answers with these tags; without any tag all of them.
pub fn invalidate(db: &Connection, endpoint: &EndpointId, tags: &[String]) -> Result<(), Problem> {
    for tag in tags {
        bump(db, endpoint, tag)?;
    }
    let sql = "SELECT count(*) FROM query_cache_invalidations WHERE endpoint_id = ? AND tag <> ?";
    let count: i64 = db.query_row(sql, (endpoint.as_str(), ALL), |row| row.get(0))?;
    if tags.is_empty() || count > TAGS_MAX as i64 {
        bump(db, endpoint, ALL)?;
        // Whatever was kept before is invalid: the tags need not be remembered.
        db.execute(
            "DELETE FROM query_cache_invalidations WHERE endpoint_id = ? AND tag <> ?",
            (endpoint.as_str(), ALL),
        )?;
    }
    Ok(())
}

fn bump(db: &Connection, endpoint: &EndpointId, tag: &str) -> Result<(), Problem> {
    db.execute(
        "INSERT INTO query_cache_invalidations (endpoint_id, tag, number) VALUES (?, ?, 1)
         ON CONFLICT (endpoint_id, tag) DO UPDATE SET number = number + 1",
        (endpoint.as_str(), tag),
    )?;
    Ok(())
}
