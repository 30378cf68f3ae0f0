//! A branch that was attached anew: who held it before must neither read what is gone nor write over what is new.

mod cluster;
mod reference;

use std::sync::Arc;

use cluster::{branch_ref, branches, put_root};
use dormouse_pageserver::{
    branch::Branches,
    error::StorageError,
    remote::{DiskCache, Remote},
};
use object_store::{memory::InMemory, path::Path};
use reference::{KEYS, START, apply, first_record, page_tag, tuning};
use types::{BranchRef, Lsn, PAGE_BYTES};
use wire::pageserver::BranchPoint;

const PAGE: u8 = KEYS / 2;
const LEFT_AT: Lsn = Lsn(840);

/// A root with some layers, and a child that left it at [`LEFT_AT`].
async fn root_and_child(all: &Arc<Branches>) -> (BranchRef, BranchRef) {
    let (root, child) = (branch_ref("p", "root"), branch_ref("p", "child"));
    put_root(&all.shared().remote, &root, START).await;
    let branch = all.get(&root).await.expect("attach");
    let (ready, values) = first_record();
    apply(&branch, ready, &values);
    for step in 1..=4u8 {
        apply(&branch, ready + 8 * u64::from(step), &[(PAGE, Some(step))]);
        branch.flush().await.expect("flush");
    }
    all.create(&child, &root, BranchPoint::Lsn(LEFT_AT)).await.expect("branch");
    (root, child)
}

/// A byte of a page.
async fn read_page(all: &Arc<Branches>, name: &BranchRef, number: u8, at: Lsn) -> Result<u8, StorageError> {
    let page = all.get(name).await?.get_pages(&[page_tag(number)], at).await?.remove(0);
    assert_eq!(page.len(), PAGE_BYTES);
    Ok(page[100])
}

async fn read(all: &Arc<Branches>, name: &BranchRef, at: Lsn) -> Result<u8, StorageError> {
    read_page(all, name, PAGE, at).await
}

/// An object store in memory, of which nothing is kept by readers.
fn uncached_remote() -> Arc<Remote> {
    Arc::new(Remote::over(Arc::new(InMemory::new()), DiskCache::disabled(), 0))
}

#[tokio::test]
async fn a_child_reads_through_its_ancestor_as_it_is_now() {
    let remote = uncached_remote();
    let first = branches(&remote, 1, tuning());
    let (root, child) = root_and_child(&first).await;

    // The second reads, and claims nothing yet; the first goes on writing.
    let second = branches(&remote, 2, tuning());
    assert_eq!(read(&second, &child, LEFT_AT).await.expect("read"), 4);
    let written_by_first = first.get(&root).await.expect("attached");
    apply(&written_by_first, LEFT_AT + 8, &[(PAGE, Some(9))]);
    written_by_first.flush().await.expect("flush");
    let as_attached = second.get(&root).await.expect("attached");
    assert!(as_attached.forget_if_changed().await.expect("look"), "the first has written");

    // The second's root is attached anew, and its layers are replaced: those that the child knew of are gone.
    let anew = second.get(&root).await.expect("attach");
    assert_ne!(anew.id(), as_attached.id());
    apply(&anew, LEFT_AT + 16, &[(PAGE, Some(10))]);
    anew.flush().await.expect("flush");
    anew.compact().await.expect("compact");
    anew.collect_garbage(LEFT_AT + 16, &[LEFT_AT], &[]).await.expect("collect");
    // Pages that it has not read yet, and so not kept.
    for number in PAGE + 1..KEYS {
        let page = read_page(&second, &child, number, LEFT_AT).await.expect("read");
        assert_eq!(page, 0);
    }
}

#[tokio::test]
async fn who_was_let_go_writes_nothing() {
    let remote = uncached_remote();
    let first = branches(&remote, 1, tuning());
    let (root, _) = root_and_child(&first).await;
    let second = branches(&remote, 2, tuning());
    let old = second.get(&root).await.expect("attach");
    let by_first = first.get(&root).await.expect("attached");
    apply(&by_first, LEFT_AT + 8, &[(PAGE, Some(9))]);
    by_first.flush().await.expect("flush");
    assert!(old.forget_if_changed().await.expect("look"));

    apply(&old, LEFT_AT + 8, &[(PAGE, Some(77))]);
    assert!(matches!(old.flush().await, Err(StorageError::Stale(_))));
    assert!(matches!(old.compact().await, Ok(()) | Err(StorageError::Stale(_))));
    assert!(matches!(old.wait_for(LEFT_AT + 800).await, Err(StorageError::Stale(_))));
    assert_eq!(read(&second, &root, LEFT_AT + 8).await.expect("read"), 9);
    let third = branches(&remote, 3, tuning());
    assert_eq!(read(&third, &root, LEFT_AT + 8).await.expect("read"), 9);
}

/// Layers that a merge has replaced while somebody read them may be gone; those that are still looked in may not.
#[tokio::test]
async fn who_meets_a_merge_is_told_to_ask_again() {
    let remote = uncached_remote();
    let all = branches(&remote, 1, tuning());
    let (root, child) = root_and_child(&all).await;
    let damaged = |object: &Path| {
        Err::<(), _>(StorageError::Damaged { object: object.to_string(), reason: "the object is gone".to_owned() })
    };
    let parent = all.get(&root).await.expect("attached");
    let reader = all.get(&child).await.expect("attached");
    assert_eq!(read(&all, &child, LEFT_AT).await.expect("read"), 4);
    let layers = || parent.view(|_| {}).layers.iter().map(|layer| layer.object().clone()).collect::<Vec<_>>();
    let known = layers();
    parent.flush().await.expect("flush");
    for step in 1..=8u8 {
        apply(&parent, LEFT_AT + 8 * u64::from(step), &[(PAGE, Some(step))]);
        parent.flush().await.expect("flush");
    }
    parent.compact().await.expect("compact");
    let now = layers();
    let replaced = known.iter().find(|object| !now.contains(object)).expect("something was merged");
    assert!(matches!(parent.or_stale(damaged(replaced)).await, Err(StorageError::Stale(name)) if name == root));
    assert!(matches!(reader.or_stale(damaged(replaced)).await, Err(StorageError::Stale(name)) if name == child));
    assert!(matches!(parent.or_stale(damaged(&now[0])).await, Err(StorageError::Damaged { .. })));
    assert!(matches!(reader.or_stale(damaged(&now[0])).await, Err(StorageError::Damaged { .. })));
}
