//! A page that is changed all the time needs few records to be made, in memory too.

mod cluster;
mod faulty_store;
mod reference;
mod trail;

use std::time::Duration;

use cluster::{branch_ref, branches, memory_remote, put_root};
use dormouse_pageserver::{
    branch::{Branch, MAX_CHAIN, Put, Tuning},
    storage::{Key, Value},
};
use faulty_store::Rng;
use reference::{READY, REL, START, tip};
use trail::{TRAILS, Trails, Wal, fresh_page, trail_tag};
use types::{Lsn, PAGE_BYTES};
use wal::CheckPoint;

const RECORDS: usize = 3000;

/// The longest chain of any page at any of the positions.
async fn longest(branch: &std::sync::Arc<Branch>, positions: &[Lsn]) -> usize {
    let mut longest = 0;
    for at in positions {
        for number in 0..TRAILS {
            let length = branch.chain_length(Key::page(trail_tag(number)), *at).await.expect("found");
            longest = longest.max(length);
        }
    }
    longest
}

async fn expect_pages(branch: &std::sync::Arc<Branch>, trails: &Trails, at: Lsn) {
    for number in 0..TRAILS {
        let mut expected = fresh_page();
        trails.apply(number, at, &mut expected);
        let page = branch.get_pages(&[trail_tag(number)], at).await.expect("read").remove(0);
        assert_eq!(page.len(), PAGE_BYTES);
        assert!(page[8..] == expected[8..], "page {number} at {at}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_in_memory_get_images() {
    let remote = memory_remote();
    let name = branch_ref("p", "root");
    put_root(&remote, &name, START).await;
    let branch = branches(&remote, 1, Tuning::default()).get(&name).await.expect("attach");
    let put = |key, value| Put { key, lsn: READY, value };
    let mut puts = vec![
        put(Key::CHECKPOINT, Value::Image(vec![0; CheckPoint::SIZE].into())),
        put(Key::rel_size(REL), Value::rel_size(100)),
    ];
    let pages = (0..TRAILS).map(|number| put(Key::page(trail_tag(number)), Value::Image(fresh_page().to_vec().into())));
    puts.extend(pages);
    branch.apply(puts, tip(READY));

    let (mut wal, mut trails, mut rng) = (Wal::new(READY), Trails::default(), Rng(7));
    let mut positions = Vec::new();
    for _ in 0..RECORDS {
        trails.step(&mut wal, rng.below(TRAILS), &mut rng);
        positions.push(wal.end());
    }
    // In two pieces with a write-out between: the second's chains begin where the first's ended.
    let middle = positions[RECORDS / 2];
    let first_bytes = (middle.0 - READY.0) as usize;
    for (begin, bytes) in [(READY, &wal.since(READY)[..first_bytes]), (middle, wal.since(middle))] {
        branch.ingest_wal(begin, bytes).await.expect("ingest");
        let ingested: Vec<Lsn> = positions.iter().copied().filter(|at| *at <= branch.tip().last_record_lsn).collect();
        let bound = if begin == READY { usize::from(MAX_CHAIN) } else { 2 * usize::from(MAX_CHAIN) };
        let mut seen = usize::MAX;
        for _ in 0..500 {
            seen = longest(&branch, &ingested).await;
            if seen <= bound {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(seen <= bound, "{seen} records from {begin} on");
        for at in ingested.iter().step_by(53) {
            expect_pages(&branch, &trails, *at).await;
        }
        branch.flush().await.expect("flush");
        let seen = longest(&branch, &ingested).await;
        assert!(seen <= usize::from(MAX_CHAIN), "{seen} records in layers");
        for at in ingested.iter().step_by(53) {
            expect_pages(&branch, &trails, *at).await;
        }
    }
}
