//! A safekeeper's disk: what was flushed stays, of the rest a crash keeps some first part.

use std::collections::BTreeSet;

use bytes::Bytes;
use types::{Lsn, Term};

use crate::{Rng, SimError};

const SECTOR_BYTES: usize = 16;
const CHECKSUM_BYTES: usize = 4;
const SHORTEST_RECORD: usize = 14;
use safekeeper_protocol::{AcceptorMessage, AcceptorState, ConnectionId, Effect, RecordScanner, message::Fetched};

/// See the module's documentation.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    /// Stored state.
    pub control: AcceptorState,
    /// Position of the first byte.
    pub start: Lsn,
    /// WAL from there on.
    pub bytes: Vec<u8>,
    /// Bytes before this position are flushed.
    pub flushed: Lsn,
    /// Up to where WAL was acknowledged, as written beside the stored state and not synced.
    pub mark: Lsn,
    /// Where WAL was written, in order.
    writes: Vec<Lsn>,
    /// Bytes that have rotted.
    rotten: BTreeSet<Lsn>,
}

impl Disk {
    /// End of the bytes, durable or not.
    pub fn end(&self) -> Lsn {
        self.start + self.bytes.len() as u64
    }

    /// Bytes that are there.
    pub fn slice(&self, begin: Lsn, end: Lsn) -> &[u8] {
        &self.bytes[(begin.0 - self.start.0) as usize..(end.0 - self.start.0) as usize]
    }

    /// The lowest place that was written to after WAL had first been written at or beyond `lsn`.
    pub fn lowest_write_after(&self, lsn: Lsn) -> Option<Lsn> {
        self.writes.iter().copied().skip_while(|at| *at < lsn).min()
    }

    /// Performs effects; stops before the `crash_at`-th, if that is reached. What is answered acknowledges WAL up to `acknowledged`.
    pub fn perform(
        &mut self,
        effects: Vec<Effect>,
        crash_at: Option<usize>,
        acknowledged: Lsn,
    ) -> Result<Vec<(ConnectionId, AcceptorMessage)>, SimError> {
        let mut replies = Vec::new();
        let mut marked = false;
        for (index, effect) in effects.into_iter().enumerate() {
            if crash_at == Some(index) {
                if !marked {
                    replies.retain(|(_, reply)| !matches!(reply, AcceptorMessage::Append(_)));
                }
                return Ok(replies);
            }
            match effect {
                Effect::Persist(state) => self.control = *state,
                Effect::TruncateWal { at } => {
                    self.mark = at;
                    self.cut(at);
                }
                Effect::DropWalBelow { lsn } => self.drop_below(lsn),
                Effect::WriteWal { at, wal } => {
                    if self.bytes.is_empty() {
                        (self.start, self.flushed) = (at, at);
                    }
                    if at != self.end() {
                        return Err(SimError::Wrong(format!("written at {at}, the log ends at {}", self.end())));
                    }
                    self.bytes.extend_from_slice(&wal);
                    self.writes.push(at);
                }
                Effect::FlushWal => {
                    self.flushed = self.end();
                    (self.mark, marked) = (acknowledged, true);
                }
                Effect::SendWal { to, fetch } => {
                    if fetch.begin < self.start || fetch.end > self.flushed {
                        let has = format!("{}..{}", self.start, self.flushed);
                        return Err(SimError::Wrong(format!("reads {}..{}, has {has}", fetch.begin, fetch.end)));
                    }
                    let wal = Bytes::copy_from_slice(self.slice(fetch.begin, fetch.end));
                    let fetched = Fetched { on_behalf_of: fetch.on_behalf_of, begin: fetch.begin, wal };
                    replies.push((to, AcceptorMessage::Fetched(fetched)));
                }
                Effect::Reply { to, message } => replies.push((to, message)),
            }
        }
        self.mark = acknowledged;
        Ok(replies)
    }

    /// Removes everything from here on, durably.
    pub fn cut(&mut self, at: Lsn) {
        self.bytes.truncate(at.0.saturating_sub(self.start.0) as usize);
        self.flushed = self.end();
        drop(self.rotten.split_off(&at));
    }

    /// Flips a bit of WAL: of what was stored as committed, and so is on a majority, below what restarts look at; or of what
    /// was flushed since, which a restart takes for the log's end; where. Not of what a power failure took the mark of: that such
    /// rot is not known for rot is a hole that is open.
    pub fn rot(&mut self, place: u64) -> Option<Lsn> {
        let settled = self.control.commit_lsn.min(self.control.flush_lsn).min(self.flushed);
        let recent = self.control.flush_lsn.max(self.start);
        let (begin, end) = if place & 1 == 0 { (self.start, settled) } else { (recent, self.flushed.min(self.mark)) };
        let bytes = end.checked_sub(begin).filter(|bytes| *bytes > 0)?;
        let at = begin + (place >> 1) % bytes;
        self.bytes[(at.0 - self.start.0) as usize] ^= 1 << (place % 7);
        self.rotten.insert(at);
        Some(at)
    }

