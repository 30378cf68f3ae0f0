//! Effects of records made by hand.

use smallvec::smallvec;

use super::*;
use crate::{
    AUX_FILE_PREFIX, aux_file_main_data,
    test_record::{REL, block, record, words},
};

fn page_change(rel: RelTag, block: u32, will_init: bool) -> Change {
    Change::Page { tag: PageTag { rel, block }, will_init }
}

#[test]
fn an_update_lists_both_pages_and_each_map_page_once() {
    let flags = heap::update_flags::OLD_ALL_VISIBLE_CLEARED | heap::update_flags::NEW_ALL_VISIBLE_CLEARED;
    let data = [&words(&[700])[..], &[1, 0, 0, flags], &words(&[0]), &[2, 0]].concat();
    let mut update = record(rmgr::HEAP, heap::UPDATE, data);
    update.blocks = smallvec![block(0, 40_000), block(1, 7)];
    let vm = REL.with_fork(ForkNumber::Vm);
    let expected = [
        page_change(vm, 0, false),
        page_change(vm, 1, false),
        page_change(REL, 40_000, false),
        page_change(REL, 7, false),
    ];
    assert_eq!(changes(&update).expect("known")[..], expected);
    update.blocks = smallvec![block(0, 8)];
    assert_eq!(changes(&update).expect("known")[..], [page_change(vm, 0, false), page_change(REL, 8, false)]);
}

#[test]
fn unknown_records_are_errors_that_name_them() {
    let cases = [
        (rmgr::XLOG, 0xF0),
        (rmgr::XACT, 0x70),
        (rmgr::SMGR, 0x00),
        (rmgr::CLOG, 0x20),
        (rmgr::BTREE, 0xF0),
        (rmgr::GIST, 0x40),
        (rmgr::GIN, 0x00),
        (rmgr::SPGIST, 0x90),
        (rmgr::BRIN, 0x60),
        (RmgrId(22), 0),
        (RmgrId(128), 0),
    ];
    for (rmgr, info) in cases {
        let error = changes(&record(rmgr, info, vec![0; 64])).expect_err("unknown");
        assert_eq!((error.rmgr, error.info, error.lsn), (rmgr, info, Lsn(0x100)));
    }
    let text = changes(&record(rmgr::BTREE, 0xF0, vec![])).expect_err("unknown").to_string();
    assert_eq!(text, "WAL record at 0/100, resource manager 11 (Btree), info 0xf0: unknown kind of record");
}

#[test]
fn a_truncation_cuts_all_forks_and_clears_the_maps_last_page() {
    let data = words(&[40_000, REL.spc, REL.db, REL.rel, 7]);
    let (fsm, vm) = (REL.with_fork(ForkNumber::Fsm), REL.with_fork(ForkNumber::Vm));
    let expected = [
        Change::CreateRel(REL),
        Change::TruncateRel { rel: REL, blocks: 40_000 },
        // 40000 blocks are 9 leaf pages and a part of the tenth, below a root and a middle page.
        Change::TruncateRel { rel: fsm, blocks: 12 },
        page_change(vm, 1, false),
        Change::TruncateRel { rel: vm, blocks: 2 },
    ];
    assert_eq!(changes(&record(rmgr::SMGR, 0x20, data)).expect("known")[..], expected);
}

#[test]
fn databases_and_tablespaces() {
    let copy = changes(&record(rmgr::DBASE, 0x00, words(&[20, 1663, 1, 1664]))).expect("known");
    assert_eq!(copy[..], [Change::CopyDatabase { src_spc: 1664, src_db: 1, spc: 1663, db: 20 }]);
    let drop = changes(&record(rmgr::DBASE, 0x20, words(&[20, 2, 1663, 99]))).expect("known");
    assert_eq!(drop[..], [Change::DropDatabase { spc: 1663, db: 20 }, Change::DropDatabase { spc: 99, db: 20 }]);
    assert!(changes(&record(rmgr::DBASE, 0x20, words(&[20, u32::MAX, 1663]))).is_err());
    let create = changes(&record(rmgr::TBLSPC, 0x00, [&words(&[99])[..], b"/data/ts\0"].concat())).expect("known");
    assert_eq!(create[..], [Change::CreateTablespace { oid: 99, path: "/data/ts".into() }]);
}

#[test]
fn a_prepared_transaction_is_kept_with_its_checksum() {
    let header =
        [words(&[v15_magic(), 0, 700, 5]), vec![0; 8], words(&[10, 0, 0, 0, 0, 0, 0]), vec![0, 0, 4, 0]].concat();
    let main_data = [header, vec![0; 16], b"gid\0\0\0\0\0".to_vec()].concat();
    let listed = changes(&record(rmgr::XACT, 0x10, main_data.clone())).expect("known");
    let content = [&main_data[..], &crc32c::crc32c(&main_data).to_le_bytes()].concat();
    assert_eq!(listed[..], [Change::TwoPhaseCreate { xid: 700, content: content.into() }]);
}

fn v15_magic() -> u32 {
    wal::v15::xact::TWOPHASE_MAGIC
}

#[test]
fn only_the_agents_messages_keep_files() {
    let main_data = aux_file_main_data("pg_stat/pgstat.stat", b"content").expect("a good path");
    let listed = changes(&record(rmgr::LOGICALMSG, 0, main_data.clone())).expect("known");
    let path = "pg_stat/pgstat.stat".into();
    assert_eq!(listed[..], [Change::AuxFile { path, content: (*b"content").into() }]);
    // The shim's may come from a backend that is in a transaction.
    assert_eq!(changes(&DecodedRecord { xid: 700, ..record(rmgr::LOGICALMSG, 0, main_data.clone()) }), Ok(listed));
    // What a user sends carries the user's database.
    let mut forged = main_data;
    forged[0] = 5;
    assert_eq!(changes(&record(rmgr::LOGICALMSG, 0, forged)), Ok(ChangeList::new()));
    let escape = wal::v15::state::LogicalMessage::main_data(&format!("{AUX_FILE_PREFIX}../x"), b"");
    assert!(changes(&record(rmgr::LOGICALMSG, 0, escape)).is_err());
}

#[test]
fn transactions_of_an_origin_move_its_progress() {
    let advance = |origin, remote_lsn, force| Change::AdvanceOrigin { origin, remote_lsn: Lsn(remote_lsn), force };
    // A commit at time 9 with XACT_XINFO_HAS_ORIGIN: the origin's LSN and its time.
    let main_data = [words(&[9, 0, 1 << 5]), words(&[0x77, 0, 8, 0])].concat();
    let commit = DecodedRecord { origin: Some(3), ..record(rmgr::XACT, 0x80, main_data.clone()) };
    let listed = changes(&commit).expect("known");
    assert!(listed.contains(&advance(3, 0x77, false)), "{listed:?}");
    let unmarked = DecodedRecord { origin: Some(u16::MAX), ..record(rmgr::XACT, 0x80, main_data) };
    let listed = changes(&unmarked).expect("known");
    assert!(!listed.iter().any(|change| matches!(change, Change::AdvanceOrigin { .. })), "{listed:?}");

    let set = [words(&[0x88, 0]), vec![4, 0, 1, 0]].concat();
    assert_eq!(changes(&record(rmgr::REPLORIGIN, 0x00, set)).expect("known")[..], [advance(4, 0x88, true)]);
    let drop = changes(&record(rmgr::REPLORIGIN, 0x10, vec![4, 0])).expect("known");
    assert_eq!(drop[..], [Change::DropOrigin { origin: 4 }]);
    assert!(changes(&record(rmgr::REPLORIGIN, 0x20, vec![4, 0])).is_err());
}
