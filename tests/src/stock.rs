//! The peer: a stock `postgres` on an ordinary local data directory, reached over its Unix socket.

use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, User, chown, geteuid},
};

/// The superuser of Dormouse's computes, and so of the peer.
pub const SUPERUSER: &str = "dormouse_admin";

/// A cluster made by `initdb` as Dormouse makes its template. Stopped, and removed, when dropped.
pub struct StockServer {
    home: tempfile::TempDir,
    running: Option<Child>,
}

/// A program of PostgreSQL's, run as the user that servers run as: Postgres refuses root, and what the server writes must be
/// the client's to read.
pub fn as_postgres(program: impl AsRef<std::ffi::OsStr>) -> anyhow::Result<Command> {
    let mut command = Command::new(program);
    if let Some(user) = postgres_user()? {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    command.stdin(Stdio::null()).current_dir("/");
    Ok(command)
}

/// Gives a file or directory to that user.
pub fn give_to_postgres(path: &Path) -> anyhow::Result<()> {
    if let Some(user) = postgres_user()? {
        chown(path, Some(user.uid), Some(user.gid)).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// `None` when this is an ordinary user, who runs everything himself.
fn postgres_user() -> anyhow::Result<Option<User>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    Ok(Some(User::from_name("postgres")?.context("there is no user postgres")?))
}

/// The name of the user that servers run as.
pub fn host_user() -> anyhow::Result<String> {
    let user = match postgres_user()? {
        Some(user) => Some(user),
        None => User::from_uid(geteuid())?,
    };
    Ok(user.context("this user has no name")?.name)
}

/// Runs a command to its end; its standard output. Errors hold the end of what it said.
pub fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("{:?}", command.get_program()))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let tail: Vec<&str> = said.lines().rev().take(40).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        bail!("{:?}: {}\n{}", command.get_program(), output.status, tail.join("\n"));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl StockServer {
    /// Makes the data directory, with these settings on top of the defaults.
    pub fn create(settings: &[(&str, &str)]) -> anyhow::Result<StockServer> {
        let home = tempfile::Builder::new().prefix("stock-").tempdir()?;
        give_to_postgres(home.path())?;
        let server = StockServer { home, running: None };
        let mut initdb = as_postgres(crate::pg_bin_dir().join("initdb"))?;
        initdb.arg("-D").arg(server.data_dir());
        initdb.args(["-U", SUPERUSER, "--encoding=UTF8", "--locale=C.UTF-8", "-A", "trust"]);
        run(&mut initdb)?;
        let path = server.data_dir().join("postgresql.conf");
        let mut conf = std::fs::read_to_string(&path)?;
        conf.push_str("listen_addresses = ''\n");
        conf.push_str(&format!("unix_socket_directories = '{}'\n", server.socket_dir().display()));
        settings.iter().for_each(|(name, value)| conf.push_str(&format!("{name} = '{value}'\n")));
        std::fs::write(&path, conf)?;
        Ok(server)
    }

    /// A server on a data directory that `fill` makes, such as a base backup: with its own settings but for the socket.
    pub fn on(fill: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<StockServer> {
        let home = tempfile::Builder::new().prefix("stock-").tempdir()?;
        give_to_postgres(home.path())?;
        let server = StockServer { home, running: None };
        fill(&server.data_dir())?;
        let path = server.data_dir().join("postgresql.conf");
        let mut conf = std::fs::read_to_string(&path)?;
        conf.push_str(&format!("unix_socket_directories = '{}'\n", server.socket_dir().display()));
        std::fs::write(&path, conf)?;
        Ok(server)
    }

    /// Starts it and waits until it takes connections.
    pub async fn start(&mut self) -> anyhow::Result<()> {
        ensure!(self.running.is_none(), "already running");
        let log = std::fs::File::options().create(true).append(true).open(self.log_path())?;
        let mut postgres = as_postgres(crate::pg_bin_dir().join("postgres"))?;
        postgres.arg("-D").arg(self.data_dir()).stdout(log.try_clone()?).stderr(log);
        // What libpq inside the server takes for the local host: Debian's default is a directory of its own.
        postgres.env("PGHOST", self.socket_dir());
        // Where it looks for client certificates: not where the test's user has them.
        postgres.env("HOME", self.socket_dir());
        self.running = Some(postgres.spawn()?);
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.connect("postgres").await.is_err() {
            ensure!(Instant::now() < deadline, "the stock server did not start:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// A fast shutdown.
    pub fn stop(&mut self) -> anyhow::Result<()> {
        let Some(mut child) = self.running.take() else { return Ok(()) };
        kill(Pid::from_raw(child.id() as i32), Signal::SIGINT)?;
        let status = child.wait()?;
        ensure!(status.success(), "the stock server ended with {status}:\n{}", self.log());
        Ok(())
    }

    /// SIGQUIT: what is not on disk is lost, as in a crash.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        let Some(mut child) = self.running.take() else { return Ok(()) };
        kill(Pid::from_raw(child.id() as i32), Signal::SIGQUIT)?;
        child.wait()?;
        Ok(())
    }

    /// A connection as the superuser.
    pub async fn connect(&self, database: &str) -> anyhow::Result<tokio_postgres::Client> {
        connect_local(&self.socket_dir(), database).await
    }

    /// Where its socket is.
    pub fn socket_dir(&self) -> PathBuf {
        self.home.path().to_owned()
    }

    /// Its data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.home.path().join("data")
    }

    fn log_path(&self) -> PathBuf {
        self.home.path().join("log")
    }

    /// The end of what it has logged.
    pub fn log(&self) -> String {
        let log = std::fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for StockServer {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// A connection as the superuser over the socket in a directory.
pub async fn connect_local(socket_dir: &Path, database: &str) -> anyhow::Result<tokio_postgres::Client> {
    let mut config = tokio_postgres::Config::new();
    config.host_path(socket_dir).user(SUPERUSER).dbname(database);
    let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}
