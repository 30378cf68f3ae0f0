//! Keys made at the first start: the token key pair and the admin API key.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};
use wire::{TokenSigner, TokenVerifier, auth::TokenKeys};

/// Prefix of API keys: makes them easy to find where they should not be.
const API_KEY_PREFIX: &str = "dormouse_";
const API_KEY_RANDOM_BYTES: usize = 32;

/// Where the keys of a data directory are.
#[derive(Debug, Clone)]
pub struct KeyPaths {
    /// Mode 0600; only the control plane reads it.
    pub token_private: PathBuf,
    /// Every service reads it.
    pub token_public: PathBuf,
    /// Mode 0600; the admin's API key in plain text, for the command line.
    pub admin: PathBuf,
}

impl KeyPaths {
    /// Below `data_dir`.
    pub fn new(data_dir: &Path) -> KeyPaths {
        let keys = data_dir.join("keys");
        KeyPaths {
            token_private: keys.join("token-private.pem"),
            token_public: keys.join("token-public.pem"),
            admin: data_dir.join("admin.key"),
        }
    }
}

/// Keys that cannot be read or made.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file system refused.
    #[error("{}: {source}", .path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file's content is no key.
    #[error(transparent)]
    Token(#[from] wire::TokenError),
}

/// The token keys of an installation.
pub struct InstallationKeys {
    /// Signs.
    pub signer: TokenSigner,
    /// Checks.
    pub verifier: TokenVerifier,
    /// Where they are.
    pub paths: KeyPaths,
}

impl InstallationKeys {
    /// Reads the token keys of `data_dir`; makes them when there are none.
    pub fn open_or_create(data_dir: &Path) -> Result<InstallationKeys, KeyError> {
        let paths = KeyPaths::new(data_dir);
        if !exists(&paths.token_private)? {
            let keys = TokenKeys::generate()?;
            let directory = paths.token_private.parent().unwrap_or(data_dir);
            fs::create_dir_all(directory).map_err(|source| KeyError::Io { path: directory.to_owned(), source })?;
            // The private key last: it says that both are there.
            write(&paths.token_public, keys.public_pem.as_bytes(), 0o644)?;
            write(&paths.token_private, keys.private_pem.as_bytes(), 0o600)?;
        }
        let signer = TokenSigner::from_pem(&read(&paths.token_private)?)?;
        let verifier = TokenVerifier::from_pem(&read(&paths.token_public)?)?;
        Ok(InstallationKeys { signer, verifier, paths })
    }
}

/// Makes an API key, writes it to `path` and answers its hash.
pub fn make_admin_key(path: &Path) -> Result<String, KeyError> {
    let random: [u8; API_KEY_RANDOM_BYTES] = rand::random();
    let mut key = String::from(API_KEY_PREFIX);
    random.iter().for_each(|byte| key.push_str(&format!("{byte:02x}")));
    write(path, format!("{key}\n").as_bytes(), 0o600)?;
    Ok(hash_text(&hash(&key)))
}

/// What is kept of an API key. Keys have 256 random bits: a plain hash is enough.
pub fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// A hash as it is stored.
pub fn hash_text(hash: &[u8; 32]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Compares in a time that does not depend on where the difference is.
pub fn equal(left: &[u8], right: &[u8]) -> bool {
    let difference = left.iter().zip(right).fold(0u8, |all, (a, b)| all | (a ^ b));
    left.len() == right.len() && std::hint::black_box(difference) == 0
}

fn exists(path: &Path) -> Result<bool, KeyError> {
    path.try_exists().map_err(|source| KeyError::Io { path: path.to_owned(), source })
}

fn read(path: &Path) -> Result<String, KeyError> {
    fs::read_to_string(path).map_err(|source| KeyError::Io { path: path.to_owned(), source })
}

/// Whole or not at all.
fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), KeyError> {
    let temporary = path.with_extension("new");
    let attempt = || -> io::Result<()> {
        let mut file = fs::OpenOptions::new().create(true).write(true).truncate(true).mode(mode).open(&temporary)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    attempt().map_err(|source| KeyError::Io { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_made_once_and_private() {
        let dir = std::env::temp_dir().join(format!("dormouse-keys-{}", uuid::Uuid::new_v4()));
        let first = InstallationKeys::open_or_create(&dir).expect("make");
        let token = first.signer.sign(wire::Scope::Service, std::time::Duration::from_secs(60)).expect("sign");
        let second = InstallationKeys::open_or_create(&dir).expect("read");
        assert!(second.verifier.verify(&token).expect("verify").is_service());
        let mode = |path: &Path| fs::metadata(path).expect("file").permissions().mode() & 0o777;
        assert_eq!(mode(&second.paths.token_private), 0o600);
        let stored = make_admin_key(&second.paths.admin).expect("admin key");
        assert_eq!(mode(&second.paths.admin), 0o600);
        let key = fs::read_to_string(&second.paths.admin).expect("read");
        assert_eq!(hash_text(&hash(key.trim())), stored);
        fs::remove_dir_all(dir).expect("clean up");
    }

    #[test]
    fn equality_is_exact() {
        assert!(equal(b"abc", b"abc") && equal(b"", b""));
        assert!(!equal(b"abc", b"abd") && !equal(b"abc", b"ab") && !equal(b"", b"a"));
    }
}
