//! The `CheckPoint` struct (`catalog/pg_control.h`): the cluster's counters as of a point of the WAL.

use types::Lsn;
use zerocopy::IntoBytes;

use crate::{
    encode::RecordToWrite,
    v15::{rmgr, wire_struct, xlog},
};

wire_struct! {
    /// `CheckPoint` of PostgreSQL 15, 88 bytes: main data of checkpoint records, and a part of `pg_control`.
    pub struct CheckPoint {
        /// Where redo starts; of a shutdown checkpoint, the record itself.
        redo: u64,
        this_timeline: u32,
        prev_timeline: u32,
        full_page_writes: u8,
        padding_1: [u8; 7],
        /// `FullTransactionId`: the epoch in the high half.
        next_xid: u64,
        next_oid: u32,
        next_multi: u32,
        next_multi_offset: u32,
        oldest_xid: u32,
        oldest_xid_db: u32,
        oldest_multi: u32,
        oldest_multi_db: u32,
        padding_2: u32,
        /// Seconds since 1970.
        time: i64,
        oldest_commit_ts_xid: u32,
        newest_commit_ts_xid: u32,
        /// 0 except in online checkpoints.
        oldest_active_xid: u32,
        padding_3: u32,
    }
}

/// Bytes that are not a `CheckPoint`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a CheckPoint of {0} bytes, not {size}", size = CheckPoint::SIZE)]
pub struct CheckPointError(usize);

impl CheckPoint {
    /// Reads the 88 bytes that [`to_bytes`](Self::to_bytes) gives. Errors on any other length.
    pub fn from_bytes(bytes: &[u8]) -> Result<CheckPoint, CheckPointError> {
        match CheckPoint::from_prefix(bytes) {
            Some(checkpoint) if bytes.len() == CheckPoint::SIZE => Ok(checkpoint),
            _ => Err(CheckPointError(bytes.len())),
        }
    }

    /// Its bytes, as in WAL.
    pub fn to_bytes(&self) -> [u8; CheckPoint::SIZE] {
        let mut bytes = [0; CheckPoint::SIZE];
        bytes.copy_from_slice(self.as_bytes());
        bytes
    }

    /// The same counters as a shutdown checkpoint whose record starts at `record_start`, on timeline 1.
    pub fn for_shutdown_at(&self, record_start: Lsn) -> CheckPoint {
        CheckPoint {
            redo: record_start.0,
            this_timeline: 1,
            prev_timeline: 1,
            oldest_active_xid: 0,
            padding_1: [0; 7],
            padding_2: 0,
            padding_3: 0,
            ..*self
        }
    }
}

/// The shutdown-checkpoint record of these counters, ready for [`crate::encode::encode_record`]. `redo` must be where the
/// record will start: see [`CheckPoint::for_shutdown_at`] and [`crate::encode::record_start_at`].
pub fn shutdown_record(checkpoint: &CheckPoint) -> RecordToWrite<'_> {
    let info = xlog::CHECKPOINT_SHUTDOWN;
    RecordToWrite { xid: 0, rmgr: rmgr::XLOG, info, main_data: checkpoint.as_bytes(), blocks: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_as_long_as_postgres_has_it() {
        assert_eq!(CheckPoint::SIZE, 88);
        assert_eq!(CheckPoint::from_bytes(&[0; 87]), Err(CheckPointError(87)));
        assert!(CheckPoint::from_bytes(&[0; 88]).is_ok());
    }
}
