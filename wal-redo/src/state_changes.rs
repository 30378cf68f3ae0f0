//! Changes by the records that are not about index or heap pages: transactions, storage, SLRUs, databases, relation maps.

use smallvec::smallvec;
use types::{ForkNumber, Lsn};
use wal::{
    DecodedRecord,
    v15::{
        heap::vm,
        state::{
            self, ClogTruncate, CommitTsTruncate, DbaseCreateFileCopy, DbaseCreateWalLog, DbaseDrop, MultiXactCreate,
            MultiXactTruncate, RelmapUpdate, ReplOriginDrop, ReplOriginSet, SmgrCreate, SmgrTruncate,
            clog as clog_format, commit_ts as commit_ts_format, dbase as dbase_format, multixact as multixact_format,
            relmap as relmap_format, replorigin as origin_format, smgr as smgr_format, tblspc as tblspc_format,
        },
        xact::{self as xact_format, info},
    },
};

use crate::{
    change::{Change, SlruKind},
    changes::{CUT_SHORT, ChangeList, Changes, UNKNOWN_INFO, map_page},
    slru,
};

/// Leaf slots of a page of the free space map (`SlotsPerFSMPage` in `storage/fsm_internals.h`).
const FSM_SLOTS_PER_PAGE: u32 = 4069;
/// Levels of the free space map's tree (`FSM_TREE_DEPTH`).
const FSM_TREE_DEPTH: u32 = 3;

pub(crate) fn xact(record: &DecodedRecord<'_>) -> Changes {
    match record.info & info::OPMASK {
        info::COMMIT | info::COMMIT_PREPARED | info::ABORT | info::ABORT_PREPARED => xact_end(record),
        info::PREPARE => {
            let prepare = xact_format::parse_prepare(record)?.ok_or(UNKNOWN_INFO)?;
            let content = two_phase_file(record.main_data);
            let mut changes: ChangeList = smallvec![Change::TwoPhaseCreate { xid: prepare.xid, content }];
            changes.extend(record.origin.and_then(|origin| advance_origin(origin, prepare.origin_lsn, false)));
            Ok(changes)
        }
        // Which subtransactions belong together, and what to invalidate: nothing that outlives the server's memory.
        info::ASSIGNMENT | info::INVALIDATIONS => Ok(ChangeList::new()),
        _ => Err(UNKNOWN_INFO),
    }
}

fn xact_end(record: &DecodedRecord<'_>) -> Changes {
    let end = xact_format::parse_end(record)?.ok_or(UNKNOWN_INFO)?;
    let mut changes: ChangeList = slru::pages_of(&end, clog_format::XACTS_PER_PAGE)
        .into_iter()
        .map(|page| Change::SlruPage { slru: SlruKind::Clog, page, will_init: false })
        .collect();
    changes.extend(end.rels.iter().map(|rel| Change::DropRel(*rel)));
    changes.extend(end.twophase_xid.map(|xid| Change::TwoPhaseRemove { xid }));
    if let (Some(origin), Some((remote_lsn, _))) = (record.origin, end.origin) {
        changes.extend(advance_origin(origin, remote_lsn, false));
    }
    if end.committed {
        changes.push(Change::Commit { timestamp_us: end.timestamp_us });
    }
    Ok(changes)
}

/// What recovery notes of a transaction that came from elsewhere (`replorigin_advance` in `xact_redo` and `PrepareRedoAdd`).
fn advance_origin(origin: u16, remote_lsn: u64, force: bool) -> Option<Change> {
    let tracked = origin != 0 && origin != origin_format::DO_NOT_REPLICATE;
    tracked.then_some(Change::AdvanceOrigin { origin, remote_lsn: Lsn(remote_lsn), force })
}

/// `replorigin_redo`.
pub(crate) fn replication_origin(record: &DecodedRecord<'_>) -> Changes {
    match record.rmgr_info() {
        origin_format::SET => {
            let set = ReplOriginSet::from_prefix(record.main_data).ok_or(CUT_SHORT)?;
            Ok(advance_origin(set.node_id, set.remote_lsn, set.force != 0).into_iter().collect())
        }
        origin_format::DROP => {
            let drop = ReplOriginDrop::from_prefix(record.main_data).ok_or(CUT_SHORT)?;
            Ok(smallvec![Change::DropOrigin { origin: drop.node_id }])
        }
        _ => Err(UNKNOWN_INFO),
    }
}

/// A `pg_twophase` file is the record's main data and its CRC (`RecreateTwoPhaseFile`).
fn two_phase_file(main_data: &[u8]) -> Box<[u8]> {
    [main_data, &crc32c::crc32c(main_data).to_le_bytes()].concat().into()
}

