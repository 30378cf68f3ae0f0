//! Rows of `roles`, `databases` and `dropped`: what must exist inside a branch's Postgres.

use control_plane_api::compute::{CatalogSpec, DatabaseSpec, RoleSpec};
use rusqlite::{Connection, OptionalExtension, Row};
use types::BranchId;

use super::{is_taken, now, parsed};
use crate::problem::Problem;

/// A role's row.
#[derive(Clone)]
pub struct RoleRow {
    /// Its branch.
    pub branch: BranchId,
    /// Its name.
    pub name: String,
    /// Never logged.
    pub password: String,
    /// Never logged.
    pub scram_verifier: String,
    /// When it was made.
    pub created_at: String,
    /// When it was last changed.
    pub updated_at: String,
}

/// A database's row.
#[derive(Debug, Clone)]
pub struct DatabaseRow {
    /// Its number.
    pub id: i64,
    /// Its branch.
    pub branch: BranchId,
    /// Its name.
    pub name: String,
    /// The role that owns it.
    pub owner: String,
    /// When it was made.
    pub created_at: String,
    /// When it was last changed.
    pub updated_at: String,
}

fn role_from_row(row: &Row<'_>) -> rusqlite::Result<RoleRow> {
    Ok(RoleRow {
        branch: parsed(row, "branch_id")?,
        name: row.get("name")?,
        password: row.get("password")?,
        scram_verifier: row.get("scram_verifier")?,
        created_at: row.get("created_at")?,
        updated_at: row.get("updated_at")?,
    })
}

fn database_from_row(row: &Row<'_>) -> rusqlite::Result<DatabaseRow> {
    Ok(DatabaseRow {
        id: row.get("id")?,
        branch: parsed(row, "branch_id")?,
        name: row.get("name")?,
        owner: row.get("owner_name")?,
        created_at: row.get("created_at")?,
        updated_at: row.get("updated_at")?,
    })
}

/// A branch's role.
pub fn find_role(db: &Connection, branch: &BranchId, name: &str) -> Result<Option<RoleRow>, Problem> {
    let mut statement = db.prepare_cached("SELECT * FROM roles WHERE branch_id = ? AND name = ?")?;
    Ok(statement.query_row((branch.as_str(), name), role_from_row).optional()?)
}

/// A branch's role, which must exist.
pub fn role(db: &Connection, branch: &BranchId, name: &str) -> Result<RoleRow, Problem> {
    find_role(db, branch, name)?.ok_or_else(|| Problem::not_found("role", name))
}

