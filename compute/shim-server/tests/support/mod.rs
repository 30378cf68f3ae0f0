//! Stock servers, with and without the shim, for tests: the shimmed one's relations come from a plain directory.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod regress;
pub mod replay;

use std::{
    fs,
    os::unix::{fs::chown, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::*},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use dormouse_shim_server::{
    BackendError, PageCache, PageCacheConfig, ShimBackend, ShimServer, required_settings, shim_environment,
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use types::{BlockNumber, ForkNumber, Oid, PAGE_BYTES, PageTag, REL_SEGMENT_BLOCKS, RelTag, oids};

/// Debian's place; another may be named.
pub fn postgres_bin(program: &str) -> PathBuf {
    let dir = std::env::var_os("DORMOUSE_TEST_PG_BIN").unwrap_or_else(|| "/usr/lib/postgresql/15/bin".into());
    PathBuf::from(dir).join(program)
}

/// The user and group that servers run as: Postgres refuses root.
fn postgres_user() -> Option<(u32, u32)> {
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } != 0 {
        return None;
    }
    static USER: OnceLock<(u32, u32)> = OnceLock::new();
    Some(*USER.get_or_init(|| {
        let passwd = fs::read_to_string("/etc/passwd").expect("passwd");
        let line = passwd.lines().find(|line| line.starts_with("postgres:")).expect("a user named postgres");
        let fields: Vec<&str> = line.split(':').collect();
        (fields[2].parse().expect("uid"), fields[3].parse().expect("gid"))
    }))
}

pub fn give_to_postgres(path: &Path) {
    if let Some((uid, gid)) = postgres_user() {
        chown(path, Some(uid), Some(gid)).expect("chown");
    }
}

/// A command that runs as Postgres's user.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(postgres_bin(program));
    if let Some((uid, gid)) = postgres_user() {
        command.uid(uid).gid(gid);
    }
    command.env("PGUSER", "dormouse_admin").env("PGDATABASE", "postgres").env("LC_ALL", "C.UTF-8").current_dir("/");
    command
}

pub fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().expect("runs");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    stdout.into_owned()
}

/// The library, built if need be: with `DORMOUSE_BUILT` set it is there already.
pub fn shim_library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("DORMOUSE_TEST_SHIM") {
            return path.into();
        }
        if std::env::var_os("DORMOUSE_BUILT").is_none() {
            let status = Command::new(env!("CARGO")).args(["build", "--quiet", "-p", "dormouse-shim"]).status();
            assert!(status.expect("cargo").success());
        }
        let own = std::env::current_exe().expect("own path");
        own.parent().and_then(Path::parent).expect("target directory").join("libdormouse_shim.so")
    })
}

/// A directory that Postgres's user can use, below a short path (sockets).
pub fn directory() -> TempDir {
    let dir = tempfile::Builder::new().prefix("dormouse-shim-").tempdir_in("/tmp").expect("directory");
    give_to_postgres(dir.path());
    dir
}

/// Makes a cluster in `pgdata`.
pub fn initdb(pgdata: &Path) {
    let options = ["--no-sync", "-U", "dormouse_admin", "--encoding=UTF8", "--locale=C.UTF-8", "-A", "trust", "-D"];
    run(command("initdb").args(options).arg(pgdata));
}

/// What the tests change about their servers.
#[derive(Clone, Debug)]
pub struct Options {
    pub settings: Vec<String>,
    pub clean_bytes: u64,
    pub kept_bytes: u64,
}

impl Default for Options {
    fn default() -> Options {
        let settings = vec!["shared_buffers=1MB".to_owned(), "autovacuum=off".to_owned()];
        Options { settings, clean_bytes: 64 << 20, kept_bytes: 4 << 30 }
    }
}

/// Serves the relations of a cluster that nobody runs. WAL is never "shipped": what is written must be kept.
pub struct PlainDirectory {
    pgdata: PathBuf,
    /// WAL syncs fail from now on.
    pub fail_wal: AtomicBool,
    /// Pages cannot be had from now on.
    pub fail_pages: AtomicBool,
    pub pages_read: AtomicU64,
    pub wal_syncs: AtomicU64,
    pub wal_announced: AtomicU64,
}

