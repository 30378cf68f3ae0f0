//! Committed WAL by Postgres's own physical replication protocol: standbys and `pg_receivewal` follow a branch here, whether or not
//! its compute is awake.
//!
//! - [`login`]: start-up, TLS, the token as a password.
//! - [`session`]: the commands of a logged-in client; [`command`] takes them apart.
//! - [`streaming`]: `START_REPLICATION`, from [`crate::wal_source`]; [`filler`]: what stands before a branch's first WAL.
//! - [`messages`]: frames on the socket, bounded; the messages themselves are `pgwire`'s.

mod command;
mod filler;
mod login;
mod messages;
mod refusal;
mod session;
mod streaming;
mod tls;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use safekeeper_protocol::message::ReplicationAddress;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use wire::TokenVerifier;

use self::{refusal::Refusal, tls::Tls};
use crate::{ReplicationConfig, registry::Registry};

/// From the connection to the end of the login.
const LOGIN_LIMIT: Duration = Duration::from_secs(10);
/// How long clients are told that the server stops.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// How long it may take to tell one why it is refused.
const REFUSAL_LIMIT: Duration = Duration::from_secs(1);
/// After a failed accept: others have to end first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections beyond the limit, which are told that it is reached.
const SPARE_CONNECTIONS: usize = 16;

/// Why WAL can't be given out by Postgres's protocol.
#[derive(Debug, thiserror::Error)]
pub enum ReplicationError {
    /// The address can't be listened on.
    #[error("can't listen on {address} for replication (--replication-listen): {source}")]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The certificate or its key can't be used.
    #[error("{}: {reason}", path.display())]
    Certificate {
        /// Which file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// A listener that has its address.
pub(crate) struct Listener {
    listener: TcpListener,
    address: SocketAddr,
    advertised: ReplicationAddress,
    tls: Option<Tls>,
    connections: usize,
    silence_limit: Duration,
}

/// What every connection is given.
struct Shared {
    registry: Arc<Registry>,
    verifier: TokenVerifier,
    tls: Option<Tls>,
    /// See [`ReplicationConfig::replication_timeout_seconds`].
    silence_limit: Duration,
    stopping: CancellationToken,
}

impl Listener {
    /// Takes the address; `None` when there is none in the configuration.
    pub async fn bind(config: &ReplicationConfig) -> Result<Option<Listener>, ReplicationError> {
        let Some(wanted) = config.replication_listen else { return Ok(None) };
        let tls = match (&config.replication_tls_cert, &config.replication_tls_key) {
            (Some(cert), Some(key)) => Some(Tls::load(cert.clone(), key.clone())?),
            _ => None,
        };
        let failed = |source| ReplicationError::Listen { address: wanted, source };
        let listener = TcpListener::bind(wanted).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let reached_at = config.replication_address.clone().unwrap_or_else(|| address.to_string());
        Ok(Some(Listener {
            listener,
            address,
            advertised: ReplicationAddress { address: reached_at, tls: tls.is_some() },
            tls,
            connections: config.replication_connections,
            silence_limit: Duration::from_secs(config.replication_timeout_seconds),
        }))
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// What others are told of it.
    pub fn advertised(&self) -> ReplicationAddress {
        self.advertised.clone()
    }

    /// Serves until `stopping`; then clients are told so.
    pub async fn run(self, registry: Arc<Registry>, verifier: TokenVerifier, stopping: CancellationToken) {
        info!(address = %self.address, tls = self.tls.is_some(), "listening for replication");
        let slots = Arc::new(Semaphore::new(self.connections));
        let Listener { listener, connections: limit, tls, silence_limit, .. } = self;
        let shared = Arc::new(Shared { registry, verifier, tls, silence_limit, stopping: stopping.clone() });
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = stopping.cancelled() => break,
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => match Arc::clone(&slots).try_acquire_owned() {
                        Ok(slot) => {
                            let shared = Arc::clone(&shared);
                            connections.spawn(async move {
                                serve(stream, peer, &shared).await;
                                drop(slot);
                            });
                        }
                        Err(_) if connections.len() < limit + SPARE_CONNECTIONS => {
                            let shared = Arc::clone(&shared);
                            connections.spawn(async move { refuse(stream, &shared, limit).await });
                        }
                        Err(_) => {}
                    },
                    Err(error) => {
                        warn!(%error, "can't accept a connection for replication");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
        let ended = async { while connections.join_next().await.is_some() {} };
        if timeout(STOP_LIMIT, ended).await.is_err() {
            connections.shutdown().await;
        }
    }
}

/// Says that there are too many, after the start-up packet: libpq believes no error before that.
async fn refuse(stream: TcpStream, shared: &Shared, limit: usize) {
    let refused = timeout(REFUSAL_LIMIT, login::turn_away(stream, shared, &Refusal::too_many_connections(limit))).await;
    debug!(refused = refused.is_ok(), "too many connections for replication");
}

async fn serve(stream: TcpStream, peer: SocketAddr, shared: &Shared) {
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%peer, %error, "can't set TCP_NODELAY");
    }
    let login = tokio::select! {
        login = timeout(LOGIN_LIMIT, login::log_in(stream, shared)) => login,
        () = shared.stopping.cancelled() => return,
    };
    match login {
        Ok(Ok(Some(session))) => {
            let branch = session.follower.branch.clone();
            info!(%peer, %branch, "a follower has logged in");
            let end = session.serve(shared).await;
            info!(%peer, %branch, %end, "a follower's connection has ended");
        }
        // It asked for something else than a session, or left.
        Ok(Ok(None)) => {}
        Ok(Err(error)) => info!(%peer, %error, "a follower was not let in"),
        Err(_) => debug!(%peer, "no login in time"),
    }
}
