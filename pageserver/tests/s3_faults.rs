//! The S3 client against a real server (moto) behind a proxy that fails by a schedule from a seed: answers 500 and 503, is slow,
//! cuts connections before and after a request was done, and cuts answers in the middle.

mod cluster;
mod faulty_store;

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use cluster::{branch_ref, branches, put_root};
use dormouse_pageserver::{
    branch::{Branch, Put, Tip, Tuning},
    check::{Repair, check_project},
    compaction::PlanLimits,
    error::StorageError,
    remote::{DiskCache, Remote, open_s3},
    storage::{Key, Value},
};
use e2e::s3::{BUCKET, S3Server};
use faulty_store::Rng;
use object_store::aws::AmazonS3Builder;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use types::{BranchRef, ForkNumber, Lsn, PAGE_BYTES, PageTag, ProjectId, RelTag};
use wire::pageserver::{BranchPoint, ErrorKind};

const REL: RelTag = RelTag { spc: 1663, db: 1, rel: 1, fork: ForkNumber::Main };
const START: Lsn = Lsn(800);
const BLOCKS: u32 = 40;
const ROUNDS: u32 = 8;
/// Of each hundred requests.
const FAULT_PERCENT: usize = 35;
/// One request is not hit more often than this one time after another: the client repeats it five times.
const FAULTS_IN_A_ROW: usize = 3;
/// First try and repetitions, as `bucket/src/config.rs` sets them.
const TRIES: usize = 6;

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    Done,
    /// Done, and answered a while later.
    Slow,
    /// Not done, answered with 500.
    Error,
    /// Not done, answered with 503 `SlowDown`.
    SlowDown,
    /// Not done: the connection ends.
    CutBefore,
    /// Not done: the connection is reset.
    Reset,
    /// Done, but the connection ends before the answer.
    CutAfter,
    /// Done, but answered with 500.
    ErrorAfter,
    /// Done, but the answer ends in the middle of its body.
    CutInBody,
    /// Never answered.
    Hang,
}

const FAULTS: [Fate; 8] = [
    Fate::Slow,
    Fate::Error,
    Fate::SlowDown,
    Fate::CutBefore,
    Fate::Reset,
    Fate::CutAfter,
    Fate::ErrorAfter,
    Fate::CutInBody,
];

/// What the proxy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weather {
    Fine,
    /// [`FAULT_PERCENT`] of the requests have another fate.
    Faults,
    /// Every request is answered with 503.
    Outage,
    /// Every connection is cut.
    Cut,
    /// What is asked for the first time is never answered.
    HangOnce,
}

/// A request that came.
#[derive(Debug)]
struct Seen {
    at: Instant,
    /// Method, path and query.
    name: String,
    fate: Fate,
}

struct State {
    server: SocketAddr,
    weather: Mutex<Weather>,
    rng: Mutex<Rng>,
    seen: Mutex<Vec<Seen>>,
    /// Faults one after another, by request.
    in_a_row: Mutex<HashMap<String, usize>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Between the client and the server; one request for each connection.
struct Proxy {
    address: SocketAddr,
    state: Arc<State>,
}

impl Proxy {
    async fn start(moto: &S3Server, seed: u64) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let address = listener.local_addr().expect("address");
        let state = Arc::new(State {
            server: address_of(moto),
            weather: Mutex::new(Weather::Fine),
            rng: Mutex::new(Rng(seed)),
            seen: Mutex::default(),
            in_a_row: Mutex::default(),
        });
        let serving = state.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let state = serving.clone();
                tokio::spawn(async move { state.serve(client).await });
            }
        });
        Proxy { address, state }
    }

    fn set(&self, weather: Weather) {
        *lock(&self.state.weather) = weather;
        lock(&self.state.seen).clear();
    }

    /// Requests since the weather was set.
    fn requests(&self) -> usize {
        lock(&self.state.seen).len()
    }

    fn fates(&self) -> BTreeMap<Fate, usize> {
        let mut fates = BTreeMap::new();
        lock(&self.state.seen).iter().for_each(|seen| *fates.entry(seen.fate).or_default() += 1);
        fates
    }

    /// How long after another the requests with this in their name came.
    fn pauses(&self, part: &str) -> Vec<Duration> {
        let seen = lock(&self.state.seen);
        let times: Vec<Instant> = seen.iter().filter(|seen| seen.name.contains(part)).map(|seen| seen.at).collect();
        times.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }
}

