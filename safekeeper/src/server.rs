//! The listener.

use std::{
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bucket::{ObjectStoreConfig, ObjectStoreConfigError};
use object_store::ObjectStore;
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use types::NodeId;
use wire::{TokenError, TokenVerifier};

use crate::{
    Config,
    branch::Settings,
    connection,
    offload::Offload,
    registry::Registry,
    replication::{Listener, ReplicationError},
    storage::Shelf,
};

/// A safekeeper that has its address and its directory.
pub struct Server {
    id: NodeId,
    listener: TcpListener,
    address: SocketAddr,
    verifier: TokenVerifier,
    /// Gives WAL to those who speak Postgres's protocol.
    replication: Option<Listener>,
    /// Holds the lock on the data directory.
    registry: Arc<Registry>,
}

/// Why a safekeeper could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address is taken.
    #[error("address {0} is already in use; choose another with --listen")]
    AddressInUse(SocketAddr),
    /// The address can't be listened on.
    #[error("can't listen on {address}: {source}")]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The data directory or the key file can't be used.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another safekeeper uses the data directory.
    #[error("data directory {} is in use by another safekeeper", .0.display())]
    DataDirInUse(PathBuf),
    /// The key file holds no key.
    #[error(transparent)]
    Key(#[from] TokenError),
    /// The list of idle branches can't be used. If it is damaged, this safekeeper has forgotten what it promised: replace it by a new one.
    #[error("idle branches: {0}")]
    Shelf(String),
    /// WAL can't be given out by Postgres's protocol.
    #[error(transparent)]
    Replication(#[from] ReplicationError),
    /// There is no such object store.
    #[error("--object-store: {0}")]
    ObjectStore(#[from] ObjectStoreConfigError),
}

/// Threads that a safekeeper's runtime should have, on machines of any size: they wait for the disk, too.
pub const USUAL_THREADS: usize = 16;

/// Runs a safekeeper until `shutdown`.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    Server::bind(config).await?.run(shutdown).await;
    Ok(())
}

impl Server {
    /// Takes the data directory and the address.
    pub async fn bind(config: Config) -> Result<Server, ServerError> {
        let store = config.object_store.as_ref().map(ObjectStoreConfig::open).transpose()?;
        Server::bind_over(config, store).await
    }

    /// [`Server::bind`], with this object store rather than the one that `config` names.
    pub async fn bind_over(config: Config, store: Option<Arc<dyn ObjectStore>>) -> Result<Server, ServerError> {
        let key_file = |source| ServerError::File { path: config.token_public_key.clone(), source };
        let pem = std::fs::read_to_string(&config.token_public_key).map_err(key_file)?;
        let verifier = TokenVerifier::from_pem(&pem)?;
        let lock = lock_data_dir(&config.data_dir)?;
        let shelf = Shelf::open(&config.data_dir).map_err(|error| ServerError::Shelf(error.to_string()))?;
        let listener = TcpListener::bind(config.listen).await.map_err(|source| match source.kind() {
            std::io::ErrorKind::AddrInUse => ServerError::AddressInUse(config.listen),
            _ => ServerError::Listen { address: config.listen, source },
        })?;
        let address = listener.local_addr().map_err(|source| ServerError::Listen { address: config.listen, source })?;
        let replication = Listener::bind(&config.replication).await?;
        let seconds = Duration::from_secs;
        let offload_after = seconds(config.offload_after_seconds);
        let settings = Settings {
            node: config.id,
            idle_after: seconds(config.idle_seconds),
            keep_bytes: config.keep_local_mib << 20,
            replication: replication.as_ref().map(Listener::advertised),
            offload: store.map(|store| Arc::new(Offload::over(store, offload_after))),
            lock: Arc::new(lock),
            health: Arc::default(),
            shelf: Arc::new(shelf),
            in_place: Arc::new(Semaphore::new(threads_for_the_disk())),
        };
        let registry = Registry::new(config.data_dir, settings);
        Ok(Server { id: config.id, listener, address, verifier, replication, registry: Arc::new(registry) })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Where it listens for those who speak Postgres's protocol, if it does.
    pub fn replication_addr(&self) -> Option<SocketAddr> {
        self.replication.as_ref().map(Listener::local_addr)
    }

    /// Serves until `shutdown`. What was acknowledged is on disk at any time: nothing needs to be drained.
    pub async fn run(self, shutdown: CancellationToken) {
        info!(safekeeper = %self.id, address = %self.address, "listening");
        let mut connections = JoinSet::new();
        // They are aborted with the connections.
        connections.spawn(Arc::clone(&self.registry).load_unfinished());
        connections.spawn(Arc::clone(&self.registry).watch_disk());
        let mut followers = JoinSet::new();
        if let Some(listener) = self.replication {
            followers.spawn(listener.run(Arc::clone(&self.registry), self.verifier.clone(), shutdown.clone()));
        }
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, peer)) => {
                        let (verifier, registry) = (self.verifier.clone(), Arc::clone(&self.registry));
                        connections.spawn(connection::serve(stream, peer, verifier, registry));
                    }
                    Err(error) => {
                        // Out of file descriptors, most likely: others have to end first.
                        warn!(%error, "can't accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
        // They end by themselves, soon.
        while followers.join_next().await.is_some() {}
        connections.shutdown().await;
        self.registry.close().await;
        info!(safekeeper = %self.id, "stopped");
    }
}

/// How many of this runtime's threads may wait for the disk: three of four, and none where there are few.
fn threads_for_the_disk() -> usize {
    let threads = tokio::runtime::Handle::current().metrics().num_workers();
    if threads >= USUAL_THREADS { threads / 4 * 3 } else { 0 }
}

fn lock_data_dir(data_dir: &Path) -> Result<File, ServerError> {
    let failed = |source| ServerError::File { path: data_dir.to_owned(), source };
    std::fs::create_dir_all(data_dir).map_err(failed)?;
    let lock = File::create(data_dir.join("lock")).map_err(failed)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(std::fs::TryLockError::WouldBlock) => Err(ServerError::DataDirInUse(data_dir.to_owned())),
        Err(std::fs::TryLockError::Error(source)) => Err(failed(source)),
    }
}
