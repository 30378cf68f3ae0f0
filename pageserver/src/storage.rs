//! Everything that is stored: the keys of a branch, the values under them, and who writes which.
//!
//! A branch is a map from ([`Key`], LSN) to [`Value`]. What stands under a key as of an LSN is the newest value at or
//! before it, looked for in the branch itself and then, as of where the branch left it, in its ancestor.
//!
//! | kind | key fields used | value | written by |
//! |---|---|---|---|
//! | [`Kind::ControlFile`] | – | `pg_control` as `initdb` left it | template import |
//! | [`Kind::CheckPoint`] | – | `CheckPoint` struct, 88 bytes | each record that moves a counter |
//! | [`Kind::CheckPoint`] | rel = a replication origin's number | LSN at the origin, `u64`: applied so far | what a subscription applies |
//! | [`Kind::RelationMap`] | spc, db | `pg_filenode.map`, 512 bytes | relation map records |
//! | [`Kind::Database`] | spc, db | empty: the directory exists | database records |
//! | [`Kind::Tablespace`] | spc | its path | tablespace records |
//! | [`Kind::TwoPhase`] | rel = xid | the `pg_twophase` file | prepare, commit and abort records |
//! | [`Kind::AuxFile`] | a hash of the path in spc, db, rel, block | path and content | the agent's logical messages |
//! | [`Kind::SlruPage`] | spc = [`SlruKind`], block = page | page image or record | transaction records |
//! | [`Kind::RelSize`] | spc, db, rel, fork | blocks, `u32` | whatever creates, extends, cuts or drops a fork |
//! | [`Kind::CommitTime`] | block = seconds since 2000 | [`CommitTime`] | commits that are later than all before them |
//! | [`Kind::RelPage`] | spc, db, rel, fork, block | page image or record | records that touch the page |
//!
//! A page of zeroes is stored as an empty image. When a fork grows, each new block gets a value that needs no older one
//! (the growing record itself, if it initialises the page, else zeroes at [`just_before`] the record): what a block held
//! before the fork was cut there can't come back. `CommitTime` is history, never "current": it is in no image layer.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use types::{BlockNumber, ForkNumber, Lsn, Oid, PageTag, RelTag};
use wal_redo::SlruKind;

/// What a key is about. The numbers are stored; metadata sorts before pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// The whole `pg_control`.
    ControlFile = 0,
    /// The counters of the `CheckPoint` struct, and replication origins' progress.
    CheckPoint = 1,
    /// A `pg_filenode.map`.
    RelationMap = 2,
    /// A database directory.
    Database = 3,
    /// A tablespace.
    Tablespace = 4,
    /// A prepared transaction.
    TwoPhase = 5,
    /// A small file kept by the agent.
    AuxFile = 6,
    /// A page of `pg_xact` and its like.
    SlruPage = 7,
    /// A fork's size in blocks.
    RelSize = 8,
    /// When commits happened.
    CommitTime = 9,
    /// A page of a relation.
    RelPage = 10,
}

impl Kind {
    const ALL: [Kind; 11] = [
        Kind::ControlFile,
        Kind::CheckPoint,
        Kind::RelationMap,
        Kind::Database,
        Kind::Tablespace,
        Kind::TwoPhase,
        Kind::AuxFile,
        Kind::SlruPage,
        Kind::RelSize,
        Kind::CommitTime,
        Kind::RelPage,
    ];
}

/// Where a value stands. Ordered by its fields from first to last.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// What it is about.
    pub kind: Kind,
    /// Tablespace (or what the table above says).
    pub spc: Oid,
    /// Database.
    pub db: Oid,
    /// Relation file number.
    pub rel: Oid,
    /// Fork number.
    pub fork: u8,
    /// Block.
    pub block: BlockNumber,
}

/// Bytes of an encoded [`Key`].
pub const KEY_BYTES: usize = 18;

impl Key {
    /// The smallest key.
    pub const MIN: Key = Key::of(Kind::ControlFile);
    /// The largest key.
    pub const MAX: Key =
        Key { kind: Kind::RelPage, spc: u32::MAX, db: u32::MAX, rel: u32::MAX, fork: u8::MAX, block: u32::MAX };
    /// `pg_control`.
    pub const CONTROL_FILE: Key = Key::of(Kind::ControlFile);
    /// The counters.
    pub const CHECKPOINT: Key = Key::of(Kind::CheckPoint);

    /// The smallest key of a kind.
    pub const fn of(kind: Kind) -> Key {
        Key { kind, spc: 0, db: 0, rel: 0, fork: 0, block: 0 }
    }

    /// The largest key of a kind.
    pub const fn last_of(kind: Kind) -> Key {
        Key { kind, ..Key::MAX }
    }

