//! Clients that mean no good, or are broken: the proxy stays small, says what is wrong, and serves the others.

mod support;

use std::time::{Duration, Instant};

use support::{PASSWORD, World};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

const TLS_TO_A: &str = "sslmode=require options=endpoint%3Dep-a";

async fn open(world: &World) -> TcpStream {
    TcpStream::connect(world.address).await.expect("connected")
}

/// Reads to the end; errors count as an end.
async fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    let _ = timeout(Duration::from_secs(30), stream.read_to_end(&mut rest)).await.expect("it ends");
    rest
}

#[tokio::test]
async fn failed_logins_from_one_address_are_slowed_down() {
    let world = World::start(&[]).await;
    let mut refused = 0;
    for _ in 0..60 {
        let error = world.psql(TLS_TO_A, "wrong", "SELECT 1").await.expect_err("refused");
        refused += usize::from(error.contains("too many failed logins"));
    }
    assert!((20..40).contains(&refused), "{refused} of 60 were not even checked");
    // Every two seconds one is checked again: it may be this one.
    let mut error = String::new();
    for _ in 0..5 {
        if let Err(refused) = world.psql(TLS_TO_A, PASSWORD, "SELECT 1").await {
            error = refused;
            break;
        }
        world.psql(TLS_TO_A, "wrong", "SELECT 1").await.expect_err("refused");
    }
    assert!(error.contains("Wait a minute"), "{error}");
    let other = world.psql("sslmode=require options=endpoint%3Dep-b", PASSWORD, "SELECT 1").await;
    assert_eq!(other.as_deref(), Ok("1"), "other endpoints go on");
    assert_eq!(world.wakes(), 1);
}

#[tokio::test]
async fn slow_and_silent_clients_are_closed() {
    let world = World::start(&["--handshake-timeout", "1s"]).await;
    let mut silent = open(&world).await;
    let mut slow = open(&world).await;
    let mut in_tls = open(&world).await;
    in_tls.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).await.expect("written");
    assert_eq!(in_tls.read_u8().await.expect("an answer"), b'S');
    in_tls.write_all(&[0x16, 3, 1]).await.expect("written");
    let drip = tokio::spawn(async move {
        for byte in [0, 0, 0, 80, 0, 3, 0, 0, b'u', b's', b'e'] {
            if slow.write_all(&[byte]).await.is_err() {
                break;
            }
            sleep(Duration::from_millis(200)).await;
        }
        rest(&mut slow).await
    });
    let begun = Instant::now();
    rest(&mut silent).await;
    rest(&mut in_tls).await;
    drip.await.expect("no panic");
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert_eq!(world.psql(TLS_TO_A, PASSWORD, "SELECT 1").await.as_deref(), Ok("1"));
}

#[tokio::test]
async fn oversized_messages_are_refused_unread() {
    let world = World::start(&[]).await;
    let mut stream = open(&world).await;
    stream.write_all(&[0x7f, 0xff, 0xff, 0xff, 0, 3, 0, 0]).await.expect("written");
    assert!(String::from_utf8_lossy(&rest(&mut stream).await).contains("invalid length of startup packet"));
    let client = world.connect("endpoint=ep-a-pooler").await.expect("connected");
    // Longer than what is looked at: it passes in pieces.
    let long = format!("select length('{}')", "x".repeat(3 << 20));
    let rows = client.simple_query(&long).await.expect("answered");
    assert!(matches!(&rows[1], tokio_postgres::SimpleQueryMessage::Row(row) if row.get(0) == Some("3145728")));
    let row = client.query_one("select length($1::text)", &[&"y".repeat(3 << 20)]).await.expect("answered");
    assert_eq!(row.get::<_, i32>(0), 3 << 20);
}

