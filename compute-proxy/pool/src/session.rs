//! State of a client's session that outlives its transactions: what is replayed on the next server connection, what ties the
//! client to the one it has, and the question to Postgres that tells.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc};

use crate::sql::Hints;

/// Settings that a session has changed, by name.
pub type Settings = BTreeMap<String, String>;

/// Parameters that Postgres reports (`ParameterStatus`), by name.
pub type Reported = BTreeMap<String, String>;

/// What ties a client to one server connection until it is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pin {
    /// `LISTEN`.
    Listening,
    /// An advisory lock of the session.
    AdvisoryLock,
    /// Something in the session's temporary schema.
    Temporary,
    /// A cursor `WITH HOLD`.
    HeldCursor,
    /// A statement prepared with SQL's `PREPARE`.
    SqlPrepared,
    /// State that no query tells of: it lasts as long as the session.
    Unknowable,
    /// An unnamed statement too long to keep a copy of.
    LongStatement,
    /// The client asked for a server connection of its own.
    SessionMode,
}

impl Pin {
    /// As it stands in logs, messages and in the question's answer.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Listening => "LISTEN",
            Self::AdvisoryLock => "a session-level advisory lock",
            Self::Temporary => "a temporary table",
            Self::HeldCursor => "a cursor WITH HOLD",
            Self::SqlPrepared => "PREPARE",
            Self::Unknowable => "session state that cannot be asked for",
            Self::LongStatement => "a very long unnamed statement",
            Self::SessionMode => "session mode",
        }
    }

    /// The hint after which Postgres is asked about it again.
    pub(crate) fn hint(self) -> Hints {
        match self {
            Self::Listening => Hints::LISTEN,
            Self::AdvisoryLock => Hints::ADVISORY_LOCK,
            Self::Temporary => Hints::TEMPORARY,
            Self::HeldCursor => Hints::HELD_CURSOR,
            Self::SqlPrepared => Hints::SQL_PREPARED,
            Self::Unknowable | Self::LongStatement | Self::SessionMode => Hints::NONE,
        }
    }

    fn parse(text: &[u8]) -> Option<Self> {
        [Self::Listening, Self::AdvisoryLock, Self::Temporary, Self::HeldCursor, Self::SqlPrepared]
            .into_iter()
            .find(|pin| pin.as_str().as_bytes() == text)
    }
}

/// The question what is left in the session, for these kinds of state. Its rows are (kind, name, value).
///
/// Settings of the session are compared with what the connection was opened with by Postgres itself (`source`). Who the session
/// acts as is in no list, nor are custom settings (with a dot in their name): these are asked for by name. Postgres's activity
/// has the user who logged in, whatever was done since.
pub fn question(hints: Hints, custom_settings: &[String]) -> String {
    let mut parts: Vec<String> = Vec::new();
    if hints.intersects(Hints::SETTINGS) {
        parts.push(
            "SELECT 'set', s.name, pg_catalog.current_setting(s.name) FROM pg_catalog.pg_settings s \
             WHERE s.source OPERATOR(pg_catalog.=) 'session' \
             UNION ALL SELECT 'set', 'role', pg_catalog.current_setting('role') \
             WHERE pg_catalog.current_setting('role') OPERATOR(pg_catalog.<>) 'none' \
             UNION ALL SELECT 'set', 'session_authorization', session_user::pg_catalog.text \
             FROM pg_catalog.pg_stat_get_activity(pg_catalog.pg_backend_pid()) a \
             WHERE pg_catalog.pg_get_userbyid(a.usesysid) OPERATOR(pg_catalog.<>) session_user"
                .to_owned(),
        );
        for name in custom_settings {
            let name = quoted(name);
            parts.push(format!(
                "SELECT 'set', {name}, pg_catalog.current_setting({name}, true) \
                 WHERE pg_catalog.current_setting({name}, true) OPERATOR(pg_catalog.<>) ''"
            ));
        }
    }
    let conditions = [
        (Pin::Listening, "EXISTS (SELECT FROM pg_catalog.pg_listening_channels())"),
        (
            Pin::AdvisoryLock,
            "EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype OPERATOR(pg_catalog.=) 'advisory' \
             AND pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid())",
        ),
        (
            Pin::Temporary,
            "EXISTS (SELECT FROM pg_catalog.pg_depend WHERE refclassid OPERATOR(pg_catalog.=) \
             'pg_catalog.pg_namespace'::pg_catalog.regclass \
             AND refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema())",
        ),
        (Pin::HeldCursor, "EXISTS (SELECT FROM pg_catalog.pg_cursors WHERE is_holdable)"),
        (Pin::SqlPrepared, "EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE from_sql)"),
    ];
    for (pin, condition) in conditions {
        if hints.intersects(pin.hint()) {
            parts.push(format!("SELECT 'pin', {}, '' WHERE {condition}", quoted(pin.as_str())));
        }
    }
    parts.join(" UNION ALL ")
}

/// What Postgres answered to [`question`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// Settings of the session.
    pub settings: Settings,
    /// What ties the client to its connection.
    pub pins: Vec<Pin>,
}

impl Answer {
    /// Takes one row, the body of a `DataRow`. `None`: it is not one of ours.
    pub fn take_row(&mut self, body: &[u8]) -> Option<()> {
        let [kind, name, value] = columns(body)?;
        match kind {
            b"set" => {
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
                self.settings.insert(text(name)?, text(value)?);
            }
            b"pin" => self.pins.push(Pin::parse(name)?),
            _ => return None,
        }
        Some(())
    }

