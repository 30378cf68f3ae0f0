//! What a statement's text tells about the session state that it may leave behind. Pure, one pass, no allocation for
//! ordinary statements.
//!
//! Nothing here is trusted to be exact: a hint only makes the proxy ask Postgres afterwards what is really left.

mod lexer;

use lexer::{Lexer, Token};

/// What a text may do to its session.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Effects {
    /// Kinds of state that may be left behind.
    pub hints: Hints,
    /// Settings with a dot in their name: Postgres lists them nowhere, so their names must be remembered.
    pub custom_settings: Vec<String>,
    /// The name that a text deallocates which is nothing but `DEALLOCATE <name>`.
    pub deallocates: Option<String>,
    /// It asks for a sequence's last value in this session, and does not itself take one.
    pub reads_session_sequence: bool,
}

/// A set of kinds of session state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Hints(u8);

impl Hints {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Settings of the session.
    pub const SETTINGS: Self = Self(1);
    /// `LISTEN`.
    pub const LISTEN: Self = Self(1 << 1);
    /// Advisory locks of the session.
    pub const ADVISORY_LOCK: Self = Self(1 << 2);
    /// Temporary tables and other things in the session's temporary schema.
    pub const TEMPORARY: Self = Self(1 << 3);
    /// `DECLARE … WITH HOLD`.
    pub const HELD_CURSOR: Self = Self(1 << 4);
    /// Statements prepared with SQL's `PREPARE`.
    pub const SQL_PREPARED: Self = Self(1 << 5);
    /// What no query can find out: `LOAD`, `setseed`, settings whose names are not in the text.
    pub const UNKNOWABLE: Self = Self(1 << 6);
    /// Work that the text does not show (`DO`, `CALL`, a text too long to look at): settings may have been changed that
    /// Postgres lists nowhere.
    pub const UNSEEN: Self = Self(1 << 7);
    /// All that a query can find out.
    pub const ANY: Self = Self(0x3f);

