//! The hash of a certificate that channel binding binds to.

use std::sync::Arc;

use rustls_pki_types::CertificateDer;
use sha2::{Digest, Sha256, Sha384, Sha512};

/// The hash of a certificate by the hash function of its own signature, SHA-256 in place of MD5 and SHA-1 (RFC 5929).
pub fn server_end_point(certificate: &CertificateDer<'_>) -> Option<Arc<[u8]>> {
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
    use proptest::prelude::*;
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    #[test]
    fn the_hash_is_that_of_the_signature() {
        let key = KeyPair::generate().expect("key");
        let cert = CertificateParams::default().self_signed(&key).expect("made");
        let hash = server_end_point(cert.der()).expect("ECDSA with SHA-256");
        assert_eq!(&hash[..], &Sha256::digest(cert.der())[..]);
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