impl PlainDirectory {
    pub fn new(pgdata: &Path) -> PlainDirectory {
        PlainDirectory {
            pgdata: pgdata.to_owned(),
            fail_wal: AtomicBool::new(false),
            fail_pages: AtomicBool::new(false),
            pages_read: AtomicU64::new(0),
            wal_syncs: AtomicU64::new(0),
            wal_announced: AtomicU64::new(0),
        }
    }

    fn dir(&self, spc: Oid, db: Oid) -> PathBuf {
        if spc == oids::GLOBAL_TABLESPACE {
            return self.pgdata.join("global");
        }
        self.pgdata.join("base").join(db.to_string())
    }

    fn file(&self, rel: &RelTag, segment: u32) -> PathBuf {
        let suffix = if segment > 0 { format!(".{segment}") } else { String::new() };
        self.dir(rel.spc, rel.db).join(format!("{}{}{suffix}", rel.rel, rel.fork.suffix()))
    }

    /// A page, zeroes past the end.
    pub fn page(&self, tag: &PageTag) -> [u8; PAGE_BYTES] {
        use std::os::unix::fs::FileExt;
        let mut page = [0; PAGE_BYTES];
        if let Ok(file) = fs::File::open(self.file(&tag.rel, tag.block / REL_SEGMENT_BLOCKS)) {
            let offset = u64::from(tag.block % REL_SEGMENT_BLOCKS) * PAGE_BYTES as u64;
            // Short or nothing past the end.
            let _ = file.read_at(&mut page, offset).expect("readable");
        }
        page
    }

    /// All forks of a database directory.
    pub fn list(&self, spc: Oid, db: Oid) -> Vec<(RelTag, BlockNumber)> {
        let Ok(entries) = fs::read_dir(self.dir(spc, db)) else { return Vec::new() };
        let names = entries.map(|entry| entry.expect("entry").file_name().into_string().expect("text"));
        let rels = names.filter_map(|name| relation_file(spc, db, &name));
        rels.filter_map(|rel| Some((rel, self.size(&rel)?))).collect()
    }

    pub fn size(&self, rel: &RelTag) -> Option<BlockNumber> {
        let metadata = fs::metadata(self.file(rel, 0)).ok()?;
        Some((metadata.len() / PAGE_BYTES as u64) as BlockNumber)
    }
}

#[async_trait]
impl ShimBackend for PlainDirectory {
    async fn get_page(&self, tag: PageTag) -> Result<bytes::Bytes, BackendError> {
        if self.fail_pages.load(Relaxed) {
            return Err(BackendError::Storage("told to fail".to_owned()));
        }
        self.pages_read.fetch_add(1, Relaxed);
        Ok(bytes::Bytes::copy_from_slice(&self.page(&tag)))
    }

    async fn get_pages_ahead(&self, tags: Vec<PageTag>) -> Result<Vec<(PageTag, bytes::Bytes)>, BackendError> {
        let read = |tag| (tag, bytes::Bytes::copy_from_slice(&self.page(&tag)));
        Ok(tags.into_iter().map(read).collect())
    }

    async fn rel_size(&self, rel: RelTag) -> Result<Option<BlockNumber>, BackendError> {
        Ok(self.size(&rel))
    }

    async fn list_rels(&self, spc: Oid, db: Oid) -> Result<Vec<(RelTag, BlockNumber)>, BackendError> {
        Ok(self.list(spc, db))
    }

    async fn sync_wal(&self) -> Result<(), BackendError> {
        self.wal_syncs.fetch_add(1, Relaxed);
        if self.fail_wal.load(Relaxed) { Err(BackendError::Fenced("term 2".to_owned())) } else { Ok(()) }
    }

    async fn wal_written(&self) {
        self.wal_announced.fetch_add(1, Relaxed);
    }
}