    /// Kinds that must be asked about after each further transaction.
    pub fn hints(&self) -> Hints {
        self.pins.iter().fold(Hints::NONE, |hints, pin| hints | pin.hint())
    }
}

/// Three texts of a row; a NULL is empty.
fn columns(body: &[u8]) -> Option<[&[u8]; 3]> {
    let (count, mut rest) = body.split_first_chunk::<2>()?;
    if u16::from_be_bytes(*count) != 3 {
        return None;
    }
    let mut columns = [&b""[..]; 3];
    for column in &mut columns {
        let (length, tail) = rest.split_first_chunk::<4>()?;
        rest = tail;
        let length = i32::from_be_bytes(*length);
        if let Ok(length) = usize::try_from(length) {
            (*column, rest) = rest.split_at_checked(length)?;
        }
    }
    Some(columns)
}

/// The settings that say who the session acts as, in the order in which they are made: the first takes back the second.
const IDENTITY: [&str; 2] = ["session_authorization", "role"];

/// Takes back whatever a session may have set. `RESET ALL` alone leaves it what it acts as.
pub const RESET_EVERYTHING: &str = "RESET role;RESET session_authorization;RESET ALL";

/// Statements that bring a connection from one set of settings to another; `None` when there is nothing to do.
///
/// Whom the session acts as comes last and goes first: with it the right to change other settings may go.
pub fn replay(from: &Arc<Settings>, to: &Arc<Settings>) -> Option<String> {
    if Arc::ptr_eq(from, to) || from == to {
        return None;
    }
    let mut text = String::new();
    for name in IDENTITY.iter().rev().filter(|name| from.contains_key(**name)) {
        // Writing to a String cannot fail.
        let _ = write!(text, "RESET {name};");
    }
    let ordinary = |name: &String| !IDENTITY.contains(&name.as_str());
    for name in from.keys().filter(|name| !to.contains_key(*name) && ordinary(name)) {
        let _ = write!(text, "RESET {};", quoted_name(name));
    }
    for (name, value) in to.iter().filter(|(name, value)| from.get(*name) != Some(value) && ordinary(name)) {
        let _ = write!(text, "SELECT pg_catalog.set_config({}, {}, false);", quoted(name), quoted(value));
    }
    for (name, value) in IDENTITY.iter().filter_map(|name| Some((name, to.get(*name)?))) {
        let _ = write!(text, "SELECT pg_catalog.set_config('{name}', {}, false);", quoted(value));
    }
    Some(text)
}

/// A text as an SQL literal, whatever `standard_conforming_strings` says.
pub fn quoted(text: &str) -> String {
    let escaped = text.replace('\'', "''");
    if text.contains('\\') { format!("E'{}'", escaped.replace('\\', "\\\\")) } else { format!("'{escaped}'") }
}

/// The name of a setting, each of its parts in quotes.
fn quoted_name(name: &str) -> String {
    let part = |part: &str| format!("\"{}\"", part.replace('"', "\"\""));
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Arc<Settings> {
        Arc::new(pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn settings_are_replayed_and_taken_back() {
        let from = settings(&[("role", "r"), ("timezone", "UTC"), ("a.b", "1"), ("work_mem", "4MB")]);
        let to = settings(&[("timezone", "it's"), ("work_mem", "4MB"), ("role", "x\\y")]);
        assert_eq!(
            replay(&from, &to).as_deref(),
            Some(
                "RESET role;RESET \"a\".\"b\";SELECT pg_catalog.set_config('timezone', 'it''s', false);\
                 SELECT pg_catalog.set_config('role', E'x\\\\y', false);"
            )
        );
        assert_eq!(replay(&from, &from), None);
        assert_eq!(replay(&from, &Arc::new(Settings::clone(&from))), None);
    }

    #[test]
    fn whom_a_session_acts_as_goes_first_and_comes_last() {
        let from = settings(&[("role", "r"), ("session_authorization", "s"), ("a.b", "1")]);
        let to = settings(&[("role", "q"), ("session_authorization", "s"), ("timezone", "UTC")]);
        assert_eq!(
            replay(&from, &to).as_deref(),
            Some(
                "RESET role;RESET session_authorization;RESET \"a\".\"b\";\
                 SELECT pg_catalog.set_config('timezone', 'UTC', false);\
                 SELECT pg_catalog.set_config('session_authorization', 's', false);\
                 SELECT pg_catalog.set_config('role', 'q', false);"
            )
        );
    }

    #[test]
    fn only_what_may_be_left_is_asked_for() {
        let text = question(Hints::LISTEN, &["a.b".to_owned()]);
        assert!(text.contains("pg_listening_channels") && !text.contains("pg_settings") && !text.contains("a.b"));
        assert!(question(Hints::SETTINGS, &["a.b".to_owned()]).contains("current_setting('a.b', true)"));
    }

    #[test]
    fn answers_are_read() {
        let row = |columns: [&[u8]; 3]| {
            let mut body = vec![0, 3];
            for column in columns {
                body.extend_from_slice(&(column.len() as u32).to_be_bytes());
                body.extend_from_slice(column);
            }
            body
        };
        let mut answer = Answer::default();
        assert!(answer.take_row(&row([b"set", b"TimeZone", b"UTC"])).is_some());
        assert!(answer.take_row(&row([b"pin", b"LISTEN", b""])).is_some());
        assert!(answer.take_row(&row([b"pin", b"what", b""])).is_none());
        assert!(answer.take_row(b"\0\x03\0\0\0\x09").is_none());
        assert_eq!(answer.settings["TimeZone"], "UTC");
        assert_eq!((answer.hints(), &answer.pins[..]), (Hints::LISTEN, &[Pin::Listening][..]));
    }
}
