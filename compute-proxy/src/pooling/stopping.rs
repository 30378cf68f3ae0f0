//! When a pooled client must go because the proxy stops: idle ones at once, busy ones when time is up.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Watches for the proxy's end.
pub struct Stopping {
    draining: Pin<Box<WaitForCancellationFutureOwned>>,
    drained: bool,
    kill: CancellationToken,
    killed: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl Stopping {
    /// `draining`: no new work; `kill`: no work at all.
    pub fn new(draining: CancellationToken, kill: CancellationToken) -> Self {
        Self { draining: Box::pin(draining.cancelled_owned()), drained: false, kill, killed: None }
    }

    /// Ready when a client that is `busy` or not must go.
    pub fn poll(&mut self, busy: bool, context: &mut Context<'_>) -> Poll<()> {
        if !self.drained {
            std::task::ready!(self.draining.as_mut().poll(context));
            self.drained = true;
        }
        if !busy {
            return Poll::Ready(());
        }
        let kill = &self.kill;
        let killed = self.killed.get_or_insert_with(|| Box::pin(kill.clone().cancelled_owned()));
        killed.as_mut().poll(context)
    }
}