impl State {
    fn fate(&self, name: &str) -> Fate {
        let is_first = !lock(&self.seen).iter().any(|seen| seen.name == name);
        let fate = match *lock(&self.weather) {
            Weather::Fine => Fate::Done,
            Weather::Outage => Fate::SlowDown,
            Weather::Cut => Fate::CutBefore,
            Weather::HangOnce => {
                if is_first {
                    Fate::Hang
                } else {
                    Fate::Done
                }
            }
            Weather::Faults => {
                let mut rng = lock(&self.rng);
                let drawn = if rng.chance(FAULT_PERCENT) { FAULTS[rng.below(FAULTS.len())] } else { Fate::Done };
                let mut in_a_row = lock(&self.in_a_row);
                let count = in_a_row.entry(name.to_owned()).or_default();
                let allowed = *count < FAULTS_IN_A_ROW && (drawn != Fate::CutInBody || !name.starts_with("PUT"));
                let fate = if allowed { drawn } else { Fate::Done };
                *count = if fate == Fate::Done || fate == Fate::Slow { 0 } else { *count + 1 };
                fate
            }
        };
        lock(&self.seen).push(Seen { at: Instant::now(), name: name.to_owned(), fate });
        fate
    }

    async fn serve(&self, mut client: TcpStream) -> std::io::Result<()> {
        let Some(request) = read_request(&mut client).await? else { return Ok(()) };
        let head = String::from_utf8_lossy(&request);
        let name = head.split(" HTTP/").next().unwrap_or_default().to_owned();
        let fate = self.fate(&name);
        match fate {
            Fate::CutBefore => return Ok(()),
            Fate::Reset => return client.set_zero_linger(),
            Fate::Error => return client.write_all(&refusal("500 Internal Server Error", "InternalError")).await,
            Fate::SlowDown => return client.write_all(&refusal("503 Service Unavailable", "SlowDown")).await,
            Fate::Hang => return std::future::pending().await,
            _done => {}
        }
        let answer = forward(self.server, &request).await?;
        match fate {
            Fate::CutAfter => Ok(()),
            Fate::ErrorAfter => client.write_all(&refusal("500 Internal Server Error", "InternalError")).await,
            Fate::CutInBody => {
                let body = head_bytes(&answer).unwrap_or(answer.len());
                client.write_all(&answer[..body + (answer.len() - body) / 2]).await
            }
            Fate::Slow => {
                sleep(Duration::from_millis(200)).await;
                client.write_all(&answer).await
            }
            _done => client.write_all(&answer).await,
        }
    }
}

/// Where the body starts.
fn head_bytes(message: &[u8]) -> Option<usize> {
    message.windows(4).position(|bytes| bytes == b"\r\n\r\n").map(|at| at + 4)
}

fn refusal(status: &str, code: &str) -> Vec<u8> {
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>by schedule</Message></Error>");
    let length = body.len();
    format!("HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
        .into_bytes()
}

/// Head and body; `None` when the client left.
async fn read_request(client: &mut TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut request = Vec::new();
    loop {
        if let Some(body) = head_bytes(&request) {
            let head = String::from_utf8_lossy(&request[..body]).to_ascii_lowercase();
            assert!(!head.contains("transfer-encoding"), "not understood here: {head}");
            let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
            if request.len() >= body + length.unwrap_or(0) {
                return Ok(Some(request));
            }
        }
        if client.read_buf(&mut request).await? == 0 {
            return Ok(None);
        }
    }
}

fn address_of(server: &S3Server) -> SocketAddr {
    server.endpoint().trim_start_matches("http://").parse().expect("address")
}

/// The server's answer; it ends the connection after each.
async fn forward(server: SocketAddr, request: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut connection = TcpStream::connect(server).await?;
    connection.write_all(request).await?;
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer).await?;
    Ok(answer)
}

