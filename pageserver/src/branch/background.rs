//! Long computations, on threads of their own, which end when the pageserver does.

use std::{future::Future, sync::LazyLock};

use tokio::{
    runtime::Runtime,
    time::{Instant, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::error::StorageError;

/// How nice these threads are to those that answer requests and take WAL in, which get nine times as much of a processor that
/// both want.
const NICENESS: i32 = 10;

/// Nothing but its threads for blocking work is used. `None` when it can't be had.
static THREADS: LazyLock<Option<Runtime>> = LazyLock::new(|| {
    let mut threads = tokio::runtime::Builder::new_current_thread();
    threads.thread_name("background").on_thread_start(|| {
        // With `None` Linux means the calling thread.
        if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
            tracing::debug!(%error, "work in the background has the same priority as requests");
        }
    });
    threads.build().inspect_err(|error| tracing::warn!(%error, "no threads for work in the background")).ok()
});

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
        let threads = THREADS.as_ref().map_or_else(|| runtime.clone(), |threads| threads.handle().clone());
        let until_stopped = async move {
            tokio::select! {
                biased;
                () = stopping.cancelled() => Err(StorageError::Stopping),
                done = work => done,
            }
        };
        let done = self.running.spawn_blocking_on(move || runtime.block_on(until_stopped), &threads).await;
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
