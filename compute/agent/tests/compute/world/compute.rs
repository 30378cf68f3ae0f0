//! A compute as a process.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::OnceLock,
    time::Duration,
};

use control_plane_api::compute::{AgentEvent, AgentStatus, ComputeReady, ComputeSpec, StopAnswer};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    process::{Child, Command},
    time::timeout,
};
use types::{EndpointId, Lsn, Member, Membership, NodeId};

use super::{BIN_DIR, World, catalog_json};

const START_LIMIT: Duration = Duration::from_secs(60);

/// What may differ between computes.
#[derive(Default)]
pub struct ComputeOptions {
    /// Settings of Postgres.
    pub settings: &'static [(&'static str, &'static str)],
    /// With the role `alice` and her database `main`.
    pub catalog: bool,
    /// Limit of each of the page cache's two budgets.
    pub cache_bytes: Option<u64>,
    /// Its page cache stays while it sleeps.
    pub warm: bool,
    /// The branch's subscriptions are its ancestor's.
    pub disable_subscriptions: bool,
    /// Instead of the branch's.
    pub token: Option<&'static str>,
}

/// A running compute; killed when dropped.
pub struct Compute {
    child: Child,
    directory: PathBuf,
    log: PathBuf,
    pub ready: ComputeReady,
}

impl World {
    /// Starts a compute of this name and waits until it is ready.
    pub async fn compute(&self, name: &str, options: ComputeOptions) -> Compute {
        self.try_compute(name, options).await.unwrap_or_else(|error| panic!("{error}"))
    }

    /// As [`World::compute`]; an error says what the agent printed and logged.
    pub async fn try_compute(&self, name: &str, options: ComputeOptions) -> Result<Compute, String> {
        let directory = self.runtime.path().join(name);
        let log = self.disk.path().join(format!("{name}.log"));
        let spec = serde_json::to_vec(&self.spec(name, &directory, &options)).expect("spec");
        let stderr = File::options().create(true).append(true).open(&log).expect("log");
        let mut child = Command::new(agent_program())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .expect("agent");
        let mut stdin = child.stdin.take().expect("stdin");
        stdin.write_all(&spec).await.expect("spec");
        drop(stdin);
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout"));
        timeout(START_LIMIT, stdout.read_line(&mut line)).await.expect("in time").expect("line");
        match serde_json::from_str(&line) {
            Ok(AgentEvent::Ready(ready)) => {
                eprintln!("{name}: {:?}", ready.timings_us);
                Ok(Compute { child, directory, log, ready })
            }
            Ok(AgentEvent::Failed { error }) => {
                assert!(!child.wait().await.expect("wait").success());
                Err(error)
            }
            Err(error) => panic!("{error}: {line}\n{}", std::fs::read_to_string(&log).unwrap_or_default()),
        }
    }

    fn spec(&self, name: &str, directory: &Path, options: &ComputeOptions) -> ComputeSpec {
        let address = |(index, address): (usize, &std::net::SocketAddr)| Member {
            node: NodeId(index as u64 + 1),
            address: address.to_string(),
        };
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let catalog = options.catalog.then(|| catalog_json("alice", "main"));
        ComputeSpec {
            branch: self.branch.clone(),
            endpoint: EndpointId::new(&format!("ep-{name}")).expect("id"),
            branch_start_lsn: self.branch_start,
            compute_dir: directory.to_owned(),
            page_cache_dir: self.cache_dir(name),
            membership: Membership::first(self.safekeepers.iter().enumerate().map(address).collect()),
            pageserver: self.pageserver.address.to_string(),
            token: options.token.map_or_else(|| self.token.clone(), str::to_owned),
            postgres_bin_dir: BIN_DIR.into(),
            shim_path: shim_library(self.disk.path()),
            postgres_user: Some("postgres".to_owned()),
            settings: options.settings.iter().map(owned).collect(),
            catalog: catalog.map(|text| serde_json::from_str(&text).expect("catalog")),
            disable_subscriptions: options.disable_subscriptions,
            page_cache_bytes: options.cache_bytes.unwrap_or(64 << 20),
            kept_pages_bytes: options.cache_bytes.unwrap_or(256 << 20),
            sleeping_caches_bytes: if options.warm { 1 << 30 } else { 0 },
        }
    }
}

impl Compute {
    /// Connects as the superuser.
    pub async fn connect(&self, database: &str) -> tokio_postgres::Client {
        self.connect_as("dormouse_admin", database).await
    }

    /// Connects over Postgres's socket.
    pub async fn connect_as(&self, user: &str, database: &str) -> tokio_postgres::Client {
        let mut config = tokio_postgres::Config::new();
        config.host_path(&self.directory).port(5432).user(user).dbname(database);
        let (client, connection) = config.connect(tokio_postgres::NoTls).await.unwrap_or_else(|error| {
            panic!("{error:?}\n{}", std::fs::read_to_string(&self.log).unwrap_or_default());
        });
        tokio::spawn(connection);
        client
    }

    /// Where it lives.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Stops it cleanly; where its WAL ended.
    pub async fn stop(&mut self) -> Lsn {
        let (status, body) = self.http("POST", "/stop", "").await;
        assert_eq!(status, 200, "{body}\n{}", std::fs::read_to_string(&self.log).unwrap_or_default());
        let answer: StopAnswer = serde_json::from_str(&body).expect("answer");
        let exit = timeout(Duration::from_secs(10), self.exit()).await.expect("it ends");
        assert!(exit.success());
        answer.commit_lsn
    }

    /// SIGKILL to the agent: Postgres goes with it.
    pub async fn kill(&mut self) {
        self.child.kill().await.expect("kill");
    }

    /// Waits for its end.
    pub async fn exit(&mut self) -> ExitStatus {
        self.child.wait().await.expect("wait")
    }

    /// `GET /status`.
    pub async fn status(&self) -> AgentStatus {
        let (status, body) = self.http("GET", "/status", "").await;
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).expect("status")
    }

    /// One request to the agent: status and body.
    pub async fn http(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = UnixStream::connect(self.directory.join("agent.sock")).await.expect("agent.sock");
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).await.expect("request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("status");
        (status, body.to_owned())
    }
}

/// The directory that cargo builds into.
fn target_dir() -> PathBuf {
    let test = std::env::current_exe().expect("path");
    test.ancestors().nth(2).expect("target/<profile>/deps/<test>").to_owned()
}

/// Builds what `cargo test --test compute` alone would not: the agent's program and the shim. With `DORMOUSE_BUILT` set they are
/// there already; cargo would build much of it again, as for these packages alone.
fn build() {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        if std::env::var_os("DORMOUSE_BUILT").is_some() {
            return;
        }
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        for target in [&["-p", "dormouse-shim"][..], &["-p", "dormouse-compute-agent", "--example", "compute"]] {
            let status = std::process::Command::new(&cargo).args(["build", "-q"]).args(target).status();
            assert!(status.expect("cargo").success());
        }
    });
}

fn agent_program() -> PathBuf {
    build();
    target_dir().join("examples/compute")
}

/// The shim, copied to where Postgres's user can read it.
fn shim_library(disk: &Path) -> PathBuf {
    build();
    let copy = disk.join("libdormouse_shim.so");
    if !copy.exists() {
        std::fs::copy(target_dir().join("libdormouse_shim.so"), &copy).expect("copy");
    }
    copy
}
