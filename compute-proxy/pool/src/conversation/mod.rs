//! What one client and the server connections that it borrows say to each other: which bytes go where, what is put in or
//! held back, and when the connection may go to somebody else.

mod client;
mod server;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

pub use client::Unattached;

use crate::{
    Violation, frame,
    server_state::ServerState,
    session::{self, Answer, Pin, Reported, Settings},
    sql::Hints,
    statement::{Interner, Statement, StatementId},
};

/// Named statements that one client may have.
const STATEMENTS_MAX: usize = 10_000;

/// Bytes of all named statements of one client.
const STATEMENTS_MAX_BYTES: usize = 16 * 1024 * 1024;

/// Custom settings of one client whose names are remembered.
const CUSTOM_SETTINGS_MAX: usize = 100;

/// Messages without an answer so far, above which no more are taken from the client.
const EXPECTED_MAX: usize = 4096;

/// Bytes that wait to be written, above which no more are taken in.
const OUTPUT_MAX_BYTES: usize = 64 * 1024;

/// Bytes to be written.
#[derive(Default)]
pub struct Output {
    /// To Postgres.
    pub to_server: Vec<u8>,
    /// To the client.
    pub to_client: Vec<u8>,
}

/// A client's side of a pool. No socket and no clock inside.
///
/// The driver feeds bytes: [`Conversation::unattached`] while the client has no server connection;
/// [`Conversation::attach`], then [`Conversation::from_client`] and [`Conversation::from_server`] while it has. After each
/// of these it asks [`Conversation::settle`] whether the connection may be given back. Each call returns how many bytes it
/// took: the rest must be brought again, with what follows.
pub struct Conversation {
    interner: Arc<Interner>,
    /// False in session mode: messages pass as they are.
    rewrites: bool,
    named: HashMap<Box<[u8]>, Arc<Statement>>,
    named_bytes: usize,
    unnamed: Option<Arc<Statement>>,
    expected: VecDeque<Expected>,
    status: Status,
    /// Messages of the extended protocol were sent and no `ReadyForQuery` has come since.
    open_batch: bool,
    /// An error came in the middle of a batch whose `Sync` the client has yet to send.
    skipping: bool,
    copy: Copy,
    client_rest: Rest,
    server_rest: Rest,
    hints: Hints,
    custom_settings: Vec<String>,
    /// Settings that the session began with and those that it has changed since.
    settings: Arc<Settings>,
    first_settings: Arc<Settings>,
    told: Arc<Reported>,
    pins: Vec<Pin>,
    /// Something was sent since Postgres was asked what is left in the session.
    used: bool,
    answer: Answer,
    asked: Hints,
    /// Postgres's error to a statement of ours.
    own_error: Option<Box<[u8]>>,
}

/// Transaction status, as `ReadyForQuery` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Idle,
    InTransaction,
    Failed,
}

/// COPY FROM STDIN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Copy {
    No,
    /// Postgres takes data and ignores `Sync`.
    In,
    /// The client has sent the end.
    Ended,
}

/// What to do with the rest of a message whose beginning was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    None,
    Pass(usize),
    Drop(usize),
}

/// A message that was sent, in whose place an answer is to come.
#[derive(Debug)]
enum Expected {
    /// The client's own `Parse`.
    Parse {
        statement: Arc<Statement>,
        name: Box<[u8]>,
    },
    /// One put in; the client hears nothing.
    OwnParse {
        statement: Arc<Statement>,
    },
    /// The client's `Parse` of what the server has already: the answer is made up when its turn comes.
    MadeUpParse {
        name: Box<[u8]>,
    },
    /// The client's `Close` of a portal.
    Close,
    /// One put in.
    OwnClose {
        id: StatementId,
    },
    /// The client's `Close` of a statement, which others may go on using.
    MadeUpClose {
        name: Box<[u8]>,
        statement: Option<Arc<Statement>>,
    },
    /// Session mode: a `Parse` or `Close` that passes.
    Passed,
    Bind {
        id: Option<StatementId>,
    },
    Describe {
        id: Option<StatementId>,
    },
    Execute,
    Sync,
    /// A simple query or a function call.
    Query,
    /// `DEALLOCATE` of a statement by its name here.
    Deallocate {
        name: Box<[u8]>,
        id: StatementId,
    },
    /// A statement that is refused here: the error is given when its turn comes.
    Refused,
    /// `CopyDone` or `CopyFail` sent before COPY was known to begin.
    CopyEnd,
    /// Settings of this session on a connection that had others.
    Replay,
    /// What is left in the session?
    Question,
    /// Everything taken back, after what no question tells of.
    Reset,
}

