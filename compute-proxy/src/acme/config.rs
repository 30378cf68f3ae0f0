//! The settings for certificates by ACME, as command line arguments, and what follows from them. Pure.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use instant_acme::LetsEncrypt;
use reqwest::Url;
use rustls_pki_types::DnsName;
use sha2::{Digest, Sha256};

/// Names that a certificate may have; Let's Encrypt takes no more.
const NAMES_MAX: usize = 100;

/// Settings for certificates by ACME. No `Debug`: it holds a key.
#[derive(Clone, clap::Args)]
#[command(next_help_heading = "Certificates by ACME")]
pub struct AcmeConfig {
    /// Get the certificate from an ACME server and renew it in time, with nobody's help: "letsencrypt", "letsencrypt-staging"
    /// (for trying out: no limits, but no client trusts it), or the URL of another server's directory. You agree to the
    /// server's terms of service by this. Certificate and account are kept in --tls-dir; a self-made certificate is used
    /// until the first is there. Which names it has, and how they are proved: --acme-dns-hook, --acme-name.
    #[arg(long, env = "DORMOUSE_ACME", value_name = "SERVER", value_parser = directory)]
    pub acme: Option<Url>,

    /// Names in the certificate, with commas between them. With --acme-dns-hook by default --domain and everything one level below
    /// it: db.example.com,*.db.example.com. Without --acme-dns-hook there can be no wildcard, and each name is proved by a
    /// connection to its port 443, which must be --http-listen's (or lead there).
    #[arg(long, env = "DORMOUSE_ACME_NAME", value_name = "NAMES", value_delimiter = ',')]
    pub acme_name: Vec<String>,

    /// Program that proves the names by DNS, which alone proves wildcards. It is called as
    /// `PROGRAM present _acme-challenge.db.example.com. VALUE`: make a TXT record with this value beside those that are
    /// there, wait until the zone's name servers have it, exit with 0. Later `PROGRAM cleanup` with the same two words takes it
    /// away. (Programs made for lego's "exec" fit.)
    #[arg(long, env = "DORMOUSE_ACME_DNS_HOOK", value_name = "PROGRAM")]
    pub acme_dns_hook: Option<PathBuf>,

    /// Where the ACME server may write to when something is wrong with the certificate.
    #[arg(long, env = "DORMOUSE_ACME_EMAIL", value_name = "ADDRESS")]
    pub acme_email: Option<String>,

    /// PEM file with the authority of the ACME server's own certificate, for a server of your own. By default the system's
    /// authorities are trusted.
    #[arg(long, env = "DORMOUSE_ACME_CA", value_name = "FILE")]
    pub acme_ca: Option<PathBuf>,

    /// Name of the account that you already have with the server's owner, if it asks for one (external account binding).
    #[arg(long, env = "DORMOUSE_ACME_EAB_KID", value_name = "ID", requires = "acme_eab_key")]
    pub acme_eab_kid: Option<String>,

    /// The key that belongs to --acme-eab-kid, as the server's owner shows it (base64url).
    #[arg(long, env = "DORMOUSE_ACME_EAB_KEY", hide_env_values = true, value_name = "KEY", requires = "acme_eab_kid")]
    pub acme_eab_key: Option<String>,

    /// How long after a failure the server is asked again; after each further one twice as long, up to thirty times.
    #[arg(long, default_value = "2m", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub acme_retry: Duration,
}

