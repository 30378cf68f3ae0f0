//! Rules of planning, at the level of keys.

use super::*;
use crate::storage::StoredRecord;

const REL: RelTag = RelTag { spc: 1663, db: 5, rel: 16384, fork: ForkNumber::Main };

fn planner() -> Planner {
    Planner::new(CheckPoint::from_bytes(&[0; 88]).expect("88 bytes"), None)
}

fn record(end_lsn: u64) -> DecodedRecord<'static> {
    DecodedRecord {
        start_lsn: Lsn(end_lsn - 32),
        end_lsn: Lsn(end_lsn),
        prev_lsn: Lsn(0),
        xid: 0,
        rmgr: wal::RmgrId(0),
        info: 0,
        blocks: wal::Blocks::new(),
        main_data: &[],
        origin: None,
        raw: b"raw",
    }
}

fn plan(planner: &mut Planner, end_lsn: u64, changes: impl IntoIterator<Item = Change>) -> Vec<Put> {
    let (record, mut puts) = (record(end_lsn), PutBatch::default());
    let before = Lsn(end_lsn - 32);
    let mut context = Context { record: &record, raw: None, before, puts: &mut puts, copies: Vec::new() };
    for change in changes {
        planner.plan_change(change, &mut context).expect("planned");
    }
    puts.to_puts()
}

fn page(block: u32, will_init: bool) -> Change {
    Change::Page { tag: PageTag { rel: REL, block }, will_init }
}

fn page_key(block: u32) -> Key {
    Key::page(PageTag { rel: REL, block })
}

fn stored(end_lsn: u64, will_init: bool) -> Value {
    let start_lsn = Lsn(end_lsn - 32);
    Value::Record(StoredRecord { will_init, depth: 0, start_lsn, raw: Bytes::from_static(b"raw") })
}

fn put(key: Key, lsn: u64, value: Value) -> Put {
    Put { key, lsn: Lsn(lsn), value }
}

#[test]
fn gaps_are_zeroes_as_of_the_record() {
    let mut planner = planner();
    let puts = plan(&mut planner, 800, [page(2, true)]);
    let expected = [
        put(page_key(0), 799, Value::ZERO_PAGE),
        put(page_key(1), 799, Value::ZERO_PAGE),
        put(Key::rel_size(REL), 800, Value::rel_size(3)),
        put(page_key(2), 800, stored(800, true)),
    ];
    assert_eq!(puts, expected);
    assert_eq!(plan(&mut planner, 880, [page(1, false)]), [put(page_key(1), 880, stored(880, false))]);
    assert_eq!(planner.logical_blocks(), 3);
}

#[test]
fn a_truncated_block_does_not_come_back() {
    let mut planner = planner();
    planner.load_rel(REL, 10);
    let puts = plan(&mut planner, 800, [Change::TruncateRel { rel: REL, blocks: 4 }]);
    assert_eq!(puts, [put(Key::rel_size(REL), 800, Value::rel_size(4))]);
    assert_eq!(plan(&mut planner, 880, [Change::TruncateRel { rel: REL, blocks: 6 }]), [], "it is shorter already");
    let puts = plan(&mut planner, 960, [page(5, false)]);
    let expected = [
        put(page_key(4), 959, Value::ZERO_PAGE),
        put(page_key(5), 959, Value::ZERO_PAGE),
        put(Key::rel_size(REL), 960, Value::rel_size(6)),
        put(page_key(5), 960, stored(960, false)),
    ];
    assert_eq!(puts, expected, "the record gets zeroes to start from");
}

#[test]
fn dropping_takes_all_forks_and_creating_starts_empty() {
    let mut planner = planner();
    let vm = REL.with_fork(ForkNumber::Vm);
    planner.load_rel(REL, 3);
    planner.load_rel(vm, 1);
    let puts = plan(&mut planner, 800, [Change::DropRel(REL)]);
    assert_eq!(puts, [put(Key::rel_size(REL), 800, Value::Tombstone), put(Key::rel_size(vm), 800, Value::Tombstone)]);
    assert_eq!(planner.logical_blocks(), 0);
    let puts = plan(&mut planner, 880, [Change::CreateRel(REL), page(0, false)]);
    assert_eq!(puts[1], put(page_key(0), 879, Value::ZERO_PAGE));
    assert_eq!(plan(&mut planner, 960, [Change::CreateRel(REL)]), [], "it exists");
}

#[test]
fn an_unbelievable_gap_is_refused() {
    let (record, mut puts) = (record(800), PutBatch::default());
    let mut context = Context { record: &record, raw: None, before: Lsn(0), puts: &mut puts, copies: Vec::new() };
    for block in [MAX_GAP_BLOCKS, u32::MAX] {
        let error = planner().plan_change(page(block, true), &mut context).expect_err("refused");
        assert!(matches!(error, PlanError::Gap { .. }), "{error}");
    }
}

