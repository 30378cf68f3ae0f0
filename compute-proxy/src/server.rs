//! Takes connections, within limits, until told to stop.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use rustix::net::sockopt;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::{either::Either, sync::CancellationToken, task::TaskTracker};

use crate::{
    acme::{Acme, AcmeError},
    cancel::CancelMap,
    config::Config,
    control::ControlPlane,
    http::{self, AnswerCache, Budget, Repeated},
    key_sets::{KeySetOptions, KeySets},
    login::Login,
    open_files,
    pooling::{PoolOptions, Pools},
    roles::Roles,
    session,
    tls::{Tls, TlsError},
    wake::Waker,
};

/// What carries bytes both ways: TLS, a WebSocket.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// A client's connection, plain or inside something else.
pub type ClientStream = Either<TcpStream, Box<dyn ByteStream>>;

/// Connections above the limit of sessions: for cancel requests, and to tell clients that there are too many.
const SPARE_CONNECTIONS: usize = 128;

/// Pause after a failed accept: the process is out of file descriptors or the like.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Idle time after which a silent client is asked whether it is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);

/// How often certificate files are looked at.
const CERTIFICATE_LOOK: Duration = Duration::from_secs(2);

/// How long written bytes may stay unacknowledged before a client counts as gone.
const UNACKNOWLEDGED_MAX_MS: u32 = 120_000;

/// How long sessions may take to close once they must.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);

/// The proxy, listening.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    http_listener: TcpListener,
    http_address: SocketAddr,
    acme: Option<Acme>,
    shared: Arc<Shared>,
}

/// What all sessions share.
pub struct Shared {
    /// Settings.
    pub config: Config,
    /// Ends TLS.
    pub tls: Tls,
    /// Checks logins.
    pub login: Login,
    /// Wakes endpoints.
    pub waker: Waker,
    /// Server connections that pooled clients share.
    pub pools: Pools,
    /// Memory for HTTP requests and their answers.
    pub http_memory: Budget,
    /// Queries over HTTP that come again and again.
    pub repeated: Repeated,
    /// Answers to HTTP requests that are kept.
    pub answers: Arc<AnswerCache>,
    /// Sessions that can be cancelled.
    pub cancels: CancelMap,
    /// The proxy stops: no new sessions.
    pub draining: CancellationToken,
    /// The proxy has waited long enough: no more sessions.
    pub kill: CancellationToken,
    slots: Arc<Semaphore>,
    tunnel_slots: Arc<Semaphore>,
}

impl Shared {
    /// Leave for one session; `None` when there are as many as there may be.
    pub fn session_slot(&self) -> Option<OwnedSemaphorePermit> {
        self.slots.clone().try_acquire_owned().ok()
    }

    /// Leave for one WebSocket, logged in or not: a connection of HTTP/2 may have many.
    pub fn tunnel_slot(&self) -> Option<OwnedSemaphorePermit> {
        self.tunnel_slots.clone().try_acquire_owned().ok()
    }
}

impl Server {
    /// Loads the certificate and listens.
    pub async fn bind(config: Config) -> Result<Self, BindError> {
        open_files::raise_limit(config.max_connections);
        let tls = Tls::load(&config)?;
        let acme = Acme::new(&config, &tls)?;
        let control = ControlPlane::new(config.control_plane.clone(), &config.token, config.wake_timeout)?;
        let (listener, address) = listen(config.listen, "--listen").await?;
        let (http_listener, http_address) = listen(config.http_listen, "--http-listen").await?;
        let waker = Waker::new(control.clone());
        let shared = Shared {
            tls,
            login: Login::new(Roles::new(control.clone()), KeySets::new(key_set_options(&config))?, config.auth_cache),
            pools: Pools::new(pool_options(&config), waker.clone()),
            waker,
            http_memory: Budget::new(config.http_memory_bytes),
            repeated: Repeated::default(),
            answers: Arc::new(AnswerCache::new(config.http_cache_bytes)),
            cancels: CancelMap::default(),
            draining: CancellationToken::new(),
            kill: CancellationToken::new(),
            slots: Arc::new(Semaphore::new(config.max_connections)),
            tunnel_slots: Arc::new(Semaphore::new(connection_limit(&config))),
            config,
        };
        Ok(Self { listener, address, http_listener, http_address, acme, shared: Arc::new(shared) })
    }

    /// Where it listens; with port 0 in the settings, which port it is.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Where it listens for HTTP.
    pub fn http_addr(&self) -> SocketAddr {
        self.http_address
    }

