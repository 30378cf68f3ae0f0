//! SQL over HTTP/2: many requests on one connection, within bounds.

mod support;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::body::{Body, to_bytes};
use futures::future::join_all;
use hyper::{
    Method, Request, StatusCode, client::conn::http2::SendRequest, ext::Protocol, rt::Executor, upgrade::Upgraded,
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde_json::{Value, json};
use support::{
    Http, World, connection,
    raw_websocket::{BINARY, RawWebSocket, frame, message, query},
};
use tokio::{
    net::TcpStream,
    task::{AbortHandle, JoinHandle},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// TLS with the port for HTTP, by a client that speaks these protocols.
async fn tls(world: &World, protocols: &[&str]) -> TlsStream<TcpStream> {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(world.tls_dir.path().join("ca.pem")).expect("a certificate");
    roots.add(ca).expect("an authority");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = builder.expect("versions").with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    let tcp = TcpStream::connect(world.http_address).await.expect("connected");
    let name = ServerName::try_from("localhost").expect("a name");
    TlsConnector::from(Arc::new(config)).connect(name, tcp).await.expect("TLS")
}

/// One connection of HTTP/2.
struct Http2 {
    sender: SendRequest<Body>,
    task: JoinHandle<hyper::Result<()>>,
    inner_tasks: Tasks,
}

/// Runs the tasks of a connection, until they are to be no more.
#[derive(Clone, Default)]
struct Tasks(Arc<Mutex<Vec<AbortHandle>>>);

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, future: F) {
        self.0.lock().push(tokio::spawn(future).abort_handle());
    }
}

impl Tasks {
    fn abort(&self) {
        self.0.lock().drain(..).for_each(|task| task.abort());
    }
}

impl Http2 {
    async fn connect(world: &World) -> Self {
        let stream = tls(world, &["h2", "http/1.1"]).await;
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let inner_tasks = Tasks::default();
        let handshake = hyper::client::conn::http2::handshake(inner_tasks.clone(), TokioIo::new(stream));
        let (sender, connection) = handshake.await.expect("HTTP/2");
        Self { sender, task: tokio::spawn(connection), inner_tasks }
    }