    /// A relation page.
    pub fn page(tag: PageTag) -> Key {
        Key { block: tag.block, kind: Kind::RelPage, ..Key::rel_size(tag.rel) }
    }

    /// True for what records are stored about: pages of relations and SLRU pages.
    pub fn is_page(&self) -> bool {
        matches!(self.kind, Kind::RelPage | Kind::SlruPage)
    }

    /// A fork's size.
    pub fn rel_size(rel: RelTag) -> Key {
        Key { kind: Kind::RelSize, spc: rel.spc, db: rel.db, rel: rel.rel, fork: rel.fork as u8, block: 0 }
    }

    /// An SLRU page.
    pub fn slru(slru: SlruKind, page: u32) -> Key {
        Key { spc: slru as u32, block: page, ..Key::of(Kind::SlruPage) }
    }

    /// A relation map.
    pub fn relation_map(spc: Oid, db: Oid) -> Key {
        Key { spc, db, ..Key::of(Kind::RelationMap) }
    }

    /// A database directory.
    pub fn database(spc: Oid, db: Oid) -> Key {
        Key { spc, db, ..Key::of(Kind::Database) }
    }

    /// A tablespace.
    pub fn tablespace(oid: Oid) -> Key {
        Key { spc: oid, ..Key::of(Kind::Tablespace) }
    }

    /// A prepared transaction.
    pub fn two_phase(xid: u32) -> Key {
        Key { rel: xid, ..Key::of(Kind::TwoPhase) }
    }

    /// A replication origin's progress. Origins are numbered from 1.
    pub fn origin(origin: u16) -> Key {
        Key { rel: u32::from(origin), ..Key::CHECKPOINT }
    }

    /// The origin, for keys of origins' progress.
    pub fn origin_number(&self) -> Option<u16> {
        let number = u16::try_from(self.rel).ok()?;
        (self.kind == Kind::CheckPoint && number != 0).then_some(number)
    }

    /// A file kept by the agent.
    pub fn aux_file(path: &str) -> Key {
        let digest = Sha256::digest(path.as_bytes());
        let word = |at: usize| u32::from_be_bytes([digest[at], digest[at + 1], digest[at + 2], digest[at + 3]]);
        Key { spc: word(0), db: word(4), rel: word(8), block: word(12), ..Key::of(Kind::AuxFile) }
    }

    /// Commits within a second since 2000-01-01.
    pub fn commit_time(second: u32) -> Key {
        Key { block: second, ..Key::of(Kind::CommitTime) }
    }

    /// The fork, for keys of relation pages and sizes.
    pub fn rel_tag(&self) -> Option<RelTag> {
        let fork = ForkNumber::try_from(self.fork).ok()?;
        let of_relation = matches!(self.kind, Kind::RelPage | Kind::RelSize);
        of_relation.then_some(RelTag { spc: self.spc, db: self.db, rel: self.rel, fork })
    }

    /// The area, for keys of SLRU pages.
    pub fn slru_kind(&self) -> Option<SlruKind> {
        let slru = SlruKind::ALL.into_iter().find(|slru| *slru as u32 == self.spc);
        slru.filter(|_| self.kind == Kind::SlruPage)
    }

    /// Fixed-size encoding, in the same order as the keys.
    pub fn encode(&self) -> [u8; KEY_BYTES] {
        let mut bytes = [0; KEY_BYTES];
        let mut out = &mut bytes[..];
        out.put_u8(self.kind as u8);
        out.put_u32(self.spc);
        out.put_u32(self.db);
        out.put_u32(self.rel);
        out.put_u8(self.fork);
        out.put_u32(self.block);
        bytes
    }

    /// The key right behind this one; `None` behind the last.
    pub fn next(&self) -> Option<Key> {
        let mut bytes = self.encode();
        for byte in bytes.iter_mut().rev() {
            *byte = byte.wrapping_add(1);
            if *byte != 0 {
                break;
            }
        }
        Key::decode(&bytes)
    }

    /// The key right before this one; `None` before the first.
    pub fn previous(&self) -> Option<Key> {
        let mut bytes = self.encode();
        for byte in bytes.iter_mut().rev() {
            *byte = byte.wrapping_sub(1);
            if *byte != u8::MAX {
                break;
            }
        }
        Key::decode(&bytes)
    }

