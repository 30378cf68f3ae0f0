//! Committed WAL goes to the object store, local files go, and it is read back from there.

mod harness;

use std::{fs, path::Path, sync::Arc, time::Duration};

use bucket::{BranchWal, WalObject, covered_from, open_local, open_s3};
use e2e::s3::{BUCKET, S3Server};
use harness::{Cluster, Compute, START, within};
use object_store::{ObjectStore, aws::AmazonS3Builder};
use safekeeper_client::{WalProposer, carry_over, delete_branch, node_status};
use tokio::time::sleep;
use types::{Lsn, WAL_SEGMENT_BYTES};
use wire::Scope;

/// Of one record.
const BODY: usize = 60_000;

fn local(path: &Path) -> Arc<dyn ObjectStore> {
    Arc::new(open_local(path).expect("store"))
}

async fn objects(cluster: &Cluster) -> Vec<WalObject> {
    let store = cluster.store.clone().expect("store");
    BranchWal::new(store, &cluster.branch).list().await.expect("list")
}

/// Waits until the object store has everything up to there.
async fn stored(cluster: &Cluster, end: Lsn) {
    within(async {
        while covered_from(&objects(cluster).await, START) < end {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

async fn until_local_wal(cluster: &Cluster, indexes: &[usize], most_bytes: u64) {
    within(async {
        while indexes.iter().any(|index| cluster.wal_bytes(*index) > most_bytes) {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

/// Writes so many segments of WAL; answers how much of it was on one local disk at most.
async fn write_segments(cluster: &Cluster, compute: &mut Compute, segments: u64) -> u64 {
    let (end, mut most) = (compute.end + segments * WAL_SEGMENT_BYTES, 0);
    while compute.end < end {
        compute.commit(20, BODY).await;
        most = (0..3).map(|index| cluster.wal_bytes(index)).max().unwrap_or_default().max(most);
        // As fast as a store on the same machine takes it: the bound is on what waits, not on the writer's speed.
        sleep(Duration::from_millis(10)).await;
    }
    most
}

/// WAL beyond what disks are to hold, nobody who takes it; then a reader from the very start.
async fn is_bounded_and_read_back(store: Arc<dyn ObjectStore>, segments: u64) {
    let mut cluster = Cluster::offloading(3, store).await;
    let mut compute = cluster.elect().await;
    let most = write_segments(&cluster, &mut compute, segments).await;
    let bound = 4 * WAL_SEGMENT_BYTES;
    assert!(most <= bound, "{most} bytes on one disk");
    println!("written={} most_local_bytes={most}", compute.written.len());
    let end = compute.end;
    assert!(cluster.read(START, end).await == compute.written, "while the compute runs");

    compute.proposer.clone().finish().await;
    stored(&cluster, end).await;
    until_local_wal(&cluster, &[0, 1, 2], 0).await;
    for index in 0..3 {
        cluster.kill(index).await;
        cluster.run(index).await;
    }
    assert!(cluster.read(START, end).await == compute.written, "of an idle branch");
    let inside = START + 3 * WAL_SEGMENT_BYTES / 2 + 13;
    assert!(cluster.read(inside, end).await == compute.written[(inside.0 - START.0) as usize..], "from anywhere");

    let reader = cluster.reader(end);
    reader.report(end);
    within(async {
        while !objects(&cluster).await.is_empty() {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let mut next = cluster.elect().await;
    assert_eq!(next.end, end);
    let after = next.commit(2, 3000).await;
    assert!(cluster.read(end, after).await == next.written);
}

#[tokio::test(flavor = "multi_thread")]
async fn local_disks_hold_little_while_nobody_takes_the_wal() {
    let dir = tempfile::tempdir().expect("dir");
    is_bounded_and_read_back(local(dir.path()), 10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn local_disks_hold_little_with_a_bucket() {
    let server = S3Server::start().await.expect("moto");
    let builder = server.environment().into_iter().fold(AmazonS3Builder::new(), |builder, (name, value)| {
        builder.with_config(name.to_lowercase().parse().expect("setting"), value)
    });
    is_bounded_and_read_back(open_s3(builder, BUCKET, "here").expect("client"), 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_safekeeper_takes_over_when_local_files_are_gone() {
    let dir = tempfile::tempdir().expect("dir");
    let mut cluster = Cluster::offloading(3, local(dir.path())).await;
    let mut compute = cluster.elect().await;
    write_segments(&cluster, &mut compute, 2).await;
    let end = compute.end;
    compute.proposer.clone().finish().await;
    drop(compute.proposer);
    until_local_wal(&cluster, &[0, 1, 2], 0).await;

    let fresh = cluster.join().await;
    let members = [cluster.member(0), cluster.member(1), fresh.clone()];
    cluster.membership = cluster.membership.joint_with(members.to_vec()).expect("joint");
    cluster.kill(2).await;
    let to = [fresh.node];
    let lagging = carry_over(cluster.proposer_config(), &to, Duration::from_secs(30));
    assert_eq!(within(lagging).await.expect("carried over"), []);
    cluster.membership = cluster.membership.completed();
    for index in [0, 1, 3] {
        cluster.tell(index).await;
    }
    assert_eq!(cluster.status(3).await.log_start_lsn, end, "its own log begins at what the store has");
    cluster.kill(0).await;
    let mut reader = cluster.reader_of(vec![fresh], START);
    let mut read = Vec::new();
    while read.len() < compute.written.len() {
        read.extend_from_slice(&within(reader.next()).await.expect("read").bytes);
    }
    assert!(read == compute.written, "it serves what it never had");
    let mut next = cluster.elect().await;
    let after = next.commit(3, 3000).await;
    assert!(cluster.read(end, after).await == next.written);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_store_local_files_stay_and_commits_go_on() {
    let dir = tempfile::tempdir().expect("dir");
    let (path, aside) = (dir.path().join("store"), dir.path().join("aside"));
    let cluster = Cluster::offloading(3, local(&path)).await;
    let mut compute = cluster.elect().await;
    fs::rename(&path, &aside).expect("aside");
    fs::write(&path, b"no directory").expect("obstacle");
    write_segments(&cluster, &mut compute, 4).await;
    for index in 0..3 {
        let status = cluster.until(index, |status| status.commit_lsn == compute.end).await;
        assert_eq!((status.log_start_lsn, status.remote_consistent_lsn), (START, Lsn::INVALID));
        let wal = compute.end.0 - START.segment_start().0;
        // The last file may be longer than its WAL, by half a MiB.
        assert!((wal..=wal + (512 << 10)).contains(&cluster.wal_bytes(index)));
    }
    fs::remove_file(&path).expect("obstacle");
    fs::rename(&aside, &path).expect("back");
    until_local_wal(&cluster, &[0, 1, 2], 2 * WAL_SEGMENT_BYTES).await;
    assert!(cluster.read(START, compute.end).await == compute.written);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_copies_when_the_first_is_away() {
    let dir = tempfile::tempdir().expect("dir");
    let mut cluster = Cluster::offloading(3, local(dir.path())).await;
    for index in 0..3 {
        cluster.kill(index).await;
    }
    cluster.offload_after_seconds = 1;
    // Whichever rank the safekeepers have, the first is among those that are away once.
    for away in 0..3 {
        for index in (0..3).filter(|index| *index != away) {
            cluster.run(index).await;
        }
        let mut compute = cluster.elect().await;
        let begin = compute.end;
        let end = compute.commit(3, 3000).await;
        compute.proposer.clone().finish().await;
        drop(compute.proposer);
        within(async {
            while covered_from(&objects(&cluster).await, begin) < end {
                sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        let there: Vec<usize> = (0..3).filter(|index| *index != away).collect();
        until_local_wal(&cluster, &there, 0).await;
        for index in there {
            cluster.kill(index).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_wal_is_not_copied() {
    let dir = tempfile::tempdir().expect("dir");
    let mut cluster = Cluster::never_idle(3).await;
    let mut compute = cluster.elect().await;
    let end = compute.commit(20, BODY).await;
    compute.proposer.clone().finish().await;
    drop(compute.proposer);
    for index in 0..3 {
        cluster.until(index, |status| status.commit_lsn == end).await;
        cluster.stop(index).await;
    }
    let file = cluster.branch_dir(0).join(START.segment_file_name());
    let mut bytes = fs::read(&file).expect("segment");
    let at = START.segment_offset() as usize + 300_000;
    bytes[at] ^= 0x10;
    fs::write(&file, bytes).expect("damage");

    cluster.store = Some(local(dir.path()));
    cluster.make_branch(&cluster.branch).await;
    // Nobody asks for the branch: it has to be found.
    cluster.idle(1);
    cluster.run(0).await;
    sleep(Duration::from_secs(4)).await;
    assert_eq!(objects(&cluster).await, []);
    assert!(cluster.wal_bytes(0) > 0);
    cluster.run(1).await;
    stored(&cluster, end).await;
    // The damaged copy is not needed any more: the store has the WAL.
    cluster.run(2).await;
    until_local_wal(&cluster, &[1, 2], 0).await;
    // It is still there, and would be read.
    cluster.kill(0).await;
    assert!(cluster.read(START, end).await == compute.written);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_branch_leaves_no_objects() {
    let dir = tempfile::tempdir().expect("dir");
    let cluster = Cluster::offloading(3, local(dir.path())).await;
    let mut compute = cluster.elect().await;
    let end = compute.commit(5, 3000).await;
    compute.proposer.clone().finish().await;
    drop(compute.proposer);
    stored(&cluster, end).await;
    for index in 0..3 {
        let token = cluster.token(Scope::Service);
        delete_branch(&cluster.address(index), &token, &cluster.branch).await.expect("delete");
    }
    assert_eq!(objects(&cluster).await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_away_when_a_branch_was_deleted_does_not_copy_its_wal() {
    let dir = tempfile::tempdir().expect("dir");
    let mut cluster = Cluster::offloading(3, local(dir.path())).await;
    let mut compute = cluster.elect().await;
    cluster.stop(2).await;
    compute.commit(5, 3000).await;
    // It is one of those who have it now, but has copied nothing, and is away again.
    cluster.idle(3600);
    cluster.run(2).await;
    let end = compute.commit(5, 3000).await;
    cluster.until(2, |status| status.commit_lsn == end).await;
    cluster.stop(2).await;
    compute.proposer.clone().finish().await;
    stored(&cluster, end).await;
    let token = cluster.token(Scope::Service);
    for index in 0..2 {
        delete_branch(&cluster.address(index), &token, &cluster.branch).await.expect("delete");
    }
    cluster.remove_branch(&cluster.branch).await;
    assert_eq!(objects(&cluster).await, []);
    assert!(cluster.wal_bytes(2) > 0);

    cluster.idle(1);
    cluster.run(2).await;
    let loaded = async |count: u64| {
        while node_status(&cluster.address(2), &token).await.expect("status").loaded_branches != count {
            sleep(Duration::from_millis(10)).await;
        }
    };
    within(loaded(1)).await;
    within(loaded(0)).await;
    assert_eq!(objects(&cluster).await, [], "WAL of a deleted branch was copied");
    assert!(cluster.wal_bytes(2) > 0, "what is not told to be deleted stays");
}

/// With figures of many: `BRANCHES=10000 cargo test -p dormouse-safekeeper --release --test offload idle_branches -- --nocapture`.
#[tokio::test(flavor = "multi_thread")]
async fn idle_branches_take_next_to_nothing() {
    let count: usize = std::env::var("BRANCHES").ok().and_then(|text| text.parse().ok()).unwrap_or(200);
    let dir = tempfile::tempdir().expect("dir");
    let mut cluster = Cluster::offloading(1, local(dir.path())).await;
    let mut making = tokio::task::JoinSet::new();
    for number in 0..count {
        let mut config = cluster.proposer_config();
        config.branch = harness::branch(&format!("branch-{number}"));
        cluster.make_branch(&config.branch).await;
        config.token = cluster.token(Scope::Service);
        making.spawn(async move {
            let (proposer, _) = WalProposer::elect(config).await.expect("elect");
            let mut compute = Compute::of(proposer);
            compute.commit(3, 1000).await;
            compute.proposer.clone().finish().await;
        });
        if making.len() == 50 {
            making.join_next().await.expect("one").expect("made");
        }
    }
    while let Some(made) = making.join_next().await {
        made.expect("made");
    }
    println!("made={count}");
    let data_dir = cluster.data_dir(0);
    let began = std::time::Instant::now();
    while std::fs::read_dir(&data_dir).expect("list").flatten().any(|entry| entry.path().is_dir()) {
        assert!(began.elapsed() < Duration::from_secs(600), "some branches have not been put aside");
        sleep(Duration::from_millis(500)).await;
    }
    let disk = std::process::Command::new("du").args(["-s", "--block-size=1"]).arg(&data_dir).output().expect("du");
    let disk: u64 =
        String::from_utf8_lossy(&disk.stdout).split_whitespace().next().and_then(|n| n.parse().ok()).expect("bytes");
    let status = node_status(&cluster.address(0), &cluster.token(Scope::Service)).await.expect("status");
    assert_eq!(status.loaded_branches, 0, "of {count} idle branches");
    // The directory itself takes some; of memory, pages are too coarse for a few branches.
    assert!(disk < 16 * 1024 + 300 * count as u64, "{disk} bytes of disk for {count} idle branches");
    cluster.stop(0).await;
    let without = resident_bytes();
    cluster.run(0).await;
    let with = resident_bytes();
    let each = |bytes: u64| bytes as f64 / count as f64;
    println!(
        "idle_branches={count} disk_bytes_each={:.0} memory_bytes_each={:.0}",
        each(disk),
        each(with.saturating_sub(without)),
    );
}

fn resident_bytes() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").expect("statm");
    statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).expect("pages") * 4096
}
