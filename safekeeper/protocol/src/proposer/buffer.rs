//! WAL that a proposer still has in memory.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use types::Lsn;

/// A contiguous run of WAL in pieces that each end at the end of a whole record.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct WalBuffer {
    start: Lsn,
    end: Lsn,
    pieces: VecDeque<(Lsn, Bytes)>,
}

/// Part of a buffer, ready to be sent.
pub(super) struct BufferedWal {
    pub wal: Bytes,
    /// Last end of a piece at or below the end of `wal`.
    pub boundary: Lsn,
}

impl WalBuffer {
    pub fn starting_at(start: Lsn) -> WalBuffer {
        WalBuffer { start, end: start, pieces: VecDeque::new() }
    }

    /// Position of the first byte; always the end of a whole record.
    pub fn start(&self) -> Lsn {
        self.start
    }

    pub fn end(&self) -> Lsn {
        self.end
    }

    pub fn push(&mut self, wal: Bytes) {
        let begin = self.end;
        self.end += wal.len() as u64;
        self.pieces.push_back((begin, wal));
    }

    /// Up to `max` bytes from `from` on, which must lie in the buffer.
    pub fn read(&self, from: Lsn, max: usize) -> BufferedWal {
        let first = self.pieces.partition_point(|(begin, wal)| *begin + wal.len() as u64 <= from);
        let mut boundary = self.pieces.get(first).map_or(self.end, |(begin, _)| *begin);
        let Some((begin, piece)) = self.pieces.get(first) else { return BufferedWal { wal: Bytes::new(), boundary } };
        let rest = piece.slice((from.0 - begin.0) as usize..);
        if rest.len() >= max {
            if rest.len() == max {
                boundary = *begin + piece.len() as u64;
            }
            return BufferedWal { wal: rest.slice(..max), boundary };
        }
        boundary = *begin + piece.len() as u64;
        let mut joined: Option<BytesMut> = None;
        for (begin, piece) in self.pieces.iter().skip(first + 1) {
            // A piece that does not fit waits for the next message.
            let length = joined.as_ref().map_or(rest.len(), |wal| wal.len());
            if length + piece.len() > max {
                break;
            }
            joined.get_or_insert_with(|| BytesMut::from(&rest[..])).extend_from_slice(piece);
            boundary = *begin + piece.len() as u64;
        }
        BufferedWal { wal: joined.map_or(rest, BytesMut::freeze), boundary }
    }

    /// Forgets pieces that end at or below `everyone_has`, and, while there are more than `limit` bytes, those that end at or
    /// below `recoverable`.
    pub fn trim(&mut self, everyone_has: Lsn, recoverable: Lsn, limit: u64) {
        while let Some((begin, wal)) = self.pieces.front() {
            let end = *begin + wal.len() as u64;
            let over = self.end.0 - self.start.0 > limit;
            if end > everyone_has && !(over && end <= recoverable) {
                break;
            }
            self.start = end;
            self.pieces.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer() -> WalBuffer {
        let mut buffer = WalBuffer::starting_at(Lsn(100));
        for piece in ["aaaa", "bb", "cccccccc"] {
            buffer.push(Bytes::from_static(piece.as_bytes()));
        }
        buffer
    }

    #[test]
    fn reads_join_small_pieces_and_cut_large_ones() {
        let read = |from, max| {
            let got = buffer().read(Lsn(from), max);
            (String::from_utf8(got.wal.to_vec()).expect("text"), got.boundary.0)
        };
        assert_eq!(read(100, 6), ("aaaabb".to_owned(), 106));
        assert_eq!(read(100, 8), ("aaaabb".to_owned(), 106));
        assert_eq!(read(102, 100), ("aabbcccccccc".to_owned(), 114));
        assert_eq!(read(106, 3), ("ccc".to_owned(), 106));
        assert_eq!(read(109, 5), ("ccccc".to_owned(), 114));
        assert_eq!(read(114, 5), (String::new(), 114));
    }

    #[test]
    fn trimming_keeps_what_someone_may_need() {
        let mut b = buffer();
        b.trim(Lsn(103), Lsn(106), 1000);
        assert_eq!(b.start(), Lsn(100));
        b.trim(Lsn(104), Lsn(106), 1000);
        assert_eq!(b.start(), Lsn(104));
        b.trim(Lsn(104), Lsn(106), 5);
        assert_eq!((b.start(), b.end()), (Lsn(106), Lsn(114)));
    }
}
