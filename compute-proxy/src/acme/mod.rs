//! Certificates by ACME (RFC 8555): got from a server such as Let's Encrypt's, kept in files, renewed in time.
//!
//! [`config`] says what is wanted, `schedule` (pure) when, `order` has the conversation with the server, `challenges` what the
//! server looks for meanwhile. The certificate becomes a file that [`Tls`] reads like any other; whatever goes wrong here, the
//! one in use stays.

mod challenges;
pub mod config;
mod http;
mod order;
mod schedule;

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use time::OffsetDateTime;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

pub use self::{
    challenges::{ACME_TLS, Challenges},
    config::{AcmeConfig, AcmeConfigError, Wanted},
};
use self::{
    http::AcmeHttp,
    schedule::{Validity, retry_pause},
};
use crate::tls::{
    Tls, TlsError,
    files::{file_error, read_chain},
};

/// Longest sleep before the clock and the certificate are looked at again: either may have been changed by others.
const LOOK_INTERVAL: Duration = Duration::from_secs(3600);

/// Pause while another proxy gets a certificate for the same directory.
const OTHERS_INTERVAL: Duration = Duration::from_secs(5);

/// Gets certificates, and renews them.
pub struct Acme {
    wanted: Wanted,
    http: AcmeHttp,
    challenges: Arc<Challenges>,
}

/// Why there is no (new) certificate from an ACME server.
#[derive(Debug, thiserror::Error)]
pub enum AcmeError {
    /// The server refused, or could not be reached.
    #[error(transparent)]
    Server(#[from] instant_acme::Error),
    /// There is no HTTP client.
    #[error("cannot make an HTTP client: {0}")]
    Http(#[from] reqwest::Error),
    /// The server wants another kind of proof.
    #[error("the server takes no {proof} proof of {name}; it offers {offered}")]
    NoChallenge {
        /// Of what.
        name: String,
        /// Which kind was to be given.
        proof: String,
        /// What it takes.
        offered: String,
    },
    /// The server looked for the proof and did not find it.
    #[error("the server does not accept the proof of {name}: {why}")]
    NotProved {
        /// Of what.
        name: String,
        /// What the server says.
        why: String,
    },
    /// The program for DNS failed.
    #[error("--acme-dns-hook: {} {action} {record}: {why}", program.display())]
    Hook {
        /// Which program.
        program: PathBuf,
        /// `present` or `cleanup`.
        action: &'static str,
        /// Of which record.
        record: String,
        /// What it came to.
        why: String,
    },
    /// A file could not be read or written, or a certificate or a key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The account's file is damaged.
    #[error("{}: not an account: {source} (move it away, and a new account is made)", path.display())]
    Account {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The server gave a certificate that says nothing useful.
    #[error("cannot read the certificate: {0}")]
    Certificate(String),
    /// It all took too long.
    #[error("it took longer than {} minutes", .0.as_secs() / 60)]
    TooLong(Duration),
    /// The proxy stops.
    #[error("the proxy stops")]
    Stopped,
}

impl AcmeError {
    /// For the log: where an HTTP client fails, with the causes, of which it keeps quiet.
    fn told(self) -> String {
        match self {
            Self::Server(_) | Self::Http(_) => format!("{:#}", anyhow::Error::from(self)),
            other => other.to_string(),
        }
    }
}

impl Acme {
    /// For `tls`, if its certificates are to come from an ACME server.
    pub fn new(config: &crate::Config, tls: &Tls) -> Result<Option<Self>, AcmeError> {
        let wanted = config.wanted_by_acme().map_err(TlsError::from)?;
        let (Some(wanted), Some(challenges)) = (wanted, tls.challenges()) else { return Ok(None) };
        let http = AcmeHttp::new(wanted.ca.as_deref())?;
        Ok(Some(Self { wanted, http, challenges }))
    }

    /// Gets a certificate when there is none or it is time for another, until `shutdown`.
    pub async fn keep(self, tls: &Tls, shutdown: &CancellationToken) {
        let Wanted { directory, names, proof, file, .. } = &self.wanted;
        tracing::info!(server = %directory, ?names, %proof, file = %file.display(), "certificates come by ACME");
        let (mut failures, mut not_until) = (0_u32, None);
        let mut chance: f64 = rand::random();
        loop {
            let now = OffsetDateTime::now_utc();
            let renewal = stored(file).map(|validity| validity.renewal(chance));
            let next = renewal.max(not_until).unwrap_or(now);
            if next > now {
                let pause = Duration::try_from(next - now).unwrap_or_default().min(LOOK_INTERVAL);
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = sleep(pause) => continue,
                }
            }
            match self.renew(tls, shutdown).await {
                Ok(Some(validity)) => {
                    (failures, not_until, chance) = (0, None, rand::random());
                    let (until, renewed) = (validity.not_after, validity.renewal(chance));
                    tracing::info!(?names, %until, renewed_at = %renewed, "got a certificate by ACME");
                }
                Ok(None) => not_until = Some(OffsetDateTime::now_utc() + OTHERS_INTERVAL),
                Err(AcmeError::Stopped) => return,
                Err(error) => {
                    failures = failures.saturating_add(1);
                    let pause = retry_pause(failures, self.wanted.retry, rand::random());
                    not_until = Some(OffsetDateTime::now_utc() + pause);
                    let next_try_in = humantime::format_duration(Duration::from_secs(pause.as_secs())).to_string();
                    let in_use = in_use(file);
                    let error = error.told();
                    tracing::error!(
                        error,
                        failures,
                        next_try_in,
                        ?names,
                        "no certificate by ACME; {in_use} stays in use"
                    );
                }
            }
        }
    }

    /// Gets a certificate and puts it to use; `None` when another process does so at this moment.
    async fn renew(&self, tls: &Tls, shutdown: &CancellationToken) -> Result<Option<Validity>, AcmeError> {
        let Some(_locked) = locked(&self.wanted.lock_file)? else { return Ok(None) };
        order::obtain(&self.wanted, &self.http, &self.challenges, shutdown).await?;
        tls.reload()?;
        stored(&self.wanted.file).map(Some).ok_or_else(|| AcmeError::Certificate("it is gone".into()))
    }
}

/// The validity of the certificate in a file; `None` when there is none that can be read.
fn stored(file: &Path) -> Option<Validity> {
    if !file.exists() {
        return None;
    }
    let read = read_chain(file).map_err(AcmeError::from).and_then(|chain| validity(&chain[0]));
    read.map_err(|error| tracing::warn!(error = error.told(), "the certificate cannot be read: getting another")).ok()
}

/// From when to when a certificate is valid.
fn validity(certificate: &[u8]) -> Result<Validity, AcmeError> {
    let (_, parsed) =
        x509_parser::parse_x509_certificate(certificate).map_err(|error| AcmeError::Certificate(error.to_string()))?;
    let found = parsed.validity();
    Ok(Validity { not_before: found.not_before.to_datetime(), not_after: found.not_after.to_datetime() })
}

/// What clients get meanwhile, for the log.
fn in_use(file: &Path) -> String {
    match stored(file) {
        Some(Validity { not_after, .. }) if not_after < OffsetDateTime::now_utc() => "the one that has expired".into(),
        Some(Validity { not_after, .. }) => format!("the one that is good until {not_after}"),
        None => "the self-made one".into(),
    }
}

/// The lock of a directory, held until it is dropped; `None` when somebody else has it.
fn locked(path: &Path) -> Result<Option<File>, TlsError> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path);
    let file = file.map_err(file_error(path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(file_error(path)(io::Error::from(error))),
    }
}