/// The fork whose first segment file has this name.
fn relation_file(spc: Oid, db: Oid, name: &str) -> Option<RelTag> {
    let (rel, suffix) = name.split_at(name.find('_').unwrap_or(name.len()));
    let fork = ForkNumber::ALL.into_iter().find(|fork| fork.suffix() == suffix)?;
    Some(RelTag { spc, db, rel: rel.parse().ok()?, fork })
}

/// Copies a data directory without its relation files.
fn copy_without_relations(from: &Path, to: &Path) {
    fs::create_dir(to).expect("mkdir");
    fs::set_permissions(to, std::os::unix::fs::PermissionsExt::from_mode(0o700)).expect("chmod");
    give_to_postgres(to);
    for entry in fs::read_dir(from).expect("readable") {
        let entry = entry.expect("entry");
        let (name, target) = (entry.file_name(), to.join(entry.file_name()));
        let parent_has_relations = from.ends_with("global") || from.parent().is_some_and(|dir| dir.ends_with("base"));
        if entry.file_type().expect("type").is_dir() {
            copy_without_relations(&entry.path(), &target);
        } else if !parent_has_relations || relation_file(0, 0, name.to_str().expect("text")).is_none() {
            fs::copy(entry.path(), &target).expect("copy");
            give_to_postgres(&target);
        }
    }
}

/// A running server.
pub struct Server {
    pub dir: PathBuf,
    pub pgdata: PathBuf,
    pub process: Child,
}

impl Server {
    /// Starts an ordinary server on `dir/name`.
    pub fn start(
        dir: &Path,
        name: &str,
        settings: &[String],
        environment: &[(std::ffi::OsString, std::ffi::OsString)],
    ) -> Server {
        let sockets = dir.join(format!("{name}.s"));
        fs::create_dir_all(&sockets).expect("mkdir");
        give_to_postgres(&sockets);
        let pgdata = dir.join(name);
        let log = fs::File::create(dir.join(format!("{name}.log"))).expect("log");
        let mut command = command("postgres");
        command.arg("-D").arg(&pgdata).arg("-k").arg(&sockets).args(["-h", ""]);
        for setting in settings {
            command.arg("-c").arg(setting);
        }
        command.envs(environment.iter().cloned()).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("log")).stderr(log);
        let server = Server { dir: sockets, pgdata, process: command.spawn().expect("postgres starts") };
        server.wait_ready();
        server
    }

    fn wait_ready(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !command("pg_isready").arg("-q").arg("-h").arg(&self.dir).status().expect("pg_isready").success() {
            assert!(Instant::now() < deadline, "the server is not ready:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.pgdata.with_extension("log")).unwrap_or_default()
    }

    pub fn client(&self, program: &str) -> Command {
        let mut command = command(program);
        command.env("PGHOST", &self.dir);
        command
    }

    /// Runs statements, split at semicolons, each by itself; an error fails the test.
    pub fn sql(&self, sql: &str) -> String {
        let statements = sql.split(';').flat_map(|statement| ["-c", statement]);
        run(self.client("psql").args(["-XAtq", "-v", "ON_ERROR_STOP=1"]).args(statements)).trim_end().to_owned()
    }

    /// Runs SQL that may fail: standard output and standard error.
    pub fn try_sql(&self, sql: &str) -> (String, String) {
        let output = self.client("psql").args(["-XAtq", "-c", sql]).output().expect("psql");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        (text(&output.stdout), text(&output.stderr))
    }

    /// Runs a script with everything that it says, errors too.
    pub fn script(&self, path: &Path) -> String {
        let output = self.client("psql").args(["-Xq", "-f"]).arg(path).output().expect("psql");
        format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: no pointers; our own child.
        unsafe { libc::kill(self.process.id().cast_signed(), signal) };
    }

    /// Waits for the end, after a signal or by itself.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = self.process.try_wait().expect("wait") {
                return status;
            }
            assert!(Instant::now() < deadline, "the server does not stop:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A fast shutdown.
    pub fn stop(mut self) {
        self.signal(libc::SIGINT);
        let status = self.wait();
        assert!(status.success(), "{status}:\n{}", self.log());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(None)) {
            self.signal(libc::SIGQUIT);
            self.wait();
        }
    }
}

