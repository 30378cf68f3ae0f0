//! A safekeeper's disk: what was flushed stays; a crash may take the rest.

use bytes::Bytes;
use safekeeper_protocol::{AcceptorMessage, AcceptorState, ConnectionId, Effect, message::Fetched};
use types::Lsn;

use crate::START;

/// Stored state and WAL from [`START`] on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Disk {
    /// The control file.
    pub control: AcceptorState,
    /// WAL, durable or not.
    pub wal: Vec<u8>,
    /// So many bytes of it are durable.
    pub flushed_bytes: usize,
}

impl Disk {
    /// Performs effects up to the `stop`-th, if that is given; what is to be sent.
    pub fn perform(&mut self, effects: Vec<Effect>, stop: Option<usize>) -> Vec<(ConnectionId, AcceptorMessage)> {
        let count = stop.unwrap_or(effects.len());
        effects.into_iter().take(count).filter_map(|effect| self.perform_one(effect)).collect()
    }

    fn perform_one(&mut self, effect: Effect) -> Option<(ConnectionId, AcceptorMessage)> {
        match effect {
            Effect::Persist(state) => self.control = *state,
            Effect::TruncateWal { at } => {
                self.wal.truncate(offset(at));
                self.flushed_bytes = self.wal.len();
            }
            // Nothing is ever in the object store here.
            Effect::DropWalBelow { .. } => {}
            Effect::WriteWal { at, wal } => {
                assert_eq!(offset(at), self.wal.len(), "WAL is written at the log's end");
                self.wal.extend_from_slice(&wal);
            }
            Effect::FlushWal => self.flushed_bytes = self.wal.len(),
            Effect::SendWal { to, fetch } => {
                let wal = Bytes::copy_from_slice(&self.wal[offset(fetch.begin)..offset(fetch.end)]);
                let fetched = Fetched { on_behalf_of: fetch.on_behalf_of, begin: fetch.begin, wal };
                return Some((to, AcceptorMessage::Fetched(fetched)));
            }
            Effect::Reply { to, message } => return Some((to, message)),
        }
        None
    }

    /// What a safekeeper starts with after a crash that took what was not flushed, or left it.
    pub fn recover(&mut self, lose_unflushed: bool) -> AcceptorState {
        if lose_unflushed {
            self.wal.truncate(self.flushed_bytes);
        }
        let mut state = self.control.clone();
        if !state.flush_lsn.is_valid() {
            self.wal.clear();
        } else if self.end() > state.flush_lsn {
            state.flush_lsn = self.end();
        }
        self.flushed_bytes = self.wal.len();
        state
    }

    /// What a safekeeper starts with whose last byte has rotted since it acknowledged it: it knows that, by the mark.
    pub fn rot(&mut self) -> AcceptorState {
        self.wal.truncate(self.flushed_bytes - 1);
        self.control.doubtful = true;
        self.recover(true)
    }

    /// Whether there is a byte that was acknowledged and that a restart takes for the end of the log.
    pub fn can_rot(&self) -> bool {
        self.control.flush_lsn.is_valid() && self.flushed_bytes > offset(self.control.flush_lsn)
    }

    /// Whether there is WAL that a crash could take.
    pub fn has_unflushed(&self) -> bool {
        self.flushed_bytes < self.wal.len()
    }

    fn end(&self) -> Lsn {
        START + self.wal.len() as u64
    }

    /// Durable bytes up to a position, or fewer.
    pub fn durable(&self, end: Lsn) -> &[u8] {
        &self.wal[..self.flushed_bytes.min(offset(end))]
    }
}

/// Index of a position's byte.
pub fn offset(lsn: Lsn) -> usize {
    lsn.0.saturating_sub(START.0) as usize
}
