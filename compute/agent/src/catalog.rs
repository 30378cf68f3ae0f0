//! Roles and databases: looked at first, then made what the control plane says. Doing it again changes nothing.

use std::{collections::BTreeMap, fmt::Write, path::Path, time::Duration};

use control_plane_api::compute::{CatalogSpec, DatabaseSpec, RoleSpec};
use tokio_postgres::{Client, NoTls};

/// The superuser that `initdb` made.
pub const ADMIN_ROLE: &str = "dormouse_admin";

/// The role that all of the control plane's roles are members of: what they may do beyond their own objects.
pub const GROUP_ROLE: &str = "dormouse_superuser";

/// The database that is there from the start and that the agent itself connects to.
pub const ADMIN_DATABASE: &str = "postgres";

/// Longest name, bytes (`NAMEDATALEN` with its closing zero).
const MAX_NAME_BYTES: usize = 63;

/// Longest time for one connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Statements carry password verifiers: none may end up in a log. Nor are the agent's own statements among a user's in
/// `pg_stat_statements`.
const CONNECTION_OPTIONS: &str = "-c log_statement=none -c log_min_error_statement=panic \
     -c log_min_duration_statement=-1 -c statement_timeout=0 -c lock_timeout=0 -c client_min_messages=warning \
     -c default_transaction_read_only=off -c pg_stat_statements.track=none";

/// Predefined roles through which a member runs programs or reads files of the host. In PostgreSQL 15 whoever may create
/// roles may also grant these, unless they are superusers: so they are made that.
const HOST_ROLES: &str = "'pg_execute_server_program', 'pg_read_server_files', 'pg_write_server_files'";

/// Why roles and databases are not as they should be.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// A name that Postgres or Dormouse has for itself, or that is none.
    #[error("{0:?} cannot be the name of a role or database here")]
    Name(String),
    /// Not a SCRAM verifier. Says nothing about its content.
    #[error("the password verifier of role {0:?} is not a SCRAM-SHA-256 verifier")]
    Verifier(String),
    /// Postgres refused.
    #[error("{step}: {message}")]
    Postgres {
        /// What was being done.
        step: String,
        /// Postgres's message.
        message: String,
    },
}

fn postgres_error(step: impl Into<String>) -> impl FnOnce(tokio_postgres::Error) -> CatalogError {
    move |error| {
        let message = match error.as_db_error() {
            Some(error) => error.message().to_owned(),
            None => error.to_string(),
        };
        CatalogError::Postgres { step: step.into(), message }
    }
}

/// Connects as the superuser over Postgres's socket in `socket_dir`.
pub async fn connect(socket_dir: &Path, database: &str, application: &str) -> Result<Client, tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    config.host_path(socket_dir).port(5432).user(ADMIN_ROLE).dbname(database).connect_timeout(CONNECT_TIMEOUT);
    config.application_name(application).options(CONNECTION_OPTIONS);
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection of the agent has ended");
        }
    });
    Ok(client)
}

/// Makes roles and databases what `spec` says.
pub async fn apply(socket_dir: &Path, spec: &CatalogSpec) -> Result<(), CatalogError> {
    check(spec)?;
    let client = connect(socket_dir, ADMIN_DATABASE, "dormouse_catalog").await.map_err(postgres_error("connecting"))?;
    let existing = look(&client).await?;
    for step in plan(&existing, spec) {
        client.batch_execute(&step.sql).await.map_err(postgres_error(step.what))?;
    }
    for role in spec.drop_roles.iter().filter(|role| existing.roles.contains_key(*role)) {
        drop_role(socket_dir, &client, role).await?;
    }
    Ok(())
}

/// What there is.
#[derive(Debug, Default)]
struct Existing {
    /// Name and verifier.
    roles: BTreeMap<String, Option<String>>,
    /// Name and owner.
    databases: BTreeMap<String, String>,
    /// The predefined roles that reach the host cannot be granted.
    host_roles_closed: bool,
}

/// Something to execute at once.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    what: String,
    sql: String,
}

async fn look(client: &Client) -> Result<Existing, CatalogError> {
    let sql = format!(
        "SELECT 'role', rolname::text, rolpassword FROM pg_authid \
         UNION ALL SELECT 'database', datname::text, pg_get_userbyid(datdba)::text FROM pg_database \
         UNION ALL SELECT 'open', rolname::text, NULL FROM pg_authid WHERE rolname IN ({HOST_ROLES}) AND NOT rolsuper"
    );
    let rows = client.query(&sql, &[]).await.map_err(postgres_error("looking at roles and databases"))?;
    let mut existing = Existing { host_roles_closed: true, ..Existing::default() };
    for row in rows {
        let (kind, name): (String, String) = (row.get(0), row.get(1));
        let detail: Option<String> = row.get(2);
        match kind.as_str() {
            "role" => drop(existing.roles.insert(name, detail)),
            "database" => drop(existing.databases.insert(name, detail.unwrap_or_default())),
            _ => existing.host_roles_closed = false,
        }
    }
    Ok(existing)
}

