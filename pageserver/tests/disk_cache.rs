//! The local disk cache: its bound, what goes first, what a restart finds, and that reads do without it.

mod cluster;

use std::{path::Path as FilePath, sync::Arc, time::Duration};

use bytes::Bytes;
use cluster::{branch_ref, branches, put_root};
use dormouse_pageserver::{
    branch::{Branch, Put, Tip, Tuning},
    remote::{DiskCache, Remote},
    storage::{Key, Value},
};
use object_store::path::Path;
use tokio::time::sleep;
use types::{ForkNumber, Lsn, PAGE_BYTES, PageTag, RelTag};

const FILE_BYTES: u64 = 10 << 10;
/// Room for ten files.
const LIMIT: u64 = 100 << 10;

fn object(number: usize) -> Path {
    Path::from(format!("projects/p/layers/{number}"))
}

fn content(number: usize) -> Bytes {
    vec![number as u8; FILE_BYTES as usize].into()
}

fn bytes_in(directory: &FilePath) -> u64 {
    let entries = std::fs::read_dir(directory).expect("directory");
    entries.map(|entry| entry.expect("entry").metadata().map_or(0, |metadata| metadata.len())).sum()
}

async fn is_kept(cache: &DiskCache, number: usize) -> bool {
    match cache.read(&object(number), 0..FILE_BYTES).await {
        Some(read) => read == content(number) || panic!("{number} reads as something else"),
        None => false,
    }
}

#[tokio::test]
async fn it_stays_within_its_limit() {
    let directory = tempfile::tempdir().expect("directory");
    let cache = DiskCache::open(directory.path(), LIMIT).expect("open");
    let mut most = 0;
    for number in 0..200 {
        cache.insert(&object(number), content(number)).await;
        most = most.max(bytes_in(directory.path()));
    }
    assert!(most <= LIMIT, "{most} bytes are kept");
    assert!(bytes_in(directory.path()) > LIMIT / 2, "hardly anything is kept");
}

#[tokio::test]
async fn what_was_not_used_for_longest_goes_first() {
    let directory = tempfile::tempdir().expect("directory");
    let cache = DiskCache::open(directory.path(), LIMIT).expect("open");
    for number in 0..10 {
        cache.insert(&object(number), content(number)).await;
    }
    // New ones come, and the first five are read in between.
    for number in 10..60 {
        for used in 0..5 {
            assert!(is_kept(&cache, used).await, "{used} is in use, and gone with {number}");
        }
        cache.insert(&object(number), content(number)).await;
    }
    for unused in 5..50 {
        assert!(!is_kept(&cache, unused).await, "{unused} was not used");
        assert!(!directory.path().join(format!("projects~p~layers~{unused}")).exists(), "{unused}");
    }
}

#[tokio::test]
async fn a_restart_counts_what_is_there() {
    let directory = tempfile::tempdir().expect("directory");
    let cache = DiskCache::open(directory.path(), LIMIT).expect("open");
    for number in 0..8 {
        cache.insert(&object(number), content(number)).await;
    }
    drop(cache);
    std::fs::write(directory.path().join("projects~p~layers~99.tmp"), b"half").expect("write");
    let cache = DiskCache::open(directory.path(), LIMIT).expect("open");
    assert!(!directory.path().join("projects~p~layers~99.tmp").exists(), "what was not whole is removed");
    for number in 0..8 {
        assert!(is_kept(&cache, number).await, "{number}");
    }
    for number in 8..30 {
        cache.insert(&object(number), content(number)).await;
    }
    assert!(bytes_in(directory.path()) <= LIMIT);
    drop(cache);
    // A smaller limit than before holds from the start.
    let _cache = DiskCache::open(directory.path(), LIMIT / 2).expect("open");
    let left = bytes_in(directory.path());
    assert!(left <= LIMIT / 2 && left > LIMIT / 4, "{left} bytes are kept");
}

const REL: RelTag = RelTag { spc: 1663, db: 1, rel: 1, fork: ForkNumber::Main };
const PAGES: u32 = 16;

fn page(block: u32) -> Bytes {
    // Does not compress much.
    let word = |at: u32| (at + 1).wrapping_mul(block + 1).wrapping_mul(2_654_435_761).to_le_bytes();
    (0..PAGE_BYTES as u32 / 4).flat_map(word).collect()
}

async fn expect_page(branch: &Arc<Branch>, block: u32) {
    let read = branch.get_pages(&[PageTag { rel: REL, block }], Lsn(880)).await.expect("read").remove(0);
    assert!(read == page(block), "block {block}");
}

fn files_in(directory: &FilePath) -> usize {
    std::fs::read_dir(directory).map_or(0, |entries| entries.count())
}

#[tokio::test]
async fn reads_come_from_the_store_when_the_directory_is_wiped() {
    let store = Arc::new(object_store::memory::InMemory::new());
    let name = branch_ref("t", "root");
    {
        let remote = Arc::new(Remote::over(store.clone(), DiskCache::disabled(), 0));
        put_root(&remote, &name, Lsn(800)).await;
        let branch = branches(&remote, 1, Tuning::default()).get(&name).await.expect("attach");
        let pages = (0..PAGES).map(|block| {
            let key = Key::page(PageTag { rel: REL, block });
            Put { key, lsn: Lsn(880), value: Value::Image(page(block)) }
        });
        let size = Put { key: Key::rel_size(REL), lsn: Lsn(880), value: Value::rel_size(PAGES) };
        let tip = Tip { last_record_lsn: Lsn(880), prev_record_lsn: Lsn(848), last_commit_us: None };
        branch.apply(pages.chain([size]), tip);
        branch.flush().await.expect("flush");
    }
    let directory = tempfile::tempdir().expect("directory");
    let disk = DiskCache::open(directory.path(), 1 << 30).expect("cache");
    // No blocks are kept in memory, and each page is asked for once.
    let remote = Arc::new(Remote::over(store.clone(), disk.clone(), 0));
    let branch = branches(&remote, 2, Tuning::default()).get(&name).await.expect("attach");
    assert_eq!(files_in(directory.path()), 0, "nothing is loaded before it is asked for");
    expect_page(&branch, 0).await;
    kept(directory.path()).await;
    for round in 1..PAGES / 2 {
        // Wiped: file by file, the whole directory, or the file cut in half.
        for file in std::fs::read_dir(directory.path()).expect("directory") {
            let path = file.expect("file").path();
            match round % 2 {
                0 => std::fs::remove_file(&path).expect("remove"),
                _ => std::fs::write(&path, b"").expect("cut"),
            }
        }
        expect_page(&branch, 2 * round).await;
        kept(directory.path()).await;
        expect_page(&branch, 2 * round + 1).await;
    }
    std::fs::remove_dir_all(directory.path()).expect("remove");
    expect_page(&branch, 1).await;
}

/// The layer comes to the disk in the background.
async fn kept(directory: &FilePath) {
    for _ in 0..500 {
        let whole = |file: std::io::Result<std::fs::DirEntry>| {
            let file = file.expect("file");
            !file.path().to_string_lossy().ends_with(".tmp") && file.metadata().is_ok_and(|file| file.len() > 100_000)
        };
        if std::fs::read_dir(directory).expect("directory").any(whole) {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("the layer was not brought to the disk");
}
