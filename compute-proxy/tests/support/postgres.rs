//! A stock Postgres in a private directory.

use std::{
    env, fs,
    os::unix::fs::chown,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, Weak},
    thread::sleep,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, User, geteuid},
};

static SHARED: Mutex<Weak<Postgres>> = Mutex::new(Weak::new());

/// Stops when dropped.
pub struct Postgres {
    dir: tempfile::TempDir,
    child: Child,
}

impl Postgres {
    /// One for all tests that run at the same time.
    pub fn shared() -> Arc<Self> {
        let mut shared = SHARED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(running) = shared.upgrade() {
            return running;
        }
        let started = Arc::new(Self::start());
        *shared = Arc::downgrade(&started);
        started
    }

    fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("dormouse-compute-proxy-").tempdir_in("/tmp").expect("directory");
        if geteuid().is_root() {
            let user = User::from_name("postgres").expect("users").expect("user postgres");
            chown(dir.path(), Some(user.uid.as_raw()), Some(user.gid.as_raw())).expect("chown");
        }
        let data = dir.path().join("data");
        let made = program("initdb")
            .args(["--no-sync", "-U", "postgres", "--encoding=UTF8", "--locale=C.UTF-8", "-A", "trust", "-D"])
            .arg(&data)
            .stdout(Stdio::null())
            .status()
            .expect("initdb runs");
        assert!(made.success(), "initdb failed");
        let log = fs::File::create(dir.path().join("log")).expect("log");
        let settings = ["listen_addresses=", "max_connections=300", "shared_buffers=16MB", "fsync=off"];
        let child = program("postgres")
            .args(settings.iter().flat_map(|setting| ["-c", setting]))
            .arg("-k")
            .arg(dir.path())
            .arg("-D")
            .arg(&data)
            .stdout(log.try_clone().expect("log"))
            .stderr(log)
            .spawn()
            .expect("postgres runs");
        let postgres = Self { dir, child };
        postgres.admin_retrying(
            "CREATE ROLE alice LOGIN; CREATE ROLE bob LOGIN; CREATE ROLE carol LOGIN; CREATE ROLE dave LOGIN SUPERUSER; GRANT pg_read_server_files TO alice; \
                                 GRANT ALL ON SCHEMA public TO alice",
        );
        postgres
    }

    /// Its Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join(".s.PGSQL.5432")
    }

    /// Ends a role's sessions, as a compute that goes to sleep does; returns when they are gone.
    pub fn terminate_backends_of(&self, role: &str) {
        let sessions = format!("FROM pg_stat_activity WHERE usename = '{role}'");
        self.admin_retrying(&format!("SELECT pg_terminate_backend(pid, 10000) {sessions}"));
    }

    /// Runs SQL as the superuser, past the proxy, as soon as Postgres takes connections.
    fn admin_retrying(&self, sql: &str) {
        let begun = Instant::now();
        loop {
            let mut psql = Command::new("psql");
            psql.args(["-X", "-q", "-U", "postgres", "-d", "postgres", "-h"]).arg(self.dir.path()).args(["-c", sql]);
            if psql.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("psql runs").success() {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "postgres does not start");
            sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGQUIT);
        let _ = self.child.wait();
    }
}

/// Postgres refuses to run as root.
fn program(name: &str) -> Command {
    let bin = env::var_os("DORMOUSE_PG_BIN").unwrap_or_else(|| "/usr/lib/postgresql/15/bin".into());
    let path = PathBuf::from(bin).join(name);
    if !geteuid().is_root() {
        return Command::new(path);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(path).current_dir("/tmp");
    command
}
