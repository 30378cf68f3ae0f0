//! A branch's files: `control` (what the acceptor remembers), WAL segments, or `deleted` once it is gone. Idle branches without WAL have none, and
//! a record in a file that they share.

mod control;
mod segments;
mod shelf;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use safekeeper_protocol::{AcceptorMessage, AcceptorState, ConnectionId, Effect, message::Fetched};
use tracing::{info, warn};
use types::{BranchRef, Lsn, Term};
use wal::stream::WalStreamDecoder;

use self::{control::ControlFile, segments::Segments};
pub(crate) use self::{
    segments::{SegmentReader, has_wal},
    shelf::Shelf,
};

const TOMBSTONE: &str = "deleted";
const SCAN_BYTES: u64 = 256 * 1024;

/// Why a branch's files could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    #[error("{action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{} is damaged: {reason}", path.display())]
    Corrupt { path: PathBuf, reason: String },
    #[error("storage task: {0}")]
    Panicked(String),
}

impl StorageError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StorageError {
        move |source| StorageError::Io { action, path: path.to_owned(), source }
    }
}

/// What was found on disk.
pub(crate) enum Loaded {
    Branch { store: Box<BranchStore>, state: Box<AcceptorState> },
    Deleted,
}

/// Performs an acceptor's effects on disk. All calls block.
pub(crate) struct BranchStore {
    branch: BranchRef,
    directory: PathBuf,
    shelf: Arc<Shelf>,
    /// `None` until there is something to remember: asking about a branch leaves nothing behind. And while it is on the shelf.
    control: Option<ControlFile>,
    stored: AcceptorState,
    segments: Segments,
    durable_lsn: Lsn,
    /// What the mark says.
    marked: Lsn,
}

type Replies = Vec<(ConnectionId, AcceptorMessage)>;

impl BranchStore {
    /// Reads a branch's files and finds the end of its log. Bytes beyond `distrust_beyond` are cut off: a write failed there.
    pub fn load(
        branch: BranchRef,
        directory: PathBuf,
        shelf: Arc<Shelf>,
        distrust_beyond: Option<Lsn>,
    ) -> Result<Loaded, StorageError> {
        if directory.join(TOMBSTONE).exists() {
            return Ok(Loaded::Deleted);
        }
        let mut segments = Segments::new(directory.clone());
        let Some((mut control, mut state)) = ControlFile::load(&directory)? else {
            let state = shelf.get(&branch)?.unwrap_or_default();
            let (stored, durable_lsn, marked) = (state.clone(), state.flush_lsn, state.flush_lsn);
            let store = BranchStore { branch, directory, shelf, control: None, stored, segments, durable_lsn, marked };
            return Ok(Loaded::Branch { store: Box::new(store), state: Box::new(state) });
        };
        if let Some(limit) = distrust_beyond {
            segments.truncate(limit.max(state.flush_lsn))?;
        }
        let log = find_end(&segments, &state)?;
        if let Some(acknowledged) = control.marked().filter(|lsn| *lsn > log.end && !state.doubtful) {
            let directory = directory.display();
            warn!(%directory, lsn = %log.end, %acknowledged, "WAL that was acknowledged is damaged; votes don't count until the other safekeepers have repaired it");
            // Stored before the log is cut and the mark is moved.
            state.doubtful = true;
            control.store(&state)?;
        }
        let stored = state.clone();
        cut_at_end(&mut segments, &state, &log)?;
        state.flush_lsn = log.end;
        control.mark(log.end)?;
        let (durable_lsn, marked) = (log.end, log.end);
        let control = Some(control);
        let store = BranchStore { branch, directory, shelf, control, stored, segments, durable_lsn, marked };
        Ok(Loaded::Branch { store: Box::new(store), state: Box::new(state) })
    }

    /// Removes a branch's files for good and leaves a mark that refuses its id.
    pub fn delete(directory: &Path) -> Result<(), StorageError> {
        create_durably(directory)?;
        let tombstone = directory.join(TOMBSTONE);
        File::create(&tombstone).map_err(StorageError::io("create", &tombstone))?;
        sync_dir(directory)?;
        let entries = fs::read_dir(directory).map_err(StorageError::io("list", directory))?;
        for entry in entries {
            let path = entry.map_err(StorageError::io("list", directory))?.path();
            if path != tombstone {
                fs::remove_file(&path).map_err(StorageError::io("remove", &path))?;
            }
        }
        sync_dir(directory)
    }

    /// Puts what is remembered on the shelf and gives the branch's directory back, where there is no WAL in it.
    pub fn shelve(&mut self) -> Result<(), StorageError> {
        let failed = StorageError::io("list", &self.directory);
        if self.control.is_none() || has_wal(&self.directory).map_err(failed)? {
            return Ok(());
        }
        self.shelf.put(&self.branch, &self.stored, &self.directory)?;
        self.segments = Segments::new(self.directory.clone());
        self.control = None;
        Ok(())
    }

    /// True while the last file is longer than its WAL.
    pub fn has_room_ahead(&self) -> bool {
        self.segments.has_room_ahead()
    }

    /// Gives the room ahead of the WAL back: nothing will be written for a while.
    pub fn trim(&mut self) -> Result<(), StorageError> {
        self.segments.trim()
    }

    /// The state as last stored.
    pub fn stored(&self) -> &AcceptorState {
        &self.stored
    }

    /// End of the WAL that is known to be durable.
    pub fn durable_lsn(&self) -> Lsn {
        self.durable_lsn
    }

