//! A safekeeper's configuration.

use std::{net::SocketAddr, path::PathBuf};

use bucket::ObjectStoreConfig;
use types::NodeId;

/// Keep the write-ahead log of branches and acknowledge it to their computes
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Number of this safekeeper, unique in the installation
    #[arg(long, env = "DORMOUSE_SAFEKEEPER_ID", value_parser = parse_node)]
    pub id: NodeId,

    /// Address to serve computes and pageservers on
    #[arg(long, env = "DORMOUSE_SAFEKEEPER_LISTEN", default_value = "127.0.0.1:7001")]
    pub listen: SocketAddr,

    /// Directory for the log; made if missing. Its disk must keep what has been fsynced
    #[arg(long, env = "DORMOUSE_SAFEKEEPER_DATA_DIR")]
    pub data_dir: PathBuf,

    /// File with the control plane's public key (PEM); callers' tokens are checked with it
    #[arg(long, env = "DORMOUSE_TOKEN_PUBLIC_KEY")]
    pub token_public_key: PathBuf,

    /// Seconds without a compute's message after which a branch is forgotten in memory and its disk space given back
    #[arg(long, env = "DORMOUSE_SAFEKEEPER_IDLE_SECONDS", default_value_t = 30)]
    pub idle_seconds: u64,

    /// The object store, the same as the pageservers': a directory, or s3://bucket/prefix with AWS_* variables. Without it, WAL is kept on
    /// the local disk until the pageserver has stored it
    #[arg(long, env = "DORMOUSE_OBJECT_STORE", value_name = "URL")]
    pub object_store: Option<ObjectStoreConfig>,

    /// Seconds that WAL which fills a segment, or the end of an idle branch, waits for the pageserver to store it before it is copied to
    /// the object store; the next safekeeper waits twice as long, in case this one does not do it
    #[arg(long, env = "DORMOUSE_SAFEKEEPER_OFFLOAD_AFTER_SECONDS", default_value_t = 10, value_name = "SECONDS")]
    pub offload_after_seconds: u64,

    /// MiB that stay on the local disk, of each branch that is written to, after they have been copied to the object store, until the
    /// pageserver has them
    #[arg(long, env = "DORMOUSE_SAFEKEEPER_KEEP_LOCAL_MIB", default_value_t = 64, value_name = "MIB")]
    pub keep_local_mib: u64,
}

impl Config {
    /// With defaults for everything that has one: no object store.
    pub fn new(id: NodeId, data_dir: PathBuf, token_public_key: PathBuf) -> Config {
        Config {
            id,
            listen: SocketAddr::from(([127, 0, 0, 1], 7001)),
            data_dir,
            token_public_key,
            idle_seconds: 30,
            object_store: None,
            offload_after_seconds: 10,
            keep_local_mib: 64,
        }
    }
}

fn parse_node(text: &str) -> Result<NodeId, std::num::ParseIntError> {
    text.parse().map(NodeId)
}
