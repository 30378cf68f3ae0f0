//! Which endpoint a client means: by its TLS server name, by `options`, or by a prefix of its password.

use std::net::IpAddr;

use types::EndpointId;

/// Host names and `options` that carry this suffix mean the same endpoint, reached through its pool.
const POOLER_SUFFIX: &str = "-pooler";

/// Names of the setting that names an endpoint in `options` and in a password prefix; `project` is the older one.
const SETTINGS: [&str; 2] = ["endpoint", "project"];

/// Name of the setting in `options` that says how a pooled client is served.
const POOL_MODE: &str = "pool_mode";

/// Finds the endpoint before the login.
///
/// A host below `domain` or `localhost` is taken at its word, and an `options` that says otherwise is an error. The first
/// label of any other host is only a guess (the proxy may stand behind a name of its own), so `options` overrules it.
pub fn choose(sni: Option<&str>, options: &Options, domain: Option<&str>) -> Result<Choice, EndpointNameError> {
    let from_host = match sni.and_then(|host| from_host(host, domain)) {
        Some((label, sure)) => Some((EndpointName::parse(&label)?, sure)),
        None => None,
    };
    match (from_host, options.endpoint.clone()) {
        (None, None) => Ok(Choice::AskPassword),
        (None | Some((_, false)), Some(name)) => Ok(Choice::Named(name)),
        (Some((name, _)), None) => Ok(Choice::Named(name)),
        (Some((host, true)), Some(option)) if host.endpoint == option.endpoint => {
            Ok(Choice::Named(EndpointName { pooled: host.pooled || option.pooled, ..host }))
        }
        (Some((host, true)), Some(option)) => {
            Err(EndpointNameError::Conflict { host: host.endpoint, option: option.endpoint })
        }
    }
}

/// How long a pooled client keeps a server connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PoolMode {
    /// For one transaction at a time.
    Transaction,
    /// Until it leaves.
    Session,
}

/// What [`choose`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// The endpoint is known before the login.
    Named(EndpointName),
    /// Nothing names an endpoint: only a password in clear text, with a prefix, still can.
    AskPassword,
}

/// An endpoint as a client names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointName {
    /// The endpoint, without `-pooler`.
    pub endpoint: EndpointId,
    /// True when the name ended with `-pooler`.
    pub pooled: bool,
}

impl EndpointName {
    /// Checks a name and takes off `-pooler`. Errors when the rest is not an endpoint id.
    pub fn parse(text: &str) -> Result<Self, EndpointNameError> {
        let lower = text.to_ascii_lowercase();
        let bare = lower.strip_suffix(POOLER_SUFFIX);
        let endpoint = EndpointId::new(bare.unwrap_or(&lower))
            .map_err(|_| EndpointNameError::Invalid { text: text.chars().take(80).collect() })?;
        Ok(Self { endpoint, pooled: bare.is_some() })
    }
}

/// Why no endpoint could be told. The texts are for the client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointNameError {
    /// Not an endpoint id.
    #[error("{text:?} is not a valid endpoint id")]
    Invalid {
        /// As sent, shortened.
        text: String,
    },
    /// The host and `options` disagree.
    #[error("the host name says endpoint \"{host}\", but the connection options say \"{option}\"")]
    Conflict {
        /// From the host name.
        host: EndpointId,
        /// From `options`.
        option: EndpointId,
    },
    /// No such way of pooling.
    #[error("pool_mode is transaction or session, not {text:?}")]
    PoolMode {
        /// As sent, shortened.
        text: String,
    },
    /// `options` names two endpoints.
    #[error("the connection options name two endpoints, \"{first}\" and \"{second}\"")]
    Twice {
        /// The one that came first.
        first: EndpointId,
        /// The other.
        second: EndpointId,
    },
}

/// The first label of `host`, and whether the host is known to be an endpoint's.
fn from_host(host: &str, domain: Option<&str>) -> Option<(String, bool)> {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    if host.parse::<IpAddr>().is_ok() {
        return None;
    }
    for known in domain.into_iter().chain(["localhost"]) {
        let known = known.trim_matches('.').to_ascii_lowercase();
        if host == known {
            return None;
        }
        let below = host.strip_suffix(&known).and_then(|rest| rest.strip_suffix('.'));
        if let Some(labels) = below.filter(|_| !known.is_empty()) {
            return first_label(labels).map(|label| (label, true));
        }
    }
    if host.contains('.') { first_label(&host).map(|label| (label, false)) } else { None }
}

