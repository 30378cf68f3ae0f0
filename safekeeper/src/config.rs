//! A safekeeper's configuration.

use std::{net::SocketAddr, path::PathBuf};

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
}

fn parse_node(text: &str) -> Result<NodeId, std::num::ParseIntError> {
    text.parse().map(NodeId)
}
