//! The agent of one compute: starts a stock Postgres on a branch, serves it, and stops it.
//!
//! - [`run`], [`main_from_stdin`]: a compute's whole life.
//! - `start`: from a spec to a Postgres that takes connections; `opening`, `data_dir`, `settings`, `postgres` are its parts.
//! - `backend`, `last_written`: answer the shim's reads from the pageserver.
//! - `shipper`, `local_wal`, `transactions`, `backpressure`: turn WAL syncs into quorum commits.
//! - `http`, `activity`, `catalog`: what the control plane sees and wants.
//! - `slots`, `kept_files`: what logical replication needs of the past.
//! - `subscriptions`: those of an ancestor, which a child must not go on with.
//! - `stop`: the end.

mod activity;
mod asking;
mod backend;
mod backpressure;
mod catalog;
mod compute_dir;
mod data_dir;
mod http;
mod kept_files;
mod last_written;
mod local_wal;
mod opening;
mod owner;
mod page_file;
mod postgres;
mod settings;
mod shipper;
mod slots;
mod start;
mod stop;
mod subscriptions;
mod timings;
mod transactions;

use std::{
    io::{Read, Write},
    process::ExitCode,
    sync::Arc,
    time::Instant,
};

use control_plane_api::compute::{AgentEvent, ComputeSpec};
use parking_lot::Mutex;
use tokio::{
    net::UnixListener,
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;
use types::Lsn;

use crate::{
    activity::Activity,
    backend::AgentBackend,
    http::{AgentApi, StopRequest},
    owner::{Owner, give},
    start::{Compute, start},
};

pub use catalog::{ADMIN_DATABASE, ADMIN_ROLE, CatalogError, GROUP_ROLE};
pub use compute_dir::ComputeDirError;
pub use data_dir::DataDirError;
pub use opening::OpeningError;
pub use owner::OwnerError;
pub use postgres::PostgresError;
pub use settings::SettingError;
pub use shipper::ShipError;
pub use slots::SlotWalError;

/// Longest spec, bytes.
const MAX_SPEC_BYTES: u64 = 4 * 1024 * 1024;

/// Why a compute did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Nobody to run Postgres as.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// The compute directory.
    #[error(transparent)]
    ComputeDir(#[from] ComputeDirError),
    /// A setting of the spec.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// No term was won.
    #[error("election: {0}")]
    Elect(String),
    /// The pageserver cannot serve the branch.
    #[error("base files: {0}")]
    BaseFiles(String),
    /// Nothing that a Postgres could start from.
    #[error(transparent)]
    Opening(#[from] OpeningError),
    /// The data directory.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// The WAL that replication slots need.
    #[error(transparent)]
    SlotWal(#[from] SlotWalError),
    /// Other files and sockets.
    #[error("starting the compute: {0}")]
    Io(#[from] std::io::Error),
    /// Postgres itself.
    #[error(transparent)]
    Postgres(#[from] PostgresError),
    /// Roles and databases.
    #[error("roles and databases: {0}")]
    Catalog(#[from] CatalogError),
    /// Subscriptions that the branch has from its ancestor.
    #[error("disabling the ancestor's subscriptions: {0}")]
    Subscriptions(String),
    /// A newer compute came meanwhile.
    #[error("fenced by a newer term: {0}")]
    Fenced(String),
    /// A signal to the agent.
    #[error("stopped while starting")]
    Interrupted,
}

/// How a compute's life ended other than by being stopped.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It never was ready.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Postgres ended by itself.
    #[error("postgres ended by itself ({0})")]
    PostgresEnded(String),
    /// A newer compute has the branch.
    #[error("fenced by a newer term: {0}")]
    Fenced(String),
    /// It was stopped, but its last WAL is not known to be held by a quorum. What was committed is.
    #[error("stopping: {0}")]
    Stop(String),
}

/// Runs a compute from the [`ComputeSpec`] on standard input, as JSON. Prints the one [`AgentEvent`] line.
pub async fn main_from_stdin() -> ExitCode {
    let spec = match tokio::task::spawn_blocking(read_spec).await {
        Ok(Ok(spec)) => spec,
        Ok(Err(error)) => return give_up(&error),
        Err(error) => return give_up(&error.to_string()),
    };
    match run(spec).await {
        Ok(lsn) => {
            tracing::info!(%lsn, "stopped");
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!(%error, "the compute has ended");
            ExitCode::FAILURE
        }
    }
}

fn give_up(error: &str) -> ExitCode {
    tracing::error!(error, "no compute");
    print_event(&AgentEvent::Failed { error: error.to_owned() });
    ExitCode::FAILURE
}

fn read_spec() -> Result<ComputeSpec, String> {
    let mut text = Vec::new();
    let read = std::io::stdin().lock().take(MAX_SPEC_BYTES + 1).read_to_end(&mut text);
    read.map_err(|error| format!("reading the spec from standard input: {error}"))?;
    if text.len() as u64 > MAX_SPEC_BYTES {
        return Err(format!("the spec on standard input is over {MAX_SPEC_BYTES} bytes"));
    }
    // The text holds a token: of the error only the place is told.
    serde_json::from_slice(&text).map_err(|error| {
        format!("the spec on standard input is not valid: line {}, column {}", error.line(), error.column())
    })
}

/// Runs a compute until it is stopped (by `POST /stop`, SIGTERM or SIGINT): returns the end of its WAL, which a quorum holds.
/// Prints one [`AgentEvent`] line on standard output.
pub async fn run(spec: ComputeSpec) -> Result<Lsn, AgentError> {
    let mut signals = Signals::install().map_err(StartError::Io)?;
    let starting = async {
        let owner = Owner::resolve(spec.postgres_user.as_deref())?;
        let compute = start(&spec, owner).await?;
        let listener = UnixListener::bind(compute.dir.agent_socket())?;
        // The control plane may run as the same unprivileged user as Postgres does.
        give(&compute.dir.agent_socket(), owner)?;
        Ok::<_, StartError>((compute, listener))
    };
    let started = tokio::select! {
        started = Box::pin(starting) => started,
        () = signals.any() => Err(StartError::Interrupted),
    };
    match started {
        Ok((compute, listener)) => {
            tracing::info!(term = %compute.ready.term, lsn = %compute.ready.start_lsn, timings_us = ?compute.ready.timings_us, "ready");
            print_event(&AgentEvent::Ready(compute.ready.clone()));
            serve(compute, listener, signals).await
        }
        Err(error) => {
            print_event(&AgentEvent::Failed { error: error.to_string() });
            Err(error.into())
        }
    }
}

/// The one line on standard output. Nobody may be reading any more, which is no reason to stop.
fn print_event(event: &AgentEvent) {
    let line = match serde_json::to_string(event) {
        Ok(line) => line,
        Err(error) => return tracing::error!(%error, "telling the control plane"),
    };
    let mut out = std::io::stdout().lock();
    if let Err(error) = writeln!(out, "{line}").and_then(|()| out.flush()) {
        tracing::warn!(%error, "telling the control plane");
    }
}

/// Serves a compute that is ready until it ends.
async fn serve(compute: Compute, listener: UnixListener, mut signals: Signals) -> Result<Lsn, AgentError> {
    let activity = Arc::new(Mutex::new(Activity::new(Instant::now())));
    let watching =
        tokio::spawn(activity::watch(compute.dir.root().to_owned(), activity.clone(), compute.backend.clone()));
    let pressure = tokio::spawn(watch_pageserver(compute.backend.clone()));
    let (stops, mut stop_requests) = mpsc::channel::<StopRequest>(16);
    let api = AgentApi {
        paths: (*compute.dir).clone(),
        backend: compute.backend.clone(),
        activity,
        stops,
        catalog: tokio::sync::Mutex::default(),
    };
    let shutdown = CancellationToken::new();
    let http = tokio::spawn(http::serve(listener, Arc::new(api), shutdown.clone()));
    let mut asker = None;
    let proposer = compute.proposer.clone();
    let ended = tokio::select! {
        status = compute.postgres.wait_exit() => Err(AgentError::PostgresEnded(status)),
        fenced = proposer.wait_fenced() => Err(AgentError::Fenced(fenced.0)),
        request = stop_requests.recv() => { asker = request; Ok(()) }
        () = signals.any() => Ok(()),
    };
    watching.abort();
    pressure.abort();
    let ended = match ended {
        Ok(()) => stop::stop(compute).await,
        Err(error) => {
            stop::abandon(compute).await;
            Err(error)
        }
    };
    // Whoever else asked to stop meanwhile gets the same answer.
    stop_requests.close();
    for asker in asker.into_iter().chain(std::iter::from_fn(|| stop_requests.try_recv().ok())) {
        let _ = asker.send(ended.as_ref().copied().map_err(ToString::to_string));
    }
    shutdown.cancel();
    let _ = tokio::time::timeout(stop::ANSWER_LIMIT, http).await;
    ended
}

async fn watch_pageserver(backend: Arc<AgentBackend>) {
    backend.shipper.backpressure().watch(backend.pageserver.clone(), backend.branch.clone()).await;
}

/// The signals that stop a compute.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn install() -> std::io::Result<Signals> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
