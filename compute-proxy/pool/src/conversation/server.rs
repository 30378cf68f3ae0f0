//! The server's half of a conversation.

use std::sync::Arc;

use super::{
    Conversation, Copy, Expected, Output, Rest, Status,
    client::{CLOSE_COMPLETE, PARSE_COMPLETE},
};
use crate::{
    Violation,
    frame::{self, HEADER_BYTES, Header},
    server_state::ServerState,
    session::Reported,
    sql::Hints,
    statement::{NAME_PREFIX, StatementId},
};

/// Bytes of a message to look into that Postgres may send; a longer error passes as it is.
const WHOLE_MAX_BYTES: usize = 64 * 1024;

impl Conversation {
    /// Takes what Postgres has sent. Errors are Postgres's: the connection cannot be used further.
    pub fn from_server(
        &mut self,
        input: &[u8],
        server: &mut ServerState,
        output: &mut Output,
    ) -> Result<usize, Violation> {
        let mut taken = self.pass_server_rest(input, output);
        while self.server_rest == Rest::None && output.to_client.len() < super::OUTPUT_MAX_BYTES {
            let rest = &input[taken..];
            let Some(Header { kind, bytes }) = frame::header(rest)? else { break };
            if is_looked_into(kind, self.expected.front()) && bytes <= WHOLE_MAX_BYTES {
                if rest.len() < bytes {
                    break;
                }
                self.take_answer(kind, &rest[..bytes], server, output)?;
                taken += bytes;
            } else {
                self.server_rest = if self.is_own(kind) { Rest::Drop(bytes) } else { Rest::Pass(bytes) };
                self.long_answer(kind);
                taken += self.pass_server_rest(rest, output);
            }
        }
        Ok(taken)
    }

    fn pass_server_rest(&mut self, input: &[u8], output: &mut Output) -> usize {
        let (taken, rest) = match self.server_rest {
            Rest::None => return 0,
            Rest::Pass(bytes) => {
                let taken = bytes.min(input.len());
                output.to_client.extend_from_slice(&input[..taken]);
                (taken, Rest::Pass(bytes - taken))
            }
            Rest::Drop(bytes) => {
                let taken = bytes.min(input.len());
                (taken, Rest::Drop(bytes - taken))
            }
        };
        self.server_rest = if matches!(rest, Rest::Pass(0) | Rest::Drop(0)) { Rest::None } else { rest };
        taken
    }

    /// True for an answer to a statement of ours: the client is not to see it.
    fn is_own(&self, kind: u8) -> bool {
        kind != b'A' && self.is_own_turn()
    }

    /// What a message does that passes without being looked into.
    fn long_answer(&mut self, kind: u8) {
        match kind {
            b'T' | b'n' if matches!(self.expected.front(), Some(Expected::Describe { .. })) => {
                self.expected.pop_front();
            }
            b'E' => self.copy = Copy::No,
            _ => {}
        }
        if kind == b'E' && !self.is_query() {
            self.skip_to_sync(None);
        }
    }

    fn take_answer(
        &mut self,
        kind: u8,
        message: &[u8],
        server: &mut ServerState,
        output: &mut Output,
    ) -> Result<(), Violation> {
        let body = &message[HEADER_BYTES..];
        let own = self.is_own(kind);
        let mut visible = !own;
        match kind {
            b'1' => visible = self.parse_complete(server)?,
            b'3' => visible = self.close_complete(server)?,
            b'2' => match self.expected.pop_front() {
                Some(Expected::Bind { .. }) => {}
                _ => return Err(Violation::Unexpected(kind)),
            },
            b'T' | b'n' => {
                if matches!(self.expected.front(), Some(Expected::Describe { .. })) {
                    self.expected.pop_front();
                }
            }
            b'C' | b'I' | b's' => self.command_complete(body, server),
            b'G' => self.copy_begins(),
            b'D' => self.answer.take_row(body).ok_or(Violation::Unexpected(kind))?,
            b'E' if own => self.own_error = Some(body.into()),
            b'E' => {
                self.error(message, server, &mut output.to_client);
                visible = false;
            }
            b'S' => visible = self.parameter(body, server).ok_or(Violation::Layout)?,
            b'Z' => {
                visible = self.ready(body, server, output)?;
            }
            _ => {}
        }
        if visible {
            output.to_client.extend_from_slice(message);
        }
        self.make_up(&mut output.to_client);
        Ok(())
    }

