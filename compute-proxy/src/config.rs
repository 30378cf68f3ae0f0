//! Settings of the proxy, as command line arguments.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use crate::{
    acme::{AcmeConfig, AcmeConfigError, Wanted},
    endpoint_name::PoolMode,
};

/// Settings of the proxy. No `Debug`: it holds a token.
#[derive(Clone, clap::Args)]
pub struct Config {
    /// Address on which clients connect.
    #[arg(long, default_value = "127.0.0.1:5432", env = "DORMOUSE_PROXY_LISTEN", value_name = "ADDRESS")]
    pub listen: SocketAddr,

    /// Address for SQL over HTTPS and WebSocket. Without TLS only with --allow-cleartext.
    #[arg(long, default_value = "127.0.0.1:5443", env = "DORMOUSE_PROXY_HTTP_LISTEN", value_name = "ADDRESS")]
    pub http_listen: SocketAddr,

    /// URL of the control plane.
    #[arg(long, default_value = "http://127.0.0.1:9898", env = "DORMOUSE_CONTROL_PLANE", value_name = "URL")]
    pub control_plane: reqwest::Url,

    /// Token of scope "service" with which the proxy calls the control plane.
    #[arg(long, env = "DORMOUSE_TOKEN", hide_env_values = true, value_name = "JWT")]
    pub token: String,

    /// Domain below which endpoints are reached as <endpoint>.<domain>; <endpoint>.localhost always works.
    #[arg(long, env = "DORMOUSE_DOMAIN")]
    pub domain: Option<String>,

    /// PEM file with the certificate chain for TLS.
    #[arg(long, requires = "tls_key", conflicts_with = "tls_dir", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,

    /// PEM file with the private key for TLS.
    #[arg(long, requires = "tls_cert", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,

    /// Directory of a self-made certificate: made at the first start, used again later. Clients that want to verify
    /// the proxy trust its ca.pem. Without this and --tls-cert each start makes a certificate of its own. With --acme the
    /// certificates that come by it are kept there.
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,

    /// Every connection begins with a PROXY protocol v2 header, in which a load balancer tells the client's address. Only
    /// for a proxy that clients cannot reach past the balancer: they could claim any address.
    #[arg(long)]
    pub proxy_protocol: bool,

    /// Lets clients without TLS name their endpoint by a password prefix, and use HTTP and WebSocket, which sends the
    /// password in clear text.
    #[arg(long)]
    pub allow_cleartext: bool,

    /// Most sessions at a time; further ones get SQLSTATE 53300.
    #[arg(long, default_value_t = 10_000, value_name = "COUNT")]
    pub max_connections: usize,

    /// How long a client may take to log in.
    #[arg(long, default_value = "30s", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub handshake_timeout: Duration,

    /// How long a client waits for its endpoint to wake; longer than the control plane's own limit, which can say more.
    #[arg(long, default_value = "70s", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub wake_timeout: Duration,

    /// How long a role's password verifier is used before the control plane is asked again. At 0s it is asked at each
    /// login, so that a new password counts at once. While it is slow or down, verifiers up to ten minutes old are used.
    #[arg(long, default_value = "0s", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub auth_cache: Duration,

    /// The same for logins over HTTP, of which each request is one. A password that was changed may be used so much longer.
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub http_auth_cache: Duration,

    /// How long the keys of an issuer of JSON Web Tokens are used before its JWKS URL is asked again. While that gives no
    /// answer they are used for an hour.
    #[arg(long, default_value = "5m", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub jwks_max_age: Duration,

    /// How long after asking a JWKS URL it is not asked again for a token whose key is unknown, or after a failure.
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub jwks_min_interval: Duration,

    /// Bytes that the body of an HTTP request may have.
    #[arg(long, default_value_t = 10 * 1024 * 1024, value_name = "BYTES")]
    pub http_request_max_bytes: usize,

    /// Bytes that the answer to an HTTP request may have.
    #[arg(long, default_value_t = 10 * 1024 * 1024, value_name = "BYTES")]
    pub http_response_max_bytes: usize,

    /// Bytes that all HTTP requests and their answers may take at a time; more of them get SQLSTATE 53200.
    #[arg(long, default_value_t = 512 * 1024 * 1024, value_name = "BYTES")]
    pub http_memory_bytes: usize,

    /// Bytes of answers to HTTP requests that are kept, for requests and endpoints that ask for it. 0: none.
    #[arg(long, default_value_t = 64 * 1024 * 1024, value_name = "BYTES")]
    pub http_cache_bytes: u64,

    /// How clients of -pooler hosts are served that don't say pool_mode=transaction or pool_mode=session in their options.
    #[arg(long, default_value = "transaction", value_name = "MODE")]
    pub pool_mode: PoolMode,

    /// Server connections for each database and role of an endpoint. By default, and at most, nine tenths of what the
    /// compute's max_connections leaves, which all pools of the endpoint share.
    #[arg(long, env = "DORMOUSE_POOL_SIZE", value_name = "COUNT")]
    pub pool_size: Option<usize>,

    /// How long a pooled client waits for a server connection.
    #[arg(long, default_value = "120s", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub pool_queue_timeout: Duration,

    /// How long an unused server connection is kept open. It does not keep the compute awake.
    #[arg(long, default_value = "10m", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub pool_idle_timeout: Duration,

    /// How long sessions may go on when the proxy stops.
    #[arg(long, default_value = "5s", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub drain_timeout: Duration,
    /// Certificates from an ACME server.
    #[command(flatten)]
    pub acme: AcmeConfig,
}

impl Config {
    /// The certificate that is to come by ACME, if one is.
    pub(crate) fn wanted_by_acme(&self) -> Result<Option<Wanted>, AcmeConfigError> {
        self.acme.wanted(self.domain.as_deref(), self.tls_dir.as_deref(), self.tls_cert.is_some())
    }
}
