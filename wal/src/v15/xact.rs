//! Records of the Transaction resource manager (`access/xact.h`, parsed as in `access/rmgrdesc/xactdesc.c`).

use types::{ForkNumber, RelTag};

use super::{RelFileNode, rmgr, wire_struct};
use crate::record::DecodedRecord;

/// Info codes, under [`OPMASK`].
pub mod info {
    #![allow(missing_docs)]
    pub const COMMIT: u8 = 0x00;
    pub const PREPARE: u8 = 0x10;
    pub const ABORT: u8 = 0x20;
    pub const COMMIT_PREPARED: u8 = 0x30;
    pub const ABORT_PREPARED: u8 = 0x40;
    pub const ASSIGNMENT: u8 = 0x50;
    pub const INVALIDATIONS: u8 = 0x60;
    /// The operation's bits.
    pub const OPMASK: u8 = 0x70;
    /// Commit or abort has an `xinfo` field.
    pub const HAS_INFO: u8 = 0x80;
}

mod xinfo {
    pub const HAS_DBINFO: u32 = 1 << 0;
    pub const HAS_SUBXACTS: u32 = 1 << 1;
    pub const HAS_RELFILENODES: u32 = 1 << 2;
    pub const HAS_INVALS: u32 = 1 << 3;
    pub const HAS_TWOPHASE: u32 = 1 << 4;
    pub const HAS_ORIGIN: u32 = 1 << 5;
    pub const HAS_GID: u32 = 1 << 7;
    pub const HAS_DROPPED_STATS: u32 = 1 << 8;
}

/// `TWOPHASE_MAGIC` of `access/transam/twophase.c`.
pub const TWOPHASE_MAGIC: u32 = 0x57F9_4534;

/// A commit or abort record, of a plain or of a prepared transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParsedEnd {
    /// Committed (true) or aborted.
    pub committed: bool,
    /// The transaction that ends: of a prepared one its own id, not the id of the record. 0 for a transaction that had
    /// none (it only dropped files or sent invalidations).
    pub xid: u32,
    /// When, in microseconds since 2000-01-01 UTC.
    pub timestamp_us: i64,
    /// `XactCompletion*` and `XACT_XINFO_*` flags.
    pub xinfo: u32,
    /// Database, 0 when not said.
    pub db: u32,
    /// Its tablespace, 0 when not said.
    pub spc: u32,
    /// Subtransactions that end with it.
    pub subxacts: Vec<u32>,
    /// Main forks of the relations whose files go.
    pub rels: Vec<RelTag>,
    /// The prepared transaction that ends.
    pub twophase_xid: Option<u32>,
    /// Its global id.
    pub twophase_gid: Option<String>,
    /// Replication origin: its LSN and timestamp.
    pub origin: Option<(u64, i64)>,
}