/// The statements that lead from what there is to what is wanted, except dropping roles. Roles come in one step, so that
/// they take one commit.
fn plan(existing: &Existing, spec: &CatalogSpec) -> Vec<Step> {
    let mut roles = String::new();
    if !existing.host_roles_closed {
        let _ = write!(
            roles,
            "SET LOCAL allow_system_table_mods = on; \
             UPDATE pg_authid SET rolsuper = true WHERE rolname IN ({HOST_ROLES}); \
             SET LOCAL allow_system_table_mods = off; "
        );
    }
    if !existing.roles.contains_key(GROUP_ROLE) {
        let group = identifier(GROUP_ROLE);
        let _ = write!(
            roles,
            "CREATE ROLE {group} NOLOGIN CREATEDB CREATEROLE REPLICATION BYPASSRLS NOSUPERUSER; \
             GRANT pg_read_all_data, pg_write_all_data, pg_monitor TO {group}; "
        );
    }
    spec.roles.iter().for_each(|role| roles.push_str(&role_sql(existing, role)));
    let mut steps = Vec::new();
    if !roles.is_empty() {
        steps.push(Step { what: "roles".to_owned(), sql: format!("BEGIN; {roles}COMMIT;") });
    }
    steps.extend(spec.databases.iter().filter_map(|database| database_step(existing, database)));
    let dropped = spec.drop_databases.iter().filter(|name| existing.databases.contains_key(*name));
    steps.extend(dropped.map(|name| Step {
        what: format!("dropping database {name:?}"),
        sql: format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", identifier(name)),
    }));
    steps
}

fn role_sql(existing: &Existing, role: &RoleSpec) -> String {
    let name = identifier(&role.name);
    let password = role.scram_verifier.as_ref().map_or_else(String::new, |v| format!(" PASSWORD {}", literal(v)));
    match existing.roles.get(&role.name) {
        None => format!(
            "CREATE ROLE {name} LOGIN CREATEDB CREATEROLE REPLICATION BYPASSRLS NOSUPERUSER IN ROLE {}{password}; ",
            identifier(GROUP_ROLE)
        ),
        Some(verifier) if role.scram_verifier.is_some() && *verifier != role.scram_verifier => {
            format!("ALTER ROLE {name} LOGIN{password}; ")
        }
        Some(_) => String::new(),
    }
}

fn database_step(existing: &Existing, database: &DatabaseSpec) -> Option<Step> {
    let (name, owner) = (identifier(&database.name), identifier(&database.owner));
    match existing.databases.get(&database.name) {
        None => Some(Step {
            what: format!("creating database {:?}", database.name),
            sql: format!("CREATE DATABASE {name} OWNER {owner}"),
        }),
        Some(now) if *now != database.owner => Some(Step {
            what: format!("changing the owner of database {:?}", database.name),
            sql: format!("ALTER DATABASE {name} OWNER TO {owner}"),
        }),
        Some(_) => None,
    }
}

/// Gives a role's objects to each database's owner (to the group role, where it is the owner itself), then drops it.
async fn drop_role(socket_dir: &Path, client: &Client, role: &str) -> Result<(), CatalogError> {
    let step = || format!("dropping role {role:?}");
    let sql = "SELECT datname::text, pg_get_userbyid(datdba)::text FROM pg_database WHERE datallowconn";
    let databases = client.query(sql, &[]).await.map_err(postgres_error(step()))?;
    for row in databases {
        let (database, owner): (String, String) = (row.get(0), row.get(1));
        let heir = if owner == role { GROUP_ROLE } else { &owner };
        let there = connect(socket_dir, &database, "dormouse_catalog").await.map_err(postgres_error(step()))?;
        let (role, heir) = (identifier(role), identifier(heir));
        let sql = format!("REASSIGN OWNED BY {role} TO {heir}; DROP OWNED BY {role};");
        there.batch_execute(&sql).await.map_err(postgres_error(step()))?;
    }
    let sql = format!("DROP ROLE IF EXISTS {}", identifier(role));
    client.batch_execute(&sql).await.map_err(postgres_error(step()))
}

fn check(spec: &CatalogSpec) -> Result<(), CatalogError> {
    let roles = spec.roles.iter().map(|role| &role.name).chain(&spec.drop_roles);
    for name in roles {
        let taken = [ADMIN_ROLE, GROUP_ROLE, "public", "none"].contains(&name.as_str()) || name.starts_with("pg_");
        check_name(name, taken)?;
    }
    for database in &spec.databases {
        check_name(&database.name, ["template0", "template1"].contains(&database.name.as_str()))?;
        check_name(&database.owner, false)?;
    }
    for name in &spec.drop_databases {
        check_name(name, ["template0", "template1", ADMIN_DATABASE].contains(&name.as_str()))?;
    }
    for role in &spec.roles {
        if role.scram_verifier.as_ref().is_some_and(|verifier| !is_scram_verifier(verifier)) {
            return Err(CatalogError::Verifier(role.name.clone()));
        }
    }
    Ok(())
}

