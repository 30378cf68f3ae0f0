//! WAL by position, in files named and sized as Postgres's segments.
//!
//! While WAL comes in small pieces, a file is made longer ahead of it with zeroes ([`AHEAD_BYTES`]): a sync then has only the bytes to
//! write, and not the file's new length too, which file systems write to a journal. So a file may be longer than its WAL; zeroes are no
//! record, and a restart finds the end by decoding. A file whose WAL starts in its middle (the log was restarted there) has a hole before.

use std::{
    fs::{self, File},
    io::{ErrorKind, IoSliceMut},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rustix::io::{ReadWriteFlags, preadv2};
use types::{Lsn, WAL_SEGMENT_BYTES};

use super::{StorageError, sync_dir};

/// By so much a file is made longer than what is written to it.
const AHEAD_BYTES: u64 = 512 * 1024;
/// Larger pieces make a file longer by themselves only: the zeroes would be as much to write as the WAL.
const SMALL_PIECE_BYTES: usize = 64 * 1024;

pub(super) struct Segments {
    directory: PathBuf,
    /// The file written to last.
    current: Option<(u64, File)>,
    /// Bytes in that file, with those that are ahead of the WAL.
    current_length: u64,
    /// Up to where WAL was written since this was opened or cut; what is in files beyond is ahead of it.
    written_end: Option<Lsn>,
    /// Files written to before it since the last flush.
    unflushed: Vec<(u64, File)>,
    current_unflushed: bool,
    /// A file was made since the directory was last synced.
    directory_changed: bool,
}

impl Segments {
    pub fn new(directory: PathBuf) -> Segments {
        Segments {
            directory,
            current: None,
            current_length: 0,
            written_end: None,
            unflushed: Vec::new(),
            current_unflushed: false,
            directory_changed: false,
        }
    }

    /// Writes bytes; durable after [`Segments::flush`].
    pub fn write(&mut self, at: Lsn, wal: &[u8]) -> Result<(), StorageError> {
        let (mut at, mut rest) = (at, wal);
        while !rest.is_empty() {
            let room = (WAL_SEGMENT_BYTES - at.segment_offset()) as usize;
            let (part, later) = rest.split_at(rest.len().min(room));
            let number = at.segment_number();
            let written = self.open(number)?.write_all_at(part, at.segment_offset());
            written.map_err(|source| StorageError::io("write", &self.path(number))(source))?;
            self.current_unflushed = true;
            self.lengthen(at.segment_offset() + part.len() as u64, part.len())?;
            at += part.len() as u64;
            self.written_end = self.written_end.max(Some(at));
            rest = later;
        }
        Ok(())
    }

    /// Makes the current file longer than the `written` bytes, if these have reached its end with a small piece.
    fn lengthen(&mut self, written: u64, piece: usize) -> Result<(), StorageError> {
        if written <= self.current_length {
            return Ok(());
        }
        self.current_length = written;
        let until = (written + 1).next_multiple_of(AHEAD_BYTES).min(WAL_SEGMENT_BYTES);
        let Some((number, file)) = self.current.as_ref().filter(|_| piece <= SMALL_PIECE_BYTES && written < until)
        else {
            return Ok(());
        };
        match file.write_all_at(&vec![0; (until - written) as usize], written) {
            Ok(()) => self.current_length = until,
            // The WAL itself has found room.
            Err(error) if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {}
            Err(source) => return Err(StorageError::Io { action: "lengthen", path: self.path(*number), source }),
        }
        Ok(())
    }

    /// True while the last file is longer than its WAL.
    pub fn has_room_ahead(&self) -> bool {
        self.current.as_ref().is_some_and(|(number, _)| self.written_in(*number) < self.current_length)
    }

    /// Gives back what the last file has ahead of its WAL.
    pub fn trim(&mut self) -> Result<(), StorageError> {
        let Some((number, file)) = self.current.as_ref().filter(|_| self.has_room_ahead()) else { return Ok(()) };
        let length = self.written_in(*number);
        file.set_len(length).map_err(StorageError::io("truncate", &self.path(*number)))?;
        self.current_length = length;
        Ok(())
    }

    /// Bytes of WAL that a segment's file holds at most, by what was written since this was opened or cut.
    fn written_in(&self, number: u64) -> u64 {
        self.written_end.map_or(WAL_SEGMENT_BYTES, |end| end.0.saturating_sub(number * WAL_SEGMENT_BYTES))
    }

    /// Makes everything written durable.
    pub fn flush(&mut self) -> Result<(), StorageError> {
        let current = self.current.iter().filter(|_| self.current_unflushed);
        for (number, file) in self.unflushed.iter().chain(current) {
            file.sync_data().map_err(|source| StorageError::io("fdatasync", &self.path(*number))(source))?;
        }
        self.unflushed.clear();
        self.current_unflushed = false;
        if self.directory_changed {
            sync_dir(&self.directory)?;
            self.directory_changed = false;
        }
        Ok(())
    }

    /// Removes everything from `at` on, durably.
    pub fn truncate(&mut self, at: Lsn) -> Result<(), StorageError> {
        self.flush()?;
        self.current = None;
        self.written_end = None;
        let mut removed = false;
        for number in self.numbers()? {
            let path = self.path(number);
            if number > at.segment_number() || (number == at.segment_number() && at.segment_offset() == 0) {
                fs::remove_file(&path).map_err(StorageError::io("remove", &path))?;
                removed = true;
            } else if number == at.segment_number() && self.length(number)? > at.segment_offset() {
                let cut = File::options().write(true).open(&path).and_then(|file| {
                    file.set_len(at.segment_offset())?;
                    file.sync_all()
                });
                cut.map_err(StorageError::io("truncate", &path))?;
            }
        }
        if removed { sync_dir(&self.directory) } else { Ok(()) }
    }

    /// Removes files that hold nothing at or beyond `lsn`.
    pub fn drop_below(&mut self, lsn: Lsn) -> Result<(), StorageError> {
        for number in self.numbers()? {
            if number * WAL_SEGMENT_BYTES + self.length(number)?.min(self.written_in(number)) <= lsn.0 {
                if self.current.as_ref().is_some_and(|(current, _)| *current == number) {
                    self.current = None;
                    self.current_unflushed = false;
                }
                self.unflushed.retain(|(unflushed, _)| *unflushed != number);
                let path = self.path(number);
                fs::remove_file(&path).map_err(StorageError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Bytes from `begin` to `end`, which must all have been written.
    pub fn read(&self, begin: Lsn, end: Lsn) -> Result<Vec<u8>, StorageError> {
        SegmentReader::new(self.directory.clone()).read(begin, end)
    }

    /// Refuses a log with missing bytes between `start` and `end`.
    pub fn check_covers(&self, start: Lsn, end: Lsn) -> Result<(), StorageError> {
        let mut at = start;
        while at < end {
            let until = end.min(at.segment_start() + WAL_SEGMENT_BYTES);
            let length = self.length(at.segment_number())?;
            if at.segment_start() + length < until {
                let path = self.path(at.segment_number());
                let reason = format!("it ends at byte {length}, but WAL up to {until} has been acknowledged");
                return Err(StorageError::Corrupt { path, reason });
            }
            at = until;
        }
        Ok(())
    }

    /// Where the files' bytes end, going on from `from`.
    pub fn contiguous_end(&self, from: Lsn) -> Result<Lsn, StorageError> {
        let mut at = from;
        loop {
            let end = at.segment_start() + self.length(at.segment_number())?;
            if end <= at {
                return Ok(at);
            }
            at = end;
            if at.segment_offset() != 0 {
                return Ok(at);
            }
        }
    }

    /// Makes the files that hold this range durable.
    pub fn sync_range(&self, begin: Lsn, end: Lsn) -> Result<(), StorageError> {
        for number in self.numbers()? {
            if number >= begin.segment_number() && number * WAL_SEGMENT_BYTES < end.0 {
                let path = self.path(number);
                let synced = File::open(&path).and_then(|file| file.sync_all());
                synced.map_err(StorageError::io("fsync", &path))?;
            }
        }
        sync_dir(&self.directory)
    }

    fn open(&mut self, number: u64) -> Result<&File, StorageError> {
        if self.current.as_ref().is_none_or(|(current, _)| *current != number) {
            let path = self.path(number);
            let existed = path.exists();
            let opened = File::options().write(true).create(true).truncate(false).open(&path);
            let file = opened.map_err(StorageError::io("open", &path))?;
            self.current_length = file.metadata().map_err(StorageError::io("stat", &path))?.len();
            self.directory_changed |= !existed;
            let before = self.current.replace((number, file));
            if let (Some(before), true) = (before, self.current_unflushed) {
                self.unflushed.push(before);
            }
            self.current_unflushed = false;
        }
        Ok(&self.current.as_ref().expect("opened above").1)
    }

    fn path(&self, number: u64) -> PathBuf {
        segment_path(&self.directory, number)
    }

    /// Bytes in a segment's file; zero when there is none.
    fn length(&self, number: u64) -> Result<u64, StorageError> {
        let path = self.path(number);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(metadata.len()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
            Err(source) => Err(StorageError::Io { action: "stat", path, source }),
        }
    }

    /// Numbers of the segments that have files, in order.
    fn numbers(&self) -> Result<Vec<u64>, StorageError> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(StorageError::Io { action: "list", path: self.directory.clone(), source }),
        };
        let mut numbers = Vec::new();
        for entry in entries {
            let name = entry.map_err(StorageError::io("list", &self.directory))?.file_name();
            numbers.extend(name.to_str().and_then(parse_segment_name));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }
}

/// Reads WAL beside the writer; keeps the last file open.
pub(crate) struct SegmentReader {
    directory: PathBuf,
    current: Option<(u64, File)>,
}

impl SegmentReader {
    pub fn new(directory: PathBuf) -> SegmentReader {
        SegmentReader { directory, current: None }
    }

    /// Bytes from `begin` to `end`, which must all have been written.
    pub fn read(&mut self, begin: Lsn, end: Lsn) -> Result<Vec<u8>, StorageError> {
        self.read_by(begin, end, |file, part, at| file.read_exact_at(part, at))
    }

    /// [`SegmentReader::read`] if the kernel has it all in memory, as it has WAL that was just written; does not wait for the disk.
    pub fn read_cached(&mut self, begin: Lsn, end: Lsn) -> Option<Vec<u8>> {
        let cached = self.read_by(begin, end, |file, part, at| {
            let length = part.len();
            match preadv2(file, &mut [IoSliceMut::new(part)], at, ReadWriteFlags::NOWAIT) {
                Ok(read) if read == length => Ok(()),
                Ok(_) => Err(ErrorKind::WouldBlock.into()),
                Err(error) => Err(error.into()),
            }
        });
        // Whatever else is wrong, an ordinary read tells.
        cached.ok()
    }

    fn read_by(
        &mut self,
        begin: Lsn,
        end: Lsn,
        read: impl Fn(&File, &mut [u8], u64) -> std::io::Result<()>,
    ) -> Result<Vec<u8>, StorageError> {
        let mut bytes = vec![0; end.0.saturating_sub(begin.0) as usize];
        let (mut at, mut rest) = (begin, bytes.as_mut_slice());
        while !rest.is_empty() {
            let room = (WAL_SEGMENT_BYTES - at.segment_offset()) as usize;
            let length = rest.len().min(room);
            let (part, later) = rest.split_at_mut(length);
            let number = at.segment_number();
            let path = || segment_path(&self.directory, number);
            if self.current.as_ref().is_none_or(|(current, _)| *current != number) {
                let opened = File::open(path()).map_err(|source| StorageError::io("open", &path())(source))?;
                self.current = Some((number, opened));
            }
            let (_, file) = self.current.as_ref().expect("opened above");
            read(file, part, at.segment_offset()).map_err(|source| StorageError::io("read", &path())(source))?;
            at += length as u64;
            rest = later;
        }
        Ok(bytes)
    }
}

/// True for a branch's directory that holds WAL.
pub(crate) fn has_wal(directory: &Path) -> std::io::Result<bool> {
    for entry in fs::read_dir(directory)? {
        if entry?.file_name().to_str().and_then(parse_segment_name).is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn segment_path(directory: &Path, number: u64) -> PathBuf {
    directory.join(Lsn(number * WAL_SEGMENT_BYTES).segment_file_name())
}

fn parse_segment_name(name: &str) -> Option<u64> {
    let plain = name.len() == 24 && name.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
    let (high, low) = plain.then(|| (&name[8..16], &name[16..]))?;
    let per_id = 0x1_0000_0000 / WAL_SEGMENT_BYTES;
    let number = u64::from_str_radix(high, 16).ok()? * per_id + u64::from_str_radix(low, 16).ok()?;
    (Lsn(number.checked_mul(WAL_SEGMENT_BYTES)?).segment_file_name() == name).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_made_ahead_of_small_pieces_only_and_given_back() {
        let directory = tempfile::tempdir().expect("directory");
        let mut segments = Segments::new(directory.path().to_owned());
        let start = Lsn(3 * WAL_SEGMENT_BYTES + 1000);
        let length = |segments: &Segments| segments.length(3).expect("length");
        segments.write(start, &[7; 500]).and_then(|()| segments.flush()).expect("write");
        assert_eq!((length(&segments), segments.has_room_ahead()), (AHEAD_BYTES, true));
        segments.write(start + 500, &[8; 500]).and_then(|()| segments.flush()).expect("write");
        assert_eq!(length(&segments), AHEAD_BYTES);
        assert_eq!(segments.read(start + 499, start + 502).expect("read"), [7, 8, 8]);
        let mut reader = SegmentReader::new(directory.path().to_owned());
        assert_eq!(reader.read_cached(start + 499, start + 502), Some(vec![7, 8, 8]));
        assert_eq!(reader.read_cached(start, Lsn(5 * WAL_SEGMENT_BYTES)), None);

        segments.trim().expect("trim");
        assert_eq!((length(&segments), segments.has_room_ahead()), (2000, false));
        let large = vec![9; SMALL_PIECE_BYTES + 1];
        segments.write(start + 1000, &large).expect("write");
        assert_eq!(length(&segments), 2000 + large.len() as u64);

        // To the segment's end and a little into the next: no file is longer than a segment.
        let end = Lsn(4 * WAL_SEGMENT_BYTES + 10);
        let at = start + 1000 + large.len() as u64;
        segments.write(at, &vec![1; (end.0 - at.0 - 30) as usize]).expect("write");
        segments.write(Lsn(end.0 - 30), &[2; 30]).and_then(|()| segments.flush()).expect("write");
        assert_eq!((length(&segments), segments.length(4).expect("length")), (WAL_SEGMENT_BYTES, AHEAD_BYTES));
        segments.drop_below(Lsn(end.0 - 1)).expect("drop");
        assert_eq!(segments.numbers().expect("list"), [4]);
        assert_eq!(segments.read(Lsn(end.0 - 1), end).expect("read"), [2]);
        segments.drop_below(end).expect("drop");
        assert!(segments.numbers().expect("list").is_empty(), "what is ahead of the WAL does not keep a file");
        segments.write(end, &[3; 5]).and_then(|()| segments.truncate(end + 2)).expect("write");
        assert_eq!(segments.length(4).expect("length"), 12);
    }
}
