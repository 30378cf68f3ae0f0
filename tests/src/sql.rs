//! Clients: `tokio-postgres` over TLS, `psql` and `pgbench`.

use std::{
    path::Path,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use rustls::{
    DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::process::Command;

/// Takes any certificate, as `sslmode=require` does.
#[derive(Debug)]
struct AnyCertificate(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// TLS that encrypts and asks for no name, as `sslmode=require`.
pub fn tls() -> anyhow::Result<tokio_postgres_rustls::MakeRustlsConnect> {
    Ok(tokio_postgres_rustls::MakeRustlsConnect::new(tls_config()?))
}

/// Settings of [`tls`].
pub fn tls_config() -> anyhow::Result<rustls::ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions =
        rustls::ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let verifier = Arc::new(AnyCertificate(provider));
    Ok(versions.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

/// A connection over TLS; it lives until the client is dropped.
pub async fn connect(uri: &str) -> anyhow::Result<tokio_postgres::Client> {
    let (client, connection) = tokio_postgres::connect(uri, tls()?).await.map_err(explain)?;
    tokio::spawn(connection);
    Ok(client)
}

/// A connection as the superuser, over the private socket of a compute with this directory.
pub async fn superuser(compute_dir: &Path, database: &str) -> anyhow::Result<tokio_postgres::Client> {
    let mut config = tokio_postgres::Config::new();
    config.host_path(compute_dir).user("dormouse_admin").dbname(database);
    let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// A connection error with the server's own message.
fn explain(error: tokio_postgres::Error) -> anyhow::Error {
    let message = error.as_db_error().map(|db| format!("{} ({})", db.message(), db.code().code()));
    anyhow::Error::new(error).context(message.unwrap_or_else(|| "connecting".into()))
}

/// The first column of the first row, as text.
pub async fn value(client: &tokio_postgres::Client, query: &str) -> anyhow::Result<String> {
    for message in client.simple_query(query).await.map_err(explain)? {
        if let tokio_postgres::SimpleQueryMessage::Row(row) = message {
            return Ok(row.get(0).unwrap_or_default().to_owned());
        }
    }
    bail!("no row from {query}")
}

/// Connects, asks one thing, hangs up.
pub async fn ask(uri: &str, query: &str) -> anyhow::Result<String> {
    value(&connect(uri).await?, query).await
}

/// Waits until a query has the same answer on a branch, whose compute may be killed meanwhile, and on another server.
pub async fn same_answers(
    uri: &str,
    other: &tokio_postgres::Client,
    query: &str,
    limit: Duration,
) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        // A compute that has just been killed may refuse for a moment.
        let branch = ask(uri, query).await.unwrap_or_default();
        let there = value(other, query).await?;
        if branch == there {
            return Ok(());
        }
        ensure!(began.elapsed() < limit, "the branch has {branch:?}, the other server {there:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Runs `psql` with a script of one command; its output without decoration.
pub async fn psql(uri: &str, command: &str) -> anyhow::Result<String> {
    run("psql", &["-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", command, uri]).await
}

/// Runs `pgbench` with these arguments on the database.
pub async fn pgbench(uri: &str, arguments: &[&str]) -> anyhow::Result<String> {
    run("pgbench", &[arguments, &[uri]].concat()).await
}

/// Runs one of PostgreSQL's programs; its standard output. Errors hold what it said, never its arguments (a password).
async fn run(program: &str, arguments: &[&str]) -> anyhow::Result<String> {
    let path = crate::pg_bin_dir().join(program);
    let output = Command::new(&path)
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .with_context(|| path.display().to_string())?;
    if !output.status.success() {
        bail!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}
