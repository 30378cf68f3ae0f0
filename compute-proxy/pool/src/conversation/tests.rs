//! What is said in the corners of the protocol, message by message.

use super::*;
use crate::frame::{self, HEADER_BYTES};

/// A conversation, one server connection, and what was written to whom since the last look.
struct Talk {
    conversation: Conversation,
    server: ServerState,
    output: Output,
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    frame::write(&mut message, kind, |output| output.extend_from_slice(body));
    message
}

/// Types, and bodies that are short and printable.
fn shown(mut bytes: &[u8]) -> String {
    let mut all = Vec::new();
    while let Some(header) = frame::header(bytes).expect("framed") {
        let body = String::from_utf8_lossy(&bytes[HEADER_BYTES..header.bytes]).replace('\0', "|");
        all.push(format!("{}:{}", char::from(header.kind), body));
        bytes = &bytes[header.bytes..];
    }
    all.join(" ")
}

impl Talk {
    fn new() -> Self {
        let conversation = Conversation::new(Arc::default(), Settings::new(), Arc::default());
        Self { conversation, server: ServerState::new(Arc::default(), 10), output: Output::default() }
    }

    /// The client says something; what the server hears, what the client hears at once.
    fn client(&mut self, messages: &[(u8, &[u8])]) -> (String, String) {
        let input: Vec<u8> = messages.iter().flat_map(|(kind, body)| message(*kind, body)).collect();
        let (taken, _) = self.conversation.from_client(&input, &mut self.server, &mut self.output).expect("good");
        assert_eq!(taken, input.len());
        self.heard()
    }

    fn server(&mut self, messages: &[(u8, &[u8])]) -> (String, String) {
        let input: Vec<u8> = messages.iter().flat_map(|(kind, body)| message(*kind, body)).collect();
        let taken = self.conversation.from_server(&input, &mut self.server, &mut self.output).expect("good");
        assert_eq!(taken, input.len());
        self.heard()
    }

    fn heard(&mut self) -> (String, String) {
        let Output { to_server, to_client } = std::mem::take(&mut self.output);
        (shown(&to_server), shown(&to_client))
    }

    fn settled(&mut self) -> Settled {
        self.conversation.settle(&mut self.server, &mut self.output)
    }
}

const PARSE: (u8, &[u8]) = (b'P', b"one\0select 1\0\0\0");
const BIND: (u8, &[u8]) = (b'B', b"\0one\0\0\0\0\0\0\0");
const EXECUTE: (u8, &[u8]) = (b'E', b"\0\0\0\0\0");
const SYNC: (u8, &[u8]) = (b'S', b"");
const READY: (u8, &[u8]) = (b'Z', b"I");
const ERROR: (u8, &[u8]) = (b'E', b"SERROR\0C22012\0\0");

#[test]
fn a_statement_that_is_there_is_not_sent_again() {
    let mut talk = Talk::new();
    let (sent, _) = talk.client(&[PARSE, BIND, EXECUTE, SYNC]);
    assert_eq!(sent, "P:dormouse_1|select 1||| B:|dormouse_1||||||| E:||||| S:");
    let (_, heard) = talk.server(&[(b'1', b""), (b'2', b""), (b'C', b"SELECT 1\0"), READY]);
    assert_eq!(heard, "1: 2: C:SELECT 1| Z:I");
    assert_eq!(talk.settled(), Settled::Free);
    // Another connection, on which it must be put in; the client hears nothing of that.
    talk.server = ServerState::new(Arc::default(), 10);
    assert_eq!(talk.client(&[BIND, EXECUTE, SYNC]).0, "P:dormouse_1|select 1||| B:|dormouse_1||||||| E:||||| S:");
    let (_, heard) = talk.server(&[(b'1', b""), (b'2', b""), (b'C', b"SELECT 1\0"), READY]);
    assert_eq!(heard, "2: C:SELECT 1| Z:I");
    // Another name for the same.
    let two: (u8, &[u8]) = (b'P', b"two\0select 1\0\0\0");
    assert_eq!(talk.client(&[two, SYNC]), ("S:".into(), "1:".into()));
    talk.server(&[READY]);
    assert_eq!(talk.settled(), Settled::Free);
}

