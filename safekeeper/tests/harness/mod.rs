//! Safekeepers on loopback with real files, and WAL to put into them.
// Each test program uses a part of this.
#![allow(dead_code)]

use std::{
    collections::BTreeMap,
    fs::File,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use bucket::{BranchWal, MANIFEST_PREFIX, branch_root};
use bytes::Bytes;
use dormouse_safekeeper::{Config, ReplicationConfig, ReplicationError, Server, ServerError};
use object_store::{ObjectStore, ObjectStoreExt};
use safekeeper_client::{
    BranchStatus, ProposerConfig, WalProposer, WalReader, WalReaderConfig, branch_status, set_branch_membership,
};
use tempfile::TempDir;
use tokio::{task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;
use types::{BranchId, BranchRef, Lsn, Member, Membership, NodeId, ProjectId};
use wal::{
    RmgrId,
    encode::{RecordToWrite, encode_record},
};
use wire::{Scope, TokenSigner, auth::TokenKeys};

/// Where every test branch starts.
pub const START: Lsn = Lsn(0x0150_0028);
pub const SYSTEM: u64 = 7_300_000_000_000_000_001;
/// For what must happen some time, on however busy a machine.
const LIMIT: Duration = Duration::from_secs(60);

pub struct Cluster {
    dir: TempDir,
    signer: TokenSigner,
    nodes: Vec<Node>,
    idle_seconds: u64,
    /// Where safekeepers that are started from now on copy WAL to.
    pub store: Option<Arc<dyn ObjectStore>>,
    /// See [`Config`].
    pub offload_after_seconds: u64,
    /// For safekeepers that are started from now on.
    pub replication: ReplicationConfig,
    pub branch: BranchRef,
    /// What computes are given.
    pub membership: Membership,
    records: Records,
}

/// Where each record that was written starts, by its end: what the next record names as its predecessor.
type Records = Arc<Mutex<BTreeMap<Lsn, Lsn>>>;

struct Node {
    address: SocketAddr,
    replication: SocketAddr,
    running: Option<(CancellationToken, JoinHandle<()>)>,
}

impl Node {
    /// On ports that it chooses when it is started.
    fn new() -> Node {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Node { address: any, replication: any, running: None }
    }
}

impl Cluster {
    pub async fn start(count: usize) -> Cluster {
        Cluster::with_idle_seconds(count, 1).await
    }

    /// Safekeepers that store nothing by themselves for a long time.
    pub async fn never_idle(count: usize) -> Cluster {
        Cluster::with_idle_seconds(count, 3600).await
    }

    /// Safekeepers that copy WAL to an object store at once, and keep none of it longer than they must.
    pub async fn offloading(count: usize, store: Arc<dyn ObjectStore>) -> Cluster {
        let mut cluster = Cluster::with_idle_seconds(0, 1).await;
        cluster.store = Some(store);
        cluster.make_branch(&cluster.branch).await;
        for _ in 0..count {
            cluster.join().await;
        }
        cluster.membership = Membership::first((0..count).map(|index| cluster.member(index)).collect());
        cluster
    }

    /// The object store has a manifest of the branch, as pageservers put it there.
    pub async fn make_branch(&self, branch: &BranchRef) {
        self.store().put(&manifest(branch), "a manifest".into()).await.expect("put");
    }

    /// Removes it, and all WAL of the branch, as when it is deleted; safekeepers are not told.
    pub async fn remove_branch(&self, branch: &BranchRef) {
        self.store().delete(&manifest(branch)).await.expect("delete");
        BranchWal::new(self.store(), branch).delete_below(Lsn::MAX).await.expect("delete");
    }

    fn store(&self) -> Arc<dyn ObjectStore> {
        self.store.clone().expect("store")
    }

    async fn with_idle_seconds(count: usize, idle_seconds: u64) -> Cluster {
        let dir = tempfile::Builder::new().prefix("dormouse-safekeeper").tempdir().expect("dir");
        let keys = TokenKeys::generate().expect("keys");
        std::fs::write(dir.path().join("public.pem"), &keys.public_pem).expect("write key");
        let signer = TokenSigner::from_pem(&keys.private_pem).expect("signer");
        let nodes = (0..count).map(|_| Node::new()).collect();
        let (records, membership) = (Records::default(), Membership::first(Vec::new()));
        let (branch, store, offload_after_seconds) = (branch("main"), None, 0);
        let replication = ReplicationConfig::default();
        let mut cluster = Cluster {
            dir,
            signer,
            nodes,
            idle_seconds,
            store,
            offload_after_seconds,
            replication,
            branch,
            membership,
            records,
        };
        for index in 0..count {
            cluster.run(index).await;
        }
        cluster.membership = Membership::first((0..count).map(|index| cluster.member(index)).collect());
        cluster
    }

    /// Seconds after which a branch is idle, for safekeepers that are started from now on.
    pub fn idle(&mut self, seconds: u64) {
        self.idle_seconds = seconds;
    }

    /// Starts a further safekeeper, which is no member yet.
    pub async fn join(&mut self) -> Member {
        self.nodes.push(Node::new());
        let index = self.nodes.len() - 1;
        self.run(index).await;
        self.member(index)
    }

    pub fn member(&self, index: usize) -> Member {
        Member { node: NodeId(index as u64 + 1), address: self.address(index) }
    }

    /// Tells a safekeeper of the membership.
    pub async fn tell(&self, index: usize) -> BranchStatus {
        let (address, token) = (self.address(index), self.token(Scope::Service));
        let told = set_branch_membership(&address, &token, &self.branch, &self.membership);
        within(told).await.expect("tell")
    }

    /// Starts a safekeeper, on the address it had before.
    pub async fn run(&mut self, index: usize) {
        let config = Config {
            listen: self.nodes[index].address,
            idle_seconds: self.idle_seconds,
            offload_after_seconds: self.offload_after_seconds,
            keep_local_mib: 0,
            replication: ReplicationConfig {
                replication_listen: Some(self.nodes[index].replication),
                ..self.replication.clone()
            },
            ..Config::new(NodeId(index as u64 + 1), self.data_dir(index), self.dir.path().join("public.pem"))
        };
        let server = within(async {
            loop {
                match Server::bind_over(config.clone(), self.store.clone()).await {
                    Ok(server) => return server,
                    // A killed one ends what it has begun to write, and somebody may have connected from that port.
                    Err(
                        ServerError::DataDirInUse(_)
                        | ServerError::AddressInUse(_)
                        | ServerError::Replication(ReplicationError::Listen { .. }),
                    ) => {
                        sleep(Duration::from_millis(10)).await;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        })
        .await;
        self.nodes[index].address = server.local_addr();
        self.nodes[index].replication = server.replication_addr().expect("replication");
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(server.run(shutdown.clone()));
        self.nodes[index].running = Some((shutdown, task));
    }

    /// Ends a safekeeper wherever it stands. Nothing writes to its files any more, as after the end of a process.
    pub async fn kill(&mut self, index: usize) {
        if let Some((_, task)) = self.nodes[index].running.take() {
            task.abort();
            let _ = task.await;
            // Whatever it has begun to write on another thread holds the lock.
            let lock = File::open(self.data_dir(index).join("lock")).expect("its lock");
            within(async {
                while lock.try_lock().is_err() {
                    sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
        }
    }

    /// Ends a safekeeper as a signal would.
    pub async fn stop(&mut self, index: usize) {
        if let Some((shutdown, task)) = self.nodes[index].running.take() {
            shutdown.cancel();
            task.await.expect("run");
        }
    }

    pub fn data_dir(&self, index: usize) -> PathBuf {
        self.dir.path().join(format!("sk{index}"))
    }

    pub fn branch_dir(&self, index: usize) -> PathBuf {
        self.data_dir(index).join(self.branch.project.as_str()).join(self.branch.branch.as_str())
    }

    pub fn address(&self, index: usize) -> String {
        self.nodes[index].address.to_string()
    }

    pub fn replication_port(&self, index: usize) -> u16 {
        self.nodes[index].replication.port()
    }

    pub fn token(&self, scope: Scope) -> String {
        self.token_for(scope, Duration::from_secs(600))
    }

    pub fn token_for(&self, scope: Scope, lifetime: Duration) -> String {
        self.signer.sign(scope, lifetime).expect("sign")
    }

    pub fn proposer_config(&self) -> ProposerConfig {
        ProposerConfig {
            branch: self.branch.clone(),
            membership: self.membership.clone(),
            follows_membership: true,
            token: self.token(Scope::Branch { branch: self.branch.clone() }),
            branch_start_lsn: START,
            system_identifier: Some(SYSTEM),
        }
    }

    pub async fn elect(&self) -> Compute {
        let (proposer, elected) = within(WalProposer::elect(self.proposer_config())).await.expect("elect");
        let records = Arc::clone(&self.records);
        Compute { proposer, end: elected.start_lsn, written: Vec::new(), records }
    }

    /// A candidate that knows of one safekeeper and, for all that it can tell, of two others that are away.
    pub fn stray_candidate(&self, index: usize) -> JoinHandle<()> {
        let mut config = self.proposer_config();
        for (other, member) in config.membership.members.iter_mut().enumerate() {
            if other != index {
                // Nothing listens on the discard port.
                member.address = "127.0.0.1:9".to_owned();
            }
        }
        tokio::spawn(async move {
            let _ = WalProposer::elect(config).await;
        })
    }

    pub fn reader(&self, from: Lsn) -> WalReader {
        self.reader_of(self.membership.all(), from)
    }

    /// Reads from these.
    pub fn reader_of(&self, safekeepers: Vec<Member>, from: Lsn) -> WalReader {
        let config = WalReaderConfig { branch: self.branch.clone(), safekeepers, token: self.token(Scope::Service) };
        WalReader::new(config, from)
    }

    pub async fn read(&self, from: Lsn, to: Lsn) -> Vec<u8> {
        let mut reader = self.reader(from);
        let mut bytes = Vec::new();
        while from + (bytes.len() as u64) < to {
            let chunk = within(reader.next()).await.expect("read");
            assert_eq!(chunk.begin, from + bytes.len() as u64);
            bytes.extend_from_slice(&chunk.bytes);
        }
        bytes.truncate((to.0 - from.0) as usize);
        bytes
    }

    /// Bytes of WAL files on the local disk.
    pub fn wal_bytes(&self, index: usize) -> u64 {
        let entries = std::fs::read_dir(self.branch_dir(index)).into_iter().flatten().flatten();
        let wal = entries.filter(|entry| entry.file_name().len() == 24);
        wal.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
    }

    pub async fn status(&self, index: usize) -> BranchStatus {
        let token = self.token(Scope::Service);
        branch_status(&self.address(index), &token, &self.branch).await.expect("status")
    }

    /// Waits until a safekeeper has come as far as that.
    pub async fn until(&self, index: usize, reached: impl Fn(&BranchStatus) -> bool) -> BranchStatus {
        let waited = async {
            loop {
                let status = self.status(index).await;
                if reached(&status) {
                    return status;
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        within(waited).await
    }
}

/// A compute that writes records.
pub struct Compute {
    pub proposer: WalProposer,
    pub end: Lsn,
    records: Records,
    /// All that it wrote.
    pub written: Vec<u8>,
}

impl Compute {
    /// One that has been elected where a log starts.
    pub fn of(proposer: WalProposer) -> Compute {
        Compute { proposer, end: START, records: Records::default(), written: Vec::new() }
    }

    /// Appends one record with a body of this size.
    pub fn write(&mut self, body_bytes: usize) -> Result<Lsn, safekeeper_client::Fenced> {
        let body: Vec<u8> = (0..body_bytes).map(|i| (i as u64 * 31 + self.end.0) as u8).collect();
        let record = RecordToWrite { xid: 0, rmgr: RmgrId(0), info: 0x20, main_data: &body, blocks: Vec::new() };
        let prev = self.records.lock().expect("records").get(&self.end).copied().unwrap_or_default();
        let encoded = encode_record(self.end, prev, SYSTEM, &record);
        assert_eq!(encoded.begin, self.end);
        self.proposer.append(self.end, Bytes::clone(&encoded.bytes))?;
        self.written.extend_from_slice(&encoded.bytes);
        self.end = encoded.end_lsn;
        self.records.lock().expect("records").insert(self.end, encoded.start_lsn);
        Ok(self.end)
    }

    /// Appends records and waits until they are committed.
    pub async fn commit(&mut self, records: usize, body_bytes: usize) -> Lsn {
        for _ in 0..records {
            self.write(body_bytes).expect("append");
        }
        within(self.proposer.wait_committed(self.end)).await.expect("commit");
        self.end
    }
}

fn manifest(branch: &BranchRef) -> object_store::path::Path {
    branch_root(branch).join(format!("{MANIFEST_PREFIX}00000001"))
}

pub fn branch(name: &str) -> BranchRef {
    BranchRef { project: ProjectId::new("p").expect("id"), branch: BranchId::new(name).expect("id") }
}

pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("in time")
}
