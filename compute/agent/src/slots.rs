//! Replication slots at a start: which of those that the branch keeps are its own, and the WAL that they still need, fetched
//! from the safekeepers.
//!
//! The pageserver lets safekeepers forget only what no slot needs, within a limit. A slot whose WAL is gone all the same is
//! marked as Postgres marks one whose WAL it has removed itself: whoever uses it is told, and nothing is left out silently.

use std::time::Duration;

use safekeeper_client::{BadWal, Distrust, WalReadError, WalReader, WalReaderConfig};
use types::{Lsn, XLOG_PAGE_BYTES};
use wal::{
    WalStreamDecoder,
    v15::{replication::SlotState, wal::page_header},
};
use wire::pageserver::BaseFile;

use crate::data_dir::{DataDir, DataDirError};

/// Slots that need more WAL than this are lost: so much is fetched at a start at most. The pageserver's `--max-slot-wal-mib` allows
/// no more either.
const MAX_WAL_BYTES: u64 = 2 << 30;

/// Longest wait for the next piece of it.
const PIECE_LIMIT: Duration = Duration::from_secs(30);

/// How often WAL that is none may come from several safekeepers at once, so that nobody can be avoided, at one place.
const ATTEMPTS: u32 = 10;

/// The slots of a branch. They are written into the data directory with [`Slots::files`].
#[derive(Debug, Default)]
pub struct Slots(Vec<Slot>);

#[derive(Debug)]
struct Slot {
    path: String,
    state: SlotState,
}

/// WAL that slots need could not be had, for a reason that may pass.
#[derive(Debug, thiserror::Error)]
pub enum SlotWalError {
    /// The safekeepers.
    #[error("fetching the WAL that replication slots need: {0}")]
    Read(#[from] WalReadError),
    /// They say nothing.
    #[error("fetching the WAL that replication slots need: nothing came for {} s", PIECE_LIMIT.as_secs())]
    Slow,
    /// No safekeeper has it as it was written.
    #[error("the WAL that replication slots need is damaged behind {at} on all safekeepers: {reason}")]
    Damaged {
        /// The end of the last whole record.
        at: Lsn,
        /// What is wrong there.
        reason: String,
    },
    /// The local disk.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
}

impl Slots {
    /// Takes the slots out of the base files: what is left there is written as it is. A slot that ended with its session is
    /// dropped, as Postgres would; so is one of an ancestor, which goes on there: its WAL is none of this branch's.
    pub fn take(files: &mut Vec<BaseFile>, branch_start: Lsn) -> Slots {
        let mut slots = Vec::new();
        files.retain(|file| {
            if !file.path.starts_with("pg_replslot/") {
                return true;
            }
            match SlotState::parse(&file.content) {
                Ok(state) if !state.is_persistent() => {}
                Ok(state) if state.restart_lsn().is_some_and(|lsn| lsn < branch_start) => {
                    tracing::info!(path = file.path, "a replication slot of the branch's ancestor is left there");
                }
                Ok(state) => slots.push(Slot { path: file.path.clone(), state }),
                // Postgres would not start with it.
                Err(error) => tracing::error!(path = file.path, %error, "a replication slot is lost"),
            }
            false
        });
        Slots(slots)
    }

    /// The slots' files as they are to be.
    pub fn files(&self) -> Vec<(&str, Vec<u8>)> {
        self.0.iter().map(|slot| (slot.path.as_str(), slot.state.to_bytes())).collect()
    }

    /// Brings the WAL before `end` that slots need into `pg_wal`, whose last segment is there already. The branch has none
    /// from before its start.
    pub async fn fetch_wal(
        &mut self,
        reader: &WalReaderConfig,
        data: &DataDir,
        system_identifier: u64,
        branch_start: Lsn,
        end: Lsn,
    ) -> Result<(), SlotWalError> {
        let mut kept_from = branch_start;
        self.lose_before(kept_from.max(Lsn(end.0.saturating_sub(MAX_WAL_BYTES))));
        while let Some(wanted) = self.oldest() {
            let from = wanted.segment_start().max(kept_from);
            match fetch(reader, data, system_identifier, from, end).await {
                Err(SlotWalError::Read(WalReadError::Trimmed { log_start_lsn, .. })) if log_start_lsn > from => {
                    kept_from = log_start_lsn;
                    self.lose_before(kept_from);
                }
                Err(SlotWalError::Damaged { at, reason }) => {
                    tracing::error!(lsn = %at, reason, "WAL is damaged on all safekeepers: no replication slot can have it");
                    // What is whole behind it is found from the next page on.
                    kept_from = at.page_start() + XLOG_PAGE_BYTES;
                    self.lose_before(kept_from);
                }
                fetched => return fetched,
            }
        }
        Ok(())
    }

    fn oldest(&self) -> Option<Lsn> {
        self.0.iter().filter_map(|slot| slot.state.restart_lsn()).min()
    }

