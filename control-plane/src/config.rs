//! The control plane's settings: flags, with environment variables as fallbacks.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use types::{Member, NodeId};

/// Settings of `dormouse control-plane`.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Where the REST API and the other services' calls are served.
    #[arg(long, default_value = "127.0.0.1:9898", env = "DORMOUSE_API_LISTEN")]
    pub listen: SocketAddr,
    /// Holds the metadata (control-plane.db), keys, the admin's API key (admin.key) and logs.
    #[arg(long, env = "DORMOUSE_DATA_DIR")]
    pub data_dir: PathBuf,
    /// The pageserver, as host:port.
    #[arg(long, default_value = "127.0.0.1:9810", env = "DORMOUSE_PAGESERVER")]
    pub pageserver: String,
    /// The safekeepers at the first start, as <node>=<host:port>, separated by commas; and where those that are known are reached
    /// now. Others are added with `dormouse safekeepers`.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1=127.0.0.1:9801,2=127.0.0.1:9802,3=127.0.0.1:9803",
        env = "DORMOUSE_SAFEKEEPERS"
    )]
    pub safekeepers: Vec<SafekeeperArg>,
    /// Endpoints are reached as <endpoint>.<domain>. Without a domain, connection strings name the endpoint in `options`.
    #[arg(long, env = "DORMOUSE_DOMAIN")]
    pub domain: Option<String>,
    /// Host of the proxy in connection strings, when there is no domain.
    #[arg(long, default_value = "localhost", env = "DORMOUSE_PROXY_HOST")]
    pub proxy_host: String,
    /// Port of the proxy in connection strings.
    #[arg(long, default_value_t = 5432, env = "DORMOUSE_PG_PORT")]
    pub proxy_port: u16,
    /// Where computes keep their expendable files; a short path, best on tmpfs [default: /dev/shm/dormouse-<uid>].
    #[arg(long, env = "DORMOUSE_RUNTIME_DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// The directory of PostgreSQL 15's programs [default: Debian's, or what pg_config says].
    #[arg(long, env = "DORMOUSE_POSTGRES_BIN_DIR")]
    pub postgres_bin_dir: Option<PathBuf>,
    /// The user that Postgres runs as when Dormouse is root [default: postgres if there is one, else nobody].
    #[arg(long, env = "DORMOUSE_POSTGRES_USER")]
    pub postgres_user: Option<String>,
    /// The shim to load into Postgres [default: the one inside this program].
    #[arg(long, env = "DORMOUSE_SHIM_PATH")]
    pub shim_path: Option<PathBuf>,
    /// See [`PageCacheLimits`].
    #[command(flatten)]
    pub page_cache: PageCacheLimits,
    /// Longest wait for a compute to take connections, seconds.
    #[arg(long, default_value_t = 60)]
    pub wake_timeout_seconds: u64,
    /// How often history that is outside its project's window is let go, seconds.
    #[arg(long, default_value_t = 3600, env = "DORMOUSE_GC_INTERVAL_SECONDS")]
    pub gc_interval_seconds: u64,
    /// History that is kept in any case, seconds, so that reads which are under way find what they need.
    #[arg(long, default_value_t = 60, env = "DORMOUSE_GC_SLACK_SECONDS", hide = true)]
    pub gc_slack_seconds: u64,
    /// Put all computes to sleep when the control plane stops, instead of leaving them to the next one.
    #[arg(long)]
    pub stop_computes_at_exit: bool,
}

/// How much local disk a compute may use for pages.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct PageCacheLimits {
    /// Most clean pages that a compute keeps on local disk, MiB.
    #[arg(long, default_value_t = 1024, env = "DORMOUSE_PAGE_CACHE_MIB")]
    pub page_cache_mib: u64,
    /// Most evicted dirty pages that a compute keeps on local disk, MiB; over it statements fail with "disk full".
    #[arg(long, default_value_t = 8192, env = "DORMOUSE_KEPT_PAGES_MIB")]
    pub kept_pages_mib: u64,
    /// Most that the clean pages of sleeping computes take on local disk, all together, MiB: their next wake on this host is
    /// warm. The oldest make way. 0: nothing stays.
    #[arg(long, default_value_t = 4096, env = "DORMOUSE_SLEEPING_CACHES_MIB")]
    pub sleeping_caches_mib: u64,
}

impl Config {
    /// See [`Config::wake_timeout_seconds`].
    pub fn wake_timeout(&self) -> Duration {
        Duration::from_secs(self.wake_timeout_seconds)
    }

    /// Where the metadata is.
    pub fn database_path(&self) -> PathBuf {
        self.data_dir.join("control-plane.db")
    }

    /// Where computes' logs are.
    pub fn log_dir(&self) -> PathBuf {
        log_dir(&self.data_dir)
    }
}

/// Where the logs of a data directory are.
pub fn log_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("logs")
}

/// The file of a data directory that says where the API is, for the command line.
pub fn api_url_path(data_dir: &Path) -> PathBuf {
    data_dir.join("api.url")
}

/// A safekeeper on the command line: `1=127.0.0.1:9801`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SafekeeperArg(pub Member);

impl FromStr for SafekeeperArg {
    type Err = String;
    fn from_str(text: &str) -> Result<SafekeeperArg, String> {
        let error = || format!("expected <node>=<host:port> such as 1=127.0.0.1:9801, got {text:?}");
        let (node, address) = text.split_once('=').ok_or_else(error)?;
        let node: u64 = node.trim().parse().map_err(|_| error())?;
        let good = address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
        if !good {
            return Err(error());
        }
        Ok(SafekeeperArg(Member { node: NodeId(node), address: address.to_owned() }))
    }
}

impl std::fmt::Display for SafekeeperArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}", self.0.node, self.0.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn safekeepers_are_parsed() {
        let parsed: SafekeeperArg = "2=host:7001".parse().expect("good");
        assert_eq!((parsed.0.node, parsed.0.address.as_str()), (NodeId(2), "host:7001"));
        for bad in ["host:7001", "x=host:1", "1=host", "1=:7001", "1=host:99999"] {
            assert!(bad.parse::<SafekeeperArg>().is_err(), "{bad}");
        }
    }
}
