//! A client that is logged in, and its commands.

use std::{fmt, sync::Arc, time::Duration};

use pgwire::messages::{
    DecodeContext, Message,
    response::{CommandComplete, EmptyQueryResponse},
    simplequery::Query,
};
use tokio::time::{Instant, sleep_until, timeout};
use types::{BranchRef, Lsn};
use wal::v15::wal::{LongPageHeader, xlp};

use super::{
    Shared,
    command::Command,
    login::ClientStream,
    messages::{Frame, Wire, WireFault},
    refusal::Refusal,
    streaming::{Feed, Limits, stream},
};
use crate::{
    branch::{BranchView, Identity},
    registry::BranchHandle,
    wal_source::{Next, WalSource},
};

/// PostgreSQL's, of which the WAL is; clients look at the major version.
pub(super) const SERVER_VERSION: &str = "15.0";
pub(super) const FOLLOW_ANEW: &str = "`dormouse branches follow` prints where the branch's safekeepers are now.";

/// The only timeline: no start of a compute is a promotion.
const TIMELINE: u32 = 1;
/// A client that comes from another safekeeper may know of a commit that this one hears of in a moment.
const AHEAD_LIMIT: Duration = Duration::from_secs(5);
/// How long it may take to look for a page header in the WAL.
const LOOK_LIMIT: Duration = Duration::from_secs(3);

/// Whose token is good, for a branch that can be served.
pub(super) struct Follower {
    pub branch: BranchRef,
    pub handle: Arc<BranchHandle>,
    /// The cluster's.
    pub system_identifier: u64,
    /// When the token's time is over.
    pub expires: Instant,
}

/// A client that is logged in.
pub(super) struct Session {
    pub wire: Wire<ClientStream>,
    pub follower: Follower,
}

/// Why a session ended.
#[derive(Debug)]
pub(super) enum SessionEnd {
    /// The client has left.
    Left,
    /// The client has been told this.
    Refused(Refusal),
    /// The client did not read, or sent nothing, for too long.
    Silent,
    Fault(WireFault),
}

impl fmt::Display for SessionEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SessionEnd::Left => f.write_str("the client has left"),
            SessionEnd::Refused(refusal) => write!(f, "{refusal}"),
            SessionEnd::Silent => f.write_str("the client was silent for too long"),
            SessionEnd::Fault(fault) => write!(f, "{fault}"),
        }
    }
}

impl From<WireFault> for SessionEnd {
    fn from(fault: WireFault) -> SessionEnd {
        SessionEnd::Fault(fault)
    }
}

/// A command that did not do.
pub(super) enum CommandEnd {
    /// The client is told, and may ask something else.
    Refused(Refusal),
    Session(SessionEnd),
}

impl From<Refusal> for CommandEnd {
    fn from(refusal: Refusal) -> CommandEnd {
        CommandEnd::Refused(refusal)
    }
}

impl From<SessionEnd> for CommandEnd {
    fn from(end: SessionEnd) -> CommandEnd {
        CommandEnd::Session(end)
    }
}

impl From<WireFault> for CommandEnd {
    fn from(fault: WireFault) -> CommandEnd {
        CommandEnd::Session(fault.into())
    }
}

impl Session {
    /// Serves it to its end.
    pub async fn serve(mut self, shared: &Shared) -> SessionEnd {
        let end = loop {
            if let Err(end) = self.serve_one(shared).await {
                break end;
            }
        };
        if let SessionEnd::Refused(refusal) = &end {
            // The client sees the connection end in any case.
            let _ = timeout(super::REFUSAL_LIMIT, self.wire.refuse_finally(refusal)).await;
        }
        end
    }

    async fn serve_one(&mut self, shared: &Shared) -> Result<(), SessionEnd> {
        let frame = tokio::select! {
            frame = timeout(shared.silence_limit, self.wire.reader.message()) => frame,
            () = shared.stopping.cancelled() => return Err(SessionEnd::Refused(Refusal::stopping())),
            () = sleep_until(self.follower.expires) => return Err(SessionEnd::Refused(expired())),
        };
        let Ok(frame) = frame else {
            let idle = Refusal::new("57P05", "terminating connection: no command for too long");
            return Err(SessionEnd::Refused(idle));
        };
        let Some(frame) = frame? else { return Err(SessionEnd::Left) };
        match frame.kind {
            b'Q' => {
                if let Err(end) = self.command(frame, shared).await {
                    match end {
                        CommandEnd::Refused(refusal) => self.wire.writer.put(&refusal.response("ERROR"))?,
                        CommandEnd::Session(end) => return Err(end),
                    }
                }
                Ok(self.wire.writer.ready().await?)
            }
            b'X' => Err(SessionEnd::Left),
            // Sent before the client heard that the copying was over.
            b'd' | b'c' | b'f' => Ok(()),
            b'P' | b'B' | b'D' | b'E' | b'C' | b'H' | b'S' | b'F' => {
                Err(SessionEnd::Refused(Refusal::unsupported("the extended query protocol")))
            }
            other => Err(SessionEnd::Refused(Refusal::protocol(format!("message type {other} was not expected")))),
        }
    }