/// A server under the shim, and its agent's part.
pub struct Shimmed<B = PlainDirectory> {
    pub server: Server,
    pub backend: Arc<B>,
    pub cache: PageCache,
    shutdown: CancellationToken,
    runtime: tokio::runtime::Runtime,
}

impl Shimmed {
    /// Starts a server in `dir/name` whose relations are those of the cluster `dir/original`.
    pub fn start(dir: &Path, name: &str, options: &Options) -> Shimmed {
        Shimmed::start_on(dir, name, options, |_| Arc::new(PlainDirectory::new(&dir.join("original"))))
    }
}

impl<B: ShimBackend> Shimmed<B> {
    /// As [`Shimmed::start`], with a backend of one's own.
    pub fn start_on(dir: &Path, name: &str, options: &Options, make: impl FnOnce(&PageCache) -> Arc<B>) -> Shimmed<B> {
        let pgdata = dir.join(name);
        copy_without_relations(&dir.join("original"), &pgdata);
        let socket = dir.join(format!("{name}.agent"));
        let config = PageCacheConfig {
            shm_path: Path::new("/dev/shm").join(dir.file_name().expect("a name")),
            pages_path: dir.join(format!("{name}.pages")),
            clean_bytes: options.clean_bytes,
            kept_bytes: options.kept_bytes,
        };
        let cache = PageCache::create(&config).expect("page cache");
        cache.set_unlogged(&init_forks(&dir.join("original"))).expect("unlogged relations");
        let backend = make(&cache);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("tokio");
        let shutdown = CancellationToken::new();
        let bound = {
            let _inside = runtime.enter();
            ShimServer::bind(&socket, backend.clone(), cache.clone()).expect("bind")
        };
        runtime.spawn(bound.run(shutdown.clone()));
        for path in [&socket, &config.shm_path, &config.pages_path] {
            give_to_postgres(path);
        }
        let required = required_settings().into_iter().map(|(name, value)| format!("{name}={value}"));
        let settings: Vec<String> = required.chain(options.settings.iter().cloned()).collect();
        // Postgres's user may not be able to see the target directory.
        let library = dir.join("shim.so");
        fs::copy(shim_library(), &library).expect("the library was built");
        let environment = shim_environment(&library, &pgdata, &socket, &config);
        let server = Server::start(dir, name, &settings, &environment);
        // Everybody who needs it has the mapping, or inherits it.
        fs::remove_file(&config.shm_path).expect("remove");
        Shimmed { server, backend, cache, shutdown, runtime }
    }

    pub fn stop(self) {
        self.server.stop();
        self.shutdown.cancel();
        self.runtime.shutdown_timeout(Duration::from_secs(5));
    }
}

/// The init forks of a cluster: its unlogged relations.
fn init_forks(pgdata: &Path) -> Vec<RelTag> {
    let dbs = fs::read_dir(pgdata.join("base")).expect("base").map(|entry| entry.expect("entry").path());
    let files = dbs.flat_map(|db| {
        let number: Oid = db.file_name().and_then(|name| name.to_str()?.parse().ok()).unwrap_or(0);
        let entries = fs::read_dir(db).expect("database").map(|entry| entry.expect("entry").file_name());
        entries.map(move |name| (number, name.into_string().expect("text"))).collect::<Vec<_>>()
    });
    files
        .filter_map(|(db, name)| relation_file(oids::DEFAULT_TABLESPACE, db, &name))
        .filter(|rel| rel.fork == ForkNumber::Init)
        .collect()
}

/// Relation files that lie in a data directory: there must be none.
pub fn real_relation_files(pgdata: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![pgdata.join("global")];
    dirs.extend(fs::read_dir(pgdata.join("base")).expect("base").map(|entry| entry.expect("entry").path()));
    for dir in dirs.iter().filter(|dir| dir.is_dir()) {
        let files = fs::read_dir(dir).expect("readable").map(|entry| entry.expect("entry").path());
        found.extend(files.filter(|file| relation_file(0, 0, file.file_name().unwrap().to_str().unwrap()).is_some()));
    }
    found
}
