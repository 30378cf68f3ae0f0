//! The postgres process: started, watched, stopped.

use std::{
    collections::VecDeque,
    ffi::OsString,
    io::{self, BufRead, BufReader, Read},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, ExitStatus, Stdio},
    sync::{Arc, mpsc},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};

use crate::owner::Owner;

/// How long the end of the log is waited for when Postgres has ended.
const LAST_WORDS_WAIT: Duration = Duration::from_millis(500);
/// How often a starting postmaster's state is looked at.
const READY_POLL: Duration = Duration::from_millis(1);

/// Lines of its log that an error quotes.
const QUOTED_LINES: usize = 20;

/// Longest line of its log that is kept, bytes.
const MAX_LINE_BYTES: u64 = 16 * 1024;

/// The status line of `postmaster.pid` (`LOCK_FILE_LINE_PM_STATUS`, the eighth, in `utils/pidfile.h`).
const PM_STATUS_LINE: usize = 8;

/// What to run and how.
#[derive(Debug)]
pub struct PostgresCommand {
    /// The directory of `postgres`.
    pub bin_dir: PathBuf,
    /// Its data directory.
    pub pgdata: PathBuf,
    /// The shim's environment; nothing else is inherited.
    pub environment: Vec<(OsString, OsString)>,
    /// Settings that none of `postgresql.conf` overrides, as `name=value`.
    pub settings: &'static [&'static str],
    /// Whom to run it as.
    pub owner: Option<Owner>,
}

/// A running postmaster. It dies with the agent, whatever happens to the agent.
#[derive(Debug)]
pub struct Postgres {
    pid: Pid,
    pgdata: PathBuf,
    exit: watch::Receiver<Option<ExitStatus>>,
    log: Arc<Mutex<VecDeque<String>>>,
}

/// Postgres did not start.
#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    /// The program could not be run.
    #[error("running {program}: {source}")]
    Spawn {
        /// Path of the program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It ended by itself.
    #[error("postgres ended ({status}); its last words:\n{log}")]
    Ended {
        /// Exit code or signal.
        status: String,
        /// The end of its log.
        log: String,
    },
    /// It was not ready in time.
    #[error("postgres was not ready within {seconds} s; its last words:\n{log}")]
    Slow {
        /// The limit.
        seconds: u64,
        /// The end of its log.
        log: String,
    },
}

impl Postgres {
    /// Starts it. Returns before it takes connections.
    pub async fn spawn(command: PostgresCommand) -> Result<Postgres, PostgresError> {
        let program = command.bin_dir.join("postgres");
        let pgdata = command.pgdata.clone();
        let log = Arc::new(Mutex::new(VecDeque::with_capacity(QUOTED_LINES)));
        let (exit_to, exit) = watch::channel(None);
        let (started_to, started) = oneshot::channel();
        let failed = |source| PostgresError::Spawn { program: program.clone(), source };
        // The kernel sends the parent-death signal when the thread that forked ends, so that thread must last.
        let path = program.clone();
        let kept = log.clone();
        std::thread::Builder::new()
            .name("postgres".to_owned())
            .spawn(move || match spawn_child(&path, &command) {
                Ok(child) => supervise(child, started_to, &exit_to, &kept),
                Err(error) => drop(started_to.send(Err(error))),
            })
            .map_err(failed)?;
        let started = started.await.map_err(|_| failed(io::Error::other("its thread ended")))?;
        Ok(Postgres { pid: started.map_err(failed)?, pgdata, exit, log })
    }

    /// Waits until it takes connections.
    pub async fn wait_ready(&self, limit: Duration) -> Result<(), PostgresError> {
        let pid_file = self.pgdata.join("postmaster.pid");
        let mut exit = self.exit.clone();
        let ready = async {
            while !is_ready(&pid_file) {
                tokio::time::sleep(READY_POLL).await;
            }
        };
        tokio::select! {
            () = ready => Ok(()),
            status = wait_exit(&mut exit) => Err(PostgresError::Ended { status: describe(status), log: self.last_words() }),
            () = tokio::time::sleep(limit) => {
                Err(PostgresError::Slow { seconds: limit.as_secs(), log: self.last_words() })
            }
        }
    }

    /// Waits until it has ended; says how.
    pub async fn wait_exit(&self) -> String {
        describe(wait_exit(&mut self.exit.clone()).await)
    }

    /// True once it has ended with exit code 0, as after a fast shutdown.
    pub fn ended_well(&self) -> bool {
        self.exit.borrow().is_some_and(|status| status.success())
    }

    /// True as long as it runs.
    pub fn is_running(&self) -> bool {
        self.exit.borrow().is_none()
    }

    /// Fast shutdown: sessions are cut, a shutdown checkpoint is written.
    pub fn stop_fast(&self) {
        self.signal(Signal::SIGINT);
    }

