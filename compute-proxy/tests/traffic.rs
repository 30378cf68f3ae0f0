//! What happens after the login: waking, passing bytes, cancelling, ending.

mod support;

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use dormouse_compute_proxy::{BindError, Server};
use support::{PASSWORD, TOKEN, World, parse_config, psql};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};
use tokio_postgres::{NoTls, error::SqlState};

const TLS_TO_A: &str = "sslmode=require options=endpoint%3Dep-a";

#[tokio::test]
async fn a_sleeping_endpoint_is_waited_for() {
    let world = World::start(&[]).await;
    *world.endpoint("ep-a").wake_delay.lock() = Duration::from_secs(2);
    let begun = Instant::now();
    assert_eq!(world.psql(TLS_TO_A, PASSWORD, "SELECT 1").await.as_deref(), Ok("1"));
    assert!(begun.elapsed() >= Duration::from_secs(2));
    assert_eq!(world.wakes(), 1);
}

#[tokio::test]
async fn an_endpoint_that_falls_asleep_in_between_is_woken_again() {
    let world = World::start(&[]).await;
    let endpoint = world.endpoint("ep-a");
    // A socket that nobody serves any more: its file is there.
    let dir = tempfile::tempdir().expect("temporary directory");
    let orphan = dir.path().join("orphan");
    drop(std::os::unix::net::UnixListener::bind(&orphan).expect("bound"));
    *endpoint.dead_sockets.lock() = vec![orphan, dir.path().join("gone")];
    assert_eq!(world.psql(TLS_TO_A, PASSWORD, "SELECT 1").await.as_deref(), Ok("1"));
    assert_eq!(world.wakes(), 3);
}

#[tokio::test]
async fn an_endpoint_that_does_not_wake_is_an_error() {
    let world = World::start(&["--wake-timeout", "500ms"]).await;
    *world.endpoint("ep-a").wake_delay.lock() = Duration::from_secs(30);
    let refused = world.psql(TLS_TO_A, PASSWORD, "SELECT 1").await.expect_err("refused");
    assert!(refused.contains("endpoint \"ep-a\" is not available"), "{refused}");
}

#[tokio::test]
async fn errors_of_postgres_are_passed_on() {
    let world = World::start(&[]).await;
    let refused = world.psql(&format!("{TLS_TO_A} dbname=nowhere"), PASSWORD, "SELECT 1").await.expect_err("refused");
    assert!(refused.contains("FATAL:  database \"nowhere\" does not exist"), "{refused}");
    let refused = world.psql(TLS_TO_A, PASSWORD, "SELECT 1/0").await.expect_err("refused");
    assert!(refused.contains("22012: division by zero"), "{refused}");
}

#[tokio::test]
async fn large_results_come_whole() {
    let world = World::start(&[]).await;
    let sql = "SELECT repeat(md5(i::text), 32) FROM generate_series(1, 40000) i";
    for info in [TLS_TO_A, "sslmode=disable options=endpoint=ep-a"] {
        let output = world.psql(info, PASSWORD, sql).await.expect("40 MB");
        assert_eq!(output.len(), 40_000 * 1025 - 1);
        assert!(output.ends_with(&world.psql(info, PASSWORD, "SELECT md5('40000')").await.expect("a hash")));
    }
}

#[tokio::test]
async fn copy_works_both_ways() {
    let world = World::start(&[]).await;
    let rows: String = (0..200_000).map(|row| format!("{row}\tvalue {row}\n")).collect();
    for (table, info) in [("copied_tls", TLS_TO_A), ("copied", "sslmode=disable options=endpoint=ep-a")] {
        let create = format!("DROP TABLE IF EXISTS {table}; CREATE TABLE {table} (id int, name text)");
        world.psql(info, PASSWORD, &create).await.expect("created");
        let copy = format!("COPY {table} FROM STDIN");
        psql(&world.conninfo(info), PASSWORD, &copy, rows.as_bytes()).await.expect("copied in");
        let out = world.psql(info, PASSWORD, &format!("COPY (SELECT * FROM {table} ORDER BY id) TO STDOUT")).await;
        assert!(out.expect("copied out") == rows.trim_end(), "the same rows");
    }
}

#[tokio::test]
async fn queries_are_cancelled_by_the_key_that_the_client_knows() {
    let world = World::start(&[]).await;
    let client = world.connect("endpoint=ep-a").await.expect("logged in");
    let token = client.cancel_token();
    let query = tokio::spawn(async move {
        let error = client.simple_query("SELECT pg_sleep(60)").await.expect_err("cancelled");
        (client, error)
    });
    sleep(Duration::from_millis(300)).await;
    // A wrong key is no error, and does nothing.
    let mut wrong = TcpStream::connect(world.address).await.expect("connected");
    wrong.write_all(&[0, 0, 0, 16, 4, 210, 22, 46, 0, 0, 0, 1, 0, 0, 0, 2]).await.expect("written");
    assert_eq!(wrong.read(&mut [0; 1]).await.expect("closed"), 0);
    sleep(Duration::from_millis(100)).await;
    assert!(!query.is_finished());
    token.cancel_query(NoTls).await.expect("sent");
    let (client, error) = timeout(Duration::from_secs(5), query).await.expect("in time").expect("no panic");
    assert_eq!(error.code(), Some(&SqlState::QUERY_CANCELED));
    client.simple_query("SELECT 1").await.expect("the session goes on");
}

