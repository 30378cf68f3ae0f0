//! What the end-to-end tests, the demo and the benchmarks share: a whole Dormouse of real processes, and real clients.

pub mod api;
pub mod archive;
pub mod beside;
pub mod chaos;
pub mod cluster;
pub mod http;
pub mod node;
pub mod processes;
pub mod redo_check;
pub mod regress;
pub mod s3;
mod small_disk;
pub mod sql;
pub mod stock;

pub use api::{Api, Project};
pub use cluster::{Cluster, ClusterOptions};
pub use small_disk::SmallDisk;

use std::path::{Path, PathBuf};

use anyhow::Context;

/// Directory of PostgreSQL's programs: `PG_BIN_DIR`, else where Debian puts version 15.
pub fn pg_bin_dir() -> PathBuf {
    std::env::var_os("PG_BIN_DIR").map_or_else(|| PathBuf::from("/usr/lib/postgresql/15/bin"), PathBuf::from)
}

/// The repository's root.
pub fn repository() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Makes a directory, or empties the one that an earlier run has left.
pub fn emptied_directory(path: &Path) -> anyhow::Result<()> {
    if path.exists() {
        std::fs::remove_dir_all(path).with_context(|| path.display().to_string())?;
    }
    std::fs::create_dir_all(path).with_context(|| path.display().to_string())
}
