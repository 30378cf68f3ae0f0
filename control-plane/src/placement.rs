//! Which pageserver serves a project: by hand, from one to another.

use control_plane_api::v2::{ProjectEnvelope, TakeOverRequest};
use types::{NodeId, ProjectId};

use crate::{
    app::App,
    compute::SuspendReason,
    problem::Problem,
    store::{branches, generations, projects},
};

/// Gives a project to another pageserver under a new generation, though the one before may still run and believe that it
/// serves it: what that writes does not count any more. Computes are put to sleep; they wake with the new one.
pub async fn take_over(app: &App, project: ProjectId, request: TakeOverRequest) -> Result<ProjectEnvelope, Problem> {
    let pageserver = NodeId(request.pageserver);
    let wanted = project.clone();
    let begun = app.store.call(move |db| {
        let address = generations::address(db, pageserver)?;
        let rows = branches::children_first(db, &wanted)?;
        // The placement is durable before the pageserver hears of it: were the answer lost, repeating it is right.
        let generation = generations::take(db, pageserver, &address)?;
        generations::place(db, &wanted, pageserver)?;
        Ok((projects::get(db, &wanted)?, address, rows, generation, generations::placements(db)?))
    });
    let (row, address, rows, generation, placements) = begun.await?;
    app.storage.set_placements(placements);
    let any = rows.first().ok_or_else(|| Problem::not_found("branch of project", &project))?;
    app.storage.take_over(&any.timeline, generation).await?;
    for row in &rows {
        app.computes.suspend(&row.branch, SuspendReason::Requested).await?;
    }
    tracing::info!(%project, %pageserver, address, %generation, "project was given to a pageserver");
    Ok(ProjectEnvelope { project: app.project(row), operations: Vec::new() })
}
