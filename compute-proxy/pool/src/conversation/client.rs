//! The client's half of a conversation.

use std::sync::Arc;

use super::{CUSTOM_SETTINGS_MAX, Conversation, Copy, EXPECTED_MAX, Expected, OUTPUT_MAX_BYTES, Output, Rest, Status};
use crate::{
    Violation,
    frame::{self, HEADER_BYTES, Header},
    server_state::ServerState,
    session::Pin,
    sql::{self, Effects, Hints},
    statement::{NAME_PREFIX, Statement, StatementId},
};

/// Bytes of a message that are looked at; of a longer one the rest passes unseen.
const WHOLE_MAX_BYTES: usize = 64 * 1024;

/// Bytes of a statement's text that is looked at, and kept for other server connections.
const TEXT_MAX_BYTES: usize = 1024 * 1024;

/// A name that no server connection has, for statements that the client does not have.
const NO_SUCH_NAME: &[u8] = b"dormouse_none";

/// What a client without a server connection wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unattached {
    /// Nothing yet.
    More,
    /// A server connection.
    Attach,
    /// To leave.
    Terminate,
}

/// Whether there is more to take.
#[derive(PartialEq, Eq)]
enum Taken {
    /// So many bytes.
    Bytes(usize),
    /// The message is not all there.
    Not,
}

impl Conversation {
    /// Looks at what a client without a server connection has sent. Answers a lone `Sync` itself.
    pub fn unattached(&mut self, input: &[u8], output: &mut Output) -> Result<(usize, Unattached), Violation> {
        let mut taken = self.pass_client_rest(input, output);
        loop {
            let rest = &input[taken..];
            let header = if self.client_rest == Rest::None { frame::header(rest)? } else { None };
            let Some(Header { kind, bytes }) = header else { return Ok((taken, Unattached::More)) };
            if self.skipping && !matches!(kind, b'S' | b'X') {
                self.client_rest = Rest::Drop(bytes);
                taken += self.pass_client_rest(rest, output);
                continue;
            }
            match kind {
                b'X' => return Ok((taken, Unattached::Terminate)),
                b'S' if bytes == HEADER_BYTES => {
                    self.skipping = false;
                    output.to_client.extend_from_slice(READY);
                    taken += bytes;
                }
                // The end of a COPY that has failed, or a flush of nothing: Postgres ignores them too.
                b'd' | b'c' | b'f' | b'H' => {
                    self.client_rest = Rest::Drop(bytes);
                    taken += self.pass_client_rest(rest, output);
                }
                // A `Sync` with something in it is for Postgres to complain about: it might be of any length.
                b'Q' | b'P' | b'B' | b'D' | b'C' | b'E' | b'F' | b'S' => {
                    let enough = bytes.min(self.needed_bytes(kind, bytes));
                    let state = if rest.len() >= enough { Unattached::Attach } else { Unattached::More };
                    return Ok((taken, state));
                }
                other => return Err(Violation::MessageType(other)),
            }
        }
    }

    /// Answers the message with which `input` begins, for which there is no server connection, with an error.
    pub fn refuse_first(&mut self, input: &[u8], error: &[u8], output: &mut Output) {
        output.to_client.extend_from_slice(error);
        match frame::header(input) {
            Ok(Some(Header { kind: b'Q' | b'F', bytes })) => {
                self.client_rest = Rest::Drop(bytes);
                output.to_client.extend_from_slice(READY);
            }
            _ => self.skipping = true,
        }
    }

    /// Takes what an attached client has sent. Errors end the session.
    pub fn from_client(
        &mut self,
        input: &[u8],
        server: &mut ServerState,
        output: &mut Output,
    ) -> Result<(usize, Unattached), Violation> {
        let mut taken = self.pass_client_rest(input, output);
        while self.client_rest == Rest::None && self.has_room(output) {
            let rest = &input[taken..];
            let Some(header) = frame::header(rest)? else { break };
            if header.kind == b'X' {
                return Ok((taken, Unattached::Terminate));
            }
            match self.take_message(header, rest, server, output)? {
                Taken::Bytes(bytes) => taken += bytes,
                Taken::Not => break,
            }
        }
        Ok((taken, Unattached::More))
    }

