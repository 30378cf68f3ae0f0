//! The service over TCP: tokens, branches, positions, generations, damage.

mod cluster;

use std::{sync::Arc, time::Duration};

use cluster::{branch_ref, branches, memory_remote, put_root};
use dormouse_pageserver::{
    Config, ObjectStoreConfig, Server,
    branch::{Branches, Put, Tip, Tuning},
    error::StorageError,
    remote::{BranchNames, DiskCache, Manifest, Remote},
    storage::{CommitTime, Key, Value},
};
use pageserver_client::{ClientError, PageserverClient};
use tokio_util::sync::CancellationToken;
use types::{BranchRef, ForkNumber, Generation, Lsn, PageTag, RelTag};
use wire::{
    Scope, TokenSigner,
    auth::TokenKeys,
    pageserver::{BranchPoint, ErrorKind, ReadLsn},
};

const REL: RelTag = RelTag { spc: 1663, db: 1, rel: 1, fork: ForkNumber::Main };
const LATEST: ReadLsn = ReadLsn { request: Lsn::MAX, not_modified_since: Lsn(0) };

fn tip(lsn: u64) -> Tip {
    Tip { last_record_lsn: Lsn(lsn), prev_record_lsn: Lsn(lsn - 32), last_commit_us: None }
}

fn page(lsn: u64, byte: u8) -> [Put; 2] {
    let key = Key::page(PageTag { rel: REL, block: 0 });
    let value = Value::Image(vec![byte; types::PAGE_BYTES].into());
    [Put { key: Key::rel_size(REL), lsn: Lsn(lsn), value: Value::rel_size(1) }, Put { key, lsn: Lsn(lsn), value }]
}

fn kind(error: ClientError) -> ErrorKind {
    match error {
        ClientError::Pageserver(error) => error.kind,
        other => panic!("{other}"),
    }
}

