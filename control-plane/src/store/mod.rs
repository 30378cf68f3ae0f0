//! The metadata store: SQLite in WAL mode. One definition of all that the control plane keeps.
//!
//! Every call runs in one transaction on a blocking thread, never on an async worker. Who may change what: `projects`,
//! `branches` and `endpoints` belong to the API's services; the `agent_*`, `settled_lsn` and `catalog_applied` columns belong
//! to the compute manager, which also ends `inherits_subscriptions`.

pub mod branches;
pub mod catalog;
pub mod endpoints;
pub mod generations;
pub mod jwks;
pub mod leases;
pub mod leftovers;
pub mod memberships;
pub mod operations;
pub mod projects;
pub mod query_cache;

use std::{path::Path, str::FromStr, sync::Arc};

use parking_lot::Mutex;
use rusqlite::{Connection, Row, TransactionBehavior, types::Type};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use types::Lsn;

use crate::problem::Problem;

/// Version 1 of the schema; later ones are appended to [`MIGRATIONS`].
const SCHEMA_1: &str = "
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE projects (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    state TEXT NOT NULL,                       -- ready | deleting
    default_suspend_timeout_seconds INTEGER NOT NULL,
    history_retention_seconds INTEGER NOT NULL,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
) STRICT;
CREATE TABLE branches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    project_id TEXT NOT NULL REFERENCES projects (id),
    name TEXT NOT NULL,
    parent_id TEXT REFERENCES branches (id),
    parent_lsn INTEGER,
    parent_timestamp TEXT,
    start_lsn INTEGER NOT NULL,                -- 0 while it is being made
    settled_lsn INTEGER,                       -- end of its WAL when no compute can have written since; else NULL
    state TEXT NOT NULL,                       -- init | ready | deleting
    state_changed_at TEXT NOT NULL,
    is_default INTEGER NOT NULL,
    protected INTEGER NOT NULL,
    catalog_version INTEGER NOT NULL,          -- grows with every change of roles, databases and drops
    catalog_applied INTEGER NOT NULL,          -- the version that Postgres is known to have
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    UNIQUE (project_id, name)
) STRICT;
CREATE INDEX branches_by_parent ON branches (parent_id);
CREATE TABLE endpoints (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    project_id TEXT NOT NULL REFERENCES projects (id),
    branch_id TEXT NOT NULL UNIQUE REFERENCES branches (id),
    name TEXT,
    disabled INTEGER NOT NULL,
    suspend_timeout_seconds INTEGER NOT NULL,
    settings TEXT NOT NULL,                    -- JSON of v2::EndpointSettings
    agent_pid INTEGER,                         -- NULL: no compute was left running
    agent_started INTEGER,                     -- the process's start time in clock ticks: tells it from a later one of that pid
    last_active TEXT,
    started_at TEXT,
    suspended_at TEXT,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
) STRICT;
CREATE INDEX endpoints_by_project ON endpoints (project_id);
CREATE TABLE roles (
    branch_id TEXT NOT NULL REFERENCES branches (id),
    name TEXT NOT NULL,
    password TEXT NOT NULL,                    -- so that connection URIs can be shown again; the file is 0600
    scram_verifier TEXT NOT NULL,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    PRIMARY KEY (branch_id, name)
) STRICT;
CREATE TABLE databases (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    branch_id TEXT NOT NULL REFERENCES branches (id),
    name TEXT NOT NULL,
    owner_name TEXT NOT NULL,
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL,
    UNIQUE (branch_id, name)
) STRICT;
CREATE TABLE dropped (
    branch_id TEXT NOT NULL REFERENCES branches (id),
    kind TEXT NOT NULL,                        -- role | database
    name TEXT NOT NULL,
    version INTEGER NOT NULL,                  -- the branch's catalog_version that dropped it
    PRIMARY KEY (branch_id, kind, name)
) STRICT;
CREATE TABLE operations (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    project_id TEXT NOT NULL,
    branch_id TEXT,
    endpoint_id TEXT,
    action TEXT NOT NULL,
    status TEXT NOT NULL,                      -- running | finished | failed
    error TEXT,
    began_ms INTEGER NOT NULL,
    changed_ms INTEGER NOT NULL
) STRICT;
CREATE INDEX operations_by_project ON operations (project_id, seq);
CREATE TABLE generations (
    pageserver INTEGER PRIMARY KEY,
    generation INTEGER NOT NULL
) STRICT;
";

/// Version 2: leases.
const SCHEMA_2: &str = "
CREATE TABLE leases (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL,
    branch_id TEXT NOT NULL REFERENCES branches (id),
    lsn INTEGER NOT NULL,
    expires_ms INTEGER NOT NULL                -- Unix time
) STRICT;
CREATE INDEX leases_by_branch ON leases (branch_id);
";

