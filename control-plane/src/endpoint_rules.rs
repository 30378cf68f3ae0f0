//! What may be asked of an endpoint.

use control_plane_api::v2::{EndpointFields, EndpointSettings, QueryCacheSettings};
use types::BranchRef;

use crate::{
    compute::idle::MAX_SUSPEND_TIMEOUT_SECONDS,
    names,
    problem::Problem,
    store::{
        endpoints::{self, EndpointRow},
        projects,
    },
};

const MAX_SETTINGS: usize = 100;
const MAX_SETTING_BYTES: usize = 1000;
const MAX_TAGS: usize = 100;
const MAX_TAG_BYTES: usize = 64;
const MAX_CACHED_SECONDS: u32 = 24 * 3600;

/// A request for an endpoint, checked.
#[derive(Debug, Clone)]
pub struct WantedEndpoint {
    name: Option<String>,
    suspend_timeout_seconds: Option<i64>,
    settings: EndpointSettings,
}

impl WantedEndpoint {
    /// Checks all but the branch.
    pub fn new(fields: EndpointFields) -> Result<WantedEndpoint, Problem> {
        if let Some(kind) = fields.kind.filter(|kind| kind != "read_write") {
            let kind: String = kind.chars().take(40).collect();
            return Err(Problem::Invalid(format!("endpoint type {kind:?} is not offered; read_write is")));
        }
        Ok(WantedEndpoint {
            name: fields.name.map(|name| names::check_title("endpoint", &name)).transpose()?,
            suspend_timeout_seconds: check_suspend_timeout(fields.suspend_timeout_seconds)?,
            settings: check_settings(fields.settings.unwrap_or_default())?,
        })
    }

    /// Makes it.
    pub fn insert(&self, db: &rusqlite::Connection, branch: &BranchRef) -> Result<EndpointRow, Problem> {
        let default = projects::get(db, &branch.project)?.default_suspend_timeout_seconds;
        let timeout = self.suspend_timeout_seconds.unwrap_or(default);
        endpoints::insert(db, &names::endpoint_id(), branch, self.name.as_deref(), timeout, &self.settings)
    }
}

/// Applies a change to a row.
pub fn change(row: &mut EndpointRow, fields: EndpointFields) -> Result<(), Problem> {
    if let Some(name) = fields.name {
        row.name = Some(names::check_title("endpoint", &name)?);
    }
    if let Some(timeout) = check_suspend_timeout(fields.suspend_timeout_seconds)? {
        row.suspend_timeout_seconds = timeout;
    }
    if let Some(disabled) = fields.disabled {
        row.disabled = disabled;
    }
    if let Some(settings) = fields.settings {
        row.settings = check_settings(settings)?;
    }
    Ok(())
}

/// -1 (never), 0 (default) or up to a week.
pub fn check_suspend_timeout(seconds: Option<i64>) -> Result<Option<i64>, Problem> {
    match seconds {
        Some(seconds) if !(-1..=MAX_SUSPEND_TIMEOUT_SECONDS).contains(&seconds) => {
            let message = format!(
                "suspend_timeout_seconds must be -1 (never), 0 (default) or up to {MAX_SUSPEND_TIMEOUT_SECONDS}"
            );
            Err(Problem::Invalid(message))
        }
        other => Ok(other),
    }
}

/// Tags of kept answers to invalidate; none for all answers.
pub fn check_query_cache_tags(tags: Option<Vec<String>>) -> Result<Vec<String>, Problem> {
    let Some(tags) = tags else { return Ok(Vec::new()) };
    let good =
        |tag: &String| (1..=MAX_TAG_BYTES).contains(&tag.len()) && tag.bytes().all(|byte| byte.is_ascii_graphic());
    if !tags.is_empty() && tags.len() <= MAX_TAGS && tags.iter().all(good) {
        return Ok(tags);
    }
    let message = format!(
        "tags must be 1 to {MAX_TAGS} texts of 1 to {MAX_TAG_BYTES} visible ASCII characters; leave them out to invalidate all"
    );
    Err(Problem::Invalid(message))
}

/// Sizes only: which settings a compute may have is its agent's to say.
fn check_settings(settings: EndpointSettings) -> Result<EndpointSettings, Problem> {
    let cached = |cache: QueryCacheSettings| cache.max_age.saturating_add(cache.stale_while_revalidate);
    if settings.query_cache.is_some_and(|cache| cache.max_age == 0 || cached(cache) > MAX_CACHED_SECONDS) {
        let message =
            format!("settings.query_cache: max_age must be 1 or more, both together at most {MAX_CACHED_SECONDS}");
        return Err(Problem::Invalid(message));
    }
    let good = settings.pg_settings.len() <= MAX_SETTINGS
        && settings.pg_settings.iter().all(|(name, value)| {
            let text = |text: &str| text.len() <= MAX_SETTING_BYTES && !text.chars().any(char::is_control);
            !name.is_empty() && text(name) && text(value)
        });
    if good {
        Ok(settings)
    } else {
        Err(Problem::Invalid("settings.pg_settings: too many, too long or not plain text".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_checked() {
        let fields = |timeout: i64| EndpointFields { suspend_timeout_seconds: Some(timeout), ..Default::default() };
        assert!([-1, 0, 1, 604_800].iter().all(|timeout| WantedEndpoint::new(fields(*timeout)).is_ok()));
        assert!([-2, 604_801].iter().all(|timeout| WantedEndpoint::new(fields(*timeout)).is_err()));
        let cache = |max_age, stale_while_revalidate| EndpointFields {
            settings: Some(EndpointSettings {
                query_cache: Some(QueryCacheSettings { max_age, stale_while_revalidate }),
                ..Default::default()
            }),
            ..Default::default()
        };
        assert!(WantedEndpoint::new(cache(1, 86_399)).is_ok());
        assert!(
            [(0, 1), (1, 86_400), (u32::MAX, u32::MAX)]
                .iter()
                .all(|(a, b)| WantedEndpoint::new(cache(*a, *b)).is_err())
        );
        let tags = |tags: &[&str]| check_query_cache_tags(Some(tags.iter().map(|tag| (*tag).to_owned()).collect()));
        assert!(check_query_cache_tags(None).is_ok_and(|tags| tags.is_empty()));
        assert!(tags(&["a", "b:c"]).is_ok() && tags(&[]).is_err() && tags(&["a b"]).is_err() && tags(&[""]).is_err());
        let replica = EndpointFields { kind: Some("read_only".into()), ..Default::default() };
        assert!(WantedEndpoint::new(replica).is_err());
    }
}