    /// True when both have something in common.
    pub fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// True when it is empty.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Those of this set that are not in the other.
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl std::ops::BitOr for Hints {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl std::ops::BitOrAssign for Hints {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

/// Looks a text over: one statement, or several with semicolons between them.
pub fn effects(text: &[u8]) -> Effects {
    let mut scan = Scan { lexer: Lexer::new(text), effects: Effects::default(), takes_sequence: false, statements: 0 };
    scan.run();
    let Scan { mut effects, takes_sequence, statements, .. } = scan;
    effects.reads_session_sequence &= !takes_sequence;
    if statements != 1 {
        effects.deallocates = None;
    }
    effects
}

struct Scan<'a> {
    lexer: Lexer<'a>,
    effects: Effects,
    takes_sequence: bool,
    statements: usize,
}

impl<'a> Scan<'a> {
    fn run(&mut self) {
        let mut at_start = true;
        while let Some(token) = self.lexer.next() {
            match token {
                Token::Symbol(b';') => at_start = true,
                Token::Word(word) if at_start => {
                    (at_start, self.statements) = (false, self.statements + 1);
                    self.first_word(word);
                }
                Token::Word(word) => self.any_word(word),
                Token::Quoted(name) => {
                    self.statements += usize::from(std::mem::take(&mut at_start));
                    self.any_word(name);
                }
                Token::Symbol(_) | Token::Text(_) | Token::Other => {
                    self.statements += usize::from(std::mem::take(&mut at_start));
                }
            }
        }
    }

    /// The keyword that says which statement it is.
    fn first_word(&mut self, word: &'a [u8]) {
        let hints = &mut self.effects.hints;
        match word.len() {
            2 if is(word, "do") => *hints |= Hints::ANY | Hints::UNSEEN,
            3 if is(word, "set") => self.set(),
            4 if is(word, "call") => *hints |= Hints::ANY | Hints::UNSEEN,
            4 if is(word, "load") => *hints |= Hints::UNKNOWABLE,
            5 if is(word, "reset") => *hints |= Hints::SETTINGS,
            6 if is(word, "listen") => *hints |= Hints::LISTEN,
            7 if is(word, "discard") => *hints |= Hints::ANY,
            7 if is(word, "prepare") => match self.lexer.next() {
                // `PREPARE TRANSACTION` outlives any session.
                Some(Token::Word(next)) if is(next, "transaction") => {}
                _ => *hints |= Hints::SQL_PREPARED,
            },
            10 if is(word, "deallocate") => self.deallocate(),
            _ => self.any_word(word),
        }
    }

    /// A word that tells something wherever it stands.
    fn any_word(&mut self, word: &'a [u8]) {
        let hints = &mut self.effects.hints;
        match word.len() {
            4 if is(word, "hold") => *hints |= Hints::HELD_CURSOR,
            4 if is(word, "temp") => *hints |= Hints::TEMPORARY,
            7 if is(word, "pg_temp") => *hints |= Hints::TEMPORARY,
            9 if is(word, "temporary") => *hints |= Hints::TEMPORARY,
            7 if is(word, "setseed") => *hints |= Hints::UNKNOWABLE,
            14 if is(word, "dblink_connect") => *hints |= Hints::UNKNOWABLE,
            7 if is(word, "nextval") => self.takes_sequence = true,
            7 if is(word, "currval") => self.effects.reads_session_sequence = true,
            7 if is(word, "lastval") => self.effects.reads_session_sequence = true,
            10 if is(word, "set_config") => self.set_config(),
            16..=27 if is_session_lock(word) => *hints |= Hints::ADVISORY_LOCK,
            _ => {}
        }
    }

    /// Behind `SET`.
    fn set(&mut self) {
        let Some(Token::Word(mut word) | Token::Quoted(mut word)) = self.lexer.next() else { return };
        if ["local", "transaction", "constraints"].iter().any(|other| is(word, other)) {
            return;
        }
        self.effects.hints |= Hints::SETTINGS;
        if is(word, "session") {
            match self.lexer.next() {
                Some(Token::Word(next) | Token::Quoted(next)) => word = next,
                _ => return,
            }
        }
        let mut rest = self.lexer.clone();
        if rest.next() == Some(Token::Symbol(b'.'))
            && let Some(Token::Word(last) | Token::Quoted(last)) = rest.next()
        {
            self.custom(&[word, b".", last].concat());
        }
    }

    fn custom(&mut self, name: &[u8]) {
        if name.contains(&b'.') {
            self.effects.custom_settings.push(String::from_utf8_lossy(name).to_ascii_lowercase());
        }
    }

    /// `set_config(name, value, is_local)`: harmless when `is_local` is `true`.
    fn set_config(&mut self) {
        let mut rest = self.lexer.clone();
        if rest.next() != Some(Token::Symbol(b'(')) {
            return;
        }
        let (mut depth, mut commas, mut words_of_third) = (1, 0, 0);
        let (mut name, mut first, mut third_is_true) = (None, true, false);
        for token in rest {
            match token {
                Token::Symbol(b'(') => depth += 1,
                Token::Symbol(b')') => depth -= 1,
                Token::Symbol(b',') if depth == 1 => commas += 1,
                Token::Text(text) if first => name = Some(text),
                _ => {}
            }
            first = false;
            if depth == 0 || commas > 2 {
                break;
            }
            if commas == 2 && token != Token::Symbol(b',') {
                words_of_third += 1;
                third_is_true = words_of_third == 1 && matches!(token, Token::Word(word) if is(word, "true"));
            }
        }
        if third_is_true {
            return;
        }
        self.effects.hints |= Hints::SETTINGS;
        match name {
            Some(name) => self.custom(name),
            None => self.effects.hints |= Hints::UNKNOWABLE,
        }
    }

    /// Behind `DEALLOCATE`.
    fn deallocate(&mut self) {
        let mut name = self.lexer.next();
        if matches!(name, Some(Token::Word(word)) if is(word, "prepare")) {
            name = self.lexer.next();
        }
        match name {
            Some(Token::Word(word)) if is(word, "all") => self.effects.hints |= Hints::SQL_PREPARED,
            Some(Token::Word(word)) => {
                self.effects.deallocates = Some(String::from_utf8_lossy(word).to_ascii_lowercase());
            }
            Some(Token::Quoted(name)) => self.effects.deallocates = Some(String::from_utf8_lossy(name).into_owned()),
            _ => {}
        }
    }
}

fn is(word: &[u8], keyword: &str) -> bool {
    word.eq_ignore_ascii_case(keyword.as_bytes())
}

/// `pg_advisory_lock`, `pg_try_advisory_lock` and their `_shared` kin: the ones that outlast a transaction.
fn is_session_lock(word: &[u8]) -> bool {
    ["pg_advisory_lock", "pg_advisory_lock_shared", "pg_try_advisory_lock", "pg_try_advisory_lock_shared"]
        .iter()
        .any(|name| is(word, name))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hints(text: &str) -> Hints {
        effects(text.as_bytes()).hints
    }

    #[test]
    fn ordinary_statements_leave_nothing() {
        for text in [
            "select abalance from pgbench_accounts where aid = 1",
            "update t set a = 'set x = 1', listen = 2 -- set y = 1\n where b = $$ set z = 1 $$",
            "begin; set local work_mem = '1MB'; set transaction read only; commit",
            "set constraints all deferred",
            "/* set x = 1 /* nested */ set y = 2 */ select 1",
            "select pg_advisory_xact_lock(1), pg_try_advisory_xact_lock_shared(2)",
            "select set_config('a.b', $1, true), set_config($2, (select max(x) from t), TRUE)",
            "prepare transaction 'x'",
            "insert into t values (E'it\\'s; set x = 1')",
            "unlisten x; notify x, 'y'",
            "",
            ";;",
        ] {
            assert_eq!(effects(text.as_bytes()), Effects::default(), "{text}");
        }
    }

    #[test]
    fn session_state_is_seen() {
        for (text, expected) in [
            ("set timezone = 'UTC'", Hints::SETTINGS),
            ("SET SESSION timezone TO 'UTC'", Hints::SETTINGS),
            ("select 1; set search_path = a, b", Hints::SETTINGS),
            ("reset all", Hints::SETTINGS),
            ("set role x", Hints::SETTINGS),
            ("select set_config('timezone', 'UTC', false)", Hints::SETTINGS),
            ("select pg_catalog.set_config('timezone', 'UTC', 1 = 1)", Hints::SETTINGS),
            ("select set_config($1, $2, false)", Hints::SETTINGS | Hints::UNKNOWABLE),
            ("listen x", Hints::LISTEN),
            ("select pg_advisory_lock(1)", Hints::ADVISORY_LOCK),
            ("select \"pg_try_advisory_lock_shared\"(1)", Hints::ADVISORY_LOCK),
            ("create temp table t (a int)", Hints::TEMPORARY),
            ("select 1 into temporary t", Hints::TEMPORARY),
            ("create table pg_temp.t ()", Hints::TEMPORARY),
            ("declare c cursor with hold for select 1", Hints::HELD_CURSOR),
            ("prepare p as select 1", Hints::SQL_PREPARED),
            ("deallocate all", Hints::SQL_PREPARED),
            ("do $$ begin perform 1; end $$", Hints::ANY | Hints::UNSEEN),
            ("call p()", Hints::ANY | Hints::UNSEEN),
            ("discard all", Hints::ANY),
            ("load 'auto_explain'", Hints::UNKNOWABLE),
            ("select setseed(0.5)", Hints::UNKNOWABLE),
        ] {
            assert_eq!(hints(text), expected, "{text}");
        }
    }

    #[test]
    fn names_that_postgres_lists_nowhere_are_kept() {
        let custom = |text: &str| effects(text.as_bytes()).custom_settings;
        assert_eq!(custom("set App.user_id = 5"), ["app.user_id"]);
        assert_eq!(custom("set session \"app\".\"id\" to '5'"), ["app.id"]);
        assert_eq!(custom("select set_config('app.id', $1, false), set_config('work_mem', '1MB', false)"), ["app.id"]);
        assert!(custom("set work_mem = 5").is_empty());
    }

    #[test]
    fn a_lone_deallocate_is_recognised() {
        let name = |text: &str| effects(text.as_bytes()).deallocates;
        assert_eq!(name("DEALLOCATE _pg3_0"), Some("_pg3_0".to_owned()));
        assert_eq!(name("deallocate prepare \"A b\";"), Some("A b".to_owned()));
        assert_eq!(name("deallocate a; deallocate b"), None);
        assert_eq!(name("select 1; deallocate b"), None);
    }

    #[test]
    fn reading_a_sequence_of_the_session_is_recognised() {
        let reads = |text: &str| effects(text.as_bytes()).reads_session_sequence;
        assert!(reads("select lastval()"));
        assert!(reads("select currval('s')"));
        assert!(!reads("select nextval('s'), currval('s')"));
        assert!(!reads("select 'lastval'"));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(text: Vec<u8>) {
            effects(&text);
        }

        #[test]
        fn pieces_of_sql_never_panic(
            pieces in prop::collection::vec(
                prop::sample::select(vec![
                    "set", "set_config", "(", ")", ",", "'a.b'", "'", "\"", "$$", "$a$", "--", "\n", "/*", "*/", ";",
                    "true", "E'", "\\", ".", "session", "deallocate", "$1",
                ]),
                0..20,
            ),
        ) {
            effects(pieces.join(" ").as_bytes());
            effects(pieces.concat().as_bytes());
        }
    }
}
