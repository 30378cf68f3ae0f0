//! Copying a branch's committed WAL to the object store, and removing it there when nobody needs it any more.
//!
//! Who copies: each safekeeper of a branch has a rank, by a hash of the branch; the first copies WAL some seconds after it is due, the next
//! one later, and only what is not there by then. That two do it at once does no harm: committed WAL is the same everywhere.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bucket::{BranchWal, WalObject, WalStoreError, covered_from};
use bytes::Bytes;
use object_store::ObjectStore;
use safekeeper_protocol::AcceptorState;
use tokio::{
    sync::Semaphore,
    task::{JoinHandle, spawn_blocking},
    time::Instant,
};
use tracing::{debug, info, warn};
use types::{BranchRef, Lsn, Membership, NodeId, WAL_SEGMENT_BYTES};
use wal::stream::WalStreamDecoder;

use crate::storage::SegmentReader;

/// Objects that are made at a time; each is some 16 MiB in memory, and what it is compressed to.
const AT_A_TIME: usize = 2;
const READ_BYTES: u64 = 256 * 1024;
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// Safekeepers of a branch, as long as it has not been told how many there are.
const USUAL_MEMBERS: u32 = 3;

/// What the branches of a safekeeper share.
pub(crate) struct Offload {
    store: Arc<dyn ObjectStore>,
    after: Duration,
    at_a_time: Semaphore,
}

impl Offload {
    /// `after`: see [`crate::Config::offload_after_seconds`].
    pub fn over(store: Arc<dyn ObjectStore>, after: Duration) -> Offload {
        Offload { store, after, at_a_time: Semaphore::new(AT_A_TIME) }
    }

    /// The WAL objects of a branch.
    pub fn wal_of(&self, branch: &BranchRef) -> BranchWal {
        BranchWal::new(Arc::clone(&self.store), branch)
    }
}

/// One branch's copying. Looks when it is told to; at most one job is under way.
pub(crate) struct Offloader {
    shared: Arc<Offload>,
    node: NodeId,
    branch: BranchRef,
    wal: BranchWal,
    directory: PathBuf,
    /// Where the WAL begins that waits, and since when.
    waiting: Option<(Lsn, Instant)>,
    /// Since when objects wait to be removed.
    litter: Option<Instant>,
    /// Where committed WAL ended when the branch was found to be gone.
    gone_at: Option<Lsn>,
    /// Nothing is tried before.
    not_before: Option<Instant>,
    /// The last job failed.
    is_failing: bool,
    backoff: Duration,
    running: Option<Running>,
}