#[tokio::test]
async fn sessions_have_a_limit_and_others_are_told() {
    let world = World::start(&["--max-connections", "2"]).await;
    let one = world.connect("endpoint=ep-a").await.expect("connected");
    let two = world.connect("endpoint=ep-a-pooler").await.expect("connected");
    let error = world.psql(TLS_TO_A, PASSWORD, "SELECT 1").await.expect_err("refused");
    assert!(error.contains("too many clients already"), "{error}");
    drop((one, two));
    for _ in 0..100 {
        if world.psql(TLS_TO_A, PASSWORD, "SELECT 1").await.is_ok() {
            return;
        }
        sleep(Duration::from_millis(50)).await;
    }
    panic!("the places of those who left are not free");
}

#[tokio::test]
async fn a_load_balancer_tells_the_address() {
    let world = World::start(&["--proxy-protocol"]).await;
    let header = |last: u8| {
        let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
        header.extend_from_slice(&[192, 0, 2, last, 127, 0, 0, 1, 0x30, 0x39, 0x15, 0x38]);
        header
    };
    let mut stream = open(&world).await;
    stream.write_all(&header(1)).await.expect("written");
    stream.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).await.expect("written");
    assert_eq!(stream.read_u8().await.expect("an answer"), b'S');
    let mut without = open(&world).await;
    without.write_all(&[0, 0, 0, 8, 4, 210, 22, 47, 0, 0, 0, 0, 0, 0, 0, 0]).await.expect("written");
    assert_eq!(rest(&mut without).await, b"", "who comes without one is not from the balancer");
}

#[tokio::test]
async fn a_new_certificate_is_taken_up_and_a_bad_one_is_not() {
    let world = World::start(&[]).await;
    let ca = world.tls_dir.path().join("ca.pem");
    let strict = format!("host=ep-a.localhost sslmode=verify-full sslrootcert={}", ca.display());
    assert_eq!(world.psql(&strict, PASSWORD, "SELECT 1").await.as_deref(), Ok("1"));
    let server = std::fs::read_dir(world.tls_dir.path()).expect("listed").flatten().map(|entry| entry.path());
    let server = server.into_iter().find(|path| path.to_string_lossy().contains("server-")).expect("a certificate");
    std::fs::write(&server, "no certificate").expect("written");
    sleep(Duration::from_secs(3)).await;
    assert_eq!(world.psql(&strict, PASSWORD, "SELECT 1").await.as_deref(), Ok("1"), "the old one stays");
    // Another authority's: who trusts only the old one notices.
    let other = World::start(&[]).await;
    let theirs = std::fs::read_dir(other.tls_dir.path()).expect("listed").flatten().map(|entry| entry.path());
    let theirs = theirs.into_iter().find(|path| path.to_string_lossy().contains("server-")).expect("a certificate");
    std::fs::copy(theirs, &server).expect("copied");
    for _ in 0..40 {
        if world.psql(&strict, PASSWORD, "SELECT 1").await.is_err() {
            let ca = other.tls_dir.path().join("ca.pem");
            let strict = format!("host=ep-a.localhost sslmode=verify-full sslrootcert={}", ca.display());
            assert_eq!(world.psql(&strict, PASSWORD, "SELECT 1").await.as_deref(), Ok("1"));
            return;
        }
        sleep(Duration::from_millis(250)).await;
    }
    panic!("the new certificate is not in use");
}

#[tokio::test]
async fn draining_ends_idle_pooled_clients_and_lets_others_finish() {
    let world = World::start(&["--drain-timeout", "10s", "--pool-size", "2"]).await;
    let idle = world.connect("endpoint=ep-a-pooler").await.expect("connected");
    let busy = world.connect("endpoint=ep-a-pooler").await.expect("connected");
    busy.batch_execute("begin").await.expect("begun");
    world.shutdown.cancel();
    let error = loop {
        match idle.simple_query("select 1").await {
            Ok(_) => sleep(Duration::from_millis(10)).await,
            Err(error) => break error,
        }
    };
    assert!(error.is_closed() || error.code().is_some_and(|code| code.code() == "57P01"), "{error:?}");
    busy.batch_execute("select pg_sleep(0.2)").await.expect("goes on");
    busy.batch_execute("commit").await.expect("to its end");
    assert!(timeout(Duration::from_secs(8), world.task).await.expect("it ends in time").expect("no panic").is_ok());
}