struct Service {
    directory: tempfile::TempDir,
    signer: TokenSigner,
    address: String,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Service {
    async fn start() -> Service {
        let directory = tempfile::tempdir().expect("directory");
        let keys = TokenKeys::generate().expect("keys");
        let key_path = directory.path().join("key.pem");
        std::fs::write(&key_path, &keys.public_pem).expect("write");
        let store = ObjectStoreConfig::Local(directory.path().join("store"));
        let remote = Remote::open(&store, DiskCache::disabled(), 0).expect("open");
        put_root(&remote, &branch_ref("t", "root"), Lsn(0x1000)).await;
        let mut config = Config::new(store, directory.path().join("data"), key_path);
        config.listen = "127.0.0.1:0".parse().expect("address");
        config.generation = Some(Generation(1));
        let server = Server::bind(config).await.expect("bind");
        let (address, stop) = (server.local_addr().to_string(), CancellationToken::new());
        let running = tokio::spawn(server.run(stop.clone()));
        let signer = TokenSigner::from_pem(&keys.private_pem).expect("signer");
        Service { directory, signer, address, stop, running }
    }

    fn client(&self, scope: Scope) -> PageserverClient {
        let token = self.signer.sign(scope, Duration::from_secs(60)).expect("sign");
        PageserverClient::new(self.address.clone(), token)
    }
}

#[tokio::test]
async fn branches_are_made_asked_and_removed() {
    let service = Service::start().await;
    let client = service.client(Scope::Service);
    let (root, child, grandchild) = (branch_ref("t", "root"), branch_ref("p", "main"), branch_ref("p", "dev"));
    let at = client.create_branch(&child, &root, BranchPoint::Head).await.expect("create");
    assert_eq!(at, Lsn(0x1000));
    assert_eq!(client.create_branch(&child, &root, BranchPoint::Head).await.expect("again"), at);
    client.create_branch(&grandchild, &child, BranchPoint::Lsn(at)).await.expect("create");
    let other = client.create_branch(&grandchild, &root, BranchPoint::Head).await.expect_err("another ancestor");
    assert_eq!(kind(other), ErrorKind::Conflict);
    let early = client.create_branch(&branch_ref("p", "x"), &child, BranchPoint::Lsn(Lsn(0x800))).await;
    let early = early.expect_err("before history");
    assert!(early.to_string().contains("0/1000"), "{early}");
    assert_eq!(kind(early), ErrorKind::Invalid);

    assert_eq!(client.rel_size(&child, REL, LATEST).await.expect("size"), None);
    let pages = client.get_pages(&child, vec![PageTag { rel: REL, block: 7 }], LATEST).await.expect("pages");
    assert!(pages[0].iter().all(|byte| *byte == 0));
    assert_eq!(client.list_rels(&child, 1663, 1, LATEST).await.expect("list"), []);
    let missing = client.rel_size(&branch_ref("p", "nobody"), REL, LATEST).await.expect_err("no branch");
    assert_eq!(kind(missing), ErrorKind::NotFound);

    assert_eq!(kind(client.delete_branch(&child).await.expect_err("has a child")), ErrorKind::Conflict);
    client.delete_branch(&grandchild).await.expect("delete");
    client.delete_branch(&child).await.expect("delete");
    client.delete_branch(&child).await.expect("harmless");
    assert_eq!(kind(client.rel_size(&child, REL, LATEST).await.expect_err("gone")), ErrorKind::NotFound);
    let left = service.directory.path().join("store/projects/p/branches/main");
    let objects = std::fs::read_dir(left).map_or(0, |entries| entries.count());
    assert_eq!(objects, 0);
    service.stop.cancel();
    service.running.await.expect("join").expect("stopped cleanly");
}

#[tokio::test]
async fn tokens_bound_what_may_be_asked() {
    let service = Service::start().await;
    let root = branch_ref("t", "root");
    let (own, other) = (branch_ref("p", "main"), branch_ref("p", "other"));
    service.client(Scope::Service).create_branch(&own, &root, BranchPoint::Head).await.expect("create");
    let compute = service.client(Scope::Branch { branch: own.clone() });
    assert_eq!(compute.rel_size(&own, REL, LATEST).await.expect("own"), None);
    // What is not ingested yet is not waited for.
    assert_eq!(compute.ingested(&own, Lsn(0x9000)).await.expect("own"), Lsn(0x1000));
    assert_eq!(kind(compute.ingested(&root, Lsn(0)).await.expect_err("denied")), ErrorKind::Denied);
    assert_eq!(kind(compute.rel_size(&root, REL, LATEST).await.expect_err("denied")), ErrorKind::Denied);
    let denied = compute.create_branch(&other, &own, BranchPoint::Head).await.expect_err("denied");
    assert_eq!(kind(denied), ErrorKind::Denied);
    assert_eq!(kind(compute.delete_branch(&own).await.expect_err("denied")), ErrorKind::Denied);
    let stranger = PageserverClient::new(service.address.clone(), "nonsense".to_owned());
    assert_eq!(kind(stranger.rel_size(&own, REL, LATEST).await.expect_err("denied")), ErrorKind::Denied);
    let many = vec![PageTag { rel: REL, block: 0 }; 257];
    assert_eq!(kind(compute.get_pages(&own, many, LATEST).await.expect_err("too many")), ErrorKind::Invalid);
    let torn = ReadLsn { request: Lsn(8), not_modified_since: Lsn(16) };
    assert_eq!(kind(compute.rel_size(&own, REL, torn).await.expect_err("torn")), ErrorKind::Invalid);
    service.stop.cancel();
}

#[tokio::test]
async fn a_flood_of_one_project_does_not_starve_another() {
    let service = Service::start().await;
    let client = service.client(Scope::Service);
    let root = branch_ref("t", "root");
    let (flood, quiet) = (branch_ref("flood", "main"), branch_ref("quiet", "main"));
    for branch in [&flood, &quiet] {
        client.create_branch(branch, &root, BranchPoint::Head).await.expect("create");
    }
    let flooder = service.client(Scope::Service);
    let done = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = || done.load(std::sync::atomic::Ordering::SeqCst);
    let pages = vec![PageTag { rel: REL, block: 0 }; 64];
    let mut flooding = tokio::task::JoinSet::new();
    for _ in 0..600 {
        let (flooder, flood, pages, done) = (flooder.clone(), flood.clone(), pages.clone(), done.clone());
        flooding.spawn(async move {
            flooder.get_pages(&flood, pages, LATEST).await.expect("pages");
            done.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        });
    }
    while count() == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut reads = 0;
    while count() < 300 {
        client.get_pages(&quiet, pages[..1].to_vec(), LATEST).await.expect("page");
        reads += 1;
    }
    // Behind a queue that is not fair each read would wait for all 256 requests that a connection may have under way.
    assert!(reads > 4, "{reads} reads while another project made 300 requests");
    flooding.abort_all();
    service.stop.cancel();
}

#[tokio::test]
async fn a_copy_of_the_manifest_is_used_only_while_it_is_one() {
    let remote = memory_remote();
    let root = branch_ref("t", "root");
    put_root(&remote, &root, Lsn(800)).await;
    let (name, all) = (branch_ref("p", "b"), branches(&remote, 1, Tuning::default()));
    all.create(&name, &root, BranchPoint::Head).await.expect("create");
    let names = BranchNames::new(&name);
    let copy = loop {
        match remote.get(&names.manifest_copy()).await.expect("get") {
            Some(copy) => break copy,
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    // What attaching reads is told by a copy that says something else.
    let line = copy.iter().position(|byte| *byte == b'\n').expect("a line with the tag");
    let told = Manifest { last_commit_us: Some(7), ..Manifest::new(None, Lsn(800), Lsn::INVALID) };
    let other = [&copy[..=line], &told.encode().expect("encode")].concat();
    remote.put(&names.manifest_copy(), other.into()).await.expect("put");
    assert_eq!(remote.manifest(&name).await.expect("get"), Some((Generation(1), told)), "one round trip");
    // The same manifest written again is another object, and so is a newer generation's.
    let real = remote.get(&names.manifest(Generation(1))).await.expect("get").expect("exists");
    for generation in [1, 2] {
        remote.put(&names.manifest(Generation(generation)), real.clone()).await.expect("put");
        let (found, manifest) = remote.manifest(&name).await.expect("get").expect("exists");
        assert_eq!((found, manifest.last_commit_us), (Generation(generation), None));
    }
    remote.put(&names.manifest_copy(), Default::default()).await.expect("put");
    assert!(remote.manifest(&name).await.expect("damage to a copy is none").is_some());
}

#[tokio::test]
async fn a_taken_address_is_said_clearly() {
    let service = Service::start().await;
    let store = ObjectStoreConfig::Local(service.directory.path().join("store"));
    let key = service.directory.path().join("key.pem");
    let mut config = Config::new(store, service.directory.path().join("data2"), key);
    config.listen = service.address.parse().expect("address");
    let error = Server::bind(config).await.err().expect("taken").to_string();
    assert!(error.contains("already in use") && error.contains("--listen"), "{error}");
    service.stop.cancel();
}

async fn root_with_page(remote: &Arc<Remote>, generation: u32) -> (Arc<Branches>, BranchRef) {
    let name = branch_ref("t", "root");
    put_root(remote, &name, Lsn(800)).await;
    let first = branches(remote, generation, Tuning::default());
    let branch = first.get(&name).await.expect("attach");
    branch.apply(page(880, 1), tip(880));
    branch.flush().await.expect("flush");
    (first, name)
}

#[tokio::test]
async fn a_deposed_pageserver_does_no_harm() {
    let remote = memory_remote();
    let (old, name) = root_with_page(&remote, 3).await;
    let old_branch = old.get(&name).await.expect("attach");
    let new = branches(&remote, 4, Tuning::default());
    let new_branch = new.get(&name).await.expect("attach");
    new_branch.apply(page(960, 2), tip(960));
    assert_eq!(new_branch.flush().await.expect("flush"), Lsn(960));
    old_branch.apply(page(960, 9), tip(960));
    let error = old_branch.flush().await.expect_err("deposed");
    assert!(matches!(error, StorageError::Deposed { own: 3, newer: 4, .. }), "{error}");
    let later = branches(&remote, 5, Tuning::default()).get(&name).await.expect("attach");
    let read = later.get_pages(&[PageTag { rel: REL, block: 0 }], Lsn(960)).await.expect("read");
    assert_eq!(read[0][0], 2);
    let again = old.get(&name).await.expect_err("a newer generation owns it");
    assert!(matches!(again, StorageError::Deposed { .. }), "{again}");
}

#[tokio::test]
async fn a_manifest_written_meanwhile_is_noticed_before_writing() {
    let remote = memory_remote();
    let (old, name) = root_with_page(&remote, 3).await;
    let new_branch = branches(&remote, 4, Tuning::default()).get(&name).await.expect("attach");
    let old_branch = old.get(&name).await.expect("attach");
    old_branch.apply(page(960, 2), tip(960));
    old_branch.flush().await.expect("not deposed yet");
    new_branch.apply(page(960, 2), tip(960));
    let error = new_branch.flush().await.expect_err("its layers are not all");
    assert!(matches!(error, StorageError::Deposed { .. }), "{error}");
}

/// Twenty branches get 600 KiB each; together they may have 2 MiB in memory, or a little for each.
#[tokio::test]
async fn memory_of_all_branches_together_is_bounded() {
    let remote = memory_remote();
    let tuning = Tuning { ingest_memory_bytes: 2 << 20, ..Tuning::default() };
    let all = branches(&remote, 1, tuning.clone());
    let mut attached = Vec::new();
    for number in 0..20 {
        let name = branch_ref("t", &format!("b{number}"));
        put_root(&remote, &name, Lsn(800)).await;
        attached.push(all.get(&name).await.expect("attach"));
    }
    let mut most = 0;
    for round in 0..75 {
        let lsn = 808 + round * 8;
        for branch in &attached {
            branch.apply(page(lsn, round as u8), tip(lsn));
            branch.make_room().await;
        }
        most = most.max(attached.iter().map(|branch| branch.memory_bytes().1).sum::<usize>());
    }
    let small_shares = attached.len() * (256 << 10);
    assert!(most <= tuning.ingest_memory_bytes.max(small_shares) + (64 << 10), "{most} bytes");
    assert!(most > 1 << 20, "written out long before: {most} bytes");
    for branch in &attached {
        let read =
            branch.get_pages(&[PageTag { rel: REL, block: 0 }], branch.tip().last_record_lsn).await.expect("read");
        assert_eq!(read[0][0], 74);
    }
}

#[tokio::test]
async fn damage_is_an_error_that_names_the_object() {
    let remote = memory_remote();
    let (_, name) = root_with_page(&remote, 1).await;
    let names = BranchNames::new(&name);
    let object = remote.list(&names.root().clone().join("layers")).await.expect("list").remove(0);
    let mut bytes = remote.get(&object).await.expect("get").expect("exists").to_vec();
    bytes[40] ^= 1;
    remote.put(&object, bytes.into()).await.expect("put");
    let branch = branches(&remote, 2, Tuning::default()).get(&name).await.expect("attach");
    let error = branch.get_pages(&[PageTag { rel: REL, block: 0 }], Lsn(880)).await.expect_err("damaged");
    assert!(matches!(&error, StorageError::Damaged { object: named, .. } if *named == object.to_string()), "{error}");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
}

#[tokio::test]
async fn wal_that_does_not_come_is_unavailable() {
    let remote = memory_remote();
    let name = branch_ref("t", "root");
    put_root(&remote, &name, Lsn(800)).await;
    let tuning = Tuning { wal_wait: Duration::from_millis(50), ..Tuning::default() };
    let branch = branches(&remote, 1, tuning).get(&name).await.expect("attach");
    let at = ReadLsn { request: Lsn(880), not_modified_since: Lsn(880) };
    let error = branch.resolve(at).await.expect_err("never comes");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("0/370"), "{error}");
}

#[tokio::test]
async fn time_finds_the_position_before_the_first_later_commit() {
    let remote = memory_remote();
    let name = branch_ref("t", "root");
    put_root(&remote, &name, Lsn(800)).await;
    let all = branches(&remote, 1, Tuning::default());
    let branch = all.get(&name).await.expect("attach");
    for (lsn, timestamp_us) in [(880, 1_000_000), (960, 1_500_000), (1040, 90_000_000), (1120, 90_000_001)] {
        let commit = CommitTime { timestamp_us, before: Lsn(lsn - 80) };
        let put = Put { key: CommitTime::key(timestamp_us), lsn: Lsn(lsn), value: commit.to_value() };
        branch.apply([put], tip(lsn));
        if lsn == 960 {
            branch.flush().await.expect("flush");
        }
    }
    for (timestamp_us, lsn) in
        [(0, 800), (1_000_000, 880), (1_499_999, 880), (2_000_000, 960), (90_000_000, 1040), (1 << 50, 1120)]
    {
        assert_eq!(branch.lsn_by_timestamp(timestamp_us).await.expect("found"), Lsn(lsn), "{timestamp_us}");
    }
    for (lsn, timestamp_us) in [
        (879, None),
        (880, Some(1_000_000)),
        (1000, Some(1_500_000)),
        (1040, Some(90_000_000)),
        (1 << 40, Some(90_000_001)),
    ] {
        assert_eq!(branch.timestamp_by_lsn(Lsn(lsn)).await.expect("found"), timestamp_us, "{lsn}");
    }
    let child = branch_ref("p", "child");
    all.create(&child, &name, BranchPoint::Lsn(Lsn(960))).await.expect("create");
    let child = all.get(&child).await.expect("attach");
    assert_eq!(child.timestamp_by_lsn(Lsn(2000)).await.expect("the ancestor's"), Some(1_500_000));
    assert_eq!(child.lsn_by_timestamp(2_000_000).await.expect("found"), Lsn(960));
    let error = child.lsn_by_timestamp(1_200_000).await.expect_err("the ancestor's time");
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[tokio::test]
async fn a_vanished_disk_cache_is_read_around() {
    let directory = tempfile::tempdir().expect("directory");
    let store = Arc::new(object_store::memory::InMemory::new());
    let disk = DiskCache::open(directory.path(), 1 << 30).expect("cache");
    let remote = Arc::new(Remote::over(store.clone(), disk, 0));
    let (all, name) = root_with_page(&remote, 1).await;
    assert!(std::fs::read_dir(directory.path()).expect("cache").count() > 0, "the layer is kept locally");
    std::fs::remove_dir_all(directory.path()).expect("remove");
    drop(all);
    let branch = branches(&remote, 2, Tuning::default()).get(&name).await.expect("attach");
    let read = branch.get_pages(&[PageTag { rel: REL, block: 0 }], Lsn(880)).await.expect("read");
    assert_eq!(read[0][0], 1);
}

#[tokio::test]
async fn a_child_registration_without_a_branch_does_not_block() {
    let remote = memory_remote();
    let name = branch_ref("t", "root");
    put_root(&remote, &name, Lsn(800)).await;
    let ghost = branch_ref("p", "ghost");
    remote.put(&BranchNames::new(&name).child(&ghost, Lsn(800)), Default::default()).await.expect("put");
    branches(&remote, 1, Tuning::default()).delete(&name).await.expect("delete");
    assert!(remote.manifest(&name).await.expect("get").is_none());
    let manifest = Manifest::new(None, Lsn(8), Lsn(0));
    assert_eq!(manifest.remote_consistent_lsn, Lsn(8));
}