/// A job; aborted when dropped.
struct Running(JoinHandle<Result<Done, OffloadError>>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What a job has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    /// The object store has everything up to here.
    Stored(Lsn),
    /// There is no whole record yet that could be copied.
    Nothing,
    /// What nobody needs is gone.
    Removed,
    /// The branch has been deleted, and this safekeeper was not told: nothing is copied of what is committed up to here.
    BranchIsGone(Lsn),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum OffloadError {
    #[error(transparent)]
    Store(#[from] WalStoreError),
    /// The local files can't be copied; others may have them whole.
    #[error("{0}")]
    Local(String),
}

impl Offloader {
    pub fn new(shared: Arc<Offload>, node: NodeId, branch: BranchRef, directory: PathBuf) -> Offloader {
        let wal = shared.wal_of(&branch);
        let (waiting, litter, gone_at, not_before, running) = (None, None, None, None, None);
        let (is_failing, backoff) = (false, FIRST_BACKOFF);
        Offloader {
            shared,
            node,
            branch,
            wal,
            directory,
            waiting,
            litter,
            gone_at,
            not_before,
            is_failing,
            backoff,
            running,
        }
    }

    /// True while the branch must stay in memory for something to be copied or removed.
    pub fn is_busy(&self) -> bool {
        self.waiting.is_some() || self.litter.is_some() || self.running.is_some()
    }

    /// Nothing waits: the branch is gone, or its files can't be used.
    pub fn rest(&mut self) {
        (self.waiting, self.litter) = (None, None);
    }

    /// Notes that a report has come: objects that only the state before it needed may go.
    pub fn reported(&mut self, before: &AcceptorState, after: &AcceptorState) {
        let may_be_there = before.remote_consistent_lsn > before.pageserver_lsn;
        if may_be_there && after.pageserver_lsn > before.pageserver_lsn {
            self.litter.get_or_insert_with(Instant::now);
        }
    }

    /// Starts what is due; answers when to look again, if nothing happens before. `idle`: the end of the log is copied too.
    pub fn look(&mut self, state: &AcceptorState, idle: bool) -> Option<Instant> {
        let now = Instant::now();
        // Somebody who goes on writing knows better, and it is looked again.
        let part = part_to_copy(state, idle).filter(|part| self.gone_at != Some(part.end));
        self.waiting = part.map(|part| match self.waiting {
            Some((begin, since)) if begin == part.begin => (begin, since),
            Some(_) | None => (part.begin, now),
        });
        if self.running.is_some() {
            return None;
        }
        let rank = rank(self.node, &self.branch, state.membership.as_ref());
        let patience = self.shared.after * (rank + 1);
        let not_before = self.not_before.unwrap_or(now);
        let due = |since: Option<Instant>| since.map(|since| (since + patience).max(not_before));
        let (copy, remove) = (due(self.waiting.map(|(_, since)| since)), due(self.litter));
        if let (Some(part), Some(true)) = (part, copy.map(|at| at <= now)) {
            self.running = Some(self.start_copy(part, rank > 0 || self.is_failing));
            return None;
        }
        if remove.is_some_and(|at| at <= now) {
            self.running = Some(self.start_removal(state.pageserver_lsn));
            return None;
        }
        copy.into_iter().chain(remove).min()
    }

    /// Waits for the job that is under way; for ever when there is none. Cancel-safe.
    pub async fn finished(&mut self) -> Done {
        let Some(Running(job)) = &mut self.running else { return std::future::pending().await };
        let outcome = job.await;
        self.running = None;
        let error = match outcome {
            Ok(Ok(done)) => {
                self.not_before = None;
                if std::mem::take(&mut self.is_failing) {
                    info!(branch = %self.branch, "the object store takes WAL again");
                }
                self.backoff = FIRST_BACKOFF;
                if done == Done::Removed {
                    self.litter = None;
                }
                if let Done::BranchIsGone(end) = done {
                    info!(branch = %self.branch, lsn = %end, "WAL of a branch that has been deleted is not copied");
                    self.gone_at = Some(end);
                }
                if done == Done::Nothing {
                    // One record that is longer than a segment: its end will come.
                    self.not_before = Some(Instant::now() + FIRST_BACKOFF);
                }
                return done;
            }
            Ok(Err(error)) => error.to_string(),
            Err(panic) => panic.to_string(),
        };
        if !std::mem::replace(&mut self.is_failing, true) {
            warn!(branch = %self.branch, error, "WAL was not copied to the object store; it stays here, and will be tried again");
        }
        self.not_before = Some(Instant::now() + self.backoff);
        self.backoff = (self.backoff * 2).min(LONGEST_BACKOFF);
        Done::Nothing
    }

    /// Gives up what is under way, and removes all that the store has of the branch.
    pub async fn remove_all(&mut self) -> Result<(), WalStoreError> {
        (self.running, self.waiting, self.litter) = (None, None, None);
        self.wal.delete_below(Lsn::MAX).await.map(|_| ())
    }

    fn start_copy(&self, part: Part, others_first: bool) -> Running {
        let (shared, wal, branch) = (Arc::clone(&self.shared), self.wal.clone(), self.branch.clone());
        let directory = self.directory.clone();
        Running(tokio::spawn(async move {
            if others_first {
                let end = covered_from(&wal.list().await?, part.begin);
                if end > part.begin {
                    debug!(%branch, lsn = %end, "another safekeeper has copied WAL to the object store");
                    return Ok(Done::Stored(end));
                }
            }
            if !wal.branch_exists().await? {
                return Ok(Done::BranchIsGone(part.end));
            }
            let permit = shared.at_a_time.acquire().await.map_err(|closed| OffloadError::Local(closed.to_string()))?;
            let made = spawn_blocking(move || make_object(directory, part)).await;
            let made = made.map_err(|panic| OffloadError::Local(panic.to_string()))??;
            let Some((object, bytes)) = made else { return Ok(Done::Nothing) };
            let stored_bytes = bytes.len();
            wal.put(&object, bytes).await?;
            drop(permit);
            // It may have been deleted meanwhile, and all that there was of it before this.
            if !wal.branch_exists().await? {
                wal.delete(&object).await?;
                return Ok(Done::BranchIsGone(part.end));
            }
            info!(%branch, begin = %object.begin, lsn = %object.end, stored_bytes, "WAL was copied to the object store");
            Ok(Done::Stored(object.end))
        }))
    }

    fn start_removal(&self, below: Lsn) -> Running {
        let (wal, branch) = (self.wal.clone(), self.branch.clone());
        Running(tokio::spawn(async move {
            let removed = wal.delete_below(below).await?;
            debug!(%branch, lsn = %below, removed, "WAL that nobody needs was removed from the object store");
            Ok(Done::Removed)
        }))
    }
}

/// WAL that is to become one object: from `begin` to the last record that ends at or below `full`, or, if there is none, the first one
/// beyond; nothing beyond `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    begin: Lsn,
    full: Lsn,
    end: Lsn,
}

/// What is committed here and not in the object store: once it fills an object, or when the branch is idle. Where an object ends follows from
/// where it begins, so that safekeepers which copy the same WAL make the same object.
fn part_to_copy(state: &AcceptorState, idle: bool) -> Option<Part> {
    // A log that was started anew begins at what the object store has.
    let begin = state.remote_consistent_lsn.max(state.log_start_lsn);
    let end = state.commit_lsn;
    let full = Lsn((begin.0 + WAL_SEGMENT_BYTES / 2).next_multiple_of(WAL_SEGMENT_BYTES));
    let is_due = end >= full || (idle && end > begin);
    is_due.then_some(Part { begin, full, end })
}

/// How many other safekeepers copy the branch's WAL rather than this one.
fn rank(node: NodeId, branch: &BranchRef, membership: Option<&Membership>) -> u32 {
    let hash = crc32c::crc32c(branch.to_string().as_bytes());
    let mut nodes: Vec<NodeId> = membership.iter().flat_map(|known| known.all()).map(|member| member.node).collect();
    nodes.sort_unstable();
    match nodes.iter().position(|member| *member == node) {
        Some(position) => (position as u32 + hash % nodes.len() as u32) % nodes.len() as u32,
        None => ((node.0 % u64::from(USUAL_MEMBERS)) as u32 + hash % USUAL_MEMBERS) % USUAL_MEMBERS,
    }
}

/// Reads the part, and makes sure that it is whole records: a local file may have rotted, and the other copies will go.
fn make_object(directory: PathBuf, part: Part) -> Result<Option<(WalObject, Bytes)>, OffloadError> {
    let local = |error: &dyn std::fmt::Display| OffloadError::Local(error.to_string());
    let mut segments = SegmentReader::new(directory);
    let mut decoder = WalStreamDecoder::new(part.begin);
    let (mut wal, mut fed, mut end) = (Vec::new(), part.begin, part.begin);
    // The record that ends it may end exactly there.
    while fed < part.end && end < part.full && (fed < part.full || end == part.begin) {
        let limit = if fed < part.full { part.full.min(part.end) } else { part.end };
        let until = limit.min(fed + READ_BYTES);
        let bytes = segments.read(fed, until).map_err(|error| local(&error))?;
        decoder.feed(fed, &bytes);
        wal.extend_from_slice(&bytes);
        fed = until;
        while let Some(record) = decoder.poll_record().map_err(|error| local(&error))? {
            let record_end = record.end_lsn;
            if record_end <= part.end && (record_end <= part.full || end == part.begin) {
                end = record_end;
            }
        }
    }
    if end == part.begin {
        return Ok(None);
    }
    // A record that switches segments ends where the next begins.
    if fed < end {
        wal.extend_from_slice(&segments.read(fed, end).map_err(|error| local(&error))?);
    }
    let object = WalObject { begin: part.begin, end };
    wal.truncate((end.0 - part.begin.0) as usize);
    let bytes = object.encode(&wal).map_err(|error| local(&error))?;
    Ok(Some((object, bytes)))
}

#[cfg(test)]
mod tests {
    use types::{BranchId, Member, ProjectId};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn state(log_start: u64, remote: u64, commit: u64, flush: u64) -> AcceptorState {
        AcceptorState {
            log_start_lsn: Lsn(log_start),
            remote_consistent_lsn: Lsn(remote),
            commit_lsn: Lsn(commit),
            flush_lsn: Lsn(flush),
            ..AcceptorState::default()
        }
    }

    #[test]
    fn full_objects_are_copied_at_once_and_ends_when_idle() {
        let part = |begin, full, end| Some(Part { begin: Lsn(begin), full: Lsn(full), end: Lsn(end) });
        let of = part_to_copy;
        assert_eq!(of(&state(MIB, 0, 15 * MIB, 15 * MIB), false), None);
        assert_eq!(of(&state(MIB, 0, 16 * MIB, 20 * MIB), false), part(MIB, 16 * MIB, 16 * MIB));
        assert_eq!(of(&state(MIB, 0, 2 * MIB, 2 * MIB), true), part(MIB, 16 * MIB, 2 * MIB));
        assert_eq!(of(&state(MIB, 0, 2 * MIB, 3 * MIB), true), part(MIB, 16 * MIB, 2 * MIB), "only what is committed");
        assert_eq!(of(&state(MIB, 2 * MIB, 2 * MIB, 2 * MIB), true), None);
        let near_the_end = 16 * MIB - 8;
        assert_eq!(of(&state(0, near_the_end, 20 * MIB, 20 * MIB), false), None, "no object of eight bytes");
        assert_eq!(of(&AcceptorState::default(), true), None);
    }

    #[test]
    fn each_safekeeper_has_a_rank_of_its_own() {
        let branch = |name: &str| BranchRef {
            project: ProjectId::new("p").expect("id"),
            branch: BranchId::new(name).expect("id"),
        };
        let ranks = |nodes: &[u64], membership: Option<&Membership>, name: &str| {
            let mut ranks: Vec<u32> = nodes.iter().map(|node| rank(NodeId(*node), &branch(name), membership)).collect();
            let first = ranks[0];
            ranks.sort_unstable();
            (ranks, first)
        };
        let member = |node: u64| Member { node: NodeId(node), address: String::new() };
        let five = Membership::first([9, 4, 17, 2, 11].map(member).to_vec());
        let mut firsts = std::collections::BTreeSet::new();
        for name in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"] {
            let (all, first) = ranks(&[1, 2, 3], None, name);
            assert_eq!(all, [0, 1, 2]);
            firsts.insert(first);
            assert_eq!(ranks(&[9, 4, 17, 2, 11], Some(&five), name).0, [0, 1, 2, 3, 4]);
        }
        assert_eq!(firsts.len(), 3, "branches are shared out");
    }
}
