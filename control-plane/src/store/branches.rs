//! Rows of `branches`.

use std::collections::HashMap;

use rusqlite::{Connection, OptionalExtension, Row};
use types::{BranchId, BranchRef, Lsn, ProjectId};

use super::{Page, Paged, is_taken, lsn, lsn_column, now, optional_lsn, optional_parsed, parsed};
use crate::problem::Problem;

/// A branch's row.
#[derive(Debug, Clone)]
pub struct BranchRow {
    /// Order of creation.
    pub seq: i64,
    /// Project and id.
    pub branch: BranchRef,
    /// Its timeline: the branch's name in storage, on safekeepers and for its compute. A restore exchanges it.
    pub timeline: BranchRef,
    /// Its owner's name for it.
    pub name: String,
    /// What it was made from; `None` for a root.
    pub parent: Option<BranchId>,
    /// Where it left its parent.
    pub parent_lsn: Option<Lsn>,
    /// The time asked for, if one was.
    pub parent_timestamp: Option<String>,
    /// Where its own WAL begins.
    pub start_lsn: Lsn,
    /// End of its WAL, when no compute can have written since.
    pub settled_lsn: Option<Lsn>,
    /// Where it is in its life.
    pub state: BranchState,
    /// When it got there.
    pub state_changed_at: String,
    /// The project's default branch.
    pub is_default: bool,
    /// Deleting it is refused.
    pub protected: bool,
    /// Garbage collection has nothing to do until there is WAL after this.
    pub collected_lsn: Option<Lsn>,
    /// Grows with every change of roles and databases.
    pub catalog_version: i64,
    /// The version that Postgres is known to have.
    pub catalog_applied: i64,
    /// Subscriptions in its data are its ancestor's: no compute has disabled them yet.
    pub inherits_subscriptions: bool,
    /// When it was made.
    pub created_at: String,
    /// When it was last changed.
    pub updated_at: String,
}

/// Where a branch is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BranchState {
    /// Storage does not have it yet.
    Init,
    /// In use.
    Ready,
    /// Storage may have lost it already.
    Deleting,
}

impl BranchState {
    /// As stored, and as Neon's API calls it.
    pub fn as_str(self) -> &'static str {
        match self {
            BranchState::Init => "init",
            BranchState::Ready => "ready",
            BranchState::Deleting => "deleting",
        }
    }

    fn from_text(text: &str) -> rusqlite::Result<BranchState> {
        [BranchState::Init, BranchState::Ready, BranchState::Deleting]
            .into_iter()
            .find(|state| state.as_str() == text)
            .ok_or_else(|| {
                let reason = format!("unknown branch state {text:?}");
                rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, reason.into())
            })
    }
}

fn from_row(row: &Row<'_>) -> rusqlite::Result<BranchRow> {
    Ok(BranchRow {
        seq: row.get("seq")?,
        branch: BranchRef { project: parsed(row, "project_id")?, branch: parsed(row, "id")? },
        timeline: BranchRef { project: parsed(row, "project_id")?, branch: parsed(row, "timeline")? },
        name: row.get("name")?,
        parent: optional_parsed(row, "parent_id")?,
        parent_lsn: optional_lsn(row, "parent_lsn")?,
        parent_timestamp: row.get("parent_timestamp")?,
        start_lsn: lsn(row, "start_lsn")?,
        settled_lsn: optional_lsn(row, "settled_lsn")?,
        state: BranchState::from_text(&row.get::<_, String>("state")?)?,
        state_changed_at: row.get("state_changed_at")?,
        is_default: row.get("is_default")?,
        protected: row.get("protected")?,
        collected_lsn: optional_lsn(row, "collected_lsn")?,
        catalog_version: row.get("catalog_version")?,
        catalog_applied: row.get("catalog_applied")?,
        inherits_subscriptions: row.get("inherits_subscriptions")?,
        created_at: row.get("created_at")?,
        updated_at: row.get("updated_at")?,
    })
}

