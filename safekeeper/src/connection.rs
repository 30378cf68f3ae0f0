//! One connection: greeting, request, and what follows from it.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

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
    time::timeout,
};
use tracing::{debug, info};
use types::{Lsn, Membership};
use wire::{
    Claims, FrameReader, FrameWriter, Hello, HelloReply, MAX_GREETING_BYTES, PROTOCOL_VERSION, TokenVerifier, WireError,
};

use crate::{
    branch::{BranchCommand, BranchView},
    registry::{BranchHandle, Registry},
    wal_source::{Next, SourceEnd, WalSource},
};

const GREETING_LIMIT: Duration = Duration::from_secs(10);
/// Answers that may wait for a proposer; they are small but for fetched WAL, of which there is one per other safekeeper.
const LINK_MESSAGES: usize = 1024;
/// A reader hears this soon after the last WAL that there is no more, then at growing intervals.
const FIRST_HEARTBEAT: Duration = Duration::from_millis(100);
const LONGEST_HEARTBEAT: Duration = Duration::from_secs(1);

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
    #[error(transparent)]
    Source(#[from] SourceEnd),
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
    match handle.loaded().await.ok_or(ConnectionEnd::Stopping)? {
        BranchView::Here { status, membership, .. } => Ok(answer(status, membership)),
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
    handle: &Arc<BranchHandle>,
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
        end = stream(writer, WalSource::new(Arc::clone(handle), from)) => end,
    }
}

/// Pushes committed WAL as it comes.
async fn stream(writer: &mut Writer, mut source: WalSource) -> Result<(), ConnectionEnd> {
    let mut heartbeat = FIRST_HEARTBEAT;
    loop {
        let begin = source.position();
        let reply = match source.next(heartbeat).await? {
            Next::Wal { begin, wal, commit_lsn } => {
                heartbeat = FIRST_HEARTBEAT;
                ReaderReply::Wal { begin, wal, commit_lsn }
            }
            Next::Nothing { commit_lsn } => {
                heartbeat = (heartbeat * 2).min(LONGEST_HEARTBEAT);
                ReaderReply::Wal { begin, wal: Bytes::new(), commit_lsn }
            }
            Next::Membership(membership) => ReaderReply::Membership((*membership).clone()),
            Next::Trimmed { log_start_lsn } => return Ok(writer.send(&ReaderReply::Trimmed { log_start_lsn }).await?),
            Next::Deleted => {
                return Ok(writer.send(&ReaderReply::Failed("the branch has been deleted".to_owned())).await?);
            }
            Next::Failed(reason) => return Ok(writer.send(&ReaderReply::Failed(reason)).await?),
        };
        writer.send(&reply).await?;
    }
}
