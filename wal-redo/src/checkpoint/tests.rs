//! Counters after records made by hand.

use super::*;
use crate::test_record::{record, words, xact_end};

fn counters(next_xid: u64) -> CheckPoint {
    let mut checkpoint = CheckPoint::from_bytes(&[0; 88]).expect("88 bytes");
    checkpoint.next_xid = next_xid;
    checkpoint.oldest_xid = 3;
    checkpoint.oldest_multi = 1;
    checkpoint.next_multi = 1;
    checkpoint
}

#[test]
fn next_xid_passes_every_xid_seen() {
    let mut checkpoint = counters(700);
    let mut commit = record(rmgr::XACT, info::COMMIT | info::HAS_INFO, xact_end(0, &[701, 709]));
    commit.xid = 700;
    assert!(advance(&mut checkpoint, &commit));
    assert_eq!({ checkpoint.next_xid }, 710);
    assert!(!advance(&mut checkpoint, &commit));
    let assignment = record(rmgr::XACT, info::ASSIGNMENT, words(&[712, 2, 713, 720]));
    assert!(advance(&mut checkpoint, &assignment));
    assert_eq!({ checkpoint.next_xid }, 721);
}

#[test]
fn next_xid_goes_round_into_the_next_epoch() {
    let mut checkpoint = counters(0xFFFF_FFF0);
    let mut commit = record(rmgr::XACT, info::COMMIT, vec![0; 8]);
    commit.xid = u32::MAX;
    advance(&mut checkpoint, &commit);
    assert_eq!({ checkpoint.next_xid }, 0x1_0000_0003);
    commit.xid = 0xFFFF_FFF5;
    assert!(!advance(&mut checkpoint, &commit));
    commit.xid = 10;
    advance(&mut checkpoint, &commit);
    assert_eq!({ checkpoint.next_xid }, 0x1_0000_000B);
}

#[test]
fn a_shutdown_checkpoint_is_exact_and_an_online_one_a_minimum() {
    let mut written = counters(900);
    written.next_oid = 50_000;
    written.redo = 0x77;
    let mut checkpoint = counters(1000);
    checkpoint.next_oid = 60_000;
    checkpoint.redo = 0x55;
    let online = record(rmgr::XLOG, xlog::CHECKPOINT_ONLINE, written.to_bytes().to_vec());
    advance(&mut checkpoint, &online);
    assert_eq!(({ checkpoint.next_xid }, { checkpoint.next_oid }), (1000, 60_000));
    let shutdown = record(rmgr::XLOG, xlog::CHECKPOINT_SHUTDOWN, written.to_bytes().to_vec());
    advance(&mut checkpoint, &shutdown);
    assert_eq!(({ checkpoint.next_xid }, { checkpoint.next_oid }, { checkpoint.redo }), (900, 50_000, 0x55));
    let next_oid = record(rmgr::XLOG, xlog::NEXTOID, words(&[58_192]));
    advance(&mut checkpoint, &next_oid);
    assert_eq!({ checkpoint.next_oid }, 58_192);
}

#[test]
fn multixacts_move_their_counters() {
    let mut checkpoint = counters(700);
    let create = record(rmgr::MULTIXACT, multixact::CREATE_ID, words(&[5, 20, 2, 800, 4, 801, 5]));
    advance(&mut checkpoint, &create);
    assert_eq!(({ checkpoint.next_multi }, { checkpoint.next_multi_offset }), (6, 22));
    assert_eq!({ checkpoint.next_xid }, 802);
    let truncate = record(rmgr::MULTIXACT, multixact::TRUNCATE_ID, words(&[16_000, 1, 4, 1, 18]));
    advance(&mut checkpoint, &truncate);
    assert_eq!(({ checkpoint.oldest_multi }, { checkpoint.oldest_multi_db }), (4, 16_000));
}

#[test]
fn a_clog_truncation_moves_the_oldest_xid() {
    let mut checkpoint = counters(700);
    let truncate = record(rmgr::CLOG, clog::TRUNCATE, words(&[0, 650, 5]));
    advance(&mut checkpoint, &truncate);
    assert_eq!(({ checkpoint.oldest_xid }, { checkpoint.oldest_xid_db }), (650, 5));
}

#[test]
fn commit_timestamps_are_switched_on_and_off() {
    let mut checkpoint = counters(700);
    let parameters = |on: u8| {
        let mut data = words(&[100, 8, 10, 0, 64, 1]);
        data.extend([0, on]);
        record(rmgr::XLOG, xlog::PARAMETER_CHANGE, data)
    };
    advance(&mut checkpoint, &parameters(1));
    assert_eq!({ checkpoint.oldest_commit_ts_xid }, 700);
    let mut commit = record(rmgr::XACT, info::COMMIT, vec![0; 8]);
    commit.xid = 705;
    advance(&mut checkpoint, &commit);
    assert_eq!({ checkpoint.newest_commit_ts_xid }, 705);
    advance(&mut checkpoint, &parameters(0));
    assert_eq!({ checkpoint.oldest_commit_ts_xid }, 0);
}