/// What a new branch is called and made from.
#[derive(Debug, Clone)]
pub struct NewBranch {
    /// Project and id.
    pub branch: BranchRef,
    /// Its name.
    pub name: String,
    /// What it is made from.
    pub parent: Option<BranchId>,
    /// The time asked for, if one was.
    pub parent_timestamp: Option<String>,
    /// The project's default branch.
    pub is_default: bool,
    /// Deleting it is refused.
    pub protected: bool,
}

/// Makes a branch in state `init`. Refused when the name is taken or the parent is not there.
pub fn insert(db: &Connection, new: &NewBranch) -> Result<(), Problem> {
    if let Some(parent) = &new.parent {
        get(db, &new.branch.project, parent)?;
    }
    let now = now();
    let inserted = db.execute(
        "INSERT INTO branches (id, project_id, name, parent_id, parent_timestamp, start_lsn, state, state_changed_at,
         is_default, protected, catalog_version, catalog_applied, created_at, updated_at, timeline)
         VALUES (?1, ?2, ?3, ?4, ?5, 0, 'init', ?6, ?7, ?8, 1, 0, ?6, ?6, ?1)",
        (
            new.branch.branch.as_str(),
            new.branch.project.as_str(),
            &new.name,
            new.parent.as_ref().map(BranchId::as_str),
            &new.parent_timestamp,
            &now,
            new.is_default,
            new.protected,
        ),
    );
    match inserted {
        Ok(_) => super::memberships::begin(db, &new.branch.branch),
        Err(e) if is_taken(&e) => Err(Problem::Conflict {
            code: "BRANCH_ALREADY_EXISTS",
            message: format!("the project has a branch called {:?} already", new.name),
        }),
        Err(e) => Err(e.into()),
    }
}

/// Storage has made it: from now on it may be used.
pub fn made(db: &Connection, branch: &BranchRef, start: Lsn, catalog_is_applied: bool) -> Result<BranchRow, Problem> {
    db.execute(
        "UPDATE branches SET state = 'ready', state_changed_at = ?1, updated_at = ?1, start_lsn = ?2, settled_lsn = ?2,
         parent_lsn = CASE WHEN parent_id IS NULL THEN NULL ELSE ?2 END, inherits_subscriptions = parent_id IS NOT NULL,
         catalog_applied = CASE WHEN ?3 THEN catalog_version ELSE 0 END WHERE id = ?4",
        (now(), lsn_column(start), catalog_is_applied, branch.branch.as_str()),
    )?;
    get(db, &branch.project, &branch.branch)
}

/// Says which branch it left: that in whose own history the point is, which may be one that the parent asked for comes from.
pub fn set_parent(db: &Connection, branch: &BranchRef, parent: &BranchId) -> Result<(), Problem> {
    get(db, &branch.project, parent)?;
    db.execute("UPDATE branches SET parent_id = ? WHERE id = ?", (parent.as_str(), branch.branch.as_str()))?;
    Ok(())
}

/// A branch in any state.
pub fn find(db: &Connection, project: &ProjectId, id: &BranchId) -> Result<Option<BranchRow>, Problem> {
    let sql = "SELECT * FROM branches WHERE id = ? AND project_id = ?";
    Ok(db.query_row(sql, (id.as_str(), project.as_str()), from_row).optional()?)
}

/// A branch that is in use.
pub fn get(db: &Connection, project: &ProjectId, id: &BranchId) -> Result<BranchRow, Problem> {
    super::projects::get(db, project)?;
    find(db, project, id)?.filter(|b| b.state == BranchState::Ready).ok_or_else(|| Problem::not_found("branch", id))
}

/// The project's default branch.
pub fn default(db: &Connection, project: &ProjectId) -> Result<BranchRow, Problem> {
    super::projects::get(db, project)?;
    db.query_row("SELECT * FROM branches WHERE project_id = ? AND is_default", [project.as_str()], from_row)
        .optional()?
        .ok_or_else(|| Problem::not_found("default branch of project", project))
}