    fn parse_complete(&mut self, server: &mut ServerState) -> Result<bool, Violation> {
        let (statement, visible) = match self.expected.pop_front() {
            Some(Expected::Parse { statement, .. }) => (statement, true),
            Some(Expected::OwnParse { statement }) => (statement, false),
            Some(Expected::Passed) => return Ok(true),
            _ => return Err(Violation::Unexpected(b'1')),
        };
        if let Some(id) = statement.id() {
            server.parsed(id);
        }
        Ok(visible)
    }

    fn close_complete(&mut self, server: &mut ServerState) -> Result<bool, Violation> {
        match self.expected.pop_front() {
            Some(Expected::Close | Expected::Passed) => Ok(true),
            Some(Expected::OwnClose { id }) => {
                server.closed(id);
                Ok(false)
            }
            _ => Err(Violation::Unexpected(b'3')),
        }
    }

    fn command_complete(&mut self, body: &[u8], server: &mut ServerState) {
        match self.expected.front() {
            Some(Expected::Execute) => {
                self.expected.pop_front();
            }
            Some(Expected::Deallocate { name, id }) if body.starts_with(b"DEALLOCATE") => {
                let (name, id) = (name.clone(), *id);
                self.forget_name(&name);
                server.unsure(id);
                server.closed(id);
            }
            _ => {}
        }
        self.copy = Copy::No;
        let all = matches!(body, b"DISCARD ALL\0" | b"DEALLOCATE ALL\0");
        if all && self.rewrites {
            self.forget_statements(server);
        }
        if body == b"DISCARD ALL\0" {
            self.pins.retain(|pin| !matches!(pin, crate::session::Pin::Unknowable));
        }
    }

    /// `CopyInResponse`: a `Sync` that was sent behind the statement is ignored by Postgres.
    fn copy_begins(&mut self) {
        self.copy = Copy::In;
        while matches!(self.expected.get(1), Some(Expected::Sync)) {
            self.expected.remove(1);
        }
        if matches!(self.expected.get(1), Some(Expected::CopyEnd)) {
            self.expected.remove(1);
            self.copy = Copy::Ended;
        }
    }

    fn is_query(&self) -> bool {
        matches!(
            self.expected.front(),
            Some(
                Expected::Query | Expected::Deallocate { .. } | Expected::Replay | Expected::Question | Expected::Reset
            )
        )
    }

    fn error(&mut self, message: &[u8], server: &mut ServerState, to_client: &mut Vec<u8>) {
        let body = &message[HEADER_BYTES..];
        self.write_error(message, to_client);
        self.copy = Copy::No;
        if let Some(Expected::Bind { id: Some(id) } | Expected::Describe { id: Some(id) }) = self.expected.front() {
            // "cached plan must not change result type": whoever prepares it anew gets a new plan.
            if frame::error_fields(body).any(|field| field == (b'C', b"0A000")) {
                server.unsure(*id);
            }
        }
        if !self.is_query() {
            self.skip_to_sync(Some(server));
        }
    }

    /// Postgres skips everything up to the next `Sync`: what stood in between will never be answered.
    fn skip_to_sync(&mut self, mut server: Option<&mut ServerState>) {
        loop {
            match self.expected.front() {
                Some(Expected::Sync) => return,
                None => {
                    // Only a fatal error comes when nothing is expected.
                    self.skipping = self.open_batch;
                    return;
                }
                Some(_) => {}
            }
            match self.expected.pop_front() {
                Some(Expected::Parse { statement, name }) => {
                    if let (Some(id), Some(server)) = (statement.id(), server.as_deref_mut()) {
                        server.unsure(id);
                    }
                    if name.is_empty() {
                        self.unnamed = self.unnamed.take().filter(|unnamed| !Arc::ptr_eq(unnamed, &statement));
                    } else {
                        self.forget_name(&name);
                    }
                    if let Some(server) = server.as_deref_mut() {
                        server.unnamed = None;
                    }
                }
                Some(Expected::OwnParse { statement }) => {
                    if let Some(server) = server.as_deref_mut() {
                        match statement.id() {
                            Some(id) => server.unsure(id),
                            None => server.unnamed = None,
                        }
                    }
                }
                Some(Expected::MadeUpParse { name }) => {
                    self.forget_name(&name);
                }
                Some(Expected::MadeUpClose { name, statement: Some(statement) }) => {
                    if name.is_empty() {
                        self.unnamed = Some(statement);
                    } else {
                        self.named_bytes += statement.bytes();
                        self.named.insert(name, statement);
                    }
                }
                Some(_) | None => {}
            }
        }
    }

