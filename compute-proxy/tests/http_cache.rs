//! Answers over HTTP that are kept: which, for whom, for how long.

mod support;

use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::StatusCode;
use serde_json::{Value, json};
use support::{Http, PASSWORD, World, connection};
use tokio::time::{sleep, timeout};

/// What the cache did with a query that asks to be kept so, and the answer.
async fn cached(http: &Http<'_>, wish: &str, text: &str) -> (String, Value) {
    cached_body(http, &[("Dormouse-Cache", wish)], json!({"query": text})).await
}

/// The same with any body and headers.
async fn cached_body(http: &Http<'_>, headers: &[(&str, &str)], body: Value) -> (String, Value) {
    let mut request = http.client.post(http.url("/sql")).header("Neon-Connection-String", connection("alice"));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(body.to_string());
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

fn batch(texts: &[&str]) -> Value {
    json!({"queries": texts.iter().map(|text| json!({"query": text})).collect::<Vec<_>>()})
}

#[tokio::test]
async fn batches_that_only_read_are_kept_too() {
    let world = World::start(&["--http-auth-cache", "0s"]).await;
    let http = Http::new(&world);
    http.query("create table http_batched (a int)", json!([])).await;
    http.query("insert into http_batched values (1)", json!([])).await;
    let wish = ("Dormouse-Cache", "max-age=60, tag=batched");
    let reads = batch(&["select count(*)::int n from http_batched", "select now()::text t"]);
    let (outcome, first) = cached_body(&http, &[wish], reads.clone()).await;
    assert_eq!((outcome.as_str(), &first["results"][0]["rows"][0]["n"]), ("miss", &json!(1)));
    http.query("insert into http_batched values (2)", json!([])).await;
    assert_eq!(cached_body(&http, &[wish], reads.clone()).await, ("hit".to_owned(), first.clone()));
    let isolation = ("Neon-Batch-Isolation-Level", "Serializable");
    assert_eq!(cached_body(&http, &[wish, isolation], reads.clone()).await.0, "miss", "another transaction");
    let single = json!({"query": "select count(*)::int n from http_batched"});
    assert_eq!(cached_body(&http, &[wish], single).await.1["rows"][0]["n"], 2, "another answer");
    world.endpoint("ep-a").query_cache.lock().tags.insert("batched".to_owned(), 1);
    let (outcome, second) = cached_body(&http, &[wish], reads).await;
    assert_eq!((outcome.as_str(), &second["results"][0]["rows"][0]["n"]), ("miss", &json!(2)));

    // One query that does more, and none is kept; all is done as often as it is sent.
    let writes = batch(&[
        "select 1",
        "insert into http_batched values (3) returning a",
        "select count(*)::int n from http_batched",
    ]);
    for count in [3, 4] {
        let (outcome, answer) = cached_body(&http, &[wish], writes.clone()).await;
        assert_eq!((outcome.as_str(), &answer["results"][2]["rows"][0]["n"]), ("bypass", &json!(count)));
    }
    let creates = batch(&[
        "create table http_batched_new (a int)",
        "select * from http_batched_new",
        "drop table http_batched_new",
    ]);
    assert_eq!(cached_body(&http, &[wish], creates).await.0, "bypass");
    let fails = batch(&["select 1", "select 1 / 0"]);
    let (_, error) = cached_body(&http, &[wish], fails).await;
    assert_eq!(error["code"], "22012");
    assert_eq!(cached_body(&http, &[wish], batch(&[])).await, ("bypass".to_owned(), json!({"results": []})));
}

/// A function that Postgres is told is stable, and that takes a while; its answers differ.
async fn create_slow(http: &Http<'_>, name: &str) {
    let text = format!(
        "create or replace function {name}() returns text language plpgsql stable as
         $$begin perform pg_sleep(0.5); return clock_timestamp()::text; end$$"
    );
    http.query(&text, json!([])).await;
}

#[tokio::test]
async fn those_who_miss_together_ask_once() {
    let world = World::start(&["--http-auth-cache", "0s"]).await;
    let http = Http::new(&world);
    create_slow(&http, "http_slow_merged").await;
    let text = "select http_slow_merged() t";
    let together = async || join_all((0..30).map(|_| cached(&http, "max-age=60", text))).await;
    let answers = together().await;
    assert!(answers.iter().all(|answer| *answer == answers[0] && answer.0 == "miss"), "{answers:?}");
    assert_eq!(cached(&http, "max-age=60", text).await, ("hit".to_owned(), answers[0].1.clone()));

    // Who asks after an invalidation does not get what was asked for before it.
    let endpoint = world.endpoint("ep-a");
    endpoint.query_cache.lock().all += 1;
    let later = async {
        sleep(Duration::from_millis(150)).await;
        endpoint.query_cache.lock().all += 1;
        cached(&http, "max-age=60", text).await
    };
    let ((_, before), (outcome, after)) = tokio::join!(cached(&http, "max-age=60", text), later);
    assert_eq!(outcome, "miss");
    assert_ne!(before, after);

    // What is not kept is done for each.
    // Two of different sessions may be told the same microsecond.
    let text = "select pg_backend_pid() || ' ' || clock_timestamp() t from pg_sleep(0.1)";
    let texts = 8;
    let answers = join_all((0..texts).map(|_| cached(&http, "max-age=60", text))).await;
    let different: std::collections::BTreeSet<_> = answers.iter().map(|(_, answer)| answer.to_string()).collect();
    assert_eq!(different.len(), texts);
}

#[tokio::test]
async fn a_shared_query_ends_when_the_last_client_has_left() {
    let world = World::start(&[]).await;
    let http = Http::new(&world);
    create_slow(&http, "http_slow_shared").await;
    let text = "select http_slow_shared() t";
    let impatient = timeout(Duration::from_millis(250), cached(&http, "max-age=60", text));
    let (gone, (outcome, answer)) = tokio::join!(impatient, cached(&http, "max-age=60", text));
    assert!(gone.is_err());
    assert_eq!(outcome, "miss");
    assert!(answer["rows"][0]["t"].is_string());

    let text = "select http_slow_shared() t from generate_series(1, 100)";
    let ask = || timeout(Duration::from_millis(400), cached(&http, "max-age=60", text));
    let (one, two) = tokio::join!(ask(), ask());
    assert!(one.is_err() && two.is_err());
    let running = "select count(*)::int from pg_stat_activity where query like '%http_slow_shared() t from gen%' \
                   and state = 'active' and pid <> pg_backend_pid()";
    let begun = Instant::now();
    while http.value(running).await != 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "it still runs");
        sleep(Duration::from_millis(20)).await;
    }
}
