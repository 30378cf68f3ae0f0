//! TLS with clients: the certificate, given, fetched or self-made, and what a finished handshake tells.

mod end_point;
pub mod files;
mod self_made;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rcgen::KeyPair;
use rustls::{
    ServerConfig,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{io::AsyncWriteExt, net::TcpStream};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use self::{
    end_point::server_end_point,
    files::{pem_error, read_chain},
    self_made::{SelfMade, names, self_made_in},
};
use crate::{
    acme::{ACME_TLS, AcmeConfigError, Challenges},
    config::Config,
};

/// Bytes of a TLS record. libpq makes room for so many before it reads (`pqReadData` in `fe-misc.c`). What it does not take of a longer
/// one stays within OpenSSL, and programs that then wait for the socket with `select` (`CopyStreamPoll` in `receivelog.c`) wait for ever.
const RECORD_MAX_BYTES: usize = 8 * 1024;

/// The application protocol that a client names when it begins with TLS at once.
const ALPN: &[u8] = b"postgresql";

/// Application protocols of the port for HTTP.
const ALPN_HTTP_1: &[u8] = b"http/1.1";
const ALPN_HTTP_2: &[u8] = b"h2";

/// Ends TLS.
pub struct Tls {
    current: ArcSwap<Certificate>,
    /// Where it comes from, and when those files were written; empty for one that is only in memory.
    files: Vec<PathBuf>,
    written: Mutex<Vec<Option<SystemTime>>>,
    /// What proves to an ACME server that its names lead here, where certificates come from one.
    challenges: Option<Arc<Challenges>>,
}

/// A certificate in use.
struct Certificate {
    acceptor: TlsAcceptor,
    /// The same, for the port where HTTP is spoken, and Postgres by those who name it.
    http_acceptor: TlsAcceptor,
    end_point: Option<Arc<[u8]>>,
}

/// What a handshake told.
#[derive(Debug, Clone)]
pub struct TlsInfo {
    /// The host name that the client asked for.
    pub sni: Option<String>,
    /// What the client will speak.
    pub protocol: Protocol,
    /// `tls-server-end-point` channel binding data (RFC 5929); `None`: the certificate's signature has no hash of its own.
    pub end_point: Option<Arc<[u8]>>,
}

/// What a client speaks inside TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// It named Postgres's protocol.
    Postgres,
    /// It named HTTP/2.
    Http2,
    /// It named HTTP/1.1 or nothing: what the port is for.
    Unnamed,
}

impl Protocol {
    fn of(alpn: Option<&[u8]>) -> Self {
        match alpn {
            Some(ALPN) => Self::Postgres,
            Some(ALPN_HTTP_2) => Self::Http2,
            Some(_) | None => Self::Unnamed,
        }
    }
}

impl Tls {
    /// Loads or makes the certificate that `config` asks for. Until an ACME server has given one, a self-made one is used.
    pub fn load(config: &Config) -> Result<Self, TlsError> {
        // Settings that make no sense are an error also where they would not be looked at.
        config.wanted_by_acme()?;
        let domain = config.domain.as_deref();
        let mut challenges = None;
        let (files, certificate) = match (&config.tls_cert, &config.tls_key, &config.tls_dir) {
            (Some(cert), Some(key), _) => Self::from_files(vec![cert.clone(), key.clone()])?,
            (_, _, Some(dir)) => match config.wanted_by_acme()? {
                Some(wanted) => {
                    let challenges = challenges.insert(Arc::default());
                    let certificate = Certificate::by_acme(wanted.file.clone(), dir, domain, challenges)?;
                    (vec![wanted.file], certificate)
                }
                None => Self::from_files(vec![self_made_in(dir, domain)?])?,
            },
            (_, _, None) => (Vec::new(), Certificate::in_memory(domain)?),
        };
        let written = Mutex::new(written(&files));
        Ok(Self { current: ArcSwap::from_pointee(certificate), files, written, challenges })
    }

    fn from_files(files: Vec<PathBuf>) -> Result<(Vec<PathBuf>, Certificate), TlsError> {
        let certificate = Certificate::read(&files, None)?;
        Ok((files, certificate))
    }

    /// Where an ACME server's challenges are answered; `None` when certificates don't come from one.
    pub fn challenges(&self) -> Option<Arc<Challenges>> {
        self.challenges.clone()
    }

    /// Reads the files again; when they are no good the certificate stays as it is.
    pub fn reload(&self) -> Result<(), TlsError> {
        if !self.files.is_empty() {
            *self.written.lock() = written(&self.files);
            self.current.store(Arc::new(Certificate::read(&self.files, self.challenges.as_ref())?));
            tracing::info!(file = %self.files[0].display(), "read the certificate again");
        }
        Ok(())
    }

    /// Reads the files again if they were written since the last time.
    pub fn reload_if_changed(&self) -> Result<(), TlsError> {
        let changed = *self.written.lock() != written(&self.files);
        if changed { self.reload() } else { Ok(()) }
    }

    /// Does the handshake with a client of Postgres's port. The caller bounds its time.
    pub async fn accept(&self, tcp: TcpStream) -> io::Result<(Box<TlsStream<TcpStream>>, TlsInfo)> {
        let current = self.current.load_full();
        Self::handshake(&current.acceptor, &current, tcp).await
    }

