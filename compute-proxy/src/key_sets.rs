//! The key sets of issuers of tokens: fetched from where they are published, kept, and fetched anew.

use std::{sync::Arc, time::Duration};

use control_plane_api::internal::TokenIssuer;
use moka::sync::Cache;
use parking_lot::Mutex;
use reqwest::{Client, StatusCode, redirect::Policy};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};

use crate::{
    coalesce::Coalesce,
    token::{Claims, KeySet, Token, TokenError},
};

/// Most key sets that are kept.
const SETS_MAX: u64 = 10_000;

/// A key set that nobody asks for is forgotten.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);

/// Key sets that are fetched at a time.
const FETCHES_MAX: usize = 32;

/// How long fetching one may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes that one may have.
const SET_MAX_BYTES: usize = 128 * 1024;

/// How long a token waits for a newer key set when there is an old one.
const PATIENCE: Duration = Duration::from_millis(500);

/// How long an old key set is used while its issuer gives no newer one.
const STALE_LIMIT: Duration = Duration::from_secs(3600);

/// When key sets are fetched anew.
#[derive(Debug, Clone, Copy)]
pub struct KeySetOptions {
    /// So long one is used before it is fetched anew.
    pub max_age: Duration,
    /// So long after a fetch there is none for a token with an unknown key, or after one that failed.
    pub min_interval: Duration,
}

/// All key sets that are in use, by their URL. Cheap to clone.
#[derive(Clone)]
pub struct KeySets {
    client: Client,
    options: KeySetOptions,
    sets: Cache<Arc<str>, Arc<Mutex<Known>>>,
    fetching: Arc<Coalesce<Arc<str>, ()>>,
    fetches: Arc<Semaphore>,
}

/// What is known of one key set. No clock inside.
#[derive(Debug, Default)]
struct Known {
    /// The newest, and when it was asked for.
    set: Option<(Arc<KeySet>, Instant)>,
    /// When it was last asked for, with whatever outcome.
    asked: Option<Instant>,
}

impl Known {
    fn usable(&self, now: Instant) -> Option<Arc<KeySet>> {
        self.set.as_ref().filter(|(_, asked)| now - *asked < STALE_LIMIT).map(|(set, _)| set.clone())
    }

    fn is_fresh(&self, now: Instant, max_age: Duration) -> bool {
        self.set.as_ref().is_some_and(|(_, asked)| now - *asked < max_age)
    }

    fn may_be_asked(&self, now: Instant, min_interval: Duration) -> bool {
        self.asked.is_none_or(|asked| now - asked >= min_interval)
    }

    fn answered(&mut self, asked: Instant, set: Option<KeySet>) {
        self.asked = Some(asked);
        if let Some(set) = set {
            self.set = Some((Arc::new(set), asked));
        }
    }
}

impl KeySets {
    /// Nothing is known yet.
    pub fn new(options: KeySetOptions) -> reqwest::Result<Self> {
        // Where a redirect leads is not what the project's owner has written down.
        let client = Client::builder().redirect(Policy::none()).timeout(FETCH_TIMEOUT).build()?;
        let sets = Cache::builder().max_capacity(SETS_MAX).time_to_idle(FORGOTTEN_AFTER).build();
        Ok(Self { client, options, sets, fetching: Arc::default(), fetches: Arc::new(Semaphore::new(FETCHES_MAX)) })
    }

    /// The claims of a token that one of the issuers has signed.
    pub async fn verify(&self, issuers: &[TokenIssuer], token: &Token<'_>) -> Result<Claims, VerifyError> {
        let (mut refused, mut unavailable) = (TokenError::UnknownKey, false);
        for issuer in issuers {
            let Some(set) = self.set_for(&issuer.jwks_url, token).await else {
                unavailable = true;
                continue;
            };
            match set.verify(token, issuer.audience.as_deref(), issuer.issuer.as_deref()) {
                Ok(claims) => return Ok(claims),
                Err(error) if refused != TokenError::Expired => refused = error,
                Err(_) => {}
            }
        }
        let is_unavailable = unavailable && refused != TokenError::Expired;
        Err(if is_unavailable { VerifyError::Unavailable } else { VerifyError::Refused(refused) })
    }

