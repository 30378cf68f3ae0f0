//! A stock server and a compute with the same settings, driven over their own sockets by the same clients.

use std::{
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use e2e::{
    Cluster, ClusterOptions, Project,
    regress::Target,
    stock::{StockServer, as_postgres, run},
};
use serde_json::json;

/// Both, running.
pub struct Pair {
    pub cluster: Cluster,
    pub project: Project,
    pub server: StockServer,
    settings: Vec<(&'static str, &'static str)>,
    receivers: Vec<Receiver>,
}

/// How durable the stock server is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Copies {
    /// Its own disk.
    One,
    /// And one of two that receive its WAL, synchronously: two copies, as a quorum of three has.
    Two,
}

/// `pg_receivewal --synchronous`; ends when it is dropped.
struct Receiver(Child, #[expect(dead_code, reason = "removed when dropped")] tempfile::TempDir);

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Pair {
    /// Starts both.
    pub async fn start(settings: &[(&'static str, &'static str)], copies: Copies) -> anyhow::Result<Pair> {
        let cluster = Cluster::start(ClusterOptions::default()).await?;
        let api = cluster.api()?;
        let project = api.create_project("bench").await?;
        api.wait_state(&project.id, &project.endpoint, "active", Duration::from_secs(60)).await?;
        let path = format!("/projects/{}/endpoints/{}", project.id, project.endpoint);
        let wanted: serde_json::Map<_, _> =
            settings.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        let body = json!({"endpoint": {"suspend_timeout_seconds": 604_800, "settings": {"pg_settings": wanted}}});
        api.ok("PATCH".parse()?, &path, Some(body)).await?;
        let mut server = StockServer::create(settings)?;
        server.start().await?;
        let mut pair = Pair { cluster, project, server, settings: settings.to_vec(), receivers: Vec::new() };
        if copies == Copies::Two {
            pair.receive_wal().await?;
        }
        pair.sleep_and_wake().await?;
        Ok(pair)
    }

    async fn receive_wal(&mut self) -> anyhow::Result<()> {
        for name in ["r1", "r2"] {
            let directory = tempfile::Builder::new().prefix("receive-").tempdir()?;
            e2e::stock::give_to_postgres(directory.path())?;
            let mut receive = as_postgres(e2e::pg_bin_dir().join("pg_receivewal"))?;
            receive.arg("--synchronous").arg("-D").arg(directory.path());
            let host = self.server.socket_dir();
            receive.args([
                "-d",
                &format!("host={} user={} application_name={name}", host.display(), e2e::stock::SUPERUSER),
            ]);
            receive.stdout(Stdio::null()).stderr(Stdio::null());
            self.receivers.push(Receiver(receive.spawn()?, directory));
        }
        let client = self.server.connect("postgres").await?;
        client.batch_execute("alter system set synchronous_standby_names = 'ANY 1 (r1, r2)'").await?;
        client.batch_execute("select pg_reload_conf()").await?;
        for _ in 0..200 {
            let query = "select count(*) from pg_stat_replication where sync_state = 'quorum'";
            if e2e::sql::value(&client, query).await? == "2" {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        anyhow::bail!("the stock server's standbys did not come")
    }

    /// The compute forgets all that it has in memory and in its cache.
    pub async fn sleep_and_wake(&self) -> anyhow::Result<()> {
        self.cluster.api()?.suspend(&self.project.id, &self.project.endpoint).await?;
        for (name, value) in &self.settings {
            let shown = e2e::sql::ask(&self.project.uri, &format!("show {name}")).await?;
            ensure!(shown == *value, "{name} is {shown}");
        }
        Ok(())
    }

    /// The stock server starts anew, and its files have to be read from disk.
    pub async fn restart_cold(&mut self) -> anyhow::Result<()> {
        self.server.stop()?;
        forget_files(&self.server.data_dir())?;
        self.server.start().await
    }

    /// The stock server, then the compute.
    pub fn targets(&self) -> [Target; 2] {
        [
            Target::local("stock", self.server.socket_dir()),
            Target::local("dormouse", self.cluster.runtime_dir().join(&self.project.endpoint)),
        ]
    }

    /// Stops both.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        // A fast shutdown waits for those that receive its WAL.
        self.server.connect("postgres").await?.batch_execute("alter system reset synchronous_standby_names").await?;
        self.receivers.clear();
        self.server.stop()?;
        self.cluster.down().await
    }
}

/// Runs `pgbench` on a database of a server; transactions per second.
pub fn pgbench(target: &Target, database: &str, arguments: &[&str]) -> anyhow::Result<f64> {
    let mut pgbench = target.client("pgbench")?;
    let said = run(pgbench.args(arguments).arg(database)).with_context(|| target.name)?;
    let Some(line) = said.lines().find(|line| line.starts_with("tps = ")) else { return Ok(0.0) };
    let number = line.split_whitespace().nth(2).context("tps")?;
    Ok(number.parse()?)
}

/// Writes files to disk and takes them out of the operating system's cache.
fn forget_files(directory: &Path) -> anyhow::Result<()> {
    let mut open: Vec<PathBuf> = vec![directory.to_owned()];
    while let Some(path) = open.pop() {
        for entry in std::fs::read_dir(&path)?.flatten() {
            if entry.file_type()?.is_dir() {
                open.push(entry.path());
            } else if entry.file_type()?.is_file() {
                let file = std::fs::File::open(entry.path())?;
                file.sync_all()?;
                nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
            }
        }
    }
    Ok(())
}

/// The middle one; the lower of two.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(0.0)
}