#[test]
fn made_up_answers_wait_for_their_turn() {
    let mut talk = Talk::new();
    talk.client(&[PARSE, SYNC]);
    talk.server(&[(b'1', b""), READY]);
    let two: (u8, &[u8]) = (b'P', b"two\0select 1\0\0\0");
    let close: (u8, &[u8]) = (b'C', b"Stwo\0");
    let (sent, heard) = talk.client(&[BIND, EXECUTE, two, close, SYNC]);
    assert_eq!((sent.as_str(), heard.as_str()), ("B:|dormouse_1||||||| E:||||| S:", ""));
    assert_eq!(talk.server(&[(b'2', b"")]).1, "2:");
    assert_eq!(talk.server(&[(b'C', b"SELECT 1\0")]).1, "C:SELECT 1| 1: 3:");
    assert_eq!(talk.server(&[READY]).1, "Z:I");
}

#[test]
fn an_error_takes_back_what_it_skips() {
    let mut talk = Talk::new();
    let bad: (u8, &[u8]) = (b'P', b"bad\0selec\0\0\0");
    talk.client(&[bad, PARSE, BIND, EXECUTE, SYNC]);
    assert_eq!(talk.server(&[ERROR, READY]).1, "E:SERROR|C22012|| Z:I");
    assert_eq!(talk.settled(), Settled::Free);
    // The name is free, and whether the server has the statement is not known.
    assert_eq!(talk.client(&[BIND, SYNC]).0, "B:|one||||||| S:", "Postgres says that there is none");
    talk.server(&[ERROR, READY]);
    assert_eq!(talk.client(&[PARSE, SYNC]).0, "C:Sdormouse_2| P:dormouse_2|select 1||| S:");
    assert_eq!(talk.server(&[(b'3', b""), (b'1', b""), READY]).1, "1: Z:I");
}

#[test]
fn after_an_error_all_is_dropped_up_to_sync() {
    let mut talk = Talk::new();
    talk.client(&[PARSE, (b'H', b"")]);
    assert_eq!(talk.server(&[ERROR]).1, "E:SERROR|C22012||");
    assert_eq!(talk.client(&[BIND, EXECUTE]).0, "");
    assert_eq!(talk.settled(), Settled::Busy);
    assert_eq!(talk.client(&[SYNC]).0, "S:");
    assert_eq!(talk.server(&[READY]).1, "Z:I");
    assert_eq!(talk.settled(), Settled::Free);
}

#[test]
fn a_sync_inside_copy_has_no_answer() {
    let mut talk = Talk::new();
    let copy: (u8, &[u8]) = (b'P', b"\0copy t from stdin\0\0\0");
    talk.client(&[copy, (b'B', b"\0\0\0\0\0\0\0\0"), EXECUTE, SYNC]);
    talk.server(&[(b'1', b""), (b'2', b""), (b'G', b"\0\0\0")]);
    assert_eq!(talk.client(&[(b'd', b"1\n"), SYNC, (b'c', b""), SYNC]).0, "d:1\n S: c: S:");
    assert_eq!(talk.settled(), Settled::Busy);
    talk.server(&[(b'C', b"COPY 1\0"), READY]);
    assert_eq!(talk.settled(), Settled::Free);
    // All at once, without waiting for Postgres to ask.
    talk.client(&[copy, (b'B', b"\0\0\0\0\0\0\0\0"), EXECUTE, (b'd', b"1\n"), (b'c', b""), SYNC]);
    talk.server(&[(b'1', b""), (b'2', b""), (b'G', b"\0\0\0"), (b'C', b"COPY 1\0"), READY]);
    assert_eq!(talk.settled(), Settled::Free);
    // The end of one that has failed, when the connection is gone.
    let input = [message(b'd', b"2\n"), message(b'f', b"x\0"), message(b'S', b"")].concat();
    let unattached = talk.conversation.unattached(&input, &mut talk.output).expect("good");
    assert_eq!(unattached, (input.len(), Unattached::More));
    assert_eq!(talk.heard().1, "Z:I");
}

