//! What the proxy's tests stand on: a stock Postgres, a small control plane with the real one's contract, and psql.
// Each test program uses a part of this.
#![allow(dead_code, unused_imports)]

mod control_plane;
mod http;
mod issuer;
mod pebble;
mod postgres;
pub mod raw_websocket;
mod websocket;

use std::{net::SocketAddr, process::Stdio, sync::Arc, time::Duration};

use clap::Parser;
pub use control_plane::{FakeControlPlane, FakeEndpoint, TOKEN};
use dormouse_compute_proxy::{Config, Server};
pub use http::{Http, connection};
pub use issuer::{Issuer, Signer};
pub use pebble::{Pebble, PebblePlace};
pub use postgres::Postgres;
use tokio::{io::AsyncWriteExt, process::Command, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// The password of the role `alice`.
pub const PASSWORD: &str = "wonder;land$1";

/// A proxy with everything that it needs. Endpoints `ep-a` and `ep-b` lead to the same Postgres.
pub struct World {
    pub postgres: Arc<Postgres>,
    pub control: FakeControlPlane,
    pub address: SocketAddr,
    pub http_address: SocketAddr,
    pub shutdown: CancellationToken,
    pub tls_dir: tempfile::TempDir,
    pub task: JoinHandle<anyhow::Result<()>>,
}

#[derive(clap::Parser)]
struct Arguments {
    #[command(flatten)]
    config: Config,
}

pub fn parse_config(arguments: &[&str]) -> Config {
    Arguments::try_parse_from([&["proxy"], arguments].concat()).expect("arguments").config
}

impl World {
    /// An HTTP client that trusts the proxy's certificate.
    pub fn http_client(&self) -> reqwest::Client {
        let ca = std::fs::read(self.tls_dir.path().join("ca.pem")).expect("a certificate");
        let ca = reqwest::Certificate::from_pem(&ca).expect("a certificate");
        reqwest::Client::builder().tls_certs_only([ca]).no_proxy().build().expect("a client")
    }

    /// Starts all, the proxy with these arguments beside those that it needs.
    pub async fn start(arguments: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().expect("temporary directory"), arguments).await
    }

    /// The same with certificates that are there already.
    pub async fn start_in(tls_dir: tempfile::TempDir, arguments: &[&str]) -> Self {
        let postgres = tokio::task::spawn_blocking(Postgres::shared).await.expect("no panic");
        let control = FakeControlPlane::start(&postgres.socket()).await;
        let dir = tls_dir.path().to_str().expect("UTF-8").to_owned();
        let fixed = [
            ["--listen", "127.0.0.1:0"],
            ["--http-listen", "127.0.0.1:0"],
            ["--control-plane", &control.url],
            ["--token", TOKEN],
            ["--tls-dir", dir.as_str()],
        ];
        let server = Server::bind(parse_config(&[fixed.as_flattened(), arguments].concat())).await.expect("bound");
        let (address, http_address, shutdown) = (server.local_addr(), server.http_addr(), CancellationToken::new());
        let task = tokio::spawn(server.run(shutdown.clone()));
        Self { postgres, control, address, http_address, shutdown, tls_dir, task }
    }

    pub fn endpoint(&self, id: &str) -> Arc<FakeEndpoint> {
        self.control.endpoint(id)
    }

    /// Wakes of all endpoints so far.
    pub fn wakes(&self) -> usize {
        self.control.wakes()
    }

    /// A connection string for this proxy.
    pub fn conninfo(&self, rest: &str) -> String {
        let port = self.address.port();
        let host = if rest.contains("host=") { "" } else { "host=127.0.0.1" };
        format!("{host} hostaddr=127.0.0.1 port={port} user=alice dbname=postgres {rest}")
    }

    pub async fn psql(&self, rest: &str, password: &str, sql: &str) -> Result<String, String> {
        psql(&self.conninfo(rest), password, sql, b"").await
    }

    /// A tokio-postgres client without TLS.
    pub async fn connect(&self, options: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        self.connect_as("alice", options).await
    }

    /// The same as another role.
    pub async fn connect_as(&self, role: &str, options: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.address.port()).user(role).password(PASSWORD).dbname("postgres");
        let (client, connection) = config.options(options).connect(tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }
}

/// What the proxy or Postgres has said.
pub fn said(error: tokio_postgres::Error) -> String {
    let said = error.as_db_error().map(|error| format!("{} {}", error.code().code(), error.message()));
    said.unwrap_or_else(|| error.to_string())
}

/// Runs psql; its output when it succeeds, its complaints when it fails.
pub async fn psql(conninfo: &str, password: &str, sql: &str, input: &[u8]) -> Result<String, String> {
    let mut child = Command::new("psql")
        .args(["-X", "-q", "-A", "-t", "-w", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=verbose", "-c", sql, conninfo])
        .env("PGPASSWORD", password)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("psql runs");
    let mut stdin = child.stdin.take().expect("piped");
    let input = input.to_vec();
    let feeder = tokio::spawn(async move { stdin.write_all(&input).await });
    let output = tokio::time::timeout(Duration::from_secs(60), child.wait_with_output());
    let output = output.await.expect("psql ends").expect("psql runs");
    // A psql that fails does not read its input.
    let _ = feeder.await;
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).expect("UTF-8").trim_end().to_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}
