//! Bounds-checked reading of little-endian record data.

use super::fault::Fault;

const TOO_SHORT: &str = "the record's data is shorter than its contents need";

/// Reads from the front of a record's bytes.
#[derive(Clone)]
pub(super) struct Cursor<'d> {
    bytes: &'d [u8],
    at: usize,
}

impl<'d> Cursor<'d> {
    pub(super) fn new(bytes: &'d [u8]) -> Cursor<'d> {
        Cursor { bytes, at: 0 }
    }

    pub(super) fn take(&mut self, count: usize) -> Result<&'d [u8], Fault> {
        let taken = self.bytes.get(self.at..).and_then(|rest| rest.get(..count));
        let taken = taken.ok_or(TOO_SHORT)?;
        self.at += count;
        Ok(taken)
    }

    /// The next `N` bytes where they are.
    pub(super) fn array_ref<const N: usize>(&mut self) -> Result<&'d [u8; N], Fault> {
        let taken = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk());
        let taken = taken.ok_or(TOO_SHORT)?;
        self.at += N;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        self.array_ref().copied()
    }

    pub(super) fn u8(&mut self) -> Result<u8, Fault> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16, Fault> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Fault> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// `count` numbers of 16 bits.
    pub(super) fn u16s(&mut self, count: usize) -> Result<Vec<u16>, Fault> {
        Ok(self.each_u16(count)?.collect())
    }

    /// `count` numbers of 16 bits, one by one.
    pub(super) fn each_u16(&mut self, count: usize) -> Result<impl Iterator<Item = u16> + use<'d>, Fault> {
        Ok(each_u16(self.take(count * 2)?))
    }

    /// Skips to the next multiple of `alignment`, counted from the data's start (block data starts aligned to 8).
    pub(super) fn align(&mut self, alignment: usize) {
        self.at = self.at.next_multiple_of(alignment);
    }

    pub(super) fn skip(&mut self, count: usize) -> Result<(), Fault> {
        self.take(count).map(|_| ())
    }

    /// All that is left.
    pub(super) fn rest(&mut self) -> &'d [u8] {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        self.at = self.bytes.len();
        rest
    }

    pub(super) fn is_empty(&self) -> bool {
        self.at >= self.bytes.len()
    }
}

/// The bytes as numbers of 16 bits; an odd last byte is left out.
pub(super) fn u16s(bytes: &[u8]) -> Vec<u16> {
    each_u16(bytes).collect()
}

/// As [`u16s`], one by one.
pub(super) fn each_u16(bytes: &[u8]) -> impl Iterator<Item = u16> {
    bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
}
