//! When garbage is collected: every so often, in each branch where history may have fallen out of its project's window.
//!
//! The control plane decides what counts as history (windows, leases); the pageserver knows the branch's children and layers.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};
use wire::pageserver::GarbageReport;

use crate::{
    app::App,
    history::Window,
    problem::Problem,
    store::{
        branches::{self, BranchRow},
        leases,
    },
};

/// Rows read at a time.
const BATCH: u32 = 100;

/// Collects garbage every `period` until it is aborted. A branch that can't be collected is tried again the next time.
pub async fn run(app: Arc<App>, period: Duration) {
    let mut tick = interval(period);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first tick comes at once: a start is no reason to look at every branch.
    tick.tick().await;
    loop {
        tick.tick().await;
        if let Err(error) = round(&app).await {
            tracing::warn!(%error, "garbage collection");
        }
    }
}

/// Each branch once. A branch that is asleep, and whose whole history had fallen out of the window the last time, costs
/// nothing.
async fn round(app: &App) -> Result<(), Problem> {
    let mut after = 0;
    loop {
        let rows = app.store.call(move |db| branches::collectable(db, after, BATCH)).await?;
        let Some(last) = rows.last() else { return Ok(()) };
        after = last.seq;
        for row in rows {
            match collect(app, &row).await {
                Ok(report) if report.removed_layers > 0 => {
                    let (layers, bytes) = (report.removed_layers, report.removed_bytes);
                    tracing::info!(branch = %row.branch, start_lsn = %report.start_lsn, layers, bytes, "garbage was collected");
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(branch = %row.branch, %error, "garbage was not collected"),
            }
        }
    }
}

/// Lets go what is outside the branch's window and held by no lease.
pub async fn collect(app: &App, row: &BranchRow) -> Result<GarbageReport, Problem> {
    let window = Window::of(app, &row.branch).await?.at_least(app.gc_slack_seconds);
    let branch = row.branch.clone();
    let held = app.store.call(move |db| leases::held(db, &branch)).await?;
    if let Some(settled) = row.settled_lsn {
        app.storage.checkpoint(&row.timeline, settled).await?;
    }
    let no_leases = held.is_empty();
    let report = app.storage.collect_garbage(&row.timeline, window.since_us(), held).await?;
    // A lease that ends, or a child that goes, makes more garbage: only with neither is the work done.
    let done = no_leases && !report.is_held && report.start_lsn == report.last_record_lsn;
    let (id, collected) = (row.branch.branch.clone(), done.then_some(report.last_record_lsn));
    app.store.call(move |db| branches::set_collected(db, &id, collected)).await?;
    Ok(report)
}
