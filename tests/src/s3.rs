//! A real S3-compatible server for tests: moto, in a process of its own.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};

/// A running server with one bucket. Killed when dropped.
pub struct S3Server {
    child: Child,
    port: u16,
}

/// The bucket that [`S3Server::start`] makes.
pub const BUCKET: &str = "dormouse";

impl S3Server {
    /// Starts moto from `target/tools/moto` (made by `scripts/setup.sh s3`) and makes the bucket.
    pub async fn start() -> anyhow::Result<S3Server> {
        let repository = crate::repository();
        let python = repository.join("target/tools/moto/bin/python");
        ensure!(python.exists(), "{} is missing: run scripts/setup.sh s3", python.display());
        let port = crate::cluster::free_port()?;
        let child = Command::new(python)
            .arg(repository.join("tests/moto_server.py"))
            .arg(port.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting moto")?;
        let server = S3Server { child, port };
        let bucket = format!("{}/{BUCKET}", server.endpoint());
        let client = reqwest::Client::new();
        for _ in 0..300 {
            let made = client
                .put(&bucket)
                .header("Authorization", "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request")
                .send()
                .await;
            if made.is_ok_and(|response| response.status().is_success()) {
                return Ok(server);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        anyhow::bail!("moto did not answer on {bucket} within 30 s")
    }

    /// `http://127.0.0.1:<port>`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The `AWS_*` variables under which Dormouse reaches it.
    pub fn environment(&self) -> Vec<(String, String)> {
        [
            ("AWS_ENDPOINT_URL", self.endpoint()),
            ("AWS_ACCESS_KEY_ID", "test".into()),
            ("AWS_SECRET_ACCESS_KEY", "test".into()),
            ("AWS_REGION", "us-east-1".into()),
            ("AWS_ALLOW_HTTP", "true".into()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that nothing listens on now.
pub(crate) fn probe() -> std::io::Result<TcpListener> {
    TcpListener::bind(("127.0.0.1", 0))
}
