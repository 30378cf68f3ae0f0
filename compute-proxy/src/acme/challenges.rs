//! What proves to an ACME server that names are ours: a certificate that only its handshake gets, or a record in the DNS.

use std::{collections::HashMap, path::Path, process::Stdio, sync::Arc, time::Duration};

use parking_lot::RwLock;
use rcgen::{CertificateParams, CustomExtension, KeyPair};
use rustls::sign::CertifiedKey;
use rustls_pki_types::PrivateKeyDer;
use tokio::{process::Command, time::timeout};

use super::AcmeError;
use crate::tls::TlsError;

/// The application protocol of an ACME server that looks for its proof (RFC 8737).
pub const ACME_TLS: &[u8] = b"acme-tls/1";

/// How long a program may take to make a record; name servers take their time.
const HOOK_TIMEOUT: Duration = Duration::from_secs(600);

/// Bytes of a program's complaint that are shown.
const COMPLAINT_MAX_BYTES: usize = 1000;

/// Certificates for the handshakes of an ACME server, by name. Empty but for the moments of a proof.
#[derive(Debug, Default)]
pub struct Challenges(RwLock<HashMap<String, Arc<CertifiedKey>>>);

impl Challenges {
    /// The one for this host, if a proof for it is asked for right now.
    pub fn certificate(&self, host: &str) -> Option<Arc<CertifiedKey>> {
        self.0.read().get(&host.to_ascii_lowercase()).cloned()
    }

    /// Begins to prove a name with the digest of a challenge.
    pub fn present(&self, name: &str, digest: &[u8]) -> Result<(), TlsError> {
        let mut params = CertificateParams::new([name.to_owned()])?;
        params.custom_extensions = vec![CustomExtension::new_acme_identifier(digest)];
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(TlsError::Key)?;
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        // Not `from_der`, which looks into the certificate: its extension is critical, and unknown to rustls.
        let key = provider.key_provider.load_private_key(key)?;
        let certified = CertifiedKey::new(vec![certificate.der().clone()], key);
        self.0.write().insert(name.to_owned(), Arc::new(certified));
        Ok(())
    }

    /// Ends it.
    pub fn forget(&self, name: &str) {
        self.0.write().remove(name);
    }
}

/// Has a program make (`present`) or remove (`cleanup`) a TXT record.
pub async fn run_hook(program: &Path, action: &'static str, record: &str, value: &str) -> Result<(), AcmeError> {
    let failed = |why: String| AcmeError::Hook { program: program.to_owned(), action, record: record.to_owned(), why };
    let child = Command::new(program)
        .args([action, record, value])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let output = timeout(HOOK_TIMEOUT, child.wait_with_output())
        .await
        .map_err(|_| failed(format!("it did not end within {} s", HOOK_TIMEOUT.as_secs())))?
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = &output.stderr[output.stderr.len().saturating_sub(COMPLAINT_MAX_BYTES)..];
    Err(failed(format!("{}: {}", output.status, String::from_utf8_lossy(complaint).trim())))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn a_proof_is_there_while_it_is_asked_for() {
        let challenges = Challenges::default();
        assert!(challenges.certificate("a.example.com").is_none());
        challenges.present("a.example.com", &[7; 32]).expect("made");
        assert!(challenges.certificate("A.example.com").is_some());
        assert!(challenges.certificate("b.example.com").is_none());
        challenges.forget("a.example.com");
        assert!(challenges.certificate("a.example.com").is_none());
    }

    #[tokio::test]
    async fn a_program_that_fails_is_quoted() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let program = dir.path().join("hook");
        fs::write(&program, "#!/bin/sh\necho \"no $1 of $2 as $3\" >&2\n[ $1 = cleanup ]\n").expect("written");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).expect("set");
        let error = run_hook(&program, "present", "_acme-challenge.a.b.", "v").await.expect_err("it fails");
        assert!(error.to_string().contains("exit status: 1: no present of _acme-challenge.a.b. as v"), "{error}");
        run_hook(&program, "cleanup", "_acme-challenge.a.b.", "v").await.expect("it works");
        let error = run_hook(&dir.path().join("none"), "present", "r", "v").await.expect_err("there is none");
        assert!(error.to_string().contains("No such file"), "{error}");
    }
}
