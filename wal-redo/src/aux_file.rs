//! Small files that Dormouse keeps in a branch's WAL (statistics, replication slots): logical messages that the agent and the
//! shim write.

use smallvec::smallvec;
use wal::{
    DecodedRecord,
    encode::RecordToWrite,
    v15::{
        rmgr,
        state::{LogicalMessage, logicalmsg},
    },
};

use crate::{
    AUX_FILE_PREFIX,
    change::Change,
    changes::{CUT_SHORT, ChangeList, Changes},
};

/// Longest path of such a file, in bytes.
const PATH_MAX_BYTES: usize = 255;

/// Not a path that a file in a branch's WAL may have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a path below the data directory: {0:?}")]
pub struct AuxPathError(String);

/// Main data of the record that keeps a file; empty content removes it. `path` is relative to the data directory, of at most 255
/// bytes, without `..`.
pub fn aux_file_main_data(path: &str, content: &[u8]) -> Result<Vec<u8>, AuxPathError> {
    if !is_plain(path) {
        return Err(AuxPathError(path.chars().take(PATH_MAX_BYTES).collect()));
    }
    Ok(LogicalMessage::main_data(&format!("{AUX_FILE_PREFIX}{path}"), content))
}

/// The record of such main data, for [`wal::encode::encode_record`].
pub fn aux_file_record(main_data: &[u8]) -> RecordToWrite<'_> {
    RecordToWrite { xid: 0, rmgr: rmgr::LOGICALMSG, info: logicalmsg::MESSAGE, main_data, blocks: Vec::new() }
}

/// Messages of users (`pg_logical_emit_message`) have no effect, whatever their prefix: theirs carry the database they were
/// sent from, those of the agent and the shim carry none, so that SQL cannot forge a file. The shim's may be in a transaction,
/// and count whatever becomes of it, as files do.
pub(crate) fn changes(record: &DecodedRecord<'_>) -> Changes {
    let header = LogicalMessage::from_prefix(record.main_data).ok_or(CUT_SHORT)?;
    let (prefix, message) = LogicalMessage::parse(record.main_data).ok_or(CUT_SHORT)?;
    if header.db_id != 0 {
        return Ok(ChangeList::new());
    }
    let Some(path) = prefix.strip_prefix(AUX_FILE_PREFIX.as_bytes()) else { return Ok(ChangeList::new()) };
    let path = std::str::from_utf8(path).ok().filter(|path| is_plain(path)).ok_or("a file kept under no valid path")?;
    Ok(smallvec![Change::AuxFile { path: path.into(), content: message.into() }])
}

fn is_plain(path: &str) -> bool {
    let part_is_plain = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
    path.len() <= PATH_MAX_BYTES && path.split('/').all(part_is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_the_data_directory() {
        for good in ["pg_stat/pgstat.stat", "a"] {
            assert!(aux_file_main_data(good, b"x").is_ok(), "{good}");
        }
        for bad in ["", "/etc/passwd", "a/../b", "..", "a//b", "a/", "./a", "a\0b", &"x".repeat(256)] {
            assert!(aux_file_main_data(bad, b"x").is_err(), "{bad:?}");
        }
    }
}
