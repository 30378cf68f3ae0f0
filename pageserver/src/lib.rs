//! The pageserver: follows the WAL of branches and gives back any page as of any position. See `README.md`.
//!
//! - [`Config`], [`Server`], [`run`]: the service.
//! - [`storage`]: every key and value that is stored.
//! - [`layer`], [`remote`]: files of values, and the object store that holds them.
//! - [`compaction`]: which layers to merge, of which to make images, which may go. Pure.
//! - [`branch`]: one branch's memory, layers and history; making and removing branches.
//! - [`check`]: whether all that is stored is whole.
//! - [`ingest`]: WAL in. [`read`], [`base_files`]: pages and files out.
//! - [`import_template`]: a stopped cluster as a branch to start from.

pub mod base_files;
pub mod branch;
pub mod check;
pub mod compaction;
pub mod config;
pub mod error;
pub mod ingest;
pub mod layer;
pub mod read;
pub mod remote;
pub mod server;
pub mod storage;
pub mod template;

pub use config::{Config, SafekeeperAddress};
pub use remote::{ObjectStoreConfig, ObjectStoreConfigError};
pub use server::Server;
pub use template::{ImportError, import_template, template_exists};

use tokio_util::sync::CancellationToken;

/// Runs a pageserver until `shutdown`.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    Server::bind(config).await?.run(shutdown).await
}
