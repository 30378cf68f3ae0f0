//! Committed WAL for a pageserver, from whichever safekeeper has it.

use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use safekeeper_protocol::message::{ReaderMessage, ReaderReply, RequestBody};
use tokio::{
    net::tcp::{OwnedReadHalf, OwnedWriteHalf},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info};
use types::{BranchRef, Lsn, Member, Membership, MembershipGeneration, NodeId};
use wire::{FrameReader, FrameWriter};

use crate::{
    admin::{branch_status, report_remote_consistent},
    connection::{Connection, ConnectionError, welcome},
};

/// Chunks read ahead; each is at most 1 MiB.
const READ_AHEAD_CHUNKS: usize = 4;
const SILENCE_LIMIT: Duration = Duration::from_secs(5);
const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);
/// How soon, and later how often, a reader that gets nothing new asks whether another safekeeper is ahead.
const FIRST_STALL_CHECK: Duration = Duration::from_millis(100);
const LONGEST_STALL_CHECK: Duration = Duration::from_secs(10);
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// A stream of one branch's committed WAL. Reconnects and changes safekeepers by itself; a task behind it reads ahead by at
/// most 4 MiB.
pub struct WalReader {
    chunks: mpsc::Receiver<Result<WalChunk, WalReadError>>,
    report: watch::Sender<Lsn>,
    tasks: [JoinHandle<()>; 2],
}

/// What a reader is given.
#[derive(Clone)]
pub struct WalReaderConfig {
    /// The branch.
    pub branch: BranchRef,
    /// The branch's safekeepers, or others that have been: they tell of the members there are now.
    pub safekeepers: Vec<Member>,
    /// A token that allows the branch; reports need a service's. Never logged.
    pub token: String,
}

/// A piece of committed WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalChunk {
    /// Position of the first byte: where the chunk before ended.
    pub begin: Lsn,
    /// The bytes; may end inside a record. Empty when there is nothing new.
    pub bytes: Bytes,
    /// What the safekeeper knows to be committed; invalid (0/0) while it has never heard of the branch.
    pub commit_lsn: Lsn,
    /// The safekeeper that gave it.
    pub node: NodeId,
}

/// Why a stream ended for good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WalReadError {
    /// No safekeeper holds WAL from so far back; the object store must have it.
    #[error("WAL from {from} is not kept any more, it starts at {log_start_lsn}")]
    Trimmed {
        /// What was asked for.
        from: Lsn,
        /// The earliest that is left.
        log_start_lsn: Lsn,
    },
    /// All of the branch's safekeepers are to be avoided.
    #[error("no other safekeeper is left to read from")]
    NoneLeft,
    /// The token is no good.
    #[error("{0}")]
    Denied(String),
    /// The safekeeper can't serve the branch: it was deleted, or its files are damaged.
    #[error("{0}")]
    Failed(String),
}

impl WalReader {
    /// Starts to read at `from`; no connection is awaited.
    pub fn new(config: WalReaderConfig, from: Lsn) -> WalReader {
        WalReader::avoiding(config, from, Vec::new())
    }

    /// As [`WalReader::new`], from other safekeepers than these: their WAL was found to be no good.
    pub fn avoiding(config: WalReaderConfig, from: Lsn, avoided: Vec<NodeId>) -> WalReader {
        let (sender, chunks) = mpsc::channel(READ_AHEAD_CHUNKS);
        let (report, reports) = watch::channel(Lsn::INVALID);
        let (members, known_members) = watch::channel(config.safekeepers.clone());
        let spread = tokio::spawn(spread_reports(config.clone(), known_members, reports.clone()));
        let (position, current, generation) = (from, 0, None);
        let task = ReaderTask { config, generation, members, position, sender, reports, current, avoided };
        WalReader { chunks, report, tasks: [tokio::spawn(task.run()), spread] }
    }

    /// The next chunk; one without bytes comes about every second when nothing is written. Waits while no safekeeper can be
    /// reached. Cancel-safe. After an error there is nothing more.
    pub async fn next(&mut self) -> Result<WalChunk, WalReadError> {
        let ended = || Err(WalReadError::Failed("the stream has ended".to_owned()));
        self.chunks.recv().await.unwrap_or_else(ended)
    }

    /// Tells safekeepers, within some seconds, that everything up to here is in the object store, so that they may forget it.
    pub fn report(&self, remote_consistent_lsn: Lsn) {
        self.report.send_if_modified(|reported| {
            let newer = remote_consistent_lsn > *reported;
            *reported = remote_consistent_lsn.max(*reported);
            newer
        });
    }
}