/// Flags or environment variables, and their values.
pub type Named = Vec<(&'static str, String)>;

/// A server by name or by the URL of its directory.
fn directory(text: &str) -> Result<Url, String> {
    let url = match text {
        "letsencrypt" => LetsEncrypt::Production.url(),
        "letsencrypt-staging" => LetsEncrypt::Staging.url(),
        other => other,
    };
    let url = Url::parse(url).map_err(|error| format!("letsencrypt, letsencrypt-staging or a URL: {error}"))?;
    if url.scheme() == "https" { Ok(url) } else { Err("an ACME server's URL begins with https://".into()) }
}

/// Which certificate is wanted from whom, and where it is kept.
#[derive(Clone)]
pub struct Wanted {
    /// The server's directory.
    pub directory: Url,
    /// In order, each once. At least one.
    pub names: Vec<String>,
    /// How they are proved.
    pub proof: Proof,
    /// `mailto:`, if anything.
    pub contact: Option<String>,
    /// For a server of one's own.
    pub ca: Option<PathBuf>,
    /// Name and key of an account that the server's owner gave out.
    pub external_account: Option<(String, Vec<u8>)>,
    /// Pause after a first failure.
    pub retry: Duration,
    /// Key and chain, once they are there.
    pub file: PathBuf,
    /// The account with the server.
    pub account_file: PathBuf,
    /// Locked while somebody gets a certificate for this directory.
    pub lock_file: PathBuf,
}

/// How an ACME server is shown that names are ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// In a handshake on port 443 (TLS-ALPN-01).
    Handshake,
    /// By a record in the DNS (DNS-01), made by this program.
    Dns(PathBuf),
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Handshake => "tls-alpn-01",
            Self::Dns(_) => "dns-01",
        })
    }
}

/// Why the settings for ACME don't make sense.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AcmeConfigError {
    /// Nowhere to keep anything.
    #[error("--acme needs --tls-dir, a directory in which certificate and account are kept")]
    NoDirectory,
    /// Nothing to ask for.
    #[error(
        "--acme does not know which names to ask for: say them with --acme-name, or give --domain and --acme-dns-hook to \
         get all of *.<domain>"
    )]
    NoNames,
    /// A server takes so many and no more.
    #[error("--acme-name has {0} names; a certificate can have {NAMES_MAX}. A wildcard needs --acme-dns-hook")]
    TooManyNames(usize),
    /// Not a host name.
    #[error("--acme-name: {0:?} is not a host name that a certificate could have")]
    Name(String),
    /// A handshake proves no wildcard.
    #[error("--acme-name: the wildcard {0} can only be proved by DNS: give a program with --acme-dns-hook")]
    Wildcard(String),
    /// Not base64url.
    #[error("--acme-eab-key is not base64url")]
    ExternalKey,
    /// Settings for ACME without it.
    #[error("{0} does nothing without --acme")]
    Idle(&'static str),
    /// Two sources of one certificate.
    #[error("--tls-cert and --acme exclude each other: is the certificate in your files, or does the proxy get it?")]
    Files,
}

impl AcmeConfig {
    /// What follows from these settings with the proxy's `domain`, its directory for certificates, and whether it was given
    /// files of its own; `None` when there is to be no ACME.
    pub fn wanted(
        &self,
        domain: Option<&str>,
        dir: Option<&Path>,
        own_files: bool,
    ) -> Result<Option<Wanted>, AcmeConfigError> {
        let Some(directory) = self.acme.clone() else {
            return match self.idle() {
                Some(flag) => Err(AcmeConfigError::Idle(flag)),
                None => Ok(None),
            };
        };
        if own_files {
            return Err(AcmeConfigError::Files);
        }
        let dir = dir.ok_or(AcmeConfigError::NoDirectory)?;
        let names = self.names(domain)?;
        let external_account = match (&self.acme_eab_kid, &self.acme_eab_key) {
            (Some(id), Some(key)) => {
                let key = BASE64_URL_SAFE_NO_PAD.decode(key.trim_end_matches('='));
                Some((id.clone(), key.map_err(|_| AcmeConfigError::ExternalKey)?))
            }
            _ => None,
        };
        let account_tag = tag(&[directory.as_str()]);
        let certificate_tag =
            tag(&[&[directory.as_str()], &names.iter().map(String::as_str).collect::<Vec<_>>()[..]].concat());
        Ok(Some(Wanted {
            directory,
            names,
            proof: self.acme_dns_hook.clone().map_or(Proof::Handshake, Proof::Dns),
            contact: self.acme_email.as_ref().map(|address| format!("mailto:{address}")),
            ca: self.acme_ca.clone(),
            external_account,
            retry: self.acme_retry,
            file: dir.join(format!("acme-{certificate_tag}.pem")),
            account_file: dir.join(format!("acme-account-{account_tag}.json")),
            lock_file: dir.join("acme.lock"),
        }))
    }

