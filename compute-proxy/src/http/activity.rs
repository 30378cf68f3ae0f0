//! What a connection of HTTP is doing, so that one that does nothing for long can be ended.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

/// How many requests and WebSockets of a connection are open, or since when none is.
pub struct Activity {
    state: Mutex<(usize, Instant)>,
}

impl Default for Activity {
    fn default() -> Self {
        Self { state: Mutex::new((0, Instant::now())) }
    }
}

impl Activity {
    /// Until the result is dropped, something is open.
    pub fn begin(self: &Arc<Self>) -> Open {
        self.state.lock().0 += 1;
        Open(self.clone())
    }

    /// Returns when nothing has been open for so long.
    pub async fn silence(&self, limit: Duration) {
        loop {
            let (open, since) = *self.state.lock();
            let silent = if open > 0 { Duration::ZERO } else { since.elapsed() };
            match limit.checked_sub(silent) {
                None | Some(Duration::ZERO) => return,
                Some(rest) => sleep(rest).await,
            }
        }
    }
}

/// A request or a WebSocket is open.
pub struct Open(Arc<Activity>);

impl Drop for Open {
    fn drop(&mut self) {
        let (open, since) = &mut *self.0.state.lock();
        *open -= 1;
        *since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_is_silent_when_no_request_was_open_for_long() {
        const LIMIT: Duration = Duration::from_millis(100);
        let activity = Arc::new(Activity::default());
        let begun = Instant::now();
        let request = activity.begin();
        let answered = async {
            sleep(3 * LIMIT).await;
            drop(request);
        };
        tokio::join!(activity.silence(LIMIT), answered);
        assert!(begun.elapsed() >= 4 * LIMIT);
    }
}
