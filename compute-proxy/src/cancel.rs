//! Which session a cancel key belongs to. Clients get keys of the proxy's making, never a compute's own.

use std::{
    collections::{HashMap, hash_map::Entry},
    io,
    path::PathBuf,
    sync::Arc,
};

use bytes::BytesMut;
use parking_lot::Mutex;
use postgres_protocol::message::frontend;
use subtle::ConstantTimeEq;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::Notify,
};

use crate::handshake::CancelRequest;

/// All sessions that can be cancelled now.
#[derive(Clone, Default)]
pub struct CancelMap {
    sessions: Arc<Mutex<HashMap<i32, Session>>>,
}

struct Session {
    secret: i32,
    slot: Arc<CancelSlot>,
}

/// Where a session's requests go: to the backend that works for it now, if there is one.
#[derive(Default)]
pub struct CancelSlot {
    state: Mutex<SlotState>,
    /// The session waits for a backend: whoever cancels it is heard here.
    waiting: Notify,
    /// The last request in flight has arrived.
    landed: Notify,
}

#[derive(Default)]
struct SlotState {
    target: Option<Arc<CancelTarget>>,
    in_flight: usize,
}

/// How to cancel what a compute's backend runs.
pub struct CancelTarget {
    /// The compute's socket.
    pub socket: PathBuf,
    /// The backend's real key.
    pub key: CancelRequest,
}

impl CancelMap {
    /// Registers a session under a fresh key until the guard is dropped.
    pub fn register(&self, target: Option<Arc<CancelTarget>>) -> CancelGuard {
        let slot =
            Arc::new(CancelSlot { state: Mutex::new(SlotState { target, in_flight: 0 }), ..CancelSlot::default() });
        let mut sessions = self.sessions.lock();
        loop {
            // Drivers print process ids as unsigned or signed: keep them positive.
            let process_id = rand::random::<i32>() & i32::MAX;
            let Entry::Vacant(vacant) = sessions.entry(process_id) else { continue };
            let secret = rand::random();
            vacant.insert(Session { secret, slot: slot.clone() });
            return CancelGuard { map: self.clone(), key: CancelRequest { process_id, secret }, slot };
        }
    }

    /// The session with this key, `None` when there is none.
    pub fn find(&self, key: CancelRequest) -> Option<Arc<CancelSlot>> {
        let sessions = self.sessions.lock();
        let session = sessions.get(&key.process_id)?;
        let same = session.secret.to_be_bytes().ct_eq(&key.secret.to_be_bytes());
        if same.into() { Some(session.slot.clone()) } else { None }
    }
}

/// Keeps a session's key known.
pub struct CancelGuard {
    map: CancelMap,
    key: CancelRequest,
    slot: Arc<CancelSlot>,
}

impl CancelGuard {
    /// The key that the client is told.
    pub fn key(&self) -> CancelRequest {
        self.key
    }

    /// From now on requests go to this backend.
    pub fn attach(&self, target: Arc<CancelTarget>) {
        self.slot.state.lock().target = Some(target);
    }

    /// The backend is about to work for somebody else: no request may reach it any more. Returns when none is in flight.
    pub async fn detach(&self) {
        self.slot.state.lock().target = None;
        while self.slot.state.lock().in_flight > 0 {
            self.slot.landed.notified().await;
        }
    }

    /// Returns when somebody cancels a session that has no backend.
    pub async fn cancelled_while_waiting(&self) {
        self.slot.waiting.notified().await;
    }
}

impl Drop for CancelGuard {
    fn drop(&mut self) {
        self.map.sessions.lock().remove(&self.key.process_id);
    }
}

impl CancelSlot {
    /// Cancels what the session does now; nothing when it does nothing.
    pub async fn cancel(&self) -> io::Result<()> {
        let target = {
            let state = &mut *self.state.lock();
            state.in_flight += usize::from(state.target.is_some());
            state.target.clone()
        };
        let Some(target) = target else {
            self.waiting.notify_waiters();
            return Ok(());
        };
        let _landed = Landed(self);
        target.cancel().await
    }
}

/// Counts a request as arrived, also when it is given up.
struct Landed<'a>(&'a CancelSlot);

impl Drop for Landed<'_> {
    fn drop(&mut self) {
        self.0.state.lock().in_flight -= 1;
        self.0.landed.notify_one();
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

    fn target(process_id: i32) -> Arc<CancelTarget> {
        Arc::new(CancelTarget { socket: "/s".into(), key: CancelRequest { process_id, secret: 2 } })
    }

    #[test]
    fn keys_live_as_long_as_their_session() {
        let map = CancelMap::default();
        let guard = map.register(Some(target(1)));
        let key = guard.key();
        assert!(key.process_id >= 0);
        assert!(map.find(key).is_some_and(|slot| slot.state.lock().target.is_some()));
        assert!(map.find(CancelRequest { secret: key.secret.wrapping_add(1), ..key }).is_none());
        drop(guard);
        assert!(map.find(key).is_none());
    }

    #[tokio::test]
    async fn a_backend_is_not_let_go_while_a_request_is_on_its_way() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let socket = dir.path().join("s");
        let listener = tokio::net::UnixListener::bind(&socket).expect("bound");
        let map = CancelMap::default();
        let guard = map.register(None);
        guard.attach(Arc::new(CancelTarget { socket, key: CancelRequest { process_id: 1, secret: 2 } }));
        let slot = map.find(guard.key()).expect("known");
        let request = tokio::spawn(async move { slot.cancel().await });
        let (backend, _) = listener.accept().await.expect("asked");
        let mut detach = std::pin::pin!(guard.detach());
        assert!(futures::poll!(&mut detach).is_pending());
        drop(backend);
        detach.await;
        let _ = request.await.expect("no panic");
    }
}
