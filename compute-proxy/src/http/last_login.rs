//! The last good login of a connection: most clients send the same with each request.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::http::HeaderValue;
use parking_lot::Mutex;
use subtle::ConstantTimeEq;

use super::sql::Target;

/// Remembers one login, for as long as what the control plane said of its role may be used.
#[derive(Default)]
pub struct LastLogin(Mutex<Option<Remembered>>);

struct Remembered {
    connection_string: HeaderValue,
    until: Instant,
    target: Arc<Target>,
}

impl LastLogin {
    /// What that login was for, if this is the same connection string.
    pub fn find(&self, connection_string: &[u8]) -> Option<Arc<Target>> {
        let last = self.0.lock();
        let same = |last: &&Remembered| bool::from(last.connection_string.as_bytes().ct_eq(connection_string));
        let Remembered { until, target, .. } = last.as_ref().filter(same)?;
        (Instant::now() < *until).then(|| target.clone())
    }

    /// A login was good with what the control plane said at `asked`.
    pub fn remember(&self, connection_string: &HeaderValue, target: &Arc<Target>, asked: Instant, fresh_for: Duration) {
        let until = asked + fresh_for;
        if Instant::now() < until {
            let (connection_string, target) = (connection_string.clone(), target.clone());
            *self.0.lock() = Some(Remembered { connection_string, until, target });
        }
    }
}
