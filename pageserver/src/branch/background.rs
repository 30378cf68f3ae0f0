//! Long computations, on threads of their own, which end when the pageserver does.

use std::future::Future;

use tokio::time::{Instant, timeout_at};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::error::StorageError;

/// Those of a pageserver.
#[derive(Clone, Debug, Default)]
pub struct Background {
    stopping: CancellationToken,
    running: TaskTracker,
}

impl Background {
    /// Does the work on a thread of its own, even if nobody waits for it any more. Errors when the pageserver stops first.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, StorageError>> + Send + 'static,
    ) -> Result<T, StorageError> {
        let (runtime, stopping) = (tokio::runtime::Handle::current(), self.stopping.clone());
        let until_stopped = async move {
            tokio::select! {
                biased;
                () = stopping.cancelled() => Err(StorageError::Stopping),
                done = work => done,
            }
        };
        let done = self.running.spawn_blocking(move || runtime.block_on(until_stopped)).await;
        done.map_err(|_| StorageError::Stopping)?
    }

    /// Ends what is running, and waits for that until `deadline`. Nothing more is begun.
    pub(super) async fn stop(&self, deadline: Instant) {
        self.stopping.cancel();
        self.running.close();
        if timeout_at(deadline, self.running.wait()).await.is_err() {
            tracing::warn!("work in the background did not end in time");
        }
    }
}