    /// Reads what [`Key::encode`] wrote; `None` for an unknown kind.
    pub fn decode(bytes: &[u8; KEY_BYTES]) -> Option<Key> {
        let mut from = &bytes[..];
        let number = from.get_u8();
        let kind = Kind::ALL.into_iter().find(|kind| *kind as u8 == number)?;
        let (spc, db, rel) = (from.get_u32(), from.get_u32(), from.get_u32());
        Some(Key { kind, spc, db, rel, fork: from.get_u8(), block: from.get_u32() })
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.kind, self.rel_tag(), self.slru_kind()) {
            (Kind::RelPage, Some(rel), _) => write!(f, "{rel} block {}", self.block),
            (Kind::RelSize, Some(rel), _) => write!(f, "size of {rel}"),
            (_, _, Some(slru)) => write!(f, "{} page {}", slru.directory(), self.block),
            (kind, _, _) => write!(f, "{kind:?} {}/{}/{}/{}", self.spc, self.db, self.rel, self.block),
        }
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// In JSON (manifests) a key is hexadecimal text.
impl Serialize for Key {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text: String = self.encode().iter().map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Key, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bad = || serde::de::Error::custom("not a key");
        if !text.is_ascii() || text.len() != KEY_BYTES * 2 {
            return Err(bad());
        }
        let mut bytes = [0; KEY_BYTES];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| bad())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| bad())?;
        }
        Key::decode(&bytes).ok_or_else(bad)
    }
}

/// What stands under a key as of an LSN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Nothing any more.
    Tombstone,
    /// The content itself. Of a page: 8192 bytes, or none for zeroes.
    Image(Bytes),
    /// A WAL record that makes the content from the one before, or, with `will_init`, from nothing.
    Record(StoredRecord),
}

/// A WAL record as stored: all that is needed to decode it again. Its end is the LSN it is stored at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRecord {
    /// Redo does not need the page's older content.
    pub will_init: bool,
    /// At most so many records are replayed to get here from a value that needs no older one, this one counted; it may be
    /// fewer. 0 while that is not known, in memory.
    pub depth: u8,
    /// Where its header starts.
    pub start_lsn: Lsn,
    /// The record without WAL page headers.
    pub raw: Bytes,
}

const TAG_TOMBSTONE: u8 = 0;
const TAG_IMAGE: u8 = 1;
const TAG_RECORD: u8 = 2;
const TAG_INIT_RECORD: u8 = 3;

impl Value {
    /// A page of zeroes.
    pub const ZERO_PAGE: Value = Value::Image(Bytes::new());

    /// A replication origin's progress.
    pub fn origin(remote_lsn: Lsn) -> Value {
        Value::Image(Bytes::copy_from_slice(&remote_lsn.0.to_le_bytes()))
    }

    /// A fork's size.
    pub fn rel_size(blocks: BlockNumber) -> Value {
        Value::Image(Bytes::copy_from_slice(&blocks.to_le_bytes()))
    }

    /// True when no older value is needed to know the content.
    pub fn is_initial(&self) -> bool {
        match self {
            Value::Tombstone | Value::Image(_) => true,
            Value::Record(record) => record.will_init,
        }
    }

    /// About how much memory it takes.
    pub fn weight(&self) -> usize {
        match self {
            Value::Tombstone => 0,
            Value::Image(bytes) => bytes.len(),
            Value::Record(record) => record.raw.len() + 16,
        }
    }

    /// Appends the encoding.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        match self {
            Value::Tombstone => out.put_u8(TAG_TOMBSTONE),
            Value::Image(bytes) => {
                out.put_u8(TAG_IMAGE);
                out.put_slice(bytes);
            }
            Value::Record(record) => {
                out.put_u8(if record.will_init { TAG_INIT_RECORD } else { TAG_RECORD });
                out.put_u8(record.depth);
                out.put_u64_le(record.start_lsn.0);
                out.put_slice(&record.raw);
            }
        }
    }

    /// [`StoredRecord::depth`] of an encoded value; 0 of others.
    pub fn encoded_depth(bytes: &[u8]) -> u8 {
        match bytes {
            [TAG_RECORD | TAG_INIT_RECORD, depth, ..] => *depth,
            _ => 0,
        }
    }

    /// Reads what [`Value::encode_into`] wrote; `None` when it is something else.
    pub fn decode(mut bytes: Bytes) -> Option<Value> {
        if bytes.is_empty() {
            return None;
        }
        match bytes.get_u8() {
            TAG_TOMBSTONE => bytes.is_empty().then_some(Value::Tombstone),
            TAG_IMAGE => Some(Value::Image(bytes)),
            tag @ (TAG_RECORD | TAG_INIT_RECORD) if bytes.len() >= 9 => {
                let depth = bytes.get_u8();
                let start_lsn = Lsn(bytes.get_u64_le());
                Some(Value::Record(StoredRecord { will_init: tag == TAG_INIT_RECORD, depth, start_lsn, raw: bytes }))
            }
            _unknown_tag => None,
        }
    }
}

