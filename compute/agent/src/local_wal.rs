//! Reads the WAL that Postgres has written to `pg_wal`, as whole records.

use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf, sync::Arc};

use bytes::{Bytes, BytesMut};
use types::{Lsn, WAL_SEGMENT_BYTES, XLOG_PAGE_BYTES};
use wal::{DecodedRecord, WalDecodeError, WalStreamDecoder};
use wal_redo::Change;

use crate::{
    kept_files::KeptFiles,
    last_written::LastWritten,
    transactions::{TransactionEvent, Transactions},
};

/// A batch that has this many bytes is given out even if there is more.
const BATCH_BYTES: usize = 1024 * 1024;

/// Most bytes read at a time.
const MAX_READ_BYTES: u64 = 256 * 1024;

/// The tail of the local WAL: everything before [`LocalWal::position`] has been given out.
///
/// Postgres writes whole pages: the last one may hold a record that is not complete yet, and zeroes or half a record look the
/// same as damage. They cannot be damage as long as no later page has been written, because Postgres writes in order and
/// never leaves a page before it is complete.
pub struct LocalWal {
    directory: PathBuf,
    decoder: WalStreamDecoder,
    /// The open segment file and its number.
    segment: Option<(u64, File)>,
    notes: Notes,
    last_record: Lsn,
}

/// What records that are given out say and somebody wants to know later.
struct Notes {
    transactions: Transactions,
    last_written: Arc<LastWritten>,
    kept_files: KeptFiles,
}

/// The local WAL cannot be read any further. It must not be taken for shipped.
#[derive(Debug, thiserror::Error)]
pub enum LocalWalError {
    /// A file could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The segment file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is more WAL behind a record that cannot be read.
    #[error("local WAL is damaged: {0}")]
    Damaged(WalDecodeError),
}

/// Whole records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Where the bytes start: the end of the batch before.
    pub begin: Lsn,
    /// They end with a record.
    pub bytes: Bytes,
    /// There may be more behind, that was there before.
    pub more: bool,
}

/// Why decoding paused.
enum Pause {
    BatchFull,
    /// No more bytes in the files.
    NoBytes,
    /// These bytes are not a record.
    NoRecord(WalDecodeError),
}

impl LocalWal {
    /// The WAL in `directory` behind `start`, the end of the record that starts at `last_record`. `kept_files`: as of there.
    pub fn new(
        directory: PathBuf,
        start: Lsn,
        last_record: Lsn,
        last_written: Arc<LastWritten>,
        kept_files: KeptFiles,
    ) -> Self {
        let notes = Notes { transactions: Transactions::default(), last_written, kept_files };
        Self { directory, decoder: WalStreamDecoder::new(start), segment: None, notes, last_record }
    }

    /// The files that WAL keeps, by the records given out.
    pub fn kept_files(&self) -> &KeptFiles {
        &self.notes.kept_files
    }

    /// End of the last record given out.
    pub fn position(&self) -> Lsn {
        self.decoder.position()
    }

    /// Start of the last record given out.
    pub fn last_record(&self) -> Lsn {
        self.decoder.last_record_start().unwrap_or(self.last_record)
    }

    /// Start of the oldest transaction in progress, by the records given out; their end when there is none.
    pub fn horizon(&self) -> Lsn {
        self.notes.transactions.horizon(self.position())
    }

    /// The next records, some [`BATCH_BYTES`] at most unless a single one is longer; `None` when there is no whole one yet.
    pub fn read_new(&mut self) -> Result<Option<Batch>, LocalWalError> {
        let begin = self.position();
        let mut wal = BytesMut::new();
        let mut doubted = None;
        let mut more = false;
        loop {
            let error = match self.decode_into(begin, &mut wal)? {
                Pause::BatchFull => {
                    more = true;
                    break;
                }
                Pause::NoBytes => break,
                Pause::NoRecord(error) => error,
            };
            let next_page = Lsn(self.decoder.fed_until().0.next_multiple_of(XLOG_PAGE_BYTES));
            if !self.is_written(next_page)? {
                break;
            }
            // The page behind has been written, so by now these bytes are complete: a second look must succeed.
            if doubted.replace(self.position()) == Some(self.position()) {
                return Err(LocalWalError::Damaged(error));
            }
            self.decoder.rewind();
            wal.truncate((self.position().0 - begin.0) as usize);
        }
        self.decoder.rewind();
        let length = (self.position().0 - begin.0) as usize;
        // Behind a segment switch nothing counts: zeroes stand for whatever fills the segment.
        wal.resize(length, 0);
        Ok((length > 0).then(|| Batch { begin, bytes: wal.freeze(), more }))
    }

