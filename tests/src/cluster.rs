//! `dormouse up` on free ports with a data directory of its own.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use pageserver_client::PageserverClient;
use types::BranchRef;

use crate::{api::Api, processes, s3};

/// How to run it.
#[derive(Debug, Clone, Default)]
pub struct ClusterOptions {
    /// `--object-store`; the data directory's own by default.
    pub object_store: Option<String>,
    /// More environment variables (`AWS_*`).
    pub environment: Vec<(String, String)>,
    /// More arguments for `dormouse up`.
    pub arguments: Vec<String>,
    /// Page caches stay while computes sleep, as they do by default. Without it what is read after a sleep comes from storage,
    /// which is what most tests are about.
    pub warm: bool,
}

/// A running installation. Stopped, and its directories removed, when dropped.
pub struct Cluster {
    up: Option<Child>,
    options: ClusterOptions,
    home: tempfile::TempDir,
    runtime: tempfile::TempDir,
    pg_port: u16,
    http_port: u16,
    api_port: u16,
    base_port: u16,
}

/// Internal services use this many ports from `--base-port` on.
const SERVICE_PORTS: u16 = 8;

impl Cluster {
    /// Starts `dormouse up` and waits until its API answers.
    pub async fn start(options: ClusterOptions) -> anyhow::Result<Cluster> {
        let mut cluster = Cluster::prepare(options)?;
        cluster.up().await?;
        Ok(cluster)
    }

    /// Chooses directories and ports; nothing runs before [`Cluster::up`].
    pub fn prepare(options: ClusterOptions) -> anyhow::Result<Cluster> {
        let home = tempfile::Builder::new().prefix("dormouse-").tempdir().context("making a directory")?;
        // Unix socket paths are short: the runtime directory lives on tmpfs with a short name.
        let shm = Path::new("/dev/shm");
        let runtime_home = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        let runtime = tempfile::Builder::new().prefix("dm-").tempdir_in(runtime_home)?;
        for dir in [home.path(), runtime.path()] {
            // Postgres runs as another user when this is root.
            std::fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        }
        let (pg_port, http_port, api_port) = (free_port()?, free_port()?, free_port()?);
        let base_port = free_port_range(SERVICE_PORTS)?;
        Ok(Cluster { up: None, options, home, runtime, pg_port, http_port, api_port, base_port })
    }

    /// `dormouse up` with this cluster's ports and directories, ready to be spawned.
    pub fn up_command(&self) -> Command {
        let mut command = Command::new(dormouse_binary());
        command.arg("up").arg("--data-dir").arg(self.data_dir()).arg("--runtime-dir").arg(self.runtime_dir());
        command.args(["--pg-port", &self.pg_port.to_string(), "--api-port", &self.api_port.to_string()]);
        command.args(["--http-port", &self.http_port.to_string(), "--base-port", &self.base_port.to_string()]);
        if let Some(store) = &self.options.object_store {
            command.args(["--object-store", store]);
        }
        if !self.options.warm {
            command.args(["--sleeping-caches-mib", "0"]);
        }
        command.args(&self.options.arguments);
        command.envs(self.options.environment.iter().cloned());
        command.stdin(Stdio::null());
        command
    }

