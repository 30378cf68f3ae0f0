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

    #[command(flatten)]
    pub replication: ReplicationConfig,
}

/// How branches' WAL is given to standbys and `pg_receivewal`
#[derive(Debug, Clone, clap::Args)]
pub struct ReplicationConfig {
    /// Address to give branches' committed WAL out on by Postgres's own replication protocol: standbys and pg_receivewal follow a branch
    /// there, whether or not its compute is awake. Not given out without it
    #[arg(long, env = "DORMOUSE_SAFEKEEPER_REPLICATION_LISTEN", value_name = "ADDRESS", help_heading = "Replication")]
    pub replication_listen: Option<SocketAddr>,

    /// Where clients reach that address, as host:port [default: the same address; the host of --listen for one like 0.0.0.0]
    #[arg(
        long,
        env = "DORMOUSE_SAFEKEEPER_REPLICATION_ADDRESS",
        value_name = "HOST:PORT",
        requires = "replication_listen",
        help_heading = "Replication"
    )]
    pub replication_address: Option<String>,

    /// Certificate chain (PEM) for replication, which then takes nobody without TLS. Read again for each connection. Without it tokens and
    /// WAL pass in clear text
    #[arg(
        long,
        env = "DORMOUSE_SAFEKEEPER_REPLICATION_TLS_CERT",
        value_name = "FILE",
        requires = "replication_tls_key",
        help_heading = "Replication"
    )]
    pub replication_tls_cert: Option<PathBuf>,

    /// The certificate's private key (PEM)
    #[arg(
        long,
        env = "DORMOUSE_SAFEKEEPER_REPLICATION_TLS_KEY",
        value_name = "FILE",
        requires = "replication_tls_cert",
        help_heading = "Replication"
    )]
    pub replication_tls_key: Option<PathBuf>,

    /// Connections for replication at a time; further ones are refused, and libpq tries the next host
    #[arg(
        long,
        env = "DORMOUSE_SAFEKEEPER_REPLICATION_CONNECTIONS",
        default_value_t = REPLICATION_CONNECTIONS,
        value_name = "COUNT",
        help_heading = "Replication"
    )]
    pub replication_connections: usize,

    /// Seconds of silence after which a connection for replication is closed, as Postgres's wal_sender_timeout
    #[arg(
        long,
        env = "DORMOUSE_SAFEKEEPER_REPLICATION_TIMEOUT_SECONDS",
        default_value_t = REPLICATION_TIMEOUT_SECONDS,
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(1..),
        help_heading = "Replication"
    )]
    pub replication_timeout_seconds: u64,
}

const REPLICATION_CONNECTIONS: usize = 200;
const REPLICATION_TIMEOUT_SECONDS: u64 = 60;

impl Default for ReplicationConfig {
    fn default() -> ReplicationConfig {
        ReplicationConfig {
            replication_listen: None,
            replication_address: None,
            replication_tls_cert: None,
            replication_tls_key: None,
            replication_connections: REPLICATION_CONNECTIONS,
            replication_timeout_seconds: REPLICATION_TIMEOUT_SECONDS,
        }
    }
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
            replication: ReplicationConfig::default(),
        }
    }
}

fn parse_node(text: &str) -> Result<NodeId, std::num::ParseIntError> {
    text.parse().map(NodeId)
}
