//! What the control plane says about roles, kept for when it is slow or down.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use control_plane_api::internal::RoleAuth;
use moka::sync::Cache;
use types::EndpointId;

use crate::{
    coalesce::Coalesce,
    control::{ControlError, ControlPlane},
    handshake::NAME_MAX_BYTES,
};

/// Most roles that are remembered.
const CAPACITY: u64 = 10_000;

/// How old an answer may be when the control plane gives no newer one.
const STALE_LIMIT: Duration = Duration::from_secs(600);

/// How long a login waits for a new answer when there is an old one.
const PATIENCE: Duration = Duration::from_millis(500);

type Key = (EndpointId, Arc<str>);

/// Looks up roles.
#[derive(Clone)]
pub struct Roles {
    control: ControlPlane,
    cache: Cache<Key, Known>,
    asking: Arc<Coalesce<Key, Result<Role, ControlError>>>,
}

#[derive(Clone)]
struct Known {
    auth: Arc<RoleAuth>,
    asked: Instant,
    /// A login failed with it: the password may have been changed.
    doubted: bool,
}

/// A role, as far as a login is concerned.
#[derive(Clone)]
pub enum Role {
    /// It exists.
    Known(Arc<RoleAuth>),
    /// The endpoint has no such role.
    Missing,
    /// There is no such endpoint.
    EndpointMissing,
}

/// What was found out about a role.
pub struct Found {
    /// The role.
    pub role: Role,
    /// It is from this very moment.
    pub fresh: bool,
    /// When the control plane was asked.
    pub asked: Instant,
}

impl Roles {
    /// Nothing is known yet.
    pub fn new(control: ControlPlane) -> Self {
        let cache = Cache::builder().max_capacity(CAPACITY).time_to_live(STALE_LIMIT).build();
        Self { control, cache, asking: Arc::default() }
    }

    /// Looks a role up. `fresh_for`: how long an answer is used without asking again.
    pub async fn find(&self, endpoint: &EndpointId, role: &str, fresh_for: Duration) -> Result<Found, ControlError> {
        let now = Instant::now();
        let new = |role| Found { role, fresh: true, asked: now };
        if role.len() > NAME_MAX_BYTES {
            return Ok(new(Role::Missing));
        }
        let key = (endpoint.clone(), Arc::from(role));
        let Some(Known { auth, asked, doubted }) = self.cache.get(&key) else {
            return self.ask(key).await.map(new);
        };
        let old = Found { role: Role::Known(auth), fresh: false, asked };
        if !doubted && now.saturating_duration_since(asked) < fresh_for {
            return Ok(old);
        }
        match tokio::time::timeout(PATIENCE, self.ask(key)).await {
            Ok(Err(error)) if !error.is_outage() => Err(error),
            Ok(Ok(role)) => Ok(new(role)),
            Ok(Err(_)) | Err(_) => Ok(old),
        }
    }

    /// After a failed login: the next one asks again.
    pub fn doubt(&self, endpoint: &EndpointId, role: &str) {
        let key = (endpoint.clone(), Arc::from(role));
        if let Some(known) = self.cache.get(&key) {
            self.cache.insert(key, Known { doubted: true, ..known });
        }
    }

    async fn ask(&self, key: Key) -> Result<Role, ControlError> {
        let (control, cache) = (self.control.clone(), self.cache.clone());
        let asked_for = key.clone();
        let answer = self.asking.run(key, move || async move { ask_once(&control, &cache, asked_for).await }).await;
        answer.unwrap_or(Err(ControlError::GivenUp))
    }
}

async fn ask_once(control: &ControlPlane, cache: &Cache<Key, Known>, key: Key) -> Result<Role, ControlError> {
    let asked = Instant::now();
    match control.role_auth(&key.0, &key.1).await {
        Ok(auth) => {
            let auth = Arc::new(auth);
            cache.insert(key, Known { auth: auth.clone(), asked, doubted: false });
            Ok(Role::Known(auth))
        }
        Err(error) if error.is_not_found() => {
            cache.invalidate(&key);
            Ok(if error.is_endpoint_not_found() { Role::EndpointMissing } else { Role::Missing })
        }
        Err(error) => Err(error),
    }
}
