//! Rows of `safekeepers` and `memberships`: which safekeepers the installation has, and which each timeline has.
//!
//! Only who holds the branch's change (see [`crate::membership`]) changes a timeline's row, and each change gets a higher generation
//! and is stored before anybody is told of it.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension, Row};
use types::{BranchId, Member, Membership, MembershipGeneration, NodeId};

use super::parsed;
use crate::problem::Problem;

/// A safekeeper of the installation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SafekeeperRow {
    /// Its number and address.
    pub member: Member,
    /// False: it is leaving.
    pub is_member: bool,
}

/// A timeline's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MembershipRow {
    /// The timeline.
    pub timeline: BranchId,
    /// What holds now.
    pub membership: Membership,
    /// Everybody whom it concerns has been told of it.
    pub is_told: bool,
    /// Why a change does not come to its end.
    pub trouble: Option<String>,
}

/// Takes the settings' safekeepers at the first start; later only the addresses of those that are known. Timelines from before
/// there were memberships have these.
pub fn configure(db: &Connection, configured: &[Member]) -> Result<(), Problem> {
    let known = safekeepers(db)?;
    for Member { node, address } in configured {
        match known.iter().find(|row| row.member.node == *node) {
            None if known.is_empty() => insert(db, *node, address)?,
            None => {
                tracing::warn!(safekeeper = %node, "not known to this installation: add it with `dormouse safekeepers add`")
            }
            Some(row) if row.member.address != *address => {
                db.execute("UPDATE safekeepers SET address = ? WHERE node = ?", (address, node.0.cast_signed()))?;
                // Those who were told of the old address are told of the new one.
                db.execute("UPDATE memberships SET generation = generation + 1, is_told = 0 WHERE generation > 1", [])?;
            }
            Some(_) => {}
        }
    }
    let mut statement =
        db.prepare("SELECT timeline FROM branches WHERE timeline NOT IN (SELECT timeline FROM memberships)")?;
    let timelines = statement.query_map([], |row| parsed(row, "timeline"))?;
    timelines.collect::<Result<Vec<BranchId>, _>>()?.iter().try_for_each(|timeline| begin(db, timeline))
}

/// All safekeepers, those that are leaving too.
pub fn safekeepers(db: &Connection) -> Result<Vec<SafekeeperRow>, Problem> {
    let mut statement = db.prepare_cached("SELECT * FROM safekeepers ORDER BY node")?;
    let from_row = |row: &Row<'_>| {
        let node = NodeId(row.get::<_, i64>("node")?.cast_unsigned());
        Ok(SafekeeperRow { member: Member { node, address: row.get("address")? }, is_member: row.get("is_member")? })
    };
    let rows = statement.query_map([], from_row)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Those that every branch is to have.
pub fn wanted(db: &Connection) -> Result<Vec<Member>, Problem> {
    Ok(safekeepers(db)?.into_iter().filter(|row| row.is_member).map(|row| row.member).collect())
}

fn insert(db: &Connection, node: NodeId, address: &str) -> Result<(), Problem> {
    db.execute(
        "INSERT OR REPLACE INTO safekeepers (node, address, is_member) VALUES (?, ?, 1)",
        (node.0.cast_signed(), address),
    )?;
    Ok(())
}

/// Has every branch get a further safekeeper.
pub fn add(db: &Connection, member: &Member) -> Result<(), Problem> {
    if let Some(row) = safekeepers(db)?.iter().find(|row| row.member.node == member.node) {
        let message = format!("there is a safekeeper {} at {} already", member.node, row.member.address);
        return Err(Problem::Conflict { code: "SAFEKEEPER_ALREADY_EXISTS", message });
    }
    insert(db, member.node, &member.address)
}

/// Has every branch give a safekeeper up. One that was leaving already is forgotten: it will not come back to be told.
pub fn remove(db: &Connection, node: NodeId) -> Result<(), Problem> {
    let rows = safekeepers(db)?;
    let row = rows.iter().find(|row| row.member.node == node).ok_or_else(|| Problem::not_found("safekeeper", node))?;
    if row.is_member {
        if rows.iter().filter(|row| row.is_member).count() == 1 {
            return Err(Problem::Refused("the last safekeeper can't be removed; replace it".into()));
        }
        db.execute("UPDATE safekeepers SET is_member = 0 WHERE node = ?", [node.0.cast_signed()])?;
        return Ok(());
    }
    if all(db)?.iter().any(|row| row.membership.contains(node)) {
        return Err(Problem::Refused(format!(
            "branches still have safekeeper {node}; see `dormouse safekeepers list`"
        )));
    }
    db.execute("DELETE FROM safekeepers WHERE node = ?", [node.0.cast_signed()])?;
    Ok(())
}

