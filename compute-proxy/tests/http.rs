//! SQL over HTTP in front of real Postgres: answers, logins, bad input, and what is left behind.

mod support;

use std::time::Duration;

use futures::future::join_all;
use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};
use support::{Http, PASSWORD, World, connection};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

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

/// The text of a query as Postgres has it prepared; empty when it is not.
const PREPARED: &str = "select coalesce(string_agg(name, ','), '') n from pg_prepared_statements where statement = $1";

#[tokio::test]
async fn a_text_that_comes_again_is_prepared_once() {
    let world = World::start(&["--pool-size", "1"]).await;
    let http = Http::new(&world);
    let text = "select $1::int + 1 as sum";
    let prepared = async || http.query(PREPARED, json!([text])).await["rows"][0]["n"].clone();
    for (number, wanted) in [(1, ""), (2, "dormouse_"), (3, "dormouse_")] {
        let answer = http.query(text, json!([number])).await;
        assert_eq!(answer["rows"], json!([{"sum": number + 1}]));
        assert_eq!(answer["fields"][0]["dataTypeID"], 23);
        let name = prepared().await;
        let name = name.as_str().expect("a name");
        assert!(name.starts_with(wanted) && name.is_empty() == wanted.is_empty(), "{number}: {name}");
    }
    // Errors are its own, and it goes on.
    assert_eq!(http.code(json!({"query": text, "params": ["x"]}).to_string()).await, "22P02");
    assert_eq!(http.code(json!({"query": text, "params": [1, 2]}).to_string()).await, "08P01");
    assert_eq!(http.query(text, json!([2147483646])).await["rows"], json!([{"sum": 2147483647}]));
    assert_eq!(http.code(json!({"query": text, "params": [2147483647]}).to_string()).await, "22003");
    // A text that never went well, or a very long one, is not prepared.
    let long = format!("select '{}'", "x".repeat(10_000));
    for text in ["select 1 / $1::int", long.as_str()] {
        for _ in 0..3 {
            http.raw(
                json!({"query": text, "params": if text.contains('$') { json!([0]) } else { json!([]) }}).to_string(),
            )
            .await;
        }
        assert_eq!(http.query(PREPARED, json!([text])).await["rows"][0]["n"], "");
    }
}

#[tokio::test]
async fn a_table_may_change_under_a_prepared_text() {
    let world = World::start(&["--pool-size", "1"]).await;
    let http = Http::new(&world);
    http.query("create table http_changing (a int)", json!([])).await;
    http.query("insert into http_changing values (1)", json!([])).await;
    for text in ["select * from http_changing", "update http_changing set a = a + 1 returning *"] {
        for _ in 0..3 {
            http.query(text, json!([])).await;
        }
        assert_ne!(http.query(PREPARED, json!([text])).await["rows"][0]["n"], "", "the test tests something");
    }
    let before = http.value("select a from http_changing").await;
    for (change, row) in [
        ("alter table http_changing add b text default 'x'", json!({"a": before, "b": "x"})),
        ("alter table http_changing alter a type text", json!({"a": before.to_string(), "b": "x"})),
        ("alter table http_changing drop a", json!({"b": "x"})),
    ] {
        http.query(change, json!([])).await;
        for _ in 0..3 {
            assert_eq!(http.query("select * from http_changing", json!([])).await["rows"], json!([row]), "{change}");
        }
    }
    assert_eq!(http.error("update http_changing set a = a + 1 returning *").await, "42703");
    http.query("drop table http_changing", json!([])).await;
    assert_eq!(http.error("select * from http_changing").await, "42P01");
    assert_eq!(http.value("select 1").await, 1);
}

#[tokio::test]
async fn what_has_begun_is_never_run_again() {
    let world = World::start(&["--pool-size", "1"]).await;
    let http = Http::new(&world);
    for text in [
        "create table http_once (n int)",
        "create table http_other (a int)",
        "insert into http_other values (1)",
        // It commits, and then Postgres says of a statement in it what it says of a stale one of ours.
        "create procedure http_procedure(fails bool) language plpgsql as $$
         begin
           insert into http_once values (1);
           execute 'prepare http_inner as select * from http_other';
           execute 'execute http_inner';
           execute format('alter table http_other add c%s int', (select count(*) from http_once));
           commit;
           if fails then
             execute 'execute http_inner';
           end if;
           execute 'deallocate http_inner';
         end $$",
    ] {
        http.query(text, json!([])).await;
    }
    let text = "call http_procedure($1)";
    for _ in 0..2 {
        http.query(text, json!([false])).await;
    }
    let (_, error) = http.raw(json!({"query": text, "params": [true]}).to_string()).await;
    assert_eq!((&error["code"], &error["routine"]), (&json!("0A000"), &json!("RevalidateCachedQuery")));
    assert_eq!(http.value("select count(*)::int from http_once").await, 3);
}
