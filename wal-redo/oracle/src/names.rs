//! Names of records, as `pg_waldump` prints them.

use wal::{DecodedRecord, v15::rmgr};

const HEAP: [&str; 8] = ["INSERT", "DELETE", "UPDATE", "TRUNCATE", "HOT_UPDATE", "HEAP_CONFIRM", "LOCK", "INPLACE"];
const HEAP2: [&str; 8] =
    ["REWRITE", "PRUNE", "VACUUM", "FREEZE_PAGE", "VISIBLE", "MULTI_INSERT", "LOCK_UPDATED", "NEW_CID"];
const BTREE: [&str; 15] = [
    "INSERT_LEAF",
    "INSERT_UPPER",
    "INSERT_META",
    "SPLIT_L",
    "SPLIT_R",
    "INSERT_POST",
    "DEDUP",
    "DELETE",
    "UNLINK_PAGE",
    "UNLINK_PAGE_META",
    "NEWROOT",
    "MARK_PAGE_HALFDEAD",
    "VACUUM",
    "REUSE_PAGE",
    "META_CLEANUP",
];
const HASH: [&str; 13] = [
    "INIT_META_PAGE",
    "INIT_BITMAP_PAGE",
    "INSERT",
    "ADD_OVFL_PAGE",
    "SPLIT_ALLOCATE_PAGE",
    "SPLIT_PAGE",
    "SPLIT_COMPLETE",
    "MOVE_PAGE_CONTENTS",
    "SQUEEZE_PAGE",
    "DELETE",
    "SPLIT_CLEANUP",
    "UPDATE_META_PAGE",
    "VACUUM_ONE_PAGE",
];
const GIN: [&str; 10] = [
    "CREATE_INDEX",
    "CREATE_PTREE",
    "INSERT",
    "SPLIT",
    "VACUUM_PAGE",
    "DELETE_PAGE",
    "UPDATE_META_PAGE",
    "INSERT_LISTPAGE",
    "DELETE_LISTPAGE",
    "VACUUM_DATA_LEAF_PAGE",
];
const GIST: [&str; 8] = ["PAGE_UPDATE", "DELETE", "PAGE_REUSE", "PAGE_SPLIT", "-", "-", "PAGE_DELETE", "ASSIGN_LSN"];
const SPGIST: [&str; 9] = [
    "-",
    "ADD_LEAF",
    "MOVE_LEAFS",
    "ADD_NODE",
    "SPLIT_TUPLE",
    "PICKSPLIT",
    "VACUUM_LEAF",
    "VACUUM_ROOT",
    "VACUUM_REDIRECT",
];
const BRIN: [&str; 6] = ["CREATE_INDEX", "INSERT", "UPDATE", "SAMEPAGE_UPDATE", "REVMAP_EXTEND", "DESUMMARIZE"];

const XLOG: [&str; 14] = [
    "CHECKPOINT_SHUTDOWN",
    "CHECKPOINT_ONLINE",
    "NOOP",
    "NEXTOID",
    "SWITCH",
    "BACKUP_END",
    "PARAMETER_CHANGE",
    "RESTORE_POINT",
    "FPW_CHANGE",
    "END_OF_RECOVERY",
    "FPI_FOR_HINT",
    "FPI",
    "-",
    "OVERWRITE_CONTRECORD",
];
const XACT: [&str; 7] =
    ["COMMIT", "PREPARE", "ABORT", "COMMIT_PREPARED", "ABORT_PREPARED", "ASSIGNMENT", "INVALIDATIONS"];

/// `Heap/INSERT+INIT` and the like.
pub fn name(record: &DecodedRecord<'_>) -> String {
    let info = record.rmgr_info();
    let (names, code, flag): (&[&str], u8, u8) = match record.rmgr {
        rmgr::HEAP => (&HEAP, info & 0x70, info & 0x80),
        rmgr::HEAP2 => (&HEAP2, info & 0x70, info & 0x80),
        rmgr::BTREE => (&BTREE, info, 0),
        rmgr::HASH => (&HASH, info, 0),
        rmgr::GIN => (&GIN, info, 0),
        rmgr::GIST => (&GIST, info, 0),
        rmgr::SPGIST => (&SPGIST, info, 0),
        rmgr::BRIN => (&BRIN, info & 0x70, info & 0x80),
        rmgr::XLOG => (&XLOG, info, 0),
        // The highest bit tells that more follows.
        rmgr::XACT => (&XACT, info & 0x70, 0),
        rmgr::SMGR => (&["-", "CREATE", "TRUNCATE"], info, 0),
        rmgr::CLOG | rmgr::COMMIT_TS => (&["ZEROPAGE", "TRUNCATE"], info, 0),
        rmgr::DBASE => (&["CREATE_FILE_COPY", "CREATE_WAL_LOG", "DROP"], info, 0),
        rmgr::TBLSPC => (&["CREATE", "DROP"], info, 0),
        rmgr::MULTIXACT => (&["ZERO_OFF_PAGE", "ZERO_MEM_PAGE", "CREATE_ID", "TRUNCATE_ID"], info, 0),
        rmgr::RELMAP => (&["UPDATE"], info, 0),
        rmgr::STANDBY => (&["LOCK", "RUNNING_XACTS", "INVALIDATIONS"], info, 0),
        rmgr::SEQ => (&["LOG"], info, 0),
        rmgr::REPLORIGIN => (&["SET", "DROP"], info, 0),
        rmgr::GENERIC => (&["APPLY"], info, 0),
        rmgr::LOGICALMSG => (&["MESSAGE"], info, 0),
        _other => (&[], info, 0),
    };
    let operation = names.get(usize::from(code >> 4)).copied().map_or_else(|| format!("{info:#04x}"), str::to_owned);
    let rmgr = rmgr::name(record.rmgr).unwrap_or("custom");
    format!("{rmgr}/{operation}{}", if flag != 0 { "+INIT" } else { "" })
}
