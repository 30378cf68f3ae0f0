//! TLS with followers.

use std::{io, path::PathBuf, sync::Arc};

use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::ReplicationError;

/// Bytes of a TLS record, as the proxy's: libpq reads so many at a time, and programs that wait with `select` wait for ever for the rest of
/// a longer one (`RECORD_MAX_BYTES` in `compute-proxy/src/tls`).
const RECORD_MAX_BYTES: usize = 8 * 1024;

/// The files of a certificate and its key. They are read for each connection, of which there are few: a renewed certificate counts at once.
pub(super) struct Tls {
    cert: PathBuf,
    key: PathBuf,
}

impl Tls {
    /// With files that can be used now.
    pub fn load(cert: PathBuf, key: PathBuf) -> Result<Tls, ReplicationError> {
        let tls = Tls { cert, key };
        tls.config()?;
        Ok(tls)
    }

    /// Does the handshake. The caller bounds its time.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let config = self.config().map_err(io::Error::other)?;
        TlsAcceptor::from(Arc::new(config)).accept(stream).await
    }

    fn config(&self) -> Result<ServerConfig, ReplicationError> {
        let of_cert = |reason: String| ReplicationError::Certificate { path: self.cert.clone(), reason };
        let of_key = |reason: String| ReplicationError::Certificate { path: self.key.clone(), reason };
        let certificates = CertificateDer::pem_file_iter(&self.cert).map_err(|error| of_cert(error.to_string()))?;
        let chain: Vec<_> = certificates.collect::<Result<_, _>>().map_err(|error| of_cert(error.to_string()))?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|error| of_key(error.to_string()))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let versions = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = versions.and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key));
        let mut config = config.map_err(|error| of_cert(error.to_string()))?;
        config.alpn_protocols = vec![b"postgresql".to_vec()];
        config.max_fragment_size = Some(RECORD_MAX_BYTES);
        Ok(config)
    }
}
