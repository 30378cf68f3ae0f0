//! Conversations of broken clients and broken servers: good messages, some of them damaged, cut at any place. Bounded in number;
//! `DORMOUSE_FUZZ_ROUNDS` says how many, `DORMOUSE_FUZZ_SEED` repeats one.

mod fuzzing;

use std::sync::Arc;

use dormouse_connection_pool::{Conversation, Output, ServerState, Unattached, Violation, frame, session::Settings};
use fuzzing::{damage, seeds};
use rand::{RngExt, SeedableRng, rngs::StdRng};

/// Bytes that may be kept of what a client has sent and is not a whole message yet.
const KEPT_MAX_BYTES: usize = 2 * 1024 * 1024;

/// What one round may put out: what came in, what is put in for each message, and some.
fn output_max_bytes(input: usize) -> usize {
    64 * 1024 + input * 600
}

fn each_seed(test: impl Fn(&mut StdRng)) {
    for seed in seeds(5_000) {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&mut StdRng::seed_from_u64(seed))));
        if let Err(panic) = outcome {
            eprintln!("DORMOUSE_FUZZ_SEED={seed} shows it again");
            std::panic::resume_unwind(panic);
        }
    }
}

const FROM_CLIENT: &[(u8, &[u8])] = &[
    (b'Q', b"select 1\0"),
    (b'Q', b"begin; set search_path = a; listen x; select pg_advisory_lock(1)\0"),
    (b'Q', b"deallocate one; prepare two as select $1; create temp table t (a int)\0"),
    (b'Q', b"discard all\0"),
    (b'Q', b"copy t from stdin\0"),
    (b'Q', b"/* ' */ select $a$ ; $a$ ; -- \0"),
    (b'P', b"one\0select $1\0\0\x01\0\0\0\x17"),
    (b'P', b"\0set local x.y = 'z'\0\0\0"),
    (b'B', b"\0one\0\0\x01\0\x01\0\x01\0\0\0\x04\0\0\0\x07\0\x01\0\x01"),
    (b'B', b"p\0\0\0\0\0\0\0\0"),
    (b'D', b"Sone\0"),
    (b'D', b"Pp\0"),
    (b'E', b"\0\0\0\0\0"),
    (b'C', b"Sone\0"),
    (b'C', b"Pp\0"),
    (b'S', b""),
    (b'H', b""),
    (b'd', b"1\t2\n"),
    (b'c', b""),
    (b'f', b"no more\0"),
    (b'F', b"\0\0\x05\x3a\0\x01\0\x01\0\x01\0\0\0\x04\0\0\0\x07\0\x01"),
    (b'X', b""),
];

const FROM_SERVER: &[(u8, &[u8])] = &[
    (b'1', b""),
    (b'2', b""),
    (b'3', b""),
    (b'n', b""),
    (b's', b""),
    (b'I', b""),
    (b't', b"\0\x01\0\0\0\x17"),
    (b'T', b"\0\x01?column?\0\0\0\0\0\0\0\0\0\0\x17\0\x04\xff\xff\xff\xff\0\0"),
    (b'D', b"\0\x01\0\0\0\x011"),
    (b'D', b"\0\x02\0\0\0\x04PIN \xff\xff\xff\xff"),
    (b'C', b"SELECT 1\0"),
    (b'C', b"DISCARD ALL\0"),
    (b'C', b"DEALLOCATE\0"),
    (b'E', b"SERROR\0VERROR\0C26000\0Mprepared statement \"dormouse_1\" does not exist\0\0"),
    (b'N', b"SNOTICE\0VNOTICE\0C00000\0Mhm\0\0"),
    (b'S', b"TimeZone\0UTC\0"),
    (b'A', b"\0\0\0\x07x\0y\0"),
    (b'G', b"\0\0\x01\0\0"),
    (b'H', b"\0\0\x01\0\0"),
    (b'W', b"\0\0\x01\0\0"),
    (b'd', b"1\n"),
    (b'c', b""),
    (b'V', b"\0\0\0\x011"),
    (b'Z', b"I"),
    (b'Z', b"T"),
    (b'Z', b"E"),
];