    pub fn set_durable(&mut self, lsn: Lsn) {
        self.durable_lsn = lsn;
    }

    /// Performs effects in order, up to the first that fails. Answers may be sent even if a later effect failed. `acknowledged` is
    /// up to where the answers acknowledge WAL at most.
    pub fn perform(&mut self, effects: Vec<Effect>, acknowledged: Lsn) -> (Replies, Result<(), StorageError>) {
        let mut replies = Vec::new();
        let changes_log =
            |effect: &Effect| matches!(effect, Effect::WriteWal { .. } | Effect::FlushWal | Effect::TruncateWal { .. });
        if self.control.is_none() && self.stored.term != Term(0) && effects.iter().any(changes_log) {
            // From the shelf: the mark needs a control file.
            if let Err(error) = self.persist(self.stored.clone()) {
                return (replies, Err(error));
            }
        }
        let done = effects.into_iter().try_for_each(|effect| self.perform_one(effect, acknowledged, &mut replies));
        // Also when only a boundary moved, over bytes that had been flushed before.
        let marked = if done.is_ok() { self.mark(acknowledged) } else { Ok(()) };
        if self.marked != acknowledged {
            return (Vec::new(), done.and(marked));
        }
        (replies, done)
    }

    fn perform_one(&mut self, effect: Effect, acknowledged: Lsn, replies: &mut Replies) -> Result<(), StorageError> {
        match effect {
            Effect::Persist(state) => self.persist(*state),
            Effect::TruncateWal { at } => {
                self.mark(at)?;
                self.segments.truncate(at)
            }
            Effect::DropWalBelow { lsn } => self.segments.drop_below(lsn),
            Effect::WriteWal { at, wal } => self.segments.write(at, &wal),
            Effect::FlushWal => {
                self.segments.flush()?;
                self.mark(acknowledged)
            }
            Effect::SendWal { to, fetch } => {
                let wal = Bytes::from(self.segments.read(fetch.begin, fetch.end)?);
                let fetched = Fetched { on_behalf_of: fetch.on_behalf_of, begin: fetch.begin, wal };
                replies.push((to, AcceptorMessage::Fetched(fetched)));
                Ok(())
            }
            Effect::Reply { to, message } => {
                replies.push((to, message));
                Ok(())
            }
        }
    }

    fn mark(&mut self, lsn: Lsn) -> Result<(), StorageError> {
        if let Some(control) = &self.control
            && lsn != self.marked
        {
            control.mark(lsn)?;
        }
        self.marked = lsn;
        Ok(())
    }

    fn persist(&mut self, state: AcceptorState) -> Result<(), StorageError> {
        match &mut self.control {
            Some(control) => control.store(&state)?,
            None => {
                self.shelf.make_directory(&self.directory)?;
                self.control = Some(ControlFile::create(&self.directory, &state)?);
                self.segments = Segments::new(self.directory.clone());
            }
        }
        self.stored = state;
        Ok(())
    }
}

/// Where a log ends.
struct LogEnd {
    /// End of the last whole record.
    end: Lsn,
    /// End of the bytes.
    available: Lsn,
}

/// Finds the end of the last whole record by decoding from the last stored position.
fn find_end(segments: &Segments, state: &AcceptorState) -> Result<LogEnd, StorageError> {
    if !state.flush_lsn.is_valid() {
        return Ok(LogEnd { end: Lsn::INVALID, available: Lsn::INVALID });
    }
    segments.check_covers(state.log_start_lsn, state.flush_lsn)?;
    let available = segments.contiguous_end(state.flush_lsn)?;
    let mut decoder = WalStreamDecoder::new(state.flush_lsn);
    let mut end = state.flush_lsn;
    let mut fed = state.flush_lsn;
    'scan: while fed < available {
        let until = available.min(fed + SCAN_BYTES);
        decoder.feed(fed, &segments.read(fed, until)?);
        fed = until;
        loop {
            match decoder.poll_record().map(|record| record.map(|record| record.end_lsn)) {
                Ok(Some(record_end)) if record_end <= available => end = record_end,
                // A record that says it goes on beyond the file is not whole.
                Ok(Some(_)) => break 'scan,
                Ok(None) => break,
                Err(error) => {
                    info!(lsn = %end, %error, "the log's end was found");
                    break 'scan;
                }
            }
        }
    }
    Ok(LogEnd { end, available })
}

/// Removes what is not part of the log, and makes the rest durable.
fn cut_at_end(segments: &mut Segments, state: &AcceptorState, log: &LogEnd) -> Result<(), StorageError> {
    if !log.end.is_valid() {
        return segments.truncate(Lsn::INVALID);
    }
    segments.drop_below(state.log_start_lsn)?;
    let LogEnd { end, available } = *log;
    if available > end {
        info!(lsn = %end, bytes = available.0 - end.0, "cutting off what follows the last whole record: room made ahead, or a torn write");
    }
    segments.truncate(end)?;
    // It may be in the page cache only, written by a process that died before its fsync.
    segments.sync_range(state.flush_lsn, end)
}

fn create_durably(directory: &Path) -> Result<(), StorageError> {
    fs::create_dir_all(directory).map_err(StorageError::io("create", directory))?;
    // The branch's directory, its project's and the data directory's entries.
    directory.ancestors().skip(1).take(2).try_for_each(sync_dir)
}

fn sync_dir(directory: &Path) -> Result<(), StorageError> {
    let synced = File::open(directory).and_then(|dir| dir.sync_all());
    synced.map_err(StorageError::io("fsync", directory))
}