    async fn command(&mut self, mut frame: Frame, shared: &Shared) -> Result<(), CommandEnd> {
        let query = Query::decode(&mut frame.bytes, &DecodeContext::default()).map_err(WireFault::Message)?;
        let text = query.map(|query| query.query).unwrap_or_default();
        let writer = &mut self.wire.writer;
        match Command::parse(&text)? {
            Command::IdentifySystem => {
                let (_, commit_lsn) = position(&self.follower.handle)?;
                let row = [
                    ("systemid", Some(self.follower.system_identifier.to_string())),
                    ("timeline", Some(TIMELINE.to_string())),
                    ("xlogpos", Some(commit_lsn.to_string())),
                    ("dbname", None),
                ];
                writer.put_row(&row, "IDENTIFY_SYSTEM")?;
            }
            Command::Show(name) => {
                let value = setting(&name)?;
                writer.put_row(&[(name.as_str(), Some(value.to_owned()))], "SHOW")?;
            }
            Command::TimelineHistory { timeline } => {
                let message = format!("timeline {timeline} has no history: a branch only ever has timeline {TIMELINE}");
                return Err(Refusal::new("58P01", message).into());
            }
            Command::ReadReplicationSlot => {
                let row = [("slot_type", None), ("restart_lsn", None), ("restart_tli", None)];
                writer.put_row(&row, "READ_REPLICATION_SLOT")?;
            }
            Command::StartReplication { from, timeline } => self.start_replication(from, timeline, shared).await?,
            Command::Empty => writer.put(&EmptyQueryResponse::new())?,
        }
        Ok(())
    }

    async fn start_replication(&mut self, from: Lsn, timeline: Option<u32>, shared: &Shared) -> Result<(), CommandEnd> {
        if let Some(other) = timeline.filter(|timeline| *timeline != TIMELINE) {
            let message = format!("requested timeline {other} is not in this server's history");
            return Err(Refusal::new("22023", message).with_hint("A branch only ever has timeline 1.").into());
        }
        let (identity, commit_lsn) = self.reached(from).await?;
        if from > commit_lsn {
            let message = format!(
                "requested starting point {from} is ahead of the WAL flush position of this server {commit_lsn}"
            );
            return Err(Refusal::new("22023", message).into());
        }
        let feed = Feed::new(&self.follower.handle, from, identity.start_lsn, self.follower.system_identifier)?;
        let limits =
            Limits { node: shared.registry.node(), silence: shared.silence_limit, expires: self.follower.expires };
        stream(&mut self.wire, feed, limits, &shared.stopping).await?;
        // Postgres ends this command twice, and clients count on it.
        self.wire.writer.put(&CommandComplete::new("START_STREAMING".to_owned()))?;
        self.wire.writer.put(&CommandComplete::new("START_REPLICATION".to_owned()))?;
        Ok(())
    }

    /// Waits a moment until what is committed has reached a position.
    async fn reached(&self, wanted: Lsn) -> Result<(Identity, Lsn), Refusal> {
        let mut view = self.follower.handle.view.clone();
        let reached = |view: &BranchView| match view {
            BranchView::Here { status, .. } => status.commit_lsn >= wanted,
            BranchView::Loading => false,
            BranchView::Deleted | BranchView::Failed(_) => true,
        };
        // What has become of it is looked at below, whichever way this ends.
        let _ = timeout(AHEAD_LIMIT, view.wait_for(reached)).await;
        position(&self.follower.handle)
    }
}

/// What is known of a branch, and up to where it is committed.
fn position(handle: &BranchHandle) -> Result<(Identity, Lsn), Refusal> {
    match &*handle.view.borrow() {
        BranchView::Here { status, identity, .. } => Ok((*identity, status.commit_lsn)),
        BranchView::Deleted => Err(Refusal::deleted()),
        BranchView::Failed(reason) => Err(Refusal::not_here(reason.clone())),
        BranchView::Loading => Err(Refusal::not_here("the branch is being read")),
    }
}

pub(super) fn expired() -> Refusal {
    Refusal::new("28000", "the token has expired").with_hint("`dormouse branches follow` makes another.")
}

/// Settings that clients ask for.
fn setting(name: &str) -> Result<&'static str, Refusal> {
    match name {
        "wal_segment_size" => Ok("16MB"),
        // What pg_receivewal makes its directories' and files' modes of.
        "data_directory_mode" => Ok("0700"),
        "server_version" => Ok(SERVER_VERSION),
        "server_version_num" => Ok("150000"),
        "server_encoding" | "client_encoding" => Ok("UTF8"),
        "in_hot_standby" | "transaction_read_only" | "default_transaction_read_only" => Ok("off"),
        other => Err(Refusal::new("42704", format!("unrecognized configuration parameter \"{other}\""))),
    }
}

/// The cluster's identifier out of the header of the last segment in which there is WAL, for a branch whose proposers have not told it:
/// none has run since safekeepers remember it.
pub(super) async fn named_in_wal(handle: &Arc<BranchHandle>, commit_lsn: Lsn) -> Option<u64> {
    let segment = commit_lsn.segment_start();
    let mut source = WalSource::new(Arc::clone(handle), segment);
    let look = async {
        loop {
            match source.next(LOOK_LIMIT).await {
                Ok(Next::Membership(_)) => {}
                Ok(Next::Wal { wal, .. }) => return LongPageHeader::from_prefix(&wal),
                Ok(_) | Err(_) => return None,
            }
        }
    };
    let header = timeout(LOOK_LIMIT, look).await.ok().flatten()?;
    let page = header.std;
    let is_one =
        page.xlp_magic == xlp::MAGIC && page.xlp_info & xlp::LONG_HEADER != 0 && page.xlp_pageaddr == segment.0;
    is_one.then_some(header.xlp_sysid)
}
