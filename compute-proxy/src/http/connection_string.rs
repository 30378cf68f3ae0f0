//! The header `Neon-Connection-String`, taken apart. Pure.

use std::fmt;

use percent_encoding::percent_decode_str;
use url::Url;

use crate::handshake::Startup;

/// Bytes of a connection string.
const MAX_BYTES: usize = 8 * 1024;

/// Parameters of the string that are start-up parameters of Postgres. Others are for clients (`sslmode`) and do nothing here.
const STARTUP_PARAMETERS: [&str; 4] =
    ["application_name", "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"];

/// `postgresql://<user>:<password>@<host>/<database>?<parameters>`.
#[derive(Clone, PartialEq, Eq)]
pub struct ConnectionString {
    /// The host, which names the endpoint unless `options` does.
    pub host: String,
    /// The password, decoded; empty when there is none.
    pub password: String,
    /// The parameter `cache`, written as the header `Dormouse-Cache`: for clients that cannot send headers of their own.
    pub cache: Option<String>,
    /// Role, database, `options` and further start-up parameters.
    pub startup: Startup,
}

impl fmt::Debug for ConnectionString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionString")
            .field("host", &self.host)
            .field("startup", &self.startup)
            .finish_non_exhaustive()
    }
}

impl ConnectionString {
    /// Parses it. The error says what is wrong, without the string itself: it holds a password.
    pub fn parse(text: &str) -> Result<Self, ConnectionStringError> {
        if text.len() > MAX_BYTES {
            return Err(ConnectionStringError::TooLong);
        }
        let url = Url::parse(text).map_err(|_| ConnectionStringError::NotAUrl)?;
        if !matches!(url.scheme(), "postgres" | "postgresql") {
            return Err(ConnectionStringError::Scheme);
        }
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or(ConnectionStringError::NoHost)?;
        let host = decoded(host)?;
        if host.contains(',') {
            return Err(ConnectionStringError::ManyHosts);
        }
        let user = decoded(url.username())?;
        if user.is_empty() {
            return Err(ConnectionStringError::NoUser);
        }
        let database = Some(decoded(url.path().trim_start_matches('/'))?).filter(|name| !name.is_empty());
        let mut startup = Startup {
            minor_version: 0,
            database: database.unwrap_or_else(|| user.clone()),
            user,
            options: None,
            parameters: vec![("client_encoding".to_owned(), "UTF8".to_owned())],
            unknown_extensions: Vec::new(),
        };
        let mut cache = None;
        for (name, value) in url.query_pairs() {
            if value.contains('\0') {
                return Err(ConnectionStringError::Zero);
            }
            match name.as_ref() {
                "options" => startup.options = Some(value.into_owned()),
                "cache" => cache = Some(value.into_owned()),
                name if STARTUP_PARAMETERS.contains(&name) => {
                    startup.parameters.retain(|(known, _)| known != name);
                    startup.parameters.push((name.to_owned(), value.into_owned()));
                }
                _ => {}
            }
        }
        Ok(Self { host, password: decoded(url.password().unwrap_or(""))?, cache, startup })
    }
}

fn decoded(text: &str) -> Result<String, ConnectionStringError> {
    let text = percent_decode_str(text).decode_utf8().map_err(|_| ConnectionStringError::Encoding)?;
    if text.contains('\0') { Err(ConnectionStringError::Zero) } else { Ok(text.into_owned()) }
}

/// What is wrong with a connection string. The texts are for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionStringError {
    /// Longer than it may be.
    #[error("the connection string is longer than 8 KiB")]
    TooLong,
    /// It cannot be parsed.
    #[error("the connection string is not a valid URL")]
    NotAUrl,
    /// Another kind of URL.
    #[error("the connection string does not begin with postgres:// or postgresql://")]
    Scheme,
    /// No host.
    #[error("the connection string names no host")]
    NoHost,
    /// A list of hosts, as libpq takes it.
    #[error("the connection string names more than one host")]
    ManyHosts,
    /// No role.
    #[error("the connection string names no user")]
    NoUser,
    /// Escapes that are not UTF-8.
    #[error("the connection string is not UTF-8 text")]
    Encoding,
    /// Postgres's strings end at a zero.
    #[error("the connection string contains a zero byte")]
    Zero,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_string_is_taken_apart() {
        let text = "postgresql://al%40ice:p%3Aw%20@ep-a-pooler.localhost:5432/my%20db?sslmode=require\
                    &options=endpoint%3Dep-a%20-c%20geqo%3Doff&application_name=x";
        let parsed = ConnectionString::parse(text).expect("good");
        assert_eq!((parsed.host.as_str(), parsed.password.as_str()), ("ep-a-pooler.localhost", "p:w "));
        let Startup { user, database, options, parameters, .. } = parsed.startup;
        assert_eq!((user.as_str(), database.as_str()), ("al@ice", "my db"));
        assert_eq!(options.as_deref(), Some("endpoint=ep-a -c geqo=off"));
        let parameters: Vec<_> = parameters.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(parameters, [("client_encoding", "UTF8"), ("application_name", "x")]);
    }

    #[test]
    fn the_database_defaults_to_the_user() {
        let parsed = ConnectionString::parse("postgres://alice@ep-a.localhost").expect("good");
        assert_eq!((parsed.startup.database.as_str(), parsed.password.as_str()), ("alice", ""));
    }

    #[test]
    fn what_is_wrong_is_said() {
        use ConnectionStringError::*;
        for (text, error) in [
            ("", NotAUrl),
            ("ep-a.localhost", NotAUrl),
            ("mysql://a:b@h/d", Scheme),
            ("postgres://alice:x@/d", NotAUrl),
            ("postgres:///d", NoHost),
            ("postgres://h/d", NoUser),
            ("postgres://a:b@h1,h2/d", ManyHosts),
            ("postgres://a:b@h1:5432,h2:5432/d", NotAUrl),
            ("postgres://a:%ff@h/d", Encoding),
            ("postgres://a:b@h/d%00", Zero),
            ("postgres://a:b@h/d?options=%00", Zero),
        ] {
            assert_eq!(ConnectionString::parse(text).expect_err(text), error, "{text}");
        }
        assert_eq!(ConnectionString::parse(&"x".repeat(MAX_BYTES + 1)), Err(TooLong));
    }

    #[test]
    fn a_password_is_not_shown() {
        let parsed = ConnectionString::parse("postgres://alice:secret@h.localhost/d").expect("good");
        assert!(!format!("{parsed:?}").contains("secret"));
    }

    proptest! {
        #[test]
        fn anything_is_taken_apart_without_panic(text in "postgres://\\PC{0,60}", other in "\\PC{0,60}") {
            let _ = ConnectionString::parse(&text);
            let _ = ConnectionString::parse(&other);
        }
    }
}
