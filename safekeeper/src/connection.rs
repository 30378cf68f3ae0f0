//! One connection: greeting, request, and what follows from it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bucket::StoredWalReader;
use bytes::Bytes;
use safekeeper_protocol::{
    AcceptorMessage, ConnectionId, ProposerMessage,
    message::{Answer, BranchStatus, MAX_WAL_BYTES_PER_MESSAGE, ReaderMessage, ReaderReply, Request, RequestBody},
};
use tokio::{
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot},
    task::spawn_blocking,
    time::{Instant, sleep_until, timeout},
};
use tracing::{debug, info, warn};
use types::{Lsn, Membership, MembershipGeneration};
use wire::{
    Claims, FrameReader, FrameWriter, Hello, HelloReply, MAX_GREETING_BYTES, PROTOCOL_VERSION, TokenVerifier, WireError,
};

use crate::{
    branch::{BranchCommand, BranchView},
    registry::{BranchHandle, Registry},
    storage::SegmentReader,
};

const GREETING_LIMIT: Duration = Duration::from_secs(10);
/// Answers that may wait for a proposer; they are small but for fetched WAL, of which there is one per other safekeeper.
const LINK_MESSAGES: usize = 1024;
/// A reader hears this soon after the last WAL that there is no more, then at growing intervals.
const FIRST_HEARTBEAT: Duration = Duration::from_millis(100);
const LONGEST_HEARTBEAT: Duration = Duration::from_secs(1);
/// A reader is not sent small pieces of WAL more often than this: what each costs is taken from those who commit.
const PIECE_INTERVAL: Duration = Duration::from_millis(3);
/// From here on a piece of WAL is not small.
const SMALL_PIECE_BYTES: u64 = 64 * 1024;

type Reader = FrameReader<OwnedReadHalf>;
type Writer = FrameWriter<OwnedWriteHalf>;

/// Why a connection ended before its time.
#[derive(Debug, thiserror::Error)]
enum ConnectionEnd {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("{0}")]
    Refused(String),
    #[error("the server is stopping")]
    Stopping,
}

/// Serves a connection to its end.
pub(crate) async fn serve(stream: TcpStream, peer: SocketAddr, verifier: TokenVerifier, registry: Arc<Registry>) {
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%peer, %error, "can't set TCP_NODELAY");
    }
    let (read, write) = stream.into_split();
    let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
    if let Err(error) = converse(&mut reader, &mut writer, &verifier, &registry).await {
        debug!(%peer, %error, "connection ended");
    }
}

async fn converse(
    reader: &mut Reader,
    writer: &mut Writer,
    verifier: &TokenVerifier,
    registry: &Arc<Registry>,
) -> Result<(), ConnectionEnd> {
    let greeting = timeout(GREETING_LIMIT, async {
        let hello = reader.recv_limited::<Hello>(MAX_GREETING_BYTES).await?;
        Ok::<_, WireError>((hello, reader.recv_limited::<Request>(MAX_GREETING_BYTES).await?))
    });
    let late = |_| ConnectionEnd::Refused("no greeting in time".to_owned());
    let (Some(hello), Some(request)) = greeting.await.map_err(late)?? else { return Ok(()) };
    let claims = match admit(&hello, &request, verifier) {
        Ok(claims) => claims,
        Err(reason) => {
            writer.send(&HelloReply::Denied(reason.clone())).await?;
            info!(branch = %request.branch, reason, "connection refused");
            return Err(ConnectionEnd::Refused(reason));
        }
    };
    writer.send(&HelloReply::Welcome).await?;
    if let RequestBody::Node = request.body {
        return Ok(writer.send(&Answer::Node(registry.status())).await?);
    }
    let handle = registry.get(&request.branch).ok_or(ConnectionEnd::Stopping)?;
    match request.body {
        RequestBody::Propose => propose(reader, writer, &handle).await,
        RequestBody::Read { from } => read(reader, writer, &handle, from, claims.is_service()).await,
        RequestBody::Status => {
            let answer = known(&handle, |status, _| Answer::Status(status)).await?;
            Ok(writer.send(&answer).await?)
        }
        RequestBody::Membership => {
            let of = |membership: Option<Arc<Membership>>| membership.map(|known| (*known).clone());
            let answer = known(&handle, |_, membership| Answer::Membership(of(membership))).await?;
            Ok(writer.send(&answer).await?)
        }
        RequestBody::SetMembership { membership } => {
            if let Err(error) = membership.check() {
                return Ok(writer.send(&Answer::Failed(error.to_string())).await?);
            }
            let (done, answered) = oneshot::channel();
            tell(&handle, BranchCommand::SetMembership { membership, done }).await?;
            let answer = match answered.await.map_err(|_| ConnectionEnd::Stopping)? {
                Ok(status) => Answer::Status(status),
                Err(reason) => Answer::Failed(reason),
            };
            Ok(writer.send(&answer).await?)
        }
        // Answered above, for no branch needs to be loaded for it.
        RequestBody::Node => Ok(()),
        RequestBody::Report { remote_consistent_lsn } => {
            tell(&handle, BranchCommand::Report { remote_consistent_lsn }).await?;
            Ok(writer.send(&Answer::Done).await?)
        }
        RequestBody::Delete => {
            let (done, answered) = oneshot::channel();
            tell(&handle, BranchCommand::Delete { done }).await?;
            let answer = match answered.await.map_err(|_| ConnectionEnd::Stopping)? {
                Ok(()) => Answer::Done,
                Err(reason) => Answer::Failed(reason),
            };
            Ok(writer.send(&answer).await?)
        }
    }
}

