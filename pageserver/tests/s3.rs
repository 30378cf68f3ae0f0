//! The same over an S3-compatible store: set `DORMOUSE_TEST_S3=s3://bucket/prefix` and the usual `AWS_*` variables.

mod cluster;

use std::{sync::Arc, time::Duration};

use cluster::{branch_ref, branches, put_root};
use dormouse_pageserver::{
    ObjectStoreConfig,
    branch::{Put, Tip, Tuning},
    remote::{DiskCache, Remote},
    storage::{Key, Value},
};
use types::{ForkNumber, Lsn, PageTag, RelTag};
use wire::pageserver::BranchPoint;

const REL: RelTag = RelTag { spc: 1663, db: 1, rel: 1, fork: ForkNumber::Main };

fn page(block: u32) -> Put {
    let content: Vec<u8> = (0..types::PAGE_BYTES as u32).map(|at| ((at * (block + 3)) >> 4) as u8).collect();
    Put { key: Key::page(PageTag { rel: REL, block }), lsn: Lsn(880), value: Value::Image(content.into()) }
}

#[tokio::test]
async fn branches_live_in_a_bucket() {
    let Ok(url) = std::env::var("DORMOUSE_TEST_S3") else {
        eprintln!("skipped: DORMOUSE_TEST_S3 is not set");
        return;
    };
    let store = ObjectStoreConfig::parse(&url).expect("store");
    let directory = tempfile::tempdir().expect("directory");
    let disk = DiskCache::open(directory.path(), 1 << 30).expect("cache");
    let remote = Arc::new(Remote::open(&store, disk, 0).expect("open"));
    remote.check().await.expect("the store works");
    let (root, child) = (branch_ref("s3", "root"), branch_ref("s3", "child"));
    remote.delete_all(&"projects/s3".into()).await.expect("clean");
    put_root(&remote, &root, Lsn(800)).await;
    let all = branches(&remote, 1, Tuning::default());
    let branch = all.get(&root).await.expect("attach");
    let size = Put { key: Key::rel_size(REL), lsn: Lsn(880), value: Value::rel_size(100) };
    let tip = Tip { last_record_lsn: Lsn(880), prev_record_lsn: Lsn(848), last_commit_us: None };
    branch.apply((0..100).map(page).chain([size]), tip);
    assert_eq!(branch.flush().await.expect("flush"), Lsn(880));
    all.create(&child, &root, BranchPoint::Head).await.expect("create");

    // Another machine: nothing local yet, then a copy of the whole layer.
    let elsewhere = tempfile::tempdir().expect("directory");
    let disk = DiskCache::open(elsewhere.path(), 1 << 30).expect("cache");
    let remote = Arc::new(Remote::open(&store, disk, 0).expect("open"));
    let later = branches(&remote, 2, Tuning::default());
    let branch = later.get(&child).await.expect("attach");
    let tags: Vec<_> = (0..100).map(|block| PageTag { rel: REL, block }).collect();
    for _ in 0..2 {
        let pages = branch.get_pages(&tags, Lsn(880)).await.expect("pages");
        for (block, read) in pages.iter().enumerate() {
            assert_eq!(Value::Image(read.clone()), page(block as u32).value, "block {block}");
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(std::fs::read_dir(elsewhere.path()).expect("cache").count(), 1, "the layer came along");
    }
    later.delete(&child).await.expect("delete");
    later.delete(&root).await.expect("delete");
    assert!(later.get(&root).await.is_err());
}

#[tokio::test]
async fn an_unreachable_store_is_said_soon() {
    // Nothing listens there. Credentials are given so that none are looked for elsewhere.
    let store = object_store::aws::AmazonS3Builder::new()
        .with_endpoint("http://127.0.0.1:9")
        .with_allow_http(true)
        .with_region("us-east-1")
        .with_access_key_id("x")
        .with_secret_access_key("y")
        .with_bucket_name("b")
        .build()
        .expect("client");
    let remote = Remote::over(Arc::new(store), DiskCache::disabled(), 0);
    let started = std::time::Instant::now();
    let error = remote.check().await.expect_err("unreachable");
    assert!(started.elapsed() < Duration::from_secs(12), "{:?}", started.elapsed());
    assert!(error.to_string().contains("probe"), "{error}");
}
