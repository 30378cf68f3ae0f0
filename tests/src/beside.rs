//! Pageservers and safekeepers beside those that `dormouse up` runs.

use std::{
    net::SocketAddr,
    process::{Child, Command, Stdio},
};

use anyhow::Context;
use pageserver_client::PageserverClient;

use crate::cluster::{Cluster, dormouse_binary, free_port};

impl Cluster {
    /// Another pageserver of this installation, with the number `id`, on an empty disk and the same object store.
    pub fn another_pageserver(&self, id: u64) -> anyhow::Result<AnotherPageserver> {
        let disk = tempfile::tempdir()?;
        let port = free_port()?;
        let numbered = |(index, address): (usize, SocketAddr)| format!("{}={address}", index + 1);
        let safekeepers: Vec<String> = self.safekeepers().into_iter().enumerate().map(numbered).collect();
        let log = std::fs::File::create(self.data_dir().join(format!("logs/pageserver-{id}.log")))?;
        let mut command = Command::new(dormouse_binary());
        command.args(["pageserver", "--id", &id.to_string(), "--listen", &format!("127.0.0.1:{port}")]);
        command.arg("--data-dir").arg(disk.path()).arg("--object-store").arg(self.data_dir().join("object-store"));
        command.args(["--safekeepers", &safekeepers.join(","), "--control-plane", &self.api_url()]);
        command.arg("--token-public-key").arg(self.data_dir().join("keys/token-public.pem"));
        command.env("DORMOUSE_TOKEN", self.service_token()?);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = command.spawn().context("starting a pageserver")?;
        let client = PageserverClient::new(format!("127.0.0.1:{port}"), self.service_token()?);
        Ok(AnotherPageserver { process, client, _disk: disk })
    }

    /// Another safekeeper of this installation, which no branch has yet, with an empty disk.
    pub fn another_safekeeper(&self, id: u64) -> anyhow::Result<AnotherSafekeeper> {
        let disk = tempfile::tempdir()?;
        let address = format!("127.0.0.1:{}", free_port()?);
        let log = std::fs::File::create(self.data_dir().join(format!("logs/safekeeper-{id}.log")))?;
        let mut command = Command::new(dormouse_binary());
        command.args(["safekeeper", "--id", &id.to_string(), "--listen", &address]);
        command.arg("--data-dir").arg(disk.path());
        command.arg("--token-public-key").arg(self.data_dir().join("keys/token-public.pem"));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = command.spawn().context("starting a safekeeper")?;
        Ok(AnotherSafekeeper { process, address, disk })
    }
}

/// A pageserver beside the one that `up` runs; killed when it is dropped.
pub struct AnotherPageserver {
    process: Child,
    /// Asks it.
    pub client: PageserverClient,
    _disk: tempfile::TempDir,
}

impl Drop for AnotherPageserver {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A safekeeper beside those that `up` runs; killed when it is dropped.
pub struct AnotherSafekeeper {
    process: Child,
    /// Where it is reached.
    pub address: String,
    /// Where its WAL is.
    pub disk: tempfile::TempDir,
}

impl Drop for AnotherSafekeeper {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
