//! Branches with their sizes, which the pageserver knows. Looking wakes no compute.

use control_plane_api::v2::Branch;

use crate::{app::App, store::branches::BranchRow};

/// Branches of one project as the API shows them, with sizes as of now. They are only shown: a pageserver that is away
/// leaves them out and fails nothing.
pub async fn with_sizes(app: &App, rows: Vec<BranchRow>) -> Vec<Branch> {
    let Some(project) = rows.first().map(|row| row.branch.project.clone()) else { return Vec::new() };
    let heads = futures::future::join_all(rows.iter().map(|row| app.computes.known_head(row))).await;
    let asked = rows.iter().zip(heads).map(|(row, head)| (row.timeline.branch.clone(), head)).collect();
    let sizes = match app.storage.sizes(&project, asked).await {
        Ok(sizes) => sizes,
        Err(error) => {
            tracing::debug!(%project, %error, "branches are shown without sizes");
            vec![None; rows.len()]
        }
    };
    let shown = rows.into_iter().zip(sizes).map(|(row, sizes)| {
        let mut branch = app.branch(row);
        branch.logical_size = sizes.map(|sizes| sizes.logical_bytes);
        branch.history_size = sizes.map(|sizes| sizes.history_bytes);
        branch.stored_size = sizes.map(|sizes| sizes.stored_bytes);
        branch
    });
    shown.collect()
}
