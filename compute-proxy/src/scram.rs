//! The server's side of SCRAM-SHA-256 (RFC 5802, RFC 7677), with and without channel binding: pure, no IO, no randomness.
//!
//! The texts of stored verifiers are Postgres's (`src/common/scram-common.c`): `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`.

use std::borrow::Cow;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Name of the mechanism without channel binding.
pub const SCRAM_SHA_256: &str = "SCRAM-SHA-256";

/// Name of the mechanism with channel binding.
pub const SCRAM_SHA_256_PLUS: &str = "SCRAM-SHA-256-PLUS";

/// Iterations of a made-up verifier: Postgres's default, so that it looks like a real one.
const MOCK_ITERATIONS: u32 = 4096;

/// Most iterations that a verifier may ask for: a bound on the work of a login with a password in clear text.
const MAX_ITERATIONS: u32 = 1_000_000;

/// Bytes of the salt that Postgres makes (`SCRAM_DEFAULT_SALT_LEN`).
const SALT_BYTES: usize = 16;

type Key = [u8; 32];

/// One exchange, from the client's first message to the server's last.
///
/// Call [`Exchange::begin`] with the client's first message, send [`Exchange::server_first`], give the client's answer to
/// [`Exchange::finish`] and send what that returns. A made-up verifier fails there as a wrong password does.
pub struct Exchange<'a> {
    verifier: &'a Verifier,
    client_first_bare: String,
    server_first: String,
    nonce: String,
    /// What the client's `c=` must hold, before base64.
    expected_binding: Vec<u8>,
}

impl<'a> Exchange<'a> {
    /// Takes the client's first message.
    ///
    /// `binding` says which mechanism the client chose and what was offered; `server_nonce` is fresh randomness, in
    /// printable ASCII without a comma.
    pub fn begin(
        verifier: &'a Verifier,
        binding: Binding<'_>,
        client_first: &[u8],
        server_nonce: &str,
    ) -> Result<Self, ScramError> {
        let text = std::str::from_utf8(client_first).map_err(|_| ScramError::Malformed("not UTF-8"))?;
        let mut parts = text.splitn(3, ',');
        let (Some(flag), Some(authzid), Some(bare)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(ScramError::Malformed("the first message has no header"));
        };
        if !authzid.is_empty() {
            return Err(ScramError::Malformed("an authorization identity is not supported"));
        }
        let mut expected_binding = format!("{flag},,").into_bytes();
        expected_binding.extend_from_slice(binding.check(flag)?);
        let client_nonce = client_nonce(bare)?;
        let nonce = format!("{client_nonce}{server_nonce}");
        let salt = BASE64.encode(&verifier.salt);
        let server_first = format!("r={nonce},s={salt},i={}", verifier.iterations);
        Ok(Self { verifier, client_first_bare: bare.to_owned(), server_first, nonce, expected_binding })
    }

    /// The server's first message.
    pub fn server_first(&self) -> &str {
        &self.server_first
    }

    /// Checks the client's proof; returns the server's last message, which proves that the server knows the verifier.
    pub fn finish(self, client_final: &[u8]) -> Result<String, ScramError> {
        let text = std::str::from_utf8(client_final).map_err(|_| ScramError::Malformed("not UTF-8"))?;
        let (without_proof, proof) = text.rsplit_once(",p=").ok_or(ScramError::Malformed("there is no proof"))?;
        let mut attributes = without_proof.split(',');
        let binding = attributes.next().and_then(|part| part.strip_prefix("c="));
        let binding = binding.ok_or(ScramError::Malformed("there is no channel binding"))?;
        let nonce = attributes.next().and_then(|part| part.strip_prefix("r="));
        let nonce = nonce.ok_or(ScramError::Malformed("there is no nonce"))?;
        if !same(nonce.as_bytes(), self.nonce.as_bytes()) {
            return Err(ScramError::Malformed("the nonce is another one"));
        }
        let binding = BASE64.decode(binding).map_err(|_| ScramError::Malformed("bad base64"))?;
        if !same(&binding, &self.expected_binding) {
            return Err(ScramError::ChannelBindingMismatch);
        }
        let proof: Key = decode_key(proof).ok_or(ScramError::Malformed("the proof is not 32 bytes"))?;

        let auth_message = format!("{},{},{without_proof}", self.client_first_bare, self.server_first);
        let signature = hmac(&self.verifier.stored_key, &[auth_message.as_bytes()]);
        let client_key: Key = std::array::from_fn(|at| proof[at] ^ signature[at]);
        if !self.verifier.accepts_client_key(&client_key) {
            return Err(ScramError::WrongPassword);
        }
        let server_signature = hmac(&self.verifier.server_key, &[auth_message.as_bytes()]);
        Ok(format!("v={}", BASE64.encode(server_signature)))
    }
}

