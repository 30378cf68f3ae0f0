//! The Unix socket server.

use std::{io, path::Path, sync::Arc};

use page_cache::PageCache;
use tokio_util::sync::CancellationToken;

use crate::backend::ShimBackend;

/// A bound server.
pub struct ShimServer {
    _listener: tokio::net::UnixListener,
    _backend: Arc<dyn ShimBackend>,
    _cache: PageCache,
}

impl ShimServer {
    /// Binds the socket (within a tokio runtime).
    pub fn bind(socket_path: &Path, backend: Arc<dyn ShimBackend>, cache: PageCache) -> io::Result<ShimServer> {
        let listener = tokio::net::UnixListener::bind(socket_path)?;
        Ok(ShimServer { _listener: listener, _backend: backend, _cache: cache })
    }
    /// Serves until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        shutdown.cancelled().await;
    }
}
