//! Rows of `jwks`: whose JSON Web Tokens stand for the passwords of which roles.

use control_plane_api::{internal::TokenIssuer, v2::Jwks};
use rusqlite::{Connection, OptionalExtension, Row, types::Type};
use types::{BranchId, BranchRef, ProjectId};

use super::{now, optional_parsed, parsed};
use crate::problem::Problem;

/// Issuers of one project: proxies are told of all that count for a role.
const ISSUERS_MAX: usize = 20;

/// An issuer that is to be added, checked.
#[derive(Debug, Clone)]
pub struct NewJwks {
    /// Its project.
    pub project: ProjectId,
    /// The only branch that it counts for.
    pub branch: Option<BranchId>,
    /// Where its keys are.
    pub jwks_url: String,
    /// Its owner's name for it.
    pub provider_name: String,
    /// Wanted in `aud`.
    pub audience: Option<String>,
    /// Wanted in `iss`.
    pub issuer: Option<String>,
    /// Roles that its tokens may take.
    pub role_names: Vec<String>,
}

fn from_row(row: &Row<'_>) -> rusqlite::Result<Jwks> {
    let role_names: String = row.get("role_names")?;
    let role_names = serde_json::from_str(&role_names)
        .map_err(|e| rusqlite::Error::FromSqlConversionFailure(0, Type::Text, Box::new(e)))?;
    Ok(Jwks {
        id: row.get("id")?,
        project_id: parsed(row, "project_id")?,
        branch_id: optional_parsed(row, "branch_id")?,
        jwks_url: row.get("jwks_url")?,
        provider_name: row.get("provider_name")?,
        jwt_audience: row.get("jwt_audience")?,
        jwt_issuer: row.get("jwt_issuer")?,
        role_names,
        created_at: row.get("created_at")?,
        updated_at: row.get("updated_at")?,
    })
}

/// Adds an issuer. Refused when the project has as many as it may have.
pub fn insert(db: &Connection, new: &NewJwks) -> Result<Jwks, Problem> {
    if list(db, &new.project)?.len() >= ISSUERS_MAX {
        return Err(Problem::Refused(format!("a project may have {ISSUERS_MAX} JWKS URLs")));
    }
    if let Some(branch) = &new.branch {
        super::branches::get(db, &new.project, branch)?;
    }
    let id = uuid::Uuid::new_v4().to_string();
    db.execute(
        "INSERT INTO jwks (id, project_id, branch_id, jwks_url, provider_name, jwt_audience, jwt_issuer, role_names,
         created_at, updated_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?9)",
        (
            &id,
            new.project.as_str(),
            new.branch.as_ref().map(BranchId::as_str),
            &new.jwks_url,
            &new.provider_name,
            &new.audience,
            &new.issuer,
            serde_json::json!(new.role_names).to_string(),
            now(),
        ),
    )?;
    Ok(db.query_row("SELECT * FROM jwks WHERE id = ?", [&id], from_row)?)
}

/// A project's issuers in order of creation.
pub fn list(db: &Connection, project: &ProjectId) -> Result<Vec<Jwks>, Problem> {
    super::projects::get(db, project)?;
    all(db, project)
}

fn all(db: &Connection, project: &ProjectId) -> Result<Vec<Jwks>, Problem> {
    let mut statement = db.prepare_cached("SELECT * FROM jwks WHERE project_id = ? ORDER BY seq")?;
    let rows = statement.query_map([project.as_str()], from_row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Removes an issuer; its tokens are good for nothing any more.
pub fn remove(db: &Connection, project: &ProjectId, id: &str) -> Result<Jwks, Problem> {
    let sql = "DELETE FROM jwks WHERE id = ? AND project_id = ? RETURNING *";
    let removed = db.query_row(sql, (id, project.as_str()), from_row).optional()?;
    removed.ok_or_else(|| Problem::not_found("jwks", id))
}

/// What proxies are told of a role: who may sign tokens for it.
pub fn of_role(db: &Connection, branch: &BranchRef, role: &str) -> Result<Vec<TokenIssuer>, Problem> {
    let counts = |jwks: &Jwks| {
        jwks.branch_id.as_ref().is_none_or(|only| *only == branch.branch)
            && jwks.role_names.iter().any(|name| name == role)
    };
    let issuers = all(db, &branch.project)?.into_iter().filter(counts).map(|jwks| TokenIssuer {
        jwks_url: jwks.jwks_url,
        audience: jwks.jwt_audience,
        issuer: jwks.jwt_issuer,
    });
    Ok(issuers.collect())
}