    /// Whether this byte is not what was written.
    pub fn has_rotted(&self, at: Lsn) -> bool {
        self.rotten.contains(&at)
    }

    /// Whether any byte from `begin` to `end` is not.
    pub fn has_rotted_in(&self, begin: Lsn, end: Lsn) -> bool {
        self.rotten.range(begin..end).next().is_some()
    }

    fn drop_below(&mut self, lsn: Lsn) {
        let below = lsn.0.saturating_sub(self.start.0).min(self.bytes.len() as u64);
        self.bytes.drain(..below as usize);
        self.start = if self.bytes.is_empty() { lsn } else { self.start + below };
        self.flushed = self.flushed.max(self.start);
    }

    /// The process dies, and the machine keeps what was written; or the power goes: unflushed bytes are lost from a random place on,
    /// and what is left of them is torn.
    pub fn crash(&mut self, rng: &mut Rng) {
        if rng.chance(50) {
            return;
        }
        // That both the mark and what it tells of are lost at once is not survived.
        if rng.chance(50) && self.rotten.is_empty() {
            self.mark = self.mark.min(self.control.flush_lsn);
        }
        let unflushed = (self.end().0 - self.flushed.0.min(self.end().0)) as usize;
        let lost = rng.below(unflushed + 1);
        self.bytes.truncate(self.bytes.len() - lost);
        // Of what is left some sectors never came to the disk.
        let torn_from = self.bytes.len() - (unflushed - lost);
        for sector in self.bytes[torn_from..].chunks_mut(SECTOR_BYTES) {
            if rng.chance(30) {
                sector.fill(0);
            }
        }
    }

    /// What a restarted safekeeper starts with: whole records from the last stored position.
    pub fn recover(&mut self) -> Result<AcceptorState, SimError> {
        let mut state = self.control.clone();
        if self.start < state.log_start_lsn {
            self.drop_below(state.log_start_lsn);
        }
        if !state.flush_lsn.is_valid() {
            self.cut(Lsn::INVALID);
            return Ok(state);
        }
        if state.log_start_lsn < state.flush_lsn && (self.start > state.log_start_lsn || self.flushed < state.flush_lsn)
        {
            let (says, start) = (state.flush_lsn, self.start);
            return Err(SimError::Wrong(format!("stored state says {says}, disk has {start}..{}", self.flushed)));
        }
        if self.bytes.is_empty() {
            self.start = state.flush_lsn;
        }
        while let Some(length) = whole_record(&self.bytes[(state.flush_lsn.0 - self.start.0) as usize..]) {
            state.flush_lsn += length as u64;
        }
        if self.mark > state.flush_lsn {
            state.doubtful = true;
            self.control.doubtful = true;
        }
        self.cut(state.flush_lsn);
        self.mark = state.flush_lsn;
        Ok(state)
    }
}

/// A record: length, term, a number, filling, checksum.
pub fn make_record(term: Term, number: u32, length: usize) -> Vec<u8> {
    let length = length.clamp(SHORTEST_RECORD, 255);
    let mut record = vec![length as u8];
    record.extend_from_slice(&(term.0 as u32).to_le_bytes());
    record.extend_from_slice(&number.to_le_bytes());
    record.extend((record.len()..length - CHECKSUM_BYTES).map(|i| (i as u32 * 7 + number) as u8));
    record.extend_from_slice(&crc32c::crc32c(&record).to_le_bytes());
    record
}

fn whole_record(bytes: &[u8]) -> Option<usize> {
    let length = usize::from(*bytes.first()?);
    let record = bytes.get(..length).filter(|record| record.len() >= SHORTEST_RECORD)?;
    let (body, checksum) = record.split_at(length - CHECKSUM_BYTES);
    (checksum == crc32c::crc32c(body).to_le_bytes()).then_some(length)
}

/// Finds records of [`make_record`]'s.
#[derive(Debug)]
pub struct SimScanner {
    boundary: Lsn,
    rest: Vec<u8>,
}

impl RecordScanner for SimScanner {
    fn starting_at(start: Lsn) -> SimScanner {
        SimScanner { boundary: start, rest: Vec::new() }
    }

    fn feed(&mut self, wal: &[u8]) -> Result<Lsn, String> {
        self.rest.extend_from_slice(wal);
        while let Some(length) = self.rest.first().map(|length| usize::from(*length)) {
            if self.rest.len() >= length {
                whole_record(&self.rest).ok_or_else(|| format!("no record at {}", self.boundary))?;
                self.rest.drain(..length);
                self.boundary += length as u64;
            } else {
                break;
            }
        }
        Ok(self.boundary)
    }
}
