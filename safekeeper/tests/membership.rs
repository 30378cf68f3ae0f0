//! Safekeepers come and go, with real sockets and files.

mod harness;

use std::{fs, time::Duration};

use harness::{Cluster, Compute, START, within};
use safekeeper_client::{AdminError, ElectError, WalProposer, branch_membership, carry_over, set_branch_membership};
use types::{Lsn, Member, MembershipGeneration, NodeId, Term};
use wire::Scope;

const CATCH_UP: Duration = Duration::from_secs(60);

fn wal_files(cluster: &Cluster, index: usize) -> usize {
    // An idle branch without WAL has no directory.
    let entries = fs::read_dir(cluster.branch_dir(index)).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name()).filter(|name| name != "control").count()
}

/// Waits until a compute has committed under a membership, and these members have everything.
async fn established(compute: &Compute, generation: MembershipGeneration, nodes: &[NodeId]) {
    let waited = async {
        loop {
            let status = compute.proposer.membership().await.expect("in office");
            let caught_up = !status.lagging.iter().any(|node| nodes.contains(node));
            if status.generation == generation && status.established && caught_up {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within(waited).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_is_replaced_while_commits_go_on() {
    let mut cluster = Cluster::start(3).await;
    let mut compute = cluster.elect().await;
    compute.commit(50, 60_000).await;
    let mut reader = cluster.reader(START);
    let fresh = cluster.join().await;
    let members = [cluster.member(0), cluster.member(1), fresh.clone()];
    cluster.membership = cluster.membership.joint_with(members.to_vec()).expect("joint");
    let joint = cluster.membership.clone();
    compute.proposer.set_membership(joint.clone()).expect("in office");
    for _ in 0..20 {
        compute.commit(5, 3000).await;
    }
    established(&compute, joint.generation, &[fresh.node]).await;
    assert_eq!(cluster.status(3).await.generation, joint.generation, "it has heard of it from the compute");

    cluster.membership = joint.completed();
    for index in 0..4 {
        let status = cluster.tell(index).await;
        assert_eq!(status.generation, cluster.membership.generation);
    }
    for _ in 0..20 {
        compute.commit(5, 3000).await;
    }
    established(&compute, cluster.membership.generation, &[]).await;
    assert_eq!((cluster.status(2).await.flush_lsn, wal_files(&cluster, 2)), (Lsn::INVALID, 0), "who left has no WAL");
    // With the one that left, and one of those that stay, away.
    cluster.kill(2).await;
    cluster.kill(0).await;
    let end = compute.commit(10, 3000).await;
    let read = within(async {
        let mut bytes = Vec::new();
        while START + (bytes.len() as u64) < end {
            bytes.extend_from_slice(&reader.next().await.expect("read").bytes);
        }
        bytes
    });
    assert!(read.await == compute.written, "a reader that knew the first three only");
    assert_eq!(compute.proposer.fenced(), None);
    drop(compute.proposer);
    assert_eq!(cluster.elect().await.end, end);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_branch_is_carried_over() {
    let mut cluster = Cluster::start(3).await;
    let mut compute = cluster.elect().await;
    let end = compute.commit(100, 60_000).await;
    compute.proposer.finish().await;
    let mut members = Vec::new();
    for _ in 0..3 {
        members.push(cluster.join().await);
    }
    let nodes: Vec<NodeId> = members.iter().map(|member| member.node).collect();
    let before = cluster.proposer_config();
    cluster.membership = cluster.membership.joint_with(members).expect("joint");
    let lagging = within(carry_over(cluster.proposer_config(), &nodes, CATCH_UP)).await.expect("carry over");
    assert_eq!(lagging, []);
    cluster.membership = cluster.membership.completed();
    for index in 0..6 {
        cluster.tell(index).await;
    }
    assert_eq!([0, 1, 2].map(|index| wal_files(&cluster, index)), [0; 3]);
    // Who was given the first members, who have left, learns of the others; but for the control plane, which knows better.
    let strict = safekeeper_client::ProposerConfig { follows_membership: false, ..before.clone() };
    let refused = within(WalProposer::elect(strict)).await;
    assert!(matches!(refused, Err(ElectError::Outdated { known: MembershipGeneration(3), .. })));
    let (proposer, elected) = within(WalProposer::elect(before)).await.expect("elect");
    assert_eq!(elected.start_lsn, end);
    proposer.finish().await;
    for index in 0..3 {
        cluster.kill(index).await;
    }
    assert_eq!(cluster.elect().await.end, end);
    assert!(cluster.read(START, end).await == compute.written);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_heard_of_outlives_a_restart() {
    let mut cluster = Cluster::never_idle(3).await;
    let mut compute = cluster.elect().await;
    let end = compute.commit(3, 1000).await;
    drop(compute.proposer);
    let before = cluster.proposer_config();
    let only_one = vec![cluster.member(0)];
    cluster.membership = cluster.membership.joint_with(only_one).expect("joint");
    within(carry_over(cluster.proposer_config(), &[NodeId(1)], CATCH_UP)).await.expect("carry over");
    cluster.membership = cluster.membership.completed();
    for index in 0..3 {
        cluster.tell(index).await;
        cluster.kill(index).await;
        cluster.run(index).await;
        assert_eq!(cluster.status(index).await.generation, MembershipGeneration(3));
    }
    let token = cluster.token(Scope::Service);
    let known = branch_membership(&cluster.address(2), &token, &cluster.branch).await.expect("membership");
    assert_eq!(known.as_ref(), Some(&cluster.membership));
    // It never votes for, nor takes anything from, who goes by the first three.
    let strict = safekeeper_client::ProposerConfig { follows_membership: false, ..before };
    assert!(matches!(within(WalProposer::elect(strict)).await, Err(ElectError::Outdated { .. })));
    let status = cluster.status(2).await;
    assert_eq!((status.flush_lsn, status.term), (Lsn::INVALID, Term(2)), "its terms it keeps");
    cluster.kill(1).await;
    cluster.kill(2).await;
    let mut next = cluster.elect().await;
    assert_eq!(next.end, end);
    next.commit(1, 100).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_services_tell_of_memberships() {
    let cluster = Cluster::start(3).await;
    let forged = Member { node: NodeId(9), address: "192.0.2.1:7001".to_owned() };
    let membership = cluster.membership.joint_with(vec![forged]).expect("joint");
    let own = cluster.token(Scope::Branch { branch: cluster.branch.clone() });
    let told = set_branch_membership(&cluster.address(0), &own, &cluster.branch, &membership).await;
    assert!(matches!(told, Err(AdminError::Denied(_))), "others would connect to that address");
    assert!(!cluster.branch_dir(0).exists());
}