/// Version 3: a branch is a name for a timeline in storage, which a restore exchanges.
const SCHEMA_3: &str = "
ALTER TABLE branches ADD COLUMN timeline TEXT NOT NULL DEFAULT '';
UPDATE branches SET timeline = id;
CREATE UNIQUE INDEX branches_by_timeline ON branches (timeline);
ALTER TABLE branches ADD COLUMN collected_lsn INTEGER;  -- everything before it is outside the history window and was collected
";

/// Version 4: projects may be placed on one of several pageservers.
const SCHEMA_4: &str = "
ALTER TABLE projects ADD COLUMN pageserver INTEGER;     -- NULL: the one of the settings
ALTER TABLE generations ADD COLUMN address TEXT NOT NULL DEFAULT '';
";

/// Version 5: answers to queries over HTTP that proxies must not use any more.
const SCHEMA_5: &str = "
CREATE TABLE query_cache_invalidations (
    endpoint_id TEXT NOT NULL REFERENCES endpoints (id) ON DELETE CASCADE,
    tag TEXT NOT NULL,                         -- '': all answers
    number INTEGER NOT NULL,                   -- grows with every invalidation
    PRIMARY KEY (endpoint_id, tag)
) STRICT;
";

/// Version 6: issuers of JSON Web Tokens that stand for passwords.
const SCHEMA_6: &str = "
CREATE TABLE jwks (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    project_id TEXT NOT NULL REFERENCES projects (id) ON DELETE CASCADE,
    branch_id TEXT REFERENCES branches (id) ON DELETE CASCADE, -- NULL: all of the project's
    jwks_url TEXT NOT NULL,
    provider_name TEXT NOT NULL,
    jwt_audience TEXT,
    jwt_issuer TEXT,
    role_names TEXT NOT NULL,                  -- JSON
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
) STRICT;
CREATE INDEX jwks_by_project ON jwks (project_id);
";

/// Version 7: where clients of a project may come from.
const SCHEMA_7: &str = "
ALTER TABLE projects ADD COLUMN settings TEXT NOT NULL DEFAULT '{}'; -- JSON of v2::ProjectSettings
";

/// Version 8: which safekeepers there are, and which each timeline has.
const SCHEMA_8: &str = "
CREATE TABLE safekeepers (
    node INTEGER PRIMARY KEY,
    address TEXT NOT NULL,
    is_member INTEGER NOT NULL                 -- 0: it is leaving, branches may still have it
) STRICT;
CREATE TABLE memberships (
    timeline TEXT PRIMARY KEY,
    generation INTEGER NOT NULL,
    members TEXT NOT NULL,                     -- JSON list of nodes
    new_members TEXT,                          -- the same while it is joint, else NULL
    is_told INTEGER NOT NULL,                  -- everybody whom it concerns has been told of this generation
    trouble TEXT                               -- why a change does not come to its end
) STRICT;
CREATE INDEX memberships_untold ON memberships (is_told) WHERE is_told = 0;
";

/// Version 9: branches whose subscriptions are still their ancestor's. No compute has had those that end where they begin.
const SCHEMA_9: &str = "
ALTER TABLE branches ADD COLUMN inherits_subscriptions INTEGER NOT NULL DEFAULT 0; -- 1: until a compute has disabled them
UPDATE branches SET inherits_subscriptions = 1 WHERE settled_lsn = start_lsn;
";

/// Version 10: deleted timelines of which a safekeeper has not said that it has deleted them.
const SCHEMA_10: &str = "
CREATE TABLE leftovers (
    project_id TEXT NOT NULL,
    timeline TEXT NOT NULL,
    node INTEGER NOT NULL,
    PRIMARY KEY (timeline, node)
) STRICT;
";

/// What brings an older database up to date, in order; `user_version` counts those done.
const MIGRATIONS: [&str; 10] =
    [SCHEMA_1, SCHEMA_2, SCHEMA_3, SCHEMA_4, SCHEMA_5, SCHEMA_6, SCHEMA_7, SCHEMA_8, SCHEMA_9, SCHEMA_10];

/// The metadata store; cheap to clone.
#[derive(Clone)]
pub struct Store {
    connection: Arc<Mutex<Connection>>,
}