    /// False while the client must wait: too much is on its way.
    pub fn has_room(&self, output: &Output) -> bool {
        self.expected.len() < EXPECTED_MAX && output.to_server.len() < OUTPUT_MAX_BYTES && !self.is_own_turn()
    }

    fn pass_client_rest(&mut self, input: &[u8], output: &mut Output) -> usize {
        let (taken, rest) = match self.client_rest {
            Rest::None => return 0,
            Rest::Pass(bytes) => {
                let taken = bytes.min(input.len());
                output.to_server.extend_from_slice(&input[..taken]);
                (taken, bytes - taken)
            }
            Rest::Drop(bytes) => (bytes.min(input.len()), bytes.saturating_sub(input.len())),
        };
        self.client_rest = match self.client_rest {
            _ if rest == 0 => Rest::None,
            Rest::Drop(_) => Rest::Drop(rest),
            Rest::Pass(_) | Rest::None => Rest::Pass(rest),
        };
        taken
    }

    /// Bytes of a message that must be there before it is taken.
    fn needed_bytes(&self, kind: u8, bytes: usize) -> usize {
        match kind {
            b'd' => bytes.min(HEADER_BYTES),
            b'P' | b'Q' if bytes <= TEXT_MAX_BYTES => bytes,
            _ => bytes.min(WHOLE_MAX_BYTES),
        }
    }

    /// Takes one message, or the beginning of a long one.
    fn take_message(
        &mut self,
        Header { kind, bytes }: Header,
        input: &[u8],
        server: &mut ServerState,
        output: &mut Output,
    ) -> Result<Taken, Violation> {
        let needed = self.needed_bytes(kind, bytes);
        if input.len() < needed {
            return Ok(Taken::Not);
        }
        let head = &input[..bytes.min(input.len()).min(needed.max(WHOLE_MAX_BYTES))];
        if self.skipping && kind != b'S' {
            self.client_rest = Rest::Drop(bytes);
            return Ok(Taken::Bytes(self.pass_client_rest(input, output)));
        }
        self.used = true;
        let to_server = &mut output.to_server;
        match kind {
            b'Q' => self.query(head, bytes, server, output)?,
            b'P' => self.parse(head, bytes, server, output)?,
            b'B' => self.bind(head, bytes, server, output)?,
            b'D' => self.describe(head, bytes, server, to_server)?,
            b'C' => self.close(head, bytes, output)?,
            b'E' => self.extended(Expected::Execute, head, to_server),
            b'S' => self.sync(head, server, to_server),
            b'H' => to_server.extend_from_slice(head),
            b'F' => {
                self.hints |= if self.rewrites { Hints::ANY } else { Hints::NONE };
                self.expected.push_back(Expected::Query);
                to_server.extend_from_slice(head);
            }
            b'd' => to_server.extend_from_slice(head),
            b'c' | b'f' => self.end_copy(head, to_server),
            other => return Err(Violation::MessageType(other)),
        }
        if bytes > head.len() {
            self.client_rest = Rest::Pass(bytes - head.len());
        }
        Ok(Taken::Bytes(head.len()))
    }

    fn extended(&mut self, expected: Expected, message: &[u8], to_server: &mut Vec<u8>) {
        self.open_batch = true;
        self.expected.push_back(expected);
        to_server.extend_from_slice(message);
    }

    fn sync(&mut self, message: &[u8], server: &mut ServerState, to_server: &mut Vec<u8>) {
        self.skipping = false;
        to_server.extend_from_slice(message);
        // Postgres ignores it while it takes COPY data.
        if self.copy != Copy::In {
            self.open_batch = true;
            self.expected.push_back(Expected::Sync);
            server.end_batch();
        }
    }

    fn end_copy(&mut self, message: &[u8], to_server: &mut Vec<u8>) {
        to_server.extend_from_slice(message);
        if self.copy == Copy::In {
            self.copy = Copy::Ended;
        } else if !self.expected.is_empty() {
            self.expected.push_back(Expected::CopyEnd);
        }
    }