/// Messages, one after the other, damaged in up to four places.
fn stream(rng: &mut StdRng, messages: &[(u8, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..rng.random_range(1..30) {
        let (kind, body) = messages[rng.random_range(0..messages.len())];
        frame::write(&mut bytes, kind, |output| output.extend_from_slice(body));
    }
    let damages = if rng.random_bool(0.3) { 0 } else { rng.random_range(1..5) };
    for _ in 0..damages {
        damage(rng, &mut bytes);
    }
    bytes
}

fn conversation(rng: &mut StdRng) -> Conversation {
    if rng.random_bool(0.8) {
        Conversation::new(Arc::default(), Settings::new(), Arc::default())
    } else {
        Conversation::session_mode(Arc::default(), Settings::new(), Arc::default())
    }
}

/// One side's bytes, of which more and more have arrived.
struct Arriving {
    all: Vec<u8>,
    taken: usize,
    there: usize,
}

impl Arriving {
    fn new(all: Vec<u8>) -> Self {
        Self { all, taken: 0, there: 0 }
    }

    fn more(&mut self, rng: &mut StdRng) {
        self.there = (self.there + rng.random_range(1..64)).min(self.all.len());
    }

    fn here(&self) -> &[u8] {
        &self.all[self.taken..self.there]
    }

    fn take(&mut self, bytes: usize) {
        assert!(bytes <= self.there - self.taken, "more was taken than there is");
        self.taken += bytes;
    }

    fn is_over(&self) -> bool {
        self.there == self.all.len()
    }
}

#[test]
fn broken_messages_never_panic_and_never_grow() {
    each_seed(|rng| {
        let mut client = Arriving::new(stream(rng, FROM_CLIENT));
        let mut postgres = Arriving::new(stream(rng, FROM_SERVER));
        let (mut talk, mut output) = (conversation(rng), Output::default());
        let (mut server, mut attached) = (ServerState::new(Arc::default(), 3), false);
        let mut put_out = 0;
        for _ in 0..400 {
            let outcome = if rng.random_bool(0.5) {
                client.more(rng);
                let taken = if attached {
                    talk.from_client(client.here(), &mut server, &mut output)
                } else {
                    talk.unattached(client.here(), &mut output)
                };
                taken.map(|(bytes, wants)| {
                    client.take(bytes);
                    if wants == Unattached::Attach && !attached {
                        talk.attach(&mut server, &mut output);
                        attached = true;
                    }
                    wants != Unattached::Terminate
                })
            } else if attached {
                postgres.more(rng);
                let taken = talk.from_server(postgres.here(), &mut server, &mut output);
                taken.map(|bytes| {
                    postgres.take(bytes);
                    true
                })
            } else {
                Ok(true)
            };
            let over = !matches!(outcome, Ok(true)) || talk.own_error().is_some();
            if attached && !over && talk.settle(&mut server, &mut output) == dormouse_connection_pool::Settled::Free {
                // Another connection next time, on which nothing is prepared.
                (server, attached) = (ServerState::new(Arc::default(), 3), false);
            }
            put_out += output.to_client.len() + output.to_server.len();
            output.to_client.clear();
            output.to_server.clear();
            if over || (client.is_over() && postgres.is_over()) {
                break;
            }
        }
        let came_in = client.there + postgres.there;
        assert!(put_out <= output_max_bytes(came_in), "{put_out} bytes for {came_in}");
    });
}

/// All that an attached client's bytes lead to, brought in pieces of these sizes.
fn in_pieces(rng: &mut StdRng, bytes: &[u8], whole: bool) -> (Output, Result<bool, Violation>) {
    let mut talk = Conversation::new(Arc::default(), Settings::new(), Arc::default());
    let (mut server, mut output) = (ServerState::new(Arc::default(), 3), Output::default());
    let mut input = Arriving::new(bytes.to_vec());
    while !input.is_over() {
        if whole {
            input.there = bytes.len();
        } else {
            input.more(rng);
        }
        match talk.from_client(input.here(), &mut server, &mut output) {
            Ok((taken, wants)) => {
                input.take(taken);
                if wants == Unattached::Terminate {
                    return (output, Ok(false));
                }
            }
            Err(violation) => return (output, Err(violation)),
        }
    }
    (output, Ok(true))
}

#[test]
fn where_the_network_cuts_makes_no_difference() {
    each_seed(|rng| {
        let bytes = stream(rng, FROM_CLIENT);
        let (at_once, outcome) = in_pieces(rng, &bytes, true);
        let (piecemeal, outcome_in_pieces) = in_pieces(rng, &bytes, false);
        assert_eq!(outcome, outcome_in_pieces);
        assert_eq!(at_once.to_server, piecemeal.to_server);
        assert_eq!(at_once.to_client, piecemeal.to_client);
    });
}

#[test]
fn no_message_is_kept_that_is_too_long_to_look_at() {
    for kind in 0..=u8::MAX {
        for attached in [false, true] {
            let mut talk = Conversation::new(Arc::default(), Settings::new(), Arc::default());
            let (mut server, mut output) = (ServerState::new(Arc::default(), 3), Output::default());
            let mut kept = vec![kind, 0x20, 0, 0, 0];
            for _ in 0..128 {
                kept.extend_from_slice(&[b'x'; 32 * 1024]);
                let taken = if attached {
                    talk.from_client(&kept, &mut server, &mut output)
                } else {
                    talk.unattached(&kept, &mut output)
                };
                let Ok((taken, wants)) = taken else { break };
                kept.drain(..taken);
                assert!(kept.len() <= KEPT_MAX_BYTES, "{} bytes of a message {:?}", kept.len(), char::from(kind));
                output.to_client.clear();
                output.to_server.clear();
                if wants != Unattached::More {
                    break;
                }
            }
        }
    }
}