fn first_label(host: &str) -> Option<String> {
    host.split('.').next().filter(|label| !label.is_empty()).map(str::to_owned)
}

/// The startup parameter `options`, taken apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// The endpoint that it names.
    pub endpoint: Option<EndpointName>,
    /// `pool_mode`, for pooled connections.
    pub pool_mode: Option<PoolMode>,
    /// Everything else, to be passed on as it was; `None` when nothing is left.
    pub rest: Option<String>,
}

impl Options {
    /// Takes apart `options` as Postgres does (`pg_split_opts`: words at white space, a backslash escapes).
    ///
    /// An endpoint is `endpoint=x`, `-c endpoint=x`, `-cendpoint=x` or `--endpoint=x`, with `project` as a synonym. The `=`
    /// may be `%3D`: people copy it from URLs into key/value connection strings, which libpq does not decode.
    pub fn parse(text: &str) -> Result<Self, EndpointNameError> {
        let mut options = Self::default();
        let mut rest: Vec<&str> = Vec::new();
        let mut words = split_words(text).into_iter().peekable();
        while let Some(word) = words.next() {
            let setting = if word == "-c" {
                words.peek().copied()
            } else {
                Some(word.strip_prefix("--").or_else(|| word.strip_prefix("-c")).unwrap_or(word))
            };
            let endpoint = setting.and_then(|setting| SETTINGS.iter().find_map(|name| value_of(setting, name)));
            let pool_mode = setting.and_then(|setting| value_of(setting, POOL_MODE));
            match (endpoint, pool_mode) {
                (None, None) => {
                    rest.push(word);
                    continue;
                }
                (Some(value), _) => options.name(EndpointName::parse(value)?)?,
                (None, Some(value)) => options.pool_mode = Some(PoolMode::parse(value)?),
            }
            if word == "-c" {
                words.next();
            }
        }
        options.rest = if rest.is_empty() { None } else { Some(rest.join(" ")) };
        Ok(options)
    }

    fn name(&mut self, name: EndpointName) -> Result<(), EndpointNameError> {
        match &self.endpoint {
            Some(first) if first.endpoint != name.endpoint => {
                Err(EndpointNameError::Twice { first: first.endpoint.clone(), second: name.endpoint })
            }
            Some(_) | None => {
                self.endpoint = Some(name);
                Ok(())
            }
        }
    }
}

/// Words with their escapes left in, so that they can be put together again.
fn split_words(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let (mut start, mut escaped) = (None, false);
    for (at, byte) in text.bytes().enumerate() {
        let space = byte.is_ascii_whitespace() || byte == 0x0b;
        if space && !escaped {
            words.extend(start.take().map(|from: usize| &text[from..at]));
        } else if start.is_none() {
            start = Some(at);
        }
        escaped = !escaped && byte == b'\\';
    }
    words.extend(start.map(|from| &text[from..]));
    words
}

/// The value in `<name>=<value>`.
fn value_of<'a>(word: &'a str, name: &str) -> Option<&'a str> {
    let value = word.strip_prefix(name)?;
    ["=", "%3D", "%3d"].iter().find_map(|equals| value.strip_prefix(equals))
}

impl PoolMode {
    fn parse(text: &str) -> Result<Self, EndpointNameError> {
        match text {
            "transaction" => Ok(Self::Transaction),
            "session" => Ok(Self::Session),
            other => Err(EndpointNameError::PoolMode { text: other.chars().take(80).collect() }),
        }
    }
}

