//! Records made by hand, for tests. Their bytes live as long as the test program.

use types::{BlockNumber, ForkNumber, Lsn, RelTag};
use wal::{BlockRef, Blocks, DecodedRecord, RmgrId};

pub(crate) const REL: RelTag = RelTag { spc: 1663, db: 5, rel: 16384, fork: ForkNumber::Main };

pub(crate) fn record(rmgr: RmgrId, info: u8, main_data: Vec<u8>) -> DecodedRecord<'static> {
    DecodedRecord {
        start_lsn: Lsn(0x100),
        end_lsn: Lsn(0x200),
        prev_lsn: Lsn(0x80),
        xid: 0,
        rmgr,
        info,
        blocks: Blocks::new(),
        main_data: main_data.leak(),
        origin: None,
        raw: &[],
    }
}

pub(crate) fn block(id: u8, block: BlockNumber) -> BlockRef<'static> {
    BlockRef { id, rel: REL, block, will_init: false, image: None, data: &[], has_data: false }
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
