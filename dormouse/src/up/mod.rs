//! `dormouse up`: a whole installation on this machine, as supervised processes of this same program.

mod checks;
mod plan;
mod supervisor;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use control_plane::{host, keys::InstallationKeys};
use pageserver::ObjectStoreConfig;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    logging::{self, LogFormat, tell},
    paths, template,
};
use plan::Ports;
use supervisor::Supervisor;

const EXAMPLES: &str = "\
Examples:
  dormouse up                                               everything below ~/.local/share/dormouse
  dormouse up --data-dir ./data --pg-port 55432             elsewhere, beside another Postgres
  AWS_ENDPOINT_URL=http://127.0.0.1:9000 AWS_ALLOW_HTTP=true AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… \\
    dormouse up --object-store s3://bucket/prefix           data in an S3-compatible store

Then, in another terminal:
  dormouse projects create --name demo && dormouse psql";

/// Run everything on this machine: control plane, proxy, pageserver, safekeepers
#[derive(clap::Args, Clone)]
#[command(after_help = EXAMPLES)]
pub struct UpArguments {
    /// Holds keys, metadata, WAL, caches and logs [default: ~/.local/share/dormouse]
    #[arg(long, env = "DORMOUSE_DATA_DIR")]
    data_dir: Option<PathBuf>,
    /// Where data lives: a directory, or s3://bucket/prefix with AWS_* variables [default: <data-dir>/object-store]
    #[arg(long, env = "DORMOUSE_OBJECT_STORE")]
    object_store: Option<String>,
    /// Address that clients connect to, for Postgres and for the API
    #[arg(long, default_value = "127.0.0.1", env = "DORMOUSE_HOST")]
    host: std::net::IpAddr,
    /// Port for Postgres clients
    #[arg(long, default_value_t = 5432, env = "DORMOUSE_PG_PORT")]
    pg_port: u16,
    /// Port for SQL over HTTPS and WebSocket
    #[arg(long, default_value_t = 5443, env = "DORMOUSE_HTTP_PORT")]
    http_port: u16,
    /// Port of the REST API
    #[arg(long, default_value_t = 9898, env = "DORMOUSE_API_PORT")]
    api_port: u16,
    /// First of the ports for internal services, on 127.0.0.1: the pageserver's, the safekeepers', and theirs for replication
    #[arg(long, default_value_t = 9400, env = "DORMOUSE_BASE_PORT")]
    base_port: u16,
    /// Endpoints are reached as <endpoint>.<domain>, which must resolve to this machine. Without a domain, connection
    /// strings name the endpoint in `options`
    #[arg(long, env = "DORMOUSE_DOMAIN")]
    domain: Option<String>,
    /// How many safekeepers to run; a majority of them holds every commit
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=9))]
    safekeepers: u16,
    /// Address on which the safekeepers give branches' WAL to standbys and pg_receivewal (`dormouse branches follow`). Without a certificate
    /// tokens and WAL pass in clear text
    #[arg(long, default_value = "127.0.0.1", env = "DORMOUSE_REPLICATION_HOST")]
    replication_host: std::net::IpAddr,
    /// First of the ports for that, one for each safekeeper [default: those behind the internal services']
    #[arg(long, env = "DORMOUSE_REPLICATION_PORT")]
    replication_port: Option<u16>,
    /// Host name or address under which standbys reach --replication-host [default: the same address]
    #[arg(long, env = "DORMOUSE_REPLICATION_REACHED_AT", value_name = "HOST")]
    replication_reached_at: Option<String>,
    /// Certificate chain (PEM) for that: then nobody is let in without TLS
    #[arg(long, env = "DORMOUSE_REPLICATION_TLS_CERT", value_name = "FILE", requires = "replication_tls_key")]
    replication_tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, env = "DORMOUSE_REPLICATION_TLS_KEY", value_name = "FILE", requires = "replication_tls_cert")]
    replication_tls_key: Option<PathBuf>,
    /// Where pageserver and computes reach the safekeepers, if not where these listen: tests put something in between
    #[arg(long, value_delimiter = ',', hide = true)]
    safekeepers_reached_at: Vec<std::net::SocketAddr>,
    /// Where computes keep their expendable files; a short path, best on tmpfs [default: /dev/shm/dormouse-<uid>]
    #[arg(long, env = "DORMOUSE_RUNTIME_DIR")]
    runtime_dir: Option<PathBuf>,
    /// The directory of PostgreSQL 15's programs [default: Debian's, or what pg_config says]
    #[arg(long, env = "DORMOUSE_POSTGRES_BIN_DIR")]
    postgres_bin_dir: Option<PathBuf>,
    /// The user that Postgres runs as when Dormouse is root [default: postgres if there is one, else nobody]
    #[arg(long, env = "DORMOUSE_POSTGRES_USER")]
    postgres_user: Option<String>,
    #[command(flatten)]
    page_cache: control_plane::config::PageCacheLimits,
    #[command(flatten)]
    acme: compute_proxy::AcmeConfig,
}

