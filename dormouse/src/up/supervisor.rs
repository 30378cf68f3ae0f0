//! Keeps processes running, and stops them in order.

use std::{
    fs::File,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::Context;
use nix::{
    sys::{
        prctl,
        signal::{Signal, kill},
    },
    unistd::{Pid, getpid, getppid},
};
use tokio::{
    net::TcpStream,
    process::{Child, Command},
    sync::{Notify, watch},
};

use super::plan::{Service, local};
use crate::logging::tell;

/// Longest wait for a service to take connections at the first start. One from before a crash may have to stop first.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
const READY_INTERVAL: Duration = Duration::from_millis(20);
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// A service that ran this long starts again at once.
const STABLE_AFTER: Duration = Duration::from_secs(30);
/// How much of a log is shown when its service does not start.
const SHOWN_LOG_LINES: usize = 8;

/// Runs services as children. All on one thread.
pub struct Supervisor {
    log_dir: PathBuf,
    running: Vec<Rc<Supervised>>,
}

/// A service that is kept running.
struct Supervised {
    service: Service,
    log: PathBuf,
    /// Process id while it runs.
    pid: watch::Sender<Option<u32>>,
    stopping: Notify,
    stop_begun: std::cell::Cell<bool>,
}

impl Supervisor {
    /// Logs go to `<log_dir>/<service>.log`.
    pub fn new(log_dir: PathBuf) -> Supervisor {
        Supervisor { log_dir, running: Vec::new() }
    }

    /// Starts a service and waits until it takes connections. From then on it is started again whenever it ends.
    pub async fn start(&mut self, service: Service) -> anyhow::Result<()> {
        let log = self.log_dir.join(format!("{}.log", service.name));
        let supervised = Rc::new(Supervised {
            service,
            log,
            pid: watch::Sender::new(None),
            stopping: Notify::new(),
            stop_begun: std::cell::Cell::new(false),
        });
        let began = Instant::now();
        let mut child = supervised.spawn()?;
        self.running.push(Rc::clone(&supervised));
        let ready = tokio::select! {
            ready = wait_ready(&supervised.service) => ready,
            status = child.wait() => {
                supervised.pid.send_replace(None);
                Err(anyhow::anyhow!("ended with {}", describe(status?)))
            }
        };
        if let Err(reason) = ready {
            let tail = tail(&supervised.log);
            let name = &supervised.service.name;
            anyhow::bail!("{name} did not start: {reason}\n{tail}(whole log: {})", supervised.log.display());
        }
        let elapsed_ms = began.elapsed().as_millis();
        tracing::debug!(service = supervised.service.name, elapsed_ms, "service takes connections");
        keep(supervised, child);
        Ok(())
    }

    /// Stops all services by rank, those of one rank together, each with its own time limit.
    pub async fn stop(&mut self) {
        self.running.sort_by_key(|supervised| supervised.service.stop_rank);
        for rank in self.running.chunk_by(|a, b| a.service.stop_rank == b.service.stop_rank) {
            futures::future::join_all(rank.iter().map(|supervised| supervised.stop())).await;
        }
    }

    /// Ends all services at once.
    pub fn kill(&mut self) {
        for supervised in &self.running {
            supervised.begin_stop();
            supervised.signal(Signal::SIGKILL);
        }
    }
}

impl Supervised {
    fn spawn(&self) -> anyhow::Result<Child> {
        let name = &self.service.name;
        let program = std::env::current_exe().context("finding this program")?;
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("opening {}", self.log.display()))?;
        let mut command = Command::new(program);
        command.args(&self.service.arguments).envs(self.service.environment.iter().map(|(k, v)| (k, v)));
        // Own groups: a Ctrl-C in the terminal is for the supervisor, which stops them in order.
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let parent = getpid();
        // SAFETY: prctl and getppid are async-signal-safe and touch no memory of the parent.
        unsafe {
            command.pre_exec(move || {
                prctl::set_pdeathsig(Signal::SIGTERM)?;
                // The parent may have ended before the line above.
                if getppid() == parent { Ok(()) } else { Err(std::io::ErrorKind::BrokenPipe.into()) }
            });
        }
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        self.pid.send_replace(child.id());
        Ok(child)
    }

    fn begin_stop(&self) {
        self.stop_begun.set(true);
        self.stopping.notify_one();
    }

    async fn stop(&self) {
        self.begin_stop();
        self.signal(Signal::SIGTERM);
        if tokio::time::timeout(self.service.stop_timeout, self.wait_gone()).await.is_err() {
            let (name, seconds) = (&self.service.name, self.service.stop_timeout.as_secs());
            tell(format_args!("{name} did not stop within {seconds} s and is killed; see {}", self.log.display()));
            self.signal(Signal::SIGKILL);
            let _ = tokio::time::timeout(Duration::from_secs(5), self.wait_gone()).await;
        }
    }

    async fn wait_gone(&self) {
        // The sender lives in this same struct: it cannot be closed.
        let _ = self.pid.subscribe().wait_for(Option::is_none).await;
    }

    fn signal(&self, signal: Signal) {
        // Set to `None` before the child is forgotten: never another process's id.
        if let Some(pid) = *self.pid.borrow() {
            let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
        }
    }
}

/// Starts the service again whenever it ends, until it is to stop.
fn keep(supervised: Rc<Supervised>, mut child: Child) {
    let keeping = async move {
        let mut backoff = FIRST_BACKOFF;
        loop {
            let began = Instant::now();
            let status = child.wait().await;
            supervised.pid.send_replace(None);
            if supervised.stop_begun.get() {
                return;
            }
            let ended = status.map_or_else(|e| e.to_string(), describe);
            if began.elapsed() > STABLE_AFTER {
                backoff = FIRST_BACKOFF;
            }
            loop {
                let (name, log) = (&supervised.service.name, supervised.log.display());
                tell(format_args!("{name} ended with {ended}; starting it again in {backoff:?} (log: {log})"));
                tokio::select! {
                    () = tokio::time::sleep(backoff) => {}
                    () = supervised.stopping.notified() => return,
                }
                backoff = (backoff * 2).min(MAX_BACKOFF);
                match supervised.spawn() {
                    Ok(again) => {
                        child = again;
                        break;
                    }
                    Err(error) => tell(format_args!("{error:#}")),
                }
            }
        }
    };
    // Futures with an `Rc` cannot be spawned on a runtime of many threads; here a set of local tasks runs them.
    tokio::task::spawn_local(keeping);
}

async fn wait_ready(service: &Service) -> anyhow::Result<()> {
    let deadline = Instant::now() + READY_TIMEOUT;
    let address = local(service.address);
    loop {
        match TcpStream::connect(address).await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                anyhow::bail!("no connection to {address} within {} s: {error}", READY_TIMEOUT.as_secs())
            }
            Err(_) => tokio::time::sleep(READY_INTERVAL).await,
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown status".into(),
    }
}

/// The end of a log, to show.
fn tail(path: &Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(SHOWN_LOG_LINES)..].iter().map(|line| format!("  | {line}\n")).collect()
}
