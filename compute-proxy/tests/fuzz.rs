//! Start-up packets and logins of broken and of malicious clients: good ones, damaged. Bounded in number; `DORMOUSE_FUZZ_ROUNDS`
//! says how many, `DORMOUSE_FUZZ_SEED` repeats one. Messages after the login: `pool/tests/fuzz.rs`.

#[path = "../pool/tests/fuzzing/mod.rs"]
mod fuzzing;
mod support;

use std::time::Duration;

use dormouse_compute_proxy::{
    handshake::{PROTOCOL, Packet, STARTUP_MAX_BYTES, Startup, body_bytes, parse_sasl_initial},
    scram::{Binding, Exchange, Verifier},
};
use fuzzing::{damage, seeds};
use postgres_protocol::{
    authentication::sasl::{ChannelBinding, ScramSha256},
    password::scram_sha_256,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use support::{PASSWORD, World};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// The body of a start-up message.
fn startup(parsed: &Startup) -> Vec<u8> {
    let mut body = (PROTOCOL | u32::from(parsed.minor_version)).to_be_bytes().to_vec();
    let fixed =
        [("user", Some(&parsed.user)), ("database", Some(&parsed.database)), ("options", parsed.options.as_ref())];
    let fixed = fixed.into_iter().filter_map(|(name, value)| Some((name, value?.as_str())));
    let rest = parsed.parameters.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let unknown = parsed.unknown_extensions.iter().map(|name| (name.as_str(), ""));
    for (name, value) in fixed.chain(rest).chain(unknown) {
        [name, value].into_iter().for_each(|text| body.extend([text.as_bytes(), &[0]].concat()));
    }
    body.push(0);
    body
}

fn good_packet(rng: &mut StdRng) -> Vec<u8> {
    let parsed = Startup {
        minor_version: [0, 0, 2][rng.random_range(0..3)],
        user: "alice".into(),
        database: "postgres".into(),
        options: Some("endpoint=ep-a -c geqo=off pool_mode=session".into()).filter(|_| rng.random_bool(0.7)),
        parameters: vec![("application_name".into(), "psql".into()), ("replication".into(), "false".into())],
        unknown_extensions: if rng.random_bool(0.1) { vec!["_pq_.x".into()] } else { Vec::new() },
    };
    match rng.random_range(0..8) {
        0 => (1234_u32 << 16 | 5679).to_be_bytes().to_vec(),
        1 => (1234_u32 << 16 | 5680).to_be_bytes().to_vec(),
        2 => [(1234_u32 << 16 | 5678).to_be_bytes(), [0, 0, 0, 7], [1, 2, 3, 4]].concat(),
        _ => startup(&parsed),
    }
}

#[test]
fn a_startup_packet_means_one_thing_or_nothing() {
    for seed in seeds(20_000) {
        let rng = &mut StdRng::seed_from_u64(seed);
        let mut body = good_packet(rng);
        for _ in 0..rng.random_range(0..4) {
            damage(rng, &mut body);
        }
        let length = u32::try_from(body.len() + 4).expect("short").to_be_bytes();
        assert_eq!(body_bytes(length).is_ok(), (8..=STARTUP_MAX_BYTES).contains(&(body.len() + 4)), "seed {seed}");
        if let Ok(Packet::Startup(parsed)) = Packet::parse(&body) {
            let names = [&parsed.user, &parsed.database];
            assert!(names.iter().all(|name| !name.is_empty() && !name.contains('\0')), "seed {seed}");
            assert_eq!(Packet::parse(&startup(&parsed)), Ok(Packet::Startup(parsed)), "seed {seed}");
        }
        let _ = parse_sasl_initial(&body);
    }
}

/// A login by libpq's rules, as `postgres-protocol` makes it, with its last message changed by `change`.
fn log_in(verifier: &Verifier, password: &[u8], rng: &mut StdRng, change: impl Fn(&mut StdRng, &mut Vec<u8>)) -> bool {
    let mut client = ScramSha256::new(password, ChannelBinding::unsupported());
    let first = client.message().to_vec();
    let nonce: String = (0..24).map(|_| char::from(rng.random_range(b'a'..=b'z'))).collect();
    let exchange = Exchange::begin(verifier, Binding::NotOffered, &first, &nonce).expect("a good first message");
    client.update(exchange.server_first().as_bytes()).expect("understood");
    let mut last = client.message().to_vec();
    let sent = last.clone();
    change(rng, &mut last);
    let outcome = exchange.finish(&last);
    assert!(outcome.is_err() || last == sent, "a changed message was accepted: {}", String::from_utf8_lossy(&last));
    outcome.is_ok()
}

#[test]
fn only_the_password_logs_in() {
    let verifier = Verifier::parse(&scram_sha_256(PASSWORD.as_bytes())).expect("a verifier");
    // A login takes 4096 rounds of hashing, so there are fewer of them.
    for seed in seeds(100) {
        let rng = &mut StdRng::seed_from_u64(seed);
        let (mut first, mut password) = (b"n,,n=,r=abcdefghij".to_vec(), PASSWORD.as_bytes().to_vec());
        assert!(log_in(&verifier, &password, rng, |_, _| {}), "seed {seed}");
        log_in(&verifier, &password, rng, damage);
        damage(rng, &mut password);
        assert!(password == PASSWORD.as_bytes() || !log_in(&verifier, &password, rng, |_, _| {}), "seed {seed}");
        for _ in 0..100 {
            damage(rng, &mut first);
            let _ = Exchange::begin(&verifier, Binding::NotOffered, &first, "xyz");
            let _ = Exchange::begin(&verifier, Binding::Used(b"hash"), &first, "xyz");
        }
    }
}

#[tokio::test]
async fn damaged_greetings_over_the_network_harm_nobody() {
    let world = World::start(&["--handshake-timeout", "2s"]).await;
    for batch in seeds(600).collect::<Vec<_>>().chunks(50) {
        let talks = batch.iter().map(|seed| {
            let rng = &mut StdRng::seed_from_u64(*seed);
            let body = good_packet(rng);
            let mut bytes = u32::try_from(body.len() + 4).expect("short").to_be_bytes().to_vec();
            bytes.extend(body);
            // What may follow: a SASL message, a TLS handshake's beginning, noise.
            let next: [&[u8]; 3] =
                [b"p\0\0\0\x20SCRAM-SHA-256\0\0\0\0\x06n,,n=,", b"\x16\x03\x01\0\x05\x01\0\0\x01\x03", b"\0"];
            bytes.extend(next[rng.random_range(0..3)]);
            (0..rng.random_range(0..5)).for_each(|_| damage(rng, &mut bytes));
            tokio::spawn(greet(world.address, bytes))
        });
        for talk in talks.collect::<Vec<_>>() {
            talk.await.expect("no panic");
        }
    }
    assert_eq!(world.wakes(), 0, "nobody has logged in");
    let answer = world.psql("sslmode=require options=endpoint%3Dep-a", PASSWORD, "SELECT 1").await;
    assert_eq!(answer.as_deref(), Ok("1"), "others are served");
}

/// Sends, and reads what is said until the proxy has enough, which its own limits of time make it have.
async fn greet(address: std::net::SocketAddr, bytes: Vec<u8>) {
    let mut stream = TcpStream::connect(address).await.expect("connected");
    let _ = stream.write_all(&bytes).await;
    let mut said = Vec::new();
    let _ = timeout(Duration::from_secs(30), stream.read_to_end(&mut said)).await.expect("it ends");
    assert!(said.len() < 10_000, "{} bytes of answer", said.len());
}
