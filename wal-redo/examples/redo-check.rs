//! Checks the library's redo against a stopped Postgres server's WAL and files (see `tests/oracle`).
//!
//! Usage: `redo-check <data directory from before> <data directory after>`. Both are of the same cluster, cleanly
//! stopped; the server ran in between with `wal_consistency_checking = all`, and kept all its WAL (`wal_keep_size`).

#[path = "../tests/oracle/mod.rs"]
mod oracle;

use std::{env, path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    let directories: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let [before, after] = directories.as_slice() else {
        eprintln!("usage: redo-check <data directory from before> <data directory after>");
        return ExitCode::from(2);
    };
    let report = oracle::check(before, after);
    println!("{report}");
    if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