/// The value under a [`Kind::RelSize`] key.
pub fn decode_rel_size(content: &[u8]) -> Option<BlockNumber> {
    content.try_into().ok().map(u32::from_le_bytes)
}

/// The value under an origin's key ([`Key::origin`]).
pub fn decode_origin(content: &[u8]) -> Option<Lsn> {
    content.try_into().ok().map(|bytes| Lsn(u64::from_le_bytes(bytes)))
}

/// A commit later than every one before it on its branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitTime {
    /// Microseconds since 2000-01-01 UTC.
    pub timestamp_us: i64,
    /// End of the record before the commit: the last position that does not include it.
    pub before: Lsn,
}

impl CommitTime {
    /// The key it is filed under. Times outside 2000 to 2136 count as the nearest of them.
    pub fn key(timestamp_us: i64) -> Key {
        let seconds = timestamp_us.div_euclid(1_000_000).clamp(0, i64::from(u32::MAX));
        Key::commit_time(seconds as u32)
    }

    /// As a value.
    pub fn to_value(self) -> Value {
        let mut bytes = BytesMut::with_capacity(16);
        bytes.put_i64_le(self.timestamp_us);
        bytes.put_u64_le(self.before.0);
        Value::Image(bytes.freeze())
    }

    /// From a value's content.
    pub fn decode(mut content: &[u8]) -> Option<CommitTime> {
        if content.len() != 16 {
            return None;
        }
        Some(CommitTime { timestamp_us: content.get_i64_le(), before: Lsn(content.get_u64_le()) })
    }
}

/// A file kept by the agent, as stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuxFile {
    /// Relative to the data directory.
    pub path: String,
    /// Whole content.
    pub content: Bytes,
}

/// A position after every record before the one that ends at `end_lsn`, and before that one: where zeroes are put under
/// a page that the record finds new. No record ends there (ends are multiples of 8, records longer than that).
pub fn just_before(end_lsn: Lsn) -> Lsn {
    Lsn(end_lsn.0.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_round_trip_in_order() {
        let rel = RelTag { spc: 1663, db: 5, rel: 16384, fork: ForkNumber::Vm };
        let keys = [
            Key::CONTROL_FILE,
            Key::CHECKPOINT,
            Key::relation_map(1664, 0),
            Key::slru(SlruKind::CommitTs, 7),
            Key::rel_size(rel),
            Key::page(PageTag { rel, block: 1 }),
            Key::page(PageTag { rel, block: 256 }),
            Key::MAX,
        ];
        for pair in keys.windows(2) {
            assert!(pair[0] < pair[1] && pair[0].encode() < pair[1].encode(), "{pair:?}");
        }
        for key in keys {
            assert_eq!(Key::decode(&key.encode()), Some(key));
            let json = serde_json::to_string(&key).expect("json");
            assert_eq!(serde_json::from_str::<Key>(&json).expect("key"), key);
        }
        assert_eq!(Key::decode(&[99; KEY_BYTES]), None);
    }

    #[test]
    fn neighbours_are_next_to_each_other() {
        let rel = RelTag { spc: 1663, db: 5, rel: 16384, fork: ForkNumber::Vm };
        let full = Key { block: u32::MAX, ..Key::page(PageTag { rel, block: 0 }) };
        let keys = [
            (full, Key { fork: 3, block: 0, ..full }),
            (Key { fork: u8::MAX, ..full }, Key { rel: 16385, fork: 0, block: 0, ..full }),
            (Key { rel: u32::MAX, fork: u8::MAX, ..full }, Key { db: 6, rel: 0, fork: 0, block: 0, ..full }),
            (Key::last_of(Kind::CommitTime), Key::of(Kind::RelPage)),
        ];
        for (low, high) in keys {
            assert_eq!(low.next(), Some(high));
            assert_eq!(high.previous(), Some(low));
        }
        assert_eq!(Key::MAX.next(), None);
        assert_eq!(Key::MIN.previous(), None);
    }

    #[test]
    fn values_round_trip() {
        let record =
            |will_init| StoredRecord { will_init, depth: 3, start_lsn: Lsn(9), raw: Bytes::from_static(b"raw") };
        let values = [
            Value::Tombstone,
            Value::ZERO_PAGE,
            Value::rel_size(7),
            Value::Record(record(true)),
            Value::Record(record(false)),
        ];
        for value in values {
            let mut bytes = Vec::new();
            value.encode_into(&mut bytes);
            assert_eq!(Value::decode(bytes.into()), Some(value));
        }
        for bad in [&b""[..], b"\x09", b"\x00x", b"\x02short"] {
            assert_eq!(Value::decode(Bytes::copy_from_slice(bad)), None, "{bad:?}");
        }
    }
}
