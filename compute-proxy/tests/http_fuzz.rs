//! Requests by chance, good ones and broken ones: each has a proper answer, and whatever it was, the next one finds the only
//! server connection clean. `DORMOUSE_FUZZ_ROUNDS` says how many, `DORMOUSE_FUZZ_SEED` repeats one.

#[path = "../pool/tests/fuzzing/mod.rs"]
mod fuzzing;
mod support;

use fuzzing::seeds;
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};
use support::{Http, PASSWORD, World};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Duration, timeout},
};

/// Requests of each kind.
const REQUESTS: u64 = 400;

/// Status codes that an answer may have: good, bad, too large, too much at a time.
const STATUSES: [u16; 4] = [200, 400, 413, 503];

/// What stands in bodies.
const PIECES: [&str; 46] = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"query\"",
    "\"params\"",
    "\"queries\"",
    "\"",
    "null",
    "true",
    "1e999",
    "-0",
    "\\u0000",
    "\\ud800",
    "\"\\ud83d\\ude00\"",
    "\"select $1\"",
    "\"select $1::int\"",
    "\"select 1/0\"",
    "\"begin\"",
    "\"rollback\"",
    "\"commit\"",
    "\"insert into http_fuzz values (1)\"",
    "\"set work_mem = '5MB'\"",
    "\"select set_config('work_mem', '6MB', false)\"",
    "\"create temp table fuzz_temp (a int)\"",
    "\"select pg_advisory_lock(816)\"",
    "\"listen fuzz\"",
    "\"declare c cursor with hold for select 1\"",
    "\"prepare fuzz as select 1\"",
    "\"copy http_fuzz to stdout\"",
    "\"copy http_fuzz from stdin\"",
    "\"discard all\"",
    "\"select $1, $2\"",
    "\"select 1; select 2\"",
    "\"do $$begin raise exception 'x'; end$$\"",
    "\"select pg_terminate_backend(pg_backend_pid())\"",
    "\"\"",
    "\"select $1::json\"",
    "\"select $1::int[]\"",
    "\"select '\u{e4}'\"",
    "\"savepoint s\"",
    "\"set role bob\"",
    "\"vacuum\"",
    "[[[[[[[[1]]]]]]]]",
];

/// A JSON value of a parameter.
fn parameter(random: &mut StdRng, depth: usize) -> Value {
    match random.random_range(0..if depth > 4 { 6 } else { 8 }) {
        0 => Value::Null,
        1 => json!(random.random::<i64>()),
        2 => json!(random.random::<bool>()),
        3 => json!(random.random::<f64>()),
        4 => json!(["x", "1", "{1,2}", "\\x00", "\u{1}\u{7f}", "'; drop table http_fuzz; --"].choose(random)),
        5 => json!("y".repeat(random.random_range(0..3000))),
        6 => (0..random.random_range(0..4)).map(|_| parameter(random, depth + 1)).collect(),
        _ => json!({"a": parameter(random, depth + 1)}),
    }
}

/// A query with parameters, as many as it needs or not.
fn query(random: &mut StdRng) -> Value {
    let texts: Vec<_> = PIECES.iter().filter(|piece| piece.starts_with('"') && piece.len() > 12).collect();
    let text: Value = serde_json::from_str(texts.choose(random).expect("one")).expect("JSON");
    let params: Vec<_> = (0..random.random_range(0..3)).map(|_| parameter(random, 0)).collect();
    json!({"query": text, "params": params})
}

/// A body: a good one, a good one with bytes changed, or pieces in any order.
fn body(random: &mut StdRng) -> Vec<u8> {
    let mut body = match random.random_range(0..4) {
        0 => {
            let pieces: Vec<_> = (0..random.random_range(0..12)).filter_map(|_| PIECES.choose(random)).collect();
            return pieces.into_iter().flat_map(|piece| piece.bytes()).collect();
        }
        1 => json!({"queries": (0..random.random_range(0..5)).map(|_| query(random)).collect::<Vec<_>>()}),
        _ => query(random),
    }
    .to_string()
    .into_bytes();
    if random.random_bool(0.4) {
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..body.len());
            match random.random_range(0..3) {
                0 => body[at] = random.random(),
                1 => body.truncate(at.max(1)),
                _ => body.insert(at, *b"\"\\{}[],:0\0".choose(random).expect("one")),
            }
        }
    }
    body
}

