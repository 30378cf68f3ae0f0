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
    command.stdin(Stdio::null()).kill_on_drop(true);
    Ok(command)
}

/// Tells a program which database is meant and whom to trust.
pub fn about(command: &mut Command, cluster: &Cluster, project: &Project) {
    command
        .env("DATABASE_URL", &project.uri)
        .env("ENDPOINT", &project.endpoint)
        .env("HTTP_PORT", cluster.http_port().to_string())
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
