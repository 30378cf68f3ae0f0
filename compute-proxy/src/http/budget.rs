//! Memory that requests and answers over HTTP may take together: each has a limit of its own, but there may be thousands.

use std::sync::Arc;

use axum::http::StatusCode;
use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::SqlError;

/// Bytes in which memory is counted. What is smaller is not: sessions are, and each is known to be that small.
const UNIT_BYTES: usize = 64 * 1024;

/// All of the memory.
#[derive(Clone)]
pub struct Budget {
    units: Arc<Semaphore>,
}

impl Budget {
    /// Of so many bytes.
    pub fn new(bytes: usize) -> Self {
        Self { units: Arc::new(Semaphore::new((bytes / UNIT_BYTES).min(Semaphore::MAX_PERMITS))) }
    }

    /// A share that grows as it is needed.
    pub fn share(&self) -> Share {
        Share { budget: self.clone(), held: None }
    }
}

/// One request's part, given back when it is dropped.
pub struct Share {
    budget: Budget,
    held: Option<OwnedSemaphorePermit>,
}

impl Share {
    /// Makes it at least this large; errors when there is not so much left.
    pub fn grow(&mut self, bytes: usize) -> Result<(), SqlError> {
        let held = self.held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = (bytes / UNIT_BYTES).saturating_sub(held);
        if more == 0 {
            return Ok(());
        }
        let more = u32::try_from(more).map_err(|_| exhausted())?;
        let permit = self.budget.units.clone().try_acquire_many_owned(more).map_err(|_| exhausted())?;
        match &mut self.held {
            Some(held) => held.merge(permit),
            None => self.held = Some(permit),
        }
        Ok(())
    }

    /// Keeps the share until the bytes are written.
    pub fn with(self, bytes: Vec<u8>) -> Bytes {
        if self.held.is_some() { Bytes::from_owner(Counted { bytes, _share: self }) } else { bytes.into() }
    }
}

struct Counted {
    bytes: Vec<u8>,
    _share: Share,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

fn exhausted() -> SqlError {
    let error = SqlError::new("53200", "the proxy has no memory left for this request and its answer");
    error.with_hint("Try again, or ask for less at a time.").with_status(StatusCode::SERVICE_UNAVAILABLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_given_back() {
        let budget = Budget::new(10 * UNIT_BYTES);
        let (mut one, mut two) = (budget.share(), budget.share());
        assert!(one.grow(UNIT_BYTES - 1).is_ok() && one.grow(6 * UNIT_BYTES).is_ok() && one.grow(100).is_ok());
        assert!(two.grow(5 * UNIT_BYTES).is_err() && two.grow(4 * UNIT_BYTES).is_ok());
        let answer = one.with(vec![7; 100]);
        assert!(two.grow(5 * UNIT_BYTES).is_err(), "the answer is still being written");
        assert_eq!(&answer[..2], [7, 7]);
        drop(answer);
        assert!(two.grow(10 * UNIT_BYTES).is_ok() && two.grow(usize::MAX).is_err());
        assert_eq!(budget.units.available_permits(), 0);
        drop(two);
        assert_eq!(budget.units.available_permits(), 10);
    }
}
