//! How many files the process may have open: a shell's or a service's usual 1,024 would be a tenth of the clients that the proxy
//! says it takes.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files apart from sessions': listeners, connections to the control plane, logs, certificates.
const RESERVE: u64 = 512;

/// Raises the limit to what this many sessions may need, each a client's socket and one to a compute, as far as an ordinary
/// process may. Warns when that is not far enough.
pub fn raise_limit(sessions: usize) {
    let needed = u64::try_from(sessions).unwrap_or(u64::MAX).saturating_mul(2).saturating_add(RESERVE);
    let limit = getrlimit(Resource::Nofile);
    if let Some(current) = raised(limit.current, limit.maximum, needed)
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: Some(current), maximum: limit.maximum })
    {
        tracing::warn!(%error, current, "cannot raise the limit of open files");
    }
    if let Some(open_files) = getrlimit(Resource::Nofile).current.filter(|current| *current < needed) {
        tracing::warn!(
            open_files,
            needed,
            "the limit of open files is lower than --max-connections may need (ulimit -n, LimitNOFILE=): clients may be refused"
        );
    }
}

/// What the limit is to become; `None`: it is high enough, or can't be higher. A limit of `None` is none.
fn raised(current: Option<u64>, maximum: Option<u64>, needed: u64) -> Option<u64> {
    let wanted = maximum.map_or(needed, |maximum| needed.min(maximum));
    current.filter(|current| *current < wanted).map(|_| wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_as_far_as_needed_and_allowed() {
        assert_eq!(raised(Some(1024), Some(4096), 2000), Some(2000));
        assert_eq!(raised(Some(1024), Some(4096), 20_000), Some(4096));
        assert_eq!(raised(Some(1024), None, 20_000), Some(20_000));
        assert_eq!(raised(Some(4096), Some(4096), 20_000), None);
        assert_eq!(raised(Some(30_000), None, 20_000), None);
        assert_eq!(raised(None, None, 20_000), None);
    }
}
