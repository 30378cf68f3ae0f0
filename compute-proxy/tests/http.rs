//! SQL over HTTP in front of real Postgres: answers, logins, bad input, and what is left behind.

mod support;

use std::time::Duration;

use futures::future::join_all;
use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};
use support::{PASSWORD, World};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

/// A client of the proxy that trusts its certificate.
struct Http<'a> {
    world: &'a World,
    client: Client,
}

impl<'a> Http<'a> {
    fn new(world: &'a World) -> Self {
        Self { world, client: world.http_client() }
    }

    fn url(&self, path: &str) -> String {
        format!("https://localhost:{}{path}", self.world.http_address.port())
    }

    async fn send(
        &self,
        connection: &str,
        headers: &[(&str, &str)],
        body: impl Into<reqwest::Body>,
    ) -> (StatusCode, Value) {
        let mut request = self.client.post(self.url("/sql")).header("Neon-Connection-String", connection).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.expect("an answer");
        assert_eq!(response.headers()["access-control-allow-origin"], "*");
        (response.status(), response.json().await.expect("JSON"))
    }

    async fn raw(&self, body: impl Into<reqwest::Body>) -> (StatusCode, Value) {
        self.send(&connection("alice"), &[], body).await
    }

    async fn ok(&self, body: Value) -> Value {
        let (status, answer) = self.raw(body.to_string()).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    }

    async fn query(&self, text: &str, params: Value) -> Value {
        self.ok(json!({"query": text, "params": params})).await
    }

