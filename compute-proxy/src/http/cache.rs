//! Answers that are kept for a while, and what is known of queries whose answers may be.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use control_plane_api::internal::QueryCache;
use moka::{Expiry, sync::Cache};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::{cache_policy::CachePolicy, error::SqlError, merged::Merged};

/// Bytes that an answer costs beside its own.
const OVERHEAD_BYTES: usize = 256;

/// Of all bytes, one answer may take this part.
const ANSWER_PART: u64 = 8;

/// Most queries of which it is remembered whether their answers may be kept.
const VERDICTS_MAX: u64 = 20_000;

/// How long that is remembered. A function that becomes volatile is noticed then.
const VERDICT_LIFETIME: Duration = Duration::from_secs(300);

/// Stands for all that an answer depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    /// Of these parts, in this order.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        Self(hash.finalize().into())
    }

    /// Its bytes, as part of another key.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// All kept answers, of all endpoints; those used least make room.
pub struct AnswerCache {
    answers: Cache<Key, Arc<Kept>>,
    answer_max_bytes: u64,
    verdicts: Cache<Key, bool>,
    /// Answers that are being fetched anew.
    refreshing: Mutex<HashSet<Key>>,
    /// Answers that are being fetched; `None`: they may not be kept after all.
    pub fetching: Merged<Key, Result<Option<Bytes>, SqlError>>,
    /// Queries of which it is being asked whether their answers may be kept.
    pub analysing: Merged<Key, Result<bool, SqlError>>,
}

/// A kept answer.
pub struct Kept {
    /// Its JSON.
    pub json: Bytes,
    /// When its query began.
    asked: Instant,
    max_age: Duration,
    stale: Duration,
    /// The number of invalidations that its endpoint, and each of its tags, had when its query began.
    all: u64,
    tags: Vec<(String, u64)>,
}

/// What was found.
pub enum Found {
    /// To be used as it is.
    Fresh(Arc<Kept>),
    /// To be used, and to be fetched anew.
    Stale(Arc<Kept>),
    /// Nothing that may be used.
    Nothing,
}

struct AsLongAsUsed;

impl Expiry<Key, Arc<Kept>> for AsLongAsUsed {
    fn expire_after_create(&self, _: &Key, kept: &Arc<Kept>, _: Instant) -> Option<Duration> {
        Some(kept.max_age + kept.stale)
    }

    fn expire_after_update(&self, _: &Key, kept: &Arc<Kept>, _: Instant, _: Option<Duration>) -> Option<Duration> {
        Some(kept.max_age + kept.stale)
    }
}

impl Kept {
    /// An answer whose query began at `asked`, when the endpoint's invalidations were `known`.
    pub fn new(json: Bytes, asked: Instant, policy: &CachePolicy, known: &QueryCache) -> Self {
        let tags = policy.tags.iter().map(|tag| (tag.clone(), number(known, tag))).collect();
        Self { json, asked, max_age: policy.max_age, stale: policy.stale, all: known.all, tags }
    }

    /// How old it is.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.asked)
    }

    /// False when it was invalidated since its query began.
    fn is_valid(&self, known: &QueryCache) -> bool {
        self.all == known.all && self.tags.iter().all(|(tag, then)| *then == number(known, tag))
    }
}

fn number(known: &QueryCache, tag: &str) -> u64 {
    known.tags.get(tag).copied().unwrap_or(0)
}

impl AnswerCache {
    /// For so many bytes of answers.
    pub fn new(bytes: u64) -> Self {
        let cost = |_: &Key, kept: &Arc<Kept>| u32::try_from(kept.json.len() + OVERHEAD_BYTES).unwrap_or(u32::MAX);
        let answers = Cache::builder().max_capacity(bytes).weigher(cost).expire_after(AsLongAsUsed).build();
        let verdicts = Cache::builder().max_capacity(VERDICTS_MAX).time_to_live(VERDICT_LIFETIME).build();
        Self {
            answers,
            answer_max_bytes: bytes / ANSWER_PART,
            verdicts,
            refreshing: Mutex::default(),
            fetching: Merged::default(),
            analysing: Merged::default(),
        }
    }

    /// Looks for an answer that this request may have.
    pub fn find(&self, now: Instant, key: &Key, policy: &CachePolicy, known: &QueryCache) -> Found {
        let Some(kept) = self.answers.get(key).filter(|kept| kept.is_valid(known)) else { return Found::Nothing };
        // Who asks now may want a fresher one than who asked then.
        let (max_age, stale) = (kept.max_age.min(policy.max_age), kept.stale.min(policy.stale));
        match kept.age(now) {
            age if age < max_age => Found::Fresh(kept),
            age if age < max_age + stale => Found::Stale(kept),
            _ => Found::Nothing,
        }
    }

    /// Keeps an answer, if it is not too large.
    pub fn keep(&self, key: Key, kept: Kept) {
        if kept.json.len() as u64 <= self.answer_max_bytes {
            self.answers.insert(key, Arc::new(kept));
        }
    }

