//! Texts of queries that come again and again: server connections keep these prepared, which spares Postgres their parsing
//! and, where it thinks that as good, their planning.

use std::{
    hash::{BuildHasher, RandomState},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use types::EndpointId;

/// Texts that are remembered. Of two that fall on the same place the later one counts: it costs the other a parse.
const PLACES: usize = 16 * 1024;

/// Bytes of a text that is worth it: longer ones would fill the memory of Postgres's sessions.
const TEXT_MAX_BYTES: usize = 8 * 1024;

/// Remembers which texts have been run before, by a hash.
pub struct Repeated {
    places: Box<[AtomicU64]>,
    hasher: RandomState,
}

impl Default for Repeated {
    fn default() -> Self {
        Self { places: (0..PLACES).map(|_| AtomicU64::new(0)).collect(), hasher: RandomState::new() }
    }
}

/// Stands for a text on an endpoint.
#[derive(Debug, Clone, Copy)]
pub struct Place(u64);

impl Repeated {
    /// Where a text is remembered; `None`: it is too long.
    pub fn place(&self, endpoint: &EndpointId, text: &str) -> Option<Place> {
        (text.len() <= TEXT_MAX_BYTES).then(|| Place(self.hasher.hash_one((endpoint, text)) | 1))
    }

    /// True when it was run before.
    pub fn contains(&self, place: Place) -> bool {
        self.slot(place).load(Relaxed) == place.0
    }

    /// It was run without an error.
    pub fn insert(&self, place: Place) {
        self.slot(place).store(place.0, Relaxed);
    }

    fn slot(&self, Place(hash): Place) -> &AtomicU64 {
        &self.places[(hash >> 1) as usize % PLACES]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_remembered_for_its_endpoint() {
        let repeated = Repeated::default();
        let [one, other] = ["ep-a-1", "ep-b-1"].map(|id| EndpointId::try_from(id.to_owned()).expect("an id"));
        let place = repeated.place(&one, "select 1").expect("short");
        assert!(!repeated.contains(place));
        repeated.insert(place);
        assert!(repeated.contains(repeated.place(&one, "select 1").expect("short")));
        assert!(!repeated.contains(repeated.place(&other, "select 1").expect("short")));
        assert!(!repeated.contains(repeated.place(&one, "select 2").expect("short")));
        assert!(repeated.place(&one, &"x".repeat(TEXT_MAX_BYTES + 1)).is_none());
    }
}