#[test]
fn the_unnamed_statement_follows_its_client() {
    let mut talk = Talk::new();
    let parse: (u8, &[u8]) = (b'P', b"\0select 2\0\0\0");
    let bind: (u8, &[u8]) = (b'B', b"\0\0\0\0\0\0\0\0");
    talk.client(&[parse, SYNC]);
    talk.server(&[(b'1', b""), READY]);
    assert_eq!(talk.client(&[bind, SYNC]).0, "B:|||||||| S:");
    talk.server(&[(b'2', b""), READY]);
    // Somebody else has used the connection.
    talk.server.unnamed = None;
    assert_eq!(talk.client(&[bind, SYNC]).0, "P:|select 2||| B:|||||||| S:");
    assert_eq!(talk.server(&[(b'1', b""), (b'2', b""), READY]).1, "2: Z:I");
    // A simple query ends it: Postgres must say so, and not run somebody else's.
    talk.client(&[(b'Q', b"select 1\0")]);
    talk.server(&[(b'C', b"SELECT 1\0"), READY]);
    assert_eq!(talk.client(&[bind, SYNC]).0, "B:|dormouse_none||||||| S:");
}

#[test]
fn what_may_be_left_is_asked_for_and_nothing_is_taken_meanwhile() {
    let mut talk = Talk::new();
    talk.client(&[(b'Q', b"listen x\0")]);
    talk.server(&[(b'C', b"LISTEN\0"), READY]);
    assert_eq!(talk.settled(), Settled::Busy);
    assert!(talk.heard().0.contains("pg_listening_channels"));
    let more = message(b'Q', b"select 1\0");
    let taken = talk.conversation.from_client(&more, &mut talk.server, &mut talk.output).expect("good");
    assert_eq!(taken, (0, Unattached::More));
    let row = [&[0, 3, 0, 0, 0, 3][..], b"pin", &[0, 0, 0, 6], b"LISTEN", &[0, 0, 0, 0]].concat();
    assert_eq!(talk.server(&[(b'T', b""), (b'D', &row), (b'C', b"SELECT 1\0"), READY]).1, "");
    assert_eq!(talk.settled(), Settled::Pinned(Pin::Listening));
    talk.client(&[(b'Q', b"unlisten *\0")]);
    talk.server(&[(b'C', b"UNLISTEN\0"), READY]);
    assert_eq!(talk.settled(), Settled::Busy);
    talk.server(&[(b'T', b""), (b'C', b"SELECT 0\0"), READY]);
    assert_eq!(talk.settled(), Settled::Free);
}

#[test]
fn a_question_that_fails_keeps_the_connection() {
    let mut talk = Talk::new();
    talk.client(&[(b'Q', b"set statement_timeout = 1\0")]);
    talk.server(&[(b'C', b"SET\0"), READY]);
    assert_eq!(talk.settled(), Settled::Busy);
    assert_eq!(talk.server(&[ERROR, READY]).1, "");
    assert_eq!(talk.settled(), Settled::Pinned(Pin::Unknowable));
}

#[test]
fn errors_name_statements_as_the_client_does() {
    let mut talk = Talk::new();
    talk.client(&[PARSE, SYNC]);
    talk.server(&[(b'1', b""), READY]);
    talk.client(&[PARSE, SYNC]);
    let error = b"SERROR\0C42P05\0Mprepared statement \"dormouse_1\" already exists\0\0";
    let (_, heard) = talk.server(&[(b'E', error), READY]);
    assert_eq!(heard, "E:SERROR|C42P05|Mprepared statement \"one\" already exists|| Z:I");
}

