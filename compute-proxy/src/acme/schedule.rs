//! When a certificate is renewed, and when a failure is followed by another try. Pure.

use std::time::Duration;

use time::OffsetDateTime;

/// How many times the first pause the longest is.
const RETRY_MAX_FACTOR: u32 = 30;

/// From when to when a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first moment.
    pub not_before: OffsetDateTime,
    /// The last one.
    pub not_after: OffsetDateTime,
}

impl Validity {
    /// When to renew: with a third of the lifetime left, or up to a thirtieth earlier, as `chance` (0 to 1) has it, so that
    /// certificates that were made together are not renewed together.
    pub fn renewal(&self, chance: f64) -> OffsetDateTime {
        let lifetime = self.not_after - self.not_before;
        self.not_after - lifetime / 3 - (lifetime / 30) * chance.clamp(0.0, 1.0)
    }
}

/// The pause after so many failures in a row (at least 1): `first`, doubled with each, at most thirty times as long, and a quarter
/// more or less as `chance` (0 to 1) has it.
pub fn retry_pause(failures: u32, first: Duration, chance: f64) -> Duration {
    let factor = 2_u32.saturating_pow(failures.saturating_sub(1)).min(RETRY_MAX_FACTOR);
    first.saturating_mul(factor).mul_f64(0.75 + 0.5 * chance.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_third_of_the_lifetime_is_left_for_failures() {
        let not_before = OffsetDateTime::UNIX_EPOCH;
        let days = |days: i64| time::Duration::days(days);
        let validity = Validity { not_before, not_after: not_before + days(90) };
        assert_eq!(validity.renewal(0.0), not_before + days(60));
        assert_eq!(validity.renewal(1.0), not_before + days(57));
    }

    #[test]
    fn pauses_grow_to_a_limit() {
        let minutes = |failures| retry_pause(failures, Duration::from_secs(120), 0.5).as_secs() / 60;
        assert_eq!([1, 2, 3, 4, 5, 6, 100, u32::MAX].map(minutes), [2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(retry_pause(1, Duration::from_secs(100), 0.0), Duration::from_secs(75));
        assert_eq!(retry_pause(1, Duration::from_secs(100), 1.0), Duration::from_secs(125));
    }
}
