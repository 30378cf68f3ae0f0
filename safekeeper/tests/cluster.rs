//! Three safekeepers, real sockets, real files.

mod harness;

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use harness::{Cluster, START, branch, within};
use safekeeper_client::{ElectError, WalProposer, WalReadError, delete_branch, settle};
use types::{Lsn, Term};
use wire::Scope;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_committed_can_be_read() {
    let cluster = Cluster::start(3).await;
    let began = Instant::now();
    let mut compute = cluster.elect().await;
    println!("first election: {:?}", began.elapsed());
    assert_eq!((compute.end, compute.proposer.commit_lsn()), (START, START));
    let mut waits = Vec::new();
    for _ in 0..50 {
        let began = Instant::now();
        compute.commit(1, 100).await;
        waits.push(began.elapsed());
    }
    let end = compute.commit(300, 60_000).await;
    assert!(end.segment_number() > START.segment_number(), "more than one segment");
    assert!(cluster.read(START, end).await == compute.written);
    waits.sort();
    compute.proposer.clone().finish().await;
    let began = Instant::now();
    assert_eq!(cluster.elect().await.end, end);
    println!("next election: {:?}", began.elapsed());
    println!("commit of one record: median {:?}, longest {:?}", waits[25], waits[49]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_waits_gets_wal_as_soon_as_it_is_committed() {
    let cluster = Cluster::start(3).await;
    let mut reader = cluster.reader(START);
    let unknown = within(reader.next()).await.expect("heartbeat");
    assert_eq!((unknown.bytes.len(), unknown.commit_lsn), (0, Lsn::INVALID));
    let mut compute = cluster.elect().await;
    let end = compute.commit(1, 100).await;
    let began = Instant::now();
    loop {
        let chunk = within(reader.next()).await.expect("read");
        if chunk.begin + chunk.bytes.len() as u64 == end {
            break;
        }
    }
    println!("read {:?} after the commit", began.elapsed());
    compute.proposer.finish().await;
    for index in 0..3 {
        assert_eq!(cluster.status(index).await.commit_lsn, end, "all were told before the compute went");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_of_three_are_enough_and_the_third_catches_up() {
    let mut cluster = Cluster::start(3).await;
    let mut compute = cluster.elect().await;
    compute.commit(3, 500).await;
    cluster.kill(2).await;
    compute.commit(20, 50_000).await;
    cluster.run(2).await;
    let end = compute.commit(1, 10).await;
    cluster.until(2, |status| status.flush_lsn == end && status.commit_lsn == end).await;

    // Away while one compute ends and another starts: what it lacks comes from another safekeeper.
    cluster.kill(0).await;
    compute.commit(40, 60_000).await;
    compute.proposer.clone().finish().await;
    cluster.run(0).await;
    let mut next = cluster.elect().await;
    assert_eq!(next.end, compute.end);
    let end = next.commit(1, 10).await;
    let status = cluster.until(0, |status| status.flush_lsn == end).await;
    assert_eq!((status.term, status.last_log_term), (Term(2), Term(2)));
    // Its own copy is whole: with the others away it can't commit, but gives what is committed.
    cluster.until(0, |status| status.commit_lsn == end).await;
    cluster.kill(1).await;
    cluster.kill(2).await;
    let whole = [compute.written, next.written].concat();
    assert!(cluster.read(START, end).await == whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_three_is_not_enough() {
    let mut cluster = Cluster::start(3).await;
    let mut compute = cluster.elect().await;
    let committed = compute.commit(1, 100).await;
    cluster.kill(0).await;
    cluster.kill(1).await;
    let end = compute.write(100).expect("append");
    let waited = tokio::time::timeout(Duration::from_millis(500), compute.proposer.wait_committed(end)).await;
    assert!(waited.is_err(), "committed without a majority");
    assert_eq!(compute.proposer.commit_lsn(), committed);
    cluster.run(1).await;
    within(compute.proposer.wait_committed(end)).await.expect("committed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_compute_fences_the_old_one() {
    let cluster = Cluster::start(3).await;
    let mut old = cluster.elect().await;
    let committed = old.commit(2, 100).await;
    let mut new = cluster.elect().await;
    assert_eq!(new.end, committed);
    let end = old.write(100);
    let error = within(async {
        match end {
            Ok(end) => old.proposer.wait_committed(end).await.expect_err("must be fenced"),
            Err(error) => error,
        }
    })
    .await;
    assert!(error.to_string().contains("term 2"), "{error}");
    assert!(old.write(10).is_err() && old.proposer.fenced().is_some());
    let end = new.commit(2, 100).await;
    let from_both = [&old.written[..(committed.0 - START.0) as usize], &new.written].concat();
    assert!(cluster.read(START, end).await == from_both);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_when_all_restart() {
    let mut cluster = Cluster::start(3).await;
    let mut compute = cluster.elect().await;
    let end = compute.commit(30, 3000).await;
    cluster.until(0, |status| status.flush_lsn == end).await;
    drop(compute.proposer);
    for index in 0..3 {
        cluster.kill(index).await;
        cluster.run(index).await;
    }
    assert_eq!(cluster.status(0).await.flush_lsn, end);
    assert_eq!(within(settle(cluster.proposer_config())).await.expect("settle"), end);
    assert!(cluster.read(START, end).await == compute.written);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compute_outlives_restarts_of_all_safekeepers() {
    let mut cluster = Cluster::start(3).await;
    let mut compute = cluster.elect().await;
    for round in 0..3 {
        compute.commit(5, 2000).await;
        for index in 0..3 {
            if round == 1 {
                cluster.stop(index).await;
            } else {
                cluster.kill(index).await;
            }
        }
        compute.write(100).expect("append");
        for index in 0..3 {
            cluster.run(index).await;
        }
    }
    let end = compute.commit(1, 1).await;
    assert!(cluster.read(START, end).await == compute.written);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_tail_is_cut_to_the_last_whole_record() {
    let mut cluster = Cluster::never_idle(3).await;
    let mut compute = cluster.elect().await;
    let before_last = compute.commit(9, 900).await;
    let end = compute.commit(1, 900).await;
    for index in 0..3 {
        cluster.until(index, |status| status.flush_lsn == end).await;
    }
    // Before the compute goes, which would store how far the log is.
    for index in 0..3 {
        cluster.kill(index).await;
    }
    drop(compute.proposer);
    let segment = |cluster: &Cluster, index| cluster.branch_dir(index).join(START.segment_file_name());
    File::options()
        .write(true)
        .open(segment(&cluster, 0))
        .and_then(|file| file.write_all_at(&[0x5A; 5000], end.segment_offset()))
        .expect("garbage");
    let cut = File::options().write(true).open(segment(&cluster, 1)).expect("open");
    cut.set_len(end.segment_offset() - 100).expect("cut");
    for index in 0..3 {
        cluster.run(index).await;
    }
    let flush = async |index| cluster.status(index).await.flush_lsn;
    assert_eq!((flush(0).await, flush(1).await, flush(2).await), (end, before_last, end));
    let doubtful = async |index| cluster.status(index).await.doubtful;
    assert_eq!((doubtful(0).await, doubtful(1).await, doubtful(2).await), (false, true, false));
    assert_eq!(within(settle(cluster.proposer_config())).await.expect("settle"), end);
    assert!(cluster.read(START, end).await == compute.written);
    cluster.until(1, |status| status.flush_lsn == end && !status.doubtful).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_lost_what_it_acknowledged_elects_nobody_until_it_is_repaired() {
    let mut cluster = Cluster::never_idle(3).await;
    let mut compute = cluster.elect().await;
    compute.commit(5, 900).await;
    cluster.kill(2).await;
    // Only the first two have this.
    let end = compute.commit(5, 900).await;
    cluster.until(1, |status| status.flush_lsn == end).await;
    cluster.kill(0).await;
    cluster.kill(1).await;
    drop(compute.proposer);
    let segment = cluster.branch_dir(1).join(START.segment_file_name());
    let file = File::options().read(true).write(true).open(segment).expect("open");
    let (mut byte, at) = ([0], end.segment_offset() - 500);
    file.read_exact_at(&mut byte, at).and_then(|()| file.write_all_at(&[byte[0] ^ 1], at)).expect("a bit flips");

    cluster.run(1).await;
    cluster.run(2).await;
    let status = cluster.status(1).await;
    assert!(status.doubtful && status.flush_lsn < end, "{status:?}");
    // Started again, it still knows, although what it has is whole.
    cluster.kill(1).await;
    cluster.run(1).await;
    assert!(cluster.status(1).await.doubtful);
    let without_the_first = WalProposer::elect(cluster.proposer_config());
    assert!(tokio::time::timeout(Duration::from_secs(2), without_the_first).await.is_err(), "committed WAL is lost");

    cluster.run(0).await;
    let next = cluster.elect().await;
    assert_eq!(next.end, end);
    assert!(cluster.read(START, end).await == compute.written);
    cluster.until(1, |status| status.flush_lsn == end && !status.doubtful).await;
    drop(next.proposer);
    // Now it can be the one that has it.
    cluster.kill(0).await;
    assert_eq!(cluster.elect().await.end, end);
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_bytes_below_what_was_promised_are_an_error() {
    let mut cluster = Cluster::start(3).await;
    let mut compute = cluster.elect().await;
    let end = compute.commit(5, 900).await;
    for index in 0..3 {
        cluster.until(index, |status| status.flush_lsn == end).await;
    }
    compute.proposer.finish().await;
    // The second election stores how far the log was.
    let next = cluster.elect().await;
    next.proposer.finish().await;
    cluster.kill(0).await;
    let path = cluster.branch_dir(0).join(START.segment_file_name());
    File::options().write(true).open(path).and_then(|file| file.set_len(end.segment_offset() - 1000)).expect("cut");
    cluster.run(0).await;
    let token = cluster.token(Scope::Service);
    let error = safekeeper_client::branch_status(&cluster.address(0), &token, &cluster.branch).await;
    assert!(error.expect_err("must fail").to_string().contains("has been acknowledged"));
    // The other two go on without it.
    assert_eq!(within(settle(cluster.proposer_config())).await.expect("settle"), end);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_remember_what_was_committed_when_a_compute_has_finished() {
    let mut cluster = Cluster::never_idle(3).await;
    let mut compute = cluster.elect().await;
    cluster.kill(2).await;
    let end = compute.commit(5, 1000).await;
    // Back just now: the proposer may not have noticed yet.
    cluster.run(2).await;
    compute.proposer.finish().await;
    for index in 0..3 {
        cluster.kill(index).await;
        cluster.run(index).await;
        assert_eq!(cluster.status(index).await.commit_lsn, end, "safekeeper {index}");
    }
    assert!(cluster.read(START, end).await == compute.written, "readable with nobody elected");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_known_to_be_committed_is_stored_when_a_compute_dies() {
    let mut cluster = Cluster::never_idle(3).await;
    let mut compute = cluster.elect().await;
    let end = compute.commit(5, 1000).await;
    // It may be the one that was not needed for the commit, and still be storing the election.
    cluster.until(0, |status| status.flush_lsn == end).await;
    // Its two slots; behind them is what is noted with each flush.
    let control = |cluster: &Cluster| {
        let mut bytes = fs::read(cluster.branch_dir(0).join("control")).expect("control file");
        bytes.truncate(128 << 10);
        bytes
    };
    let before = control(&cluster);
    cluster.until(0, |status| status.commit_lsn == end).await;
    assert!(control(&cluster) == before, "nothing is stored on the way of a commit");
    drop(compute.proposer);
    within(async {
        while control(&cluster) == before {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    cluster.kill(0).await;
    cluster.run(0).await;
    assert_eq!(cluster.status(0).await.commit_lsn, end);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_safekeeper_in_a_higher_term_comes_back_to_the_compute_in_office() {
    let mut cluster = Cluster::start(3).await;
    // Two candidates that reach the third only, and give up.
    for term in 1..=2 {
        let candidate = cluster.stray_candidate(2);
        cluster.until(2, |status| status.term >= Term(term)).await;
        candidate.abort();
        let _ = candidate.await;
    }
    cluster.kill(2).await;
    let mut compute = cluster.elect().await;
    compute.commit(3, 1000).await;
    cluster.run(2).await;
    compute.commit(3, 1000).await;
    cluster.until(2, |status| status.flush_lsn == compute.end).await;
    // The compute goes on with the third and one of the first two.
    cluster.kill(0).await;
    let end = compute.commit(3, 1000).await;
    assert!(cluster.read(START, end).await == compute.written);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_greeting_has_a_limit() {
    let cluster = Cluster::start(1).await;
    let answer = async |token_bytes: usize| {
        let stream = tokio::net::TcpStream::connect(cluster.address(0)).await.expect("connect");
        let (read, write) = stream.into_split();
        let mut writer = wire::FrameWriter::new(write);
        let hello = wire::Hello { version: wire::PROTOCOL_VERSION, token: "x".repeat(token_bytes) };
        let body = safekeeper_protocol::message::RequestBody::Status;
        let request = safekeeper_protocol::message::Request { branch: cluster.branch.clone(), body };
        // Either may fail: the other side may have hung up already.
        let _ = writer.send(&hello).await;
        let _ = writer.send(&request).await;
        within(wire::FrameReader::new(read).recv::<wire::HelloReply>()).await
    };
    assert!(matches!(answer(1000).await, Ok(Some(wire::HelloReply::Denied(_)))));
    assert!(matches!(answer(20_000).await, Ok(None) | Err(_)), "hung up unheard");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_token_is_refused() {
    let cluster = Cluster::start(3).await;
    for token in [cluster.token(Scope::Branch { branch: branch("other") }), "nonsense".to_owned()] {
        let mut config = cluster.proposer_config();
        config.token = token;
        let refused = within(WalProposer::elect(config)).await;
        assert!(matches!(refused, Err(ElectError::Denied(_))));
    }
    let own = cluster.token(Scope::Branch { branch: cluster.branch.clone() });
    let delete = delete_branch(&cluster.address(0), &own, &cluster.branch).await;
    assert!(matches!(delete, Err(safekeeper_client::AdminError::Denied(_))), "a compute may not delete");
    assert_eq!(cluster.status(0).await.term, Term(0));
    assert!(!cluster.branch_dir(0).exists(), "asking leaves nothing behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_branch_stays_deleted() {
    let mut cluster = Cluster::start(3).await;
    let mut compute = cluster.elect().await;
    compute.commit(3, 100).await;
    let token = cluster.token(Scope::Service);
    for index in [0, 1, 2, 0] {
        delete_branch(&cluster.address(index), &token, &cluster.branch).await.expect("delete");
    }
    let names: Vec<_> = fs::read_dir(cluster.branch_dir(0)).expect("list").flatten().map(|e| e.file_name()).collect();
    assert_eq!(names, ["deleted"]);
    within(compute.proposer.wait_fenced()).await;
    cluster.kill(0).await;
    cluster.run(0).await;
    assert!(matches!(within(settle(cluster.proposer_config())).await, Err(ElectError::Deleted)));
    assert!(matches!(within(cluster.reader(START).next()).await, Err(WalReadError::Failed(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn stored_wal_is_forgotten_and_a_lagging_safekeeper_starts_at_the_horizon() {
    // An idle one would forget even the last segment.
    let mut cluster = Cluster::never_idle(3).await;
    let mut compute = cluster.elect().await;
    compute.commit(1, 100).await;
    cluster.until(2, |status| status.flush_lsn == compute.end).await;
    cluster.kill(2).await;
    let stored = compute.commit(600, 60_000).await;
    let reader = cluster.reader(stored);
    reader.report(stored);
    for index in 0..2 {
        cluster.until(index, |status| status.log_start_lsn == stored.segment_start()).await;
        assert!(!cluster.branch_dir(index).join(START.segment_file_name()).exists());
    }
    compute.commit(2, 100).await;
    compute.proposer.clone().finish().await;
    cluster.run(2).await;
    let mut next = cluster.elect().await;
    let end = next.commit(1, 100).await;
    let status = cluster.until(2, |status| status.commit_lsn == end).await;
    assert_eq!(status.log_start_lsn, stored);
    let tail = [&compute.written[(stored.0 - START.0) as usize..], &next.written].concat();
    cluster.kill(0).await;
    cluster.kill(1).await;
    assert!(cluster.read(stored, end).await == tail);
    cluster.run(0).await;
    cluster.run(1).await;
    let trimmed = within(async {
        let mut reader = cluster.reader(START);
        loop {
            if let Err(error) = reader.next().await {
                return error;
            }
        }
    });
    assert!(matches!(trimmed.await, WalReadError::Trimmed { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_branch_whose_wal_is_stored_leaves_no_files() {
    let mut cluster = Cluster::start(3).await;
    let mut compute = cluster.elect().await;
    let end = compute.commit(5, 1000).await;
    compute.proposer.clone().finish().await;
    let reader = cluster.reader(end);
    reader.report(end);
    within(async {
        while (0..3).any(|index| cluster.branch_dir(index).exists()) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    for index in 0..3 {
        cluster.kill(index).await;
        cluster.run(index).await;
    }
    let term = cluster.status(0).await.term;
    let mut next = cluster.elect().await;
    assert_eq!(next.end, end);
    cluster.until(0, |status| status.term > term).await;
    let after = next.commit(2, 3000).await;
    assert!(cluster.read(end, after).await == next.written);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compute_goes_on_where_a_branch_had_been_put_aside() {
    let mut cluster = Cluster::never_idle(3).await;
    let mut compute = cluster.elect().await;
    for index in 0..3 {
        let end = compute.commit(2, 1000).await;
        let reader = cluster.reader(end);
        reader.report(end);
        cluster.until(index, |status| status.commit_lsn == end && status.remote_consistent_lsn == end).await;
        cluster.stop(index).await;
        assert!(!cluster.branch_dir(index).exists());
        cluster.run(index).await;
        let end = compute.commit(2, 1000).await;
        let status = cluster.until(index, |status| status.flush_lsn == end).await;
        assert_eq!(status.term, status.last_log_term, "no election was needed");
        cluster.kill(index).await;
        cluster.run(index).await;
        assert!(!cluster.until(index, |status| status.flush_lsn == end).await.doubtful);
    }
    assert_eq!(compute.proposer.fenced(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_safekeeper_that_cannot_write_does_not_acknowledge_and_recovers() {
    let mut cluster = Cluster::start(3).await;
    cluster.kill(2).await;
    let mut compute = cluster.elect().await;
    let committed = compute.commit(1, 100).await;
    // A directory in the place of the next segment's file makes every write to it fail.
    let obstacle = cluster.branch_dir(1).join(Lsn(0x0200_0000).segment_file_name());
    fs::create_dir(&obstacle).expect("obstacle");
    while compute.end < Lsn(0x0200_0000) {
        compute.write(60_000).expect("append");
    }
    let blocked = tokio::time::timeout(Duration::from_secs(1), compute.proposer.wait_committed(compute.end)).await;
    assert!(blocked.is_err(), "acknowledged what could not be written");
    assert!(compute.proposer.commit_lsn() >= committed);
    fs::remove_dir(&obstacle).expect("remove");
    let end = compute.commit(1, 100).await;
    assert!(cluster.read(START, end).await == compute.written);
}
