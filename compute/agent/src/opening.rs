//! What opens a term: a shutdown checkpoint at its start, and a control file that says so. Pure.
//!
//! Every start looks to Postgres like the start after a clean stop, whether or not there was one: nothing to recover.

use types::{Lsn, WAL_SEGMENT_BYTES};
use wal::{
    CheckPoint, ControlFile,
    checkpoint::{CheckPointError, shutdown_record},
    control_file::ControlFileError,
    encode::{EncodedRecord, encode_record, record_start_at},
    v15::wal::page_header,
};
use wire::pageserver::BaseFiles;

use crate::settings::ControlSettings;

/// The term's first record and the files that a Postgres needs to start behind it.
#[derive(Debug, Clone)]
pub struct Opening {
    /// The checkpoint record: the first WAL of the term.
    pub record: EncodedRecord,
    /// Content of `global/pg_control`.
    pub control_file: Vec<u8>,
    /// Files of `pg_wal`.
    pub segments: Vec<WalSegment>,
    /// The cluster's identifier.
    pub system_identifier: u64,
}

/// A segment file: what must be in it. All else may be a hole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalSegment {
    /// Its name.
    pub name: String,
    /// Offsets and bytes.
    pub pieces: Vec<(u64, Vec<u8>)>,
}

/// Base files that no Postgres can start from.
#[derive(Debug, thiserror::Error)]
pub enum OpeningError {
    /// They are for another position.
    #[error("base files are as of {got}, not {wanted}")]
    Position {
        /// What they say.
        got: Lsn,
        /// What was asked for.
        wanted: Lsn,
    },
    /// The control file is damaged or foreign.
    #[error("base files: {0}")]
    ControlFile(#[from] ControlFileError),
    /// The counters are.
    #[error("base files: {0}")]
    CheckPoint(#[from] CheckPointError),
}

/// Makes the opening of a term that starts at `start`. `now` is in seconds since 1970.
pub fn open_term(base: &BaseFiles, start: Lsn, settings: &ControlSettings, now: i64) -> Result<Opening, OpeningError> {
    if base.lsn != start {
        return Err(OpeningError::Position { got: base.lsn, wanted: start });
    }
    let mut control = ControlFile::parse(&base.control_file)?;
    let system_identifier = control.system_identifier();
    let counters = CheckPoint::from_bytes(&base.checkpoint)?;
    // Full-page writes are off, and a checkpoint that says otherwise would make Postgres write a record about it.
    let counters = CheckPoint { time: now, full_page_writes: 0, ..counters };
    let checkpoint = counters.for_shutdown_at(record_start_at(start));
    let record = encode_record(start, base.prev_record_lsn, system_identifier, &shutdown_record(&checkpoint));
    control.set_shutdown_at(record.start_lsn, &checkpoint);
    set_settings(&mut control, settings);
    let segments = segments_with(&record, system_identifier);
    Ok(Opening { record, control_file: control.to_bytes().to_vec(), segments, system_identifier })
}

/// The segments that hold `record`: its pages, and the header of a segment's first page, which names the cluster. Postgres
/// looks at nothing else, and up to 16 MiB of other pages would have to be written at each start.
fn segments_with(record: &EncodedRecord, system_identifier: u64) -> Vec<WalSegment> {
    let begin = record.begin;
    let page = begin.page_start();
    // A record that starts with its page brings the page's header along.
    let mut bytes = if page == begin { Vec::new() } else { page_header(page, 0, system_identifier) };
    bytes.resize(begin.page_offset() as usize, 0);
    bytes.extend_from_slice(&record.bytes);
    let mut pieces = Vec::new();
    if page.segment_offset() != 0 {
        pieces.push((0, page_header(page.segment_start(), 0, system_identifier)));
    }
    let rest = bytes.split_off(bytes.len().min((WAL_SEGMENT_BYTES - page.segment_offset()) as usize));
    pieces.push((page.segment_offset(), bytes));
    let mut segments = vec![WalSegment { name: page.segment_file_name(), pieces }];
    if !rest.is_empty() {
        let next = page.segment_start() + WAL_SEGMENT_BYTES;
        segments.push(WalSegment { name: next.segment_file_name(), pieces: vec![(0, rest)] });
    }
    segments
}

fn set_settings(control: &mut ControlFile, settings: &ControlSettings) {
    let contents = &mut control.contents;
    contents.wal_level = settings.wal_level;
    contents.wal_log_hints = 0;
    contents.max_connections = settings.max_connections;
    contents.max_worker_processes = settings.max_worker_processes;
    contents.max_wal_senders = settings.max_wal_senders;
    contents.max_prepared_xacts = settings.max_prepared_xacts;
    contents.max_locks_per_xact = settings.max_locks_per_xact;
    contents.track_commit_timestamp = u8::from(settings.track_commit_timestamp);
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use std::collections::BTreeMap;
    use wal::{WalStreamDecoder, control_file::Contents, encode::segment_with};

    fn control_file() -> Bytes {
        let mut control = ControlFile { contents: <Contents as zerocopy_zeroed::Zeroed>::zeroed() };
        let contents = &mut control.contents;
        contents.system_identifier = 77;
        contents.pg_control_version = 1300;
        contents.blcksz = 8192;
        contents.xlog_blcksz = 8192;
        contents.relseg_size = types::REL_SEGMENT_BLOCKS;
        contents.xlog_seg_size = WAL_SEGMENT_BYTES as u32;
        Bytes::copy_from_slice(&control.to_bytes())
    }

    /// A zeroed struct without unsafe code or another dependency: the parser reads one from zero bytes.
    mod zerocopy_zeroed {
        pub trait Zeroed {
            fn zeroed() -> Self;
        }
        impl Zeroed for wal::control_file::Contents {
            fn zeroed() -> Self {
                Self::from_prefix(&[0; 1024]).expect("long enough")
            }
        }
    }

    fn base(lsn: Lsn) -> BaseFiles {
        let counters =
            CheckPoint { next_xid: 1000, next_oid: 24_576, ..CheckPoint::from_bytes(&[0; 88]).expect("size") };
        BaseFiles {
            lsn,
            prev_record_lsn: Lsn(lsn.0 - 64),
            control_file: control_file(),
            checkpoint: Bytes::copy_from_slice(&counters.to_bytes()),
            files: Vec::new(),
            directories: Vec::new(),
            tablespaces: Vec::new(),
            unlogged: Vec::new(),
        }
    }

    #[test]
    fn the_opening_is_one_record_that_the_control_file_points_at() {
        let segment = 3 * WAL_SEGMENT_BYTES;
        let settings = ControlSettings::of(&BTreeMap::new());
        // Inside a page, at its end, at a page's start, at a segment's start, and split between segments.
        for at in [segment + 8192 * 5 + 400, segment + 8192 * 6 - 48, segment + 8192 * 6, segment, segment - 64] {
            let opening = open_term(&base(Lsn(at)), Lsn(at), &settings, 1).expect("opening");
            let mut decoder = WalStreamDecoder::new(Lsn(at));
            decoder.feed(Lsn(at), &opening.record.bytes);
            let record = decoder.poll_record().expect("valid").expect("whole");
            assert_eq!(record.end_lsn, opening.record.end_lsn, "{at:x}");
            assert_eq!(record.prev_lsn, Lsn(at - 64));
            let control = ControlFile::parse(&opening.control_file).expect("control");
            assert_eq!(control.checkpoint_lsn(), record.start_lsn);
            let checkpoint = control.checkpoint();
            assert_eq!(record.main_data, checkpoint.to_bytes().as_slice());
            assert_eq!({ checkpoint.redo }, record.start_lsn.0);
            assert_eq!({ checkpoint.next_xid }, 1000);
            let expected = if at == segment - 64 { 2 } else { 1 };
            assert_eq!(opening.segments.len(), expected, "{at:x}");
            for (sparse, (name, whole)) in opening.segments.iter().zip(segment_with(&opening.record, 77)) {
                assert_eq!(sparse.name, name);
                for (offset, bytes) in &sparse.pieces {
                    let end = *offset as usize + bytes.len();
                    assert_eq!(whole[*offset as usize..end], *bytes, "{at:x} at {offset:x}");
                }
                let last = sparse.pieces.last().map_or(0, |(offset, bytes)| *offset as usize + bytes.len());
                assert!(whole[last..].iter().all(|byte| *byte == 0));
            }
        }
    }

    #[test]
    fn base_files_of_another_position_are_refused() {
        let settings = ControlSettings::of(&BTreeMap::new());
        let refused = open_term(&base(Lsn(0x300_0000)), Lsn(0x300_0008), &settings, 1);
        assert!(matches!(refused, Err(OpeningError::Position { .. })));
    }
}