    /// Does the handshake with a client of the port for HTTP. The caller bounds its time.
    pub async fn accept_http(&self, tcp: TcpStream) -> io::Result<(Box<TlsStream<TcpStream>>, TlsInfo)> {
        let current = self.current.load_full();
        Self::handshake(&current.http_acceptor, &current, tcp).await
    }

    async fn handshake(
        acceptor: &TlsAcceptor,
        current: &Certificate,
        tcp: TcpStream,
    ) -> io::Result<(Box<TlsStream<TcpStream>>, TlsInfo)> {
        let mut stream = acceptor.accept(tcp).await?;
        let (_, connection) = stream.get_ref();
        if connection.alpn_protocol() == Some(ACME_TLS) {
            // The handshake was all that it came for (RFC 8737).
            tracing::info!(name = connection.server_name(), "answered the ACME server's challenge");
            stream.shutdown().await?;
            return Err(io::Error::other("it was an ACME server's challenge"));
        }
        let info = TlsInfo {
            sni: connection.server_name().map(str::to_owned),
            protocol: Protocol::of(connection.alpn_protocol()),
            end_point: current.end_point.clone(),
        };
        Ok((Box::new(stream), info))
    }
}

impl Certificate {
    /// Nobody else ever sees its authority.
    fn in_memory(domain: Option<&str>) -> Result<Self, TlsError> {
        let made = SelfMade::issue(&KeyPair::generate()?, &names(domain))?;
        let key = PrivateKeyDer::try_from(made.key.serialize_der()).map_err(TlsError::Key)?;
        Self::new(made.chain, key, None)
    }

    /// The one that has come by ACME; if there is none yet, or it is damaged, a self-made one until then.
    fn by_acme(
        file: PathBuf,
        dir: &Path,
        domain: Option<&str>,
        challenges: &Arc<Challenges>,
    ) -> Result<Self, TlsError> {
        if file.exists() {
            match Self::read(&[file], Some(challenges)) {
                Ok(certificate) => return Ok(certificate),
                Err(error) => {
                    tracing::error!(%error, "cannot use the certificate that came by ACME; a self-made one is used")
                }
            }
        }
        Self::read(&[self_made_in(dir, domain)?], Some(challenges))
    }

    /// From one file with key and chain, or a file for each.
    fn read(files: &[PathBuf], challenges: Option<&Arc<Challenges>>) -> Result<Self, TlsError> {
        let [chain, .., key] = files else { return Self::read(&[files[0].clone(), files[0].clone()], challenges) };
        Self::new(read_chain(chain)?, PrivateKeyDer::from_pem_file(key).map_err(pem_error(key))?, challenges)
    }

    fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        challenges: Option<&Arc<Challenges>>,
    ) -> Result<Self, TlsError> {
        let end_point = chain.first().and_then(server_end_point);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let ordinary = Arc::new(CertifiedKey::from_der(chain, key, &provider)?);
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(Resolver { ordinary, challenges: challenges.cloned() }));
        config.max_fragment_size = Some(RECORD_MAX_BYTES);
        let mut http = config.clone();
        config.alpn_protocols = vec![ALPN.to_vec()];
        http.alpn_protocols = [ALPN_HTTP_2, ALPN_HTTP_1, ALPN].map(<[u8]>::to_vec).into();
        if challenges.is_some() {
            config.alpn_protocols.push(ACME_TLS.to_vec());
            http.alpn_protocols.push(ACME_TLS.to_vec());
        }
        let [acceptor, http_acceptor] = [config, http].map(|config| TlsAcceptor::from(Arc::new(config)));
        Ok(Self { acceptor, http_acceptor, end_point })
    }
}

/// Which certificate a handshake is answered with.
#[derive(Debug)]
struct Resolver {
    ordinary: Arc<CertifiedKey>,
    challenges: Option<Arc<Challenges>>,
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut protocols = hello.alpn().into_iter().flatten();
        match &self.challenges {
            // Named alone, as an ACME server does: nobody else gets such a certificate, and it gets no other.
            Some(challenges) if protocols.next() == Some(ACME_TLS) && protocols.next().is_none() => {
                challenges.certificate(hello.server_name()?)
            }
            Some(_) | None => Some(self.ordinary.clone()),
        }
    }
}

/// When files were written; `None` for one that is not there.
fn written(files: &[PathBuf]) -> Vec<Option<SystemTime>> {
    files.iter().map(|file| fs::metadata(file).and_then(|metadata| metadata.modified()).ok()).collect()
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A PEM file does not hold what it should.
    #[error("{path}: {source}")]
    Pem {
        /// Which.
        path: PathBuf,
        /// Why.
        source: rustls_pki_types::pem::Error,
    },
    /// A PEM file holds no certificate.
    #[error("{0} holds no certificate")]
    NoCertificate(PathBuf),
    /// A certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// A key that was just made cannot be used.
    #[error("cannot use the key: {0}")]
    Key(&'static str),
    /// The certificate and the key don't fit, or can't be used.
    #[error("cannot use the certificate: {0}")]
    Use(#[from] rustls::Error),
    /// The settings for ACME don't make sense.
    #[error(transparent)]
    Acme(#[from] AcmeConfigError),
}
