//! Which session a cancel key belongs to. Clients get keys of the proxy's making, never a compute's own.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::BytesMut;
use parking_lot::Mutex;
use postgres_protocol::message::frontend;
use subtle::ConstantTimeEq;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::handshake::CancelRequest;

/// All sessions that can be cancelled now.
#[derive(Clone, Default)]
pub struct CancelMap {
    sessions: Arc<Mutex<HashMap<i32, Session>>>,
}

struct Session {
    secret: i32,
    target: CancelTarget,
}

/// How to cancel what a compute's backend runs.
#[derive(Clone)]
pub struct CancelTarget {
    /// The compute's socket.
    pub socket: PathBuf,
    /// The backend's real key.
    pub key: CancelRequest,
}

impl CancelMap {
    /// Registers a session under a fresh key until the guard is dropped.
    pub fn register(&self, socket: &Path, key: CancelRequest) -> CancelGuard {
        let mut sessions = self.sessions.lock();
        loop {
            // Drivers print process ids as unsigned or signed: keep them positive.
            let process_id = rand::random::<i32>() & i32::MAX;
            let Entry::Vacant(vacant) = sessions.entry(process_id) else { continue };
            let secret = rand::random();
            vacant.insert(Session { secret, target: CancelTarget { socket: socket.to_owned(), key } });
            return CancelGuard { map: self.clone(), key: CancelRequest { process_id, secret } };
        }
    }

    /// The session with this key, `None` when there is none.
    pub fn find(&self, key: CancelRequest) -> Option<CancelTarget> {
        let sessions = self.sessions.lock();
        let session = sessions.get(&key.process_id)?;
        let same = session.secret.to_be_bytes().ct_eq(&key.secret.to_be_bytes());
        if same.into() { Some(session.target.clone()) } else { None }
    }
}

/// Keeps a session's key known.
pub struct CancelGuard {
    map: CancelMap,
    key: CancelRequest,
}

impl CancelGuard {
    /// The key that the client is told.
    pub fn key(&self) -> CancelRequest {
        self.key
    }
}

impl Drop for CancelGuard {
    fn drop(&mut self) {
        self.map.sessions.lock().remove(&self.key.process_id);
    }
}

impl CancelTarget {
    /// Sends the request; returns when Postgres has closed the connection, which it does after it has signalled.
    pub async fn cancel(&self) -> io::Result<()> {
        let mut request = BytesMut::new();
        frontend::cancel_request(self.key.process_id, self.key.secret, &mut request);
        let mut stream = UnixStream::connect(&self.socket).await?;
        stream.write_all(&request).await?;
        // Postgres answers nothing; whatever this reads, the request was taken.
        stream.read(&mut [0; 1]).await.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_live_as_long_as_their_session() {
        let map = CancelMap::default();
        let real = CancelRequest { process_id: 1, secret: 2 };
        let guard = map.register(Path::new("/s"), real);
        let key = guard.key();
        assert!(key.process_id >= 0);
        assert!(map.find(key).is_some_and(|target| target.key == real));
        assert!(map.find(CancelRequest { secret: key.secret.wrapping_add(1), ..key }).is_none());
        drop(guard);
        assert!(map.find(key).is_none());
    }
}
