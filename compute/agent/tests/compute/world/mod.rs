//! An object store, three safekeepers, a pageserver and a branch; computes on demand.

mod compute;
mod link;
mod stock;

use std::{
    fs::File,
    net::SocketAddr,
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use pageserver_client::PageserverClient;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use types::{BranchId, BranchRef, Generation, Lsn, NodeId, ProjectId};
use wire::{
    Scope, TokenSigner,
    auth::TokenKeys,
    pageserver::{BranchInfo, BranchPoint},
};

pub use compute::{Compute, ComputeOptions};

const BIN_DIR: &str = "/usr/lib/postgresql/15/bin";
const LIFETIME: Duration = Duration::from_secs(3600);

/// What may differ between worlds.
pub struct WorldOptions {
    /// The pageserver writes out, and safekeepers forget, as soon as nothing happens for a second.
    pub forgetful: bool,
    /// The most WAL that a replication slot keeps, in MiB.
    pub max_slot_wal_mib: u32,
    /// Safekeepers copy WAL to the object store at once, and keep none of it longer than they must.
    pub offloading: bool,
}

impl Default for WorldOptions {
    fn default() -> WorldOptions {
        WorldOptions { forgetful: false, max_slot_wal_mib: 2048, offloading: false }
    }
}

/// The services run inside the test's process; all ends with it.
pub struct World {
    branch: BranchRef,
    branch_start: Lsn,
    safekeepers: Vec<SocketAddr>,
    /// To the pageserver.
    pageserver: link::Link,
    /// What the pageserver hears of the safekeepers goes through these.
    links: Vec<link::Link>,
    token: String,
    service_token: String,
    /// On tmpfs, for compute directories.
    runtime: tempfile::TempDir,
    disk: tempfile::TempDir,
    shutdown: CancellationToken,
    services: TaskTracker,
}

impl World {
    /// Starts everything, with one branch of a fresh template.
    pub async fn start() -> World {
        World::start_with(WorldOptions::default()).await
    }

    /// As [`World::start`].
    pub async fn start_with(options: WorldOptions) -> World {
        let _ = tracing_subscriber::fmt().with_env_filter("warn").with_test_writer().try_init();
        let (runtime, disk) = (open_dir(Path::new("/dev/shm")), open_dir(&std::env::temp_dir()));
        let keys = TokenKeys::generate().expect("keys");
        let key_file = disk.path().join("token.pem");
        std::fs::write(&key_file, &keys.public_pem).expect("key");
        let signer = TokenSigner::from_pem(&keys.private_pem).expect("signer");
        let (shutdown, services) = (CancellationToken::new(), TaskTracker::new());

        let mut safekeepers = Vec::new();
        for id in 1..=3 {
            let data_dir = disk.path().join(format!("safekeeper-{id}"));
            let mut config = safekeeper::Config::new(NodeId(id), data_dir, key_file.clone());
            config.listen = SocketAddr::from(([127, 0, 0, 1], 0));
            config.idle_seconds = if options.forgetful { 1 } else { 30 };
            if options.offloading {
                config.object_store = Some(disk.path().join("objects").to_str().expect("path").parse().expect("store"));
                (config.offload_after_seconds, config.keep_local_mib) = (0, 0);
            }
            let server = safekeeper::Server::bind(config).await.expect("safekeeper");
            safekeepers.push(server.local_addr());
            services.spawn(server.run(shutdown.clone()));
        }

        let store: pageserver::ObjectStoreConfig =
            disk.path().join("objects").to_str().expect("path").parse().expect("store");
        std::fs::create_dir_all(disk.path().join("objects")).expect("store");
        let template = branch_ref("dormouse-template", "pg15");
        pageserver::import_template(&store, &template, &template_pgdata(disk.path()), |_, _| {}).await.expect("import");
        let service = signer.sign(Scope::Service, LIFETIME).expect("token");
        let mut config = pageserver::Config::new(store, disk.path().join("pageserver"), key_file);
        config.listen = SocketAddr::from(([127, 0, 0, 1], 0));
        config.generation = Some(Generation(1));
        config.token = service.clone();
        config.max_slot_wal_mib = options.max_slot_wal_mib;
        if options.forgetful {
            config.idle_flush = 1;
        }
        let address = |(index, address): (usize, &SocketAddr)| pageserver::SafekeeperAddress {
            id: NodeId(index as u64 + 1),
            address: address.to_string(),
        };
        let mut links = Vec::new();
        for address in &safekeepers {
            links.push(link::Link::to(*address).await);
        }
        config.safekeepers = links.iter().map(|link| &link.address).enumerate().map(address).collect();
        let server = pageserver::Server::bind(config).await.expect("pageserver");
        let pageserver = link::Link::to(server.local_addr()).await;
        services.spawn(server.run(shutdown.clone()));

        let branch = branch_ref("p", "main");
        let client = PageserverClient::new(pageserver.address.to_string(), service.clone());
        let branch_start = client.create_branch(&branch, &template, BranchPoint::Head).await.expect("branch");
        let token = signer.sign(Scope::Branch { branch: branch.clone() }, LIFETIME).expect("token");
        World {
            branch,
            branch_start,
            safekeepers,
            pageserver,
            links,
            token,
            service_token: service,
            runtime,
            disk,
            shutdown,
            services,
        }
    }
}

impl World {
    /// The pageserver gets no WAL any more, or gets it again.
    pub fn stall_ingestion(&self, stalled: bool) {
        self.links.iter().for_each(|link| link.stall(stalled));
    }

    /// Bytes that the pageserver has sent so far.
    pub fn bytes_served(&self) -> u64 {
        self.pageserver.bytes_back()
    }

    /// Where the page cache of a compute of this name is, and what it leaves.
    pub fn cache_dir(&self, name: &str) -> PathBuf {
        self.disk.path().join("cache").join(name)
    }

    fn wal_dir(&self, safekeeper: u64) -> PathBuf {
        let directory = self.disk.path().join(format!("safekeeper-{safekeeper}"));
        directory.join(self.branch.project.as_str()).join(self.branch.branch.as_str())
    }

    /// What the pageserver knows of the branch.
    pub async fn branch_info(&self) -> BranchInfo {
        let client = PageserverClient::new(self.pageserver.address.to_string(), self.service_token.clone());
        client.branch_info(&self.branch).await.expect("branch")
    }

    /// Turns bits of a safekeeper's WAL over, in more bytes than there may be between two records; doing it twice mends it.
    pub fn rot(&self, safekeeper: u64, at: Lsn) {
        let file = File::options().read(true).write(true).open(self.wal_dir(safekeeper).join(at.segment_file_name()));
        let (file, mut bytes) = (file.expect("segment"), [0; 16]);
        file.read_exact_at(&mut bytes, at.segment_offset()).expect("read");
        file.write_all_at(&bytes.map(|byte| byte ^ 0x40), at.segment_offset()).expect("write");
    }

    /// Bytes of the branch's WAL files on the safekeeper's disk that has most.
    pub fn local_wal_bytes(&self) -> u64 {
        let of_one = |id: u64| {
            let files = std::fs::read_dir(self.wal_dir(id)).into_iter().flatten().flatten();
            let wal = files.filter(|entry| entry.file_name().len() == 24);
            wal.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
        };
        (1..=3).map(of_one).max().unwrap_or(0)
    }

    /// Where the WAL begins that any safekeeper still has.
    pub async fn oldest_wal(&self) -> Lsn {
        let mut oldest = Lsn::MAX;
        for address in &self.safekeepers {
            let status = safekeeper_client::branch_status(&address.to_string(), &self.token, &self.branch).await;
            oldest = oldest.min(status.expect("status").log_start_lsn);
        }
        oldest
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.shutdown.cancel();
        self.services.close();
        // They write to the directories that are removed next.
        let ended = tokio::time::timeout(Duration::from_secs(20), self.services.wait());
        let _ = tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(ended));
    }
}