/// A process's way to a part of the bucket, with an empty disk cache.
struct Machine {
    remote: Arc<Remote>,
    _disk: tempfile::TempDir,
}

fn machine(endpoint: SocketAddr, prefix: &str) -> Machine {
    let builder = AmazonS3Builder::new()
        .with_endpoint(format!("http://{endpoint}"))
        .with_allow_http(true)
        .with_region("us-east-1")
        .with_access_key_id("test")
        .with_secret_access_key("test");
    let disk = tempfile::tempdir().expect("directory");
    // Small: reads go to the store.
    let cache = DiskCache::open(disk.path(), 64 << 10).expect("cache");
    let store = open_s3(builder, BUCKET, prefix).expect("client");
    Machine { remote: Arc::new(Remote::over(store, cache, 1 << 10)), _disk: disk }
}

/// Much comes of little, and what is removed goes at once.
fn tuning() -> Tuning {
    Tuning {
        plan: PlanLimits { deltas_per_merge: 2, image_min_bytes: 20_000, cell_bytes: 60_000 },
        layer_bytes: 60_000,
        removal_delay: Duration::ZERO,
        ..Tuning::default()
    }
}

fn lsn(round: u32) -> Lsn {
    START + u64::from(round + 1) * 80
}

/// The first round writes all blocks, every later one every second.
fn last_round(block: u32, round: u32) -> u32 {
    (1..=round).rev().find(|round| (block + round).is_multiple_of(2)).unwrap_or(0)
}

/// Half of each page does not compress.
fn content(block: u32, round: u32) -> Bytes {
    let mut rng = Rng(u64::from(block * 1000 + round));
    let mut page = vec![round as u8 + 1; PAGE_BYTES];
    page[..PAGE_BYTES / 2].fill_with(|| rng.next() as u8);
    page.into()
}

fn write(branch: &Branch, round: u32) {
    let lsn = lsn(round);
    let image = |block| Value::Image(content(block, round));
    let put = |block| Put { key: Key::page(PageTag { rel: REL, block }), lsn, value: image(block) };
    let pages = (0..BLOCKS).filter(|block| last_round(*block, round) == round).map(put);
    let size = Put { key: Key::rel_size(REL), lsn, value: Value::rel_size(BLOCKS) };
    branch.apply(pages.chain([size]), Tip { last_record_lsn: lsn, prev_record_lsn: lsn, last_commit_us: None });
}

async fn expect_pages(branch: &Arc<Branch>, round: u32) {
    let tags: Vec<_> = (0..BLOCKS).map(|block| PageTag { rel: REL, block }).collect();
    let pages = branch.get_pages(&tags, lsn(round)).await.expect("pages");
    for (block, page) in (0..).zip(pages) {
        assert!(
            page == content(block, last_round(block, round)),
            "{}: block {block} as of round {round}",
            branch.name()
        );
    }
}

/// The root of a project with some history and a child, by generation 1.
async fn write_history(machine: &Machine, root: &BranchRef, child: &BranchRef) {
    put_root(&machine.remote, root, START).await;
    let all = branches(&machine.remote, 1, tuning());
    let branch = all.get(root).await.expect("attach");
    for round in 0..ROUNDS {
        write(&branch, round);
        assert_eq!(branch.flush().await.expect("flush"), lsn(round));
        if round == 3 {
            all.create(child, root, BranchPoint::Head).await.expect("create");
        }
    }
    branch.compact().await.expect("compact");
    for round in 0..ROUNDS {
        expect_pages(&branch, round).await;
    }
}

#[tokio::test]
async fn faults_delay_and_change_nothing() {
    let moto = S3Server::start().await.expect("moto");
    futures::future::join_all((1..=3).map(|seed| bear_faults(&moto, seed))).await;
}