    /// Serves until `shutdown`, then lets sessions end for as long as the settings say, then closes them.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let Self { listener, address, http_listener, http_address, acme, shared } = self;
        tracing::info!(%address, %http_address, "compute proxy is listening");
        let sessions = TaskTracker::new();
        let looking_after = looking_after(shared.clone());
        let renewing = tokio::spawn(renew_certificate(shared.clone(), shutdown.clone()));
        let getting = acme.map(|acme| tokio::spawn(get_certificates(acme, shared.clone(), shutdown.clone())));
        {
            let limit = connection_limit(&shared.config);
            let postgres = accept(&listener, limit, &sessions, |tcp, peer| session::serve(shared.clone(), tcp, peer));
            let http = accept(&http_listener, limit, &sessions, |tcp, peer| http::serve(shared.clone(), tcp, peer));
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = postgres => {}
                () = http => {}
            }
        }
        drop((listener, http_listener));
        sessions.close();
        shared.draining.cancel();
        if timeout(shared.config.drain_timeout, sessions.wait()).await.is_err() {
            tracing::info!(sessions = sessions.len(), "closing the sessions that are left");
            shared.kill.cancel();
            if timeout(KILL_TIMEOUT, sessions.wait()).await.is_err() {
                tracing::warn!(sessions = sessions.len(), "some sessions did not end");
            }
        }
        looking_after.abort();
        renewing.abort();
        if let Some(mut getting) = getting {
            // It may have to take back a record of a proof first.
            if timeout(KILL_TIMEOUT, &mut getting).await.is_err() {
                getting.abort();
            }
        }
        Ok(())
    }
}

/// Clients that there may be, with and without a session.
fn connection_limit(config: &Config) -> usize {
    config.max_connections.saturating_add(SPARE_CONNECTIONS)
}

async fn listen(address: SocketAddr, flag: &'static str) -> Result<(TcpListener, SocketAddr), BindError> {
    let listen_error = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => BindError::InUse { address, flag },
        _ => BindError::Listen { address, source },
    };
    let listener = TcpListener::bind(address).await.map_err(listen_error)?;
    let bound = listener.local_addr().map_err(listen_error)?;
    Ok((listener, bound))
}

/// Takes connections, at most `limit` at a time, and has each served. Never returns.
async fn accept<F>(
    listener: &TcpListener,
    limit: usize,
    sessions: &TaskTracker,
    serve: impl Fn(TcpStream, SocketAddr) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let connections = Arc::new(Semaphore::new(limit));
    loop {
        let (tcp, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = connections.clone().try_acquire_owned() else {
            tracing::debug!(%peer, "dropped a connection: there are too many");
            continue;
        };
        set_options(&tcp);
        let session = serve(tcp, peer);
        sessions.spawn(async move {
            session.await;
            drop(permit);
        });
    }
}

/// Listens and serves until `shutdown`.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    Server::bind(config).await?.run(shutdown).await
}

/// Why the proxy does not start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process listens there.
    #[error("address {address} is already in use; choose another with {flag}")]
    InUse {
        /// Where.
        address: SocketAddr,
        /// The flag that says where.
        flag: &'static str,
    },
    /// It cannot listen.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// There is no certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// There can be none by ACME.
    #[error(transparent)]
    Acme(#[from] AcmeError),
    /// There is no HTTP client.
    #[error("cannot make an HTTP client: {0}")]
    Http(#[from] reqwest::Error),
}

/// Looks after the pools until the proxy has stopped: while it drains, clients still wait for connections.
fn looking_after(shared: Arc<Shared>) -> JoinHandle<()> {
    tokio::spawn(async move { shared.pools.look_after().await })
}

/// Reads the certificate again on SIGHUP, and when its files change.
async fn renew_certificate(shared: Arc<Shared>, shutdown: CancellationToken) {
    let mut hangup = match signal(SignalKind::hangup()) {
        Ok(hangup) => hangup,
        Err(error) => return tracing::warn!(%error, "cannot listen to SIGHUP: certificates are not read again"),
    };
    let mut looks = tokio::time::interval(CERTIFICATE_LOOK);
    loop {
        let outcome = tokio::select! {
            () = shutdown.cancelled() => return,
            _ = hangup.recv() => shared.tls.reload(),
            _ = looks.tick() => shared.tls.reload_if_changed(),
        };
        if let Err(error) = outcome {
            tracing::error!(%error, "cannot use the new certificate; the old one stays in use");
        }
    }
}

/// Gets certificates by ACME, until `shutdown`.
async fn get_certificates(acme: Acme, shared: Arc<Shared>, shutdown: CancellationToken) {
    acme.keep(&shared.tls, &shutdown).await;
}

fn key_set_options(config: &Config) -> KeySetOptions {
    KeySetOptions { max_age: config.jwks_max_age, min_interval: config.jwks_min_interval }
}

fn pool_options(config: &Config) -> PoolOptions {
    PoolOptions {
        size: config.pool_size,
        queue_timeout: config.pool_queue_timeout,
        idle_timeout: config.pool_idle_timeout,
        queue: config.max_connections,
    }
}

/// A connection works without these too, so a failure is only noted.
fn set_options(tcp: &TcpStream) {
    let keepalive = || {
        sockopt::set_socket_keepalive(tcp, true)?;
        sockopt::set_tcp_keepidle(tcp, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_user_timeout(tcp, UNACKNOWLEDGED_MAX_MS)
    };
    if let Err(error) = tcp.set_nodelay(true).and_then(|()| Ok(keepalive()?)) {
        tracing::debug!(%error, "cannot set socket options");
    }
}