/// What there is to say of a branch once its files have been read.
async fn known(
    handle: &BranchHandle,
    answer: impl FnOnce(BranchStatus, Option<Arc<Membership>>) -> Answer,
) -> Result<Answer, ConnectionEnd> {
    match loaded(handle).await? {
        BranchView::Here { status, membership } => Ok(answer(status, membership)),
        BranchView::Deleted => Ok(Answer::Failed("the branch has been deleted".to_owned())),
        BranchView::Failed(reason) => Ok(Answer::Failed(reason)),
        BranchView::Loading => Err(ConnectionEnd::Stopping),
    }
}

/// Checks version, token and whether the token allows the request.
fn admit(hello: &Hello, request: &Request, verifier: &TokenVerifier) -> Result<Claims, String> {
    if hello.version != PROTOCOL_VERSION {
        return Err(format!("protocol version {}, this safekeeper speaks {PROTOCOL_VERSION}", hello.version));
    }
    let claims = verifier.verify(&hello.token).map_err(|e| e.to_string())?;
    let allowed = match request.body {
        RequestBody::Propose | RequestBody::Read { .. } | RequestBody::Status | RequestBody::Membership => {
            claims.allows_branch(&request.branch)
        }
        // A membership names addresses that others, with a service's token, connect to.
        RequestBody::Report { .. } | RequestBody::Delete | RequestBody::SetMembership { .. } | RequestBody::Node => {
            claims.is_service()
        }
    };
    if allowed { Ok(claims) } else { Err(format!("the token does not allow this for branch {}", request.branch)) }
}

async fn tell(handle: &BranchHandle, command: BranchCommand) -> Result<(), ConnectionEnd> {
    handle.inbox.send(command).await.map_err(|_| ConnectionEnd::Stopping)
}

/// The branch once its files have been read.
async fn loaded(handle: &BranchHandle) -> Result<BranchView, ConnectionEnd> {
    let mut view = handle.view.clone();
    let there = view.wait_for(|view| !matches!(view, BranchView::Loading)).await;
    there.map(|view| view.clone()).map_err(|_| ConnectionEnd::Stopping)
}

async fn propose(reader: &mut Reader, writer: &mut Writer, handle: &BranchHandle) -> Result<(), ConnectionEnd> {
    static NEXT_CONNECTION: AtomicU64 = AtomicU64::new(1);
    let connection = ConnectionId(NEXT_CONNECTION.fetch_add(1, Ordering::Relaxed));
    let (link, mut answers) = mpsc::channel(LINK_MESSAGES);
    tell(handle, BranchCommand::Open { connection, link }).await?;
    let receive = async {
        while let Some(message) = reader.recv::<ProposerMessage>().await? {
            if let ProposerMessage::Append(append) = &message
                && append.wal.len() > MAX_WAL_BYTES_PER_MESSAGE
            {
                return Err(ConnectionEnd::Refused(format!("an append of {} bytes", append.wal.len())));
            }
            tell(handle, BranchCommand::Message { connection, message }).await?;
        }
        Ok(())
    };
    let answer = async {
        let mut batch = Vec::new();
        while answers.recv_many(&mut batch, 64).await > 0 {
            batch.drain(..).try_for_each(|message: AcceptorMessage| writer.queue(&message))?;
            writer.flush().await?;
        }
        Ok(())
    };
    let end = tokio::select! {
        end = receive => end,
        end = answer => end,
    };
    tell(handle, BranchCommand::Close { connection }).await?;
    end
}