    /// Starts it (again) and waits until its API answers.
    pub async fn up(&mut self) -> anyhow::Result<()> {
        ensure!(self.up.is_none(), "already up");
        let log = std::fs::File::options().create(true).append(true).open(self.log_path())?;
        let mut command = self.up_command();
        command.stdout(log.try_clone()?).stderr(log);
        self.up = Some(command.spawn().with_context(|| format!("starting {}", dormouse_binary().display()))?);
        for _ in 0..2400 {
            if let Some(status) = self.up.as_mut().map(Child::try_wait).transpose()?.flatten() {
                self.up = None;
                bail!("`dormouse up` ended with {status}:\n{}", self.log());
            }
            if self.is_healthy().await {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("`dormouse up` was not ready within 120 s:\n{}", self.log())
    }

    async fn is_healthy(&self) -> bool {
        let answer = reqwest::Client::new().get(format!("{}/healthz", self.api_url())).send().await;
        let proxy = tokio::net::TcpStream::connect(("127.0.0.1", self.pg_port)).await;
        self.admin_key().is_ok() && answer.is_ok_and(|a| a.status().is_success()) && proxy.is_ok()
    }

    /// SIGINT, as Ctrl-C sends it, and waits for the end; errors when it does not end well within a minute.
    pub async fn down(&mut self) -> anyhow::Result<()> {
        let Some(mut child) = self.up.take() else { return Ok(()) };
        kill(Pid::from_raw(child.id() as i32), Signal::SIGINT)?;
        let mut status = None;
        let ended = processes::wait_until("`dormouse up` to stop", Duration::from_secs(60), || {
            status = child.try_wait().ok().flatten();
            status.is_some()
        })
        .await;
        if ended.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        ended?;
        ensure!(status.is_some_and(|s| s.success()), "`dormouse up` stopped with {status:?}:\n{}", self.log());
        Ok(())
    }

    /// The REST API with the admin key.
    pub fn api(&self) -> anyhow::Result<Api> {
        Ok(Api::new(self.api_url(), self.admin_key()?))
    }

    /// A token as the installation's own services show one another.
    pub fn service_token(&self) -> anyhow::Result<String> {
        let path = self.data_dir().join("keys/token-private.pem");
        let pem = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(wire::TokenSigner::from_pem(&pem)?.sign(wire::Scope::Service, Duration::from_secs(3600))?)
    }

    /// What a compute of this branch shows to safekeepers and pageserver.
    pub fn branch_token(&self, branch: &BranchRef) -> anyhow::Result<String> {
        let pem = std::fs::read_to_string(self.data_dir().join("keys/token-private.pem"))?;
        let scope = wire::Scope::Branch { branch: branch.clone() };
        Ok(wire::TokenSigner::from_pem(&pem)?.sign(scope, Duration::from_secs(3600))?)
    }

    /// Where the three safekeepers listen that `up` runs.
    pub fn safekeepers(&self) -> Vec<SocketAddr> {
        (1..=3).map(|number| SocketAddr::from(([127, 0, 0, 1], self.base_port + number))).collect()
    }

    /// Others reach the safekeepers at these addresses, from the next start on.
    pub fn reach_safekeepers_at(&mut self, addresses: &[SocketAddr]) {
        let addresses: Vec<String> = addresses.iter().map(SocketAddr::to_string).collect();
        self.options.arguments.extend(["--safekeepers-reached-at".to_owned(), addresses.join(",")]);
    }

    /// The pageserver that `up` runs.
    pub fn pageserver(&self) -> anyhow::Result<PageserverClient> {
        Ok(PageserverClient::new(format!("127.0.0.1:{}", self.base_port), self.service_token()?))
    }

    /// `dormouse` with these arguments, as somebody at a terminal on this machine types it: what it prints.
    pub async fn command_line(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = tokio::process::Command::new(dormouse_binary())
            .args(arguments)
            .env("DORMOUSE_API_URL", self.api_url())
            .env("DORMOUSE_DATA_DIR", self.data_dir())
            .env("PG_BIN_DIR", crate::pg_bin_dir())
            .stdin(Stdio::null())
            .output()
            .await?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "dormouse {}: {said}", arguments.join(" "));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn admin_key(&self) -> anyhow::Result<String> {
        let path = self.data_dir().join("admin.key");
        let key = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(key.trim().to_owned())
    }

    /// Kills a service's process with SIGKILL; the supervisor starts it again. Returns the killed process's id.
    pub async fn kill_service(&self, name: &str) -> anyhow::Result<i32> {
        let up = self.up_pid()?;
        let found = processes::children_with(up, &format!("dormouse {name}"));
        let process = found.first().with_context(|| format!("no process of {name} below {up}"))?;
        processes::kill_hard(process.pid)?;
        Ok(process.pid)
    }

    /// Kills every process of the installation with SIGKILL, computes too: what a power cut leaves.
    pub async fn power_cut(&mut self) -> anyhow::Result<()> {
        let Some(mut child) = self.up.take() else { return Ok(()) };
        let home = self.home.path().to_string_lossy().into_owned();
        let runtime = self.runtime.path().to_string_lossy().into_owned();
        let up = child.id() as i32;
        processes::kill_hard(up)?;
        child.wait()?;
        let ours = |p: &processes::Process| p.command.contains(&home) || p.command.contains(&runtime);
        let services = |p: &processes::Process| p.parent == up || ours(p);
        processes::wait_until("all processes to die", Duration::from_secs(20), || {
            let left: Vec<_> = processes::all().into_iter().filter(services).collect();
            left.iter().for_each(|p| drop(processes::kill_hard(p.pid)));
            left.is_empty()
        })
        .await
    }

    /// A connection as the superuser, over the private socket of an awake endpoint's compute.
    pub async fn superuser(&self, endpoint: &str, database: &str) -> anyhow::Result<tokio_postgres::Client> {
        crate::sql::superuser(&self.runtime_dir().join(endpoint), database).await
    }

    /// Process id of `dormouse up`.
    pub fn up_pid(&self) -> anyhow::Result<u32> {
        self.up.as_ref().map(Child::id).context("not up")
    }

    /// What `dormouse up` has printed, and the last lines of each service's log.
    pub fn log(&self) -> String {
        let mut text = std::fs::read_to_string(self.log_path()).unwrap_or_default();
        let logs = std::fs::read_dir(self.data_dir().join("logs")).into_iter().flatten().flatten();
        for entry in logs {
            let content = std::fs::read_to_string(entry.path()).unwrap_or_default();
            let lines: Vec<&str> = content.lines().collect();
            let tail = lines[lines.len().saturating_sub(25)..].join("\n");
            text.push_str(&format!("\n--- {} ---\n{tail}\n", entry.path().display()));
        }
        text
    }

    /// How long the slowest process of a service took from its start until it took connections, the last time that
    /// everything was started; needs `DORMOUSE_LOG=debug` in the environment.
    pub fn start_ms(&self, service: &str) -> anyhow::Result<u64> {
        let text = std::fs::read_to_string(self.log_path())?;
        let mut slowest = std::collections::BTreeMap::new();
        for line in text.lines().filter(|line| line.contains("service takes connections")) {
            let field = |name: &str| line.split(name).nth(1).and_then(|rest| rest.split_whitespace().next());
            let name = field("service=").unwrap_or_default().trim_matches('"').to_owned();
            if name == service || name.starts_with(&format!("{service}-")) {
                slowest.insert(name, field("elapsed_ms=").context("elapsed_ms")?.parse::<u64>()?);
            }
        }
        slowest.into_values().max().with_context(|| format!("no start of {service} in the log"))
    }

    fn log_path(&self) -> PathBuf {
        self.home.path().join("up.log")
    }

    /// `--data-dir`.
    pub fn data_dir(&self) -> PathBuf {
        self.home.path().join("data")
    }

    /// `--runtime-dir`: computes' directories.
    pub fn runtime_dir(&self) -> PathBuf {
        self.runtime.path().to_owned()
    }

    /// The shim that computes load.
    pub fn shim(&self) -> Option<PathBuf> {
        let directories = [self.runtime_dir().join("lib"), self.data_dir().join("lib")];
        let files = directories.into_iter().filter_map(|dir| std::fs::read_dir(dir).ok()).flatten().flatten();
        files.map(|entry| entry.path()).find(|path| path.extension().is_some_and(|extension| extension == "so"))
    }

    /// Kills an endpoint's compute: its agent, and its postmaster, unless that has gone with it.
    pub fn kill_compute(&self, endpoint: &str) -> anyhow::Result<()> {
        let all = processes::postgres_below(&self.runtime_dir().join(endpoint));
        let postmaster = all.iter().find(|p| p.command.contains(" -D ")).context("no postmaster")?;
        processes::kill_hard(postmaster.parent)?;
        let _ = processes::kill_hard(postmaster.pid);
        Ok(())
    }

    /// The proxy's port.
    pub fn pg_port(&self) -> u16 {
        self.pg_port
    }

    /// The proxy's port for SQL over HTTPS and WebSocket.
    pub fn http_port(&self) -> u16 {
        self.http_port
    }

    /// The authority that signed the proxy's certificate.
    pub fn ca_file(&self) -> PathBuf {
        self.data_dir().join("tls/ca.pem")
    }

    /// The REST API's address.
    pub fn api_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.api_port)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let Some(mut child) = self.up.take() else { return };
        let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGINT);
        for _ in 0..600 {
            if matches!(child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// The binary under test: `DORMOUSE_BIN`, else the one beside this program.
pub fn dormouse_binary() -> PathBuf {
    if let Some(path) = std::env::var_os("DORMOUSE_BIN") {
        return path.into();
    }
    let here = std::env::current_exe().unwrap_or_default();
    let beside = |dir: Option<&Path>| dir.map(|dir| dir.join("dormouse")).filter(|path| path.exists());
    // Test programs lie in `deps`, one level below the binaries.
    beside(here.parent())
        .or_else(|| beside(here.parent().and_then(Path::parent)))
        .unwrap_or_else(|| crate::repository().join("target/debug/dormouse"))
}

/// A port that nothing listens on now.
pub fn free_port() -> anyhow::Result<u16> {
    Ok(s3::probe()?.local_addr()?.port())
}

/// The first of `count` neighbouring ports that nothing listens on now.
pub fn free_port_range(count: u16) -> anyhow::Result<u16> {
    for _ in 0..200 {
        let first = free_port()?;
        let range = first..first.saturating_add(count);
        let held: Vec<_> = range.map_while(|port| std::net::TcpListener::bind(("127.0.0.1", port)).ok()).collect();
        if held.len() == usize::from(count) {
            return Ok(first);
        }
    }
    bail!("no {count} neighbouring free ports found")
}
