//! What a `postgres` process needs to run under the shim.

use std::{ffi::OsString, path::Path};

use page_cache::PageCacheConfig;

/// Environment variables for the `postgres` process; programs that it starts itself are not affected.
///
/// All paths must be absolute. `shim_path` is `libdormouse_shim.so`.
pub fn shim_environment(
    shim_path: &Path,
    pgdata: &Path,
    socket: &Path,
    cache: &PageCacheConfig,
) -> Vec<(OsString, OsString)> {
    [
        ("LD_PRELOAD", shim_path),
        ("DORMOUSE_SHIM_PGDATA", pgdata),
        ("DORMOUSE_SHIM_SOCKET", socket),
        ("DORMOUSE_SHIM_INDEX", &cache.shm_path),
        ("DORMOUSE_SHIM_PAGES", &cache.pages_path),
    ]
    .into_iter()
    .map(|(name, path)| (OsString::from(name), path.as_os_str().to_owned()))
    .collect()
}

/// Lines of `postgresql.conf` without which the shim's promises do not hold (or cost more than they need to).
pub fn required_settings() -> Vec<(&'static str, &'static str)> {
    vec![
        // A WAL sync is the quorum: it must reach the shim, as an fdatasync.
        ("fsync", "on"),
        ("wal_sync_method", "fdatasync"),
        // No page is ever torn, and the pageserver makes its own images.
        ("full_page_writes", "off"),
        ("wal_log_hints", "off"),
        // The shared page cache's locks do not outlive a crashed backend.
        ("restart_after_crash", "off"),
        // A recycled segment holds old records behind the end of WAL.
        ("wal_recycle", "off"),
        ("wal_init_zero", "off"),
        // `minimal` would leave relations out of WAL.
        ("wal_level", "replica"),
        ("data_sync_retry", "off"),
    ]
}