    /// The issuer's keys; fetched anew when they are too old, or have none that may have signed the token.
    async fn set_for(&self, url: &str, token: &Token<'_>) -> Option<Arc<KeySet>> {
        let url: Arc<str> = url.into();
        let known = self.sets.get_with(url.clone(), Arc::default);
        let (usable, wanted) = {
            let (known, now) = (known.lock(), Instant::now());
            let usable = known.usable(now);
            let serves = usable.as_ref().is_some_and(|set| set.has_key_for(token));
            let wanted = !known.is_fresh(now, self.options.max_age) || !serves;
            (usable, wanted && known.may_be_asked(now, self.options.min_interval))
        };
        if !wanted {
            return usable;
        }
        let fetching = self.fetch(url, known.clone());
        if usable.as_ref().is_some_and(|set| set.has_key_for(token)) {
            // When it takes longer than that the old one has to do; it is fetched all the same.
            let _ = timeout(PATIENCE, fetching).await;
        } else {
            fetching.await;
        }
        known.lock().usable(Instant::now())
    }

    /// Once for all who want it.
    async fn fetch(&self, url: Arc<str>, known: Arc<Mutex<Known>>) {
        let (client, fetches, min_interval) = (self.client.clone(), self.fetches.clone(), self.options.min_interval);
        let asked_for = url.clone();
        let work = move || async move {
            let Ok(_permit) = fetches.acquire().await else { return };
            let asked = Instant::now();
            // Somebody may have done so since it was found wanting.
            if !known.lock().may_be_asked(asked, min_interval) {
                return;
            }
            let fetched = fetch_once(&client, &asked_for).await;
            if let Err(error) = &fetched {
                tracing::warn!(url = &*asked_for, %error, "cannot fetch the keys of an issuer of tokens");
            }
            known.lock().answered(asked, fetched.ok());
        };
        self.fetching.run(url, work).await;
    }
}

async fn fetch_once(client: &Client, url: &str) -> Result<KeySet, FetchError> {
    let mut response = client.get(url).send().await.map_err(reqwest::Error::without_url)?;
    if !response.status().is_success() {
        return Err(FetchError::Status(response.status()));
    }
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(reqwest::Error::without_url)? {
        if body.len() + chunk.len() > SET_MAX_BYTES {
            return Err(FetchError::TooLong);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(KeySet::parse(&body)?)
}

/// Why there is no key set.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    /// No answer, or a broken one.
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    /// Another answer.
    #[error("the answer has status {0}")]
    Status(StatusCode),
    /// It is not for us.
    #[error("the answer is larger than {SET_MAX_BYTES} bytes")]
    TooLong,
    /// It is something else.
    #[error("the answer is no key set: {0}")]
    Format(#[from] serde_json::Error),
}

/// Why a token is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VerifyError {
    /// It is not good.
    Refused(TokenError),
    /// It cannot be told whether it is.
    Unavailable,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_set_is_fetched_when_it_is_old_but_not_all_the_time() {
        let (begun, seconds) = (Instant::now(), Duration::from_secs);
        let mut known = Known::default();
        assert!(known.usable(begun).is_none() && !known.is_fresh(begun, seconds(300)));
        assert!(known.may_be_asked(begun, seconds(10)));

        known.answered(begun, None);
        assert!(!known.may_be_asked(begun + seconds(9), seconds(10)), "a failure is not repeated at once");
        assert!(known.may_be_asked(begun + seconds(10), seconds(10)));

        let asked = begun + seconds(10);
        known.answered(asked, Some(KeySet::parse(br#"{"keys":[]}"#).expect("a set")));
        assert!(
            known.is_fresh(asked + seconds(299), seconds(300)) && !known.is_fresh(asked + seconds(300), seconds(300))
        );
        known.answered(asked + seconds(400), None);
        assert!(known.usable(asked + seconds(3599)).is_some(), "an old one is better than none");
        assert!(known.usable(asked + seconds(3600)).is_none(), "but not for ever");
    }
}