/// The client's choice of mechanism and the `tls-server-end-point` data where SCRAM-SHA-256-PLUS was offered.
#[derive(Clone, Copy)]
pub enum Binding<'a> {
    /// SCRAM-SHA-256, on a connection where nothing else was offered.
    NotOffered,
    /// SCRAM-SHA-256 although SCRAM-SHA-256-PLUS was offered.
    Declined,
    /// SCRAM-SHA-256-PLUS; the hash of the server's certificate.
    Used(&'a [u8]),
}

impl<'a> Binding<'a> {
    /// Checks the header's flag (`n`, `y` or `p=<type>`); returns the data that the client must send back.
    fn check(self, flag: &str) -> Result<&'a [u8], ScramError> {
        match (self, flag) {
            (Self::NotOffered, "n" | "y") | (Self::Declined, "n") => Ok(&[]),
            // The client can bind and saw no offer, yet there was one: someone in between took it out.
            (Self::Declined, "y") => Err(ScramError::Downgrade),
            (Self::Used(data), "p=tls-server-end-point") => Ok(data),
            (Self::Used(_), flag) if flag.starts_with("p=") => Err(ScramError::BindingType),
            (Self::NotOffered | Self::Declined | Self::Used(_), _) => {
                Err(ScramError::Malformed("the channel binding flag does not fit the mechanism"))
            }
        }
    }
}

/// The nonce of `n=<user>,r=<nonce>`. Like Postgres, the user is ignored: the start-up message has named the role.
fn client_nonce(bare: &str) -> Result<&str, ScramError> {
    if bare.starts_with("m=") {
        return Err(ScramError::Malformed("a mandatory extension is not supported"));
    }
    let mut attributes = bare.split(',');
    if !attributes.next().is_some_and(|user| user.starts_with("n=")) {
        return Err(ScramError::Malformed("there is no user name"));
    }
    let nonce = attributes.next().and_then(|part| part.strip_prefix("r="));
    let nonce = nonce.ok_or(ScramError::Malformed("there is no nonce"))?;
    let printable = nonce.bytes().all(|byte| (0x21..=0x7e).contains(&byte));
    if printable && !nonce.is_empty() { Ok(nonce) } else { Err(ScramError::Malformed("the nonce is not printable")) }
}

/// What a server stores of a password. Has no `Debug`: it must not reach a log.
#[derive(Clone)]
pub struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    stored_key: Key,
    server_key: Key,
    /// False for a made-up one, which accepts nothing.
    genuine: bool,
}

impl Verifier {
    /// Reads a stored verifier.
    pub fn parse(text: &str) -> Result<Self, VerifierError> {
        let parts = text.strip_prefix("SCRAM-SHA-256$").and_then(|rest| rest.split_once('$'));
        let (parameters, keys) = parts.ok_or(VerifierError)?;
        let (iterations, salt) = parameters.split_once(':').ok_or(VerifierError)?;
        let (stored_key, server_key) = keys.split_once(':').ok_or(VerifierError)?;
        let iterations = iterations.parse().ok().filter(|count| (1..=MAX_ITERATIONS).contains(count));
        Ok(Self {
            iterations: iterations.ok_or(VerifierError)?,
            salt: BASE64.decode(salt).map_err(|_| VerifierError)?,
            stored_key: decode_key(stored_key).ok_or(VerifierError)?,
            server_key: decode_key(server_key).ok_or(VerifierError)?,
            genuine: true,
        })
    }

    /// One that accepts nothing, for a role that does not exist. The same `context` gives the same salt, as a real role's
    /// would, so that trying twice does not tell them apart; `secret` is the process's own.
    pub fn mock(secret: &[u8; 32], context: &[&[u8]]) -> Self {
        let digest = hmac(secret, context);
        let salt = digest[..SALT_BYTES].to_vec();
        Self { iterations: MOCK_ITERATIONS, salt, stored_key: digest, server_key: digest, genuine: false }
    }

