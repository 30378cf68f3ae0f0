//! WebSockets whose clients do not keep to the protocol, or go away in the middle: each is told what is wrong, and the next one
//! finds the server connection clean.

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{
    Http, World,
    raw_websocket::{BINARY, Frame, RawWebSocket, frame, header, message, query},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::sleep,
};

/// The only server connection is shared.
const POOLED: &str = "ep-a-pooler.localhost";

/// A server connection of its own.
const DIRECT: &str = "ep-a.localhost";

/// Bytes that a message may have.
const MESSAGE_MAX_BYTES: usize = 16 * 1024 * 1024;

/// What no client may send, and the status code that it is answered with.
fn faults() -> Vec<(&'static str, u16, Vec<u8>)> {
    let fragment = vec![0; MESSAGE_MAX_BYTES / 2];
    let too_much = [frame(0x02, &fragment), frame(0x00, &fragment), frame(0x80, b"x")].concat();
    vec![
        ("a frame without a mask", 1002, vec![BINARY, 5, b'S', 0, 0, 0, 4]),
        ("reserved bits", 1002, frame(0xc2, b"S\0\0\0\x04")),
        ("an unknown kind of data", 1002, frame(0x83, b"x")),
        ("an unknown kind of control", 1002, frame(0x8b, b"x")),
        ("a ping in fragments", 1002, frame(0x09, b"x")),
        ("a long ping", 1002, frame(0x89, &[0; 126])),
        ("a rest without a beginning", 1002, frame(0x80, b"x")),
        ("a message in a message", 1002, [frame(0x02, b"S\0"), frame(BINARY, b"x")].concat()),
        ("a close frame of one byte", 1002, frame(0x88, b"x")),
        ("a close frame with an impossible code", 1002, frame(0x88, &999_u16.to_be_bytes())),
        ("text", 1003, frame(0x81, b"select 1")),
        ("text that is none", 1007, frame(0x81, b"\xff")),
        ("a long frame", 1009, header(BINARY, MESSAGE_MAX_BYTES + 1)),
        ("a frame of 2^63 bytes", 1009, header(BINARY, 1 << 63)),
        ("a long message in short frames", 1009, too_much),
    ]
}