async fn bear_faults(moto: &S3Server, seed: u64) {
    let (root, child) = (branch_ref("s3", "root"), branch_ref("s3", "child"));
    let prefix = format!("seed/{seed}");
    let proxy = Proxy::start(moto, seed).await;
    proxy.set(Weather::Faults);
    write_history(&machine(proxy.address, &prefix), &root, &child).await;

    // Another machine takes over, through the same faults.
    let later = machine(proxy.address, &prefix);
    let all = branches(&later.remote, 2, tuning());
    let branch = all.get(&child).await.expect("attach");
    expect_pages(&branch, 3).await;
    let branch = all.get(&root).await.expect("attach");
    expect_pages(&branch, 3).await;
    expect_pages(&branch, ROUNDS - 1).await;
    write(&branch, ROUNDS);
    assert_eq!(branch.flush().await.expect("flush"), lsn(ROUNDS));
    branch.compact().await.expect("compact");
    all.delete(&child).await.expect("delete");
    branch.make_images_for_collection(lsn(ROUNDS), &[], &[]).await.expect("images");
    let collected = branch.collect_garbage(lsn(ROUNDS), &[], &[]).await.expect("collect");
    assert!(collected.layers > 0);
    branch.compact().await.expect("compact");
    let fates = proxy.fates();
    println!("seed {seed}: {fates:?}");
    assert!(FAULTS.iter().all(|fault| fates.contains_key(fault)), "seed {seed}: not every fault occurred: {fates:?}");

    // What there is, looked at without faults.
    let sure = machine(address_of(moto), &prefix);
    let project = ProjectId::new("s3").expect("id");
    let found = check_project(&sure.remote, &project, Repair::No).await.expect("check");
    assert!(found.damage.is_empty() && found.orphans.is_empty(), "{:?} {:?}", found.damage, found.orphans);
    let all = branches(&sure.remote, 3, tuning());
    expect_pages(&all.get(&root).await.expect("attach"), ROUNDS).await;
    assert!(matches!(all.get(&child).await, Err(StorageError::NoBranch(_))));
}

#[tokio::test]
async fn an_outage_costs_few_requests_and_is_said() {
    let moto = S3Server::start().await.expect("moto");
    let proxy = Proxy::start(&moto, 0).await;
    let here = machine(proxy.address, "some/prefix");
    let remote = &here.remote;
    for weather in [Weather::Outage, Weather::Cut] {
        for kind in ["put", "get", "get_range", "list", "delete"] {
            proxy.set(weather);
            let object = object_store::path::Path::from(format!("outage/{kind}"));
            let outcome = match kind {
                "put" => remote.put(&object, Bytes::from_static(b"x")).await.map(|_| ()),
                "get" => remote.get(&object).await.map(|_| ()),
                "get_range" => remote.get_range(&object, 0..8).await.map(|_| ()),
                "list" => remote.list(&object).await.map(|_| ()),
                _delete => remote.delete(&object).await,
            };
            let error = outcome.expect_err("an outage");
            let text = error.to_string();
            println!("{text}");
            assert!(text.starts_with(&format!("object store, {object}: ")), "{text}");
            assert!(text.contains("check the store and the way to it"), "{text}");
            assert_eq!(error.kind(), ErrorKind::Unavailable);
            assert_eq!(proxy.requests(), TRIES, "{weather:?}: {kind}");
        }
    }

    // Many that fail at the same moment wait ever longer, and not all equally long.
    proxy.set(Weather::Outage);
    let names: Vec<String> = (0..24).map(|number| format!("outage/{number:02}")).collect();
    let puts = names.iter().map(|name| async { remote.put(&name.as_str().into(), Bytes::new()).await });
    assert!(futures::future::join_all(puts).await.iter().all(Result::is_err));
    let pauses: Vec<Vec<Duration>> = names.iter().map(|name| proxy.pauses(name)).collect();
    let nth = |number: usize| pauses.iter().map(move |pauses| pauses[number]);
    let mean = |number: usize| nth(number).sum::<Duration>() / 24;
    assert!(
        pauses.iter().all(|pauses| pauses.len() == TRIES - 1 && pauses.iter().min() > Some(&Duration::from_millis(40)))
    );
    println!("pauses: {:?}", (0..TRIES - 1).map(mean).collect::<Vec<_>>());
    assert!(mean(TRIES - 2) > mean(0));
    assert!(nth(2).max() > nth(2).min().map(|least| least + Duration::from_millis(20)), "{pauses:?}");
}