impl Drop for WalReader {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

struct ReaderTask {
    /// With the members that are known now.
    config: WalReaderConfig,
    /// Of the newest membership that a safekeeper has told of.
    generation: Option<MembershipGeneration>,
    /// Tells of changes of the members.
    members: watch::Sender<Vec<Member>>,
    position: Lsn,
    sender: mpsc::Sender<Result<WalChunk, WalReadError>>,
    reports: watch::Receiver<Lsn>,
    /// Index of the safekeeper to read from.
    current: usize,
    /// Safekeepers that are not read from.
    avoided: Vec<NodeId>,
}

/// Why one connection ended.
enum StreamEnd {
    Lost(String),
    Trimmed(Lsn),
    Failed(String),
    Denied(String),
    /// This safekeeper has more.
    Behind {
        better: usize,
    },
    /// The members are others than they were.
    Members(Membership),
    ReaderGone,
}

impl ReaderTask {
    async fn run(mut self) {
        let mut count = self.config.safekeepers.len();
        if count == 0 {
            return self.fail(WalReadError::Failed("the branch has no safekeepers".to_owned())).await;
        }
        self.current = rand::random_range(0..count);
        let mut backoff = FIRST_BACKOFF;
        // What each safekeeper of the current round said for good; cleared by progress.
        let mut hopeless: Vec<Option<WalReadError>> = vec![None; count];
        loop {
            let usable = (0..count).map(|step| (self.current + step) % count).find(|index| !self.is_avoided(*index));
            let Some(usable) = usable else { return self.fail(WalReadError::NoneLeft).await };
            self.current = usable;
            let before = self.position;
            let end = self.stream().await;
            if self.position > before {
                backoff = FIRST_BACKOFF;
                hopeless.fill(None);
            }
            let next = (self.current + 1) % count;
            let verdict = match end {
                StreamEnd::ReaderGone => return,
                StreamEnd::Behind { better } => {
                    self.current = better;
                    continue;
                }
                StreamEnd::Members(membership) => {
                    self.go_over_to(&membership);
                    count = self.config.safekeepers.len();
                    hopeless = vec![None; count];
                    continue;
                }
                StreamEnd::Denied(reason) => return self.fail(WalReadError::Denied(reason)).await,
                StreamEnd::Trimmed(log_start_lsn) => Some(WalReadError::Trimmed { from: self.position, log_start_lsn }),
                StreamEnd::Failed(reason) => Some(WalReadError::Failed(reason)),
                StreamEnd::Lost(reason) => {
                    debug!(branch = %self.config.branch, reason, "WAL stream lost");
                    None
                }
            };
            hopeless[self.current] = verdict;
            if hopeless.iter().enumerate().all(|(index, verdict)| verdict.is_some() || self.is_avoided(index)) {
                let error = hopeless.swap_remove(self.current).expect("it was put there just now");
                return self.fail(error).await;
            }
            self.current = next;
            sleep(backoff).await;
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
    }

    fn is_avoided(&self, index: usize) -> bool {
        self.avoided.contains(&self.config.safekeepers[index].node)
    }

    /// Reads from members that there are now, from the same one if it is among them.
    fn go_over_to(&mut self, membership: &Membership) {
        let node = self.config.safekeepers[self.current].node;
        info!(branch = %self.config.branch, %membership, "reading WAL from the branch's members");
        self.config.safekeepers = membership.all();
        self.generation = Some(membership.generation);
        let same = self.config.safekeepers.iter().position(|member| member.node == node);
        self.current = same.unwrap_or_else(|| rand::random_range(0..self.config.safekeepers.len()));
        self.members.send_replace(self.config.safekeepers.clone());
    }

    /// Takes note of a membership; what the members are if they are not those that are known.
    fn other_members(&mut self, membership: Membership) -> Option<Membership> {
        if self.generation >= Some(membership.generation) || membership.check().is_err() {
            return None;
        }
        self.generation = Some(membership.generation);
        (membership.all() != self.config.safekeepers).then_some(membership)
    }

    async fn fail(&self, error: WalReadError) {
        // The reader may be gone; then nobody wants to know.
        let _ = self.sender.send(Err(error)).await;
    }

    async fn stream(&mut self) -> StreamEnd {
        let Member { node, address } = self.config.safekeepers[self.current].clone();
        let body = RequestBody::Read { from: self.position };
        let opened = Connection::open(&address, &self.config.token, &self.config.branch, body).await;
        let Connection { mut reader, mut writer } = match opened {
            Ok(connection) => connection,
            Err(error) => return StreamEnd::Lost(error.to_string()),
        };
        if let Err(error) = writer.flush().await {
            return StreamEnd::Lost(error.to_string());
        }
        let reports = self.reports.clone();
        tokio::select! {
            end = self.receive(node, &address, &mut reader) => end,
            error = send_reports(&mut writer, reports) => StreamEnd::Lost(error),
        }
    }

    async fn receive(&mut self, node: NodeId, address: &str, reader: &mut FrameReader<OwnedReadHalf>) -> StreamEnd {
        match welcome(address, reader).await {
            Ok(()) => {}
            Err(error @ ConnectionError::Denied { .. }) => return StreamEnd::Denied(error.to_string()),
            Err(error) => return StreamEnd::Lost(error.to_string()),
        }
        info!(branch = %self.config.branch, safekeeper = address, lsn = %self.position, "reading WAL");
        let mut check_after = FIRST_STALL_CHECK;
        let mut last_news = Instant::now();
        loop {
            let reply = match timeout(SILENCE_LIMIT, reader.recv::<ReaderReply>()).await {
                Ok(Ok(Some(reply))) => reply,
                Ok(Ok(None)) => return StreamEnd::Lost("closed".to_owned()),
                Ok(Err(error)) => return StreamEnd::Lost(error.to_string()),
                Err(_) => return StreamEnd::Lost("silent".to_owned()),
            };
            let (begin, wal, commit_lsn) = match reply {
                ReaderReply::Wal { begin, wal, commit_lsn } => (begin, wal, commit_lsn),
                ReaderReply::Trimmed { log_start_lsn } => return StreamEnd::Trimmed(log_start_lsn),
                ReaderReply::Failed(reason) => return StreamEnd::Failed(reason),
                ReaderReply::Membership(membership) => match self.other_members(membership) {
                    Some(membership) => return StreamEnd::Members(membership),
                    None => continue,
                },
            };
            if begin != self.position {
                return StreamEnd::Lost(format!("got WAL from {begin}, expected {}", self.position));
            }
            self.position += wal.len() as u64;
            let news = !wal.is_empty();
            if self.sender.send(Ok(WalChunk { begin, bytes: wal, commit_lsn, node })).await.is_err() {
                return StreamEnd::ReaderGone;
            }
            if news {
                (check_after, last_news) = (FIRST_STALL_CHECK, Instant::now());
            } else if last_news.elapsed() >= check_after {
                if let Some(better) = self.find_better().await {
                    return StreamEnd::Behind { better };
                }
                (check_after, last_news) = ((check_after * 2).min(LONGEST_STALL_CHECK), Instant::now());
            }
        }
    }

    /// A safekeeper that knows more to be committed than has been read.
    async fn find_better(&self) -> Option<usize> {
        let ask = async |(index, address): (usize, &str)| {
            let asked = branch_status(address, &self.config.token, &self.config.branch);
            let status = timeout(Duration::from_secs(1), asked).await.ok()?.ok()?;
            // What it does not hold any more it may have from the object store.
            Some((status.commit_lsn, index))
        };
        let others = self.config.safekeepers.iter().enumerate();
        let others = others.filter(|(index, _)| *index != self.current && !self.is_avoided(*index));
        let answers = join_all(others.map(|(index, member)| ask((index, &member.address)))).await;
        let (commit_lsn, index) = answers.into_iter().flatten().max()?;
        (commit_lsn > self.position).then_some(index)
    }
}

/// Sends reports over the stream's own connection; returns when that fails.
async fn send_reports(writer: &mut FrameWriter<OwnedWriteHalf>, mut reports: watch::Receiver<Lsn>) -> String {
    reports.mark_changed();
    loop {
        if reports.changed().await.is_err() {
            return "the reader is gone".to_owned();
        }
        let remote_consistent_lsn = *reports.borrow_and_update();
        if remote_consistent_lsn.is_valid()
            && let Err(error) = writer.send(&ReaderMessage::Report { remote_consistent_lsn }).await
        {
            return error.to_string();
        }
    }
}

/// Tells all safekeepers now and then: without a compute running they don't hear of it from each other.
async fn spread_reports(
    config: WalReaderConfig,
    members: watch::Receiver<Vec<Member>>,
    mut reports: watch::Receiver<Lsn>,
) {
    while reports.changed().await.is_ok() {
        sleep(REPORT_INTERVAL).await;
        let lsn = *reports.borrow_and_update();
        let members = members.borrow().clone();
        let told = members.iter().map(async |Member { node, address }| {
            if let Err(error) = report_remote_consistent(address, &config.token, &config.branch, lsn).await {
                debug!(branch = %config.branch, safekeeper = %node, %error, "could not report");
            }
        });
        join_all(told).await;
    }
}