    /// A flag that was given though there is no ACME.
    fn idle(&self) -> Option<&'static str> {
        let given = [
            ("--acme-name", !self.acme_name.is_empty()),
            ("--acme-dns-hook", self.acme_dns_hook.is_some()),
            ("--acme-email", self.acme_email.is_some()),
            ("--acme-ca", self.acme_ca.is_some()),
            ("--acme-eab-kid", self.acme_eab_kid.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(flag, _)| flag)
    }

    fn names(&self, domain: Option<&str>) -> Result<Vec<String>, AcmeConfigError> {
        let domain = domain.map(|domain| domain.trim_matches('.')).filter(|domain| !domain.is_empty());
        let asked = match (self.acme_name.as_slice(), domain, &self.acme_dns_hook) {
            ([], Some(domain), Some(_)) => vec![domain.to_owned(), format!("*.{domain}")],
            ([], _, _) => return Err(AcmeConfigError::NoNames),
            (names, _, _) => names.to_vec(),
        };
        let mut names = asked.iter().map(|name| self.name(name)).collect::<Result<Vec<_>, _>>()?;
        names.sort();
        names.dedup();
        if names.len() > NAMES_MAX { Err(AcmeConfigError::TooManyNames(names.len())) } else { Ok(names) }
    }

    fn name(&self, text: &str) -> Result<String, AcmeConfigError> {
        let name = text.trim().trim_end_matches('.').to_ascii_lowercase();
        let bare = name.strip_prefix("*.");
        let host = bare.unwrap_or(&name);
        if DnsName::try_from(host).is_err() || !host.contains('.') {
            return Err(AcmeConfigError::Name(text.to_owned()));
        }
        if bare.is_some() && self.acme_dns_hook.is_none() { Err(AcmeConfigError::Wildcard(name)) } else { Ok(name) }
    }

    /// The same settings as flags for a process of this program, and those that must not be seen, as its environment.
    pub fn flags(&self) -> (Named, Named) {
        let path = |path: &PathBuf| path.display().to_string();
        let names = Some(self.acme_name.join(",")).filter(|names| !names.is_empty());
        let flags = [
            ("--acme", self.acme.as_ref().map(Url::to_string)),
            ("--acme-name", names),
            ("--acme-dns-hook", self.acme_dns_hook.as_ref().map(path)),
            ("--acme-email", self.acme_email.clone()),
            ("--acme-ca", self.acme_ca.as_ref().map(path)),
            ("--acme-eab-kid", self.acme_eab_kid.clone()),
            ("--acme-retry", self.acme.as_ref().map(|_| humantime::format_duration(self.acme_retry).to_string())),
        ];
        let environment = self.acme_eab_key.iter().map(|key| ("DORMOUSE_ACME_EAB_KEY", key.clone()));
        let given = flags.into_iter().filter_map(|(flag, value)| Some((flag, value?)));
        (given.collect(), environment.collect())
    }
}