/// Parses `COMMIT`, `ABORT`, `COMMIT_PREPARED` and `ABORT_PREPARED`. `Ok(None)` for any other record; errors say how the
/// record is malformed.
pub fn parse_end(record: &DecodedRecord<'_>) -> Result<Option<ParsedEnd>, &'static str> {
    if record.rmgr != rmgr::XACT {
        return Ok(None);
    }
    let (committed, prepared) = match record.info & info::OPMASK {
        info::COMMIT => (true, false),
        info::COMMIT_PREPARED => (true, true),
        info::ABORT => (false, false),
        info::ABORT_PREPARED => (false, true),
        _ => return Ok(None),
    };
    let mut end = parse_end_body(record, committed).ok_or("commit or abort record cut short")?;
    if prepared {
        end.xid = end.twophase_xid.ok_or("end of a prepared transaction without its xid")?;
    }
    Ok(Some(end))
}

fn parse_end_body(record: &DecodedRecord<'_>, committed: bool) -> Option<ParsedEnd> {
    let mut reader = Reader(record.main_data);
    let timestamp_us = i64::from_le_bytes(reader.take()?);
    let flags = if record.info & info::HAS_INFO != 0 { reader.u32()? } else { 0 };
    let has = |flag: u32| flags & flag != 0;
    let (db, spc) = if has(xinfo::HAS_DBINFO) { (reader.u32()?, reader.u32()?) } else { (0, 0) };
    let subxacts = if has(xinfo::HAS_SUBXACTS) {
        let count = reader.u32()?;
        reader.xids(count)?
    } else {
        Vec::new()
    };
    let rels = if has(xinfo::HAS_RELFILENODES) {
        let count = reader.u32()?;
        reader.rels(count)?
    } else {
        Vec::new()
    };
    if has(xinfo::HAS_DROPPED_STATS) {
        let count = reader.u32()?;
        reader.items(count, STATS_ITEM_BYTES)?;
    }
    if has(xinfo::HAS_INVALS) {
        let count = reader.u32()?;
        reader.items(count, INVALIDATION_BYTES)?;
    }
    let twophase_xid = if has(xinfo::HAS_TWOPHASE) { Some(reader.u32()?) } else { None };
    let twophase_gid = if twophase_xid.is_some() && has(xinfo::HAS_GID) { Some(reader.c_string()?) } else { None };
    let origin = if has(xinfo::HAS_ORIGIN) {
        Some((u64::from_le_bytes(reader.take()?), i64::from_le_bytes(reader.take()?)))
    } else {
        None
    };
    let xid = record.xid;
    Some(ParsedEnd {
        committed,
        xid,
        timestamp_us,
        xinfo: flags,
        db,
        spc,
        subxacts,
        rels,
        twophase_xid,
        twophase_gid,
        origin,
    })
}

const STATS_ITEM_BYTES: usize = 12;
const INVALIDATION_BYTES: usize = 16;

wire_struct! {
    /// `xl_xact_prepare`, which is also the header of a `pg_twophase` file (`TwoPhaseFileHeader`). Behind it, each part
    /// padded to 8: the global id, subtransactions, relations dropped at commit, at abort, statistics of each,
    /// invalidations.
    #[allow(missing_docs)]
    pub struct XactPrepare {
        magic: u32,
        total_len: u32,
        xid: u32,
        database: u32,
        prepared_at: i64,
        owner: u32,
        nsubxacts: u32,
        ncommitrels: u32,
        nabortrels: u32,
        ncommitstats: u32,
        nabortstats: u32,
        ninvalmsgs: u32,
        initfileinval: u8,
        padding: u8,
        gidlen: u16,
        origin_lsn: u64,
        origin_timestamp: i64,
    }
}

/// A `PREPARE` record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParsedPrepare {
    /// The prepared transaction.
    pub xid: u32,
    /// Its global id.
    pub gid: String,
    /// Its subtransactions.
    pub subxacts: Vec<u32>,
    /// Where it was prepared at its replication origin; 0 when it has none.
    pub origin_lsn: u64,
}

/// Parses a `PREPARE` record. `Ok(None)` for any other record.
pub fn parse_prepare(record: &DecodedRecord<'_>) -> Result<Option<ParsedPrepare>, &'static str> {
    if record.rmgr != rmgr::XACT || record.info & info::OPMASK != info::PREPARE {
        return Ok(None);
    }
    let header = XactPrepare::from_prefix(record.main_data).ok_or("prepare record cut short")?;
    if header.magic != TWOPHASE_MAGIC {
        return Err("prepare record with another magic number");
    }
    let rest = &record.main_data[XactPrepare::SIZE..];
    let gid_length = usize::from(header.gidlen);
    let padded = (gid_length + 7) & !7;
    let (Some(gid), Some(subxacts)) = (rest.get(..gid_length), rest.get(padded..)) else {
        return Err("prepare record cut short");
    };
    let subxacts = Reader(subxacts).xids(header.nsubxacts).ok_or("prepare record cut short")?;
    let gid = String::from_utf8_lossy(gid).trim_end_matches('\0').to_owned();
    Ok(Some(ParsedPrepare { xid: header.xid, gid, subxacts, origin_lsn: header.origin_lsn }))
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn items(&mut self, count: u32, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked((count as usize).checked_mul(bytes)?)?;
        self.0 = rest;
        Some(taken)
    }

    fn xids(&mut self, count: u32) -> Option<Vec<u32>> {
        let bytes = self.items(count, 4)?;
        Some(bytes.chunks_exact(4).map(|xid| u32::from_le_bytes([xid[0], xid[1], xid[2], xid[3]])).collect())
    }

    fn rels(&mut self, count: u32) -> Option<Vec<RelTag>> {
        let bytes = self.items(count, RelFileNode::SIZE)?;
        let nodes = bytes.chunks_exact(RelFileNode::SIZE).filter_map(RelFileNode::from_prefix);
        Some(nodes.map(|node| node.fork(ForkNumber::Main)).collect())
    }

    fn c_string(&mut self) -> Option<String> {
        let length = self.0.iter().position(|byte| *byte == 0)?;
        let text = String::from_utf8_lossy(&self.0[..length]).into_owned();
        self.0 = &self.0[length + 1..];
        Some(text)
    }
}
