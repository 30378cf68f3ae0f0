//! The Unix socket server: one task for each connected backend, one request at a time on each.

use std::{io, path::Path, sync::Arc, time::Duration};

use page_cache::{
    PageCache,
    protocol::{self, Op, REQUEST_BYTES, Request, ResponseHead},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use types::{PAGE_BYTES, PageTag};

use crate::{
    backend::{BackendError, ShimBackend},
    readahead::ReadAhead,
};

/// Backends served at once; Postgres's `max_connections` is far below. More wait for their turn.
const MAX_CONNECTIONS: usize = 4096;

/// Pause after a failed `accept` (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long backends may finish what they asked for after a shutdown.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// A bound server.
pub struct ShimServer {
    listener: UnixListener,
    service: Arc<Service>,
}

struct Service {
    backend: Arc<dyn ShimBackend>,
    cache: PageCache,
    ahead: ReadAhead,
}

impl ShimServer {
    /// Binds the socket, replacing a left-over one; must be called within a tokio runtime. Backends can connect from now
    /// on and are answered once [`ShimServer::run`] runs. What is read ahead of them is fetched by threads of its own.
    pub fn bind(socket_path: &Path, backend: Arc<dyn ShimBackend>, cache: PageCache) -> io::Result<ShimServer> {
        match std::fs::remove_file(socket_path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let listener = UnixListener::bind(socket_path)?;
        let ahead = ReadAhead::new(backend.clone(), cache.clone());
        Ok(ShimServer { listener, service: Arc::new(Service { backend, cache, ahead }) })
    }

    /// Serves until `shutdown`, then lets requests in progress finish for two seconds.
    pub async fn run(self, shutdown: CancellationToken) {
        let tasks = TaskTracker::new();
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                () = shutdown.cancelled() => break,
                accepted = accept(&self.listener, &places) => accepted,
            };
            match accepted {
                Ok((stream, place)) => {
                    let (service, shutdown) = (self.service.clone(), shutdown.clone());
                    tasks.spawn(async move {
                        if let Err(error) = service.serve(stream, shutdown).await {
                            tracing::debug!(%error, "a backend's connection ended");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a backend's connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        tasks.close();
        if tokio::time::timeout(DRAIN_LIMIT, tasks.wait()).await.is_err() {
            tracing::warn!(backends = tasks.len(), "backends were still waiting for storage at shutdown");
        }
    }
}

async fn accept(
    listener: &UnixListener,
    places: &Arc<Semaphore>,
) -> io::Result<(UnixStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

impl Service {
    async fn serve(&self, mut stream: UnixStream, shutdown: CancellationToken) -> io::Result<()> {
        let mut bytes = [0; REQUEST_BYTES];
        loop {
            let read = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                read = stream.read_exact(&mut bytes) => read,
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                read => read?,
            };
            let request = Request::decode(&bytes).ok_or_else(|| io::Error::other("not a request of this build"))?;
            let answer = self.answer(&request).await.unwrap_or_else(|error| {
                tracing::warn!(%error, op = ?request.op, rel = %request.rel, block = request.block, "a file call fails");
                Some(Answer::failed(&error))
            });
            let Some(answer) = answer else { continue };
            stream.write_all(&answer.head.encode()).await?;
            stream.write_all(&answer.payload).await?;
        }
    }

    /// `None` where the shim waits for no answer.
    async fn answer(&self, request: &Request) -> Result<Option<Answer>, BackendError> {
        let tag = PageTag { rel: request.rel, block: request.block };
        let answer = match request.op {
            Op::GetPage => self.get_page(tag).await?,
            Op::RelSize => Answer::new(self.backend.rel_size(request.rel).await?, Vec::new()),
            Op::ListRels => self.list_rels(request).await?,
            Op::SyncWal => {
                self.backend.sync_wal().await?;
                Answer::new(None, Vec::new())
            }
            Op::ReadAhead => {
                self.ahead.hint(&tag);
                return Ok(None);
            }
            Op::WalWritten => {
                self.backend.wal_written().await;
                return Ok(None);
            }
        };
        Ok(Some(answer))
    }

    async fn get_page(&self, tag: PageTag) -> Result<Answer, BackendError> {
        if self.ahead.wait_for(&tag).await {
            let mut ready = [0; PAGE_BYTES];
            // What the cache cannot read may be newer than what storage has: then nobody has the page.
            let failed = |error| BackendError::Storage(format!("{tag} in the page cache: {error}"));
            if self.cache.read(tag, &mut ready).map_err(failed)? {
                return Ok(Answer::new(None, ready.to_vec()));
            }
        }
        let page = self.backend.get_page(tag).await?;
        if page.len() != PAGE_BYTES {
            return Err(BackendError::Storage(format!("{tag} came with {} bytes", page.len())));
        }
        Ok(Answer::new(None, page.into()))
    }

    async fn list_rels(&self, request: &Request) -> Result<Answer, BackendError> {
        let (spc, db) = (request.rel.spc, request.rel.db);
        let rels = self.backend.list_rels(spc, db).await?;
        if rels.len() > protocol::MAX_LISTED_RELS {
            return Err(BackendError::Storage(format!("directory {spc}/{db} has {} relation forks", rels.len())));
        }
        let listed = rels.iter().filter(|(rel, _)| (rel.spc, rel.db) == (spc, db));
        Ok(Answer::new(None, listed.flat_map(|(rel, blocks)| protocol::encode_listed(rel, *blocks)).collect()))
    }
}

struct Answer {
    head: ResponseHead,
    payload: Vec<u8>,
}

impl Answer {
    /// Success: `blocks` is the size of a fork that exists.
    fn new(blocks: Option<u32>, payload: Vec<u8>) -> Answer {
        // `list_rels` and `get_page` have checked that the payload is far smaller than 4 GiB.
        let payload_bytes = payload.len() as u32;
        let head = ResponseHead { errno: 0, payload_bytes, value: blocks.unwrap_or(0), present: blocks.is_some() };
        Answer { head, payload }
    }

    fn failed(error: &BackendError) -> Answer {
        let errno = match error {
            BackendError::Fenced(_) | BackendError::Storage(_) | BackendError::Stopping => libc::EIO,
        };
        Answer { head: ResponseHead { errno, payload_bytes: 0, value: 0, present: false }, payload: Vec::new() }
    }
}
