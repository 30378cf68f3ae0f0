//! Checks the library's redo against a stopped Postgres server's WAL and files, and against a standby's.
//!
//! Usage: `redo-oracle <data directory from before> <data directory after> [<data directory of a standby>]`. All are of the
//! same cluster, cleanly stopped; the server ran in between with `wal_consistency_checking = all`, and kept all its WAL
//! (`wal_keep_size`); the standby started as a copy of the first and has replayed all of it.

use std::{env, path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    let directories: Vec<PathBuf> = env::args_os().skip(1).map(PathBuf::from).collect();
    let (before, after, standby) = match directories.as_slice() {
        [before, after] => (before, after, None),
        [before, after, standby] => (before, after, Some(standby.as_path())),
        _other => {
            eprintln!(
                "usage: redo-oracle <data directory before> <data directory after> [<data directory of a standby>]"
            );
            return ExitCode::from(2);
        }
    };
    let report = redo_oracle::check_with_standby(before, after, standby);
    println!("{report}");
    if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
