//! The services as subcommands: settings from the library, logs, signals.

use std::process::ExitCode;

use anyhow::Context;
use clap::Subcommand;
use tokio_util::sync::CancellationToken;

use crate::{
    logging::{self, LogFormat},
    shim, signals,
};

/// One service in the foreground, until SIGINT or SIGTERM.
#[derive(Subcommand)]
pub enum ServiceCommand {
    /// Run the control plane: REST API, metadata, computes
    #[command(
        after_help = "Example:\n  dormouse control-plane --data-dir /var/lib/dormouse --pageserver 127.0.0.1:9400 \\\n    --safekeepers 1=127.0.0.1:9401,2=127.0.0.1:9402,3=127.0.0.1:9403"
    )]
    ControlPlane(control_plane::Config),
    /// Run a proxy: the address that Postgres clients connect to
    Proxy(Box<compute_proxy::Config>),
    /// Run a safekeeper: keeps the newest WAL of all branches, with others of its kind
    Safekeeper(safekeeper::Config),
    /// Run a pageserver: turns WAL into pages, keeps them in the object store
    Pageserver(pageserver::Config),
    /// Run one compute from a spec (JSON) on standard input; the control plane does this
    #[command(hide = true)]
    Compute,
}

/// Runs a service to its end.
pub fn main(command: ServiceCommand, format: LogFormat) -> anyhow::Result<ExitCode> {
    logging::start(format, "info");
    let mut builder = match command {
        // Commits pass from task to task there, which costs least within one thread.
        ServiceCommand::Compute => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    if matches!(command, ServiceCommand::Safekeeper(_)) {
        // They wait for the disk, too.
        builder.worker_threads(safekeeper::USUAL_THREADS);
    }
    let runtime = builder.enable_all().build().context("starting the async runtime")?;
    let outcome = runtime.block_on(async {
        if matches!(command, ServiceCommand::Compute) {
            // Has signals of its own.
            return Ok(Box::pin(compute_agent::main_from_stdin()).await);
        }
        let shutdown = signals::shutdown_token()?;
        Box::pin(run(command, shutdown)).await.map(|()| ExitCode::SUCCESS)
    });
    // Blocking calls that hang must not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    outcome
}

async fn run(command: ServiceCommand, shutdown: CancellationToken) -> anyhow::Result<()> {
    match command {
        ServiceCommand::ControlPlane(config) => {
            let shim = shim::install(config.runtime_dir.as_deref(), &config.data_dir)?;
            control_plane::run(config, &shim, shutdown).await
        }
        ServiceCommand::Proxy(config) => Ok(compute_proxy::run(*config, shutdown).await?),
        ServiceCommand::Safekeeper(config) => Ok(safekeeper::run(config, shutdown).await?),
        ServiceCommand::Pageserver(config) => Ok(pageserver::run(config, shutdown).await?),
        ServiceCommand::Compute => anyhow::bail!("a compute has no service loop"),
    }
}
