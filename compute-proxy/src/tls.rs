//! TLS with clients: the certificate, given or self-made, and what a finished handshake tells.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use sha2::{Digest, Sha256, Sha384, Sha512};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::config::Config;

/// The application protocol that a client names when it begins with TLS at once.
const ALPN: &[u8] = b"postgresql";

/// The application protocol of the port for HTTP.
const ALPN_HTTP: &[u8] = b"http/1.1";

/// Ends TLS.
pub struct Tls {
    current: ArcSwap<Certificate>,
    /// Where it comes from, and when those files were written; empty for one that is only in memory.
    files: Vec<PathBuf>,
    written: Mutex<Vec<Option<SystemTime>>>,
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
    /// True when the client named Postgres's protocol.
    pub alpn: bool,
    /// `tls-server-end-point` channel binding data (RFC 5929); `None`: the certificate's signature has no hash of its own.
    pub end_point: Option<Arc<[u8]>>,
}

impl Tls {
    /// Loads or makes the certificate that `config` asks for.
    pub fn load(config: &Config) -> Result<Self, TlsError> {
        let files = match (&config.tls_cert, &config.tls_key, &config.tls_dir) {
            (Some(cert), Some(key), _) => vec![cert.clone(), key.clone()],
            (_, _, Some(dir)) => vec![self_made_in(dir, config.domain.as_deref())?],
            (_, _, None) => Vec::new(),
        };
        let certificate = if files.is_empty() {
            let ca_key = KeyPair::generate()?;
            let made = SelfMade::issue(&ca_key, &names(config.domain.as_deref()))?;
            Certificate::new(made.chain, PrivateKeyDer::try_from(made.key.serialize_der()).map_err(TlsError::Key)?)?
        } else {
            Certificate::read(&files)?
        };
        let written = Mutex::new(written(&files));
        Ok(Self { current: ArcSwap::from_pointee(certificate), files, written })
    }

    /// Reads the files again; when they are no good the certificate stays as it is.
    pub fn reload(&self) -> Result<(), TlsError> {
        if !self.files.is_empty() {
            *self.written.lock() = written(&self.files);
            self.current.store(Arc::new(Certificate::read(&self.files)?));
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
        let stream = acceptor.accept(tcp).await?;
        let (_, connection) = stream.get_ref();
        let info = TlsInfo {
            sni: connection.server_name().map(str::to_owned),
            alpn: connection.alpn_protocol() == Some(ALPN),
            end_point: current.end_point.clone(),
        };
        Ok((Box::new(stream), info))
    }
}

impl Certificate {
    /// From one file with key and chain, or a file for each.
    fn read(files: &[PathBuf]) -> Result<Self, TlsError> {
        let [chain, .., key] = files else { return Self::read(&[files[0].clone(), files[0].clone()]) };
        Self::new(read_chain(chain)?, PrivateKeyDer::from_pem_file(key).map_err(pem_error(key))?)
    }

    fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, TlsError> {
        let end_point = chain.first().and_then(server_end_point);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        let mut http = config.clone();
        config.alpn_protocols = vec![ALPN.to_vec()];
        http.alpn_protocols = vec![ALPN_HTTP.to_vec(), ALPN.to_vec()];
        let [acceptor, http_acceptor] = [config, http].map(|config| TlsAcceptor::from(Arc::new(config)));
        Ok(Self { acceptor, http_acceptor, end_point })
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
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> TlsError + use<> {
    let path = path.to_owned();
    move |source| TlsError::File { path, source }
}

fn pem_error(path: &Path) -> impl FnOnce(rustls_pki_types::pem::Error) -> TlsError + use<> {
    let path = path.to_owned();
    move |source| TlsError::Pem { path, source }
}

fn read_chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates = CertificateDer::pem_file_iter(path).map_err(pem_error(path))?;
    let chain: Vec<_> = certificates.collect::<Result<_, _>>().map_err(pem_error(path))?;
    if chain.is_empty() { Err(TlsError::NoCertificate(path.to_owned())) } else { Ok(chain) }
}

fn names(domain: Option<&str>) -> Vec<String> {
    // `api.localhost` by name: many clients don't let a wildcard stand directly below a top-level domain.
    let mut names: Vec<String> =
        ["localhost", "*.localhost", "api.localhost", "127.0.0.1", "::1"].map(str::to_owned).into();
    if let Some(domain) = domain.map(|domain| domain.trim_matches('.')).filter(|domain| !domain.is_empty()) {
        names.extend([domain.to_owned(), format!("*.{domain}")]);
    }
    names
}

/// The self-made certificate's file in `dir`: key and chain in one, so that they always fit each other.
///
/// `ca.key` is the root of it all: whoever writes it first wins, and everything else follows from it, so two proxies that
/// start together on one directory agree. A change of names makes a new certificate by the same authority.
fn self_made_in(dir: &Path, domain: Option<&str>) -> Result<PathBuf, TlsError> {
    fs::create_dir_all(dir).map_err(file_error(dir))?;
    let (ca_key_file, ca_file) = (dir.join("ca.key"), dir.join("ca.pem"));
    if !ca_key_file.exists() {
        let text = KeyPair::generate()?.serialize_pem();
        write_once(&ca_key_file, text.as_bytes(), 0o600)?;
    }
    let ca_key = KeyPair::from_pem(&fs::read_to_string(&ca_key_file).map_err(file_error(&ca_key_file))?)?;
    let names = names(domain);
    // The names are part of the file's name, so that a change of domain shows.
    let digest = Sha256::digest(names.join(" "));
    let tag: String = digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
    let server_file = dir.join(format!("server-{tag}.pem"));
    if !server_file.exists() || !ca_file.exists() {
        let made = SelfMade::issue(&ca_key, &names)?;
        // Its signature differs each time: clients that have a copy should find the same bytes.
        write_once(&ca_file, made.ca_pem.as_bytes(), 0o644)?;
        replace(&server_file, format!("{}{}", made.key.serialize_pem(), made.chain_pem).as_bytes(), 0o600)?;
        tracing::info!(ca = %ca_file.display(), "made a certificate; clients may trust its ca.pem");
    }
    Ok(server_file)
}

/// Creates a file at once and whole; an existing one is left alone.
fn write_once(path: &Path, content: &[u8], mode: u32) -> Result<(), TlsError> {
    let temporary = write_beside(path, content, mode)?;
    let linked = match fs::hard_link(&temporary, path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    };
    let removed = fs::remove_file(&temporary);
    linked.and(removed).map_err(file_error(path))
}

fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), TlsError> {
    let temporary = write_beside(path, content, mode)?;
    fs::rename(&temporary, path).map_err(file_error(path))
}

fn write_beside(path: &Path, content: &[u8], mode: u32) -> Result<PathBuf, TlsError> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{:016x}", rand::random::<u64>()));
    let temporary = PathBuf::from(name);
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(mode).open(&temporary);
    file.and_then(|mut file| file.write_all(content)).map_err(file_error(path))?;
    Ok(temporary)
}

struct SelfMade {
    ca_pem: String,
    chain_pem: String,
    chain: Vec<CertificateDer<'static>>,
    key: KeyPair,
}

impl SelfMade {
    /// A certificate for `names`, signed by an authority with `ca_key`.
    fn issue(ca_key: &KeyPair, names: &[String]) -> Result<Self, TlsError> {
        let mut authority = CertificateParams::default();
        authority.distinguished_name.push(DnType::CommonName, "Dormouse self-made authority");
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (authority.not_before, authority.not_after) = validity();
        let ca = authority.self_signed(ca_key)?;

        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, "Dormouse compute proxy");
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        (params.not_before, params.not_after) = validity();
        let key = KeyPair::generate()?;
        let server = params.signed_by(&key, &Issuer::from_params(&authority, ca_key))?;
        Ok(Self {
            ca_pem: ca.pem(),
            chain_pem: server.pem() + &ca.pem(),
            chain: vec![server.der().clone(), ca.der().clone()],
            key,
        })
    }
}

