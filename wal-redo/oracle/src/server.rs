//! A stock Postgres server in a temporary directory, run as an unprivileged user.

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tempfile::TempDir;

/// Where Debian puts the binaries; the variable `PG_BIN_DIR` says otherwise.
const DEFAULT_BIN_DIR: &str = "/usr/lib/postgresql/15/bin";

/// A server and its directories, gone when dropped.
pub struct Server {
    root: TempDir,
    bin_dir: PathBuf,
    running: bool,
}

impl Server {
    /// Makes a cluster, which is not started. Panics when that fails, as everything here does.
    pub fn create() -> Server {
        let bin_dir = PathBuf::from(env::var("PG_BIN_DIR").unwrap_or_else(|_| DEFAULT_BIN_DIR.to_owned()));
        assert!(bin_dir.join("postgres").exists(), "no postgres in {bin_dir:?}: set PG_BIN_DIR");
        let root = tempfile::Builder::new().prefix("dormouse-wal-redo-").tempdir().expect("a temporary directory");
        let server = Server { root, bin_dir, running: false };
        if is_root() {
            server.must(Command::new("chown").arg("postgres").arg(server.root.path()));
        }
        let mut initdb = server.command("initdb");
        initdb.args(["--no-sync", "-U", "dormouse_admin", "--encoding=UTF8", "--locale=C.UTF-8", "-D"]);
        server.must(initdb.arg(server.data_dir()));
        server
    }

    /// The data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.root.path().join("data")
    }

    /// The copy that [`Server::remember`] made.
    pub fn before_dir(&self) -> PathBuf {
        self.root.path().join("before")
    }

    /// Copies the stopped server's data directory.
    pub fn remember(&self) {
        assert!(!self.running, "the server is stopped while its files are copied");
        self.must(Command::new("cp").arg("-a").arg(self.data_dir()).arg(self.before_dir()));
    }

    /// Starts it with these settings, besides those that the checks need.
    pub fn start(&mut self, settings: &[&str]) {
        let socket = format!("-c unix_socket_directories={} -c listen_addresses=", self.root.path().display());
        let mut options =
            format!("{socket} -c fsync=off -c wal_keep_size=100GB -c max_wal_size=20GB -c max_connections=30");
        settings.iter().for_each(|setting| options.push_str(&format!(" -c {setting}")));
        let mut pg_ctl = self.command("pg_ctl");
        pg_ctl.args(["-w", "-t", "60", "-D"]).arg(self.data_dir()).arg("-l").arg(self.root.path().join("log"));
        self.must(pg_ctl.arg("-o").arg(options).arg("start"));
        self.running = true;
    }

    /// Stops it with a shutdown checkpoint.
    pub fn stop(&mut self) {
        let mut pg_ctl = self.command("pg_ctl");
        self.must(pg_ctl.args(["-w", "-t", "120", "-m", "fast", "-D"]).arg(self.data_dir()).arg("stop"));
        self.running = false;
    }

    /// Runs a script in `psql`; any error in it is one here.
    pub fn sql(&self, script: &str) {
        let mut psql = self.client("psql");
        psql.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-f", "-"]);
        let mut child =
            psql.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("psql runs");
        child.stdin.take().expect("piped").write_all(script.as_bytes()).expect("psql reads its script");
        let output = child.wait_with_output().expect("psql ends");
        assert!(output.status.success(), "psql: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Runs `pgbench` with these arguments on the database `postgres`.
    pub fn pgbench(&self, arguments: &[&str]) {
        let mut pgbench = self.client("pgbench");
        self.must(pgbench.args(arguments).arg("postgres"));
    }

    fn client(&self, program: &str) -> Command {
        let mut command = self.command(program);
        command.arg("-h").arg(self.root.path()).args(["-U", "dormouse_admin"]);
        command
    }

    /// A Postgres program, run as `postgres` when we are root, for it refuses to be.
    fn command(&self, program: &str) -> Command {
        let path = self.bin_dir.join(program);
        let mut command = if is_root() {
            let mut setpriv = Command::new("setpriv");
            setpriv.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(path);
            setpriv
        } else {
            Command::new(path)
        };
        command.current_dir(self.root.path());
        command
    }

    fn must(&self, command: &mut Command) {
        let log = || fs::read_to_string(self.root.path().join("log")).unwrap_or_default();
        // A server that pg_ctl starts keeps its descriptors: with pipes, waiting for their end would never end.
        let output = self.root.path().join("output");
        let file = fs::File::create(&output).expect("a file for output");
        command.stdin(Stdio::null()).stdout(file.try_clone().expect("a second handle")).stderr(file);
        let status = command.status().expect("the program runs");
        let text = fs::read_to_string(&output).unwrap_or_default();
        assert!(status.success(), "{command:?}: {text}{}", log());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.running {
            let mut pg_ctl = self.command("pg_ctl");
            let stop = pg_ctl.args(["-w", "-m", "immediate", "-D"]).arg(self.data_dir()).arg("stop");
            // Nothing is left to do about a failure: the test has failed already.
            drop(stop.stdout(Stdio::null()).stderr(Stdio::null()).status());
        }
    }
}

fn is_root() -> bool {
    let status = fs::read_to_string(Path::new("/proc/self/status")).unwrap_or_default();
    status.lines().any(|line| line.split_whitespace().take(2).eq(["Uid:", "0"]))
}