impl Store {
    /// Opens or makes the database file (mode 0600: it holds passwords) and brings its schema up to date.
    pub fn open(path: &Path) -> Result<Store, Problem> {
        use std::os::unix::fs::OpenOptionsExt;
        std::fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| Problem::Internal(format!("metadata store {}: {e}", path.display())))?;
        Self::prepare(Connection::open(path)?)
    }

    /// A store that lives as long as the process; for tests.
    pub fn in_memory() -> Result<Store, Problem> {
        Self::prepare(Connection::open_in_memory()?)
    }

    fn prepare(mut connection: Connection) -> Result<Store, Problem> {
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // Generations and "this branch may have unknown WAL" must survive a power cut.
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let done: usize = transaction.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0))? as usize;
        if done > MIGRATIONS.len() {
            return Err(Problem::Internal(format!("the metadata store's schema {done} is newer than this program's")));
        }
        for migration in &MIGRATIONS[done..] {
            transaction.execute_batch(migration)?;
        }
        transaction.pragma_update(None, "user_version", MIGRATIONS.len() as i64)?;
        transaction.commit()?;
        Ok(Store { connection: Arc::new(Mutex::new(connection)) })
    }

    /// Runs `work` in a transaction on a blocking thread; commits when it succeeds, undoes everything when it fails.
    pub async fn call<T, F>(&self, work: F) -> Result<T, Problem>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<T, Problem> + Send + 'static,
    {
        let connection = Arc::clone(&self.connection);
        let task = tokio::task::spawn_blocking(move || {
            let mut connection = connection.lock();
            let transaction = connection.transaction()?;
            let value = work(&transaction)?;
            transaction.commit()?;
            Ok(value)
        });
        task.await.unwrap_or_else(|e| Err(Problem::Internal(format!("metadata store: {e}"))))
    }

    /// A value of the `meta` table.
    pub async fn meta(&self, key: &'static str) -> Result<Option<String>, Problem> {
        use rusqlite::OptionalExtension;
        self.call(move |db| {
            Ok(db.query_row("SELECT value FROM meta WHERE key = ?", [key], |row| row.get(0)).optional()?)
        })
        .await
    }

    /// Sets a value of the `meta` table.
    pub async fn set_meta(&self, key: &'static str, value: String) -> Result<(), Problem> {
        self.call(move |db| {
            db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))?;
            Ok(())
        })
        .await
    }
}

/// Now, RFC 3339 in UTC with seconds.
pub fn now() -> String {
    at(OffsetDateTime::now_utc())
}

/// A time as RFC 3339 in UTC with seconds.
pub fn at(time: OffsetDateTime) -> String {
    time.replace_nanosecond(0).unwrap_or(time).format(&Rfc3339).unwrap_or_default()
}

fn now_ms() -> i64 {
    (OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000) as i64
}

fn from_ms(ms: i64) -> String {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).map(at).unwrap_or_default()
}

/// SQLite has signed integers only: an LSN is kept as the same 64 bits.
fn lsn_column(lsn: Lsn) -> i64 {
    lsn.0.cast_signed()
}

fn lsn(row: &Row<'_>, column: &str) -> rusqlite::Result<Lsn> {
    Ok(Lsn(row.get::<_, i64>(column)?.cast_unsigned()))
}

fn optional_lsn(row: &Row<'_>, column: &str) -> rusqlite::Result<Option<Lsn>> {
    Ok(row.get::<_, Option<i64>>(column)?.map(|bits| Lsn(bits.cast_unsigned())))
}

/// A text column that is parsed, such as an id.
fn parsed<T>(row: &Row<'_>, column: &str) -> rusqlite::Result<T>
where
    T: FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let text: String = row.get(column)?;
    text.parse().map_err(|e| rusqlite::Error::FromSqlConversionFailure(0, Type::Text, Box::new(e)))
}

fn optional_parsed<T>(row: &Row<'_>, column: &str) -> rusqlite::Result<Option<T>>
where
    T: FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let text: Option<String> = row.get(column)?;
    let parse =
        |t: String| t.parse().map_err(|e| rusqlite::Error::FromSqlConversionFailure(0, Type::Text, Box::new(e)));
    text.map(parse).transpose()
}

/// True when an insert failed because the row's name is taken.
fn is_taken(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(rusqlite::ErrorCode::ConstraintViolation)
}

/// A page of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// Most rows.
    pub limit: u32,
    /// The `seq` of the last row of the page before.
    pub after: Option<i64>,
}

/// Rows of a page, and the cursor of the next when this one is full.
pub type Paged<T> = (Vec<T>, Option<i64>);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn files_are_private_and_migrate_once() {
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(format!("dormouse-store-{}.db", uuid::Uuid::new_v4()));
        let store = Store::open(&path).expect("open");
        store.set_meta("a", "1".into()).await.expect("set");
        drop(store);
        let store = Store::open(&path).expect("open again");
        assert_eq!(store.meta("a").await.expect("get").as_deref(), Some("1"));
        assert_eq!(std::fs::metadata(&path).expect("file").permissions().mode() & 0o777, 0o600);
        store.call(|db| Ok(db.pragma_update(None, "user_version", 99)?)).await.expect("newer");
        drop(store);
        assert!(Store::open(&path).is_err(), "a newer schema is refused");
        for suffix in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(format!("{}{suffix}", path.display()));
        }
    }

    #[tokio::test]
    async fn failed_calls_leave_nothing() {
        let store = Store::in_memory().expect("open");
        let failed: Result<(), Problem> = store
            .call(|db| {
                db.execute("INSERT INTO meta VALUES ('x', 'y')", [])?;
                Err(Problem::Invalid("no".into()))
            })
            .await;
        assert!(failed.is_err());
        assert_eq!(store.meta("x").await.expect("get"), None);
    }
}
