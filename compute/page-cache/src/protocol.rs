//! What shim and agent say to each other over the Unix socket: one request, one response (but for what is only announced), in turn.

use types::{BlockNumber, ForkNumber, PAGE_BYTES, RelTag};

/// Bytes of an encoded [`Request`].
pub const REQUEST_BYTES: usize = 24;

/// Bytes of an encoded [`ResponseHead`].
pub const RESPONSE_HEAD_BYTES: usize = 16;

/// Bytes of one relation in the answer to [`Op::ListRels`].
pub const LISTED_REL_BYTES: usize = 12;

/// Most relations in one answer; a directory with more is an error.
pub const MAX_LISTED_RELS: usize = 8 << 20;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// A page; the answer's payload is the page.
    GetPage = 1,
    /// A fork's size; the answer's `value` is [`RelSize`].
    RelSize = 2,
    /// The relations of `spc` and `db`; the payload is a sequence of listed relations.
    ListRels = 3,
    /// Wait until a quorum holds the WAL written so far.
    SyncWal = 4,
    /// Pages from this one on will probably be wanted soon. There is no answer.
    ReadAhead = 5,
    /// Much WAL has been written since the last sync or the last such message. There is no answer.
    WalWritten = 6,
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// With what relation; for [`Op::ListRels`] only its tablespace and database count.
    pub rel: RelTag,
    /// For [`Op::GetPage`].
    pub block: BlockNumber,
}

impl Request {
    /// As it goes over the socket.
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[0] = self.op as u8;
        bytes[1] = self.rel.fork as u8;
        let words = [self.rel.spc, self.rel.db, self.rel.rel, self.block];
        for (index, word) in words.into_iter().enumerate() {
            bytes[4 + index * 4..8 + index * 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// `None` when it is none of ours.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Request> {
        let op = [Op::GetPage, Op::RelSize, Op::ListRels, Op::SyncWal, Op::ReadAhead, Op::WalWritten]
            .into_iter()
            .find(|op| *op as u8 == bytes[0])?;
        let fork = ForkNumber::try_from(bytes[1]).ok()?;
        let word = |index: usize| read_word(bytes, 4 + index * 4);
        Some(Request { op, rel: RelTag { spc: word(0), db: word(1), rel: word(2), fork }, block: word(3) })
    }
}

/// The start of a response; `payload_bytes` follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResponseHead {
    /// Zero, or an errno.
    pub errno: i32,
    /// Length of what follows.
    pub payload_bytes: u32,
    /// Blocks, for [`Op::RelSize`].
    pub value: u32,
    /// For [`Op::RelSize`]: whether the fork exists.
    pub present: bool,
}

impl ResponseHead {
    /// As it goes over the socket.
    pub fn encode(&self) -> [u8; RESPONSE_HEAD_BYTES] {
        let mut bytes = [0; RESPONSE_HEAD_BYTES];
        bytes[0..4].copy_from_slice(&self.errno.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.value.to_le_bytes());
        bytes[12] = u8::from(self.present);
        bytes
    }

    /// `None` when it can't be an answer to `op`.
    pub fn decode(bytes: &[u8; RESPONSE_HEAD_BYTES], op: Op) -> Option<ResponseHead> {
        let head = ResponseHead {
            errno: read_word(bytes, 0).cast_signed(),
            payload_bytes: read_word(bytes, 4),
            value: read_word(bytes, 8),
            present: bytes[12] == 1,
        };
        let payload = head.payload_bytes as usize;
        let fits = match op {
            Op::GetPage => payload == PAGE_BYTES,
            Op::RelSize | Op::SyncWal | Op::ReadAhead | Op::WalWritten => payload == 0,
            Op::ListRels => payload.is_multiple_of(LISTED_REL_BYTES) && payload / LISTED_REL_BYTES <= MAX_LISTED_RELS,
        };
        (if head.errno == 0 { fits } else { payload == 0 }).then_some(head)
    }
}

/// One relation of a listing.
pub fn encode_listed(rel: &RelTag, blocks: BlockNumber) -> [u8; LISTED_REL_BYTES] {
    let mut bytes = [0; LISTED_REL_BYTES];
    bytes[0..4].copy_from_slice(&rel.rel.to_le_bytes());
    bytes[4] = rel.fork as u8;
    bytes[8..12].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

/// Back from [`encode_listed`]: relation number, fork, blocks. `None` for an unknown fork.
pub fn decode_listed(bytes: &[u8; LISTED_REL_BYTES]) -> Option<(u32, ForkNumber, BlockNumber)> {
    Some((read_word(bytes, 0), ForkNumber::try_from(bytes[4]).ok()?, read_word(bytes, 8)))
}

fn read_word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    const REL: RelTag = RelTag { spc: 1663, db: 5, rel: 0xFFFF_FFFF, fork: ForkNumber::Vm };

    #[test]
    fn requests_round_trip_and_others_are_refused() {
        let request = Request { op: Op::ListRels, rel: REL, block: 7 };
        let bytes = request.encode();
        assert_eq!(Request::decode(&bytes), Some(request));
        for (at, value) in [(0, 0), (0, 7), (1, 4)] {
            let mut bad = bytes;
            bad[at] = value;
            assert_eq!(Request::decode(&bad), None);
        }
    }

    #[test]
    fn a_response_must_fit_its_request() {
        let head = ResponseHead { errno: 0, payload_bytes: 8192, value: 0, present: false };
        assert_eq!(ResponseHead::decode(&head.encode(), Op::GetPage), Some(head));
        assert_eq!(ResponseHead::decode(&head.encode(), Op::SyncWal), None);
        assert_eq!(ResponseHead::decode(&head.encode(), Op::ListRels), None);
        let error = ResponseHead { errno: libc::EIO, payload_bytes: 0, ..head };
        assert_eq!(ResponseHead::decode(&error.encode(), Op::GetPage), Some(error));
        assert_eq!(decode_listed(&encode_listed(&REL, 9)), Some((REL.rel, REL.fork, 9)));
    }
}
