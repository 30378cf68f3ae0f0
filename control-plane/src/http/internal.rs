//! `/internal/v1`: what proxies and pageservers ask.

use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
};
use control_plane_api::internal::{GenerationTaken, RoleAuth, TakeGeneration, Wake};

use super::{Shared, endpoint_id, parse};
use crate::{
    allowed_ips,
    problem::Problem,
    store::{branches, catalog, endpoints, generations, jwks, memberships, projects, query_cache},
};

/// A pageserver starts.
pub async fn take_generation(State(app): Shared, body: Bytes) -> Result<Json<GenerationTaken>, Problem> {
    let TakeGeneration { pageserver, address } = parse(&body)?;
    let taken = app.store.call(move |db| {
        let generation = generations::take(db, pageserver, &address)?;
        let elsewhere = generations::elsewhere(db, pageserver)?;
        let known = memberships::safekeepers(db)?.into_iter().map(|row| row.member);
        Ok((GenerationTaken { generation, elsewhere, safekeepers: known.collect() }, address))
    });
    let (taken, address) = taken.await?;
    tracing::info!(%pageserver, address, generation = %taken.generation, "generation was handed out");
    // It may have come back under another address.
    app.storage.set_placements(app.store.call(generations::placements).await?);
    Ok(Json(taken))
}

/// A proxy checks a login. Wakes nothing.
pub async fn role_auth(
    State(app): Shared,
    Path((endpoint, role)): Path<(String, String)>,
) -> Result<Json<RoleAuth>, Problem> {
    let endpoint = endpoint_id(&endpoint)?;
    let found = app.store.call(move |db| {
        let row = endpoints::find(db, &endpoint)?.ok_or_else(|| Problem::not_found("endpoint", &endpoint))?;
        let branch = branches::get(db, &row.branch.project, &row.branch.branch)?;
        let project = projects::get(db, &row.branch.project)?;
        let role = catalog::role(db, &row.branch.branch, &role)?;
        Ok(RoleAuth {
            query_cache: query_cache::of(db, &row)?,
            token_issuers: jwks::of_role(db, &row.branch, &role.name)?,
            allowed_ips: allowed_ips::of_branch(&project.settings, branch.protected),
            scram_verifier: Some(role.scram_verifier),
            enabled: !row.disabled,
            branch: row.branch,
        })
    });
    Ok(Json(found.await?))
}

/// A proxy has a client that logged in.
pub async fn wake(State(app): Shared, Path(endpoint): Path<String>) -> Result<Json<Wake>, Problem> {
    Ok(Json(app.computes.wake(&endpoint_id(&endpoint)?).await?))
}
