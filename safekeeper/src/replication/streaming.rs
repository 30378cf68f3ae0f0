//! `START_REPLICATION`: WAL out, feedback in.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use pgwire::messages::copy::{CopyBothResponse, CopyDone};
use safekeeper_protocol::message::MAX_WAL_BYTES_PER_MESSAGE;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use types::{Lsn, NodeId};

use super::{
    filler::before_branch,
    login::ClientStream,
    messages::{MessageReader, MessageWriter, Wire},
    refusal::Refusal,
    session::{FOLLOW_ANEW, SessionEnd, expired},
};
use crate::{
    registry::BranchHandle,
    wal_source::{Next, SourceEnd, WalSource},
};

/// Most WAL in one message, as Postgres's (`MAX_SEND_SIZE`).
const MESSAGE_WAL_BYTES: usize = 128 * 1024;
/// A client hears this often that there is nothing new.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Seconds from 1970 to 2000, where Postgres's time begins.
const POSTGRES_EPOCH: Duration = Duration::from_secs(946_684_800);

/// What bounds a stream.
pub(super) struct Limits {
    /// This safekeeper.
    pub node: NodeId,
    /// A client that sends nothing for so long is gone.
    pub silence: Duration,
    /// The token's end.
    pub expires: Instant,
}

/// What a client is sent: what is made up for the bytes before the branch, then its WAL.
pub(super) struct Feed {
    source: WalSource,
    /// While bytes are made up, up to where the source begins: where the next of them stand.
    filling: Option<Lsn>,
    system_identifier: u64,
}

impl Feed {
    /// From a position on, for a branch that begins at `branch_start`. Before that there never was any WAL: in the same segment other bytes
    /// stand for it, and before that segment there is nothing to be had.
    pub fn new(
        handle: &Arc<BranchHandle>,
        from: Lsn,
        branch_start: Option<Lsn>,
        system_identifier: u64,
    ) -> Result<Feed, Refusal> {
        let (begin, filling) = match branch_start {
            Some(start) if from < start.segment_start() => return Err(Refusal::removed(from)),
            Some(start) if from < start => (start, Some(from)),
            Some(_) | None => (from, None),
        };
        Ok(Feed { source: WalSource::new(Arc::clone(handle), begin), filling, system_identifier })
    }

    /// Where the next piece begins.
    fn position(&self) -> Lsn {
        self.filling.unwrap_or(self.source.position())
    }

    /// What comes next. Cancel-safe.
    async fn next(&mut self, patience: Duration) -> Result<Next, SourceEnd> {
        let Some(begin) = self.filling else { return self.source.next(patience).await };
        let start = self.source.position();
        let end = start.min(begin + MAX_WAL_BYTES_PER_MESSAGE as u64);
        self.filling = Some(end).filter(|end| *end < start);
        Ok(Next::Wal { begin, wal: before_branch(start, begin, end, self.system_identifier), commit_lsn: start })
    }
}

/// What has been heard of a client.
#[derive(Debug, Clone, Copy)]
struct Heard {
    at: Instant,
    /// How often it has asked for an answer.
    asked: u64,
    /// It has had enough.
    done: bool,
}

/// Streams until the client has had enough.
pub(super) async fn stream(
    wire: &mut Wire<ClientStream>,
    feed: Feed,
    limits: Limits,
    stopping: &CancellationToken,
) -> Result<(), SessionEnd> {
    wire.writer.put(&CopyBothResponse::new(0, 0, Vec::new()))?;
    let (heard, hears) = watch::channel(Heard { at: Instant::now(), asked: 0, done: false });
    let sender = Sender { writer: &mut wire.writer, feed, hears, limits, answered: 0, pinged: None };
    tokio::select! {
        end = sender.run(stopping) => end,
        end = receive(&mut wire.reader, &heard) => Err(end),
    }
}

/// Takes what the client says. Ends only when the client does not go on.
async fn receive<R: AsyncRead + Unpin>(reader: &mut MessageReader<R>, heard: &watch::Sender<Heard>) -> SessionEnd {
    loop {
        let frame = match reader.message().await {
            Ok(Some(frame)) => frame,
            Ok(None) => return SessionEnd::Left,
            Err(fault) => return fault.into(),
        };
        let (mut asks, mut done) = (false, false);
        match frame.kind {
            b'd' => match wants_reply(&frame.body()) {
                Some(wants) => asks = wants,
                None => return SessionEnd::Refused(Refusal::protocol("unexpected message type in a CopyData")),
            },
            b'c' => done = true,
            b'X' => return SessionEnd::Left,
            _ => return SessionEnd::Refused(Refusal::protocol("only CopyData and CopyDone were expected")),
        }
        heard.send_modify(|heard| {
            heard.at = Instant::now();
            heard.asked += u64::from(asks);
            heard.done |= done;
        });
        if done {
            // What follows is for later.
            std::future::pending::<()>().await;
        }
    }
}

/// Whether feedback asks for an answer: a standby's status (`r`) may, what its queries still see (`h`) does not. `None` for anything else.
/// Neither holds WAL back here: a slot at the branch's own endpoint does that.
fn wants_reply(feedback: &Bytes) -> Option<bool> {
    const STATUS_BYTES: usize = 1 + 4 * 8 + 1;
    match feedback.first()? {
        b'r' => feedback.get(STATUS_BYTES - 1).map(|wants| *wants != 0),
        b'h' => Some(false),
        _ => None,
    }
}

