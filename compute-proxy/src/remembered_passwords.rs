//! Passwords in clear text that were found good: hashing one again takes milliseconds, which is longer than most queries.

use std::time::Duration;

use moka::sync::Cache;

use crate::scram::hmac;

/// Most passwords that are remembered.
const MAX: u64 = 100_000;

/// How long one is remembered.
const LIFETIME: Duration = Duration::from_secs(3600);

/// Remembers pairs of a verifier and the password that fits it, as a keyed hash. With another verifier it is another pair,
/// so nothing has to be forgotten when a password changes.
pub struct RememberedPasswords {
    pairs: Cache<Pair, ()>,
    /// New with every process.
    secret: [u8; 32],
}

/// Stands for a verifier and a password.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pair([u8; 32]);

impl Default for RememberedPasswords {
    fn default() -> Self {
        Self { pairs: Cache::builder().max_capacity(MAX).time_to_live(LIFETIME).build(), secret: rand::random() }
    }
}

impl RememberedPasswords {
    /// `verifier`: as it is stored.
    pub fn pair(&self, verifier: &str, password: &[u8]) -> Pair {
        let verifier_bytes = (verifier.len() as u64).to_be_bytes();
        Pair(hmac(&self.secret, &[&verifier_bytes, verifier.as_bytes(), password]))
    }

    /// True when the password was found good for the verifier.
    pub fn contains(&self, pair: Pair) -> bool {
        self.pairs.contains_key(&pair)
    }

    /// The password is good.
    pub fn insert(&self, pair: Pair) {
        self.pairs.insert(pair, ());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_remembered_for_its_verifier() {
        let remembered = RememberedPasswords::default();
        remembered.insert(remembered.pair("verifier", b"secret"));
        assert!(remembered.contains(remembered.pair("verifier", b"secret")));
        for (verifier, password) in [("verifier", "secret2"), ("verifie", "rsecret"), ("other", "secret")] {
            assert!(!remembered.contains(remembered.pair(verifier, password.as_bytes())), "{verifier} {password}");
        }
    }
}
