//! A stock PostgreSQL cluster for tests, and a pageserver's branches over an object store in memory.
#![allow(dead_code)]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

use dormouse_pageserver::{
    branch::{Branches, Shared, Tuning},
    read::PageCache,
    remote::{BranchNames, DiskCache, Manifest, Remote},
};
use types::{BranchId, BranchRef, Generation, Lsn, ProjectId};

/// Where Debian's packages put PostgreSQL 15.
const BINARIES: &str = "/usr/lib/postgresql/15/bin";

/// A cluster below a temporary directory; stopped and removed when dropped.
pub struct Cluster {
    directory: tempfile::TempDir,
    running: bool,
}

impl Cluster {
    /// `initdb` as for a template; `None` (with a note) where PostgreSQL 15 is not installed.
    pub fn init() -> Option<Cluster> {
        if !Path::new(BINARIES).join("initdb").exists() {
            eprintln!("skipped: no PostgreSQL 15 in {BINARIES}");
            return None;
        }
        let directory = tempfile::Builder::new().prefix("pageserver-test-").tempdir().expect("directory");
        let cluster = Cluster { directory, running: false };
        cluster.own(cluster.directory.path());
        let pgdata = cluster.pgdata();
        let options = ["--no-sync", "-U", "dormouse_admin", "--encoding=UTF8", "--locale=C.UTF-8", "-D"];
        cluster.run("initdb", &[&options[..], &[pgdata.to_str().expect("utf-8")]].concat());
        Some(cluster)
    }

    /// An empty data directory to be filled.
    pub fn empty() -> Cluster {
        let directory = tempfile::Builder::new().prefix("pageserver-test-").tempdir().expect("directory");
        let cluster = Cluster { directory, running: false };
        std::fs::create_dir(cluster.pgdata()).expect("pgdata");
        cluster.own(cluster.directory.path());
        cluster
    }

    /// The data directory.
    pub fn pgdata(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// Gives a tree to the account that runs the server.
    pub fn own(&self, path: &Path) {
        if is_root() {
            let done = Command::new("chown").args(["-R", "postgres:postgres"]).arg(path).status().expect("chown");
            assert!(done.success());
        }
    }

    pub fn start(&mut self, settings: &[&str]) {
        let socket = self.directory.path().to_str().expect("utf-8").to_owned();
        let mut options = format!(
            "-k {socket} -c listen_addresses='' -c max_prepared_transactions=10 -c fsync=off -c lock_timeout=20s"
        );
        settings.iter().for_each(|setting| options.push_str(&format!(" -c {setting}")));
        let log = self.directory.path().join("log");
        let (pgdata, log) = (self.pgdata(), log.to_str().expect("utf-8").to_owned());
        let arguments = ["start", "-w", "-D", pgdata.to_str().expect("utf-8"), "-l", &log, "-o", &options];
        self.run("pg_ctl", &arguments);
        self.running = true;
    }

    pub fn stop(&mut self) {
        let pgdata = self.pgdata();
        self.run("pg_ctl", &["stop", "-w", "-m", "fast", "-D", pgdata.to_str().expect("utf-8")]);
        self.running = false;
    }

    /// Runs SQL in a database; the output, unaligned.
    pub fn sql(&self, database: &str, sql: &str) -> String {
        let socket = self.directory.path().to_str().expect("utf-8");
        let arguments = [
            "-X",
            "-q",
            "-A",
            "-t",
            "-v",
            "ON_ERROR_STOP=1",
            "-U",
            "dormouse_admin",
            "-h",
            socket,
            "-d",
            database,
            "-c",
            sql,
        ];
        String::from_utf8(self.run("psql", &arguments).stdout).expect("utf-8")
    }

    pub fn pgbench(&self, arguments: &[&str]) {
        let socket = self.directory.path().to_str().expect("utf-8");
        self.run("pgbench", &[&["-U", "dormouse_admin", "-h", socket], arguments].concat());
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let program = Path::new(BINARIES).join(program);
        let mut command = if is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(&program);
            command
        } else {
            Command::new(&program)
        };
        // A running server keeps the descriptors it was started with, so pipes would never end.
        let (out, err) = (self.directory.path().join("out"), self.directory.path().join("err"));
        let file = |path: &Path| std::fs::File::create(path).expect("output file");
        command.current_dir("/").args(arguments).stdin(std::process::Stdio::null());
        let status = command.stdout(file(&out)).stderr(file(&err)).status().expect("spawn");
        let output = Output {
            status,
            stdout: std::fs::read(&out).expect("output"),
            stderr: std::fs::read(&err).expect("output"),
        };
        let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        assert!(
            output.status.success(),
            "{program:?} {arguments:?}:\n{}\n{}\nlog:\n{log}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        output
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.running && !std::thread::panicking() {
            self.stop();
        } else if self.running {
            let pid = std::fs::read_to_string(self.pgdata().join("postmaster.pid")).unwrap_or_default();
            if let Some(pid) = pid.lines().next() {
                let _ = Command::new("kill").args(["-QUIT", pid]).status();
            }
        }
    }
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|metadata| std::os::unix::fs::MetadataExt::uid(&metadata) == 0)
}

pub fn branch_ref(project: &str, branch: &str) -> BranchRef {
    BranchRef { project: ProjectId::new(project).expect("id"), branch: BranchId::new(branch).expect("id") }
}

/// An object store in memory.
pub fn memory_remote() -> Arc<Remote> {
    let store = Arc::new(object_store::memory::InMemory::new());
    Arc::new(Remote::over(store, DiskCache::disabled(), 64 << 20))
}

/// A pageserver's branches, without a source of WAL.
pub fn branches(remote: &Arc<Remote>, generation: u32, tuning: Tuning) -> Arc<Branches> {
    let shared = Shared {
        remote: remote.clone(),
        pages: PageCache::new(16 << 20),
        generation: Generation(generation),
        elsewhere: Default::default(),
        ingest_memory: Default::default(),
        tuning,
        wal: None,
        background: Default::default(),
    };
    Branches::new(Arc::new(shared))
}

/// Puts an empty branch without ancestor.
pub async fn put_root(remote: &Remote, branch: &BranchRef, lsn: Lsn) {
    let manifest = Manifest::new(None, lsn, Lsn::INVALID).encode().expect("encode");
    remote.put(&BranchNames::new(branch).manifest(Generation(0)), manifest.into()).await.expect("put");
}