struct Sender<'a, W> {
    writer: &'a mut MessageWriter<W>,
    feed: Feed,
    hears: watch::Receiver<Heard>,
    limits: Limits,
    /// So many of the client's questions have been answered.
    answered: u64,
    /// What the client had been heard last when it was asked whether it is still there.
    pinged: Option<Instant>,
}

impl<W: AsyncWrite + Unpin> Sender<'_, W> {
    async fn run(mut self, stopping: &CancellationToken) -> Result<(), SessionEnd> {
        self.flush().await?;
        loop {
            let heard = *self.hears.borrow_and_update();
            if heard.done {
                self.writer.put(&CopyDone::new())?;
                return self.flush().await;
            }
            let patience = self.look_after(heard).await?;
            let next = tokio::select! {
                biased;
                () = stopping.cancelled() => return Err(SessionEnd::Refused(Refusal::stopping())),
                () = sleep_until(self.limits.expires) => return Err(SessionEnd::Refused(expired())),
                changed = self.hears.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return Err(SessionEnd::Left),
                },
                next = self.feed.next(patience) => next,
            };
            match next.map_err(refusal)? {
                Next::Wal { begin, wal, commit_lsn } => self.send_wal(begin, &wal, commit_lsn).await?,
                Next::Nothing { .. } if patience == KEEPALIVE_INTERVAL => self.keepalive(false).await?,
                Next::Nothing { .. } => {}
                Next::Membership(membership) if membership.contains(self.limits.node) => {}
                Next::Membership(_) => {
                    let left = Refusal::new("57P01", "this safekeeper has left the branch").with_hint(FOLLOW_ANEW);
                    return Err(SessionEnd::Refused(left));
                }
                Next::Trimmed { .. } => return Err(SessionEnd::Refused(Refusal::removed(self.feed.position()))),
                Next::Deleted => return Err(SessionEnd::Refused(Refusal::deleted())),
                Next::Failed(reason) => return Err(SessionEnd::Refused(Refusal::new("58030", reason))),
            }
        }
    }

    /// Answers the client, asks whether it is still there; answers how long it may now be waited for WAL.
    async fn look_after(&mut self, heard: Heard) -> Result<Duration, SessionEnd> {
        if heard.asked > self.answered {
            self.answered = heard.asked;
            self.keepalive(false).await?;
        }
        let (silent, limit) = (heard.at.elapsed(), self.limits.silence);
        if silent >= limit {
            return Err(SessionEnd::Silent);
        }
        if silent >= limit / 2 && self.pinged != Some(heard.at) {
            self.pinged = Some(heard.at);
            self.keepalive(true).await?;
        }
        let due = if self.pinged == Some(heard.at) { limit } else { limit / 2 };
        Ok(due.saturating_sub(silent).min(KEEPALIVE_INTERVAL))
    }

    async fn send_wal(&mut self, begin: Lsn, wal: &Bytes, commit_lsn: Lsn) -> Result<(), SessionEnd> {
        let mut at = begin;
        for part in wal.chunks(MESSAGE_WAL_BYTES) {
            let mut header = [0; 25];
            header[0] = b'w';
            header[1..9].copy_from_slice(&at.0.to_be_bytes());
            header[9..17].copy_from_slice(&commit_lsn.0.to_be_bytes());
            header[17..].copy_from_slice(&postgres_now().to_be_bytes());
            self.writer.put_copy_data([&header, part]);
            self.flush().await?;
            at += part.len() as u64;
        }
        Ok(())
    }

    async fn keepalive(&mut self, wants_reply: bool) -> Result<(), SessionEnd> {
        let mut message = [0; 18];
        message[0] = b'k';
        message[1..9].copy_from_slice(&self.feed.position().0.to_be_bytes());
        message[9..17].copy_from_slice(&postgres_now().to_be_bytes());
        message[17] = u8::from(wants_reply);
        self.writer.put_copy_data([&message, &[]]);
        self.flush().await
    }

    /// A client that does not read holds up no more than this.
    async fn flush(&mut self) -> Result<(), SessionEnd> {
        match timeout(self.limits.silence, self.writer.flush()).await {
            Ok(sent) => Ok(sent?),
            Err(_) => Err(SessionEnd::Silent),
        }
    }
}

fn refusal(end: SourceEnd) -> SessionEnd {
    SessionEnd::Refused(match end {
        SourceEnd::Stopping => Refusal::stopping(),
        SourceEnd::Unreadable(reason) => Refusal::new("58030", reason),
    })
}

/// Microseconds since 2000.
fn postgres_now() -> i64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since_1970.saturating_sub(POSTGRES_EPOCH).as_micros() as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feedback_is_told_apart() {
        let status = |last: u8| Bytes::from([&[b'r'][..], &[0; 32], &[last]].concat());
        assert_eq!((wants_reply(&status(1)), wants_reply(&status(0))), (Some(true), Some(false)));
        assert_eq!(wants_reply(&status(1).slice(..33)), None);
        assert_eq!(wants_reply(&Bytes::from_static(b"h\0\0")), Some(false));
        assert_eq!((wants_reply(&Bytes::new()), wants_reply(&Bytes::from_static(b"z"))), (None, None));
    }
}
