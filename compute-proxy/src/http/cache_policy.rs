//! What a request says about keeping its answer: the header `Dormouse-Cache`, written as `Cache-Control` is. Pure.

use std::time::Duration;

use control_plane_api::v2::QueryCacheSettings;

/// Longest time that an answer is used, stale or not.
const LIFETIME_MAX_SECONDS: u32 = 24 * 3600;

/// Tags that one answer may have.
const TAGS_MAX: usize = 16;

/// Bytes that a tag may have.
const TAG_MAX_BYTES: usize = 64;

/// How an answer is to be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachePolicy {
    /// So long it is used as it is.
    pub max_age: Duration,
    /// So much longer it is used while a newer one is fetched.
    pub stale: Duration,
    /// Names by which it can be invalidated.
    pub tags: Vec<String>,
}

/// What a request asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheWish {
    no_store: bool,
    max_age: Option<u32>,
    stale: Option<u32>,
    tags: Vec<String>,
}

impl CacheWish {
    /// `max-age=60, stale-while-revalidate=300, tag=products`, each part as often as it makes sense; or `no-store`.
    pub fn parse(text: &str) -> Result<Self, CachePolicyError> {
        let mut wish = Self::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            match part.split_once('=') {
                None if part == "no-store" => wish.no_store = true,
                Some(("max-age", value)) => wish.max_age = Some(seconds(value)?),
                Some(("stale-while-revalidate", value)) => wish.stale = Some(seconds(value)?),
                Some(("tag", tag)) if is_tag(tag) && wish.tags.len() < TAGS_MAX => wish.tags.push(tag.to_owned()),
                Some(("tag", _)) => return Err(CachePolicyError::Tag),
                _ => return Err(CachePolicyError::Unknown),
            }
        }
        if wish.max_age.unwrap_or(0).saturating_add(wish.stale.unwrap_or(0)) > LIFETIME_MAX_SECONDS {
            return Err(CachePolicyError::TooLong);
        }
        Ok(wish)
    }

    /// How the answer is to be kept, with the endpoint's setting for what the request leaves open. `None`: not at all.
    pub fn policy(self, default: Option<QueryCacheSettings>) -> Option<CachePolicy> {
        let max_age = self.max_age.or(default.map(|default| default.max_age)).filter(|max_age| *max_age > 0)?;
        let stale = match (self.stale, self.max_age) {
            (Some(stale), _) => stale,
            // A request that says how long says all of it.
            (None, Some(_)) => 0,
            (None, None) => default.map_or(0, |default| default.stale_while_revalidate),
        };
        let of = |seconds: u32| Duration::from_secs(u64::from(seconds));
        (!self.no_store).then(|| CachePolicy { max_age: of(max_age), stale: of(stale), tags: self.tags })
    }
}

fn seconds(text: &str) -> Result<u32, CachePolicyError> {
    text.parse().map_err(|_| CachePolicyError::Seconds)
}

fn is_tag(text: &str) -> bool {
    (1..=TAG_MAX_BYTES).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// What is wrong with the header. The texts are for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CachePolicyError {
    /// Not a number.
    #[error("Dormouse-Cache: max-age and stale-while-revalidate are whole seconds")]
    Seconds,
    /// A tag that cannot be one, or too many.
    #[error("Dormouse-Cache: up to 16 tags of 1 to 64 visible ASCII characters")]
    Tag,
    /// A longer time than answers are kept.
    #[error("Dormouse-Cache: max-age and stale-while-revalidate may be a day together")]
    TooLong,
    /// Another word.
    #[error("Dormouse-Cache: only max-age, stale-while-revalidate, tag and no-store are known")]
    Unknown,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy(text: &str, default: Option<(u32, u32)>) -> Option<(u64, u64, usize)> {
        let settings = |(max_age, stale_while_revalidate)| QueryCacheSettings { max_age, stale_while_revalidate };
        let policy = CacheWish::parse(text).expect(text).policy(default.map(settings))?;
        Some((policy.max_age.as_secs(), policy.stale.as_secs(), policy.tags.len()))
    }

    #[test]
    fn the_request_overrules_the_endpoint() {
        for (text, default, wanted) in [
            ("", None, None),
            ("", Some((5, 6)), Some((5, 6, 0))),
            ("max-age=60", None, Some((60, 0, 0))),
            ("max-age=60", Some((5, 6)), Some((60, 0, 0))),
            ("tag=a", None, None),
            ("tag=a,tag=b", Some((5, 6)), Some((5, 6, 2))),
            (" max-age=1 , stale-while-revalidate=2,tag=x:y=z ", None, Some((1, 2, 1))),
            ("max-age=0", Some((5, 6)), None),
            ("no-store", Some((5, 6)), None),
            ("no-store, max-age=7", None, None),
        ] {
            assert_eq!(policy(text, default), wanted, "{text}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        use CachePolicyError::*;
        for (text, error) in [
            ("max-age", Unknown),
            ("max-age=x", Seconds),
            ("max-age=-1", Seconds),
            ("max-age=86400, stale-while-revalidate=1", TooLong),
            ("max-age=4294967295, stale-while-revalidate=4294967295", TooLong),
            ("tag=", Tag),
            ("tag=a b", Tag),
            ("public", Unknown),
        ] {
            assert_eq!(CacheWish::parse(text), Err(error), "{text}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(text in "\\PC{0,40}") {
            let _ = CacheWish::parse(&text);
        }
    }
}
