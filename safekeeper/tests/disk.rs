//! A disk that is full: its safekeeper steps aside, says why, and comes back.

mod harness;

use std::{process::Command, time::Duration};

use e2e::SmallDisk;
use harness::{Cluster, within};
use safekeeper_client::{NodeStatus, node_status};
use wire::Scope;

async fn status(cluster: &Cluster, index: usize) -> NodeStatus {
    node_status(&cluster.address(index), &cluster.token(Scope::Service)).await.expect("status")
}

async fn until(cluster: &Cluster, index: usize, reached: impl Fn(&NodeStatus) -> bool) -> NodeStatus {
    within(async {
        loop {
            let status = status(cluster, index).await;
            if reached(&status) {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_safekeeper_whose_disk_is_full_steps_aside_and_says_why() {
    let mut cluster = Cluster::never_idle(3).await;
    cluster.kill(2).await;
    let Some(_disk) = SmallDisk::mount(&cluster.data_dir(2), "8m").expect("mount") else {
        eprintln!("skipped: only root can mount a small disk");
        return;
    };
    cluster.run(2).await;
    let mut compute = cluster.elect().await;
    compute.commit(1, 1000).await;
    let first = until(&cluster, 2, |status| status.loaded_branches == 1).await;
    assert_eq!((first.node.0, first.trouble.as_deref()), (3, None));
    assert!(first.free_bytes > 4 << 20 && first.free_bytes < 8 << 20, "{first:?}");

    let end = compute.commit(300, 60_000).await;
    let trouble = until(&cluster, 2, |status| status.trouble.is_some()).await.trouble.expect("trouble");
    assert!(trouble.contains("No space left on device"), "{trouble}");
    for index in 0..2 {
        cluster.until(index, |status| status.commit_lsn == end).await;
        assert_eq!(status(&cluster, index).await.trouble, None);
    }
    // It goes on being full.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(status(&cluster, 2).await.trouble.is_some());
    assert_eq!(compute.proposer.fenced(), None);

    let larger = ["-o", "remount,size=64m"];
    assert!(Command::new("mount").args(larger).arg(cluster.data_dir(2)).status().expect("mount").success());
    until(&cluster, 2, |status| status.trouble.is_none()).await;
    cluster.until(2, |status| status.flush_lsn == end).await;
    cluster.kill(1).await;
    compute.commit(3, 1000).await;
}
