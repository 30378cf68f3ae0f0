//! One piece of committed WAL as an object: its name and its bytes.
//!
//! Named by the range of its WAL, `<begin>-<end>`, each 16 hexadecimal digits; both are ends of whole records. Committed WAL is the same on
//! whichever safekeeper, so two objects of one name say the same, and where two ranges overlap they agree.
//!
//! The bytes: magic (u32), format version (u32), begin (u64), end (u64), CRC32C of begin, end and body (u32), body (the WAL, zstd);
//! integers little-endian.

use bytes::Bytes;
use object_store::path::Path;
use types::Lsn;

const MAGIC: u32 = 0x4C41_574D;
const FORMAT_VERSION: u32 = 1;
const HEADER_BYTES: usize = 28;
/// WAL is written once and read seldom: the fastest level already halves it.
const COMPRESSION_LEVEL: i32 = 1;

/// Which WAL an object holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WalObject {
    /// Position of its first byte.
    pub begin: Lsn,
    /// Behind its last byte.
    pub end: Lsn,
}

impl WalObject {
    /// The last part of its key.
    pub fn name(&self) -> String {
        format!("{:016x}-{:016x}", self.begin.0, self.end.0)
    }

    /// Of a key's last part; `None` for other objects.
    pub fn of(key: &Path) -> Option<WalObject> {
        let (begin, end) = key.filename()?.split_once('-')?;
        let lsn = |digits: &str| u64::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 16).map(Lsn);
        let object = WalObject { begin: lsn(begin)?, end: lsn(end)? };
        (object.begin < object.end).then_some(object)
    }

    /// True when the byte at this position is in it.
    pub fn has(&self, position: Lsn) -> bool {
        self.begin <= position && position < self.end
    }

    /// The object's bytes, of WAL that is as long as its range.
    pub fn encode(&self, wal: &[u8]) -> std::io::Result<Bytes> {
        let body = zstd::bulk::compress(wal, COMPRESSION_LEVEL)?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend_from_slice(&MAGIC.to_le_bytes());
        bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.begin.0.to_le_bytes());
        bytes.extend_from_slice(&self.end.0.to_le_bytes());
        bytes.extend_from_slice(&self.checksum(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
        Ok(bytes.into())
    }

    /// The WAL. An error says what is wrong with the bytes.
    pub fn decode(&self, bytes: &[u8]) -> Result<Bytes, String> {
        let (header, body) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or("it is cut short")?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if word(0) != MAGIC {
            return Err("it does not hold WAL".to_owned());
        }
        if word(4) != FORMAT_VERSION {
            return Err(format!("format version {}, this program knows {FORMAT_VERSION}", word(4)));
        }
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        if (long(8), long(16)) != (self.begin.0, self.end.0) {
            return Err(format!("it holds WAL from {} to {}", Lsn(long(8)), Lsn(long(16))));
        }
        if word(24) != self.checksum(body) {
            return Err("checksum mismatch".to_owned());
        }
        let length = (self.end.0 - self.begin.0) as usize;
        let wal = zstd::bulk::decompress(body, length).map_err(|error| error.to_string())?;
        if wal.len() != length {
            return Err(format!("it holds {} bytes of {length}", wal.len()));
        }
        Ok(wal.into())
    }

    fn checksum(&self, body: &[u8]) -> u32 {
        let crc = crc32c::crc32c(&self.begin.0.to_le_bytes());
        crc32c::crc32c_append(crc32c::crc32c_append(crc, &self.end.0.to_le_bytes()), body)
    }
}

/// Up to where objects follow on one another from a position on: the position itself when none holds it.
pub fn covered_from(objects: &[WalObject], position: Lsn) -> Lsn {
    let mut end = position;
    while let Some(next) = objects.iter().filter(|object| object.has(end)).map(|object| object.end).max() {
        end = next;
    }
    end
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;

    fn object(begin: u64, end: u64) -> WalObject {
        WalObject { begin: Lsn(begin), end: Lsn(end) }
    }

    #[test]
    fn names_are_read_back_and_others_are_not() {
        let one = object(0x150_0028, 0x1_0000_0000);
        let key = Path::from("projects/p/branches/b/wal").join(one.name());
        assert_eq!(key.filename(), Some("0000000001500028-0000000100000000"));
        assert_eq!(WalObject::of(&key), Some(one));
        for other in ["0-1", "0000000000000002-0000000000000001", "manifest-00000001", "x"] {
            assert_eq!(WalObject::of(&Path::from(other)), None, "{other}");
        }
    }

    #[test]
    fn coverage_goes_as_far_as_there_is_no_gap() {
        let objects = [object(8, 24), object(16, 40), object(24, 32), object(48, 56)];
        assert_eq!(covered_from(&objects, Lsn(8)), Lsn(40));
        assert_eq!(covered_from(&objects, Lsn(30)), Lsn(40));
        assert_eq!(covered_from(&objects, Lsn(0)), Lsn(0));
        assert_eq!(covered_from(&objects, Lsn(40)), Lsn(40));
        assert_eq!(covered_from(&objects, Lsn(48)), Lsn(56));
    }

    proptest! {
        #[test]
        fn what_is_stored_comes_back_and_nothing_damaged_does(
            wal in vec(any::<u8>(), 1..3000),
            begin in 0..u64::MAX / 2,
            at: Index,
            flip in 1..=255u8,
        ) {
            let object = object(begin, begin + wal.len() as u64);
            let bytes = object.encode(&wal).expect("encode");
            prop_assert_eq!(object.decode(&bytes).expect("decode"), Bytes::from(wal));
            let mut damaged = bytes.to_vec();
            let at = at.index(damaged.len());
            damaged[at] ^= flip;
            prop_assert!(object.decode(&damaged).is_err());
            prop_assert!(object.decode(&bytes[..at]).is_err());
        }

        #[test]
        fn random_bytes_are_an_error(bytes in vec(any::<u8>(), 0..200)) {
            prop_assert!(object(8, 16).decode(&bytes).is_err());
        }
    }
}
