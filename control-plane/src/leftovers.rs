//! Has safekeepers that were away while a branch was deleted delete it later: they would keep its WAL for good.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};

use crate::{app::App, problem::Problem, store::leftovers};

/// How often safekeepers are asked again.
pub const PERIOD: Duration = Duration::from_secs(30);

/// Timelines that one safekeeper is asked to delete at a time.
const BATCH: u32 = 100;

/// Asks again every `period` until it is aborted.
pub async fn run(app: Arc<App>, period: Duration) {
    let mut tick = interval(period);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if let Err(error) = round(&app).await {
            tracing::warn!(%error, "deleting what safekeepers have left of deleted branches");
        }
    }
}

/// Each safekeeper until it fails to answer once.
async fn round(app: &App) -> Result<(), Problem> {
    let mut silent = BTreeSet::new();
    for leftover in app.store.call(|db| leftovers::first(db, BATCH)).await? {
        let node = leftover.safekeeper.node;
        if silent.contains(&node) {
            continue;
        }
        match app.storage.delete_from_safekeeper(&leftover.timeline, &leftover.safekeeper).await {
            Ok(()) => {
                tracing::info!(branch = %leftover.timeline, safekeeper = %node, "a safekeeper has deleted a branch that was deleted while it was away");
                app.store.call(move |db| leftovers::done(db, &leftover)).await?;
            }
            Err(error) => {
                tracing::debug!(safekeeper = %node, %error, "it still has branches that were deleted");
                silent.insert(node);
            }
        }
    }
    Ok(())
}
