//! The commands of the replication protocol, taken apart (`repl_gram.y`). Pure.

use types::Lsn;

use super::refusal::Refusal;

/// What a client may ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    IdentifySystem,
    /// A setting's name, in lower case.
    Show(String),
    TimelineHistory {
        timeline: u32,
    },
    /// A slot's state; there never is one.
    ReadReplicationSlot,
    StartReplication {
        from: Lsn,
        timeline: Option<u32>,
    },
    /// Nothing, or only blanks.
    Empty,
}

impl Command {
    /// Takes a query's text apart. A refusal says what can't be done here, or is no command.
    pub fn parse(text: &str) -> Result<Command, Refusal> {
        let words = words(text)?;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let Some((first, rest)) = words.split_first() else { return Ok(Command::Empty) };
        match (first.to_ascii_uppercase().as_str(), rest) {
            ("IDENTIFY_SYSTEM", []) => Ok(Command::IdentifySystem),
            ("SHOW", [name]) => Ok(Command::Show(name.to_ascii_lowercase())),
            ("TIMELINE_HISTORY", [timeline]) => Ok(Command::TimelineHistory { timeline: number(timeline)? }),
            ("READ_REPLICATION_SLOT", [_slot]) => Ok(Command::ReadReplicationSlot),
            ("START_REPLICATION", rest) => start_replication(rest),
            ("CREATE_REPLICATION_SLOT" | "DROP_REPLICATION_SLOT", _) => Err(Refusal::slot()),
            ("BASE_BACKUP", _) => Err(Refusal::unsupported("BASE_BACKUP")),
            ("SELECT" | "SET" | "BEGIN" | "WITH" | "COPY" | "INSERT" | "UPDATE" | "DELETE", _) => {
                Err(Refusal::unsupported("SQL"))
            }
            _ => Err(syntax("no replication command that is known here")),
        }
    }
}

fn start_replication(words: &[&str]) -> Result<Command, Refusal> {
    let is = |word: &str, wanted: &str| word.eq_ignore_ascii_case(wanted);
    let rest = match words {
        [first, ..] if is(first, "SLOT") => return Err(Refusal::slot()),
        [first, ..] if is(first, "LOGICAL") => return Err(Refusal::unsupported("logical replication")),
        [first, rest @ ..] if is(first, "PHYSICAL") => rest,
        rest => rest,
    };
    let (position, timeline) = match rest {
        [position] => (position, None),
        [position, word, timeline] if is(word, "TIMELINE") => (position, Some(number(timeline)?)),
        _ => return Err(syntax("START_REPLICATION [PHYSICAL] X/X [TIMELINE n]")),
    };
    let from = position.parse().map_err(|_| syntax("a position such as 0/3000000 was expected"))?;
    Ok(Command::StartReplication { from, timeline })
}

fn number(word: &str) -> Result<u32, Refusal> {
    word.parse().ok().filter(|number| *number > 0).ok_or_else(|| syntax("a timeline's number was expected"))
}

fn syntax(message: &str) -> Refusal {
    Refusal::new("42601", format!("syntax error: {message}"))
}

/// Words between blanks; one in double quotes may have blanks inside. A semicolon ends all.
fn words(text: &str) -> Result<Vec<String>, Refusal> {
    let mut words = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        if first == ';' {
            let nothing = rest[1..].trim().is_empty();
            return if nothing { Ok(words) } else { Err(syntax("one command at a time")) };
        }
        let (word, behind) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').ok_or_else(|| syntax("a quote is not closed"))?,
            None => rest.split_at(rest.find(|c: char| c.is_whitespace() || c == ';').unwrap_or(rest.len())),
        };
        words.push(word.to_owned());
        rest = behind.trim_start();
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sqlstate(text: &str) -> &'static str {
        Command::parse(text).expect_err(text).sqlstate
    }

    #[test]
    fn what_clients_send_is_understood() {
        assert_eq!(Command::parse("IDENTIFY_SYSTEM"), Ok(Command::IdentifySystem));
        assert_eq!(Command::parse(" identify_system ; "), Ok(Command::IdentifySystem));
        assert_eq!(Command::parse("SHOW wal_segment_size"), Ok(Command::Show("wal_segment_size".into())));
        assert_eq!(Command::parse("TIMELINE_HISTORY 2"), Ok(Command::TimelineHistory { timeline: 2 }));
        assert_eq!(Command::parse("READ_REPLICATION_SLOT \"a b\""), Ok(Command::ReadReplicationSlot));
        assert_eq!(Command::parse(""), Ok(Command::Empty));
        let start = |timeline| Ok(Command::StartReplication { from: Lsn(0x1_0300_0000), timeline });
        assert_eq!(Command::parse("START_REPLICATION 1/3000000 TIMELINE 1"), start(Some(1)));
        assert_eq!(Command::parse("START_REPLICATION PHYSICAL 1/3000000"), start(None));
        assert_eq!(Command::parse("start_replication 1/03000000 timeline 3;"), start(Some(3)));
    }

    #[test]
    fn what_is_not_to_be_had_here_is_refused() {
        for unsupported in [
            "START_REPLICATION SLOT \"s\" 0/0 TIMELINE 1",
            "START_REPLICATION SLOT \"s\" LOGICAL 0/0",
            "START_REPLICATION LOGICAL 0/0",
            "CREATE_REPLICATION_SLOT \"s\" PHYSICAL",
            "DROP_REPLICATION_SLOT s",
            "BASE_BACKUP ( LABEL 'x' )",
            "select 1",
        ] {
            let refusal = Command::parse(unsupported).expect_err(unsupported);
            assert_eq!((refusal.sqlstate, refusal.hint.is_some()), ("0A000", true), "{unsupported}");
        }
        for wrong in [
            "START_REPLICATION",
            "START_REPLICATION 0/0 TIMELINE",
            "START_REPLICATION 0/0 TIMELINE x",
            "START_REPLICATION zero",
            "SHOW",
            "READ_REPLICATION_SLOT \"a",
            "IDENTIFY_SYSTEM; IDENTIFY_SYSTEM",
            "IDENTIFY_SYSTEM now",
            "HELLO",
        ] {
            assert_eq!(sqlstate(wrong), "42601", "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(text: String) {
            let _ = Command::parse(&text);
            let _ = Command::parse(&format!("START_REPLICATION {text}"));
        }
    }
}