/// Headers beside the good connection string, or in place of it.
fn headers(random: &mut StdRng, good: &str) -> Vec<(String, String)> {
    let flag = ["true", "false", "TRUE", "1", ""];
    let mut headers = Vec::new();
    let mut add = |name: &str, value: &str| headers.push((name.to_owned(), value.to_owned()));
    let connection = match random.random_range(0..20) {
        0 => good.replace("ep-a", "ep-a.localhost,ep-b"),
        1 => good.replace("localhost", ""),
        2 => good.replace("/postgres", "/%00"),
        3 => format!("{good}?options=endpoint%3Dep-b"),
        4 => format!("{good}?options=-c%20work_mem%3D5MB&application_name=fuzz&statement_timeout=x"),
        5 => good.chars().rev().collect(),
        _ => good.to_owned(),
    };
    add("Neon-Connection-String", &connection);
    if random.random_range(0..30) == 0 {
        add("Neon-Connection-String", good);
    }
    for name in ["Neon-Raw-Text-Output", "Neon-Array-Mode", "Neon-Batch-Read-Only", "Neon-Batch-Deferrable"] {
        if random.random_bool(0.2) {
            add(name, flag[if random.random_bool(0.8) { 0 } else { random.random_range(0..flag.len()) }]);
        }
    }
    if random.random_bool(0.2) {
        add(
            "Neon-Batch-Isolation-Level",
            ["Serializable", "RepeatableRead", "serializable"].choose(random).expect("one"),
        );
    }
    if random.random_bool(0.2) {
        add(
            "Dormouse-Cache",
            ["max-age=5", "no-store", "max-age=-1", "tag=", "max-age=5, tag=a"].choose(random).expect("one"),
        );
    }
    if random.random_bool(0.02) {
        add("Authorization", ["Bearer x", "Bearer a.b.c", "Basic eDp5", "Bearer"].choose(random).expect("one"));
    }
    headers
}

/// Whatever was asked, nothing of it is left in the session.
async fn check_clean(http: &Http<'_>, seed: u64) {
    let text = "select current_setting('work_mem') <> '4MB' or pg_current_xact_id_if_assigned() is not null or current_user <> 'alice'
        or exists (select from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()) or pg_my_temp_schema() <> 0
          and exists (select from pg_class where relnamespace = pg_my_temp_schema())
        or exists (select from pg_cursors where is_holdable) or exists (select from pg_prepared_statements where from_sql)
        or exists (select from pg_listening_channels()) dirty";
    assert_eq!(http.value(text).await, false, "seed {seed}");
}

#[tokio::test]
async fn any_request_has_an_answer_and_leaves_nothing() {
    let world = World::start(&["--pool-size", "1", "--http-request-max-bytes", "100000"]).await;
    let http = Http::new(&world);
    http.query("create table if not exists http_fuzz (a int)", json!([])).await;
    let good = support::connection("alice");
    for seed in seeds(REQUESTS) {
        let random = &mut StdRng::seed_from_u64(seed);
        let (body, headers) = (body(random), headers(random, &good));
        let mut request = http.client.post(http.url("/sql")).body(body.clone());
        for (name, value) in &headers {
            request = request.header(name, value);
        }
        let about = || format!("seed {seed}: {headers:?} {}", String::from_utf8_lossy(&body));
        let response = timeout(Duration::from_secs(30), request.send()).await.unwrap_or_else(|_| panic!("{}", about()));
        let response = response.unwrap_or_else(|error| panic!("{error}: {}", about()));
        let status = response.status().as_u16();
        assert!(STATUSES.contains(&status), "{status}: {}", about());
        let answer: Value = response.json().await.unwrap_or_else(|error| panic!("{error}: {}", about()));
        if status == 200 {
            assert!(answer["rows"].is_array() || answer["results"].is_array(), "{answer} {}", about());
        } else {
            let code = answer["code"].as_str().unwrap_or_else(|| panic!("{answer} {}", about()));
            assert!(code.len() == 5 && !code.starts_with("XX"), "{answer} {}", about());
        }
        check_clean(&http, seed).await;
    }
}

#[tokio::test]
async fn any_bytes_on_the_port_have_an_end() {
    let world = World::start(&["--allow-cleartext", "--handshake-timeout", "2s"]).await;
    let password = PASSWORD.replace('$', "%24");
    let body = r#"{"query":"select 1"}"#;
    let good = format!(
        "POST /sql HTTP/1.1\r\nHost: x\r\nNeon-Connection-String: postgresql://alice:{password}@ep-a.localhost/postgres\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    for seed in seeds(REQUESTS) {
        let random = &mut StdRng::seed_from_u64(seed);
        let mut bytes = good.clone().into_bytes();
        for _ in 0..random.random_range(0..6) {
            let at = random.random_range(0..bytes.len());
            match random.random_range(0..4) {
                0 => bytes[at] = random.random(),
                1 => drop(bytes.drain(at..(at + random.random_range(1..40)).min(bytes.len()))),
                2 => bytes.insert(at, random.random()),
                _ => {
                    let piece = [
                        "\r\n",
                        "Transfer-Encoding: chunked\r\n",
                        "Content-Length: 5\r\n",
                        "Expect: 100-continue\r\n",
                        "\0",
                    ];
                    let piece = piece.choose(random).expect("one");
                    bytes.splice(at..at, piece.bytes());
                }
            }
            if bytes.is_empty() {
                bytes.push(b'P');
            }
        }
        let mut tcp = TcpStream::connect(world.http_address).await.expect("connected");
        let _ = tcp.write_all(&bytes).await;
        let _ = tcp.shutdown().await;
        let mut answer = Vec::new();
        let ended = timeout(Duration::from_secs(10), tcp.read_to_end(&mut answer)).await;
        assert!(ended.is_ok(), "seed {seed}: {}", String::from_utf8_lossy(&bytes));
    }
    assert_eq!(Http::new(&world).value("select 1").await, 1);
}