/// Branches in use, in order of creation; `search` is a part of name or id.
pub fn list(db: &Connection, project: &ProjectId, page: Page, search: &str) -> Result<Paged<BranchRow>, Problem> {
    super::projects::get(db, project)?;
    let mut statement = db.prepare_cached(
        "SELECT * FROM branches WHERE project_id = ?1 AND state = 'ready' AND seq > ?2
         AND (?3 = '' OR instr(name, ?3) OR instr(id, ?3)) ORDER BY seq LIMIT ?4",
    )?;
    let rows = statement.query_map((project.as_str(), page.after.unwrap_or(0), search, page.limit), from_row)?;
    let rows: Vec<BranchRow> = rows.collect::<Result<_, _>>()?;
    let next = (rows.len() == page.limit as usize).then(|| rows.last().map(|r| r.seq)).flatten();
    Ok((rows, next))
}

/// All branches of a project, children before their parents.
pub fn children_first(db: &Connection, project: &ProjectId) -> Result<Vec<BranchRow>, Problem> {
    let mut statement = db.prepare("SELECT * FROM branches WHERE project_id = ?")?;
    let rows = statement.query_map([project.as_str()], from_row)?;
    let mut rows: Vec<BranchRow> = rows.collect::<Result<_, _>>()?;
    let parents: HashMap<BranchId, BranchId> =
        rows.iter().filter_map(|row| Some((row.branch.branch.clone(), row.parent.clone()?))).collect();
    let generations_above = |row: &BranchRow| {
        std::iter::successors(row.parent.as_ref(), |ancestor| parents.get(*ancestor)).take(parents.len()).count()
    };
    rows.sort_by_cached_key(|row| std::cmp::Reverse(generations_above(row)));
    Ok(rows)
}