/// What is left of others on the only server connection, and whether one works at all.
async fn check_clean(http: &Http<'_>, after: &str) {
    let begun = Instant::now();
    let text = "select current_setting('work_mem') <> '4MB' or pg_current_xact_id_if_assigned() is not null
        or exists (select from pg_locks where locktype = 'advisory')
        or exists (select from pg_stat_activity where query like '%pg_sleep%' and state = 'active' and pid <> pg_backend_pid()) dirty";
    while http.value(text).await != Value::Bool(false) {
        assert!(begun.elapsed() < Duration::from_secs(10), "something is left after {after}");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn whoever_breaks_the_protocol_is_told_and_leaves_nothing() {
    let world = World::start(&["--allow-cleartext", "--pool-size", "1"]).await;
    let http = Http::new(&world);
    for (what, code, bytes) in faults() {
        let mut idle = RawWebSocket::log_in(&world, POOLED).await;
        idle.send(&bytes).await;
        assert_eq!(idle.close_code().await, Some(code), "{what}");

        let mut busy = RawWebSocket::log_in(&world, POOLED).await;
        busy.send(&frame(BINARY, &query("begin; set work_mem = '5MB'; select pg_advisory_lock(815), txid_current()")))
            .await;
        busy.until_ready().await;
        busy.send(&frame(BINARY, &query("select pg_sleep(60)"))).await;
        busy.send(&bytes).await;
        assert_eq!(busy.close_code().await, Some(code), "{what}, in the middle of a query");
        check_clean(&http, what).await;
    }
    let mut direct = RawWebSocket::log_in(&world, DIRECT).await;
    direct.send(&frame(0x81, b"select 1")).await;
    assert_eq!(direct.close_code().await, Some(1003));
    // Before the login too.
    let mut stranger = RawWebSocket::open(&world, POOLED).await;
    stranger.send(&frame(0x81, b"select 1")).await;
    assert_eq!(stranger.close_code().await, Some(1003));
}

#[tokio::test]
async fn a_client_that_sends_more_than_it_may_can_read_why() {
    let world = World::start(&["--allow-cleartext"]).await;
    let mut socket = RawWebSocket::log_in(&world, POOLED).await;
    socket.send(&header(BINARY, MESSAGE_MAX_BYTES + 1)).await;
    // It goes on sending and reads only then, as simple clients do.
    for _ in 0..64 {
        socket.send(&[0; 64 * 1024]).await;
    }
    assert_eq!(socket.close_code().await, Some(1009));
}

#[tokio::test]
async fn clients_may_go_in_the_middle() {
    let world = World::start(&["--allow-cleartext", "--pool-size", "1"]).await;
    let http = Http::new(&world);
    for how in ["a close frame", "a close frame with a code", "the end of the connection", "a reset"] {
        let mut socket = RawWebSocket::log_in(&world, POOLED).await;
        socket.send(&frame(BINARY, &query("begin; set work_mem = '5MB'; select pg_sleep(60)"))).await;
        sleep(Duration::from_millis(100)).await;
        match how {
            "a close frame" => {
                socket.send(&frame(0x88, b"")).await;
                assert_eq!(socket.close_code().await, Some(1005));
            }
            "a close frame with a code" => {
                socket.send(&frame(0x88, &1001_u16.to_be_bytes())).await;
                assert_eq!(socket.close_code().await, Some(1001));
            }
            "a reset" => {
                socket.stream.set_zero_linger().expect("set");
                drop(socket);
            }
            _ => socket.stream.shutdown().await.expect("half closed"),
        }
        check_clean(&http, how).await;
    }
    // With a connection of its own Postgres ends its query and then the session, as on the Postgres port.
    let mut socket = RawWebSocket::log_in(&world, DIRECT).await;
    socket.send(&frame(BINARY, &query("set application_name = 'websocket_direct'; select 1"))).await;
    socket.until_ready().await;
    socket.send(&frame(0x88, b"")).await;
    assert_eq!(socket.close_code().await, Some(1005));
    let sessions = "select count(*)::int from pg_stat_activity where application_name = 'websocket_direct'";
    let begun = Instant::now();
    while http.value(sessions).await != 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "the session goes on");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn messages_may_come_in_fragments_and_pings_in_between() {
    let world = World::start(&["--allow-cleartext"]).await;
    for host in [POOLED, DIRECT] {
        let mut socket = RawWebSocket::log_in(&world, host).await;
        let query = query("select 1");
        socket.send(&frame(0x02, &query[..3])).await;
        socket.send(&frame(0x89, b"still there?")).await;
        assert_eq!(socket.frame().await, Frame::Pong(b"still there?".to_vec()));
        for byte in &query[3..] {
            socket.send(&frame(0x00, &[*byte])).await;
        }
        socket.send(&frame(0x8a, b"nobody asked")).await;
        socket.send(&frame(0x80, b"")).await;
        assert_eq!(socket.until_ready().await, b"TDCZ");
        // `Terminate`: the proxy closes, and the client may answer that.
        socket.send(&frame(BINARY, &message(b'X', b""))).await;
        assert_eq!(socket.close_code().await, Some(1000), "{host}");
    }
}

#[tokio::test]
async fn what_is_not_postgres_inside_is_said_in_its_own_words() {
    let world = World::start(&["--allow-cleartext", "--pool-size", "1"]).await;
    let http = Http::new(&world);
    for garbage in
        [message(b'!', b""), b"Q\0\0\0\x01".to_vec(), b"Q\xff\xff\xff\xff".to_vec(), message(b'B', b"no zero")]
    {
        let mut socket = RawWebSocket::log_in(&world, POOLED).await;
        socket.send(&frame(BINARY, &garbage)).await;
        assert_eq!(socket.until_ready().await, b"E", "{garbage:?}");
        check_clean(&http, "garbage").await;
    }
    let mut socket = RawWebSocket::open(&world, POOLED).await;
    socket.send(&frame(BINARY, b"GET / HTTP/1.1\r\n\r\n")).await;
    let said = socket.until_ready().await;
    assert!(said.is_empty() || said == b"E", "{said:?}");
}

#[tokio::test]
async fn only_websockets_are_taken_there() {
    let world = World::start(&["--allow-cleartext"]).await;
    let whole = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    for (request, status) in [
        (format!("GET /v2 HTTP/1.1\r\nHost: {POOLED}\r\n\r\n"), 426),
        (format!("POST /v2 HTTP/1.1\r\nHost: {POOLED}\r\nContent-Length: 0\r\n{whole}\r\n"), 405),
        (format!("GET /v2 HTTP/1.1\r\nHost: {POOLED}\r\n{}\r\n", whole.replace("13", "12")), 426),
        (format!("GET /v2 HTTP/1.1\r\nHost: {POOLED}\r\n{whole}Authorization: Basic eDp5\r\n\r\n"), 400),
    ] {
        let mut tcp = TcpStream::connect(world.http_address).await.expect("connected");
        tcp.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = vec![0; 4096];
        let bytes = tcp.read(&mut answer).await.expect("an answer");
        let answer = String::from_utf8_lossy(&answer[..bytes]);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{request}{answer}");
    }
    assert_eq!(Http::new(&world).query("select 1 n", json!([])).await["rows"][0]["n"], 1);
}