#[test]
fn a_statement_prepared_behind_a_rollback_is_no_duplicate() {
    let mut talk = Talk::new();
    talk.client(&[PARSE, SYNC]);
    talk.server(&[(b'1', b""), READY]);
    talk.client(&[(b'Q', b"begin; select 1/0\0")]);
    talk.server(&[ERROR, (b'Z', b"E")]);
    let two: (u8, &[u8]) = (b'P', b"two\0select 1\0\0\0");
    let (sent, heard) = talk.client(&[(b'Q', b"rollback\0"), two, SYNC]);
    assert_eq!(sent, "Q:rollback| C:Sdormouse_1| P:dormouse_1|select 1||| S:");
    assert_eq!(heard, "", "whether the transaction has failed is for Postgres to say");
    talk.server(&[(b'C', b"ROLLBACK\0"), READY]);
    assert_eq!(talk.server(&[(b'3', b""), (b'1', b""), READY]).1, "1: Z:I");
    assert_eq!(talk.settled(), Settled::Free);
}

mod garbage {
    use proptest::prelude::*;

    use super::*;

    /// Messages of known types with bodies that may make sense.
    fn messages() -> impl Strategy<Value = Vec<u8>> {
        let kind = prop::sample::select(b"QPBDECSHFdcfXZ123TnsIGRA".to_vec());
        let body = prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40),
            prop::sample::select(vec![
                b"one\0select 1\0\0\0".to_vec(),
                b"\0one\0\0\0\0\0\0\0".to_vec(),
                b"Sone\0".to_vec(),
                b"I".to_vec(),
                b"T".to_vec(),
                b"select lastval()\0".to_vec(),
                b"\0select lastval()\0\0\0".to_vec(),
            ]),
        ];
        prop::collection::vec((kind, body).prop_map(|(kind, body)| message(kind, &body)), 0..30)
            .prop_map(|messages| messages.concat())
    }

    proptest! {
        #[test]
        fn neither_side_can_make_it_panic(
            turns in prop::collection::vec((any::<bool>(), prop_oneof![messages(), any::<Vec<u8>>()]), 0..12),
        ) {
            let mut talk = Talk::new();
            for (client, input) in turns {
                let Talk { conversation, server, output } = &mut talk;
                let result = if client {
                    conversation.unattached(&input, output).and_then(|_| conversation.from_client(&input, server, output)).map(drop)
                } else {
                    conversation.from_server(&input, server, output).map(drop)
                };
                conversation.settle(server, output);
                *output = Output::default();
                if result.is_err() {
                    break;
                }
            }
        }

        #[test]
        fn it_does_not_matter_how_the_bytes_arrive(input in messages(), cuts in prop::collection::vec(1_usize..20, 1..40)) {
            let all = said(&input, &[usize::MAX]);
            let pieces = said(&input, &cuts);
            prop_assert_eq!(all, pieces);
        }
    }

    /// What the server hears when the client's bytes come in pieces of these lengths.
    fn said(input: &[u8], cuts: &[usize]) -> Result<Vec<u8>, Violation> {
        let mut talk = Talk::new();
        let (mut heard, mut pending, mut at) = (Vec::new(), Vec::new(), 0_usize);
        for cut in cuts.iter().cycle() {
            let end = at.saturating_add(*cut).min(input.len());
            pending.extend_from_slice(&input[at..end]);
            at = end;
            loop {
                let Talk { conversation, server, output } = &mut talk;
                let (taken, wants) = conversation.from_client(&pending, server, output)?;
                pending.drain(..taken);
                heard.append(&mut output.to_server);
                if wants == Unattached::Terminate {
                    return Ok(heard);
                }
                if taken == 0 {
                    break;
                }
            }
            if at == input.len() {
                return Ok(heard);
            }
        }
        Ok(heard)
    }
}