/// Branches that a stop of the control plane left half made or half deleted.
pub fn unfinished(db: &Connection) -> Result<Vec<BranchRow>, Problem> {
    let mut statement = db.prepare("SELECT * FROM branches WHERE state <> 'ready' ORDER BY seq DESC")?;
    let rows = statement.query_map([], from_row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Changes name and protection.
pub fn update(db: &Connection, row: &BranchRow) -> Result<BranchRow, Problem> {
    let updated = db.execute(
        "UPDATE branches SET name = ?, protected = ?, updated_at = ? WHERE id = ?",
        (&row.name, row.protected, now(), row.branch.branch.as_str()),
    );
    match updated {
        Ok(_) => get(db, &row.branch.project, &row.branch.branch),
        Err(e) if is_taken(&e) => Err(Problem::Conflict {
            code: "BRANCH_ALREADY_EXISTS",
            message: format!("the project has a branch called {:?} already", row.name),
        }),
        Err(e) => Err(e.into()),
    }
}

/// Makes it the project's default branch.
pub fn set_default(db: &Connection, branch: &BranchRef) -> Result<BranchRow, Problem> {
    get(db, &branch.project, &branch.branch)?;
    db.execute(
        "UPDATE branches SET is_default = (id = ?), updated_at = ? WHERE project_id = ?",
        (branch.branch.as_str(), now(), branch.project.as_str()),
    )?;
    get(db, &branch.project, &branch.branch)
}

/// Begins its deletion unless something forbids it.
pub fn mark_deleting(db: &Connection, branch: &BranchRef) -> Result<BranchRow, Problem> {
    super::projects::get(db, &branch.project)?;
    let row = find(db, &branch.project, &branch.branch)?.ok_or_else(|| Problem::not_found("branch", &branch.branch))?;
    let children = children(db, &branch.branch)?;
    if !children.is_empty() {
        let message =
            format!("branch {} has child branches; delete or detach them first: {}", row.name, children.join(", "));
        return Err(Problem::Conflict { code: "BRANCH_HAS_CHILDREN", message });
    }
    if row.is_default {
        return Err(Problem::Refused(
            "the project's default branch cannot be deleted; set another as default first".into(),
        ));
    }
    if row.protected {
        return Err(Problem::Refused("the branch is protected; set protected to false first".into()));
    }
    force_deleting(db, branch)?;
    Ok(row)
}

/// Names and ids of its children, at most ten of them.
pub fn children(db: &Connection, parent: &BranchId) -> Result<Vec<String>, Problem> {
    let mut statement = db.prepare("SELECT name, id FROM branches WHERE parent_id = ? ORDER BY seq LIMIT 10")?;
    let named = |row: &Row<'_>| Ok(format!("{} ({})", row.get::<_, String>(0)?, row.get::<_, String>(1)?));
    let rows = statement.query_map([parent.as_str()], named)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Begins its deletion, whatever it is.
pub fn force_deleting(db: &Connection, branch: &BranchRef) -> Result<(), Problem> {
    db.execute(
        "UPDATE branches SET state = 'deleting', state_changed_at = ?1, updated_at = ?1 WHERE id = ?2",
        (now(), branch.branch.as_str()),
    )?;
    Ok(())
}

/// Ends its deletion: the branch, its endpoint, roles and databases are gone.
pub fn remove(db: &Connection, branch: &BranchRef) -> Result<(), Problem> {
    for table in ["endpoints", "roles", "databases", "dropped", "leases"] {
        db.execute(&format!("DELETE FROM {table} WHERE branch_id = ?"), [branch.branch.as_str()])?;
    }
    let removed = "DELETE FROM branches WHERE id = ? RETURNING timeline";
    let timeline: Option<String> = db.query_row(removed, [branch.branch.as_str()], |row| row.get(0)).optional()?;
    db.execute("DELETE FROM memberships WHERE timeline = ?", [timeline])?;
    Ok(())
}

/// What a restore exchanges.
#[derive(Debug, Clone)]
pub struct Restored {
    /// The branch that is restored.
    pub target: BranchRef,
    /// In state `init` and with the new timeline before, with the old one afterwards.
    pub old: BranchRef,
    /// The branch in whose history the new timeline starts.
    pub source: BranchId,
    /// Where.
    pub start: Lsn,
    /// The time asked for, if one was.
    pub timestamp: Option<String>,
    /// Whose roles and databases it gets; its own stay otherwise.
    pub catalog_from: Option<BranchId>,
}

/// The target goes on with the new timeline, from the source; `old` becomes what the target was, with its children, leases,
/// roles and databases. The subscriptions are those of `old`.
pub fn exchange_timelines(db: &Connection, restored: &Restored) -> Result<BranchRow, Problem> {
    let Restored { target, old, source, start, timestamp, catalog_from } = restored;
    let was = get(db, &target.project, &target.branch)?;
    let (target_id, old_id) = (target.branch.as_str(), old.branch.as_str());
    db.execute("UPDATE branches SET parent_id = ?1 WHERE parent_id = ?2", (old_id, target_id))?;
    // No two branches have one timeline, not even for a moment.
    db.execute("UPDATE branches SET timeline = '' WHERE id = ?", [target_id])?;
    db.execute(
        "UPDATE branches SET timeline = ?1, parent_id = ?2, parent_lsn = ?3, parent_timestamp = ?4, start_lsn = ?5,
         settled_lsn = ?6, collected_lsn = ?7, created_at = ?8, catalog_version = ?9, catalog_applied = ?10,
         state = 'ready', state_changed_at = ?11, updated_at = ?11, inherits_subscriptions = ?12 WHERE id = ?13",
        rusqlite::params![
            was.timeline.branch.as_str(),
            was.parent.as_ref().map(BranchId::as_str),
            was.parent_lsn.map(lsn_column),
            was.parent_timestamp,
            lsn_column(was.start_lsn),
            was.settled_lsn.map(lsn_column),
            was.collected_lsn.map(lsn_column),
            was.created_at,
            was.catalog_version,
            was.catalog_applied,
            now(),
            was.inherits_subscriptions,
            old_id,
        ],
    )?;
    super::catalog::inherit(db, &target.branch, &old.branch)?;
    db.execute("UPDATE leases SET branch_id = ?1 WHERE branch_id = ?2", (old_id, target_id))?;
    if let Some(other) = catalog_from {
        for table in ["roles", "databases", "dropped"] {
            db.execute(&format!("DELETE FROM {table} WHERE branch_id = ?"), [target_id])?;
        }
        super::catalog::inherit(db, other, &target.branch)?;
    }
    let parent = if *source == target.branch { old_id } else { source.as_str() };
    db.execute(
        "UPDATE branches SET timeline = ?1, parent_id = ?2, parent_lsn = ?3, parent_timestamp = ?4, start_lsn = ?3,
         settled_lsn = ?3, collected_lsn = NULL, catalog_version = catalog_version + 1, catalog_applied = 0,
         inherits_subscriptions = 1, state_changed_at = ?5, updated_at = ?5 WHERE id = ?6",
        // A timeline is called after the row it was made for.
        (old_id, parent, lsn_column(*start), timestamp, now(), target_id),
    )?;
    get(db, &target.project, &target.branch)
}

/// A compute was ready on this timeline: whatever subscriptions are enabled on it from now on are its own.
pub fn subscriptions_are_its_own(db: &Connection, timeline: &BranchId) -> Result<(), Problem> {
    db.execute(
        "UPDATE branches SET inherits_subscriptions = 0 WHERE timeline = ? AND inherits_subscriptions",
        [timeline.as_str()],
    )?;
    Ok(())
}

/// It has all its data to itself.
pub fn detached(db: &Connection, branch: &BranchRef) -> Result<(), Problem> {
    db.execute(
        "UPDATE branches SET parent_id = NULL, parent_lsn = NULL, parent_timestamp = NULL, updated_at = ? WHERE id = ?",
        (now(), branch.branch.as_str()),
    )?;
    Ok(())
}

/// Garbage collection has nothing to do until there is WAL after `lsn`; `None`: it may have.
pub fn set_collected(db: &Connection, branch: &BranchId, lsn: Option<Lsn>) -> Result<(), Problem> {
    db.execute("UPDATE branches SET collected_lsn = ? WHERE id = ?", (lsn.map(lsn_column), branch.as_str()))?;
    Ok(())
}

/// The branch in use that has a timeline.
pub fn of_timeline(db: &Connection, timeline: &BranchId) -> Result<Option<BranchRow>, Problem> {
    let sql = "SELECT * FROM branches WHERE timeline = ? AND state = 'ready'";
    Ok(db.query_row(sql, [timeline.as_str()], from_row).optional()?)
}

/// Branches of all projects in which garbage collection may find something, by their order of creation after `after`.
pub fn collectable(db: &Connection, after: i64, limit: u32) -> Result<Vec<BranchRow>, Problem> {
    let mut statement = db.prepare_cached(
        "SELECT * FROM branches WHERE seq > ?1 AND state = 'ready'
         AND (settled_lsn IS NULL OR (settled_lsn > start_lsn AND settled_lsn IS NOT collected_lsn))
         ORDER BY seq LIMIT ?2",
    )?;
    let rows = statement.query_map((after, limit), from_row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Remembers the end of its WAL, or that it is not known any more.
pub fn set_settled(db: &Connection, branch: &BranchId, settled: Option<Lsn>) -> Result<(), Problem> {
    db.execute("UPDATE branches SET settled_lsn = ? WHERE id = ?", (settled.map(lsn_column), branch.as_str()))?;
    Ok(())
}
