//! The last good login of a connection: most clients send the same with each request.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use subtle::ConstantTimeEq;

use super::sql::Target;
use crate::scram::hmac;

/// Remembers one login, for as long as what the control plane said of its role may be used. Its connection string, which has
/// the password, is remembered as a keyed hash.
pub struct LastLogin {
    last: Mutex<Option<Remembered>>,
    secret: [u8; 32],
}

struct Remembered {
    hash: [u8; 32],
    until: Instant,
    target: Arc<Target>,
}

impl Default for LastLogin {
    fn default() -> Self {
        Self { last: Mutex::default(), secret: rand::random() }
    }
}

impl LastLogin {
    /// What that login was for, if this is the same connection string.
    pub fn find(&self, connection_string: &[u8]) -> Option<Arc<Target>> {
        let last = self.last.lock();
        let same = |last: &&Remembered| bool::from(last.hash.ct_eq(&hmac(&self.secret, &[connection_string])));
        let Remembered { until, target, .. } = last.as_ref().filter(same)?;
        (Instant::now() < *until).then(|| target.clone())
    }

    /// A login was good with what the control plane said at `asked`.
    pub fn remember(&self, connection_string: &[u8], target: &Arc<Target>, asked: Instant, fresh_for: Duration) {
        let until = asked + fresh_for;
        if Instant::now() < until {
            let hash = hmac(&self.secret, &[connection_string]);
            *self.last.lock() = Some(Remembered { hash, until, target: target.clone() });
        }
    }
}