    /// Checks a password in clear text. Takes `iterations` hashes: some milliseconds.
    pub fn accepts_password(&self, password: &[u8]) -> bool {
        let salted = salted_password(password, &self.salt, self.iterations);
        self.accepts_client_key(&hmac(&salted, &[b"Client Key"]))
    }

    fn accepts_client_key(&self, client_key: &Key) -> bool {
        let stored_key: Key = Sha256::digest(client_key).into();
        bool::from(stored_key.ct_eq(&self.stored_key)) & self.genuine
    }
}

/// A stored verifier that is not one. Deliberately says nothing of its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stored password of the role is not a SCRAM-SHA-256 verifier")]
pub struct VerifierError;

/// Why an exchange failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ScramError {
    /// Not SCRAM.
    #[error("malformed SCRAM message: {0}")]
    Malformed(&'static str),
    /// The proof is wrong.
    #[error("wrong password")]
    WrongPassword,
    /// The client bound itself to another TLS connection: someone sits in between.
    #[error("SCRAM channel binding check failed")]
    ChannelBindingMismatch,
    /// The client did not see that channel binding was offered.
    #[error("SCRAM channel binding negotiation error")]
    Downgrade,
    /// Not `tls-server-end-point`.
    #[error("unsupported SCRAM channel-binding type")]
    BindingType,
}

/// PBKDF2 with HMAC-SHA-256, one block. Like Postgres, a password that SASLprep refuses is used as its bytes are.
fn salted_password(password: &[u8], salt: &[u8], iterations: u32) -> Key {
    let prepared = std::str::from_utf8(password).ok().and_then(|text| stringprep::saslprep(text).ok());
    let prepared = prepared.map_or(Cow::Borrowed(password), |text| Cow::Owned(text.as_bytes().to_vec()));
    let keyed = keyed(&prepared);
    let first = keyed.clone().chain_update(salt).chain_update(1_u32.to_be_bytes());
    let mut last: Key = first.finalize().into_bytes().into();
    let mut sum = last;
    for _ in 1..iterations {
        last = keyed.clone().chain_update(last).finalize().into_bytes().into();
        for (byte, next) in sum.iter_mut().zip(last) {
            *byte ^= next;
        }
    }
    sum
}

fn keyed(key: &[u8]) -> Hmac<Sha256> {
    Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length")
}

/// HMAC-SHA-256 of the parts, one behind the other.
pub(crate) fn hmac(key: &[u8], parts: &[&[u8]]) -> Key {
    parts.iter().fold(keyed(key), |mac, part| mac.chain_update(part)).finalize().into_bytes().into()
}

fn decode_key(text: &str) -> Option<Key> {
    BASE64.decode(text).ok()?.try_into().ok()
}