#[tokio::test]
async fn two_hundred_clients_share_a_wake() {
    let world = World::start(&[]).await;
    *world.endpoint("ep-a").wake_delay.lock() = Duration::from_secs(2);
    let connects = (0..200).map(|_| world.connect("endpoint=ep-a"));
    let clients: Vec<_> = futures::future::try_join_all(connects).await.expect("all of them");
    let queries = clients.iter().map(|client| client.query_one("SELECT pg_backend_pid()", &[]));
    let mut pids: Vec<i32> =
        futures::future::try_join_all(queries).await.expect("answers").iter().map(|row| row.get(0)).collect();
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), 200);
    assert!(world.wakes() <= 5, "{} wakes", world.wakes());
    let lookups = world.endpoint("ep-a").role_lookups.load(Ordering::SeqCst);
    assert!(lookups < 200, "{lookups} lookups");
}

#[tokio::test]
async fn too_many_clients_are_told() {
    let world = World::start(&["--max-connections", "1"]).await;
    let first = world.connect("endpoint=ep-a").await.expect("logged in");
    let error = world.connect("endpoint=ep-a").await.map(drop).expect_err("refused");
    assert_eq!(error.code(), Some(&SqlState::TOO_MANY_CONNECTIONS));
    drop(first);
    let again = async {
        while world.connect("endpoint=ep-a").await.is_err() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(5), again).await.expect("the slot is free again");
}

#[tokio::test]
async fn a_session_that_postgres_ends_says_why() {
    let world = World::start(&[]).await;
    let client = world.connect("endpoint=ep-a").await.expect("logged in");
    let error = client.simple_query("SELECT pg_terminate_backend(pg_backend_pid())").await.expect_err("ended");
    assert_eq!(error.code(), Some(&SqlState::ADMIN_SHUTDOWN));
}

#[tokio::test]
async fn a_slow_client_is_dropped_before_its_login() {
    let world = World::start(&["--handshake-timeout", "200ms"]).await;
    for bytes in [&b""[..], b"\0\0\0", b"\0\0\0\x08\x04\xd2\x16\x2f"] {
        let mut stream = TcpStream::connect(world.address).await.expect("connected");
        stream.write_all(bytes).await.expect("written");
        let mut answer = Vec::new();
        let ended = timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await.expect("closed in time");
        assert!(ended.is_err() || answer.len() <= 1);
    }
}

#[tokio::test]
async fn garbage_is_refused() {
    let world = World::start(&[]).await;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\0\0\0\x08\0\x02\0\0", b"\0\0\0\x09\0\x03\0\0\0"] {
        let mut stream = TcpStream::connect(world.address).await.expect("connected");
        stream.write_all(bytes).await.expect("written");
        let mut answer = Vec::new();
        timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await.expect("in time").expect("closed");
        assert_eq!(answer.first(), Some(&b'E'), "{bytes:?}");
    }
}

#[tokio::test]
async fn shutting_down_ends_sessions() {
    let world = World::start(&["--drain-timeout", "500ms"]).await;
    let client = world.connect("endpoint=ep-a").await.expect("logged in");
    let begun = Instant::now();
    world.shutdown.cancel();
    sleep(Duration::from_millis(100)).await;
    client.simple_query("SELECT 1").await.expect("sessions may end what they do");
    assert!(world.connect("endpoint=ep-a").await.is_err(), "no new ones");
    world.task.await.expect("no panic").expect("no error");
    assert!(begun.elapsed() < Duration::from_secs(3));
    assert!(client.simple_query("SELECT 1").await.is_err());
}

#[tokio::test]
async fn a_taken_port_is_a_clear_error() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = taken.local_addr().expect("address").to_string();
    let config = parse_config(&["--listen", &address, "--control-plane", "http://127.0.0.1:1", "--token", TOKEN]);
    let error = Server::bind(config).await.err().expect("refused");
    let config = ["--listen", "127.0.0.1:0", "--http-listen", &address, "--token", TOKEN];
    let other = Server::bind(parse_config(&config)).await.err().expect("refused");
    assert!(other.to_string().ends_with("choose another with --http-listen"), "{other}");
    assert!(matches!(error, BindError::InUse { flag: "--listen", .. }));
    assert_eq!(error.to_string(), format!("address {address} is already in use; choose another with --listen"));
}