    /// WAL before this position is not to be had.
    fn lose_before(&mut self, kept_from: Lsn) {
        for slot in &mut self.0 {
            if slot.state.needs_from().is_some_and(|lsn| lsn < kept_from) {
                tracing::warn!(path = slot.path, lsn = %kept_from, "a replication slot needs WAL that is gone: it is lost");
                slot.state = slot.state.invalidated();
            }
        }
    }
}

/// Writes the WAL from `from`, a record's end or a page's start, to `end` into its segments. It is checked; where one safekeeper's is no
/// good, another is asked.
async fn fetch(
    config: &WalReaderConfig,
    data: &DataDir,
    system_identifier: u64,
    from: Lsn,
    end: Lsn,
) -> Result<(), SlotWalError> {
    let is_page = from == from.page_start();
    let mut decoder = if is_page { WalStreamDecoder::at_page(from) } else { WalStreamDecoder::new(from) };
    let (mut distrust, mut attempts) = (Distrust::default(), 0);
    while decoder.position() < end {
        let at = decoder.position();
        let mut reader = WalReader::avoiding(config.clone(), decoder.fed_until(), distrust.nodes().to_vec());
        let bad = match take(&mut reader, &mut decoder, data, end).await {
            Ok(Some(bad)) => bad,
            Ok(None) => continue,
            Err(SlotWalError::Read(WalReadError::NoneLeft)) => {
                return Err(SlotWalError::Damaged { at, reason: distrust.complaint(at).unwrap_or_default() });
            }
            Err(error) => return Err(error),
        };
        let now = decoder.position();
        tracing::warn!(lsn = %now, safekeepers = ?bad.givers, reason = bad.reason, "bad WAL for replication slots, others are asked for it");
        attempts = if now > at { 1 } else { attempts + 1 };
        if attempts > ATTEMPTS {
            return Err(SlotWalError::Damaged { at: now, reason: bad.reason });
        }
        distrust.note(now, bad);
        decoder.rewind();
    }
    // Where the WAL begins inside a page or a segment, whoever reads it wants to see their headers all the same.
    for page in [from.segment_start(), from.page_start()] {
        if page < from {
            data.write_wal(page, &page_header(page, 0, system_identifier))?;
        }
    }
    tracing::info!(lsn = %from, bytes = end.0.saturating_sub(from.0), "WAL for replication slots was fetched");
    Ok(())
}

/// Writes what a reader gives up to `end`, or to what is no WAL.
async fn take(
    reader: &mut WalReader,
    decoder: &mut WalStreamDecoder,
    data: &DataDir,
    end: Lsn,
) -> Result<Option<BadWal>, SlotWalError> {
    // Of the record that is not whole yet.
    let mut givers = Vec::new();
    while decoder.fed_until() < end {
        let chunk = tokio::time::timeout(PIECE_LIMIT, reader.next()).await.map_err(|_| SlotWalError::Slow)??;
        if chunk.bytes.is_empty() {
            continue;
        }
        let length = chunk.bytes.len().min((end.0 - chunk.begin.0) as usize);
        let bytes = &chunk.bytes[..length];
        data.write_wal(chunk.begin, bytes)?;
        if !givers.contains(&chunk.node) {
            givers.push(chunk.node);
        }
        decoder.feed(chunk.begin, bytes);
        loop {
            match decoder.poll_record() {
                Ok(Some(_)) => givers = vec![chunk.node],
                Ok(None) => break,
                Err(error) => return Ok(Some(BadWal { givers, reason: error.to_string() })),
            }
        }
    }
    let reason = || format!("a record goes on beyond {end}, where one ends");
    Ok((decoder.position() < end).then(|| BadWal { givers, reason: reason() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use types::WAL_SEGMENT_BYTES;
    use wal::v15::replication::SlotFile;

    const START: u64 = 4 * WAL_SEGMENT_BYTES;

    fn slot(name: &str, logical: bool, persistent: bool, restart_lsn: u64) -> BaseFile {
        let file = SlotFile {
            database: u32::from(logical),
            persistency: u32::from(!persistent),
            restart_lsn,
            ..SlotFile::from_prefix(&[0; SlotFile::SIZE]).expect("size")
        };
        let content = Bytes::from(SlotState::new(file).to_bytes());
        BaseFile { path: format!("pg_replslot/{name}/state"), content }
    }

    fn names(slots: &Slots) -> Vec<(&str, bool)> {
        slots.0.iter().map(|slot| (&slot.path[12..slot.path.len() - 6], slot.state.restart_lsn().is_some())).collect()
    }

    #[test]
    fn a_branch_has_its_own_lasting_slots_only() {
        let other = BaseFile { path: "pg_stat/pgstat.stat".to_owned(), content: Bytes::from_static(b"x") };
        let damaged = BaseFile { content: Bytes::from_static(b"x"), ..slot("damaged", true, true, START) };
        let mut files = vec![
            slot("own", true, true, START + 100),
            slot("ancestors", true, true, START - 100),
            slot("sessions", true, false, START + 100),
            slot("unused", false, true, 0),
            damaged,
            other,
        ];
        let slots = Slots::take(&mut files, Lsn(START));
        assert_eq!(names(&slots), [("own", true), ("unused", false)]);
        assert_eq!(files.len(), 1);
        assert_eq!(slots.oldest(), Some(Lsn(START + 100)));
    }

    #[test]
    fn a_standbys_slot_needs_its_whole_segment() {
        let mut files = vec![slot("logical", true, true, START + 100), slot("standby", false, true, START + 100)];
        let mut slots = Slots::take(&mut files, Lsn(START - 8));
        slots.lose_before(Lsn(START));
        assert_eq!(names(&slots), [("logical", true), ("standby", true)]);
        slots.lose_before(Lsn(START + 100));
        assert_eq!(names(&slots), [("logical", true), ("standby", false)]);
        slots.lose_before(Lsn(START + 101));
        assert_eq!(names(&slots), [("logical", false), ("standby", false)]);
    }
}
