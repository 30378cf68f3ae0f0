//! A branch's files: `control` (what the acceptor remembers), WAL segments, or `deleted` once it is gone.

mod control;
mod segments;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use safekeeper_protocol::{AcceptorMessage, AcceptorState, ConnectionId, Effect, message::Fetched};
use tracing::{info, warn};
use types::Lsn;
use wal::stream::WalStreamDecoder;

pub(crate) use self::segments::SegmentReader;
use self::{control::ControlFile, segments::Segments};

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
    Branch { store: Box<BranchStore>, state: AcceptorState },
    Deleted,
}

/// Performs an acceptor's effects on disk. All calls block.
pub(crate) struct BranchStore {
    directory: PathBuf,
    /// `None` until there is something to remember: asking about a branch leaves nothing behind.
    control: Option<ControlFile>,
    stored: AcceptorState,
    segments: Segments,
    durable_lsn: Lsn,
}

type Replies = Vec<(ConnectionId, AcceptorMessage)>;

impl BranchStore {
    /// Reads a branch's files and finds the end of its log. Bytes beyond `distrust_beyond` are cut off: a write failed there.
    pub fn load(directory: PathBuf, distrust_beyond: Option<Lsn>) -> Result<Loaded, StorageError> {
        if directory.join(TOMBSTONE).exists() {
            return Ok(Loaded::Deleted);
        }
        let mut segments = Segments::new(directory.clone());
        let Some((control, mut state)) = ControlFile::load(&directory)? else {
            let stored = AcceptorState::default();
            let store = BranchStore { directory, control: None, stored, segments, durable_lsn: Lsn::INVALID };
            return Ok(Loaded::Branch { store: Box::new(store), state: AcceptorState::default() });
        };
        let stored = state.clone();
        if let Some(limit) = distrust_beyond {
            segments.truncate(limit.max(state.flush_lsn))?;
        }
        state.flush_lsn = recover_end(&mut segments, &state)?;
        let durable_lsn = state.flush_lsn;
        let store = BranchStore { directory, control: Some(control), stored, segments, durable_lsn };
        Ok(Loaded::Branch { store: Box::new(store), state })
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

    /// Performs effects in order, up to the first that fails. Answers may be sent even if a later effect failed.
    pub fn perform(&mut self, effects: Vec<Effect>) -> (Replies, Result<(), StorageError>) {
        let mut replies = Vec::new();
        let done = effects.into_iter().try_for_each(|effect| self.perform_one(effect, &mut replies));
        (replies, done)
    }

    fn perform_one(&mut self, effect: Effect, replies: &mut Replies) -> Result<(), StorageError> {
        match effect {
            Effect::Persist(state) => self.persist(*state),
            Effect::TruncateWal { at } => self.segments.truncate(at),
            Effect::DropWalBelow { lsn } => self.segments.drop_below(lsn),
            Effect::WriteWal { at, wal } => self.segments.write(at, &wal),
            Effect::FlushWal => self.segments.flush(),
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

    fn persist(&mut self, state: AcceptorState) -> Result<(), StorageError> {
        match &mut self.control {
            Some(control) => control.store(&state)?,
            None => {
                create_durably(&self.directory)?;
                self.control = Some(ControlFile::create(&self.directory, &state)?);
            }
        }
        self.stored = state;
        Ok(())
    }
}

/// The end of the last whole record, found by decoding from the last stored position. What follows it is cut off.
fn recover_end(segments: &mut Segments, state: &AcceptorState) -> Result<Lsn, StorageError> {
    if !state.flush_lsn.is_valid() {
        segments.truncate(Lsn::INVALID)?;
        return Ok(Lsn::INVALID);
    }
    segments.drop_below(state.log_start_lsn)?;
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
    if available > end {
        warn!(lsn = %end, bytes = available.0 - end.0, "cutting off the tail of the log, which is not whole records");
    }
    segments.truncate(end)?;
    // It may be in the page cache only, written by a process that died before its fsync.
    segments.sync_range(state.flush_lsn, end)?;
    Ok(end)
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
