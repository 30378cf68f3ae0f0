//! From an endpoint to a session with its Postgres: wakes it, connects, and wakes again if it has just gone to sleep.

use std::{path::PathBuf, sync::Arc, time::Duration};

use control_plane_api::internal::Wake;
use moka::sync::Cache;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use types::EndpointId;

use crate::{
    coalesce::Coalesce,
    compute::{self, OpenError, Opened},
    control::{ControlError, ControlPlane},
};

/// How often a session tries to reach a compute that keeps going away.
const ATTEMPTS: u32 = 10;

/// Pause before the second attempt; it doubles up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(50);

const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How long a session waits for the control plane before it tries where the endpoint was last.
const HEDGE_AFTER: Duration = Duration::from_secs(1);

/// Most endpoints whose socket is remembered.
const CAPACITY: u64 = 10_000;

/// Wakes endpoints.
#[derive(Clone)]
pub struct Waker {
    control: ControlPlane,
    waking: Arc<Coalesce<EndpointId, Result<Wake, ControlError>>>,
    /// Where endpoints were last, for when the control plane is down and they are awake.
    last_sockets: Cache<EndpointId, PathBuf>,
}

/// A session with a compute, and how it came about.
pub struct Woken {
    /// The session.
    pub session: Opened,
    /// The compute's socket.
    pub socket: PathBuf,
    /// True when the compute had to be started.
    pub cold: bool,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum WakeError {
    /// The control plane could not wake it.
    #[error(transparent)]
    Control(ControlError),
    /// It is awake but there is no session; of several attempts the last one.
    #[error(transparent)]
    Open(OpenError),
    /// It took too long.
    #[error("the endpoint did not wake in time")]
    Timeout,
}

impl Waker {
    /// Wakes through this control plane.
    pub fn new(control: ControlPlane) -> Self {
        let last_sockets = Cache::builder().max_capacity(CAPACITY).build();
        Self { control, waking: Arc::default(), last_sockets }
    }

    /// Opens a session on an endpoint, waking it if need be. `startup` is the message for its Postgres.
    pub async fn open(&self, endpoint: &EndpointId, startup: &[u8], deadline: Instant) -> Result<Woken, WakeError> {
        timeout_at(deadline, self.open_with_retries(endpoint, startup)).await.unwrap_or(Err(WakeError::Timeout))
    }

    async fn open_with_retries(&self, endpoint: &EndpointId, startup: &[u8]) -> Result<Woken, WakeError> {
        let mut cold = false;
        let mut pause = PAUSE;
        let mut attempt = 1;
        loop {
            let mut waking = std::pin::pin!(self.wake(endpoint));
            let answer = match timeout(HEDGE_AFTER, &mut waking).await {
                Ok(answer) => answer,
                Err(_) => match self.open_last_known(endpoint, startup).await {
                    Some(woken) => return Ok(woken),
                    None => waking.await,
                },
            };
            let wake = match answer {
                Ok(wake) => wake,
                Err(error) if error.is_outage() => {
                    let woken = self.open_last_known(endpoint, startup).await;
                    return woken.ok_or(WakeError::Control(error));
                }
                Err(error) => return Err(WakeError::Control(error)),
            };
            cold |= wake.cold;
            match compute::open(&wake.postgres_socket, startup).await {
                Ok(session) => {
                    self.last_sockets.insert(endpoint.clone(), wake.postgres_socket.clone());
                    return Ok(Woken { session, socket: wake.postgres_socket, cold });
                }
                Err(error) if error.is_asleep() && attempt < ATTEMPTS => {
                    tracing::debug!(%endpoint, attempt, %error, "the compute has just gone; waking it again");
                }
                Err(error) => return Err(WakeError::Open(error)),
            }
            sleep(pause).await;
            pause = PAUSE_MAX.min(pause * 2);
            attempt += 1;
        }
    }

    async fn wake(&self, endpoint: &EndpointId) -> Result<Wake, ControlError> {
        let control = self.control.clone();
        let asked_for = endpoint.clone();
        let answer = self.waking.run(endpoint.clone(), move || async move { control.wake(&asked_for).await }).await;
        answer.unwrap_or(Err(ControlError::GivenUp))
    }

    /// With the control plane slow or down, an endpoint that is awake can still be reached where it was last.
    async fn open_last_known(&self, endpoint: &EndpointId, startup: &[u8]) -> Option<Woken> {
        let socket = self.last_sockets.get(endpoint)?;
        let session = compute::open(&socket, startup).await.ok()?;
        tracing::warn!(%endpoint, "reached an awake endpoint without an answer from the control plane");
        Some(Woken { session, socket, cold: false })
    }
}
