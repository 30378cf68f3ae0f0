//! The configuration files of a compute's Postgres.

use std::{collections::BTreeMap, fmt::Write, path::Path};

use types::EndpointId;

use crate::backpressure::DEFAULT_MAX_LAG_MIB;

/// Everyone who can reach the socket is trusted: its directory is private to Dormouse's user.
pub const PG_HBA: &str = "local all all trust\nlocal replication all trust\n";

/// Settings that a compute starts with and that may be changed.
const DEFAULTS: &[(&str, &str)] = &[
    ("max_connections", "100"),
    ("shared_buffers", "128MB"),
    ("wal_level", "replica"),
    ("max_prepared_transactions", "100"),
    // Local WAL serves nobody once a quorum has it: keep little of it.
    ("max_wal_size", "256MB"),
    ("min_wal_size", "32MB"),
    // Users may make replication slots; one that nobody reads must not fill the host's disk.
    ("max_slot_wal_keep_size", "1GB"),
    ("synchronous_commit", "on"),
    ("autovacuum", "on"),
    ("password_encryption", "scram-sha-256"),
    ("log_line_prefix", "[%p] %q%u@%d "),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
    ("datestyle", "iso, mdy"),
    ("lc_messages", "C.UTF-8"),
    ("lc_monetary", "C.UTF-8"),
    ("lc_numeric", "C.UTF-8"),
    ("lc_time", "C.UTF-8"),
    ("default_text_search_config", "pg_catalog.english"),
];

/// Settings that Dormouse's safety or its agent depends on.
const FIXED: &[(&str, &str)] = &[
    ("listen_addresses", ""),
    ("port", "5432"),
    ("unix_socket_permissions", "0700"),
    ("restart_after_crash", "off"),
    ("logging_collector", "off"),
    ("log_destination", "stderr"),
    // In the compute's directory, so that a killed Postgres leaves nothing behind in /dev/shm.
    ("dynamic_shared_memory_type", "mmap"),
];

/// What else must not be set from outside: paths and programs of the host, and whatever assumes a local, lasting WAL.
const REFUSED: &[&str] = &[
    "allow_in_place_tablespaces",
    "archive_cleanup_command",
    "archive_command",
    "archive_library",
    "archive_mode",
    "bonjour",
    "cluster_name",
    "config_file",
    "data_directory",
    "data_sync_retry",
    "external_pid_file",
    "hba_file",
    "ident_file",
    "ignore_system_indexes",
    "include",
    "include_dir",
    "include_if_exists",
    "krb_server_keyfile",
    "log_directory",
    "log_filename",
    "primary_conninfo",
    "primary_slot_name",
    "promote_trigger_file",
    "recovery_end_command",
    "recovery_init_sync_method",
    "restore_command",
    "synchronous_standby_names",
    "unix_socket_directories",
    "unix_socket_group",
    "zero_damaged_pages",
];

/// Longest value, bytes.
const MAX_VALUE_BYTES: usize = 8 * 1024;
/// Most settings in a spec.
const MAX_SETTINGS: usize = 500;

/// A setting that a compute cannot be given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// Dormouse decides it.
    #[error("setting {0} may not be changed: Dormouse depends on it")]
    Fixed(String),
    /// Neither a name nor a class and a name.
    #[error("not the name of a setting: {0:?}")]
    Name(String),
    /// It cannot be written on one line of `postgresql.conf`, or is too long.
    #[error("the value of setting {0} has control characters or is over {MAX_VALUE_BYTES} bytes")]
    Value(String),
    /// A spec with too many of them.
    #[error("more than {MAX_SETTINGS} settings")]
    TooMany,
}

/// Settings whose values `pg_control` repeats. Where the two differ at a start, Postgres writes a record and waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControlSettings {
    /// 1 for replica, 2 for logical (`WalLevel` in `access/xlog.h`).
    pub wal_level: i32,
    /// `max_connections`.
    pub max_connections: i32,
    /// `max_worker_processes`.
    pub max_worker_processes: i32,
    /// `max_wal_senders`.
    pub max_wal_senders: i32,
    /// `max_prepared_transactions`.
    pub max_prepared_xacts: i32,
    /// `max_locks_per_transaction`.
    pub max_locks_per_xact: i32,
    /// `track_commit_timestamp`.
    pub track_commit_timestamp: bool,
}

