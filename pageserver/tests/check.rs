//! `check_project` finds each sort of damage, and removes only what nothing refers to and is old enough.

mod cluster;
mod reference;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use cluster::{branch_ref, branches, memory_remote, put_root};
use dormouse_pageserver::{
    check::{CheckReport, Repair, check_project},
    remote::{BranchNames, Remote},
};
use object_store::path::Path;
use reference::{READY, START, apply, first_record, tuning};
use types::{Lsn, ProjectId};
use wire::pageserver::BranchPoint;

/// A branch with some layers, and a child of it.
async fn filled() -> Arc<Remote> {
    let remote = memory_remote();
    let root = branch_ref("p", "root");
    put_root(&remote, &root, START).await;
    let branches = branches(&remote, 1, tuning());
    let branch = branches.get(&root).await.expect("root");
    let (lsn, values) = first_record();
    apply(&branch, lsn, &values);
    for turn in 1..6u8 {
        apply(&branch, Lsn(READY.0 + 40 * u64::from(turn)), &[(turn, Some(turn)), (turn + 6, Some(turn))]);
        branch.flush().await.expect("flush");
        branch.compact().await.expect("compact");
    }
    let child = branch_ref("p", "child");
    branches.create(&child, &root, BranchPoint::Head).await.expect("create");
    remote
}

async fn check(remote: &Remote, repair: Repair) -> CheckReport {
    check_project(remote, &ProjectId::new("p").expect("id"), repair).await.expect("readable")
}

#[tokio::test]
async fn what_was_written_is_whole() {
    let report = check(&*filled().await, Repair::No).await;
    assert_eq!((report.branches, report.damage, report.orphans), (2, vec![], vec![]));
    assert!(report.layers > 1 && report.values > 10, "{} layers", report.layers);
}

#[tokio::test]
async fn a_flipped_bit_and_a_missing_object_are_found_by_name() {
    let remote = filled().await;
    let objects = remote.list_all(&Path::from("projects/p")).await.expect("list");
    let (mut layers, mut manifests) = (0, 0);
    for object in objects.into_iter().map(|object| object.location) {
        let content = remote.get(&object).await.expect("get").expect("there");
        let is_layer = object.as_ref().contains("/layers/");
        let is_manifest = BranchNames::generation_of_manifest(&object).is_some();
        if !is_layer && !is_manifest {
            continue;
        }
        for at in [0, content.len() / 2, content.len() - 1] {
            let mut damaged = content.to_vec();
            damaged[at] ^= 4;
            remote.put(&object, damaged.into()).await.expect("put");
            let report = check(&remote, Repair::OlderThan(Duration::ZERO)).await;
            assert!(
                report.damage.iter().any(|damage| damage.starts_with(object.as_ref())),
                "{object} {at}: {report:?}"
            );
            assert_eq!(report.removed, 0, "nothing is removed because of damage: {report:?}");
        }
        if is_layer {
            remote.delete(&object).await.expect("delete");
            let report = check(&remote, Repair::No).await;
            assert_eq!(report.damage, [format!("{object}: the object is gone")]);
        }
        remote.put(&object, content).await.expect("put");
        (layers, manifests) = (layers + usize::from(is_layer), manifests + usize::from(is_manifest));
    }
    assert!(layers > 1 && manifests == 2, "{layers} layers, {manifests} manifests");
    assert_eq!(check(&remote, Repair::No).await.damage, Vec::<String>::new());
}

#[tokio::test]
async fn only_old_orphans_are_removed() {
    let remote = filled().await;
    let names = BranchNames::new(&branch_ref("p", "root"));
    let lost = names.layer("00000001-00000fff-delta-0000000000000000-0000000000000008");
    let gone = branch_ref("p", "gone");
    let orphans = [lost, names.child(&gone, START), BranchNames::new(&gone).layer("00000001-x")];
    for orphan in &orphans {
        remote.put(orphan, Bytes::from_static(b"x")).await.expect("put");
    }
    let mut expected: Vec<(String, u64)> = orphans.iter().map(|orphan| (orphan.to_string(), 1)).collect();
    expected.sort();
    for repair in [Repair::No, Repair::OlderThan(Duration::from_secs(3600))] {
        let mut report = check(&remote, repair).await;
        report.orphans.sort();
        assert_eq!((report.orphans, report.removed), (expected.clone(), 0));
    }
    assert_eq!(check(&remote, Repair::OlderThan(Duration::ZERO)).await.removed, 3);
    let report = check(&remote, Repair::No).await;
    assert_eq!((report.branches, report.damage, report.orphans), (2, vec![], vec![]));
}