fn same(left: &[u8], right: &[u8]) -> bool {
    left.ct_eq(right).into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Made from RFC 7677's example: user `user`, password `pencil`.
    const SERVER_NONCE: &str = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
    const CLIENT_FIRST: &str = "n,,n=user,r=rOprNGfwEbeRWgbNEkqO";
    const CLIENT_FINAL: &str = "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
                                p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";

    fn pencil() -> Verifier {
        let salt = BASE64.decode("W22ZaJ0SNY7soEsUEjb6gQ==").expect("base64");
        let salted = salted_password(b"pencil", &salt, 4096);
        let stored_key = Sha256::digest(hmac(&salted, &[b"Client Key"])).into();
        Verifier { iterations: 4096, salt, stored_key, server_key: hmac(&salted, &[b"Server Key"]), genuine: true }
    }

    fn rfc_exchange(verifier: &Verifier) -> Exchange<'_> {
        Exchange::begin(verifier, Binding::NotOffered, CLIENT_FIRST.as_bytes(), SERVER_NONCE).expect("first message")
    }

    #[test]
    fn rfc_7677_example() {
        let verifier = pencil();
        let exchange = rfc_exchange(&verifier);
        assert_eq!(
            exchange.server_first(),
            "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
        );
        assert_eq!(
            exchange.finish(CLIENT_FINAL.as_bytes()).as_deref(),
            Ok("v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")
        );
    }

    #[test]
    fn wrong_proofs_and_made_up_verifiers_fail_alike() {
        let verifier = pencil();
        let wrong = CLIENT_FINAL.replace("p=dH", "p=eH");
        assert_eq!(rfc_exchange(&verifier).finish(wrong.as_bytes()), Err(ScramError::WrongPassword));
        let mock = Verifier::mock(&[7; 32], &[b"ep", b"nobody"]);
        assert_eq!(rfc_exchange(&mock).finish(CLIENT_FINAL.as_bytes()), Err(ScramError::WrongPassword));
        let not_genuine = Verifier { genuine: false, ..pencil() };
        assert_eq!(rfc_exchange(&not_genuine).finish(CLIENT_FINAL.as_bytes()), Err(ScramError::WrongPassword));
        assert!(!not_genuine.accepts_password(b"pencil"));
    }

    #[test]
    fn a_made_up_salt_stays_the_same() {
        let salt = |secret: u8, role: &[u8]| Verifier::mock(&[secret; 32], &[b"ep", b"/", role]).salt;
        assert_eq!(salt(1, b"a"), salt(1, b"a"));
        assert_ne!(salt(1, b"a"), salt(1, b"b"));
        assert_ne!(salt(1, b"a"), salt(2, b"a"));
    }

    #[test]
    fn stored_verifiers_are_read() {
        let text = postgres_protocol::password::scram_sha_256("pässword\u{a0}1".as_bytes());
        let verifier = Verifier::parse(&text).expect("made by a client library");
        assert!(verifier.accepts_password("pässword 1".as_bytes()), "SASLprep maps the space");
        assert!(!verifier.accepts_password(b"password 1"));
        for bad in ["", "md5abc", "SCRAM-SHA-256$0:aa$a:b", "SCRAM-SHA-256$4096:AAAA$AAAA:AAAA"] {
            assert!(Verifier::parse(bad).is_err(), "{bad}");
        }
        let endless = text.replacen("4096", "99999999", 1);
        assert!(Verifier::parse(&endless).is_err(), "unbounded work");
    }

    #[test]
    fn channel_binding_must_fit() {
        let verifier = pencil();
        let begin = |binding, flag: &str| {
            let first = format!("{flag},,n=,r=abc");
            Exchange::begin(&verifier, binding, first.as_bytes(), "xyz").err()
        };
        assert_eq!(begin(Binding::NotOffered, "y"), None);
        assert_eq!(begin(Binding::Declined, "n"), None);
        assert_eq!(begin(Binding::Declined, "y"), Some(ScramError::Downgrade));
        assert_eq!(begin(Binding::Used(b"hash"), "p=tls-server-end-point"), None);
        assert_eq!(begin(Binding::Used(b"hash"), "p=tls-unique"), Some(ScramError::BindingType));
        assert!(begin(Binding::Used(b"hash"), "n").is_some());
        assert!(begin(Binding::NotOffered, "p=tls-server-end-point").is_some());
    }

    #[test]
    fn another_certificate_is_noticed() {
        let verifier = pencil();
        let first = b"p=tls-server-end-point,,n=,r=abc";
        let exchange = Exchange::begin(&verifier, Binding::Used(b"ours"), first, "xyz").expect("first message");
        let bound = BASE64.encode(b"p=tls-server-end-point,,theirs");
        let last = format!("c={bound},r=abcxyz,p={}", BASE64.encode([0; 32]));
        assert_eq!(exchange.finish(last.as_bytes()), Err(ScramError::ChannelBindingMismatch));
    }

    proptest! {
        #[test]
        fn garbage_never_panics_and_never_logs_in(first: Vec<u8>, last: Vec<u8>, tail in "\\PC{0,40}") {
            let verifier = pencil();
            let _ = Exchange::begin(&verifier, Binding::NotOffered, &first, "xyz");
            let _ = Exchange::begin(&verifier, Binding::NotOffered, format!("n,,{tail}").as_bytes(), "xyz");
            prop_assert!(rfc_exchange(&verifier).finish(&last).is_err());
            let last = format!("c=biws,r={tail}");
            prop_assert!(rfc_exchange(&verifier).finish(last.as_bytes()).is_err());
            let _ = Verifier::parse(&tail);
        }
    }
}
