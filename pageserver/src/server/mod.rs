//! The service: start, connections, stop.

mod connection;
mod fair;
mod generation;
mod handler;

pub use handler::Handler;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use control_plane_api::internal::GenerationTaken;
use tokio::{
    net::TcpListener,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use types::Member;
use wire::TokenVerifier;

use crate::{
    branch::{Branches, Shared, WalSource},
    config::Config,
    read::PageCache,
    remote::{DiskCache, ObjectStoreConfig, Remote, open_local},
};

/// Longest time that requests and uploads may take after a stop was asked for.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// Connections at a time.
const MAX_CONNECTIONS: usize = 4096;

/// A pageserver whose listener is bound.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    config: Config,
    verifier: TokenVerifier,
    remote: Arc<Remote>,
}

impl Server {
    /// Reads the key, checks the object store and binds the listener.
    pub async fn bind(config: Config) -> anyhow::Result<Server> {
        let key_path = &config.token_public_key;
        let pem = std::fs::read_to_string(key_path).with_context(|| format!("token key {}", key_path.display()))?;
        let verifier = TokenVerifier::from_pem(&pem).with_context(|| format!("token key {}", key_path.display()))?;
        let disk = match &config.object_store {
            ObjectStoreConfig::Local(directory) => DiskCache::in_store(open_local(directory)?),
            ObjectStoreConfig::S3 { .. } => {
                let directory = config.data_dir.join("layers");
                DiskCache::open(&directory, u64::from(config.disk_cache_mib) << 20)
                    .with_context(|| format!("layer cache {}", directory.display()))?
            }
        };
        let remote = Arc::new(Remote::open(&config.object_store, disk, u64::from(config.block_cache_mib) << 20)?);
        remote.check().await.with_context(|| format!("the object store {} does not work", config.object_store))?;
        let listener = TcpListener::bind(config.listen).await.map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                anyhow::anyhow!("address {} is already in use; choose another with --listen", config.listen)
            }
            _ => anyhow::Error::from(error).context(format!("can't listen on {}", config.listen)),
        })?;
        let address = listener.local_addr()?;
        Ok(Server { listener, address, config, verifier, remote })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `shutdown`, then writes everything out.
    pub async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        let GenerationTaken { generation, elsewhere, safekeepers } = tokio::select! {
            taken = generation::take(&self.config, self.address) => taken?,
            () = shutdown.cancelled() => return Ok(()),
        };
        let configured = self.config.safekeepers.iter();
        let configured = configured.map(|keeper| Member { node: keeper.id, address: keeper.address.clone() });
        // They may have been replaced since this pageserver was configured.
        let safekeepers: Vec<Member> = if safekeepers.is_empty() { configured.collect() } else { safekeepers };
        let wal = (!safekeepers.is_empty()).then(|| WalSource { safekeepers, token: self.config.token.clone() });
        let shared = Shared {
            remote: self.remote,
            pages: PageCache::new(u64::from(self.config.page_cache_mib) << 20),
            generation,
            elsewhere: elsewhere.into_iter().collect(),
            ingest_memory: Default::default(),
            tuning: self.config.tuning(),
            wal,
            background: Default::default(),
        };
        let branches = Branches::new(Arc::new(shared));
        tracing::info!(address = %self.address, store = %self.config.object_store, %generation, "pageserver listening");
        let house = tokio::spawn(branches.clone().keep_house(shutdown.clone()));
        let handler = Arc::new(Handler::new(branches.clone()));
        let connections = TaskTracker::new();
        serve(self.listener, self.verifier, handler, &connections, &shutdown).await;
        let deadline = Instant::now() + STOP_TIMEOUT;
        connections.close();
        let _ = timeout(Duration::from_secs(2), connections.wait()).await;
        branches.shut_down(deadline).await;
        house.abort();
        Ok(())
    }
}

async fn serve(
    listener: TcpListener,
    verifier: TokenVerifier,
    handler: Arc<Handler>,
    connections: &TaskTracker,
    shutdown: &CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => return,
        };
        match accepted {
            Ok((socket, peer)) if connections.len() < MAX_CONNECTIONS => {
                let serving = connection::serve(socket, verifier.clone(), handler.clone(), shutdown.child_token());
                connections.spawn(async move {
                    if let Err(error) = serving.await {
                        tracing::debug!(%peer, %error, "connection ended");
                    }
                });
            }
            Ok((_, peer)) => tracing::warn!(%peer, "connection refused: there are {MAX_CONNECTIONS} already"),
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