/// An installation whose settings were found good.
pub(crate) struct Installation {
    pub(crate) arguments: UpArguments,
    pub(crate) data_dir: PathBuf,
    pub(crate) object_store: String,
    pub(crate) ports: Ports,
    pub(crate) keys: InstallationKeys,
    pub(crate) postgres_bin_dir: PathBuf,
    pub(crate) postgres_user: Option<String>,
    pub(crate) log_format: LogFormat,
}

/// Runs until SIGINT or SIGTERM.
pub fn main(arguments: UpArguments, format: LogFormat) -> anyhow::Result<ExitCode> {
    logging::start(format, "warn,dormouse=info");
    // One thread: children get a signal when the thread that started them ends, so that must be the last one.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, Box::pin(run(arguments, format)))
}

async fn run(arguments: UpArguments, log_format: LogFormat) -> anyhow::Result<ExitCode> {
    let data_dir = checks::data_dir(arguments.data_dir.clone().unwrap_or_else(paths::default_data_dir))?;
    let _lock = checks::lock(&data_dir)?;
    let ports = Ports::new(&arguments)?;
    ports.check()?;
    // The proxy would say so too, but in its log.
    arguments.acme.wanted(arguments.domain.as_deref(), Some(data_dir.as_path()), false)?;
    let postgres_bin_dir = host::postgres_bin_dir(arguments.postgres_bin_dir.as_deref())?;
    let postgres_user = host::postgres_user(arguments.postgres_user.as_deref())?;
    let object_store = match &arguments.object_store {
        Some(asked) => asked.clone(),
        None => {
            let directory = data_dir.join("object-store");
            checks::private_dir(&directory)?;
            directory.display().to_string()
        }
    };
    for name in ["keys", "logs", "tls", "pageserver"] {
        checks::private_dir(&data_dir.join(name))?;
    }
    for number in 1..=arguments.safekeepers {
        checks::private_dir(&data_dir.join(format!("safekeeper-{number}")))?;
    }
    let store = ObjectStoreConfig::parse(&object_store).context("--object-store")?;
    let user = postgres_user.as_deref();
    Box::pin(template::ensure(&store, &postgres_bin_dir, user))
        .await
        .with_context(|| format!("the object store {object_store} cannot be used (--object-store)"))?;
    let keys = InstallationKeys::open_or_create(&data_dir)?;
    let installation =
        Installation { arguments, data_dir, object_store, ports, keys, postgres_bin_dir, postgres_user, log_format };
    supervise(&installation).await
}

async fn supervise(installation: &Installation) -> anyhow::Result<ExitCode> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let log_dir = control_plane::config::log_dir(&installation.data_dir);
    std::fs::create_dir_all(&log_dir).with_context(|| format!("making {}", log_dir.display()))?;
    let mut supervisor = Supervisor::new(log_dir);
    let started = async {
        for service in plan::services(installation)? {
            supervisor.start(service).await?;
        }
        anyhow::Ok(())
    };
    let started = tokio::select! {
        started = started => started.map(|()| true),
        _ = interrupt.recv() => Ok(false),
        _ = terminate.recv() => Ok(false),
    };
    if let Ok(true) = started {
        // As with `tell`: whoever started this may not read it.
        let _ = writeln!(std::io::stdout(), "{}", welcome(installation));
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }
    tell("Stopping: computes fall asleep first. Ctrl-C again to stop at once.");
    let forced = tokio::select! {
        () = supervisor.stop() => false,
        _ = interrupt.recv() => true,
        _ = terminate.recv() => true,
    };
    if forced {
        supervisor.kill();
        tell("Stopped at once. Nothing committed is lost; computes that still run are found at the next start.");
    } else {
        tell("Stopped.");
    }
    started.map(|_| ExitCode::SUCCESS)
}

/// Where to connect and what to try next.
fn welcome(installation: &Installation) -> String {
    let Installation { arguments, data_dir, ports, .. } = installation;
    let program = std::env::args().next().unwrap_or_else(|| "dormouse".into());
    let is_default = std::path::absolute(paths::default_data_dir()).is_ok_and(|default| default == *data_dir);
    let flag = if is_default { String::new() } else { format!(" --data-dir {}", quoted(data_dir)) };
    let clients = match &arguments.domain {
        Some(domain) => format!("<endpoint>.{domain}:{}", ports.postgres.port()),
        None => ports.postgres.to_string(),
    };
    format!(
        "
Dormouse is up.

  Postgres   {clients}
  SQL        https://{http}/sql, wss://{http}/v2   (clients trust {ca})
  REST API   http://{api}/api/v2   (key in {key})
  Logs       {logs}

Try, in another terminal:

  {program} projects create --name demo{flag}
  {program} psql{flag}
  {program} branches create --name dev{flag}
  {program} psql dev{flag}

Ctrl-C stops it.",
        http = ports.http,
        ca = data_dir.join("tls/ca.pem").display(),
        api = ports.api,
        key = installation.keys.paths.admin.display(),
        logs = control_plane::config::log_dir(data_dir).display(),
    )
}

fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-".contains(&b));
    if plain { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}
