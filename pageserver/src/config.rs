//! The pageserver's settings.

use std::{net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use types::{Generation, NodeId};

use crate::{branch::Tuning, remote::ObjectStoreConfig};

/// Settings of `dormouse pageserver`.
#[derive(Clone, clap::Args)]
pub struct Config {
    /// Where to listen for compute agents and the control plane.
    #[arg(long, env = "DORMOUSE_PAGESERVER_LISTEN", default_value = "127.0.0.1:7001", value_name = "ADDRESS")]
    pub listen: SocketAddr,

    /// The object store that holds all data: a directory (/path or file:///path) or s3://bucket/prefix with AWS_* variables.
    #[arg(long, env = "DORMOUSE_OBJECT_STORE", value_name = "URL")]
    pub object_store: ObjectStoreConfig,

    /// Directory for local copies of layers. Only a cache; not used when the object store is a directory itself.
    #[arg(long, env = "DORMOUSE_PAGESERVER_DATA_DIR", value_name = "DIR")]
    pub data_dir: PathBuf,

    /// The safekeepers, as number=host:port, separated by commas.
    #[arg(long, env = "DORMOUSE_SAFEKEEPERS", value_delimiter = ',', value_name = "N=ADDRESS")]
    pub safekeepers: Vec<SafekeeperAddress>,

    /// PEM file with the public key that checks the tokens of those who connect.
    #[arg(long, env = "DORMOUSE_TOKEN_PUBLIC_KEY", value_name = "FILE")]
    pub token_public_key: PathBuf,

    /// The token that this service shows to safekeepers and the control plane.
    #[arg(long, env = "DORMOUSE_TOKEN", hide_env_values = true, default_value = "")]
    pub token: String,

    /// The control plane, which gives out the generation to write under: http://host:port.
    #[arg(long, env = "DORMOUSE_CONTROL_PLANE", value_name = "URL", required_unless_present = "generation")]
    pub control_plane: Option<String>,

    /// This pageserver's number in the installation.
    #[arg(long, env = "DORMOUSE_PAGESERVER_ID", default_value = "1", value_parser = parse_node, value_name = "N")]
    pub id: NodeId,

    /// Where others reach this pageserver, as host:port [default: the address it listens on].
    #[arg(long, env = "DORMOUSE_PAGESERVER_ADVERTISE", value_name = "ADDRESS")]
    pub advertise: Option<String>,

    /// Write under this generation instead of asking the control plane. Must be higher at each start.
    #[arg(long, value_parser = parse_generation, value_name = "N")]
    pub generation: Option<Generation>,

    /// Write WAL out of memory when a branch has gathered this many MiB.
    #[arg(long, default_value_t = 128, value_name = "MIB")]
    pub checkpoint_distance_mib: u32,

    /// Write WAL out of memory when all branches together have gathered this many MiB.
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    pub ingest_memory_mib: u32,

    /// Write WAL out of memory when a branch has been quiet for so many seconds.
    #[arg(long, default_value_t = 5, value_name = "SECONDS")]
    pub idle_flush: u32,

    /// Drop a branch from memory when nobody has asked about it for so many seconds.
    #[arg(long, default_value_t = 300, env = "DORMOUSE_IDLE_DETACH_SECONDS", value_name = "SECONDS")]
    pub idle_detach: u32,

    /// The most WAL, in MiB for each branch, that a replication slot may keep on the safekeepers. A slot that needs more is lost. At
    /// most 2048: a compute fetches no more when it wakes.
    #[arg(long, default_value_t = 2048, value_name = "MIB", value_parser = clap::value_parser!(u32).range(..=2048))]
    pub max_slot_wal_mib: u32,

    /// Memory for pages as they were last made, in MiB.
    #[arg(long, default_value_t = 128, value_name = "MIB")]
    pub page_cache_mib: u32,

    /// Memory for blocks of layers, in MiB.
    #[arg(long, default_value_t = 128, value_name = "MIB")]
    pub block_cache_mib: u32,

    /// Disk space for local copies of layers, in MiB.
    #[arg(long, default_value_t = 10_240, value_name = "MIB")]
    pub disk_cache_mib: u32,
}

/// The token is left out.
impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config")
            .field("listen", &self.listen)
            .field("object_store", &self.object_store)
            .field("data_dir", &self.data_dir)
            .field("safekeepers", &self.safekeepers)
            .field("control_plane", &self.control_plane)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

impl Config {
    /// With defaults for everything that has one. Set `control_plane` or `generation` besides.
    pub fn new(object_store: ObjectStoreConfig, data_dir: PathBuf, token_public_key: PathBuf) -> Config {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 7001)),
            object_store,
            data_dir,
            safekeepers: Vec::new(),
            token_public_key,
            token: String::new(),
            control_plane: None,
            id: NodeId(1),
            advertise: None,
            generation: None,
            checkpoint_distance_mib: 128,
            ingest_memory_mib: 1024,
            idle_flush: 5,
            idle_detach: 300,
            max_slot_wal_mib: 2048,
            page_cache_mib: 128,
            block_cache_mib: 128,
            disk_cache_mib: 10_240,
        }
    }

    /// The sizes and times that follow.
    pub fn tuning(&self) -> Tuning {
        Tuning {
            checkpoint_distance_bytes: (self.checkpoint_distance_mib.max(1) as usize) << 20,
            ingest_memory_bytes: (self.ingest_memory_mib.max(1) as usize) << 20,
            idle_flush: Duration::from_secs(u64::from(self.idle_flush)),
            idle_detach: Duration::from_secs(u64::from(self.idle_detach)),
            max_slot_wal_bytes: u64::from(self.max_slot_wal_mib) << 20,
            ..Tuning::default()
        }
    }
}

/// A safekeeper's number and address, `1=127.0.0.1:7101`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SafekeeperAddress {
    /// Its number.
    pub id: NodeId,
    /// Its `host:port`.
    pub address: String,
}

impl FromStr for SafekeeperAddress {
    type Err = String;
    fn from_str(text: &str) -> Result<SafekeeperAddress, String> {
        let bad = || format!("expected number=host:port, such as 1=127.0.0.1:7101: {text:?}");
        let (id, address) = text.split_once('=').ok_or_else(bad)?;
        let (host, port) = address.rsplit_once(':').ok_or_else(bad)?;
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err(bad());
        }
        Ok(SafekeeperAddress { id: parse_node(id).map_err(|_| bad())?, address: address.to_owned() })
    }
}

fn parse_node(text: &str) -> Result<NodeId, std::num::ParseIntError> {
    text.parse().map(NodeId)
}

fn parse_generation(text: &str) -> Result<Generation, std::num::ParseIntError> {
    text.parse().map(Generation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn safekeeper_addresses_are_read() {
        let good = SafekeeperAddress { id: NodeId(2), address: "host:7102".to_owned() };
        assert_eq!("2=host:7102".parse(), Ok(good));
        for bad in ["", "host:7102", "x=host:1", "1=host", "1=:5", "1=host:port"] {
            assert!(bad.parse::<SafekeeperAddress>().is_err(), "{bad:?}");
        }
    }
}