/// What is to become of the server connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settled {
    /// Go on: an answer, the end of a transaction or a batch is outstanding.
    Busy,
    /// It may go to somebody else.
    Free,
    /// The client is idle, but what it left in the session ties it to this connection.
    Pinned(Pin),
}

impl Conversation {
    /// A client that has logged in. `settings` are those it began with on top of what its connections are opened with;
    /// `told`: the parameters that it was told.
    pub fn new(interner: Arc<Interner>, settings: impl Into<Arc<Settings>>, told: Arc<Reported>) -> Self {
        let settings = settings.into();
        Self {
            interner,
            rewrites: true,
            named: HashMap::new(),
            named_bytes: 0,
            unnamed: None,
            expected: VecDeque::new(),
            status: Status::Idle,
            open_batch: false,
            skipping: false,
            copy: Copy::No,
            client_rest: Rest::None,
            server_rest: Rest::None,
            hints: Hints::NONE,
            custom_settings: Vec::new(),
            first_settings: settings.clone(),
            settings,
            told,
            pins: Vec::new(),
            used: false,
            answer: Answer::default(),
            asked: Hints::NONE,
            own_error: None,
        }
    }

    /// A client that keeps its server connection to the end.
    pub fn session_mode(interner: Arc<Interner>, settings: impl Into<Arc<Settings>>, told: Arc<Reported>) -> Self {
        Self { rewrites: false, pins: vec![Pin::SessionMode], ..Self::new(interner, settings, told) }
    }

    /// Settings that a server connection should have for this client.
    pub fn settings(&self) -> &Arc<Settings> {
        &self.settings
    }

    /// Begins to use a server connection. If its settings differ, statements that change them are put out first: until
    /// they are done, nothing is taken from the client.
    pub fn attach(&mut self, server: &mut ServerState, output: &mut Output) {
        if !self.replay(server, output) {
            self.announce(server, &mut output.to_client);
        }
    }

    /// Brings the connection to the client's settings; false when it has them.
    fn replay(&mut self, server: &mut ServerState, output: &mut Output) -> bool {
        let text = session::replay(&server.settings, &self.settings);
        server.settings = self.settings.clone();
        let Some(text) = text else { return false };
        self.write_query(&text, &mut output.to_server);
        self.expected.push_back(Expected::Replay);
        true
    }

    /// True while Postgres works at a statement of ours: until then nothing is taken from the client.
    fn is_own_turn(&self) -> bool {
        matches!(self.expected.front(), Some(Expected::Replay | Expected::Question | Expected::Reset))
    }

    /// Postgres's error to a statement that this put in, the body of an `ErrorResponse`: the connection is not as it must be.
    pub fn own_error(&self) -> Option<&[u8]> {
        self.own_error.as_deref()
    }

    /// What is to become of the connection now. May put out a question of its own.
    pub fn settle(&mut self, server: &mut ServerState, output: &mut Output) -> Settled {
        let idle = self.expected.is_empty() && self.status == Status::Idle && self.copy == Copy::No;
        let whole = self.client_rest == Rest::None && self.server_rest == Rest::None;
        if !idle || !whole || self.open_batch || self.skipping {
            return Settled::Busy;
        }
        if self.rewrites && std::mem::take(&mut self.used) {
            if self.hints.intersects(Hints::UNKNOWABLE) {
                self.pin(Pin::Unknowable);
            }
            let hints = self.hints.without(Hints::UNKNOWABLE | Hints::UNSEEN);
            if !hints.is_empty() {
                let text = session::question(hints, &self.custom_settings);
                self.write_query(&text, &mut output.to_server);
                server.unnamed = None;
                self.asked = hints;
                self.answer = Answer::default();
                self.expected.push_back(Expected::Question);
                return Settled::Busy;
            }
        }
        if self.rewrites && self.pins.is_empty() && self.hints.intersects(Hints::UNSEEN) {
            // A function or a text that nobody saw may have changed what Postgres lists nowhere.
            self.hints = Hints::NONE;
            self.write_query(session::RESET_EVERYTHING, &mut output.to_server);
            server.settings = Arc::default();
            self.expected.push_back(Expected::Reset);
            return Settled::Busy;
        }
        if self.expected.capacity() > 64 {
            self.expected = VecDeque::new();
        }
        let Some(pin) = self.pins.first().copied() else { return Settled::Free };
        // What `RESET` has taken back to the server's own value may have begun with another for this client.
        if self.replay(server, output) { Settled::Busy } else { Settled::Pinned(pin) }
    }

