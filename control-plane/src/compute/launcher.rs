//! The boundary to agents, and the real thing: processes of `dormouse compute` in sessions of their own.

use std::{
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use control_plane_api::compute::{AgentEvent, AgentStatus, CatalogSpec, ComputeReady, ComputeSpec};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
};
use types::{EndpointId, Lsn, Membership};

use super::agent_http::{self, AgentError};

/// The line an agent prints is shorter.
const MAX_EVENT_BYTES: u64 = 64 * 1024;
/// Longest wait for `GET /status`.
const STATUS_TIMEOUT: Duration = Duration::from_secs(3);

/// An agent's process, told from a later one with the same id by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AgentProcess {
    /// Process id; also its process group and session.
    pub pid: u32,
    /// `starttime` of `/proc/<pid>/stat`, clock ticks since boot.
    pub started_ticks: u64,
}

/// Why a compute did not start.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The process could not be started.
    #[error("starting the compute's agent: {0}")]
    Spawn(#[source] std::io::Error),
    /// The process ended or broke off before it said anything.
    #[error("the compute's agent ended early; see {}", .0.display())]
    Died(PathBuf),
    /// It said why it failed.
    #[error("the compute did not start: {0}")]
    Failed(String),
    /// It took too long.
    #[error("the compute was not ready within {} s; see {}", .limit.as_secs(), .log.display())]
    Timeout {
        /// How long was waited.
        limit: Duration,
        /// Where it says more.
        log: PathBuf,
    },
}

/// Starts agents and talks to them.
#[async_trait]
pub trait ComputeLauncher: Send + Sync + 'static {
    /// Starts an agent that waits for its spec.
    async fn spawn(&self, endpoint: &EndpointId) -> Result<Box<dyn Launching>, LaunchError>;
    /// True while the process runs.
    fn is_alive(&self, process: AgentProcess) -> bool;
    /// Asks how it is.
    async fn status(&self, socket: &Path) -> Result<AgentStatus, AgentError>;
    /// Puts it to sleep; the end of the branch's WAL when the agent says it. The process may live on for a moment.
    async fn stop(&self, socket: &Path, limit: Duration) -> Result<Option<Lsn>, AgentError>;
    /// Brings roles and databases to it.
    async fn apply(&self, socket: &Path, catalog: &CatalogSpec, limit: Duration) -> Result<(), AgentError>;
    /// Tells it of another membership of its branch.
    async fn set_membership(&self, socket: &Path, membership: &Membership) -> Result<(), AgentError>;
    /// Ends it and all its children at once.
    fn kill(&self, process: AgentProcess);
}

/// An agent that waits for its spec. Dropped: it ends.
#[async_trait]
pub trait Launching: Send {
    /// Its process.
    fn process(&self) -> AgentProcess;
    /// Hands over the spec and waits until Postgres takes connections.
    async fn start(self: Box<Self>, spec: &ComputeSpec, limit: Duration) -> Result<ComputeReady, LaunchError>;
}

/// Starts processes of this program.
pub struct ProcessLauncher {
    program: PathBuf,
    log_dir: PathBuf,
}

impl ProcessLauncher {
    /// `program compute` is run; what it says goes to `<log_dir>/<endpoint>.log`.
    pub fn new(program: PathBuf, log_dir: PathBuf) -> ProcessLauncher {
        ProcessLauncher { program, log_dir }
    }
}