/// A branch's roles by name.
pub fn roles(db: &Connection, branch: &BranchId) -> Result<Vec<RoleRow>, Problem> {
    let mut statement = db.prepare_cached("SELECT * FROM roles WHERE branch_id = ? ORDER BY name")?;
    let rows = statement.query_map([branch.as_str()], role_from_row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// A branch's database, which must exist.
pub fn database(db: &Connection, branch: &BranchId, name: &str) -> Result<DatabaseRow, Problem> {
    db.query_row("SELECT * FROM databases WHERE branch_id = ? AND name = ?", (branch.as_str(), name), database_from_row)
        .optional()?
        .ok_or_else(|| Problem::not_found("database", name))
}

/// A branch's databases in order of creation.
pub fn databases(db: &Connection, branch: &BranchId) -> Result<Vec<DatabaseRow>, Problem> {
    let mut statement = db.prepare_cached("SELECT * FROM databases WHERE branch_id = ? ORDER BY id")?;
    let rows = statement.query_map([branch.as_str()], database_from_row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Makes a role.
pub fn insert_role(
    db: &Connection,
    branch: &BranchId,
    name: &str,
    password: &str,
    scram_verifier: &str,
) -> Result<RoleRow, Problem> {
    let now = now();
    let inserted = db.execute(
        "INSERT INTO roles (branch_id, name, password, scram_verifier, created_at, updated_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?5)",
        (branch.as_str(), name, password, scram_verifier, &now),
    );
    match inserted {
        Ok(_) => {}
        Err(e) if is_taken(&e) => {
            let message = format!("the branch has a role called {name:?} already");
            return Err(Problem::Conflict { code: "ROLE_ALREADY_EXISTS", message });
        }
        Err(e) => return Err(e.into()),
    }
    db.execute("DELETE FROM dropped WHERE branch_id = ? AND kind = 'role' AND name = ?", (branch.as_str(), name))?;
    bump(db, branch)?;
    role(db, branch, name)
}

/// Gives a role another password.
pub fn set_password(
    db: &Connection,
    branch: &BranchId,
    name: &str,
    password: &str,
    scram_verifier: &str,
) -> Result<RoleRow, Problem> {
    role(db, branch, name)?;
    db.execute(
        "UPDATE roles SET password = ?, scram_verifier = ?, updated_at = ? WHERE branch_id = ? AND name = ?",
        (password, scram_verifier, now(), branch.as_str(), name),
    )?;
    bump(db, branch)?;
    role(db, branch, name)
}

/// Makes a database; its owner must exist.
pub fn insert_database(db: &Connection, branch: &BranchId, name: &str, owner: &str) -> Result<DatabaseRow, Problem> {
    role(db, branch, owner)?;
    let now = now();
    let inserted = db.execute(
        "INSERT INTO databases (branch_id, name, owner_name, created_at, updated_at) VALUES (?1, ?2, ?3, ?4, ?4)",
        (branch.as_str(), name, owner, &now),
    );
    match inserted {
        Ok(_) => {}
        Err(e) if is_taken(&e) => {
            let message = format!("the branch has a database called {name:?} already");
            return Err(Problem::Conflict { code: "DATABASE_ALREADY_EXISTS", message });
        }
        Err(e) => return Err(e.into()),
    }
    db.execute("DELETE FROM dropped WHERE branch_id = ? AND kind = 'database' AND name = ?", (branch.as_str(), name))?;
    bump(db, branch)?;
    database(db, branch, name)
}

/// Removes a role that owns no database.
pub fn remove_role(db: &Connection, branch: &BranchId, name: &str) -> Result<RoleRow, Problem> {
    let row = role(db, branch, name)?;
    let owned: Option<String> = db
        .query_row("SELECT name FROM databases WHERE branch_id = ? AND owner_name = ?", (branch.as_str(), name), |r| {
            r.get(0)
        })
        .optional()?;
    if let Some(owned) = owned {
        return Err(Problem::Refused(format!("role {name:?} owns database {owned:?}; delete that first")));
    }
    db.execute("DELETE FROM roles WHERE branch_id = ? AND name = ?", (branch.as_str(), name))?;
    remember_drop(db, branch, "role", name)?;
    Ok(row)
}

/// Removes a database.
pub fn remove_database(db: &Connection, branch: &BranchId, name: &str) -> Result<DatabaseRow, Problem> {
    let row = database(db, branch, name)?;
    db.execute("DELETE FROM databases WHERE branch_id = ? AND name = ?", (branch.as_str(), name))?;
    remember_drop(db, branch, "database", name)?;
    Ok(row)
}

/// A database that the template has and the branch shall not have.
pub fn drop_unwanted_database(db: &Connection, branch: &BranchId, name: &str) -> Result<(), Problem> {
    remember_drop(db, branch, "database", name)
}

fn remember_drop(db: &Connection, branch: &BranchId, kind: &str, name: &str) -> Result<(), Problem> {
    let version = bump(db, branch)?;
    db.execute(
        "INSERT OR REPLACE INTO dropped (branch_id, kind, name, version) VALUES (?, ?, ?, ?)",
        (branch.as_str(), kind, name, version),
    )?;
    Ok(())
}

fn bump(db: &Connection, branch: &BranchId) -> Result<i64, Problem> {
    let sql = "UPDATE branches SET catalog_version = catalog_version + 1 WHERE id = ? RETURNING catalog_version";
    Ok(db.query_row(sql, [branch.as_str()], |row| row.get(0))?)
}

/// Copies a parent's roles and databases to its new branch.
pub fn inherit(db: &Connection, parent: &BranchId, child: &BranchId) -> Result<(), Problem> {
    db.execute(
        "INSERT INTO roles (branch_id, name, password, scram_verifier, created_at, updated_at)
         SELECT ?2, name, password, scram_verifier, created_at, updated_at FROM roles WHERE branch_id = ?1",
        (parent.as_str(), child.as_str()),
    )?;
    db.execute(
        "INSERT INTO databases (branch_id, name, owner_name, created_at, updated_at)
         SELECT ?2, name, owner_name, created_at, updated_at FROM databases WHERE branch_id = ?1 ORDER BY id",
        (parent.as_str(), child.as_str()),
    )?;
    db.execute(
        "INSERT INTO dropped (branch_id, kind, name, version)
         SELECT ?2, kind, name, 1 FROM dropped WHERE branch_id = ?1",
        (parent.as_str(), child.as_str()),
    )?;
    Ok(())
}

/// What Postgres must be told, with the version to hand to [`applied`]; `None` when it knows.
pub fn pending(db: &Connection, branch: &BranchId) -> Result<Option<(i64, CatalogSpec)>, Problem> {
    let sql = "SELECT catalog_version, catalog_applied FROM branches WHERE id = ?";
    let (version, applied): (i64, i64) = db.query_row(sql, [branch.as_str()], |r| Ok((r.get(0)?, r.get(1)?)))?;
    if version <= applied {
        return Ok(None);
    }
    let role = |row: RoleRow| RoleSpec { name: row.name, scram_verifier: Some(row.scram_verifier) };
    let database = |row: DatabaseRow| DatabaseSpec { name: row.name, owner: row.owner };
    let spec = CatalogSpec {
        roles: roles(db, branch)?.into_iter().map(role).collect(),
        databases: databases(db, branch)?.into_iter().map(database).collect(),
        drop_roles: dropped(db, branch, "role")?,
        drop_databases: dropped(db, branch, "database")?,
    };
    Ok(Some((version, spec)))
}

fn dropped(db: &Connection, branch: &BranchId, kind: &str) -> Result<Vec<String>, Problem> {
    let mut statement = db.prepare_cached("SELECT name FROM dropped WHERE branch_id = ? AND kind = ? ORDER BY name")?;
    let rows = statement.query_map((branch.as_str(), kind), |row| row.get(0))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Postgres has everything up to `version`.
pub fn applied(db: &Connection, branch: &BranchId, version: i64) -> Result<(), Problem> {
    db.execute("DELETE FROM dropped WHERE branch_id = ? AND version <= ?", (branch.as_str(), version))?;
    db.execute(
        "UPDATE branches SET catalog_applied = max(catalog_applied, ?) WHERE id = ?",
        (version, branch.as_str()),
    )?;
    Ok(())
}