/// Fixed, and long: nobody is there to renew it.
fn validity() -> (time::OffsetDateTime, time::OffsetDateTime) {
    (date_time_ymd(2024, 1, 1), date_time_ymd(2049, 1, 1))
}

/// The hash of a certificate by the hash function of its own signature, SHA-256 in place of MD5 and SHA-1 (RFC 5929).
fn server_end_point(certificate: &CertificateDer<'_>) -> Option<Arc<[u8]>> {
    let der = certificate.as_ref();
    match signature_algorithm(der)? {
        // sha1WithRSAEncryption, sha256WithRSAEncryption, ecdsa-with-SHA1, ecdsa-with-SHA256.
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 4 | 5 | 11]
        | [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1]
        | [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2] => Some(Sha256::digest(der).to_vec().into()),
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 12] | [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3] => {
            Some(Sha384::digest(der).to_vec().into())
        }
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 13] | [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 4] => {
            Some(Sha512::digest(der).to_vec().into())
        }
        _ => None,
    }
}

/// The object identifier in a certificate's `signatureAlgorithm` (RFC 5280, 4.1).
fn signature_algorithm(certificate: &[u8]) -> Option<&[u8]> {
    const SEQUENCE: u8 = 0x30;
    const OBJECT_IDENTIFIER: u8 = 0x06;
    let (fields, _) = der_element(certificate, SEQUENCE)?;
    let (_to_be_signed, rest) = der_element(fields, SEQUENCE)?;
    let (algorithm, _) = der_element(rest, SEQUENCE)?;
    der_element(algorithm, OBJECT_IDENTIFIER).map(|(identifier, _)| identifier)
}

/// The content of a DER element with this tag, and what follows it.
fn der_element(input: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&[found, length], rest) = input.split_first_chunk::<2>()?;
    if found != tag {
        return None;
    }
    let (length, rest) = if length < 0x80 {
        (usize::from(length), rest)
    } else {
        let (digits, rest) =
            rest.split_at_checked(usize::from(length & 0x7f)).filter(|(digits, _)| digits.len() <= 4)?;
        (digits.iter().fold(0, |sum, digit| sum << 8 | usize::from(*digit)), rest)
    };
    rest.split_at_checked(length)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_self_made_certificate_is_made_once() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = self_made_in(dir.path(), None).expect("made");
        let first = fs::read(&file).expect("written");
        assert_eq!(fs::metadata(&file).expect("written").permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(dir.path().join("ca.key")).expect("written").permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read(self_made_in(dir.path(), None).expect("found")).expect("written"), first);

        let ca = fs::read(dir.path().join("ca.pem")).expect("written");
        let other = self_made_in(dir.path(), Some("db.example.com")).expect("made");
        assert_ne!(other, file, "other names need another certificate");
        assert!(fs::read(dir.path().join("ca.pem")).expect("written") == ca, "by the same authority");
        assert_eq!(fs::read_dir(dir.path()).expect("listed").count(), 4, "no temporary file is left");
    }

    #[test]
    fn the_hash_of_a_self_made_certificate_is_sha_256() {
        let ca_key = KeyPair::generate().expect("key");
        let made = SelfMade::issue(&ca_key, &names(Some("example.com"))).expect("made");
        let hash = server_end_point(&made.chain[0]).expect("ECDSA with SHA-256");
        assert_eq!(&hash[..], &Sha256::digest(&made.chain[0])[..]);
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).expect("key");
        let cert = CertificateParams::default().self_signed(&key).expect("made");
        assert_eq!(server_end_point(cert.der()).expect("hash").len(), 48);
        let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).expect("key");
        let cert = CertificateParams::default().self_signed(&key).expect("made");
        assert!(server_end_point(cert.der()).is_none(), "Ed25519 has no hash of its own");
    }

    proptest! {
        #[test]
        fn garbage_is_no_certificate(der: Vec<u8>) {
            let _ = signature_algorithm(&der);
        }
    }
}