    fn query(
        &mut self,
        head: &[u8],
        bytes: usize,
        server: &mut ServerState,
        output: &mut Output,
    ) -> Result<(), Violation> {
        if !self.rewrites {
            self.expected.push_back(Expected::Query);
            output.to_server.extend_from_slice(head);
            return Ok(());
        }
        let text = head[HEADER_BYTES..].strip_suffix(b"\0").unwrap_or(&head[HEADER_BYTES..]);
        let mut effects = sql::effects(text);
        if head.len() < bytes {
            // The rest passes unseen: it may do anything.
            effects.hints |= Hints::ANY | Hints::UNSEEN;
        }
        if self.note(&effects) {
            output.to_client.extend_from_slice(&sequence_refusal());
            output.to_client.extend_from_slice(READY);
            return Ok(());
        }
        let to_server = &mut output.to_server;
        self.unnamed = None;
        server.unnamed = None;
        self.pins.retain(|pin| *pin != Pin::LongStatement);
        server.end_batch();
        let known = effects.deallocates.as_ref().and_then(|name| self.named.get_key_value(name.as_bytes()));
        if let Some((name, statement)) = known
            && let Some(id) = statement.id()
        {
            let (name, statement) = (name.clone(), statement.clone());
            self.prepare(&statement, id, server, to_server);
            // Whatever was put in is answered even if this fails.
            server.end_batch();
            self.expected.push_back(Expected::Deallocate { name, id });
            frame::write(to_server, b'Q', |body| {
                body.extend_from_slice(b"DEALLOCATE ");
                id.write(body);
                body.push(0);
            });
            return Ok(());
        }
        self.expected.push_back(Expected::Query);
        to_server.extend_from_slice(head);
        Ok(())
    }

    /// Takes note of what a statement may leave behind. True: it asks for what is not there, and must not run.
    fn note(&mut self, effects: &Effects) -> bool {
        self.hints |= effects.hints;
        for name in &effects.custom_settings {
            if self.custom_settings.len() >= CUSTOM_SETTINGS_MAX {
                self.pin(Pin::Unknowable);
            } else if !self.custom_settings.contains(name) {
                self.custom_settings.push(name.clone());
            }
        }
        let alone = || {
            let runs = |expected: &Expected| {
                matches!(expected, Expected::Execute | Expected::Query | Expected::Sync | Expected::Deallocate { .. })
            };
            self.status == Status::Idle && self.pins.is_empty() && !self.expected.iter().any(runs)
        };
        effects.reads_session_sequence && alone()
    }

    fn parse(
        &mut self,
        head: &[u8],
        bytes: usize,
        server: &mut ServerState,
        output: &mut Output,
    ) -> Result<(), Violation> {
        let to_server = &mut output.to_server;
        if !self.rewrites {
            self.extended(Expected::Passed, head, to_server);
            return Ok(());
        }
        let mut definition = &head[HEADER_BYTES..];
        let name = frame::take_string(&mut definition).ok_or(Violation::Layout)?;
        if name.is_empty() {
            return self.parse_unnamed(head, definition, bytes, server, to_server);
        }
        if bytes > head.len() {
            return Err(Violation::StatementTooLong);
        }
        let statement = self.interner.intern(definition);
        let Some(id) = statement.id() else { return Err(Violation::Layout) };
        if let Some(other) = self.named.get(name).cloned()
            && let Some(id) = other.id()
        {
            // Postgres must say that this name is taken: so must one be that it has.
            self.prepare(&other, id, server, to_server);
            self.expected.push_back(Expected::Passed);
            self.open_batch = true;
            write_parse(to_server, Some(id), definition);
            return Ok(());
        }
        self.open_batch = true;
        if self.status == Status::Failed {
            // Postgres must say that the transaction has failed, unless what is on its way has ended it by then.
            server.unsure(id);
        }
        let need = server.need(&statement, id);
        self.make_room(need.evict, need.close.then_some(id), to_server);
        if need.parse {
            write_parse(to_server, Some(id), definition);
            self.expected.push_back(Expected::Parse { statement: statement.clone(), name: name.into() });
        } else if self.expected.is_empty() {
            output.to_client.extend_from_slice(PARSE_COMPLETE);
        } else {
            self.expected.push_back(Expected::MadeUpParse { name: name.into() });
        }
        self.remember_name(name, statement)
    }

