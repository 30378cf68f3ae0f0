//! Programs of JavaScript: the examples and the tests of drivers, with the packages that `scripts/setup.sh examples` installs.

use std::{collections::BTreeMap, path::PathBuf, process::Stdio, time::Duration};

use anyhow::{Context, ensure};
use tokio::process::Command;

use crate::{Cluster, Project, repository};

/// Longest run of one program.
const TIME_LIMIT: Duration = Duration::from_secs(240);

/// Where the examples and their packages are.
pub fn examples() -> PathBuf {
    repository().join("examples")
}

/// A program of `node_modules/.bin`.
pub fn program(name: &str) -> anyhow::Result<Command> {
    let path = examples().join("node_modules/.bin").join(name);
    ensure!(path.exists(), "{} is missing: run scripts/setup.sh examples", path.display());
    let mut command = Command::new(path);
    // Programs of packages look for `node` in the path: the packages' own comes first.
    let own = examples().join("node_modules/.bin");
    let others = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::iter::once(own).chain(std::env::split_paths(&others));
    command.env("PATH", std::env::join_paths(paths)?);
    command.stdin(Stdio::null()).kill_on_drop(true);
    Ok(command)
}

/// Tells a program which database is meant and whom to trust.
pub fn about(command: &mut Command, cluster: &Cluster, project: &Project) {
    command
        .env("DATABASE_URL", &project.uri)
        .env("ENDPOINT", &project.endpoint)
        .env("HTTP_PORT", cluster.http_port().to_string())
        .env("SQL_ENDPOINT", format!("https://localhost:{}/sql", cluster.http_port()))
        .env("WEBSOCKET_ENDPOINT", format!("localhost:{}/v2", cluster.http_port()))
        .env("NODE_EXTRA_CA_CERTS", cluster.ca_file())
        .env("CLIENT_MODULES", examples());
}

/// Runs a program to its end; the lines `<what>: <outcome>` that it has printed.
pub async fn outcomes(mut command: Command) -> anyhow::Result<BTreeMap<String, String>> {
    let output = tokio::time::timeout(TIME_LIMIT, command.output()).await.context("it does not end")??;
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}\n{said}\n{complained}", output.status);
    let lines = said.lines().filter_map(|line| line.split_once(": "));
    let outcomes: BTreeMap<_, _> = lines.map(|(what, outcome)| (what.to_owned(), outcome.to_owned())).collect();
    ensure!(outcomes.values().all(|outcome| outcome == "ok"), "{said}\n{complained}");
    Ok(outcomes)
}

/// A program that serves HTTP, with all that it starts; ends when it is dropped.
pub struct Server {
    child: tokio::process::Child,
    url: String,
    log: tempfile::NamedTempFile,
}

impl Server {
    /// Starts it, and waits until it takes connections on this port.
    pub async fn start(mut command: Command, port: u16) -> anyhow::Result<Server> {
        let log = tempfile::NamedTempFile::new()?;
        command.stdout(log.reopen()?).stderr(log.reopen()?).process_group(0);
        let mut server = Server { child: command.spawn()?, url: format!("http://127.0.0.1:{port}"), log };
        for _ in 0..1200 {
            if tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
                return Ok(server);
            }
            let ended = server.child.try_wait()?;
            ensure!(ended.is_none(), "{ended:?}: {}", server.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        anyhow::bail!("it does not listen: {}", server.log())
    }

    /// One request, which must succeed.
    pub async fn ask(&self, method: reqwest::Method, path: &str) -> anyhow::Result<serde_json::Value> {
        let client = reqwest::Client::builder().no_proxy().timeout(TIME_LIMIT).build()?;
        let response = client.request(method, format!("{}{path}", self.url)).send().await?;
        let (status, text) = (response.status(), response.text().await?);
        ensure!(status.is_success(), "{path}: {status} {text}\n{}", self.log());
        serde_json::from_str(&text).with_context(|| text)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.log.path()).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(id) = self.child.id() {
            // The group is the one that it was started in.
            let _ = nix::sys::signal::killpg(
                nix::unistd::Pid::from_raw(id.cast_signed()),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
    }
}