    /// The code of the error.
    async fn code(&self, body: impl Into<reqwest::Body>) -> String {
        let (status, answer) = self.raw(body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        answer["code"].as_str().expect("a code").to_owned()
    }

    async fn error(&self, text: &str) -> String {
        self.code(json!({"query": text}).to_string()).await
    }

    /// One value of one row.
    async fn value(&self, text: &str) -> Value {
        let answer = self.query(text, json!([])).await;
        answer["rows"][0].as_object().and_then(|row| row.values().next().cloned()).unwrap_or_default()
    }
}

fn connection(role: &str) -> String {
    format!("postgresql://{role}:{}@ep-a.localhost/postgres", PASSWORD.replace('$', "%24"))
}

#[tokio::test]
async fn answers_have_node_postgres_shape() {
    let world = World::start(&[]).await;
    let http = Http::new(&world);
    let text = "select 1::int4 a, 9007199254740993::int8 b, true c, 1.5::float8 d, 2.50::numeric e, '{\"x\":[1]}'::jsonb f, \
                array[1,null,3] g, null::text h, 'ä'::text i, '2020-01-02'::date j";
    let answer = http.query(text, json!([])).await;
    let row = json!({"a": 1, "b": "9007199254740993", "c": true, "d": 1.5, "e": "2.50", "f": {"x": [1]}, "g": [1, null, 3],
        "h": null, "i": "ä", "j": "2020-01-02"});
    assert_eq!(answer["rows"], json!([row]));
    assert_eq!((&answer["command"], &answer["rowCount"]), (&json!("SELECT"), &json!(1)));
    assert_eq!(answer["rowAsArray"], false);
    let field = json!({"name": "a", "dataTypeID": 23, "tableID": 0, "columnID": 0, "dataTypeSize": 4,
        "dataTypeModifier": -1, "format": "text"});
    assert_eq!(answer["fields"][0], field);

    let headers = [("Neon-Raw-Text-Output", "true"), ("Neon-Array-Mode", "true")];
    let body = json!({"query": text}).to_string();
    let (_, raw) = http.send(&connection("alice"), &headers, body).await;
    let row =
        json!(["1", "9007199254740993", "t", "1.5", "2.50", "{\"x\": [1]}", "{1,NULL,3}", null, "ä", "2020-01-02"]);
    assert_eq!(raw["rows"], json!([row]));
    assert_eq!(raw["rowAsArray"], true);

    let created = http.query("create table http_shape (a int, b text)", json!([])).await;
    assert_eq!((&created["command"], &created["rowCount"]), (&json!("CREATE"), &Value::Null));
    let inserted = http.query("insert into http_shape values (1, 'x'), (2, 'y') returning a", json!([])).await;
    assert_eq!((&inserted["command"], &inserted["rowCount"]), (&json!("INSERT"), &json!(2)));
    assert_eq!(inserted["rows"], json!([{"a": 1}, {"a": 2}]));
    let empty = http.query("", json!([])).await;
    assert_eq!((&empty["rows"], &empty["command"]), (&json!([]), &Value::Null));
}

#[tokio::test]
async fn parameters_of_every_type() {
    let world = World::start(&[]).await;
    let http = Http::new(&world);
    let text = "select $1::int a, $2::text b, $3::bool c, $4::jsonb d, $5::int[] e, $6::text[] f, $7::numeric g, $8::bytea h, \
                $9::text i, $10::jsonb[] j";
    let params = json!([7, "it's \"ä\"", true, {"k": [1, null]}, [1, null], ["a,b", "{\"}", null], 1.25, "\\x00ff",
        null, [{"q": "\"\\"}]]);
    let answer = http.query(text, params).await;
    let row = json!({"a": 7, "b": "it's \"ä\"", "c": true, "d": {"k": [1, null]}, "e": [1, null], "f": ["a,b", "{\"}", null],
        "g": "1.25", "h": "\\x00ff", "i": null, "j": [{"q": "\"\\"}]});
    assert_eq!(answer["rows"], json!([row]));
    assert_eq!(http.code(json!({"query": "select $1::int", "params": ["x"]}).to_string()).await, "22P02");
    assert_eq!(http.code(json!({"query": "select $1::int", "params": []}).to_string()).await, "08P01");
    let many: Vec<_> = (0..70_000).collect();
    assert_eq!(http.code(json!({"query": "select 1", "params": many}).to_string()).await, "54000");
}

#[tokio::test]
async fn errors_have_all_fields_of_postgres() {
    let world = World::start(&[]).await;
    let http = Http::new(&world);
    http.query("create table http_errors (a int constraint positive check (a > 0))", json!([])).await;
    let (status, error) = http.raw(json!({"query": "insert into http_errors values (-1)"}).to_string()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(error["message"], "new row for relation \"http_errors\" violates check constraint \"positive\"");
    for (field, wanted) in [
        ("severity", "ERROR"),
        ("code", "23514"),
        ("detail", "Failing row contains (-1)."),
        ("schema", "public"),
        ("table", "http_errors"),
        ("constraint", "positive"),
        ("routine", "ExecConstraints"),
    ] {
        assert_eq!(error[field], wanted, "{field}");
    }
    let (_, error) = http.raw(json!({"query": "select nonsense"}).to_string()).await;
    assert_eq!((&error["code"], &error["position"]), (&json!("42703"), &json!("8")));
}

#[tokio::test]
async fn a_batch_is_one_transaction() {
    let world = World::start(&["--pool-size", "1"]).await;
    let http = Http::new(&world);
    http.query("create table http_batch (a int primary key)", json!([])).await;
    let batch = |texts: &[&str]| {
        let queries: Vec<_> = texts.iter().map(|text| json!({"query": text, "params": []})).collect();
        json!({ "queries": queries })
    };
    let good = batch(&[
        "insert into http_batch values (1)",
        "select count(*)::int n, txid_current()::text from http_batch",
        "select txid_current()::text",
    ]);
    let answer = http.ok(good).await;
    let results = answer["results"].as_array().expect("results");
    assert_eq!((results.len(), &results[1]["rows"][0]["n"]), (3, &json!(1)));
    assert_eq!(results[1]["rows"][0]["txid_current"], results[2]["rows"][0]["txid_current"]);

    // An error in the middle takes everything back, and the only connection is clean after it.
    let bad = batch(&["insert into http_batch values (2)", "select 1/0", "insert into http_batch values (3)"]);
    assert_eq!(http.code(bad.to_string()).await, "22012");
    assert_eq!(http.value("select count(*)::int from http_batch").await, 1);
    let late = batch(&["insert into http_batch values (4)", "insert into http_batch values (4)"]);
    assert_eq!(http.code(late.to_string()).await, "23505");
    assert_eq!(http.value("select count(*)::int from http_batch").await, 1);
    assert_eq!(http.ok(batch(&[])).await, json!({"results": []}));

    let headers = [
        ("Neon-Batch-Isolation-Level", "Serializable"),
        ("Neon-Batch-Read-Only", "true"),
        ("Neon-Batch-Deferrable", "true"),
    ];
    let show = batch(&["show transaction_isolation", "show transaction_read_only", "show transaction_deferrable"]);
    let (_, answer) = http.send(&connection("alice"), &headers, show.to_string()).await;
    assert_eq!(answer["results"][0]["rows"][0]["transaction_isolation"], "serializable");
    assert_eq!(answer["results"][1]["rows"][0]["transaction_read_only"], "on");
    assert_eq!(answer["results"][2]["rows"][0]["transaction_deferrable"], "on");
    let (status, error) =
        http.send(&connection("alice"), &headers, batch(&["delete from http_batch"]).to_string()).await;
    assert_eq!((status, &error["code"]), (StatusCode::BAD_REQUEST, &json!("25006")));
    let (status, _) = http.send(&connection("alice"), &[("Neon-Batch-Read-Only", "maybe")], "{}").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn nothing_is_left_for_the_next_request() {
    let world = World::start(&["--pool-size", "1"]).await;
    let http = Http::new(&world);
    http.query("begin", json!([])).await;
    assert_eq!(http.value("select pg_current_xact_id_if_assigned()::text").await, Value::Null);
    let zone = http.value("show timezone").await;
    http.query("set timezone = 'Asia/Tokyo'", json!([])).await;
    assert_eq!(http.value("show timezone").await, zone);
    http.query("create temporary table http_temporary (a int)", json!([])).await;
    assert_eq!(http.error("select * from http_temporary").await, "42P01");
    http.query("select pg_advisory_lock(4711)", json!([])).await;
    // Its connection is closed; until Postgres notices, the lock is there.
    sleep(Duration::from_millis(300)).await;
    assert_eq!(http.value("select pg_try_advisory_xact_lock(4711)").await, true);
    assert_eq!(http.error("copy (select 1) to stdout").await, "0A000");
    assert_eq!(http.error("copy pg_class from stdin").await, "42501");
    http.query("create table http_copied (a int)", json!([])).await;
    assert_eq!(http.error("copy http_copied from stdin").await, "0A000");
    assert_eq!(http.error("select 1; select 2").await, "42601");
    assert_eq!(http.value("select 5").await, 5);
}

#[tokio::test]
async fn wrong_logins_look_alike_and_wake_nothing() {
    let world = World::start(&[]).await;
    let http = Http::new(&world);
    let body = json!({"query": "select 1"}).to_string();
    let mut answers = Vec::new();
    for wrong in [
        connection("alice").replace("wonder", "under"),
        connection("nobody"),
        connection("bob"),
        connection("alice").replace("ep-a.", "ep-none."),
        "postgresql://alice@ep-a.localhost/postgres".to_owned(),
    ] {
        let (status, error) = http.send(&wrong, &[], body.clone()).await;
        assert_eq!((status, &error["code"]), (StatusCode::BAD_REQUEST, &json!("28P01")), "{wrong}");
        let role = wrong.split(['/', ':', '@']).nth(3).expect("a role").to_owned();
        answers.push(error.to_string().replace(&role, "?"));
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    for (malformed, code) in [
        ("nonsense", "08P01"),
        ("postgresql://alice:x@ep-a.localhost,ep-b.localhost/postgres", "08P01"),
        ("postgresql://alice:x@localhost/postgres", "08P01"),
        ("postgresql://alice:x@ep-a.localhost/postgres?options=endpoint%3Dep-b", "08P01"),
    ] {
        let (status, error) = http.send(malformed, &[], body.clone()).await;
        assert_eq!((status, &error["code"]), (StatusCode::BAD_REQUEST, &json!(code)), "{malformed}");
    }
    let twice = http.client.post(http.url("/sql")).header("Neon-Connection-String", connection("alice"));
    let twice = twice.header("Neon-Connection-String", connection("carol")).body(body.clone());
    assert_eq!(twice.send().await.expect("an answer").status(), StatusCode::BAD_REQUEST);
    let without = http.client.post(http.url("/sql")).body(body.clone()).send().await.expect("an answer");
    assert_eq!(without.status(), StatusCode::BAD_REQUEST);
    assert_eq!(world.wakes(), 0);

    // Many failures from one address close the door, also to the right password.
    for _ in 0..40 {
        http.send(&connection("alice").replace("wonder", "under"), &[], body.clone()).await;
    }
    let (_, error) = http.send(&connection("alice"), &[], body.clone()).await;
    assert_eq!(error["code"], "28000");
    assert_eq!(world.wakes(), 0);
}

#[tokio::test]
async fn the_endpoint_is_named_in_any_of_three_ways() {
    let world = World::start(&[]).await;
    let http = Http::new(&world);
    let password = PASSWORD.replace('$', "%24");
    for good in [
        connection("alice"),
        connection("alice").replace("ep-a.", "ep-a-pooler."),
        connection("alice").replace("ep-a.localhost", "db.example.com:5432")
            + "?options=endpoint%3Dep-a&sslmode=require",
        format!("postgres://alice:endpoint=ep-a;{password}@localhost/postgres"),
    ] {
        let (status, answer) = http.send(&good, &[], json!({"query": "select current_user u"}).to_string()).await;
        assert_eq!((status, &answer["rows"][0]["u"]), (StatusCode::OK, &json!("alice")), "{good} {answer}");
    }
    // A new password counts at once, the old one for a second at most.
    world.endpoint("ep-a").set_password("alice", "new");
    let new = connection("alice").replace(&password, "new");
    let (status, _) = http.send(&new, &[], json!({"query": "select 1"}).to_string()).await;
    assert_eq!(status, StatusCode::OK);
    sleep(Duration::from_millis(1100)).await;
    let (_, error) = http.send(&connection("alice"), &[], json!({"query": "select 1"}).to_string()).await;
    assert_eq!(error["code"], "28P01");
    let lookups = || world.endpoint("ep-a").role_lookups.load(std::sync::atomic::Ordering::SeqCst);
    let before = lookups();
    for _ in 0..20 {
        http.send(&new, &[], json!({"query": "select 1"}).to_string()).await;
    }
    assert!(lookups() - before <= 3, "the control plane is not asked for each request");
}

#[tokio::test]
async fn bad_bodies_are_told_apart_and_bounded() {
    let world = World::start(&["--http-request-max-bytes", "100000", "--http-response-max-bytes", "50000"]).await;
    let http = Http::new(&world);
    let deep = |open: &str, close: &str| {
        format!(r#"{{"query":"select $1","params":[{}{}]}}"#, open.repeat(20_000), close.repeat(20_000))
    };
    for (body, code) in [
        ("".to_owned(), "08P01"),
        ("{".to_owned(), "08P01"),
        ("null".to_owned(), "08P01"),
        ("[1]".to_owned(), "08P01"),
        (r#"{"query":7}"#.to_owned(), "08P01"),
        (r#"{"query":"select 1","params":"x"}"#.to_owned(), "08P01"),
        (r#"{"query":"select 1","queries":[]}"#.to_owned(), "08P01"),
        (r#"{"queries":[{"params":[]}]}"#.to_owned(), "08P01"),
        (r#"{"query":"select '\u0000'"}"#.to_owned(), "22021"),
        (r#"{"query":"select $1","params":["\u0000"]}"#.to_owned(), "22021"),
        (r#"{"query":"select $1","params":["\ud800"]}"#.to_owned(), "22P02"),
        (deep("[", "]"), "54000"),
    ] {
        assert_eq!(http.code(body.clone()).await, code, "{}", &body[..body.len().min(80)]);
    }
    // What Postgres is to judge it judges.
    let (status, _) =
        http.raw(deep(r#"{"a":"#, "}").replace("}}", "}0}").replace("select $1", "select $1::text is null")).await;
    assert!(status.is_client_error());
    assert_eq!(http.code(&b"{\"query\":\"\xff\"}"[..]).await, "22021");
    let (status, error) = http.raw(json!({"query": "x".repeat(100_000)}).to_string()).await;
    assert_eq!((status, &error["code"]), (StatusCode::PAYLOAD_TOO_LARGE, &json!("54000")));
    assert_eq!(http.error("select repeat('x', 1000) from generate_series(1, 100)").await, "54000");
    assert_eq!(http.error("select repeat('x', 10000000)").await, "54000");
    assert_eq!(http.value("select 1").await, 1);
    let other = http.client.get(http.url("/sql")).send().await.expect("an answer");
    assert_eq!(other.status(), StatusCode::METHOD_NOT_ALLOWED);
    let other = http.client.get(http.url("/")).send().await.expect("an answer");
    assert_eq!(other.status(), StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn all_answers_together_are_bounded_too() {
    // Less than one of the large answers takes.
    let world = World::start(&["--http-memory-bytes", "1500000"]).await;
    let http = Http::new(&world);
    let answer = |length: usize| json!({"query": format!("select repeat('x', {length}) x")}).to_string();
    for _ in 0..5 {
        let (status, error) = http.raw(answer(1_000_000)).await;
        assert_eq!((status, &error["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("53200")));
    }
    let (status, answer) = http.raw(answer(400_000)).await;
    assert_eq!(status, StatusCode::OK, "what was taken is given back: {}", answer["message"]);
}

#[tokio::test]
async fn scripts_of_any_origin_may_ask() {
    let world = World::start(&[]).await;
    let http = Http::new(&world);
    let request = http.client.request(Method::OPTIONS, http.url("/sql")).header("Origin", "https://example.com");
    let response = request.header("Access-Control-Request-Method", "POST").send().await.expect("an answer");
    assert_eq!(response.status(), StatusCode::NO_CONTENT);
    let header = |name: &str| response.headers()[name].to_str().expect("text").to_owned();
    assert_eq!(header("access-control-allow-origin"), "*");
    assert!(header("access-control-allow-methods").contains("POST"));
    assert!(header("access-control-allow-headers").contains("Neon-Connection-String"));
    assert_eq!(world.wakes(), 0);
}

#[tokio::test]
async fn a_dropped_request_cancels_its_query() {
    let world = World::start(&["--pool-size", "1"]).await;
    let http = Http::new(&world);
    let slow = json!({"query": "select pg_sleep(60)"}).to_string();
    let request = timeout(Duration::from_millis(700), http.raw(slow));
    assert!(request.await.is_err());
    let running = "select count(*)::int from pg_stat_activity where query like '%pg_sleep(60)%' and state = 'active' \
                   and pid <> pg_backend_pid()";
    for _ in 0..50 {
        if http.value(running).await == 0 {
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("the query still runs");
}

#[tokio::test]
async fn plain_http_needs_leave() {
    let world = World::start(&[]).await;
    let mut tcp = TcpStream::connect(world.http_address).await.expect("connected");
    tcp.write_all(b"POST /sql HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await.expect("sent");
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).await.expect("read");
    assert!(answer.starts_with("HTTP/1.1 400") && answer.ends_with("wss://.\n"), "{answer}");
    let length = answer.split("Content-Length: ").nth(1).and_then(|rest| rest.split("\r\n").next()).expect("a length");
    assert_eq!(length, answer.split("\r\n\r\n").nth(1).expect("a body").len().to_string());

    let world = World::start(&["--allow-cleartext"]).await;
    let url = format!("http://{}/sql", world.http_address);
    let request = Client::new().post(url).header("Neon-Connection-String", connection("alice"));
    let response = request.body(json!({"query": "select 1"}).to_string()).send().await.expect("an answer");
    assert_eq!(response.status(), StatusCode::OK);
}

#[tokio::test]
async fn many_requests_share_few_connections_and_one_wake() {
    let world = World::start(&["--pool-size", "4"]).await;
    *world.endpoint("ep-a").wake_delay.lock() = Duration::from_millis(300);
    let http = Http::new(&world);
    let answers = join_all((0..200).map(|number| {
        let http = &http;
        async move { http.query("select $1::int n, pg_backend_pid() p", json!([number])).await }
    }))
    .await;
    let mut backends = std::collections::BTreeSet::new();
    for (number, answer) in answers.iter().enumerate() {
        assert_eq!(answer["rows"][0]["n"], number);
        backends.insert(answer["rows"][0]["p"].as_i64());
    }
    assert!(backends.len() <= 4, "{backends:?}");
    assert!(world.wakes() <= 4, "{} wakes", world.wakes());
}

#[tokio::test]
async fn the_port_speaks_postgres_to_those_who_name_it() {
    let world = World::start(&[]).await;
    let (host, port) = ("ep-a.localhost", world.http_address.port());
    let script = format!(
        "openssl s_client -connect 127.0.0.1:{port} -servername {host} -alpn postgresql -CAfile {} 2>/dev/null </dev/null",
        world.tls_dir.path().join("ca.pem").display()
    );
    let output = tokio::process::Command::new("sh").args(["-c", &script]).output().await.expect("openssl runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("ALPN protocol: postgresql") && said.contains("Verify return code: 0"), "{said}");
}

/// What the cache did with a query that asks to be kept so, and the answer.
async fn cached(http: &Http<'_>, wish: &str, text: &str) -> (String, Value) {
    let request = http.client.post(http.url("/sql")).header("Neon-Connection-String", connection("alice"));
    let request = request.header("Dormouse-Cache", wish).body(json!({"query": text}).to_string());
    let response = request.send().await.expect("an answer");
    let outcome = response.headers().get("dormouse-cache").map(|value| value.to_str().expect("text").to_owned());
    (outcome.unwrap_or_default(), response.json().await.expect("JSON"))
}

#[tokio::test]
async fn answers_are_kept_when_that_is_asked_for() {
    let world = World::start(&["--http-auth-cache", "0s"]).await;
    let http = Http::new(&world);
    http.query("create table http_kept (a int)", json!([])).await;
    http.query("insert into http_kept values (1)", json!([])).await;
    let text = "select count(*)::int n from http_kept";
    let n = |answer: &Value| answer["rows"][0]["n"].clone();
    assert_eq!(cached(&http, "", text).await.0, "", "nobody asked");
    assert_eq!(cached(&http, "max-age=60, tag=kept", text).await.0, "miss");
    http.query("insert into http_kept values (2)", json!([])).await;
    let (outcome, answer) = cached(&http, "max-age=60, tag=kept", text).await;
    assert_eq!((outcome.as_str(), n(&answer)), ("hit", json!(1)));
    assert_eq!(n(&http.query(text, json!([])).await), 2, "who does not ask for it gets a new one");

    // A kept answer needs a good password all the same.
    let wrong = connection("alice").replace("wonder", "under");
    let (status, error) =
        http.send(&wrong, &[("Dormouse-Cache", "max-age=60")], json!({"query": text}).to_string()).await;
    assert_eq!((status, &error["code"]), (StatusCode::BAD_REQUEST, &json!("28P01")));
    let body = json!({"query": text}).to_string();
    let (_, error) = http.send(&connection("carol"), &[("Dormouse-Cache", "max-age=60")], body).await;
    assert_eq!(error["code"], "42501", "another role's answer is not given");

    // Invalidation, by tag and all.
    let endpoint = world.endpoint("ep-a");
    endpoint.query_cache.lock().tags.insert("kept".to_owned(), 1);
    let (outcome, answer) = cached(&http, "max-age=60, tag=kept", text).await;
    assert_eq!((outcome.as_str(), n(&answer)), ("miss", json!(2)));
    assert_eq!(cached(&http, "max-age=60", text).await.0, "hit");
    endpoint.query_cache.lock().all += 1;
    assert_eq!(cached(&http, "max-age=60", text).await.0, "miss");

    // The endpoint's own setting, and a request that does not want it.
    endpoint.query_cache.lock().settings =
        Some(control_plane_api::v2::QueryCacheSettings { max_age: 60, stale_while_revalidate: 0 });
    assert_eq!(cached(&http, "", text).await.0, "hit");
    assert_eq!(cached(&http, "no-store", text).await.0, "");
    let error = cached(&http, "max-age=forever", text).await.1;
    assert_eq!(error["code"], "08P01");
}

#[tokio::test]
async fn a_kept_answer_wakes_nothing() {
    let world = World::start(&[]).await;
    let http = Http::new(&world);
    let body = json!({"query": "select now()::text t"}).to_string();
    world.endpoint("ep-a").set_password("bob", PASSWORD);
    let ask = async |wish: &str| http.send(&connection("bob"), &[("Dormouse-Cache", wish)], body.clone()).await.1;
    let first = ask("max-age=60").await;
    // Its compute's sessions end, as when it goes to sleep. No other test uses this role.
    world.postgres.terminate_backends_of("bob");
    sleep(Duration::from_millis(600)).await;
    let wakes = world.wakes();
    assert_eq!(ask("max-age=60").await, first);
    assert_eq!(world.wakes(), wakes);
    assert_ne!(ask("no-store").await, first);
    assert_eq!(world.wakes(), wakes + 1, "this one needs the compute");
}

#[tokio::test]
async fn a_stale_answer_is_given_at_once_and_fetched_anew() {
    let world = World::start(&[]).await;
    let http = Http::new(&world);
    let wish = "max-age=1, stale-while-revalidate=30";
    let text = "select statement_timestamp()::text t";
    let (_, first) = cached(&http, wish, text).await;
    sleep(Duration::from_millis(1200)).await;
    let (outcome, second) = cached(&http, wish, text).await;
    assert_eq!((outcome.as_str(), &second), ("stale", &first));
    for _ in 0..50 {
        let (outcome, third) = cached(&http, wish, text).await;
        if outcome == "hit" {
            assert_ne!(third, first);
            return;
        }
        sleep(Duration::from_millis(20)).await;
    }
    panic!("it was not fetched anew");
}

#[tokio::test]
async fn only_reading_by_stable_functions_is_kept() {
    let world = World::start(&[]).await;
    let http = Http::new(&world);
    for text in [
        "create table http_stable (a int, b text)",
        "create function http_volatile() returns int language sql volatile as 'select 1'",
        "create function http_hidden() returns int language plpgsql volatile as 'begin return 1; end'",
        "create function http_promised() returns int language plpgsql stable as 'begin return 1; end'",
        "create view http_view as select random() r",
        "create sequence http_sequence",
        "create function http_equal(int, int) returns bool language plpgsql volatile as 'begin return true; end'",
        "create operator === (leftarg = int, rightarg = int, function = http_equal)",
    ] {
        http.query(text, json!([])).await;
    }
    let wish = "max-age=60";
    for text in [
        "select a, count(*) from http_stable where b like 'x%' group by a order by 1",
        "select now(), current_user, array_agg(a) over () from http_stable",
        "select http_promised()",
        "with x as (select 1 a) select * from x where (a, 1) < (2, 3) union select a from http_stable",
        "values (1), (2)",
        "select relname from pg_class limit 1",
    ] {
        assert_eq!(cached(&http, wish, text).await.0, "miss", "{text}");
        assert_eq!(cached(&http, wish, text).await.0, "hit", "{text}");
    }
    for text in [
        "select random()",
        "select clock_timestamp()",
        "select 1 limit (random() * 5)::int",
        "select sum(1) over (rows (random() * 2)::int preceding)",
        "select * from http_stable tablesample bernoulli (10)",
        "select * from http_view",
        "select http_volatile()",
        "select http_hidden()",
        "select 1 === 2",
        "select nextval('http_sequence')::text",
        "select pg_try_advisory_lock(5)",
        "select * from http_stable for update",
        "insert into http_stable values (1, 'x') returning a",
        "with x as (insert into http_stable values (2, 'y') returning a) select * from x",
        "update http_stable set b = 'z'",
        "show work_mem",
    ] {
        assert_eq!(cached(&http, wish, text).await.0, "bypass", "{text}");
        assert_eq!(cached(&http, wish, text).await.0, "bypass", "{text}");
    }
    assert_eq!(
        http.value("select count(*)::int from http_stable where b = 'z'").await,
        4,
        "each was done once, when it was sent"
    );
    let (_, error) = cached(&http, wish, "select nonsense").await;
    assert_eq!((&error["code"], &error["position"]), (&json!("42703"), &json!("8")));
    let (_, error) = cached(&http, wish, "select 1 / 0").await;
    assert_eq!(error["code"], "22012");

    // Parameters, and the shape of the answer, make it another one.
    let body = |number: i32| json!({"query": "select $1::int n", "params": [number]}).to_string();
    for (number, headers) in [(1, vec![]), (2, vec![]), (1, vec![("Neon-Array-Mode", "true")])] {
        let headers = [&[("Dormouse-Cache", wish)][..], &headers].concat();
        let (_, answer) = http.send(&connection("alice"), &headers, body(number)).await;
        let wanted = if headers.len() > 1 { json!([number]) } else { json!({ "n": number }) };
        assert_eq!(answer["rows"][0], wanted);
    }
}