#[test]
fn databases_are_copied_and_dropped_whole() {
    let mut planner = planner();
    planner.load_rel(REL, 3);
    planner.load_rel(RelTag { db: 6, ..REL }, 7);
    let (record, mut puts) = (record(800), PutBatch::default());
    let mut context = Context { record: &record, raw: None, before: Lsn(0), puts: &mut puts, copies: Vec::new() };
    let copy = Change::CopyDatabase { src_spc: 1663, src_db: 5, spc: 1663, db: 9 };
    planner.plan_change(copy, &mut context).expect("planned");
    let expected = DatabaseCopy { from: (1663, 5), to: (1663, 9), rels: vec![(REL, 3)] };
    assert_eq!(context.copies, [expected]);
    let copied = RelTag { db: 9, ..REL };
    assert!(puts.to_puts().contains(&put(Key::rel_size(copied), 800, Value::rel_size(3))));
    assert_eq!(planner.logical_blocks(), 13);

    let puts = plan(&mut planner, 880, [Change::DropDatabase { spc: 1663, db: 9 }]);
    let gone = [Key::rel_size(copied), Key::relation_map(1663, 9), Key::database(1663, 9)];
    assert_eq!(puts, gone.map(|key| put(key, 880, Value::Tombstone)));
    assert_eq!(planner.logical_blocks(), 10);
}

#[test]
fn slru_truncation_removes_whole_segments() {
    let mut planner = planner();
    for page in [0, 31, 32, 40, 64] {
        planner.load_slru(SlruKind::Clog, page);
    }
    let truncate = Change::SlruTruncate { slru: SlruKind::Clog, cutoff_page: 40 };
    let puts = plan(&mut planner, 800, [truncate]);
    let gone = [0, 31].map(|page| put(Key::slru(SlruKind::Clog, page), 800, Value::Tombstone));
    assert_eq!(puts, gone);
    let again = Change::SlruPage { slru: SlruKind::Clog, page: 0, will_init: false };
    let puts = plan(&mut planner, 880, [again]);
    assert_eq!(puts[0], put(Key::slru(SlruKind::Clog, 0), 879, Value::ZERO_PAGE));
}

#[test]
fn only_commits_later_than_all_before_are_indexed() {
    let mut planner = planner();
    let commit = |timestamp_us| Change::Commit { timestamp_us };
    let value = |timestamp_us, before| CommitTime { timestamp_us, before: Lsn(before) }.to_value();
    let first = plan(&mut planner, 800, [commit(5_500_000)]);
    assert_eq!(first, [put(Key::commit_time(5), 800, value(5_500_000, 768))]);
    assert_eq!(plan(&mut planner, 880, [commit(5_400_000)]), []);
    assert_eq!(plan(&mut planner, 960, [commit(6_000_000)]).len(), 1);
    assert_eq!(planner.last_commit_us(), Some(6_000_000));
}

#[test]
fn an_origins_progress_goes_back_only_by_force() {
    let mut planner = planner();
    planner.load_origin(1, Lsn(0x500));
    let advance = |remote_lsn, force| [Change::AdvanceOrigin { origin: 1, remote_lsn: Lsn(remote_lsn), force }];
    let stored = |lsn, remote_lsn| [put(Key::origin(1), lsn, Value::origin(Lsn(remote_lsn)))];
    assert_eq!(plan(&mut planner, 800, advance(0x400, false)), []);
    assert_eq!(plan(&mut planner, 880, advance(0x600, false)), stored(880, 0x600));
    assert_eq!(plan(&mut planner, 960, advance(0x100, true)), stored(960, 0x100));
    let gone = put(Key::origin(1), 1040, Value::Tombstone);
    assert_eq!(plan(&mut planner, 1040, [Change::DropOrigin { origin: 1 }]), [gone]);
    assert_eq!(plan(&mut planner, 1120, [Change::DropOrigin { origin: 1 }]), [], "it is gone already");
    assert_eq!(plan(&mut planner, 1200, advance(0x100, false)), stored(1200, 0x100));
}

#[test]
fn a_slot_needs_wal_until_it_is_dropped_or_lost() {
    use wal::v15::replication::{SlotFile, SlotState};
    let slot = |restart_lsn| {
        let zeroed = SlotFile::from_prefix(&[0; SlotFile::SIZE]).expect("size");
        SlotState::new(SlotFile { restart_lsn, ..zeroed })
    };
    let file = |name: &str, content: Vec<u8>| {
        let path = format!("pg_replslot/{name}/state").into();
        [Change::AuxFile { path, content: content.into() }]
    };
    let mut planner = planner();
    planner.load_file(&AuxFile { path: "pg_replslot/a/state".to_owned(), content: slot(0x7000).to_bytes().into() });
    plan(&mut planner, 800, file("b", slot(0x5000).to_bytes()));
    plan(&mut planner, 880, file("ancestors", slot(0x100).to_bytes()));
    plan(&mut planner, 960, file("damaged", b"x".to_vec()));
    assert_eq!(planner.slots_need(Lsn(0x1000)), Some(Lsn(0x5000)));
    assert_eq!(planner.slots_need(Lsn(0x6000)), Some(Lsn(0x7000)));
    plan(&mut planner, 1040, file("b", slot(0x5000).invalidated().to_bytes()));
    assert_eq!(planner.slots_need(Lsn(0x1000)), Some(Lsn(0x7000)));
    plan(&mut planner, 1120, file("a", Vec::new()));
    assert_eq!(planner.slots_need(Lsn(0x1000)), None);
}