    /// True when the client has an open transaction or waits for an answer.
    pub fn is_busy(&self) -> bool {
        !self.expected.is_empty() || self.status != Status::Idle || self.open_batch || self.copy != Copy::No
    }

    /// Postgres has answered the question.
    fn answered(&mut self, server: &mut ServerState) {
        self.pins.retain(|pin| matches!(pin, Pin::Unknowable | Pin::LongStatement));
        if self.own_error.take().is_some() {
            // Nothing is known, so nothing may be assumed.
            self.pin(Pin::Unknowable);
            self.hints = Hints::NONE;
            return;
        }
        let unseen = self.hints.intersects(Hints::UNSEEN);
        let Answer { settings, pins } = std::mem::take(&mut self.answer);
        pins.into_iter().for_each(|pin| self.pin(pin));
        self.hints = self.pins.iter().fold(Hints::NONE, |hints, pin| hints | pin.hint());
        if unseen {
            self.hints |= Hints::UNSEEN;
        }
        if self.asked.intersects(Hints::SETTINGS) && settings != *server.settings {
            server.settings = Arc::new(settings.clone());
            let mut with_first = Settings::clone(&self.first_settings);
            with_first.extend(settings);
            self.settings = if with_first == *server.settings { server.settings.clone() } else { Arc::new(with_first) };
        }
    }

    fn pin(&mut self, pin: Pin) {
        if !self.pins.contains(&pin) {
            self.pins.push(pin);
        }
    }

    /// `DISCARD ALL` or the like was done: all statements are gone.
    fn forget_statements(&mut self, server: &mut ServerState) {
        server.forget_statements();
        self.named.clear();
        self.named_bytes = 0;
        self.unnamed = None;
    }

    fn forget_name(&mut self, name: &[u8]) -> Option<Arc<Statement>> {
        let statement = self.named.remove(name)?;
        self.named_bytes = self.named_bytes.saturating_sub(statement.bytes());
        Some(statement)
    }

    fn remember_name(&mut self, name: &[u8], statement: Arc<Statement>) -> Result<(), Violation> {
        self.named_bytes += statement.bytes();
        self.named.insert(name.into(), statement);
        if self.named.len() > STATEMENTS_MAX || self.named_bytes > STATEMENTS_MAX_BYTES {
            return Err(Violation::TooManyStatements);
        }
        Ok(())
    }

    /// Tells the client what other connections' parameters it has not been told.
    fn announce(&mut self, server: &mut ServerState, to_client: &mut Vec<u8>) {
        if Arc::ptr_eq(&self.told, &server.reported) {
            return;
        }
        if self.told == server.reported {
            // One of the two for both, always the same one: in the end all that are equal are one, and need not be compared.
            if Arc::as_ptr(&self.told) < Arc::as_ptr(&server.reported) {
                server.reported = self.told.clone();
            } else {
                self.told = server.reported.clone();
            }
            return;
        }
        for (name, value) in server.reported.iter().filter(|(name, value)| self.told.get(*name) != Some(value)) {
            frame::write(to_client, b'S', |body| {
                for text in [name, value] {
                    body.extend_from_slice(text.as_bytes());
                    body.push(0);
                }
            });
        }
        self.told = server.reported.clone();
    }

    fn write_query(&self, text: &str, to_server: &mut Vec<u8>) {
        frame::write(to_server, b'Q', |body| {
            body.extend_from_slice(text.as_bytes());
            body.push(0);
        });
    }
}
