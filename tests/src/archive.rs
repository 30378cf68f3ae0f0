//! `pg_receivewal` and what it has written.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::stock::{as_postgres, give_to_postgres, run};

/// One of PostgreSQL's programs, as the user that servers run as, who must not look for certificates where the test's user has them.
pub fn client(program: &str) -> anyhow::Result<Command> {
    let mut command = as_postgres(crate::pg_bin_dir().join(program))?;
    command.env("HOME", "/");
    Ok(command)
}

/// An empty archive; removed with the directory that it is in.
pub fn directory() -> anyhow::Result<(tempfile::TempDir, PathBuf)> {
    let home = tempfile::tempdir()?;
    let archive = home.path().join("archive");
    std::fs::create_dir(&archive)?;
    give_to_postgres(home.path())?;
    give_to_postgres(&archive)?;
    Ok((home, archive))
}

/// A running `pg_receivewal` with this connection string, and perhaps a slot.
pub fn receive(conninfo: &str, archive: &Path, slot: Option<&str>) -> anyhow::Result<Child> {
    let mut command = client("pg_receivewal")?;
    command.args(["-d", conninfo, "--synchronous", "-s", "1"]);
    if let Some(slot) = slot {
        command.args(["-S", slot]);
    }
    command.arg("-D").arg(archive);
    let log = std::fs::File::options().create(true).append(true).open(archive.join("log"))?;
    command.stdout(Stdio::null()).stderr(log).spawn().context("pg_receivewal")
}

/// Ends it as Ctrl-C does.
pub fn stop(mut receiver: Child) -> anyhow::Result<()> {
    kill(Pid::from_raw(receiver.id() as i32), Signal::SIGINT)?;
    receiver.wait()?;
    Ok(())
}

/// Waits until an archive has all records between two positions, which must follow on one another.
pub async fn wait_for(archive: &Path, begin: &str, end: &str, limit: Duration) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let copy = tempfile::tempdir()?;
        for entry in std::fs::read_dir(archive)? {
            let entry = entry?;
            if let Some(name) = entry.file_name().to_str().filter(|name| name.starts_with("0000")) {
                std::fs::copy(entry.path(), copy.path().join(name.trim_end_matches(".partial")))?;
            }
        }
        let mut dump = Command::new(crate::pg_bin_dir().join("pg_waldump"));
        let dumped = run(dump.args(["-q", "-p"]).arg(copy.path()).args(["-s", begin, "-e", end]));
        let Err(error) = dumped else { return Ok(()) };
        let log = std::fs::read_to_string(archive.join("log")).unwrap_or_default();
        ensure!(began.elapsed() < limit, "the archive does not have {begin} to {end}: {error:#}\n{log}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
