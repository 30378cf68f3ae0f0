//! Which records these tests write.

/// Those that a whole run must have seen, named as `pg_waldump` does.
pub const RECORD_TYPES: &[&str] = &[];

/// Those that exist in 15 and are never seen, with the reason.
pub const NEVER_SEEN: &[(&str, &str)] = &[];