    fn parse_unnamed(
        &mut self,
        head: &[u8],
        definition: &[u8],
        bytes: usize,
        server: &mut ServerState,
        to_server: &mut Vec<u8>,
    ) -> Result<(), Violation> {
        let statement = Arc::new(Statement::unnamed(definition));
        self.pins.retain(|pin| *pin != Pin::LongStatement);
        if bytes > head.len() {
            // It cannot be brought to another connection, so the client stays on this one until it is replaced.
            self.pin(Pin::LongStatement);
            self.hints |= Hints::ANY | Hints::UNSEEN;
        }
        self.unnamed = Some(statement.clone());
        server.unnamed = Some(statement.clone());
        self.extended(Expected::Parse { statement, name: Box::default() }, head, to_server);
        Ok(())
    }

    fn bind(
        &mut self,
        head: &[u8],
        bytes: usize,
        server: &mut ServerState,
        output: &mut Output,
    ) -> Result<(), Violation> {
        if !self.rewrites {
            self.extended(Expected::Bind { id: None }, head, &mut output.to_server);
            return Ok(());
        }
        let mut rest = &head[HEADER_BYTES..];
        let portal = frame::take_string(&mut rest).ok_or(Violation::Layout)?;
        let name = frame::take_string(&mut rest).ok_or(Violation::Layout)?;
        let statement = if name.is_empty() { self.unnamed.clone() } else { self.named.get(name).cloned() };
        if statement.is_some_and(|statement| self.note(statement.effects())) {
            self.refuse(&mut output.to_client);
            return Ok(());
        }
        let to_server = &mut output.to_server;
        let id = self.statement_for_use(name, server, to_server);
        if name.is_empty() && self.unnamed.is_some() {
            self.extended(Expected::Bind { id: None }, head, to_server);
            return Ok(());
        }
        let name_start = to_server.len() + HEADER_BYTES + portal.len() + 1;
        to_server.extend_from_slice(&[b'B', 0, 0, 0, 0]);
        to_server.extend_from_slice(portal);
        to_server.push(0);
        write_name(to_server, id, name);
        let length = bytes - 1 + (to_server.len() - name_start) - name.len();
        let at = name_start - portal.len() - 1 - 4;
        to_server[at..at + 4].copy_from_slice(&(length as u32).to_be_bytes());
        to_server.push(0);
        to_server.extend_from_slice(rest);
        self.open_batch = true;
        self.expected.push_back(Expected::Bind { id });
        Ok(())
    }

    /// Answers with an error in the batch's turn, as Postgres would: the rest of the batch is skipped.
    fn refuse(&mut self, to_client: &mut Vec<u8>) {
        self.open_batch = true;
        self.skipping = true;
        self.expected.push_back(Expected::Refused);
        self.make_up(to_client);
    }

    fn describe(
        &mut self,
        head: &[u8],
        bytes: usize,
        server: &mut ServerState,
        to_server: &mut Vec<u8>,
    ) -> Result<(), Violation> {
        match head[HEADER_BYTES..].split_first() {
            Some((b'S', mut rest)) if self.rewrites && bytes == head.len() => {
                let name = frame::take_string(&mut rest).ok_or(Violation::Layout)?;
                let id = self.statement_for_use(name, server, to_server);
                self.open_batch = true;
                self.expected.push_back(Expected::Describe { id });
                let unnamed = name.is_empty() && self.unnamed.is_some();
                frame::write(to_server, b'D', |body| {
                    body.push(b'S');
                    if !unnamed {
                        write_name(body, id, name);
                    }
                    body.push(0);
                });
            }
            Some(_) => self.extended(Expected::Describe { id: None }, head, to_server),
            None => return Err(Violation::Layout),
        }
        Ok(())
    }