    async fn send(&self, headers: &[(&str, &str)], body: String) -> hyper::Result<(StatusCode, Value)> {
        let mut request = Request::post("https://localhost/sql").header("Neon-Connection-String", connection("alice"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut sender = self.sender.clone();
        sender.ready().await?;
        let response = sender.send_request(request.body(Body::from(body)).expect("a request")).await?;
        let status = response.status();
        let body = to_bytes(Body::new(response.into_body()), usize::MAX).await.expect("a body");
        Ok((status, serde_json::from_slice(&body).unwrap_or_default()))
    }

    /// What a request for a WebSocket is answered with, and the WebSocket.
    async fn websocket(
        &self,
        host: &str,
        protocol: Option<&'static str>,
        version: &str,
    ) -> (StatusCode, Option<RawWebSocket<TokioIo<Upgraded>>>) {
        let mut request = Request::builder().method(Method::CONNECT).uri(format!("https://{host}/v2"));
        request = request.header("Sec-WebSocket-Version", version);
        if let Some(protocol) = protocol {
            request = request.extension(Protocol::from_static(protocol));
        }
        let mut sender = self.sender.clone();
        sender.ready().await.expect("the connection goes on");
        let request = request.body(Body::empty()).expect("a request");
        let response = sender.send_request(request).await.expect("an answer");
        let status = response.status();
        if status != StatusCode::OK {
            return (status, None);
        }
        let stream = hyper::upgrade::on(response).await.expect("a stream");
        (status, Some(RawWebSocket::over(TokioIo::new(stream))))
    }

    async fn open(&self, host: &str) -> RawWebSocket<TokioIo<Upgraded>> {
        self.websocket(host, Some("websocket"), "13").await.1.expect("a WebSocket")
    }

    async fn query(&self, text: &str, params: Value) -> (StatusCode, Value) {
        self.send(&[], json!({"query": text, "params": params}).to_string()).await.expect("an answer")
    }
}

/// Waits until Postgres runs no query with this in its text.
async fn nothing_runs(http: &Http<'_>, mark: &str) {
    let text = "select count(*)::int n from pg_stat_activity where strpos(query, $1) > 0 and state = 'active' \
                and pid <> pg_backend_pid()";
    let begun = Instant::now();
    while http.query(text, json!([mark])).await["rows"][0]["n"] != 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "it still runs");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn the_client_chooses_the_version() {
    let world = World::start(&[]).await;
    for (offered, chosen) in [
        (&["h2", "http/1.1"][..], Some(&b"h2"[..])),
        (&["http/1.1", "h2"], Some(b"h2")),
        (&["http/1.1"], Some(b"http/1.1")),
        (&["postgresql"], Some(b"postgresql")),
        (&[], None),
    ] {
        assert_eq!(tls(&world, offered).await.get_ref().1.alpn_protocol(), chosen, "{offered:?}");
    }
    let http = Http2::connect(&world).await;
    let (status, answer) = http.query("select $1::int a, 'x' b", json!([7])).await;
    assert_eq!((status, &answer["rows"]), (StatusCode::OK, &json!([{"a": 7, "b": "x"}])));
    let (status, error) = http.query("select 1 / 0", json!([])).await;
    assert_eq!((status, &error["code"]), (StatusCode::BAD_REQUEST, &json!("22012")));
}

#[tokio::test]
async fn many_requests_go_over_one_connection() {
    let world = World::start(&["--pool-size", "4"]).await;
    let http = Http2::connect(&world).await;
    // More than may be open: the client keeps the others back.
    let answers = join_all((0..400).map(|number| http.query("select $1::int n", json!([number])))).await;
    for (number, (status, answer)) in answers.iter().enumerate() {
        assert_eq!((*status, &answer["rows"][0]["n"]), (StatusCode::OK, &json!(number)));
    }
}

#[tokio::test]
async fn answers_and_bodies_may_be_large_but_have_a_limit() {
    let world = World::start(&["--http-request-max-bytes", "3000000", "--http-response-max-bytes", "3000000"]).await;
    let http = Http2::connect(&world).await;
    let (status, answer) = http.query("select repeat('x', 2500000) x", json!([])).await;
    assert_eq!((status, answer["rows"][0]["x"].as_str().map(str::len)), (StatusCode::OK, Some(2_500_000)));
    let (status, answer) = http.query("select length($1) n", json!(["x".repeat(2_500_000)])).await;
    assert_eq!((status, &answer["rows"][0]["n"]), (StatusCode::OK, &json!(2_500_000)));
    let (status, error) = http.query("select repeat('x', 3500000) x", json!([])).await;
    assert_eq!((status, &error["code"]), (StatusCode::BAD_REQUEST, &json!("54000")));
    // The answer may come before all of the request is sent; then the stream is closed.
    if let Ok((status, _)) = http.send(&[], json!({"query": "x".repeat(3_500_000)}).to_string()).await {
        assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    }
    let large = "x".repeat(40_000);
    if let Ok((status, _)) = http.send(&[("X-Large", &large)], "{}".to_owned()).await {
        assert_eq!(status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    }
    assert_eq!(http.query("select 1 n", json!([])).await.1["rows"][0]["n"], 1, "the connection goes on");
}

#[tokio::test]
async fn a_dropped_request_cancels_its_query_and_no_other() {
    let world = World::start(&["--pool-size", "2"]).await;
    let (http, other) = (Http2::connect(&world).await, Http::new(&world));
    let dropped = timeout(Duration::from_millis(300), http.query("select pg_sleep(61)", json!([])));
    let (dropped, (status, _)) = tokio::join!(dropped, http.query("select pg_sleep(0.6)", json!([])));
    assert!(dropped.is_err());
    assert_eq!(status, StatusCode::OK);
    nothing_runs(&other, "pg_sleep(61)").await;
    // So do all requests of a connection that is gone.
    let gone = Http2::connect(&world).await;
    let two = join_all((0..2).map(|_| gone.query("select pg_sleep(62)", json!([]))));
    let mut two = Box::pin(two);
    assert!(timeout(Duration::from_millis(300), &mut two).await.is_err());
    gone.task.abort();
    gone.inner_tasks.abort();
    nothing_runs(&other, "pg_sleep(62)").await;
}

#[tokio::test]
async fn a_proxy_that_stops_lets_requests_end() {
    let world = World::start(&[]).await;
    let http = Http2::connect(&world).await;
    http.query("select 1", json!([])).await;
    let stop = async {
        sleep(Duration::from_millis(300)).await;
        world.shutdown.cancel();
    };
    let ((status, answer), ()) = tokio::join!(http.query("select 5 n from pg_sleep(0.8)", json!([])), stop);
    assert_eq!((status, &answer["rows"][0]["n"]), (StatusCode::OK, &json!(5)));
    timeout(Duration::from_secs(5), http.task)
        .await
        .expect("the connection ends")
        .expect("no panic")
        .expect("in peace");
}

#[tokio::test]
async fn websockets_are_streams_of_the_connection() {
    let world = World::start(&["--pool-size", "2"]).await;
    let http = Http2::connect(&world).await;
    // It has heard that the proxy takes them.
    http.query("select 1", json!([])).await;
    let mut sockets = Vec::new();
    for number in 0..20 {
        let host = if number % 2 == 0 { "ep-a-pooler.localhost" } else { "ep-a.localhost:443" };
        sockets.push(http.open(host).await.logged_in().await);
    }
    let asked = join_all(sockets.iter_mut().map(async |socket| {
        socket.send(&frame(BINARY, &query("select repeat('x', 200000)"))).await;
        socket.until_ready().await
    }));
    let (kinds, (status, _)) = tokio::join!(asked, http.query("select 1", json!([])));
    assert_eq!(status, StatusCode::OK);
    assert!(kinds.iter().all(|kinds| kinds == b"TDCZ"), "{kinds:?}");
    for mut socket in sockets {
        socket.send(&frame(BINARY, &message(b'X', b""))).await;
        assert_eq!(socket.close_code().await, Some(1000));
    }

    // One that goes away in the middle takes its query with it, and nothing else.
    let mut gone = http.open("ep-a-pooler.localhost").await.logged_in().await;
    gone.send(&frame(BINARY, &query("select pg_sleep(63)"))).await;
    sleep(Duration::from_millis(100)).await;
    drop(gone);
    nothing_runs(&Http::new(&world), "pg_sleep(63)").await;
    assert_eq!(http.query("select 1 n", json!([])).await.1["rows"][0]["n"], 1);
}

#[tokio::test]
async fn other_tunnels_are_refused() {
    let world = World::start(&[]).await;
    let http = Http2::connect(&world).await;
    http.query("select 1", json!([])).await;
    for (protocol, version, status) in [
        (Some("websocket"), "12", StatusCode::UPGRADE_REQUIRED),
        (Some("connect-udp"), "13", StatusCode::UPGRADE_REQUIRED),
    ] {
        assert_eq!(http.websocket("ep-a.localhost", protocol, version).await.0, status, "{protocol:?} {version}");
    }
    let get = Request::get("https://ep-a.localhost/v2").body(Body::empty()).expect("a request");
    let answer = http.sender.clone().send_request(get).await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(http.query("select 1 n", json!([])).await.1["rows"][0]["n"], 1, "the connection goes on");
}

#[tokio::test]
async fn websockets_have_a_limit_whatever_carries_them() {
    // One session, and 128 that have none.
    let world = World::start(&["--max-connections", "1"]).await;
    let (first, second) = (Http2::connect(&world).await, Http2::connect(&world).await);
    for http in [&first, &second] {
        assert_eq!(http.query("select 1", json!([])).await.0, StatusCode::OK);
    }
    let mut sockets = Vec::new();
    for number in 0..129 {
        sockets.push(if number < 90 { &first } else { &second }.open("ep-a-pooler.localhost").await);
    }
    let refused = second.websocket("ep-a-pooler.localhost", Some("websocket"), "13").await.0;
    assert_eq!(refused, StatusCode::SERVICE_UNAVAILABLE);
    drop(sockets.pop());
    let begun = Instant::now();
    let mut free = loop {
        if let (StatusCode::OK, Some(socket)) = second.websocket("ep-a-pooler.localhost", Some("websocket"), "13").await
        {
            break socket.logged_in().await;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "the place is not free again");
        sleep(Duration::from_millis(20)).await;
    };
    free.send(&frame(BINARY, &query("select 1"))).await;
    assert_eq!(free.until_ready().await, b"TDCZ");
}

#[tokio::test]
async fn a_proxy_that_stops_lets_sessions_in_websockets_end() {
    let world = World::start(&[]).await;
    let http = Http2::connect(&world).await;
    http.query("select 1", json!([])).await;
    let mut socket = http.open("ep-a.localhost").await.logged_in().await;
    socket.send(&frame(BINARY, &query("select pg_sleep(0.8)"))).await;
    sleep(Duration::from_millis(300)).await;
    world.shutdown.cancel();
    assert_eq!(socket.until_ready().await, b"TDCZ");
    socket.send(&frame(BINARY, &message(b'X', b""))).await;
    assert_eq!(socket.close_code().await, Some(1000));
    drop(socket);
    timeout(Duration::from_secs(5), http.task)
        .await
        .expect("the connection ends")
        .expect("no panic")
        .expect("in peace");
}