#[async_trait]
impl ComputeLauncher for ProcessLauncher {
    async fn spawn(&self, endpoint: &EndpointId) -> Result<Box<dyn Launching>, LaunchError> {
        let log = self.log_dir.join(format!("{endpoint}.log"));
        let log_file =
            OpenOptions::new().create(true).append(true).mode(0o600).open(&log).map_err(LaunchError::Spawn)?;
        let mut command = Command::new(&self.program);
        command.arg("compute").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log_file).current_dir("/");
        // SAFETY: setsid is async-signal-safe and touches no memory of the parent.
        unsafe {
            command.pre_exec(|| nix::unistd::setsid().map(|_| ()).map_err(std::io::Error::from));
        }
        let mut child = command.spawn().map_err(LaunchError::Spawn)?;
        let (Some(pid), Some(stdin), Some(stdout)) = (child.id(), child.stdin.take(), child.stdout.take()) else {
            return Err(LaunchError::Died(log));
        };
        let Some(stat) = ProcessStat::read(pid) else { return Err(LaunchError::Died(log)) };
        let process = AgentProcess { pid, started_ticks: stat.started_ticks };
        Ok(Box::new(AgentLaunching { child, stdin, stdout, process, log }))
    }

    fn is_alive(&self, process: AgentProcess) -> bool {
        is_alive(process)
    }

    async fn status(&self, socket: &Path) -> Result<AgentStatus, AgentError> {
        agent_http::status(socket, STATUS_TIMEOUT).await
    }

    async fn stop(&self, socket: &Path, limit: Duration) -> Result<Option<Lsn>, AgentError> {
        agent_http::stop(socket, limit).await
    }

    async fn apply(&self, socket: &Path, catalog: &CatalogSpec, limit: Duration) -> Result<(), AgentError> {
        agent_http::apply(socket, catalog, limit).await
    }

    async fn set_membership(&self, socket: &Path, membership: &Membership) -> Result<(), AgentError> {
        agent_http::set_membership(socket, membership, STATUS_TIMEOUT).await
    }

    fn kill(&self, process: AgentProcess) {
        // The group may outlive its leader; a stranger that got the same id has another start time.
        let stranger = ProcessStat::read(process.pid).is_some_and(|stat| stat.started_ticks != process.started_ticks);
        if !stranger && process.pid > 1 {
            let _ = killpg(Pid::from_raw(process.pid.cast_signed()), Signal::SIGKILL);
        }
    }
}

struct AgentLaunching {
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    process: AgentProcess,
    log: PathBuf,
}

#[async_trait]
impl Launching for AgentLaunching {
    fn process(&self) -> AgentProcess {
        self.process
    }

    async fn start(self: Box<Self>, spec: &ComputeSpec, limit: Duration) -> Result<ComputeReady, LaunchError> {
        let AgentLaunching { mut child, mut stdin, stdout, log, process: _ } = *self;
        let began = Instant::now();
        let mut line = Vec::new();
        let mut reader = BufReader::new(stdout);
        let exchange = async {
            let spec = serde_json::to_vec(spec).map_err(std::io::Error::other)?;
            stdin.write_all(&spec).await?;
            drop(stdin);
            (&mut reader).take(MAX_EVENT_BYTES).read_until(b'\n', &mut line).await
        };
        let exchanged = tokio::time::timeout(limit, exchange).await;
        // Whatever comes, someone must read what it prints later and reap it at its end.
        tokio::spawn(async move {
            let _ = tokio::io::copy(&mut reader, &mut tokio::io::sink()).await;
            let ended = child.wait().await;
            tracing::debug!(?ended, "agent process ended");
        });
        match exchanged {
            Err(_) => Err(LaunchError::Timeout { limit, log }),
            Ok(Err(_)) => Err(LaunchError::Died(log)),
            Ok(Ok(_)) => match serde_json::from_slice::<AgentEvent>(&line) {
                Ok(AgentEvent::Ready(ready)) => {
                    tracing::debug!(elapsed = ?began.elapsed(), timings_us = ?ready.timings_us, "compute is ready");
                    Ok(ready)
                }
                Ok(AgentEvent::Failed { error }) => Err(LaunchError::Failed(error)),
                Err(_) => Err(LaunchError::Died(log)),
            },
        }
    }
}

/// What is used of `/proc/<pid>/stat`.
struct ProcessStat {
    state: u8,
    started_ticks: u64,
}

impl ProcessStat {
    fn read(pid: u32) -> Option<ProcessStat> {
        Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// The program's name stands in parentheses and may hold anything: count from the last one. proc(5): the state is field
    /// 3, `starttime` field 22.
    fn parse(text: &str) -> Option<ProcessStat> {
        let rest = text.get(text.rfind(')')? + 2..)?;
        let mut fields = rest.split(' ');
        let state = *fields.next()?.as_bytes().first()?;
        Some(ProcessStat { state, started_ticks: fields.nth(18)?.parse().ok()? })
    }
}

/// True while the process runs; a zombie does not.
pub fn is_alive(process: AgentProcess) -> bool {
    ProcessStat::read(process.pid)
        .is_some_and(|stat| stat.started_ticks == process.started_ticks && !matches!(stat.state, b'Z' | b'X'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_told_apart_by_start_time() {
        let pid = std::process::id();
        let started_ticks = ProcessStat::read(pid).expect("this process").started_ticks;
        assert!(is_alive(AgentProcess { pid, started_ticks }));
        assert!(!is_alive(AgentProcess { pid, started_ticks: started_ticks + 1 }));
        let odd = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 123456 0 0";
        assert_eq!(ProcessStat::parse(odd).expect("parsed").started_ticks, 123_456);
        assert!(ProcessStat::parse("nonsense").is_none());
    }
}
