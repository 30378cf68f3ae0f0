//! Tokens between services: JSON Web Tokens signed with the control plane's Ed25519 key.
//!
//! The control plane alone holds the private key; every other service checks with the public one.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use types::{BranchRef, ProjectId};

/// What the bearer of a token may do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Scope {
    /// A service of the installation (proxy, pageserver, safekeeper, control plane): everything.
    Service,
    /// One branch's compute: that branch's WAL and pages, and reading nothing else.
    Branch {
        /// The branch.
        branch: BranchRef,
    },
    /// Whoever follows one branch: that branch's WAL, by Postgres's own protocol, and nothing else.
    WalReader {
        /// The branch.
        branch: BranchRef,
    },
    /// A user's API key for one project.
    Project {
        /// The project.
        project: ProjectId,
    },
}

/// A checked token's content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// What it allows.
    #[serde(flatten)]
    pub scope: Scope,
    /// Seconds since the Unix epoch after which it is refused.
    pub exp: u64,
}

impl Claims {
    /// True when the bearer may read and write this branch's storage.
    pub fn allows_branch(&self, wanted: &BranchRef) -> bool {
        match &self.scope {
            Scope::Service => true,
            Scope::Branch { branch } => branch == wanted,
            Scope::WalReader { .. } | Scope::Project { .. } => false,
        }
    }

    /// True when the bearer may follow this branch's WAL.
    pub fn allows_wal(&self, wanted: &BranchRef) -> bool {
        match &self.scope {
            Scope::WalReader { branch } => branch == wanted,
            Scope::Service | Scope::Branch { .. } | Scope::Project { .. } => self.allows_branch(wanted),
        }
    }

    /// True for the installation's own services.
    pub fn is_service(&self) -> bool {
        self.scope == Scope::Service
    }
}

/// A key or a token that is no good.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The key file's text is not an Ed25519 key.
    #[error("token key: {0}")]
    Key(String),
    /// The token was not signed by the control plane, or its time is over.
    #[error("token refused: {0}")]
    Refused(#[from] jsonwebtoken::errors::Error),
}

/// Makes tokens. Only the control plane has one.
pub struct TokenSigner {
    key: EncodingKey,
}

/// A new Ed25519 key pair as PEM text.
pub struct TokenKeys {
    /// PKCS#8; keep it secret.
    pub private_pem: String,
    /// SubjectPublicKeyInfo.
    pub public_pem: String,
}

impl TokenKeys {
    /// A fresh pair from the system's randomness.
    pub fn generate() -> Result<TokenKeys, TokenError> {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(|e| TokenError::Key(e.to_string()))?;
        Ok(TokenKeys { private_pem: pair.serialize_pem(), public_pem: pair.public_key_pem() })
    }
}

impl TokenSigner {
    /// From a private key as PEM text.
    pub fn from_pem(private_pem: &str) -> Result<TokenSigner, TokenError> {
        let key = EncodingKey::from_ed_pem(private_pem.as_bytes()).map_err(|e| TokenError::Key(e.to_string()))?;
        Ok(TokenSigner { key })
    }

    /// A token for `scope` that is good for `lifetime` from now.
    pub fn sign(&self, scope: Scope, lifetime: Duration) -> Result<String, TokenError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let claims = Claims { scope, exp: (now + lifetime).as_secs() };
        Ok(jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), &claims, &self.key)?)
    }
}

/// Checks tokens.
#[derive(Clone)]
pub struct TokenVerifier {
    key: DecodingKey,
}

impl TokenVerifier {
    /// From the public key as PEM text.
    pub fn from_pem(public_pem: &str) -> Result<TokenVerifier, TokenError> {
        let key = DecodingKey::from_ed_pem(public_pem.as_bytes()).map_err(|e| TokenError::Key(e.to_string()))?;
        Ok(TokenVerifier { key })
    }

    /// The token's claims, when its signature is the control plane's and its time is not over.
    pub fn verify(&self, token: &str) -> Result<Claims, TokenError> {
        Ok(jsonwebtoken::decode::<Claims>(token, &self.key, &Validation::new(Algorithm::EdDSA))?.claims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::BranchId;

    #[test]
    fn tokens_are_checked() {
        let keys = TokenKeys::generate().expect("keys");
        let signer = TokenSigner::from_pem(&keys.private_pem).expect("signer");
        let verifier = TokenVerifier::from_pem(&keys.public_pem).expect("verifier");
        let branch = |name: &str| BranchRef {
            project: ProjectId::new("p").expect("id"),
            branch: BranchId::new(name).expect("id"),
        };
        let token = signer.sign(Scope::Branch { branch: branch("a") }, Duration::from_secs(60)).expect("sign");
        let claims = verifier.verify(&token).expect("verify");
        assert!(claims.allows_branch(&branch("a")) && !claims.allows_branch(&branch("b")) && !claims.is_service());
        assert!(claims.allows_wal(&branch("a")) && !claims.allows_wal(&branch("b")));
        let reader = signer.sign(Scope::WalReader { branch: branch("a") }, Duration::from_secs(60)).expect("sign");
        let reader = verifier.verify(&reader).expect("verify");
        assert!(reader.allows_wal(&branch("a")) && !reader.allows_wal(&branch("b")));
        assert!(!reader.allows_branch(&branch("a")) && !reader.is_service());

        let others = TokenKeys::generate().expect("keys");
        let stranger = TokenVerifier::from_pem(&others.public_pem).expect("verifier");
        assert!(stranger.verify(&token).is_err());
        assert!(verifier.verify(&token[..token.len() - 2]).is_err());
    }
}
