//! `/safekeepers`: which safekeepers the installation has. Each change is begun here and carried out by [`crate::membership`].

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, State},
    routing::{delete, get, post},
};
use control_plane_api::safekeepers::{AddSafekeeper, BranchesOnTheirWay, Safekeeper, SafekeeperState, Safekeepers};
use futures::future::join_all;
use rusqlite::Connection;
use types::{Member, NodeId};

use super::{Shared, parse};
use crate::{
    app::App,
    membership::{Step, next_step},
    problem::Problem,
    store::memberships,
};

/// Most branches of which it is told why they do not come to their end.
const MAX_TROUBLES: usize = 20;

/// The routes of this file.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/safekeepers", get(list).post(add))
        .route("/safekeepers/{node}", delete(remove))
        .route("/safekeepers/{node}/replace", post(replace))
}

async fn list(State(app): Shared) -> Result<Json<Safekeepers>, Problem> {
    let mut all = app.store.call(describe).await?;
    join_all(all.safekeepers.iter_mut().map(async |safekeeper| {
        match app.storage.safekeeper_status(&safekeeper.address).await {
            Ok(status) if status.node != safekeeper.id => {
                safekeeper.trouble = Some(format!("at its address is number {}", status.node));
            }
            Ok(status) => (safekeeper.trouble, safekeeper.free_bytes) = (status.trouble, Some(status.free_bytes)),
            Err(error) => safekeeper.trouble = Some(error.to_string()),
        }
    }))
    .await;
    Ok(Json(all))
}

async fn add(State(app): Shared, body: Bytes) -> Result<Json<Safekeepers>, Problem> {
    let member = member(parse(&body)?)?;
    change(&app, move |db| memberships::add(db, &member)).await
}

async fn remove(State(app): Shared, Path(node): Path<String>) -> Result<Json<Safekeepers>, Problem> {
    let node = node_id(&node)?;
    change(&app, move |db| memberships::remove(db, node)).await
}

async fn replace(State(app): Shared, Path(node): Path<String>, body: Bytes) -> Result<Json<Safekeepers>, Problem> {
    let (node, member) = (node_id(&node)?, member(parse(&body)?)?);
    let change_both = move |db: &Connection| {
        memberships::add(db, &member)?;
        if !memberships::wanted(db)?.iter().any(|wanted| wanted.node == node) {
            return Err(Problem::not_found("safekeeper", node));
        }
        memberships::remove(db, node)
    };
    change(&app, change_both).await
}

async fn change(
    app: &App,
    work: impl FnOnce(&Connection) -> Result<(), Problem> + Send + 'static,
) -> Result<Json<Safekeepers>, Problem> {
    let changed = app.store.call(move |db| work(db).and_then(|()| describe(db))).await?;
    app.safekeepers_changed.notify_one();
    Ok(Json(changed))
}

fn describe(db: &Connection) -> Result<Safekeepers, Problem> {
    let (rows, wanted) = (memberships::all(db)?, memberships::wanted(db)?);
    let mut branches = BranchesOnTheirWay { total: rows.len(), changing: 0, troubles: Vec::new() };
    for row in rows.iter().filter(|row| next_step(row, &wanted) != Step::Nothing) {
        branches.changing += 1;
        if let Some(trouble) = row.trouble.as_ref().filter(|_| branches.troubles.len() < MAX_TROUBLES) {
            branches.troubles.push(format!("{}: {trouble}", row.timeline));
        }
    }
    let count = |node: NodeId| rows.iter().filter(|row| row.membership.contains(node)).count();
    let safekeepers = memberships::safekeepers(db)?.into_iter().map(|row| Safekeeper {
        id: row.member.node,
        branches: count(row.member.node),
        address: row.member.address,
        trouble: None,
        free_bytes: None,
        state: if row.is_member { SafekeeperState::Member } else { SafekeeperState::Leaving },
    });
    Ok(Safekeepers { safekeepers: safekeepers.collect(), branches })
}

fn member(asked: AddSafekeeper) -> Result<Member, Problem> {
    let AddSafekeeper { id, address } = asked;
    let good = address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if !good {
        return Err(Problem::Invalid(format!("address must be host:port, not {address:?}")));
    }
    Ok(Member { node: id, address })
}

fn node_id(text: &str) -> Result<NodeId, Problem> {
    text.parse().map(NodeId).map_err(|_| Problem::not_found("safekeeper", text))
}
