//! Looking at, and ending, processes that a test has started.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A process as `/proc` shows it.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its parent's id.
    pub parent: i32,
    /// Its arguments, joined by spaces.
    pub command: String,
}

/// All processes that can be seen.
pub fn all() -> Vec<Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| read(entry.path())).collect()
}

fn read(path: PathBuf) -> Option<Process> {
    let pid: i32 = path.file_name()?.to_str()?.parse().ok()?;
    let command = std::fs::read(path.join("cmdline")).ok()?;
    let stat = std::fs::read_to_string(path.join("stat")).ok()?;
    // The second field is the program's name in parentheses and may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let parent = fields.nth(1)?.parse().ok()?;
    let command = String::from_utf8_lossy(&command).replace('\0', " ").trim().to_owned();
    Some(Process { pid, parent, command })
}

/// All processes of Postgres, postmaster and children, that run in a compute directory below `runtime_dir`.
pub fn postgres_below(runtime_dir: &std::path::Path) -> Vec<Process> {
    let runs_there = |process: &Process| {
        let link = |name: &str| std::fs::read_link(format!("/proc/{}/{name}", process.pid)).unwrap_or_default();
        link("exe").file_name().is_some_and(|program| program == "postgres") && link("cwd").starts_with(runtime_dir)
    };
    all().into_iter().filter(runs_there).collect()
}

/// Children of `parent` whose command line contains `text`.
pub fn children_with(parent: u32, text: &str) -> Vec<Process> {
    all().into_iter().filter(|p| p.parent == parent as i32 && p.command.contains(text)).collect()
}

/// SIGKILL, at once.
pub fn kill_hard(pid: i32) -> anyhow::Result<()> {
    kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("kill -9 {pid}"))
}

/// Waits until `condition` holds, looking every 20 ms.
pub async fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> anyhow::Result<()> {
    let deadline = std::time::Instant::now() + limit;
    while !condition() {
        if std::time::Instant::now() > deadline {
            bail!("waited {limit:?} in vain for {what}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Who has the socket of the connection that comes from this port of 127.0.0.1. A process that has just ended has none.
pub fn owner_of_port(port: u16) -> Option<i32> {
    let local = format!("0100007F:{port:04X}");
    let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
    // Established: the port may be listened on too, or have been used before.
    let connection = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find(|fields| {
        fields.get(1).is_some_and(|address| *address == local) && fields.get(3).is_some_and(|state| *state == "01")
    })?;
    let socket = PathBuf::from(format!("socket:[{}]", connection.get(9)?));
    all().into_iter().map(|process| process.pid).find(|pid| {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        open.into_iter().any(|entry| std::fs::read_link(entry.path()).is_ok_and(|target| target == socket))
    })
}

/// True while there is such a process, and it has not ended.
pub fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().next());
    state.is_some_and(|state| state != "Z" && state != "X")
}
