//! The peer: a stock `postgres` on an ordinary local data directory.

use std::{
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, User, chown, geteuid},
};

/// A cluster made by `initdb`, with Debian's programs and the default settings.
pub struct BareServer {
    home: tempfile::TempDir,
    user: Option<User>,
}

impl BareServer {
    /// Makes the data directory.
    pub fn create() -> anyhow::Result<BareServer> {
        let home = tempfile::Builder::new().prefix("bare-").tempdir()?;
        // Postgres refuses to run as root.
        let user = if geteuid().is_root() {
            let user = User::from_name("postgres")?.context("there is no user postgres")?;
            chown(home.path(), Some(user.uid), Some(user.gid))?;
            Some(user)
        } else {
            None
        };
        let server = BareServer { home, user };
        let mut initdb = server.command("initdb");
        initdb.args(["-U", "postgres", "--encoding=UTF8", "--locale=C.UTF-8", "-A", "trust"]);
        let output = initdb.output()?;
        ensure!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
        Ok(server)
    }

    fn data_dir(&self) -> PathBuf {
        self.home.path().join("data")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(e2e::pg_bin_dir().join(program));
        command.arg("-D").arg(self.data_dir()).stdin(Stdio::null()).current_dir("/");
        if let Some(user) = &self.user {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        command
    }

    /// From `exec` to the first row, over its Unix socket; then stops it.
    pub async fn start_to_first_row(&self) -> anyhow::Result<Duration> {
        let start = Instant::now();
        let mut postgres = self.command("postgres");
        postgres.args(["-c", "listen_addresses=", "-k"]).arg(self.home.path());
        let mut child = postgres.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let first_row = self.first_row().await;
        let took = start.elapsed();
        kill(Pid::from_raw(child.id() as i32), Signal::SIGINT)?;
        tokio::task::spawn_blocking(move || child.wait()).await??;
        first_row?;
        Ok(took)
    }

    async fn first_row(&self) -> anyhow::Result<()> {
        let config = format!("host={} user=postgres dbname=postgres", self.home.path().display());
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            match tokio_postgres::connect(&config, tokio_postgres::NoTls).await {
                Ok((client, connection)) => {
                    tokio::spawn(connection);
                    client.query_one("select 1", &[]).await?;
                    return Ok(());
                }
                Err(error) if Instant::now() > deadline => return Err(error).context("the bare server did not start"),
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    }
}