pub(crate) fn smgr(record: &DecodedRecord<'_>) -> Changes {
    match record.rmgr_info() {
        smgr_format::CREATE => {
            let create = SmgrCreate::from_prefix(record.main_data).ok_or(CUT_SHORT)?;
            Ok(smallvec![Change::CreateRel(create.rel().ok_or("unknown fork")?)])
        }
        smgr_format::TRUNCATE => {
            let truncate = SmgrTruncate::from_prefix(record.main_data).ok_or(CUT_SHORT)?;
            Ok(smgr_truncate(&truncate))
        }
        _ => Err(UNKNOWN_INFO),
    }
}

/// `smgr_redo`, `visibilitymap_prepare_truncate`, `FreeSpaceMapPrepareTruncateRel`. The map's last page loses bits too; that of
/// the free space map is left as it is: Postgres checks what it says.
fn smgr_truncate(truncate: &SmgrTruncate) -> ChangeList {
    let main = { truncate.rnode }.fork(ForkNumber::Main);
    let (blocks, flags) = (truncate.blkno, truncate.flags);
    let mut changes: ChangeList = smallvec![Change::CreateRel(main)];
    if flags & smgr_format::TRUNCATE_HEAP != 0 {
        changes.push(Change::TruncateRel { rel: main, blocks });
    }
    if flags & smgr_format::TRUNCATE_FSM != 0 {
        changes.push(Change::TruncateRel { rel: main.with_fork(ForkNumber::Fsm), blocks: fsm_blocks(blocks) });
    }
    if flags & smgr_format::TRUNCATE_VM != 0 {
        let tag = map_page(main, blocks);
        let partly = !blocks.is_multiple_of(vm::HEAP_BLOCKS_PER_PAGE);
        if partly {
            changes.push(Change::Page { tag, will_init: false });
        }
        changes.push(Change::TruncateRel { rel: tag.rel, blocks: tag.block + u32::from(partly) });
    }
    changes
}

/// How many pages of the free space map stay when the relation is cut to this many blocks.
fn fsm_blocks(blocks: u32) -> u32 {
    let mut leaf = blocks / FSM_SLOTS_PER_PAGE;
    let mut pages = 0;
    for _ in 0..FSM_TREE_DEPTH {
        pages += leaf + 1;
        leaf /= FSM_SLOTS_PER_PAGE;
    }
    let first_removed = pages - 1;
    first_removed + u32::from(!blocks.is_multiple_of(FSM_SLOTS_PER_PAGE))
}

pub(crate) fn clog(record: &DecodedRecord<'_>) -> Changes {
    match record.rmgr_info() {
        clog_format::ZEROPAGE => zero_page(SlruKind::Clog, record),
        clog_format::TRUNCATE => {
            let truncate = ClogTruncate::from_prefix(record.main_data).ok_or(CUT_SHORT)?;
            truncate_to(SlruKind::Clog, truncate.pageno)
        }
        _ => Err(UNKNOWN_INFO),
    }
}

pub(crate) fn commit_ts(record: &DecodedRecord<'_>) -> Changes {
    match record.rmgr_info() {
        commit_ts_format::ZEROPAGE => zero_page(SlruKind::CommitTs, record),
        commit_ts_format::TRUNCATE => {
            let truncate = CommitTsTruncate::from_prefix(record.main_data).ok_or(CUT_SHORT)?;
            truncate_to(SlruKind::CommitTs, truncate.pageno)
        }
        _ => Err(UNKNOWN_INFO),
    }
}

fn zero_page(slru: SlruKind, record: &DecodedRecord<'_>) -> Changes {
    let page = slru::zeroed_page(record).ok_or(CUT_SHORT)?;
    Ok(smallvec![Change::SlruPage { slru, page, will_init: true }])
}

fn truncate_to(slru: SlruKind, page: i32) -> Changes {
    let cutoff_page = u32::try_from(page).map_err(|_| "negative page number")?;
    Ok(smallvec![Change::SlruTruncate { slru, cutoff_page }])
}

