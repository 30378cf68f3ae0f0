//! JSON Web Tokens in place of passwords: the keys that an issuer publishes, and whether one of them signed a token. Pure but
//! for the time of day, against which tokens expire.

use std::{fmt, sync::Arc};

use jsonwebtoken::{
    Algorithm, DecodingKey, Validation, decode, decode_header,
    errors::ErrorKind,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse},
};
use serde::Deserialize;
use serde_json::{Map, Value};

/// Name of the setting in which SQL finds a token's claims, as PostgREST sets it.
pub const CLAIMS_SETTING: &str = "request.jwt.claims";

/// Bytes that a token may have.
const TOKEN_MAX_BYTES: usize = 8 * 1024;

/// Keys of one issuer that are looked at.
const KEYS_MAX: usize = 100;

/// By so many seconds the clocks of issuer and proxy may differ.
const LEEWAY_SECONDS: u64 = 30;

/// A token whose form is right; nothing in it is to be believed yet.
pub struct Token<'a> {
    text: &'a str,
    algorithm: Algorithm,
    key_id: Option<String>,
}

impl<'a> Token<'a> {
    /// From a header `Authorization`.
    pub fn parse(text: &'a str) -> Result<Self, TokenError> {
        if text.len() > TOKEN_MAX_BYTES {
            return Err(TokenError::Malformed);
        }
        let header = decode_header(text).map_err(|_| TokenError::Malformed)?;
        // Extensions that whoever checks a token has to understand, and unencoded payloads are one.
        if header.crit.is_some() {
            return Err(TokenError::Malformed);
        }
        Ok(Self { text, algorithm: header.alg, key_id: header.kid })
    }
}

/// What an issuer says of the token's holder, as a JSON object.
#[derive(Clone, PartialEq, Eq)]
pub struct Claims(Arc<str>);

impl Claims {
    /// The JSON.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Claims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Claims")
    }
}

/// Public keys of one issuer.
#[derive(Debug)]
pub struct KeySet {
    keys: Vec<Key>,
}

#[derive(Debug)]
struct Key {
    id: Option<String>,
    /// The only one that it is used with, whatever a token says.
    algorithm: Algorithm,
    key: DecodingKey,
}

#[derive(Deserialize)]
struct KeySetFields {
    keys: Vec<Value>,
}

impl KeySet {
    /// A JSON Web Key Set. Keys of other kinds than those that are used here are passed over.
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        let KeySetFields { keys } = serde_json::from_slice(json)?;
        Ok(Self { keys: keys.into_iter().take(KEYS_MAX).filter_map(Key::new).collect() })
    }

    /// True when it has a key that may have signed the token.
    pub fn has_key_for(&self, token: &Token<'_>) -> bool {
        self.key_for(token).is_some()
    }

    /// The claims of a token that one of these keys has signed, that is for `audience` and by `issuer` where these are given,
    /// and whose time it is.
    pub fn verify(
        &self,
        token: &Token<'_>,
        audience: Option<&str>,
        issuer: Option<&str>,
    ) -> Result<Claims, TokenError> {
        let key = self.key_for(token).ok_or(TokenError::UnknownKey)?;
        let validation = validation(key.algorithm, audience, issuer);
        let decoded = decode::<Map<String, Value>>(token.text, &key.key, &validation);
        let claims = decoded.map_err(|error| match error.kind() {
            ErrorKind::ExpiredSignature => TokenError::Expired,
            ErrorKind::ImmatureSignature
            | ErrorKind::InvalidAudience
            | ErrorKind::InvalidIssuer
            | ErrorKind::InvalidClaimFormat(_)
            | ErrorKind::MissingRequiredClaim(_) => TokenError::Claims,
            _ => TokenError::Signature,
        })?;
        // Written anew: what Postgres reads is what was checked, also where a name is there twice.
        Ok(Claims(Value::Object(claims.claims).to_string().into()))
    }

    /// A token that names no key has one only where there is no choice.
    fn key_for(&self, token: &Token<'_>) -> Option<&Key> {
        let mut suitable = self.keys.iter().filter(|key| {
            key.algorithm == token.algorithm && (token.key_id.is_none() || key.id.as_deref() == token.key_id.as_deref())
        });
        let first = suitable.next();
        first.filter(|_| token.key_id.is_some() || suitable.next().is_none())
    }
}

impl Key {
    fn new(json: Value) -> Option<Self> {
        let jwk: Jwk = serde_json::from_value(json).ok()?;
        let (algorithm, named) = match &jwk.algorithm {
            AlgorithmParameters::RSA(_) => (Algorithm::RS256, KeyAlgorithm::RS256),
            AlgorithmParameters::EllipticCurve(curve) if curve.curve == EllipticCurve::P256 => {
                (Algorithm::ES256, KeyAlgorithm::ES256)
            }
            AlgorithmParameters::OctetKeyPair(pair) if pair.curve == EllipticCurve::Ed25519 => {
                (Algorithm::EdDSA, KeyAlgorithm::EdDSA)
            }
            _ => return None,
        };
        let common = &jwk.common;
        let is_for_signing = common.public_key_use.as_ref().is_none_or(|used| *used == PublicKeyUse::Signature);
        let is_for_algorithm = common.key_algorithm.is_none_or(|wanted| wanted == named);
        let key = DecodingKey::from_jwk(&jwk).ok()?;
        (is_for_signing && is_for_algorithm).then(|| Self { id: jwk.common.key_id.clone(), algorithm, key })
    }
}

fn validation(algorithm: Algorithm, audience: Option<&str>, issuer: Option<&str>) -> Validation {
    let mut validation = Validation::new(algorithm);
    validation.leeway = LEEWAY_SECONDS;
    validation.validate_nbf = true;
    validation.validate_aud = audience.is_some();
    let mut required = vec!["exp"];
    if let Some(audience) = audience {
        validation.set_audience(&[audience]);
        required.push("aud");
    }
    if let Some(issuer) = issuer {
        validation.set_issuer(&[issuer]);
        required.push("iss");
    }
    validation.set_required_spec_claims(&required);
    validation
}

/// Why a token is not good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It is none, or too long.
    #[error("it is not a JSON Web Token of up to {TOKEN_MAX_BYTES} bytes")]
    Malformed,
    /// No key with its id and algorithm.
    #[error("no key of its id and algorithm is known")]
    UnknownKey,
    /// The key has not signed this.
    #[error("its signature is wrong")]
    Signature,
    /// Signed, but for others, by another, for later, or for ever.
    #[error("its claims are not those that are wanted")]
    Claims,
    /// It was good once.
    #[error("it has expired")]
    Expired,
}