    /// An error of Postgres, with the client's own names of statements in place of ours.
    fn write_error(&self, message: &[u8], to_client: &mut Vec<u8>) {
        let ours = |text: &[u8]| text.windows(NAME_PREFIX.len()).any(|window| window == NAME_PREFIX.as_bytes());
        if !self.rewrites || !ours(message) {
            to_client.extend_from_slice(message);
            return;
        }
        frame::write(to_client, message[0], |body| {
            for (kind, text) in frame::error_fields(&message[HEADER_BYTES..]) {
                body.push(kind);
                self.write_renamed(text, body);
                body.push(0);
            }
            body.push(0);
        });
    }

    fn write_renamed(&self, mut text: &[u8], output: &mut Vec<u8>) {
        let prefix = NAME_PREFIX.as_bytes();
        while let Some(at) = text.windows(prefix.len()).position(|window| window == prefix) {
            let digits = text[at + prefix.len()..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            let end = at + prefix.len() + digits;
            let id = std::str::from_utf8(&text[at + prefix.len()..end]).ok().and_then(|digits| digits.parse().ok());
            let name = id.and_then(|id| self.name_of(StatementId(id)));
            output.extend_from_slice(&text[..at]);
            output.extend_from_slice(name.unwrap_or(&text[at..end]));
            text = &text[end..];
        }
        output.extend_from_slice(text);
    }

    fn name_of(&self, id: StatementId) -> Option<&[u8]> {
        self.named.iter().find(|(_, statement)| statement.id() == Some(id)).map(|(name, _)| &name[..])
    }

    /// `ParameterStatus`; true when the client is to hear it.
    fn parameter(&mut self, mut body: &[u8], server: &mut ServerState) -> Option<bool> {
        let mut text = || Some(String::from_utf8_lossy(frame::take_string(&mut body)?).into_owned());
        let (name, value) = (text()?, text()?);
        if self.rewrites && !self.is_own_turn() {
            // However it was changed: what the text did not tell, this does.
            self.hints |= Hints::SETTINGS;
        }
        let in_step = Arc::ptr_eq(&self.told, &server.reported);
        let news = self.told.get(&name) != Some(&value);
        let with = |reported: &Arc<Reported>| {
            let mut changed = Reported::clone(reported);
            changed.insert(name.clone(), value.clone());
            Arc::new(changed)
        };
        if server.reported.get(&name) != Some(&value) {
            server.reported = with(&server.reported);
        }
        if self.is_own_turn() {
            return Some(false);
        }
        if in_step {
            self.told = server.reported.clone();
        } else if news {
            self.told = with(&self.told);
        }
        Some(news)
    }

    fn ready(&mut self, body: &[u8], server: &mut ServerState, output: &mut Output) -> Result<bool, Violation> {
        self.status = match body {
            b"I" => Status::Idle,
            b"T" => Status::InTransaction,
            b"E" => Status::Failed,
            _ => return Err(Violation::Layout),
        };
        self.copy = Copy::No;
        match self.expected.pop_front() {
            Some(Expected::Sync) => {
                self.open_batch = !self.expected.is_empty();
                Ok(true)
            }
            Some(Expected::Query | Expected::Deallocate { .. }) => {
                self.open_batch &= !self.expected.is_empty();
                Ok(true)
            }
            Some(Expected::Replay) => {
                self.announce(server, &mut output.to_client);
                Ok(false)
            }
            Some(Expected::Question) => {
                self.answered(server);
                Ok(false)
            }
            Some(Expected::Reset) => Ok(false),
            _ => Err(Violation::Unexpected(b'Z')),
        }
    }

    /// Gives answers that are made up, as soon as it is their turn.
    pub(super) fn make_up(&mut self, to_client: &mut Vec<u8>) {
        loop {
            match self.expected.front() {
                Some(Expected::MadeUpParse { .. }) => to_client.extend_from_slice(PARSE_COMPLETE),
                Some(Expected::MadeUpClose { .. }) => to_client.extend_from_slice(CLOSE_COMPLETE),
                Some(Expected::Refused) => to_client.extend_from_slice(&super::client::sequence_refusal()),
                Some(Expected::CopyEnd) => {}
                _ => return,
            }
            self.expected.pop_front();
        }
    }
}

/// Types of messages that change what is known. All others only pass.
fn is_looked_into(kind: u8, expected: Option<&Expected>) -> bool {
    match kind {
        b'1' | b'2' | b'3' | b'C' | b'E' | b'G' | b'I' | b'S' | b'T' | b'Z' | b'n' | b's' => true,
        b'D' => matches!(expected, Some(Expected::Question)),
        _ => false,
    }
}