async fn read(
    reader: &mut Reader,
    writer: &mut Writer,
    handle: &BranchHandle,
    from: Lsn,
    is_service: bool,
) -> Result<(), ConnectionEnd> {
    let receive = async {
        while let Some(ReaderMessage::Report { remote_consistent_lsn }) = reader.recv().await? {
            if !is_service {
                return Err(ConnectionEnd::Refused("only services may report what is stored".to_owned()));
            }
            tell(handle, BranchCommand::Report { remote_consistent_lsn }).await?;
        }
        Ok(())
    };
    tokio::select! {
        end = receive => end,
        end = stream(writer, handle, from) => end,
    }
}

/// Pushes committed WAL as it comes.
async fn stream(writer: &mut Writer, handle: &BranchHandle, from: Lsn) -> Result<(), ConnectionEnd> {
    let mut view = handle.view.clone();
    let mut segments = SegmentReader::new(handle.directory.clone());
    let mut stored = handle.stored.clone().map(StoredWalReader::new);
    let mut position = from;
    let mut heartbeat = FIRST_HEARTBEAT;
    let mut told: Option<MembershipGeneration> = None;
    let mut next_piece = Instant::now();
    loop {
        let current = view.borrow_and_update().clone();
        let status = match current {
            BranchView::Here { status, membership } => {
                if let Some(newer) = membership.filter(|membership| told < Some(membership.generation)) {
                    told = Some(newer.generation);
                    writer.send(&ReaderReply::Membership((*newer).clone())).await?;
                }
                status
            }
            BranchView::Loading => BranchStatus::default(),
            BranchView::Deleted => {
                return Ok(writer.send(&ReaderReply::Failed("the branch has been deleted".to_owned())).await?);
            }
            BranchView::Failed(reason) => return Ok(writer.send(&ReaderReply::Failed(reason)).await?),
        };
        let commit_lsn = status.commit_lsn;
        if position < status.log_start_lsn {
            let log_start_lsn = status.log_start_lsn;
            let Some(wal) = read_stored(writer, &mut stored, position, commit_lsn).await? else {
                return Ok(writer.send(&ReaderReply::Trimmed { log_start_lsn }).await?);
            };
            let end = position + wal.len() as u64;
            writer.send(&ReaderReply::Wal { begin: position, wal, commit_lsn }).await?;
            position = end;
            continue;
        }
        let is_small = commit_lsn.0.saturating_sub(position.0) < SMALL_PIECE_BYTES;
        if position < commit_lsn && is_small && Instant::now() < next_piece {
            sleep_until(next_piece).await;
            continue;
        }
        if position < commit_lsn {
            let end = commit_lsn.min(position + MAX_WAL_BYTES_PER_MESSAGE as u64);
            let wal = match segments.read_cached(position, end) {
                Some(wal) => wal,
                None => {
                    let read = spawn_blocking(move || {
                        let wal = segments.read(position, end);
                        (segments, wal)
                    });
                    let (returned, wal) = read.await.map_err(|_| ConnectionEnd::Stopping)?;
                    segments = returned;
                    // A file may have been trimmed meanwhile: the reader comes back and is told so.
                    wal.map_err(|e| ConnectionEnd::Refused(e.to_string()))?
                }
            };
            writer.send(&ReaderReply::Wal { begin: position, wal: Bytes::from(wal), commit_lsn }).await?;
            position = end;
            heartbeat = FIRST_HEARTBEAT;
            next_piece = Instant::now() + PIECE_INTERVAL;
            continue;
        }
        match timeout(heartbeat, view.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(ConnectionEnd::Stopping),
            Err(_) => {
                writer.send(&ReaderReply::Wal { begin: position, wal: Bytes::new(), commit_lsn }).await?;
                heartbeat = (heartbeat * 2).min(LONGEST_HEARTBEAT);
            }
        }
    }
}

/// WAL that is not here any more, from the object store; `None` when that does not have it either. Tells the reader meanwhile that the
/// connection is alive.
async fn read_stored(
    writer: &mut Writer,
    stored: &mut Option<StoredWalReader>,
    position: Lsn,
    commit_lsn: Lsn,
) -> Result<Option<Bytes>, ConnectionEnd> {
    let Some(stored) = stored else { return Ok(None) };
    let most = (commit_lsn.0.saturating_sub(position.0) as usize).min(MAX_WAL_BYTES_PER_MESSAGE);
    let read = stored.read(position, most);
    tokio::pin!(read);
    loop {
        match timeout(LONGEST_HEARTBEAT, &mut read).await {
            Ok(Ok(wal)) => return Ok(wal),
            Ok(Err(error)) => {
                warn!(lsn = %position, %error, "WAL could not be read from the object store");
                return Err(ConnectionEnd::Refused(error.to_string()));
            }
            Err(_) => writer.send(&ReaderReply::Wal { begin: position, wal: Bytes::new(), commit_lsn }).await?,
        }
    }
}
