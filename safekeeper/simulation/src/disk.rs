//! A safekeeper's disk: what was flushed stays, of the rest a crash keeps some first part.

use bytes::Bytes;
use types::{Lsn, Term};

use crate::Rng;
use safekeeper_protocol::{AcceptorMessage, AcceptorState, ConnectionId, Effect, RecordScanner, message::Fetched};

#[derive(Debug, Clone, Default)]
pub struct Disk {
    pub control: AcceptorState,
    /// Position of the first byte.
    pub start: Lsn,
    pub bytes: Vec<u8>,
    /// Bytes before this position are flushed.
    pub flushed: Lsn,
    /// Where WAL was written, in order.
    writes: Vec<Lsn>,
}

impl Disk {
    pub fn end(&self) -> Lsn {
        self.start + self.bytes.len() as u64
    }

    pub fn slice(&self, begin: Lsn, end: Lsn) -> &[u8] {
        &self.bytes[(begin.0 - self.start.0) as usize..(end.0 - self.start.0) as usize]
    }

    /// The lowest place that was written to after WAL had first been written at or beyond `lsn`.
    pub fn lowest_write_after(&self, lsn: Lsn) -> Option<Lsn> {
        self.writes.iter().copied().skip_while(|at| *at < lsn).min()
    }

    /// Performs effects; stops before the `crash_at`-th, if that is reached.
    pub fn perform(
        &mut self,
        effects: Vec<Effect>,
        crash_at: Option<usize>,
    ) -> Result<Vec<(ConnectionId, AcceptorMessage)>, String> {
        let mut replies = Vec::new();
        for (index, effect) in effects.into_iter().enumerate() {
            if crash_at == Some(index) {
                break;
            }
            match effect {
                Effect::Persist(state) => self.control = *state,
                Effect::TruncateWal { at } => {
                    self.bytes.truncate(at.0.saturating_sub(self.start.0) as usize);
                    self.flushed = self.end();
                }
                Effect::DropWalBelow { lsn } => self.drop_below(lsn),
                Effect::WriteWal { at, wal } => {
                    if self.bytes.is_empty() {
                        (self.start, self.flushed) = (at, at);
                    }
                    if at != self.end() {
                        return Err(format!("written at {at}, the log ends at {}", self.end()));
                    }
                    self.bytes.extend_from_slice(&wal);
                    self.writes.push(at);
                }
                Effect::FlushWal => self.flushed = self.end(),
                Effect::SendWal { to, fetch } => {
                    if fetch.begin < self.start || fetch.end > self.flushed {
                        return Err(format!(
                            "reads {}..{}, has {}..{}",
                            fetch.begin, fetch.end, self.start, self.flushed
                        ));
                    }
                    let wal = Bytes::copy_from_slice(self.slice(fetch.begin, fetch.end));
                    let fetched = Fetched { on_behalf_of: fetch.on_behalf_of, begin: fetch.begin, wal };
                    replies.push((to, AcceptorMessage::Fetched(fetched)));
                }
                Effect::Reply { to, message } => replies.push((to, message)),
            }
        }
        Ok(replies)
    }

    fn drop_below(&mut self, lsn: Lsn) {
        let below = lsn.0.saturating_sub(self.start.0).min(self.bytes.len() as u64);
        self.bytes.drain(..below as usize);
        self.start = if self.bytes.is_empty() { lsn } else { self.start + below };
        self.flushed = self.flushed.max(self.start);
    }

    /// Loses unflushed bytes from a random place on.
    pub fn crash(&mut self, rng: &mut Rng) {
        let unflushed = (self.end().0 - self.flushed.0.min(self.end().0)) as usize;
        let lost = rng.below(unflushed + 1);
        self.bytes.truncate(self.bytes.len() - lost);
    }

    /// What a restarted safekeeper starts with: whole records from the last stored position.
    pub fn recover(&mut self) -> Result<AcceptorState, String> {
        let mut state = self.control.clone();
        if self.start < state.log_start_lsn {
            self.drop_below(state.log_start_lsn);
        }
        if !state.flush_lsn.is_valid() {
            self.bytes.clear();
            return Ok(state);
        }
        if state.log_start_lsn < state.flush_lsn && (self.start > state.log_start_lsn || self.flushed < state.flush_lsn)
        {
            return Err(format!("stored state says {}, disk has {}..{}", state.flush_lsn, self.start, self.flushed));
        }
        if self.bytes.is_empty() {
            self.start = state.flush_lsn;
        }
        while let Some(length) = whole_record(&self.bytes[(state.flush_lsn.0 - self.start.0) as usize..]) {
            state.flush_lsn += length as u64;
        }
        self.bytes.truncate((state.flush_lsn.0 - self.start.0) as usize);
        self.flushed = self.end();
        Ok(state)
    }
}

/// A record: length, term, a number, filling, checksum.
pub fn make_record(term: Term, number: u32, length: usize) -> Vec<u8> {
    let length = length.clamp(10, 255);
    let mut record = vec![length as u8];
    record.extend_from_slice(&(term.0 as u32).to_le_bytes());
    record.extend_from_slice(&number.to_le_bytes());
    record.extend((record.len()..length - 1).map(|i| (i as u32 * 7 + number) as u8));
    record.push(checksum(&record));
    record
}

fn whole_record(bytes: &[u8]) -> Option<usize> {
    let length = usize::from(*bytes.first()?);
    let record = bytes.get(..length).filter(|record| record.len() >= 10)?;
    (record[length - 1] == checksum(&record[..length - 1])).then_some(length)
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

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0xA5u8, |sum, byte| sum.rotate_left(3) ^ byte)
}
