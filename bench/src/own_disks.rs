//! `--sync-us`: every process has a disk of its own, whose syncs take as long as one likes.

use std::{
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context, ensure};

/// What `bench/disk` reads.
const DELAY: &str = "DORMOUSE_BENCH_SYNC_US";

/// Where files are in memory, so that only what is added takes time.
const MEMORY: &str = "/dev/shm";

const LIBRARY: &str = "libdormouse_bench_disk.so";

/// This is the program that [`run_again`] has started.
pub fn are_there() -> bool {
    std::env::var_os(DELAY).is_some()
}

/// Runs this program once more, it and all that it starts in memory and with later syncs.
pub fn run_again(micros: u32) -> anyhow::Result<ExitCode> {
    ensure!(Path::new(MEMORY).is_dir(), "there is no {MEMORY} to keep data in");
    let this = std::env::current_exe()?;
    let built = this.parent().context("no directory")?.join(LIBRARY);
    // Where the user that servers run as can read it.
    let home = tempfile::Builder::new().prefix("bench-disk-").tempdir_in(MEMORY)?;
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o755))?;
    let library = home.path().join(LIBRARY);
    let missing = || format!("{} (cargo build --release -p dormouse-bench-disk)", built.display());
    std::fs::copy(&built, &library).with_context(missing)?;
    println!("data in memory, each sync at least {micros} us");
    let mut again = Command::new(this);
    again.args(std::env::args_os().skip(1)).env(DELAY, micros.to_string());
    let status = again.env("LD_PRELOAD", library).env("TMPDIR", MEMORY).status()?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
