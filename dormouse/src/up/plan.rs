//! Which processes an installation consists of: their arguments, ports and order. Pure but for the check of the ports.

use std::{
    ffi::OsString,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use anyhow::Context;
use wire::Scope;

use super::{Installation, UpArguments, checks};
use crate::logging::LogFormat;

/// The services' token; a new one is made at each start of the installation.
const SERVICE_TOKEN_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Where everything listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ports {
    /// The proxy, for Postgres clients.
    pub postgres: SocketAddr,
    /// The proxy, for SQL over HTTPS and WebSocket.
    pub http: SocketAddr,
    /// The control plane.
    pub api: SocketAddr,
    /// The pageserver.
    pub pageserver: SocketAddr,
    /// The safekeepers, the first being number 1.
    pub safekeepers: Vec<SocketAddr>,
    /// Where others reach them.
    safekeepers_reached_at: Vec<SocketAddr>,
    /// Where they give out WAL for replication.
    pub replication: Vec<SocketAddr>,
}

impl Ports {
    /// From the command line.
    pub fn new(arguments: &UpArguments) -> anyhow::Result<Ports> {
        let internal = |offset: u16| {
            let port = arguments.base_port.checked_add(offset).context("--base-port is too large")?;
            anyhow::Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
        };
        let safekeepers: Vec<SocketAddr> = (1..=arguments.safekeepers).map(internal).collect::<Result<_, _>>()?;
        let replication = (1..=arguments.safekeepers).map(|number| {
            let internal = internal(arguments.safekeepers + number)?;
            let port = match arguments.replication_port {
                Some(first) => first.checked_add(number - 1).context("--replication-port is too large")?,
                None => internal.port(),
            };
            anyhow::Ok(SocketAddr::new(arguments.replication_host, port))
        });
        let replication: Vec<SocketAddr> = replication.collect::<Result<_, _>>()?;
        let elsewhere = &arguments.safekeepers_reached_at;
        anyhow::ensure!(
            elsewhere.is_empty() || elsewhere.len() == safekeepers.len(),
            "--safekeepers-reached-at has as many addresses as there are safekeepers"
        );
        let safekeepers_reached_at = if elsewhere.is_empty() { safekeepers.clone() } else { elsewhere.clone() };
        Ok(Ports {
            postgres: SocketAddr::new(arguments.host, arguments.pg_port),
            http: SocketAddr::new(arguments.host, arguments.http_port),
            api: SocketAddr::new(arguments.host, arguments.api_port),
            pageserver: internal(0)?,
            safekeepers,
            safekeepers_reached_at,
            replication,
        })
    }

    /// Fails when one is taken, naming the flag to change.
    pub fn check(&self) -> anyhow::Result<()> {
        checks::port_is_free(self.postgres, "Postgres", "--pg-port")?;
        checks::port_is_free(self.http, "SQL over HTTPS", "--http-port")?;
        checks::port_is_free(self.api, "REST API", "--api-port")?;
        checks::port_is_free(self.pageserver, "pageserver", "--base-port")?;
        for address in &self.safekeepers {
            checks::port_is_free(*address, "safekeeper", "--base-port")?;
        }
        for address in &self.replication {
            checks::port_is_free(*address, "replication", "--replication-port")?;
        }
        Ok(())
    }

    fn safekeeper_list(&self) -> String {
        let named =
            self.safekeepers_reached_at.iter().enumerate().map(|(index, address)| format!("{}={address}", index + 1));
        named.collect::<Vec<_>>().join(",")
    }
}

/// A process of this program.
pub struct Service {
    /// Such as `safekeeper-1`; also its log's name.
    pub name: String,
    /// Subcommand and flags.
    pub arguments: Vec<OsString>,
    /// Environment, for what must not be seen in a list of processes.
    pub environment: Vec<(&'static str, String)>,
    /// Takes connections when it is ready.
    pub address: SocketAddr,
    /// How long it may take to stop before it is killed.
    pub stop_timeout: Duration,
    /// Services of a lower number are stopped before those of a higher one.
    pub stop_rank: u8,
}

/// All services in the order in which they are started. The control plane comes before the pageserver, which asks it for a
/// generation, and stops before it: its computes still read pages.
pub(crate) fn services(installation: &Installation) -> anyhow::Result<Vec<Service>> {
    let token = installation.keys.signer.sign(Scope::Service, SERVICE_TOKEN_LIFETIME)?;
    let mut services: Vec<Service> =
        (0..installation.ports.safekeepers.len()).map(|index| safekeeper(installation, index)).collect();
    services.push(control_plane(installation));
    services.push(pageserver(installation, &token));
    services.push(proxy(installation, &token));
    Ok(services)
}

/// Subcommand and flags of a service.
struct Flags(Vec<OsString>);

impl Flags {
    fn new(installation: &Installation, subcommand: &str) -> Flags {
        let format = match installation.log_format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        };
        Flags([subcommand, "--log-format", format].map(OsString::from).to_vec())
    }

    fn with(mut self, flag: &str, value: impl Into<OsString>) -> Flags {
        self.0.extend([flag.into(), value.into()]);
        self
    }

    fn with_some(self, flag: &str, value: Option<impl Into<OsString>>) -> Flags {
        match value {
            Some(value) => self.with(flag, value),
            None => self,
        }
    }
}

fn safekeeper(installation: &Installation, index: usize) -> Service {
    let (number, address) = (index + 1, installation.ports.safekeepers[index]);
    let name = format!("safekeeper-{number}");
    let flags = Flags::new(installation, "safekeeper")
        .with("--id", number.to_string())
        .with("--listen", address.to_string())
        .with("--data-dir", installation.data_dir.join(&name))
        .with("--object-store", &installation.object_store)
        .with("--token-public-key", &installation.keys.paths.token_public)
        .with("--replication-listen", installation.ports.replication[index].to_string())
        .with_some("--replication-tls-cert", installation.arguments.replication_tls_cert.as_ref())
        .with_some("--replication-tls-key", installation.arguments.replication_tls_key.as_ref())
        .with_some("--replication-address", replication_address(installation, index));
    Service {
        name,
        arguments: flags.0,
        environment: Vec::new(),
        address,
        stop_timeout: Duration::from_secs(10),
        stop_rank: 3,
    }
}

/// Where standbys reach a safekeeper, if it can't know that itself.
fn replication_address(installation: &Installation, index: usize) -> Option<String> {
    let (host, port) =
        (installation.arguments.replication_reached_at.as_ref()?, installation.ports.replication[index].port());
    Some(format!("{host}:{port}"))
}

fn pageserver(installation: &Installation, token: &str) -> Service {
    let ports = &installation.ports;
    let flags = Flags::new(installation, "pageserver")
        .with("--listen", ports.pageserver.to_string())
        .with("--data-dir", installation.data_dir.join("pageserver"))
        .with("--object-store", &installation.object_store)
        .with("--safekeepers", ports.safekeeper_list())
        .with("--control-plane", format!("http://{}", local(ports.api)))
        .with("--token-public-key", &installation.keys.paths.token_public);
    Service {
        name: "pageserver".into(),
        arguments: flags.0,
        environment: vec![("DORMOUSE_TOKEN", token.to_owned())],
        address: ports.pageserver,
        stop_timeout: Duration::from_secs(60),
        stop_rank: 2,
    }
}

fn control_plane(installation: &Installation) -> Service {
    let (ports, arguments) = (&installation.ports, &installation.arguments);
    let host = match arguments.host {
        host if host.is_unspecified() || host.is_loopback() => "localhost".to_owned(),
        IpAddr::V4(host) => host.to_string(),
        IpAddr::V6(host) => format!("[{host}]"),
    };
    let mut flags = Flags::new(installation, "control-plane")
        .with("--listen", ports.api.to_string())
        .with("--data-dir", &installation.data_dir)
        .with("--pageserver", ports.pageserver.to_string())
        .with("--safekeepers", ports.safekeeper_list())
        .with("--proxy-host", host)
        .with("--proxy-port", ports.postgres.port().to_string())
        .with("--postgres-bin-dir", &installation.postgres_bin_dir)
        .with("--page-cache-mib", arguments.page_cache.page_cache_mib.to_string())
        .with("--kept-pages-mib", arguments.page_cache.kept_pages_mib.to_string())
        .with("--sleeping-caches-mib", arguments.page_cache.sleeping_caches_mib.to_string())
        .with_some("--postgres-user", installation.postgres_user.as_ref())
        .with_some("--runtime-dir", arguments.runtime_dir.as_ref())
        .with_some("--domain", arguments.domain.as_ref());
    flags.0.push("--stop-computes-at-exit".into());
    Service {
        name: "control-plane".into(),
        arguments: flags.0,
        environment: Vec::new(),
        address: ports.api,
        stop_timeout: Duration::from_secs(60),
        stop_rank: 1,
    }
}

fn proxy(installation: &Installation, token: &str) -> Service {
    let ports = &installation.ports;
    let (acme, secrets) = installation.arguments.acme.flags();
    let mut flags = Flags::new(installation, "proxy")
        .with("--listen", ports.postgres.to_string())
        .with("--http-listen", ports.http.to_string())
        .with("--control-plane", format!("http://{}", local(ports.api)))
        .with("--tls-dir", installation.data_dir.join("tls"))
        .with_some("--domain", installation.arguments.domain.as_ref());
    for (flag, value) in acme {
        flags = flags.with(flag, value);
    }
    Service {
        name: "proxy".into(),
        arguments: flags.0,
        environment: [("DORMOUSE_TOKEN", token.to_owned())].into_iter().chain(secrets).collect(),
        address: ports.postgres,
        stop_timeout: Duration::from_secs(10),
        stop_rank: 0,
    }
}

/// Where to connect for an address that is listened on.
pub fn local(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), address.port()),
        IpAddr::V6(ip) if ip.is_unspecified() => {
            SocketAddr::new(IpAddr::V6(std::net::Ipv6Addr::LOCALHOST), address.port())
        }
        IpAddr::V4(_) | IpAddr::V6(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcard_addresses_are_reached_on_loopback() {
        let address = |text: &str| text.parse::<SocketAddr>().expect("address");
        assert_eq!(local(address("0.0.0.0:1")), address("127.0.0.1:1"));
        assert_eq!(local(address("[::]:1")), address("[::1]:1"));
        assert_eq!(local(address("10.1.2.3:1")), address("10.1.2.3:1"));
    }
}
