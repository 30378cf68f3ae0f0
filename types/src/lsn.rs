//! Positions in the write-ahead log.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Bytes in a WAL page (`XLOG_BLCKSZ` of a stock build).
pub const XLOG_PAGE_BYTES: u64 = 8192;

/// Bytes in a WAL segment file (`wal_segment_size`; `initdb`'s default, the only size Dormouse makes).
pub const WAL_SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

/// A byte position in a branch's WAL (`XLogRecPtr`). Zero is Postgres's "invalid".
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Postgres's `InvalidXLogRecPtr`.
    pub const INVALID: Lsn = Lsn(0);
    /// The largest position.
    pub const MAX: Lsn = Lsn(u64::MAX);

    /// False for [`Lsn::INVALID`].
    pub fn is_valid(self) -> bool {
        self.0 != 0
    }

    /// Rounded up to the 8-byte boundary on which records start (`MAXALIGN`).
    pub fn align_up(self) -> Lsn {
        Lsn((self.0 + 7) & !7)
    }

    /// Number of the segment file that holds this byte.
    pub fn segment_number(self) -> u64 {
        self.0 / WAL_SEGMENT_BYTES
    }

    /// Offset of this byte in its segment file.
    pub fn segment_offset(self) -> u64 {
        self.0 % WAL_SEGMENT_BYTES
    }

    /// Start of the segment that holds this byte.
    pub fn segment_start(self) -> Lsn {
        Lsn(self.0 - self.segment_offset())
    }

    /// Offset of this byte in its WAL page.
    pub fn page_offset(self) -> u64 {
        self.0 % XLOG_PAGE_BYTES
    }

    /// Start of the WAL page that holds this byte.
    pub fn page_start(self) -> Lsn {
        Lsn(self.0 - self.page_offset())
    }

    /// Bytes from `earlier` to here; `None` when `earlier` is later.
    pub fn checked_sub(self, earlier: Lsn) -> Option<u64> {
        self.0.checked_sub(earlier.0)
    }

    /// Name of the segment file that holds this byte, on timeline 1: `000000010000000000000001`.
    pub fn segment_file_name(self) -> String {
        let per_id = 0x1_0000_0000 / WAL_SEGMENT_BYTES;
        let number = self.segment_number();
        format!("{:08X}{:08X}{:08X}", 1, number / per_id, number % per_id)
    }
}

impl std::ops::Add<u64> for Lsn {
    type Output = Lsn;
    fn add(self, bytes: u64) -> Lsn {
        Lsn(self.0 + bytes)
    }
}

impl std::ops::AddAssign<u64> for Lsn {
    fn add_assign(&mut self, bytes: u64) {
        self.0 += bytes;
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text was not two hexadecimal numbers joined by a slash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an LSN (expected two hexadecimal numbers such as 0/16B3748): {0:?}")]
pub struct LsnParseError(String);

impl FromStr for Lsn {
    type Err = LsnParseError;
    fn from_str(text: &str) -> Result<Lsn, LsnParseError> {
        let error = || LsnParseError(text.chars().take(64).collect());
        let half = |part: &str| {
            let plain = !part.is_empty() && part.len() <= 8 && part.bytes().all(|b| b.is_ascii_hexdigit());
            if plain { u64::from_str_radix(part, 16).map_err(|_| error()) } else { Err(error()) }
        };
        let (high, low) = text.split_once('/').ok_or_else(error)?;
        Ok(Lsn(half(high)? << 32 | half(low)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips() {
        for lsn in [Lsn(0), Lsn(0x16B_3748), Lsn(0x1_0000_0000), Lsn::MAX] {
            assert_eq!(lsn.to_string().parse::<Lsn>(), Ok(lsn));
        }
    }

    #[test]
    fn bad_text_is_refused() {
        for text in ["", "0", "/", "0/", "/0", "g/0", "0/100000000", "+1/0", "0/0/0"] {
            assert!(text.parse::<Lsn>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn segment_names_are_postgres_names() {
        assert_eq!(Lsn(0x0100_0000).segment_file_name(), "000000010000000000000001");
        assert_eq!(Lsn(0x1_0200_0001).segment_file_name(), "000000010000000100000002");
    }
}