impl ControlSettings {
    /// As a compute with these settings has them. A value that only Postgres understands counts as its default: that costs
    /// a record and nothing else.
    pub fn of(wanted: &BTreeMap<String, String>) -> ControlSettings {
        let number = |name: &str, default: i32| wanted.get(name).and_then(|v| v.parse().ok()).unwrap_or(default);
        let logical = wanted.get("wal_level").is_some_and(|level| level == "logical");
        let timestamps = wanted.get("track_commit_timestamp");
        ControlSettings {
            wal_level: if logical { 2 } else { 1 },
            max_connections: number("max_connections", 100),
            max_worker_processes: number("max_worker_processes", 8),
            max_wal_senders: number("max_wal_senders", 10),
            max_prepared_xacts: number("max_prepared_transactions", 100),
            max_locks_per_xact: number("max_locks_per_transaction", 64),
            track_commit_timestamp: timestamps.is_some_and(|v| ["on", "true", "yes", "1"].contains(&v.as_str())),
        }
    }
}

/// The text of `postgresql.conf`. `required` are the shim's settings.
pub fn postgresql_conf(
    socket_dir: &Path,
    endpoint: &EndpointId,
    required: &[(&str, &str)],
    wanted: &BTreeMap<String, String>,
    page_cache_bytes: u64,
) -> Result<String, SettingError> {
    // Which of the two good levels is the branch's business.
    let required: Vec<_> = required.iter().copied().filter(|(name, _)| *name != "wal_level").collect();
    check(&required, wanted)?;
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name} = '{}'", value.replace('\\', "\\\\").replace('\'', "''"));
    };
    DEFAULTS.iter().for_each(|(name, value)| line(name, value));
    // A name that Postgres only remembers; the agent looks at it every second.
    line("dormouse.page_cache_mib", &(page_cache_bytes >> 20).max(1).to_string());
    line("dormouse.max_ingest_lag_mib", &DEFAULT_MAX_LAG_MIB.to_string());
    wanted.iter().for_each(|(name, value)| line(name, value));
    FIXED.iter().chain(&required).for_each(|(name, value)| line(name, value));
    line("unix_socket_directories", &socket_dir.to_string_lossy());
    line("cluster_name", endpoint.as_str());
    Ok(text)
}

fn check(required: &[(&str, &str)], wanted: &BTreeMap<String, String>) -> Result<(), SettingError> {
    if wanted.len() > MAX_SETTINGS {
        return Err(SettingError::TooMany);
    }
    for (name, value) in wanted {
        if !is_name(name) {
            return Err(SettingError::Name(name.chars().take(80).collect()));
        }
        let lower = name.to_ascii_lowercase();
        let fixed = FIXED.iter().chain(required).any(|(fixed, _)| *fixed == lower);
        if fixed || REFUSED.contains(&lower.as_str()) || lower.starts_with("recovery_target") {
            return Err(SettingError::Fixed(lower));
        }
        let minimal = lower == "wal_level" && !["replica", "logical"].contains(&value.as_str());
        if minimal {
            return Err(SettingError::Fixed(lower));
        }
        if value.len() > MAX_VALUE_BYTES || value.chars().any(char::is_control) {
            return Err(SettingError::Value(lower));
        }
    }
    Ok(())
}

/// A name, or two joined by a dot (an extension's setting).
fn is_name(text: &str) -> bool {
    let part = |part: &str| {
        part.len() <= 63
            && part.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    match text.split_once('.') {
        Some((class, name)) => part(class) && part(name),
        None => part(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(name: &str, value: &str) -> Result<String, SettingError> {
        let endpoint = EndpointId::new("ep-1").expect("id");
        let wanted = BTreeMap::from([(name.to_owned(), value.to_owned())]);
        postgresql_conf(Path::new("/run/c"), &endpoint, &[("fsync", "on")], &wanted, 64 << 20)
    }

    #[test]
    fn settings_of_the_spec_are_quoted_and_come_after_the_defaults() {
        let text = conf("search_path", "it's, \\x").expect("conf");
        assert!(text.contains("search_path = 'it''s, \\\\x'\n"), "{text}");
        let text = conf("shared_buffers", "1GB").expect("conf");
        let default = text.find("shared_buffers = '128MB'").expect("default");
        assert!(text.find("shared_buffers = '1GB'").expect("wanted") > default);
        assert!(conf("pg_stat_statements.track", "all").is_ok());
    }

    #[test]
    fn what_dormouse_needs_cannot_be_changed() {
        for name in ["fsync", "FSYNC", "listen_addresses", "hba_file", "archive_command", "recovery_target_lsn"] {
            assert!(matches!(conf(name, "x"), Err(SettingError::Fixed(_))), "{name}");
        }
        assert!(conf("wal_level", "minimal").is_err());
        assert!(conf("wal_level", "logical").is_ok());
    }

    #[test]
    fn nothing_can_break_out_of_its_line() {
        assert!(matches!(conf("x = 1\nfsync", "off"), Err(SettingError::Name(_))));
        assert!(matches!(conf("search_path", "a'\nfsync=off"), Err(SettingError::Value(_))));
        assert!(conf("", "x").is_err());
        assert!(conf("a.b.c", "x").is_err());
    }
}
