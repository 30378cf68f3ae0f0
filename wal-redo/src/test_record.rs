//! Records made by hand, for tests.

use bytes::Bytes;
use types::{BlockNumber, ForkNumber, Lsn, RelTag};
use wal::{BlockRef, DecodedRecord, RmgrId};

pub(crate) const REL: RelTag = RelTag { spc: 1663, db: 5, rel: 16384, fork: ForkNumber::Main };

pub(crate) fn record(rmgr: RmgrId, info: u8, main_data: Vec<u8>) -> DecodedRecord {
    DecodedRecord {
        start_lsn: Lsn(0x100),
        end_lsn: Lsn(0x200),
        prev_lsn: Lsn(0x80),
        xid: 0,
        rmgr,
        info,
        blocks: Vec::new(),
        main_data: main_data.into(),
        origin: None,
        raw: Bytes::new(),
    }
}

pub(crate) fn block(id: u8, block: BlockNumber) -> BlockRef {
    BlockRef { id, rel: REL, block, will_init: false, image: None, data: Bytes::new(), has_data: false }
}

/// Numbers, four bytes each.
pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Main data of a commit or abort with subtransactions, for info with `HAS_INFO`.
pub(crate) fn xact_end(timestamp_us: i64, subxacts: &[u32]) -> Vec<u8> {
    const HAS_SUBXACTS: u32 = 2;
    let mut data = timestamp_us.to_le_bytes().to_vec();
    data.extend(words(&[HAS_SUBXACTS, subxacts.len() as u32]));
    data.extend(words(subxacts));
    data
}
