//! A certificate of our own making, by an authority of our own: what is used when nobody gives a better one.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use rustls_pki_types::CertificateDer;
use sha2::{Digest, Sha256};

use super::{
    TlsError,
    files::{file_error, replace, write_once},
};

/// The names of a self-made certificate.
pub fn names(domain: Option<&str>) -> Vec<String> {
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
pub fn self_made_in(dir: &Path, domain: Option<&str>) -> Result<PathBuf, TlsError> {
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

/// A certificate, its key and its authority.
pub struct SelfMade {
    ca_pem: String,
    chain_pem: String,
    /// The certificate, then its authority's.
    pub chain: Vec<CertificateDer<'static>>,
    /// The certificate's.
    pub key: KeyPair,
}

impl SelfMade {
    /// A certificate for `names`, signed by an authority with `ca_key`.
    pub fn issue(ca_key: &KeyPair, names: &[String]) -> Result<Self, TlsError> {
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

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
}
