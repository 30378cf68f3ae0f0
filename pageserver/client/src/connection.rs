//! One TCP connection: requests are written as they come, answers find their askers by id.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot},
    task::AbortHandle,
};
use types::BranchRef;
use wire::{
    FrameReader, FrameWriter, Hello, HelloReply, PROTOCOL_VERSION,
    pageserver::{PageserverError, Request, RequestBody, Response, ResponseBody},
};

/// Requests that may wait for the writer; more wait in their callers.
const WRITE_QUEUE: usize = 256;

/// Why a connection could not be opened.
pub(crate) enum OpenError {
    /// The pageserver refuses the token or the version.
    Denied(String),
    /// No connection.
    Transport(String),
}

/// An open connection. Dropping it closes it.
pub(crate) struct Connection {
    state: Arc<State>,
    requests: mpsc::Sender<Request>,
    reader: AbortHandle,
    writer: AbortHandle,
}

/// Shared between callers and the two tasks.
#[derive(Default)]
struct State {
    inner: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    next_id: u64,
    askers: HashMap<u64, oneshot::Sender<Answer>>,
    /// Why the connection is over, once it is.
    closed: Option<String>,
}

type Answer = Result<ResponseBody, PageserverError>;

impl State {
    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection: all who wait learn it now, later callers at once.
    fn close(&self, reason: String) {
        let mut waiting = self.lock();
        waiting.closed.get_or_insert(reason);
        waiting.askers.clear();
    }

    fn close_reason(&self) -> String {
        self.lock().closed.clone().unwrap_or_else(|| "connection closed".to_owned())
    }
}

/// Forgets an asker whose call was dropped before the answer came.
struct Asker<'a> {
    state: &'a State,
    id: u64,
}

impl Drop for Asker<'_> {
    fn drop(&mut self) {
        self.state.lock().askers.remove(&self.id);
    }
}

impl Connection {
    /// Connects and says hello.
    pub(crate) async fn open(address: &str, token: &str) -> Result<Connection, OpenError> {
        let transport = |error: &dyn std::fmt::Display| OpenError::Transport(error.to_string());
        let socket = TcpStream::connect(address).await.map_err(|e| transport(&e))?;
        socket.set_nodelay(true).map_err(|e| transport(&e))?;
        let (read, write) = socket.into_split();
        let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
        let hello = Hello { version: PROTOCOL_VERSION, token: token.to_owned() };
        writer.send(&hello).await.map_err(|e| transport(&e))?;
        match reader.recv::<HelloReply>().await.map_err(|e| transport(&e))? {
            Some(HelloReply::Welcome) => {}
            Some(HelloReply::Denied(reason)) => return Err(OpenError::Denied(reason)),
            None => return Err(OpenError::Transport("closed the connection at once".to_owned())),
        }
        let state = Arc::new(State::default());
        let (requests, queue) = mpsc::channel(WRITE_QUEUE);
        let reader = tokio::spawn(read_answers(reader, state.clone())).abort_handle();
        let writer = tokio::spawn(write_requests(writer, queue, state.clone())).abort_handle();
        Ok(Connection { state, requests, reader, writer })
    }

    /// True once the connection has ended.
    pub(crate) fn is_closed(&self) -> bool {
        self.state.lock().closed.is_some()
    }

    /// One request. The outer error is the connection's.
    pub(crate) async fn call(&self, branch: &BranchRef, body: RequestBody) -> Result<Answer, String> {
        let (answer_to, answer) = oneshot::channel();
        let id = {
            let mut waiting = self.state.lock();
            if let Some(reason) = &waiting.closed {
                return Err(reason.clone());
            }
            waiting.next_id += 1;
            let id = waiting.next_id;
            waiting.askers.insert(id, answer_to);
            id
        };
        let _asker = Asker { state: &self.state, id };
        let request = Request { id, branch: branch.clone(), body };
        if self.requests.send(request).await.is_err() {
            return Err(self.state.close_reason());
        }
        answer.await.map_err(|_| self.state.close_reason())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
        self.writer.abort();
        self.state.close("connection dropped".to_owned());
    }
}

async fn read_answers(mut reader: FrameReader<OwnedReadHalf>, state: Arc<State>) {
    let reason = loop {
        match reader.recv::<Response>().await {
            Ok(Some(response)) => {
                // The asker may have given up meanwhile.
                let asker = state.lock().askers.remove(&response.id);
                if let Some(asker) = asker {
                    let _ = asker.send(response.body);
                }
            }
            Ok(None) => break "pageserver closed the connection".to_owned(),
            Err(error) => break error.to_string(),
        }
    };
    state.close(reason);
}

async fn write_requests(
    mut writer: FrameWriter<OwnedWriteHalf>,
    mut queue: mpsc::Receiver<Request>,
    state: Arc<State>,
) {
    while let Some(request) = queue.recv().await {
        let mut sent = writer.queue(&request);
        while sent.is_ok() {
            match queue.try_recv() {
                Ok(more) => sent = writer.queue(&more),
                Err(_) => break,
            }
        }
        let sent = match sent {
            Ok(()) => writer.flush().await,
            Err(error) => Err(error),
        };
        if let Err(error) = sent {
            return state.close(error.to_string());
        }
    }
}