fn check_name(name: &str, taken: bool) -> Result<(), CatalogError> {
    let good = !taken && !name.is_empty() && name.len() <= MAX_NAME_BYTES && !name.chars().any(char::is_control);
    if good { Ok(()) } else { Err(CatalogError::Name(name.chars().take(80).collect())) }
}

/// Anything else Postgres would take for a password in clear text.
fn is_scram_verifier(text: &str) -> bool {
    let Some(rest) = text.strip_prefix("SCRAM-SHA-256$") else { return false };
    let Some((iterations, rest)) = rest.split_once(':') else { return false };
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"+/=:$".contains(&b);
    let keys = rest.split_once('$').and_then(|(_, keys)| keys.split_once(':'));
    text.len() <= 512
        && iterations.bytes().all(|b| b.is_ascii_digit())
        && !iterations.is_empty()
        && keys.is_some_and(|(stored, server)| !stored.is_empty() && !server.is_empty())
        && rest.bytes().all(plain)
}

fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A string constant that means the same whatever `standard_conforming_strings` is.
fn literal(text: &str) -> String {
    let doubled = text.replace('\\', "\\\\").replace('\'', "''");
    if text.contains('\\') { format!("E'{doubled}'") } else { format!("'{doubled}'") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERIFIER: &str = "SCRAM-SHA-256$4096:c2FsdA==$c3RvcmVk:c2VydmVy";

    fn spec() -> CatalogSpec {
        CatalogSpec {
            roles: vec![RoleSpec { name: "al\"ice".to_owned(), scram_verifier: Some(VERIFIER.to_owned()) }],
            databases: vec![DatabaseSpec { name: "main".to_owned(), owner: "al\"ice".to_owned() }],
            ..CatalogSpec::default()
        }
    }

    #[test]
    fn what_is_missing_is_made_and_what_is_there_is_left_alone() {
        let mut existing = Existing::default();
        let steps = plan(&existing, &spec());
        assert_eq!(steps.len(), 2);
        assert!(steps[0].sql.contains("CREATE ROLE \"al\"\"ice\" LOGIN"), "{}", steps[0].sql);
        assert!(steps[0].sql.contains(&format!("PASSWORD '{VERIFIER}'")));
        assert!(steps[0].sql.contains("rolsuper = true"));
        assert_eq!(steps[1].sql, "CREATE DATABASE \"main\" OWNER \"al\"\"ice\"");

        existing.host_roles_closed = true;
        existing.roles.insert(GROUP_ROLE.to_owned(), None);
        existing.roles.insert("al\"ice".to_owned(), Some(VERIFIER.to_owned()));
        existing.databases.insert("main".to_owned(), "al\"ice".to_owned());
        assert_eq!(plan(&existing, &spec()), []);
    }

    #[test]
    fn a_new_password_or_owner_is_a_change() {
        let mut existing = Existing { host_roles_closed: true, ..Existing::default() };
        existing.roles.insert(GROUP_ROLE.to_owned(), None);
        existing.roles.insert("al\"ice".to_owned(), None);
        existing.databases.insert("main".to_owned(), "bob".to_owned());
        let sql: Vec<_> = plan(&existing, &spec()).into_iter().map(|step| step.sql).collect();
        assert!(sql[0].contains("ALTER ROLE \"al\"\"ice\" LOGIN PASSWORD"), "{sql:?}");
        assert_eq!(sql[1], "ALTER DATABASE \"main\" OWNER TO \"al\"\"ice\"");
    }

    #[test]
    fn reserved_names_and_clear_passwords_are_refused() {
        for name in [ADMIN_ROLE, GROUP_ROLE, "pg_monitor", "", "a\0b", &"x".repeat(64)] {
            let mut bad = spec();
            bad.roles[0].name = name.to_owned();
            assert!(matches!(check(&bad), Err(CatalogError::Name(_))), "{name:?}");
        }
        for verifier in ["secret", "SCRAM-SHA-256$", "SCRAM-SHA-256$4096:a$b", "SCRAM-SHA-256$x:a$b:c", "md5abc"] {
            let mut bad = spec();
            bad.roles[0].scram_verifier = Some(verifier.to_owned());
            assert!(matches!(check(&bad), Err(CatalogError::Verifier(_))), "{verifier:?}");
        }
        let dropped = CatalogSpec { drop_databases: vec!["template1".to_owned()], ..CatalogSpec::default() };
        assert!(check(&dropped).is_err());
        assert!(check(&spec()).is_ok());
    }

    #[test]
    fn constants_cannot_be_left() {
        assert_eq!(literal("a'b"), "'a''b'");
        assert_eq!(literal("a\\'b"), "E'a\\\\''b'");
        assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
    }
}
