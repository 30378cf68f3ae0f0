//! When a compute may sleep. Pure: no clock inside.

use std::time::Duration;

/// What "0" means for an endpoint's timeout.
pub const DEFAULT_SUSPEND_TIMEOUT: Duration = Duration::from_secs(300);
/// A proxy that was just told where a compute is needs this long to connect.
const AFTER_WAKE: Duration = Duration::from_secs(5);
/// Longest timeout that may be set: a week, as with Neon.
pub const MAX_SUSPEND_TIMEOUT_SECONDS: i64 = 604_800;

/// An endpoint's timeout as set (seconds; 0 default, -1 never) as a duration; `None` is never.
pub fn timeout(suspend_timeout_seconds: i64) -> Option<Duration> {
    match suspend_timeout_seconds {
        0 => Some(DEFAULT_SUSPEND_TIMEOUT),
        seconds if seconds < 0 => None,
        seconds => Some(Duration::from_secs(seconds.unsigned_abs())),
    }
}

/// True when a compute that reports `idle` and was last asked for `since_wake` ago may sleep.
pub fn may_sleep(timeout: Option<Duration>, idle: Duration, since_wake: Duration) -> bool {
    timeout.is_some_and(|timeout| idle >= timeout && since_wake >= timeout.min(AFTER_WAKE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_the_default_and_negative_is_never() {
        assert_eq!(timeout(0), Some(DEFAULT_SUSPEND_TIMEOUT));
        assert_eq!(timeout(-1), None);
        assert_eq!(timeout(7), Some(Duration::from_secs(7)));
    }

    #[test]
    fn a_compute_that_was_just_asked_for_stays() {
        let seconds = Duration::from_secs;
        assert!(may_sleep(timeout(10), seconds(10), seconds(6)));
        assert!(!may_sleep(timeout(10), seconds(9), seconds(60)));
        assert!(!may_sleep(timeout(10), seconds(60), seconds(1)));
        assert!(may_sleep(timeout(1), seconds(1), seconds(1)));
        assert!(!may_sleep(timeout(-1), seconds(1_000_000), seconds(1_000_000)));
    }
}