    /// Reads and decodes on from where the decoder is; the bytes read are appended to `wal`, which starts at `begin`.
    fn decode_into(&mut self, begin: Lsn, wal: &mut BytesMut) -> Result<Pause, LocalWalError> {
        let mut wanted = 2 * XLOG_PAGE_BYTES;
        loop {
            let at = self.decoder.fed_until();
            let start = wal.len();
            if !self.read_page_end(at, wanted, wal)? {
                return Ok(Pause::NoBytes);
            }
            self.decoder.feed(at, &wal[start..]);
            loop {
                match self.decoder.poll_record() {
                    Ok(Some(record)) => self.notes.take(&record),
                    Ok(None) => break,
                    Err(error) => return Ok(Pause::NoRecord(error)),
                }
            }
            let skipped = self.position() > self.decoder.fed_until();
            if skipped || (wal.len() >= BATCH_BYTES && self.position() > begin) {
                return Ok(Pause::BatchFull);
            }
            wanted = (wanted * 2).min(MAX_READ_BYTES);
        }
    }

    /// Appends up to `wanted` bytes at `at`, to the end of a page and of one segment at most. False when there are none.
    fn read_page_end(&mut self, at: Lsn, wanted: u64, wal: &mut BytesMut) -> Result<bool, LocalWalError> {
        let wanted = (wanted - at.page_offset()).min(WAL_SEGMENT_BYTES - at.segment_offset());
        let start = wal.len();
        wal.resize(start + wanted as usize, 0);
        let got = self.read_at(at, &mut wal[start..])?;
        // Postgres makes a segment file as long as it will ever be before it gives it its name.
        let whole = got as u64 == wanted;
        wal.truncate(if whole { start + got } else { start });
        Ok(whole)
    }

    fn is_written(&mut self, page: Lsn) -> Result<bool, LocalWalError> {
        let mut header = [0; 16];
        self.read_at(page, &mut header)?;
        Ok(header.iter().any(|byte| *byte != 0))
    }