    fn close(&mut self, head: &[u8], bytes: usize, output: &mut Output) -> Result<(), Violation> {
        match head[HEADER_BYTES..].split_first() {
            Some((b'S', mut rest)) if self.rewrites && bytes == head.len() => {
                let name = frame::take_string(&mut rest).ok_or(Violation::Layout)?;
                self.open_batch = true;
                let statement = if name.is_empty() { self.unnamed.take() } else { self.forget_name(name) };
                if self.expected.is_empty() {
                    output.to_client.extend_from_slice(CLOSE_COMPLETE);
                } else {
                    self.expected.push_back(Expected::MadeUpClose { name: name.into(), statement });
                }
            }
            Some(_) => {
                let expected = if self.rewrites { Expected::Close } else { Expected::Passed };
                self.extended(expected, head, &mut output.to_server);
            }
            None => return Err(Violation::Layout),
        }
        Ok(())
    }

    /// Sees to it that the server connection has a statement that the client names; its id there when it is a named one.
    fn statement_for_use(
        &mut self,
        name: &[u8],
        server: &mut ServerState,
        to_server: &mut Vec<u8>,
    ) -> Option<StatementId> {
        let statement = if name.is_empty() { self.unnamed.clone() } else { self.named.get(name).cloned() }?;
        let id = statement.id();
        match id {
            Some(id) => self.prepare(&statement, id, server, to_server),
            None if !server.unnamed.as_ref().is_some_and(|there| Arc::ptr_eq(there, &statement)) => {
                write_parse(to_server, None, statement.definition());
                server.unnamed = Some(statement.clone());
                self.expected.push_back(Expected::OwnParse { statement });
            }
            None => {}
        }
        id
    }

    /// Puts in what it takes for the server connection to have a named statement.
    fn prepare(
        &mut self,
        statement: &Arc<Statement>,
        id: StatementId,
        server: &mut ServerState,
        to_server: &mut Vec<u8>,
    ) {
        let need = server.need(statement, id);
        self.make_room(need.evict, need.close.then_some(id), to_server);
        if need.parse {
            write_parse(to_server, Some(id), statement.definition());
            self.expected.push_back(Expected::OwnParse { statement: statement.clone() });
        }
    }

    fn make_room(&mut self, evict: Option<StatementId>, close: Option<StatementId>, to_server: &mut Vec<u8>) {
        for id in evict.into_iter().chain(close) {
            write_close(to_server, id);
            self.expected.push_back(Expected::OwnClose { id });
        }
    }
}

/// `ParseComplete`.
pub(super) const PARSE_COMPLETE: &[u8] = b"1\0\0\0\x04";

/// `ReadyForQuery`, in no transaction.
const READY: &[u8] = b"Z\0\0\0\x05I";

/// `CloseComplete`.
pub(super) const CLOSE_COMPLETE: &[u8] = b"3\0\0\0\x04";

fn write_parse(to_server: &mut Vec<u8>, id: Option<StatementId>, definition: &[u8]) {
    frame::write(to_server, b'P', |body| {
        if let Some(id) = id {
            id.write(body);
        }
        body.push(0);
        body.extend_from_slice(definition);
    });
}

fn write_close(to_server: &mut Vec<u8>, id: StatementId) {
    frame::write(to_server, b'C', |body| {
        body.push(b'S');
        id.write(body);
        body.push(0);
    });
}

/// The name on the server: ours, or the client's own where it has no such statement, so that Postgres says so.
fn write_name(output: &mut Vec<u8>, id: Option<StatementId>, name: &[u8]) {
    match id {
        Some(id) => id.write(output),
        None if name.is_empty() || name.starts_with(NAME_PREFIX.as_bytes()) => output.extend_from_slice(NO_SUCH_NAME),
        None => output.extend_from_slice(name),
    }
}

/// The answer to what asks for the last value of a sequence "in this session", which is not there.
pub(super) fn sequence_refusal() -> Vec<u8> {
    let message = "currval and lastval do not work through the pool outside of the transaction that called nextval";
    let hint = "Use INSERT ... RETURNING, call nextval in the same transaction, or connect to the endpoint's host without \
                -pooler.";
    let mut error = Vec::new();
    frame::write(&mut error, b'E', |body| {
        for (kind, text) in [(b'S', "ERROR"), (b'V', "ERROR"), (b'C', "0A000"), (b'M', message), (b'H', hint)] {
            body.push(kind);
            body.extend_from_slice(text.as_bytes());
            body.push(0);
        }
        body.push(0);
    });
    error
}