pub(crate) fn multixact(record: &DecodedRecord<'_>) -> Changes {
    match record.rmgr_info() {
        multixact_format::ZERO_OFF_PAGE => zero_page(SlruKind::MultiXactOffsets, record),
        multixact_format::ZERO_MEM_PAGE => zero_page(SlruKind::MultiXactMembers, record),
        multixact_format::CREATE_ID => {
            let (create, members) = MultiXactCreate::members(record.main_data).ok_or(CUT_SHORT)?;
            let count = members.len() as u32;
            let page = |slru: SlruKind| move |page: u32| Change::SlruPage { slru, page, will_init: false };
            let offsets = slru::offset_entries(&create).map(|(multi, _)| multi / multixact_format::OFFSETS_PER_PAGE);
            let members = (0..count).map(|n| create.moff.wrapping_add(n) / multixact_format::MEMBERS_PER_PAGE);
            let mut changes: ChangeList = offsets.into_iter().map(page(SlruKind::MultiXactOffsets)).collect();
            changes.extend(members.map(page(SlruKind::MultiXactMembers)));
            changes.dedup();
            Ok(changes)
        }
        multixact_format::TRUNCATE_ID => {
            let truncate = MultiXactTruncate::from_prefix(record.main_data).ok_or(CUT_SHORT)?;
            // One multixact earlier, as Postgres does: the first one's page may not exist yet.
            let last_removed = match truncate.end_trunc_off {
                0 | 1 => u32::MAX,
                oldest => oldest - 1,
            };
            Ok(smallvec![
                Change::SlruTruncate {
                    slru: SlruKind::MultiXactMembers,
                    cutoff_page: truncate.end_trunc_memb / multixact_format::MEMBERS_PER_PAGE,
                },
                Change::SlruTruncate {
                    slru: SlruKind::MultiXactOffsets,
                    cutoff_page: last_removed / multixact_format::OFFSETS_PER_PAGE,
                },
            ])
        }
        _ => Err(UNKNOWN_INFO),
    }
}

pub(crate) fn dbase(record: &DecodedRecord<'_>) -> Changes {
    let data = record.main_data;
    match record.rmgr_info() {
        dbase_format::CREATE_FILE_COPY => {
            let copy = DbaseCreateFileCopy::from_prefix(data).ok_or(CUT_SHORT)?;
            Ok(smallvec![Change::CopyDatabase {
                src_spc: copy.src_tablespace_id,
                src_db: copy.src_db_id,
                spc: copy.tablespace_id,
                db: copy.db_id,
            }])
        }
        dbase_format::CREATE_WAL_LOG => {
            let create = DbaseCreateWalLog::from_prefix(data).ok_or(CUT_SHORT)?;
            Ok(smallvec![Change::CreateDatabase { spc: create.tablespace_id, db: create.db_id }])
        }
        dbase_format::DROP => {
            let drop = DbaseDrop::from_prefix(data).ok_or(CUT_SHORT)?;
            let length = (drop.ntablespaces as usize).checked_mul(4).ok_or(CUT_SHORT)?;
            let ids = data[DbaseDrop::SIZE..].get(..length).ok_or(CUT_SHORT)?;
            let oid = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            Ok(ids.chunks_exact(4).map(|id| Change::DropDatabase { spc: oid(id), db: drop.db_id }).collect())
        }
        _ => Err(UNKNOWN_INFO),
    }
}

pub(crate) fn tblspc(record: &DecodedRecord<'_>) -> Changes {
    let (oid, rest) = record.main_data.split_first_chunk().ok_or(CUT_SHORT)?;
    let oid = u32::from_le_bytes(*oid);
    match record.rmgr_info() {
        tblspc_format::CREATE => {
            let path = rest.split(|byte| *byte == 0).next().unwrap_or_default();
            let path = String::from_utf8(path.to_vec()).map_err(|_| "a tablespace's path that is not UTF-8")?;
            Ok(smallvec![Change::CreateTablespace { oid, path: path.into() }])
        }
        tblspc_format::DROP => Ok(smallvec![Change::DropTablespace { oid }]),
        _ => Err(UNKNOWN_INFO),
    }
}

pub(crate) fn relmap(record: &DecodedRecord<'_>) -> Changes {
    if record.rmgr_info() != relmap_format::UPDATE {
        return Err(UNKNOWN_INFO);
    }
    let update = RelmapUpdate::from_prefix(record.main_data).ok_or(CUT_SHORT)?;
    let content = &record.main_data[RelmapUpdate::SIZE..];
    if update.nbytes as usize != state::relmap::FILE_BYTES || content.len() != state::relmap::FILE_BYTES {
        return Err("a relation map of another size than PostgreSQL 15's");
    }
    Ok(smallvec![Change::RelationMap { spc: update.tsid, db: update.dbid, content: content.into() }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_space_map_pages_are_counted_as_postgres_does() {
        // Page 0 is the root, 1 the middle level, 2 the first leaf.
        assert_eq!(fsm_blocks(0), 2);
        assert_eq!(fsm_blocks(1), 3);
        assert_eq!(fsm_blocks(4069), 3);
        assert_eq!(fsm_blocks(4070), 4);
        // Behind 4069 leaves comes another middle page.
        assert_eq!(fsm_blocks(4069 * 4069), 1 + 1 + 4069 + 1);
    }
}
