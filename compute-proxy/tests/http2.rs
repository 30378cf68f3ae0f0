//! SQL over HTTP/2: many requests on one connection, within bounds.

mod support;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::body::{Body, to_bytes};
use futures::future::join_all;
use hyper::{Request, StatusCode, client::conn::http2::SendRequest, rt::Executor};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde_json::{Value, json};
use support::{Http, World, connection};
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
