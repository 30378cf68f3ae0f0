//! How clients reach endpoints: host names and connection URIs.

use control_plane_api::v2::{ConnectionParameters, ConnectionUri};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use types::EndpointId;

/// All but what RFC 3986 calls unreserved.
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
const POSTGRES_PORT: u16 = 5432;

/// Where the proxy is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyAddress {
    /// Endpoints are `<endpoint>.<domain>`. Without one they are told by `options=endpoint%3D<id>`, which needs no DNS.
    pub domain: Option<String>,
    /// The proxy's own host, for installations without a domain.
    pub host: String,
    /// Its port.
    pub port: u16,
}

/// Who connects to what.
#[derive(Clone, Copy)]
pub struct Login<'a> {
    /// Endpoint.
    pub endpoint: &'a EndpointId,
    /// Role.
    pub role: &'a str,
    /// Never logged.
    pub password: &'a str,
    /// Database.
    pub database: &'a str,
}

impl ProxyAddress {
    /// The proxy's host without an endpoint.
    pub fn proxy_host(&self) -> &str {
        self.domain.as_deref().unwrap_or(&self.host)
    }

    /// An endpoint's host.
    pub fn host(&self, endpoint: &EndpointId, pooled: bool) -> String {
        match &self.domain {
            Some(domain) => format!("{}.{domain}", name(endpoint, pooled)),
            None => self.host.clone(),
        }
    }

    /// A URI with the password in it.
    pub fn uri(&self, login: Login<'_>, pooled: bool) -> String {
        let encode = |text: &str| utf8_percent_encode(text, ENCODED).to_string();
        let (role, password) = (encode(login.role), encode(login.password));
        let host = self.host(login.endpoint, pooled);
        let port = if self.port == POSTGRES_PORT { String::new() } else { format!(":{}", self.port) };
        let database = encode(login.database);
        let options = match &self.domain {
            Some(_) => String::new(),
            None => format!("&options=endpoint%3D{}", name(login.endpoint, pooled)),
        };
        format!("postgresql://{role}:{password}@{host}{port}/{database}?sslmode=require{options}")
    }

    /// A URI and its parts, as in Neon's answers.
    pub fn connection(&self, login: Login<'_>) -> ConnectionUri {
        ConnectionUri {
            connection_uri: self.uri(login, false),
            connection_parameters: ConnectionParameters {
                database: login.database.to_owned(),
                password: login.password.to_owned(),
                role: login.role.to_owned(),
                host: self.host(login.endpoint, false),
                pooler_host: self.host(login.endpoint, true),
            },
        }
    }
}

fn name(endpoint: &EndpointId, pooled: bool) -> String {
    if pooled { format!("{endpoint}-pooler") } else { endpoint.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_route_by_host_or_by_options() {
        let endpoint = EndpointId::new("ep-a-1").expect("id");
        let login = Login { endpoint: &endpoint, role: "o@x", password: "p/w", database: "d b" };
        let local = ProxyAddress { domain: None, host: "localhost".into(), port: 5432 };
        assert_eq!(
            local.uri(login, false),
            "postgresql://o%40x:p%2Fw@localhost/d%20b?sslmode=require&options=endpoint%3Dep-a-1"
        );
        let named = ProxyAddress { domain: Some("db.example.com".into()), host: "localhost".into(), port: 6432 };
        assert_eq!(
            named.uri(login, true),
            "postgresql://o%40x:p%2Fw@ep-a-1-pooler.db.example.com:6432/d%20b?sslmode=require"
        );
    }
}