/// A short name for what these say.
fn tag(words: &[&str]) -> String {
    let digest = Sha256::digest(words.join(" "));
    digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

/// The record in which a name's proof is looked for.
pub fn challenge_record(name: &str) -> String {
    format!("_acme-challenge.{}.", name.trim_start_matches("*."))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::config::Config;

    #[derive(clap::Parser)]
    struct Arguments {
        #[command(flatten)]
        config: Config,
    }

    fn wanted(arguments: &[&str]) -> Result<Option<Wanted>, AcmeConfigError> {
        let all = [&["proxy", "--token", "t"], arguments].concat();
        let config = Arguments::try_parse_from(all).expect("arguments").config;
        config.wanted_by_acme()
    }

    const FOR_LETSENCRYPT: [&str; 4] = ["--tls-dir", "/tls", "--acme", "letsencrypt"];

    fn with(arguments: &[&str]) -> Result<Wanted, AcmeConfigError> {
        wanted(&[&FOR_LETSENCRYPT, arguments].concat()).map(|wanted| wanted.expect("ACME"))
    }

    #[test]
    fn a_domain_and_a_hook_make_a_wildcard() {
        let wanted = with(&["--domain", "DB.example.com.", "--acme-dns-hook", "/hook"]).expect("good");
        assert_eq!(wanted.names, ["*.db.example.com", "db.example.com"]);
        assert_eq!(wanted.proof, Proof::Dns("/hook".into()));
        assert!(wanted.directory.as_str().contains("letsencrypt.org"));
        assert_eq!(wanted.file.parent(), Some(Path::new("/tls")));
    }

    #[test]
    fn other_names_are_another_file_in_whatever_order() {
        let file = |names: &str| with(&["--acme-name", names]).expect("good").file;
        assert_eq!(file("a.example.com,b.example.com"), file("B.example.com,a.example.com,a.example.com."));
        assert_ne!(file("a.example.com"), file("b.example.com"));
    }

    #[test]
    fn what_cannot_work_is_said() {
        let error = |arguments: &[&str]| with(arguments).err().expect("refused");
        assert_eq!(error(&[]), AcmeConfigError::NoNames);
        assert_eq!(error(&["--domain", "db.example.com"]), AcmeConfigError::NoNames);
        assert_eq!(error(&["--acme-name", "*.a.b"]), AcmeConfigError::Wildcard("*.a.b".into()));
        for name in ["localhost", "a b.c", "a.*.c", "127.0.0.1", ""] {
            assert_eq!(error(&["--acme-name", name]), AcmeConfigError::Name(name.into()));
        }
        let many = (0..101).map(|n| format!("n{n}.example.com")).collect::<Vec<_>>().join(",");
        assert_eq!(error(&["--acme-name", &many]), AcmeConfigError::TooManyNames(101));
        let external = ["--acme-name", "a.b", "--acme-eab-kid", "k", "--acme-eab-key", "%"];
        assert_eq!(error(&external), AcmeConfigError::ExternalKey);
        let error = |arguments: &[&str]| wanted(arguments).err().expect("refused");
        assert_eq!(error(&["--acme", "letsencrypt"]), AcmeConfigError::NoDirectory);
        assert_eq!(error(&["--acme-email", "a@b"]), AcmeConfigError::Idle("--acme-email"));
        let files = ["--tls-cert", "c", "--tls-key", "k", "--acme", "letsencrypt"];
        assert_eq!(error(&files), AcmeConfigError::Files);
        assert!(wanted(&[]).expect("good").is_none());
        for bad in ["http://acme.example.com/dir", "lets encrypt"] {
            assert!(Arguments::try_parse_from(["proxy", "--token", "t", "--acme", bad]).is_err());
        }
    }

    #[test]
    fn flags_say_the_same_again() {
        let rest = ["--acme-name", "a.b,c.d", "--acme-email", "me@b", "--acme-eab-kid", "k", "--acme-eab-key", "AAAA"];
        let all = [&["proxy", "--token", "t"], &FOR_LETSENCRYPT[..], &rest].concat();
        let config = Arguments::try_parse_from(all).expect("arguments").config;
        let (flags, environment) = config.acme.flags();
        let flags = flags.iter().flat_map(|(flag, value)| [*flag, value.as_str()]);
        let again = ["proxy", "--token", "t", "--tls-dir", "/tls", "--acme-eab-key", &environment[0].1];
        let again = Arguments::try_parse_from(again.into_iter().chain(flags)).expect("arguments").config;
        assert_eq!(again.acme.flags(), config.acme.flags());
        assert!(again.wanted_by_acme().expect("good").expect("ACME").external_account.is_some());
    }

    #[test]
    fn a_wildcard_is_proved_where_its_domain_is() {
        assert_eq!(challenge_record("*.db.example.com"), "_acme-challenge.db.example.com.");
        assert_eq!(challenge_record("db.example.com"), "_acme-challenge.db.example.com.");
    }
}
