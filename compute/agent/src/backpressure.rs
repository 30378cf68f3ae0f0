//! Slows WAL down when the pageserver falls behind: what it has not ingested lies on the safekeepers' disks, and reads wait for
//! it. Half the allowed lag costs nothing; from there on each sync of WAL waits, longer and longer; at the whole of it, until
//! the pageserver has caught up by some.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use pageserver_client::PageserverClient;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use types::{BranchRef, Lsn};

/// How far the pageserver may be behind unless `dormouse.max_ingest_lag_mib` says otherwise.
pub const DEFAULT_MAX_LAG_MIB: u64 = 1024;

/// The least that may be allowed: a segment is written in one go.
const MIN_MAX_LAG_BYTES: u64 = 2 * types::WAL_SEGMENT_BYTES;

/// The longest that a sync waits while the lag is allowed.
const LONGEST_DELAY: Duration = Duration::from_millis(200);

/// How often the pageserver is asked while somebody waits, and while nobody does.
const ASK_WAITING: Duration = Duration::from_millis(50);
const ASK_CALM: Duration = Duration::from_secs(1);

/// Longest wait for its answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Waits longer than this are worth telling.
const TELL_AFTER: Duration = Duration::from_secs(3);

/// The pageserver's lag and what is allowed of it.
#[derive(Debug)]
pub struct Backpressure {
    /// What the pageserver is known to have ingested.
    ingested: watch::Sender<Lsn>,
    committed: AtomicU64,
    max_lag_bytes: AtomicU64,
    /// Since when somebody has been waiting until the lag is allowed again.
    blocked: Mutex<Option<Instant>>,
    /// Somebody has written.
    written: Notify,
    /// Nothing waits any more: Postgres stops.
    lifted: CancellationToken,
}

impl Backpressure {
    /// The pageserver has all WAL before `start`.
    pub fn new(start: Lsn) -> Backpressure {
        Backpressure {
            ingested: watch::Sender::new(start),
            committed: AtomicU64::new(start.0),
            max_lag_bytes: AtomicU64::new(DEFAULT_MAX_LAG_MIB << 20),
            blocked: Mutex::new(None),
            written: Notify::new(),
            lifted: CancellationToken::new(),
        }
    }

    /// Changes how far the pageserver may be behind; at least two segments.
    pub fn set_max_lag_bytes(&self, bytes: u64) {
        self.max_lag_bytes.store(bytes.max(MIN_MAX_LAG_BYTES), Relaxed);
    }

    /// Nothing waits from now on.
    pub fn lift(&self) {
        self.lifted.cancel();
    }

    /// A quorum holds WAL up to here.
    pub fn note_committed(&self, lsn: Lsn) {
        self.committed.fetch_max(lsn.0, Relaxed);
        self.written.notify_one();
    }

    /// Whether a sync would wait now.
    pub fn holds_back(&self) -> bool {
        !self.delay().is_zero()
    }

    /// Waits as the lag asks for; called before more WAL is made durable.
    pub async fn wait(&self) {
        let delay = self.delay();
        if delay.is_zero() {
            return;
        }
        tokio::select! {
            () = self.caught_up(delay) => {}
            () = self.lifted.cancelled() => {}
        }
    }

    async fn caught_up(&self, delay: Duration) {
        if self.lag_bytes() < self.max_lag_bytes.load(Relaxed) {
            return tokio::time::sleep(delay).await;
        }
        let mut ingested = self.ingested.subscribe();
        self.blocked.lock().get_or_insert_with(Instant::now);
        // The sender lives as long as `self`.
        let _ = ingested.wait_for(|_| self.lag_bytes() < self.max_lag_bytes.load(Relaxed)).await;
        *self.blocked.lock() = None;
    }

    /// What waits, and for how long, once it is worth telling.
    pub fn problem(&self) -> Option<String> {
        let waited = self.blocked.lock().map(|since| since.elapsed()).filter(|waited| *waited > TELL_AFTER)?;
        let mib = self.lag_bytes() >> 20;
        Some(format!("commits wait: the pageserver has been {mib} MiB behind for {} s", waited.as_secs()))
    }

    fn lag_bytes(&self) -> u64 {
        self.committed.load(Relaxed).saturating_sub(self.ingested.borrow().0)
    }

    fn delay(&self) -> Duration {
        let max = self.max_lag_bytes.load(Relaxed);
        let over = self.lag_bytes().saturating_sub(max / 2).min(max / 2);
        LONGEST_DELAY.mul_f64(over as f64 / (max / 2) as f64)
    }

    /// Asks the pageserver how far it is, whenever by what is known it may be far behind. Ends only when it is dropped.
    pub async fn watch(&self, pageserver: PageserverClient, branch: BranchRef) {
        loop {
            let max = self.max_lag_bytes.load(Relaxed);
            if self.lag_bytes() < max / 4 {
                self.written.notified().await;
                continue;
            }
            let asked = pageserver.ingested(&branch, Lsn(self.committed.load(Relaxed)));
            match tokio::time::timeout(ANSWER_LIMIT, asked).await {
                Ok(Ok(lsn)) => {
                    self.ingested.send_replace(lsn);
                }
                Ok(Err(error)) => tracing::debug!(%error, "cannot see how far the pageserver is"),
                Err(_) => tracing::debug!("the pageserver does not say how far it is"),
            }
            let calm = self.lag_bytes() < max / 2;
            tokio::time::sleep(if calm { ASK_CALM } else { ASK_WAITING }).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    const MIB: u64 = 1 << 20;

    fn at(committed_mib: u64) -> Backpressure {
        let pressure = Backpressure::new(Lsn(0));
        pressure.set_max_lag_bytes(100 * MIB);
        pressure.note_committed(Lsn(committed_mib * MIB));
        pressure
    }

    #[test]
    fn the_delay_grows_with_the_lag() {
        let millis = |committed_mib| at(committed_mib).delay().as_millis();
        assert_eq!([0, 50, 75, 100, 1000].map(millis), [0, 0, 100, 200, 200]);
    }

    #[test]
    fn some_lag_is_always_allowed() {
        let pressure = at(20);
        pressure.set_max_lag_bytes(0);
        assert!(pressure.lag_bytes() < pressure.max_lag_bytes.load(Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_limit_nothing_goes_on_until_the_pageserver_does() {
        let pressure = Arc::new(at(100));
        let waiting = tokio::spawn({
            let pressure = pressure.clone();
            async move { pressure.wait().await }
        });
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!(!waiting.is_finished());
        assert!(pressure.problem().expect("told").contains("100 MiB behind for 600 s"));
        pressure.ingested.send_replace(Lsn(10 * MIB));
        waiting.await.expect("goes on");
        assert_eq!(pressure.problem(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_does_not_wait() {
        let pressure = at(200);
        pressure.lift();
        tokio::time::timeout(Duration::from_millis(1), pressure.wait()).await.expect("at once");
    }
}