    fn read_at(&mut self, at: Lsn, buffer: &mut [u8]) -> Result<usize, LocalWalError> {
        let path = self.directory.join(at.segment_file_name());
        let open = self.segment.take().filter(|(number, _)| *number == at.segment_number());
        let (_, file) = match open {
            Some(open) => self.segment.insert(open),
            None => match File::open(&path) {
                Ok(file) => self.segment.insert((at.segment_number(), file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
                Err(source) => return Err(LocalWalError::Io { path, source }),
            },
        };
        let mut got = 0;
        while got < buffer.len() {
            match file.read_at(&mut buffer[got..], at.segment_offset() + got as u64) {
                Ok(0) => break,
                Ok(more) => got += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(LocalWalError::Io { path, source }),
            }
        }
        Ok(got)
    }
}

impl Notes {
    /// Takes note of what a record that is about to be shipped begins, ends and changes.
    fn take(&mut self, record: &DecodedRecord<'_>) {
        let event = TransactionEvent::of(record).unwrap_or_else(|reason| {
            // Its transaction then counts as open, which keeps pages longer than needed.
            tracing::warn!(lsn = %record.start_lsn, reason, "a record about transactions is not understood");
            TransactionEvent::None
        });
        self.transactions.observe(record.start_lsn, record.xid, &event);
        match wal_redo::changes(record) {
            Ok(changes) => changes.iter().for_each(|change| self.take_change(record.end_lsn, change)),
            Err(error) => {
                tracing::error!(lsn = %record.start_lsn, %error, "a record is not understood: storage will stop here");
                self.last_written.raise_floor(record.end_lsn);
            }
        }
    }

    fn take_change(&mut self, end: Lsn, change: &Change) {
        self.last_written.apply(end, change);
        if let Change::AuxFile { path, content } = change {
            self.kept_files.observe(path, content);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use wal::{
        encode::{EncodedRecord, RecordToWrite, encode_record, segment_with},
        v15::{rmgr, xlog},
    };

    const START: Lsn = Lsn(5 * WAL_SEGMENT_BYTES + 3 * XLOG_PAGE_BYTES);

    /// A `pg_wal` with one record before [`START`]'s page, and records that are written to it piece by piece.
    struct Wal {
        directory: PathBuf,
        end: Lsn,
        prev: Lsn,
        pending: Vec<(Lsn, Vec<u8>)>,
    }

    impl Wal {
        fn new(name: &str) -> (Wal, LocalWal) {
            let directory = std::env::temp_dir().join(format!("dormouse-local-wal-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&directory).expect("mkdir");
            let first = noop(START, Lsn(8), 10);
            for (name, content) in segment_with(&first, 1) {
                let mut file = File::create(directory.join(name)).expect("create");
                file.write_all(&content).expect("write");
                file.set_len(WAL_SEGMENT_BYTES).expect("grow");
            }
            let last_written = Arc::new(LastWritten::new(START));
            let kept_files = KeptFiles::default();
            let local = LocalWal::new(directory.clone(), first.end_lsn, first.start_lsn, last_written, kept_files);
            (Wal { directory, end: first.end_lsn, prev: first.start_lsn, pending: Vec::new() }, local)
        }

        /// A record that exists but has not been written to the file.
        fn insert(&mut self, record: EncodedRecord) {
            self.prev = record.start_lsn;
            self.end = record.end_lsn;
            self.pending.push((record.begin, record.bytes.to_vec()));
        }

        fn insert_noop(&mut self, bytes: usize) {
            let record = noop(self.end, self.prev, bytes);
            self.insert(record);
        }

        fn write_up_to(&mut self, limit: Lsn) {
            for (at, bytes) in &self.pending {
                for (index, byte) in bytes.iter().enumerate() {
                    let lsn = *at + index as u64;
                    if lsn < limit {
                        self.write_byte(lsn, *byte);
                    }
                }
            }
        }

        fn write_all(&mut self) {
            self.write_up_to(Lsn::MAX);
            self.pending.clear();
        }

        fn write_byte(&self, at: Lsn, byte: u8) {
            let path = self.directory.join(at.segment_file_name());
            let file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(path).expect("open");
            file.set_len(WAL_SEGMENT_BYTES).expect("grow");
            file.write_all_at(&[byte], at.segment_offset()).expect("write");
        }
    }

    impl Drop for Wal {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }

    fn noop(at: Lsn, prev: Lsn, bytes: usize) -> EncodedRecord {
        let main_data = vec![0xAB; bytes];
        let record =
            RecordToWrite { xid: 0, rmgr: rmgr::XLOG, info: xlog::NOOP, main_data: &main_data, blocks: Vec::new() };
        encode_record(at, prev, 1, &record)
    }

    fn read_all(local: &mut LocalWal) -> Vec<u8> {
        let mut all = Vec::new();
        let mut at = local.position();
        while let Some(batch) = local.read_new().expect("read") {
            assert_eq!(batch.begin, at);
            at += batch.bytes.len() as u64;
            all.extend_from_slice(&batch.bytes);
        }
        assert_eq!(at, local.position());
        all
    }

    #[test]
    fn whole_records_are_given_out_as_they_are_completed() {
        let (mut wal, mut local) = Wal::new("whole");
        assert_eq!(read_all(&mut local), b"");
        let begin = wal.end;
        wal.insert_noop(100);
        let first_end = wal.end;
        wal.insert_noop(20_000);
        let expected: Vec<u8> = wal.pending.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        // The second record is not complete: half its pages are in the file.
        wal.write_up_to(first_end + 12_000);
        let first = read_all(&mut local);
        assert_eq!(local.position(), first_end);
        wal.write_all();
        let second = read_all(&mut local);
        assert_eq!([first, second].concat(), expected);
        assert_eq!(local.position(), wal.end);
        assert_eq!(local.last_record(), wal.prev);
        assert_eq!(local.horizon(), wal.end);
        assert_eq!(expected.len() as u64, wal.end.0 - begin.0);
    }

    #[test]
    fn records_go_on_over_the_end_of_a_segment() {
        let (mut wal, mut local) = Wal::new("segment");
        wal.insert_noop((WAL_SEGMENT_BYTES - 4 * XLOG_PAGE_BYTES) as usize);
        wal.insert_noop(50_000);
        let expected: Vec<u8> = wal.pending.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        for (at, bytes) in std::mem::take(&mut wal.pending) {
            // In one go per segment, for speed.
            let first = ((WAL_SEGMENT_BYTES - at.segment_offset()) as usize).min(bytes.len());
            for (at, piece) in [(at, &bytes[..first]), (at + first as u64, &bytes[first..])] {
                if !piece.is_empty() {
                    wal.write_byte(at, 0);
                    let path = wal.directory.join(at.segment_file_name());
                    let file = std::fs::OpenOptions::new().write(true).open(path).expect("open");
                    file.write_all_at(piece, at.segment_offset()).expect("write");
                }
            }
        }
        assert!(read_all(&mut local) == expected);
        assert_eq!(local.position(), wal.end);
    }

    #[test]
    fn a_segment_switch_gives_out_the_rest_of_the_segment() {
        let (mut wal, mut local) = Wal::new("switch");
        let switch = RecordToWrite { xid: 0, rmgr: rmgr::XLOG, info: xlog::SWITCH, main_data: &[], blocks: Vec::new() };
        wal.insert(encode_record(wal.end, wal.prev, 1, &switch));
        let next_segment = wal.end.segment_start() + WAL_SEGMENT_BYTES;
        wal.end = next_segment;
        wal.insert_noop(30);
        wal.write_all();
        let begin = local.position();
        let bytes = read_all(&mut local);
        assert_eq!(local.position(), wal.end);
        assert_eq!(bytes.len() as u64, wal.end.0 - begin.0);
    }

    #[test]
    fn damage_before_written_wal_is_an_error_and_a_torn_tail_is_not() {
        let (mut wal, mut local) = Wal::new("damage");
        wal.insert_noop(9_000);
        let damaged = wal.end;
        wal.insert_noop(3 * XLOG_PAGE_BYTES as usize);
        wal.write_up_to(damaged);
        wal.write_byte(Lsn(damaged.0 - 16), 0xEE);
        assert_eq!(local.read_new().expect("the tail may be torn"), None);
        wal.write_all();
        wal.write_byte(Lsn(damaged.0 - 16), 0xEE);
        assert!(matches!(local.read_new(), Err(LocalWalError::Damaged(WalDecodeError::BadCrc { .. }))));
        wal.write_byte(Lsn(damaged.0 - 16), 0xAB);
        assert!(local.read_new().expect("repaired").is_some());
    }
}