/// A directory that Postgres's user may pass through.
fn open_dir(parent: &Path) -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("dm-agent-").tempdir_in(parent).expect("directory");
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("permissions");
    dir
}

fn branch_ref(project: &str, branch: &str) -> BranchRef {
    BranchRef { project: ProjectId::new(project).expect("id"), branch: BranchId::new(branch).expect("id") }
}

/// A data directory fresh from `initdb`.
fn template_pgdata(disk: &Path) -> PathBuf {
    let dir = disk.join("template");
    std::fs::create_dir(&dir).expect("directory");
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777)).expect("permissions");
    let pgdata = dir.join("pgdata");
    let mut initdb = as_postgres(&Path::new(BIN_DIR).join("initdb"));
    initdb.args(["--no-sync", "-U", "dormouse_admin", "--encoding=UTF8", "--locale=C.UTF-8", "-D"]).arg(&pgdata);
    let output = initdb.output().expect("initdb");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    pgdata
}

/// Postgres's programs do not run as root.
fn as_postgres(program: &Path) -> Command {
    if nix::unistd::Uid::effective().is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
        command
    } else {
        Command::new(program)
    }
}

/// The numbers in a query's only row.
pub async fn row(sql: &tokio_postgres::Client, query: &str) -> Vec<i64> {
    let messages = sql.simple_query(query).await.unwrap_or_else(|error| panic!("{query}: {error:?}"));
    let rows: Vec<_> = messages
        .iter()
        .filter_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        })
        .collect();
    assert_eq!(rows.len(), 1, "{query}");
    (0..rows[0].len()).map(|index| rows[0].get(index).unwrap_or("0").parse().expect("a number")).collect()
}

/// A catalog of one role and one database, which it owns.
pub fn catalog_json(role: &str, database: &str) -> String {
    let verifier = "SCRAM-SHA-256$4096:c2FsdA==$c3RvcmVk:c2VydmVy";
    serde_json::json!({
        "roles": [{ "name": role, "scram_verifier": verifier }],
        "databases": [{ "name": database, "owner": role }],
        "drop_roles": [],
        "drop_databases": [],
    })
    .to_string()
}