/// Splits `endpoint=<id>;<password>` or `endpoint=<id>$<password>`; `None` when the password has no such prefix.
///
/// An id holds neither `;` nor `$`, so the password behind it may hold both.
pub fn split_password(password: &[u8]) -> Option<Result<(EndpointName, &[u8]), EndpointNameError>> {
    let value = SETTINGS.iter().find_map(|name| password.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
    let end = value.iter().position(|byte| matches!(byte, b';' | b'$'))?;
    let name = EndpointName::parse(&String::from_utf8_lossy(&value[..end]));
    Some(name.map(|name| (name, &value[end + 1..])))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn named(text: &str, pooled: bool) -> Choice {
        Choice::Named(EndpointName { endpoint: EndpointId::new(text).expect("id"), pooled })
    }

    fn choose_by(sni: Option<&str>, options: &str, domain: Option<&str>) -> Result<Choice, EndpointNameError> {
        choose(sni, &Options::parse(options)?, domain)
    }

    #[test]
    fn a_host_names_its_first_label() {
        let domain = Some("db.example.com");
        for (host, wanted) in [
            ("ep-a.localhost", named("ep-a", false)),
            ("EP-A-pooler.localhost.", named("ep-a", true)),
            ("ep-a.db.example.com", named("ep-a", false)),
            ("ep-a.eu.db.example.com", named("ep-a", false)),
            ("ep-a.other.org", named("ep-a", false)),
            ("db.example.com", Choice::AskPassword),
            ("localhost", Choice::AskPassword),
            ("proxy", Choice::AskPassword),
            ("127.0.0.1", Choice::AskPassword),
            ("::1", Choice::AskPassword),
            ("", Choice::AskPassword),
            (".", Choice::AskPassword),
        ] {
            assert_eq!(choose_by(Some(host), "", domain), Ok(wanted), "{host}");
        }
    }

    #[test]
    fn sources_must_agree_where_both_are_sure() {
        assert!(matches!(
            choose_by(Some("ep-a.localhost"), "endpoint=ep-b", None),
            Err(EndpointNameError::Conflict { .. })
        ));
        assert_eq!(choose_by(Some("ep-a.localhost"), "endpoint=ep-a-pooler", None), Ok(named("ep-a", true)));
        assert_eq!(choose_by(Some("db.mycorp.com"), "endpoint=ep-b", None), Ok(named("ep-b", false)));
        assert!(matches!(choose_by(None, "endpoint=a -c project=b", None), Err(EndpointNameError::Twice { .. })));
    }

    #[test]
    fn options_keep_what_is_not_an_endpoint() {
        for (text, endpoint, rest) in [
            ("endpoint=ep-a", Some("ep-a"), None),
            ("endpoint%3Dep-a", Some("ep-a"), None),
            ("project=ep-a", Some("ep-a"), None),
            ("-c endpoint=ep-a", Some("ep-a"), None),
            ("-cendpoint=ep-a", Some("ep-a"), None),
            ("--endpoint=ep-a", Some("ep-a"), None),
            ("-c search_path=x endpoint=ep-a  -c work_mem=4MB", Some("ep-a"), Some("-c search_path=x -c work_mem=4MB")),
            (r"-c search_path=a\ endpoint=b", None, Some(r"-c search_path=a\ endpoint=b")),
            ("-c geqo=off", None, Some("-c geqo=off")),
            ("-c", None, Some("-c")),
            ("  ", None, None),
        ] {
            let options = Options::parse(text).expect(text);
            assert_eq!(options.endpoint.as_ref().map(|name| name.endpoint.as_str()), endpoint, "{text}");
            assert_eq!(options.rest.as_deref(), rest, "{text}");
        }
        assert!(matches!(Options::parse("endpoint=../x"), Err(EndpointNameError::Invalid { .. })));
        let options = Options::parse("-c pool_mode=session endpoint=ep-a-pooler").expect("good");
        assert_eq!((options.pool_mode, options.rest), (Some(PoolMode::Session), None));
        assert!(matches!(Options::parse("pool_mode=statement"), Err(EndpointNameError::PoolMode { .. })));
    }

    #[test]
    fn a_password_may_carry_the_endpoint() {
        for (text, endpoint, rest) in [
            ("endpoint=ep-a;secret", "ep-a", "secret"),
            ("endpoint=ep-a$se;c$ret", "ep-a", "se;c$ret"),
            ("project=ep-a;", "ep-a", ""),
        ] {
            let (name, password) = split_password(text.as_bytes()).expect("prefix").expect("valid");
            assert_eq!((name.endpoint.as_str(), password), (endpoint, rest.as_bytes()));
        }
        assert_eq!(split_password(b"secret"), None);
        assert_eq!(split_password(b"endpoint=ep-a"), None);
        assert!(split_password(b"endpoint=a/b;x").expect("prefix").is_err());
    }

    proptest! {
        #[test]
        fn anything_is_taken_apart_without_panic(text in "\\PC{0,60}", host in "\\PC{0,40}", bytes: Vec<u8>) {
            if let Ok(options) = Options::parse(&text) {
                let _ = choose(Some(&host), &options, Some("example.com"));
                let again = Options::parse(options.rest.as_deref().unwrap_or("")).expect("no endpoint is left");
                prop_assert_eq!(again.rest, options.rest);
            }
            let _ = split_password(&bytes);
        }
    }
}