/// Forgets those that were leaving and that no branch has any more, all having been told.
pub fn forget_left(db: &Connection) -> Result<(), Problem> {
    let rows = all(db)?;
    if !rows.iter().all(|row| row.is_told && !row.membership.is_joint()) {
        return Ok(());
    }
    for row in safekeepers(db)?.iter().filter(|row| !row.is_member) {
        if !rows.iter().any(|timeline| timeline.membership.contains(row.member.node)) {
            db.execute("DELETE FROM safekeepers WHERE node = ?", [row.member.node.0.cast_signed()])?;
        }
    }
    Ok(())
}

/// A new timeline has the safekeepers that there are now.
pub fn begin(db: &Connection, timeline: &BranchId) -> Result<(), Problem> {
    let nodes: Vec<NodeId> = wanted(db)?.iter().map(|member| member.node).collect();
    let sql = "INSERT INTO memberships (timeline, generation, members, is_told) VALUES (?, 1, ?, 1)";
    db.execute(sql, (timeline.as_str(), json(&nodes)))?;
    Ok(())
}

/// A timeline's membership.
pub fn of(db: &Connection, timeline: &BranchId) -> Result<Membership, Problem> {
    let addresses = addresses(db)?;
    let sql = "SELECT * FROM memberships WHERE timeline = ?";
    let found = db.query_row(sql, [timeline.as_str()], |row| from_row(row, &addresses)).optional()?;
    found.map(|row| row.membership).ok_or_else(|| Problem::not_found("membership of timeline", timeline))
}

/// All safekeepers that may have something of a timeline: its members, and those that are leaving.
pub fn everybody(db: &Connection, timeline: &BranchId) -> Result<Vec<Member>, Problem> {
    let membership = of(db, timeline)?;
    let leaving = safekeepers(db)?.into_iter().filter(|row| !row.is_member).map(|row| row.member);
    let leaving = leaving.filter(|member| !membership.contains(member.node));
    Ok(membership.all().into_iter().chain(leaving).collect())
}

/// All timelines' memberships.
pub fn all(db: &Connection) -> Result<Vec<MembershipRow>, Problem> {
    let addresses = addresses(db)?;
    let mut statement = db.prepare_cached("SELECT * FROM memberships ORDER BY timeline")?;
    let rows = statement.query_map([], |row| from_row(row, &addresses))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Stores a membership that follows on this one; nobody has been told of it.
pub fn store(db: &Connection, timeline: &BranchId, membership: &Membership) -> Result<(), Problem> {
    let nodes = |members: &[Member]| json(&members.iter().map(|member| member.node).collect::<Vec<_>>());
    let changed = db.execute(
        "UPDATE memberships SET generation = ?1, members = ?2, new_members = ?3, is_told = 0, trouble = NULL
         WHERE timeline = ?4 AND generation = ?1 - 1",
        (
            membership.generation.0.cast_signed(),
            nodes(&membership.members),
            membership.new_members.as_deref().map(nodes),
            timeline.as_str(),
        ),
    )?;
    match changed {
        1 => Ok(()),
        _ => Err(Problem::Conflict { code: "MEMBERSHIP_CHANGED", message: "another change came before".into() }),
    }
}

/// Notes that everybody was told of a membership, or why that, or the change, has not come to its end.
pub fn note(
    db: &Connection,
    timeline: &BranchId,
    generation: MembershipGeneration,
    is_told: bool,
    trouble: Option<&str>,
) -> Result<(), Problem> {
    db.execute(
        "UPDATE memberships SET is_told = ?, trouble = ? WHERE timeline = ? AND generation = ?",
        (is_told, trouble, timeline.as_str(), generation.0.cast_signed()),
    )?;
    Ok(())
}

fn addresses(db: &Connection) -> Result<BTreeMap<NodeId, String>, Problem> {
    Ok(safekeepers(db)?.into_iter().map(|row| (row.member.node, row.member.address)).collect())
}

fn json(nodes: &[NodeId]) -> String {
    let numbers: Vec<String> = nodes.iter().map(|node| node.0.to_string()).collect();
    format!("[{}]", numbers.join(","))
}

fn from_row(row: &Row<'_>, addresses: &BTreeMap<NodeId, String>) -> rusqlite::Result<MembershipRow> {
    let members = |text: String| -> rusqlite::Result<Vec<Member>> {
        let nodes: Vec<NodeId> = serde_json::from_str(&text).map_err(|error| {
            rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, Box::new(error))
        })?;
        let member = |node| Member { node, address: addresses.get(&node).cloned().unwrap_or_default() };
        Ok(nodes.into_iter().map(member).collect())
    };
    let membership = Membership {
        generation: MembershipGeneration(row.get::<_, i64>("generation")?.cast_unsigned()),
        members: members(row.get("members")?)?,
        new_members: row.get::<_, Option<String>>("new_members")?.map(members).transpose()?,
    };
    let (is_told, trouble) = (row.get("is_told")?, row.get("trouble")?);
    Ok(MembershipRow { timeline: parsed(row, "timeline")?, membership, is_told, trouble })
}