    /// Whether answers to a query may be kept, if that is known.
    pub fn verdict(&self, query: &Key) -> Option<bool> {
        self.verdicts.get(query)
    }

    /// Remembers it.
    pub fn set_verdict(&self, query: Key, stable: bool) {
        self.verdicts.insert(query, stable);
    }

    /// Leave to fetch an answer anew; `None`: somebody does.
    pub fn refresh(self: &Arc<Self>, key: Key) -> Option<Refreshing> {
        let first = self.refreshing.lock().insert(key);
        first.then(|| Refreshing { cache: self.clone(), key })
    }
}

/// An answer is being fetched anew.
pub struct Refreshing {
    cache: Arc<AnswerCache>,
    key: Key,
}

impl Drop for Refreshing {
    fn drop(&mut self) {
        self.cache.refreshing.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(max_age: u64, stale: u64, tags: &[&str]) -> CachePolicy {
        let tags = tags.iter().map(|tag| (*tag).to_owned()).collect();
        CachePolicy { max_age: Duration::from_secs(max_age), stale: Duration::from_secs(stale), tags }
    }

    fn name(found: &Found) -> &'static str {
        match found {
            Found::Fresh(_) => "fresh",
            Found::Stale(_) => "stale",
            Found::Nothing => "nothing",
        }
    }

    fn known(all: u64, tags: &[(&str, u64)]) -> QueryCache {
        let tags = tags.iter().map(|(tag, number)| ((*tag).to_owned(), *number)).collect();
        QueryCache { settings: None, all, tags }
    }

    #[test]
    fn answers_age() {
        let cache = AnswerCache::new(100_000);
        let (key, known, begun) = (Key::of([&b"a"[..]]), known(0, &[]), Instant::now());
        cache.keep(key, Kept::new(Bytes::from_static(b"{}"), begun, &policy(10, 20, &[]), &known));
        for (second, max_age, stale, wanted) in [
            (9, 10, 20, "fresh"),
            (11, 10, 20, "stale"),
            // It was kept for ten seconds.
            (11, 100, 20, "stale"),
            // Who asks now wants none that is stale, or none so old.
            (11, 10, 0, "nothing"),
            (11, 5, 6, "nothing"),
            (31, 10, 20, "nothing"),
            (31, 100, 100, "nothing"),
        ] {
            let now = begun + Duration::from_secs(second);
            let found = cache.find(now, &key, &policy(max_age, stale, &[]), &known);
            assert_eq!(name(&found), wanted, "{second} {max_age} {stale}");
        }
    }

    #[test]
    fn answers_are_invalidated_by_tag_and_all_at_once() {
        let cache = AnswerCache::new(100_000);
        let (key, policy, now) = (Key::of([&b"a"[..]]), policy(10, 0, &["x", "y"]), Instant::now());
        cache.keep(key, Kept::new(Bytes::new(), now, &policy, &known(1, &[("x", 3)])));
        let found = |known: &QueryCache| name(&cache.find(now, &key, &policy, known));
        assert_eq!(found(&known(1, &[("x", 3)])), "fresh");
        assert_eq!(found(&known(1, &[("x", 3), ("z", 1)])), "fresh");
        for other in [known(2, &[("x", 3)]), known(1, &[("x", 4)]), known(1, &[("x", 3), ("y", 1)]), known(1, &[])] {
            assert_eq!(found(&other), "nothing", "{other:?}");
        }
    }

    #[test]
    fn memory_is_bounded() {
        let cache = AnswerCache::new(100_000);
        for number in 0..1000_u32 {
            let kept = Kept::new(vec![0; 1000].into(), Instant::now(), &policy(10, 0, &[]), &known(0, &[]));
            cache.keep(Key::of([&number.to_be_bytes()[..]]), kept);
        }
        cache.answers.run_pending_tasks();
        assert!(cache.answers.weighted_size() <= 100_000 && cache.answers.entry_count() > 50);
        let large = Key::of([&b"large"[..]]);
        cache.keep(large, Kept::new(vec![0; 20_000].into(), Instant::now(), &policy(10, 0, &[]), &known(0, &[])));
        assert_eq!(name(&cache.find(Instant::now(), &large, &policy(10, 0, &[]), &known(0, &[]))), "nothing");
    }

    #[test]
    fn one_fetches_anew() {
        let cache = Arc::new(AnswerCache::new(1000));
        let key = Key::of([&b"a"[..]]);
        let first = cache.refresh(key).expect("the first");
        assert!(cache.refresh(key).is_none());
        drop(first);
        assert!(cache.refresh(key).is_some());
    }

    #[test]
    fn parts_do_not_run_together() {
        assert_ne!(Key::of([&b"ab"[..], b"c"]), Key::of([&b"a"[..], b"bc"]));
    }
}