#[tokio::test]
async fn a_branch_goes_on_after_an_outage() {
    let moto = S3Server::start().await.expect("moto");
    let proxy = Proxy::start(&moto, 0).await;
    let (root, child) = (branch_ref("s3", "root"), branch_ref("s3", "child"));
    let here = machine(proxy.address, "some/prefix");
    write_history(&here, &root, &child).await;
    let all = branches(&here.remote, 2, tuning());
    let branch = all.get(&root).await.expect("attach");
    write(&branch, ROUNDS);
    let started = Instant::now();
    proxy.set(Weather::Outage);
    // As the WAL feed does: it tries to write out every second.
    let mut flushes = 0;
    while started.elapsed() < Duration::from_secs(4) {
        branch.flush().await.expect_err("an outage");
        flushes += 1;
        let error = all.get(&child).await.expect_err("an outage");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        sleep(Duration::from_secs(1)).await;
    }
    // A flush first puts the claim; to attach asks for two objects at once. Nothing else asks.
    println!("{} requests of {flushes} flushes and attachments", proxy.requests());
    assert!(proxy.requests() <= flushes * 3 * TRIES, "{} requests", proxy.requests());
    expect_memory(&branch).await;
    proxy.set(Weather::Fine);
    assert_eq!(branch.flush().await.expect("flush"), lsn(ROUNDS));
    branch.compact().await.expect("compact");
    let branch =
        branches(&machine(address_of(&moto), "some/prefix").remote, 3, tuning()).get(&root).await.expect("attach");
    expect_pages(&branch, 3).await;
    expect_pages(&branch, ROUNDS).await;
}

/// What was written last needs no store.
async fn expect_memory(branch: &Arc<Branch>) {
    let block = (0..BLOCKS).find(|block| last_round(*block, ROUNDS) == ROUNDS).expect("written");
    let pages = branch.get_pages(&[PageTag { rel: REL, block }], lsn(ROUNDS)).await.expect("in memory");
    assert!(pages[0] == content(block, ROUNDS));
}

#[tokio::test]
async fn what_is_not_answered_is_asked_for_again() {
    let moto = S3Server::start().await.expect("moto");
    let proxy = Proxy::start(&moto, 0).await;
    let here = machine(proxy.address, "some/prefix");
    let object = object_store::path::Path::from("slow/there");
    here.remote.put(&object, Bytes::from_static(b"0123456789")).await.expect("put");
    let old = object_store::path::Path::from("fast/old");
    here.remote.put(&old, Bytes::from_static(b"x")).await.expect("put");
    proxy.set(Weather::HangOnce);
    let all = async {
        let (new, prefix) = ("slow/new".into(), "slow".into());
        tokio::join!(
            here.remote.put(&new, Bytes::from_static(b"x")),
            here.remote.get_range(&object, 2..4),
            here.remote.list(&prefix),
            here.remote.delete(&old),
        )
    };
    let (put, got, listed, deleted) =
        timeout(Duration::from_secs(50), all).await.expect("soon after the client's timeout");
    put.expect("put");
    assert_eq!(got.expect("get"), Bytes::from_static(b"23"));
    assert!(listed.expect("list").contains(&object));
    deleted.expect("delete");
    assert_eq!(proxy.fates()[&Fate::Hang], 4);
    assert_eq!(proxy.requests(), 8);
    assert_eq!(here.remote.get(&old).await.expect("get"), None);
}