    /// Ends it without a checkpoint, within `grace` by force.
    pub async fn stop_now(&self, grace: Duration) {
        self.signal(Signal::SIGQUIT);
        if tokio::time::timeout(grace, self.wait_exit()).await.is_err() {
            self.signal_group(Signal::SIGKILL);
            self.wait_exit().await;
        }
    }

    /// The end of its log.
    pub fn last_words(&self) -> String {
        self.log.lock().iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }

    fn signal(&self, signal: Signal) {
        if self.is_running() {
            // It may end at this very moment, which is as good.
            let _ = kill(self.pid, signal);
        }
    }

    fn signal_group(&self, signal: Signal) {
        self.signal(signal);
        // Backends notice their postmaster's death by themselves and leave.
        let _ = kill(Pid::from_raw(-self.pid.as_raw()), signal);
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.signal(Signal::SIGQUIT);
    }
}

async fn wait_exit(exit: &mut watch::Receiver<Option<ExitStatus>>) -> Option<ExitStatus> {
    match exit.wait_for(Option::is_some).await {
        Ok(status) => *status,
        Err(_) => None,
    }
}

fn describe(status: Option<ExitStatus>) -> String {
    match status {
        Some(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("killed by signal {signal}"),
            (None, None) => status.to_string(),
        },
        None => "status unknown".to_owned(),
    }
}

/// True when the postmaster has written that it takes connections.
fn is_ready(pid_file: &Path) -> bool {
    let Ok(text) = std::fs::read_to_string(pid_file) else { return false };
    text.lines().nth(PM_STATUS_LINE - 1).is_some_and(|status| status.trim_end() == "ready")
}

fn spawn_child(program: &Path, command: &PostgresCommand) -> io::Result<Child> {
    let owner = command.owner.map(|owner| (owner.uid(), owner.gid()));
    let agent = std::process::id();
    let mut child = Command::new(program);
    child
        .arg("-D")
        .arg(&command.pgdata)
        .args(command.settings.iter().flat_map(|setting| ["-c", setting]))
        .env_clear()
        .env("LANG", "C.UTF-8")
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .envs(command.environment.iter().map(|(name, value)| (name, value)))
        .current_dir(&command.pgdata)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // SAFETY: the closure runs between fork and exec and makes async-signal-safe system calls only.
    unsafe { child.pre_exec(move || become_postgres(owner, agent)) };
    child.spawn()
}

/// In the child: another group, another user, and bound to the agent's life.
fn become_postgres(owner: Option<(u32, u32)>, agent: u32) -> io::Result<()> {
    let check = |result: libc::c_int| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: plain system calls on numbers; no pointer but the null one that goes with a count of zero.
    unsafe {
        check(libc::setpgid(0, 0))?;
        if let Some((uid, gid)) = owner {
            check(libc::setgroups(0, std::ptr::null()))?;
            check(libc::setgid(gid))?;
            check(libc::setuid(uid))?;
        }
        // Behind the change of user, which would clear it.
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGQUIT))?;
        if libc::getppid() as u32 != agent {
            return Err(io::Error::other("the agent has ended"));
        }
    }
    Ok(())
}

/// Runs in a thread of its own until the child has ended.
fn supervise(
    mut child: Child,
    started: oneshot::Sender<io::Result<Pid>>,
    exit: &watch::Sender<Option<ExitStatus>>,
    log: &Mutex<VecDeque<String>>,
) {
    let stderr = child.stderr.take();
    let pid = Pid::from_raw(child.id() as i32);
    if started.send(Ok(pid)).is_err() {
        // Nobody waits for it any more.
        let _ = kill(pid, Signal::SIGQUIT);
    }
    std::thread::scope(|scope| {
        let (reading, is_read) = mpsc::channel::<()>();
        scope.spawn(move || {
            if let Some(stderr) = stderr {
                copy_log(stderr, log);
            }
            drop(reading);
        });
        let status = child.wait();
        // Whoever hears of the end quotes the log. Not for long: a backend that outlives the postmaster holds the pipe open.
        let _read_or_late = is_read.recv_timeout(LAST_WORDS_WAIT);
        match status {
            Ok(status) => exit.send_replace(Some(status)),
            Err(error) => {
                tracing::error!(%error, "waiting for postgres");
                exit.send_replace(Some(ExitStatus::from_raw(-1)))
            }
        };
    });
}

fn copy_log(stderr: ChildStderr, kept: &Mutex<VecDeque<String>>) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) => return tracing::warn!(%error, "reading the log of postgres"),
        }
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        tracing::info!(target: "postgres", "{text}");
        let mut kept = kept.lock();
        if kept.len() == QUOTED_LINES {
            kept.pop_front();
        }
        kept.push_back(text);
    }
}
