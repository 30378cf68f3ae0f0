//! JSON Web Tokens in place of passwords: which are good, what SQL sees of them, and that no other client sees it.

mod support;

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use dormouse_compute_proxy::token::{KeySet, Token, TokenError};
use futures::future::join_all;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, get_current_timestamp};
use proptest::prelude::*;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use support::{Issuer, PASSWORD, Signer, World};
use tokio::time::sleep;

/// What policies of row-level security ask for.
const SUBJECT: &str = "nullif(current_setting('request.jwt.claims', true), '')::json->>'sub'";

/// For logins with a token: the connection string has no password.
const BY_TOKEN: &str = "postgresql://alice@ep-a.localhost/postgres";

fn set_of(signers: &[&Signer]) -> KeySet {
    let keys: Vec<_> = signers.iter().map(|signer| signer.public()).collect();
    KeySet::parse(json!({ "keys": keys }).to_string().as_bytes()).expect("a key set")
}

fn verify(set: &KeySet, token: &str) -> Result<Value, TokenError> {
    let claims = set.verify(&Token::parse(token)?, Some("shop"), Some("issuer"))?;
    Ok(serde_json::from_str(claims.as_str()).expect("JSON"))
}

#[test]
fn a_key_of_each_kind_verifies_what_it_has_signed() {
    for algorithm in [Algorithm::RS256, Algorithm::ES256, Algorithm::EdDSA] {
        let (signer, other) = (Signer::new("a", algorithm), Signer::new("a", algorithm));
        let set = set_of(&[&signer, &Signer::new("b", Algorithm::EdDSA)]);
        let token = signer.token("ann");
        assert_eq!(verify(&set, &token).expect("good")["sub"], "ann", "{algorithm:?}");
        assert_eq!(verify(&set, &other.token("ann")), Err(TokenError::Signature), "{algorithm:?}");
        assert_eq!(verify(&set, &signer.sign_as(Some("c"), &json!({}))), Err(TokenError::UnknownKey));
        let (signed, signature) = token.rsplit_once('.').expect("three parts");
        let (header, _) = signed.split_once('.').expect("three parts");
        let forged = BASE64.encode(json!({"sub": "bob", "aud": "shop", "iss": "issuer", "exp": 9e9}).to_string());
        assert_eq!(verify(&set, &format!("{header}.{forged}.{signature}")), Err(TokenError::Signature));
    }
}

#[test]
fn a_token_does_not_choose_its_algorithm() {
    let signer = Signer::new("a", Algorithm::RS256);
    let set = set_of(&[&signer]);
    let claims = json!({"sub": "ann", "aud": "shop", "iss": "issuer", "exp": get_current_timestamp() + 60});
    // The public key as the secret of a HMAC.
    let public = signer.public();
    for secret in [public.to_string(), public["n"].as_str().expect("a modulus").to_owned()] {
        let mut header = Header::new(Algorithm::HS256);
        header.kid = Some("a".to_owned());
        let token = encode(&header, &claims, &EncodingKey::from_secret(secret.as_bytes())).expect("a token");
        assert_eq!(verify(&set, &token), Err(TokenError::UnknownKey));
    }
    let payload = BASE64.encode(claims.to_string());
    for header in
        [json!({"alg": "none", "kid": "a"}), json!({"alg": "RS256", "kid": "a", "crit": ["b64"], "b64": false})]
    {
        let header = BASE64.encode(header.to_string());
        assert_eq!(verify(&set, &format!("{header}.{payload}.")), Err(TokenError::Malformed), "{header}");
    }
    // A set may hold a secret or a key for something else: these are no keys for tokens.
    let secret = BASE64.encode("secret");
    let mut encryption = public.clone();
    encryption["use"] = json!("enc");
    let mut other = public;
    other["alg"] = json!("RS512");
    let keys =
        json!({"keys": [{"kty": "oct", "k": secret, "kid": "a"}, {"kty": "new", "kid": "a"}, 7, encryption, other]});
    let set = KeySet::parse(keys.to_string().as_bytes()).expect("a set");
    let mut header = Header::new(Algorithm::HS256);
    header.kid = Some("a".to_owned());
    let token = encode(&header, &claims, &EncodingKey::from_secret(b"secret")).expect("a token");
    for token in [token, signer.sign(&claims)] {
        assert_eq!(verify(&set, &token), Err(TokenError::UnknownKey));
    }
}

#[test]
fn claims_are_checked() {
    let signer = Signer::new("a", Algorithm::EdDSA);
    let set = set_of(&[&signer]);
    let now = get_current_timestamp();
    let with = |changes: Value| {
        let mut claims = json!({"sub": "ann", "aud": "shop", "iss": "issuer", "exp": now + 60});
        for (name, value) in changes.as_object().expect("an object") {
            claims[name] = value.clone();
        }
        verify(&set, &signer.sign(&claims)).map(|_| ())
    };
    for good in [
        json!({}),
        json!({"exp": now - 10}),
        json!({"nbf": now + 10}),
        json!({"aud": ["other", "shop"]}),
        json!({"exp": now as f64 + 60.5}),
    ] {
        assert_eq!(with(good.clone()), Ok(()), "{good}");
    }
    for (bad, error) in [
        (json!({"exp": now - 60}), TokenError::Expired),
        (json!({"exp": 0}), TokenError::Expired),
        (json!({"exp": null}), TokenError::Claims),
        (json!({"exp": "tomorrow"}), TokenError::Claims),
        (json!({"nbf": now + 60}), TokenError::Claims),
        (json!({"nbf": "x"}), TokenError::Claims),
        (json!({"aud": "other"}), TokenError::Claims),
        (json!({"aud": null}), TokenError::Claims),
        (json!({"aud": []}), TokenError::Claims),
        (json!({"aud": {"shop": 1}}), TokenError::Claims),
        (json!({"iss": "other"}), TokenError::Claims),
        (json!({"iss": null}), TokenError::Claims),
    ] {
        assert_eq!(with(bad.clone()), Err(error), "{bad}");
    }
    let any = Token::parse(Box::leak(signer.sign(&json!({"exp": now + 60})).into_boxed_str())).expect("a token");
    assert!(set.verify(&any, None, None).is_ok(), "nothing more is wanted");
    assert!(Token::parse(&signer.sign(&json!({"exp": now + 60, "x": "x".repeat(8192)}))).is_err(), "too long");
}

#[test]
fn a_token_without_a_key_id_needs_the_only_key() {
    let (a, b) = (Signer::new("a", Algorithm::EdDSA), Signer::new("b", Algorithm::EdDSA));
    let rsa = Signer::new("c", Algorithm::RS256);
    let claims = json!({"aud": "shop", "iss": "issuer", "exp": get_current_timestamp() + 60});
    let token = a.sign_as(None, &claims);
    assert!(verify(&set_of(&[&a, &rsa]), &token).is_ok());
    assert_eq!(verify(&set_of(&[&a, &b]), &token), Err(TokenError::UnknownKey));
}

proptest! {
    #[test]
    fn garbage_never_panics(text in "\\PC{0,60}", parts in "[A-Za-z0-9_-]{0,40}\\.[A-Za-z0-9_-]{0,40}\\.[A-Za-z0-9_-]{0,40}", json: String) {
        let set = KeySet::parse(br#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AA"},{"kty":"EC","crv":"P-256","x":"","y":"!"}]}"#);
        let set = set.expect("a set");
        for text in [&text, &parts, &format!("{}.{}.AAAA", BASE64.encode(r#"{"alg":"EdDSA"}"#), BASE64.encode(&json))] {
            if let Ok(token) = Token::parse(text) {
                prop_assert!(set.verify(&token, None, None).is_err());
            }
        }
        let _ = KeySet::parse(json.as_bytes());
    }
}

/// A client that logs in with tokens.
struct Http<'a> {
    world: &'a World,
    client: Client,
}

impl<'a> Http<'a> {
    fn new(world: &'a World) -> Self {
        Self { world, client: world.http_client() }
    }

    async fn send(&self, connection: &str, headers: &[(&str, &str)], body: &Value) -> (StatusCode, String, Value) {
        let url = format!("https://localhost:{}/sql", self.world.http_address.port());
        let mut request = self.client.post(url).header("Neon-Connection-String", connection).body(body.to_string());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.expect("an answer");
        let cache = response.headers().get("dormouse-cache").map(|value| value.to_str().expect("text").to_owned());
        (response.status(), cache.unwrap_or_default(), response.json().await.expect("JSON"))
    }

    async fn ask(&self, token: &str, body: Value) -> (StatusCode, Value) {
        let authorization = format!("Bearer {token}");
        let (status, _, answer) = self.send(BY_TOKEN, &[("Authorization", &authorization)], &body).await;
        (status, answer)
    }

    /// The first value of the first row.
    async fn value(&self, token: &str, text: &str) -> Value {
        let (status, answer) = self.ask(token, json!({ "query": text })).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer["rows"][0].as_object().and_then(|row| row.values().next().cloned()).unwrap_or_default()
    }

    async fn code(&self, token: &str) -> String {
        let (status, answer) = self.ask(token, json!({"query": "select 1"})).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        answer["code"].as_str().expect("a code").to_owned()
    }

    /// As the same role with its password.
    async fn by_password(&self, text: &str) -> Value {
        let connection = BY_TOKEN.replace("alice", &format!("alice:{}", PASSWORD.replace('$', "%24")));
        let (status, _, answer) = self.send(&connection, &[], &json!({ "query": text })).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer["rows"][0].as_object().and_then(|row| row.values().next().cloned()).unwrap_or_default()
    }
}

/// `alice` may be taken by tokens of the issuer.
fn trust(world: &World, issuer: &Issuer) {
    world.endpoint("ep-a").token_issuers.lock().insert("alice".to_owned(), vec![issuer.wanted()]);
}

#[tokio::test]
async fn sql_sees_the_claims_and_no_other_client_does() {
    let world = World::start(&["--pool-size", "1", "--http-auth-cache", "0s"]).await;
    let signer = Signer::new("a", Algorithm::ES256);
    let issuer = Issuer::start(&[&signer]).await;
    trust(&world, &issuer);
    let http = Http::new(&world);
    let (ann, bob) = (signer.token("ann's \"'\\ \u{e4}"), signer.token("bob"));
    assert_eq!(http.value(&ann, &format!("select {SUBJECT}")).await, "ann's \"'\\ \u{e4}");
    assert_eq!(http.value(&ann, "select current_user::text").await, "alice");
    assert_eq!(http.by_password(&format!("select {SUBJECT}")).await, Value::Null, "of one server connection");
    assert_eq!(http.value(&bob, &format!("select {SUBJECT}")).await, "bob");

    // A batch, and what comes after an error.
    let batch =
        json!({"queries": [{"query": format!("select {SUBJECT} s")}, {"query": "select $1::int n", "params": [5]}]});
    let (_, answer) = http.ask(&bob, batch).await;
    assert_eq!(
        (&answer["results"][0]["rows"], &answer["results"][1]["rows"]),
        (&json!([{"s": "bob"}]), &json!([{"n": 5}]))
    );
    assert_eq!(answer["results"].as_array().map(Vec::len), Some(2));
    let (_, error) = http.ask(&bob, json!({"query": "select 1/0"})).await;
    assert_eq!(error["code"], "22012");
    assert_eq!(http.by_password(&format!("select {SUBJECT}")).await, Value::Null);
    let (_, error) = http.ask(&bob, json!({"queries": [{"query": "select 1"}, {"query": "select 1/0"}]})).await;
    assert_eq!(error["code"], "22012");
    for ending in ["begin", "commit", "rollback"] {
        http.ask(&bob, json!({ "query": ending })).await;
        assert_eq!(http.by_password(&format!("select {SUBJECT}")).await, Value::Null, "after {ending}");
    }

    // They are the transaction's: who ends that has none.
    let batch = json!({"queries": [{"query": "commit"}, {"query": format!("select {SUBJECT} s")}]});
    let (_, answer) = http.ask(&bob, batch).await;
    assert_eq!(answer["results"][1]["rows"], json!([{"s": null}]));

    // Row-level security, through the one connection, in no order.
    for text in [
        "create table jwt_notes (owner text, note text)",
        "insert into jwt_notes values ('ann', 'a1'), ('ann', 'a2'), ('bob', 'b1')",
        "alter table jwt_notes enable row level security",
        "alter table jwt_notes force row level security",
        "create policy own on jwt_notes using (owner = nullif(current_setting('request.jwt.claims', true), '')::json->>'sub')",
    ] {
        http.by_password(text).await;
    }
    let counts = join_all((0..60).map(|number| {
        let (http, signer) = (&http, &signer);
        async move {
            let (subject, wanted) = [("ann", 2), ("bob", 1), ("eve", 0)][number % 3];
            let count = http.value(&signer.token(subject), "select count(*)::int from jwt_notes").await;
            let unseen =
                if number % 5 == 0 { http.by_password("select count(*)::int from jwt_notes").await } else { json!(0) };
            (count, unseen) == (json!(wanted), json!(0))
        }
    }));
    assert!(counts.await.into_iter().all(|good| good));
    let inserted = http.ask(&bob, json!({"query": "insert into jwt_notes values ('ann', 'forged')"})).await;
    assert_eq!(inserted.1["code"], "42501");
}

#[tokio::test]
async fn bad_tokens_look_like_wrong_passwords_and_wake_nothing() {
    let world = World::start(&["--http-auth-cache", "0s", "--jwks-min-interval", "0s"]).await;
    let (signer, stranger) = (Signer::new("a", Algorithm::RS256), Signer::new("a", Algorithm::RS256));
    let issuer = Issuer::start(&[&signer]).await;
    trust(&world, &issuer);
    let http = Http::new(&world);
    let good = signer.token("ann");
    let mut answers = Vec::new();
    for (connection, token) in [
        (BY_TOKEN, stranger.token("ann")),
        (BY_TOKEN, signer.sign_as(Some("b"), &json!({}))),
        (BY_TOKEN, signer.sign(&json!({"sub": "ann", "iss": "issuer", "exp": get_current_timestamp() + 60}))),
        (BY_TOKEN, "nonsense".to_owned()),
        // A good token, but for a role that it may not take, none, and an endpoint that is none.
        (&*BY_TOKEN.replace("alice", "carol"), good.clone()),
        (&*BY_TOKEN.replace("alice", "nobody"), good.clone()),
        (&*BY_TOKEN.replace("ep-a", "ep-none"), good.clone()),
        (&*BY_TOKEN.replace("ep-a", "ep-b"), good.clone()),
    ] {
        let headers = [("Authorization", &*format!("Bearer {token}"))];
        let (status, _, error) = http.send(connection, &headers, &json!({"query": "select 1"})).await;
        assert_eq!((status, &error["code"]), (StatusCode::BAD_REQUEST, &json!("28P01")), "{connection} {token}");
        let role = connection.split(['/', '@']).nth(2).expect("a role");
        answers.push(error.to_string().replace(role, "?"));
    }
    let (_, _, wrong_password) =
        http.send(&BY_TOKEN.replace("alice", "alice:x"), &[], &json!({"query": "select 1"})).await;
    let wrong_password = wrong_password.to_string().replace("alice", "?");
    assert!(answers.iter().all(|answer| *answer == wrong_password), "{answers:#?}");
    for authorization in ["Basic YTpi", "Bearer", "x"] {
        let headers = [("Authorization", authorization)];
        let (_, _, error) = http.send(BY_TOKEN, &headers, &json!({"query": "select 1"})).await;
        assert_eq!(error["code"], "08P01", "{authorization}");
    }
    assert_eq!(world.wakes(), 0);

    // A good password does not make up for a bad token.
    let connection = BY_TOKEN.replace("alice", &format!("alice:{}", PASSWORD.replace('$', "%24")));
    let headers = [("Authorization", &*format!("Bearer {}", stranger.token("ann")))];
    assert_eq!(http.send(&connection, &headers, &json!({"query": "select 1"})).await.2["code"], "28P01");

    // One that has expired is told so, and does not count: also many of them leave the door open.
    let old = signer.sign(&json!({"sub": "ann", "aud": "shop", "iss": "issuer", "exp": get_current_timestamp() - 60}));
    for _ in 0..40 {
        let (_, error) = http.ask(&old, json!({"query": "select 1"})).await;
        assert!(error["message"].as_str().expect("a message").contains("has expired"), "{error}");
    }
    assert_eq!(world.wakes(), 0);
    assert_eq!(http.value(&good, "select 1").await, 1);
    for _ in 0..40 {
        http.ask(&stranger.token("ann"), json!({"query": "select 1"})).await;
    }
    assert_eq!(http.code(&good).await, "28000", "many forged ones close it");
}

#[tokio::test]
async fn keys_are_fetched_once_and_again_for_an_unknown_key() {
    let arguments = ["--http-auth-cache", "0s", "--jwks-min-interval", "1s", "--jwks-max-age", "3s"];
    let world = World::start(&arguments).await;
    let (old, new) = (Signer::new("old", Algorithm::EdDSA), Signer::new("new", Algorithm::EdDSA));
    let issuer = Issuer::start(&[&old]).await;
    trust(&world, &issuer);
    let http = Http::new(&world);
    let tokens: Vec<_> = (0..50).map(|number| old.token(&number.to_string())).collect();
    let answers = join_all(tokens.iter().map(|token| http.value(token, "select 1"))).await;
    assert!(answers.iter().all(|answer| *answer == 1));
    assert_eq!(issuer.fetches(), 1, "one fetch for all");

    // Rotated: a token with an unknown key has the set fetched anew, but not within a second of the last time.
    issuer.publish(vec![old.public(), new.public()]);
    assert_eq!(http.code(&new.token("ann")).await, "28P01");
    assert_eq!(issuer.fetches(), 1);
    sleep(Duration::from_millis(1100)).await;
    assert_eq!(http.value(&new.token("ann"), "select 1").await, 1);
    assert_eq!(issuer.fetches(), 2);
    let strangers = join_all((0..10).map(|number| {
        let (http, token) = (&http, Signer::new(&number.to_string(), Algorithm::EdDSA).token("ann"));
        async move { http.code(&token).await }
    }));
    assert!(strangers.await.into_iter().all(|code| code == "28P01"));
    assert_eq!(issuer.fetches(), 2, "unknown keys do not make the proxy ask all the time");

    // Revoked: gone when the set is too old. While the issuer is down an old set is used.
    issuer.publish(vec![new.public()]);
    assert_eq!(http.value(&old.token("ann"), "select 1").await, 1);
    sleep(Duration::from_millis(3100)).await;
    assert_eq!(http.code(&old.token("ann")).await, "28P01");
    issuer.fail();
    sleep(Duration::from_millis(3100)).await;
    assert_eq!(http.value(&new.token("ann"), "select 1").await, 1);
}

#[tokio::test]
async fn an_issuer_without_keys_is_told_apart_from_a_bad_token() {
    let world = World::start(&["--http-auth-cache", "0s", "--jwks-min-interval", "0s"]).await;
    let signer = Signer::new("a", Algorithm::EdDSA);
    let issuer = Issuer::start(&[&signer]).await;
    let http = Http::new(&world);
    let token = signer.token("ann");
    for path in ["/none", "/moved"] {
        world.endpoint("ep-a").token_issuers.lock().insert("alice".to_owned(), vec![issuer.wanted_at(path)]);
        assert_eq!(http.code(&token).await, "57P03", "{path}");
    }
    issuer.publish(vec![json!({"pad": "x".repeat(200_000)}), signer.public()]);
    trust(&world, &issuer);
    assert_eq!(http.code(&token).await, "57P03", "too large");
    issuer.publish(vec![signer.public()]);
    assert_eq!(http.value(&token, "select 1").await, 1);

    // Of several issuers any will do, also when one is down; and one that is added counts at once.
    let down = Issuer::start(&[]).await;
    down.fail();
    let both = vec![down.wanted(), issuer.wanted()];
    world.endpoint("ep-a").token_issuers.lock().insert("carol".to_owned(), both);
    let headers = [("Authorization", &*format!("Bearer {token}"))];
    let connection = BY_TOKEN.replace("alice", "carol");
    let (status, _, answer) = http.send(&connection, &headers, &json!({"query": "select 1"})).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
}

#[tokio::test]
async fn a_kept_answer_is_for_the_same_claims_only() {
    let world = World::start(&[]).await;
    let signer = Signer::new("a", Algorithm::EdDSA);
    let issuer = Issuer::start(&[&signer]).await;
    trust(&world, &issuer);
    let http = Http::new(&world);
    let body = json!({"query": format!("select {SUBJECT} s, now()::text t")});
    let ask = async |token: &str| {
        let headers = [("Authorization", &*format!("Bearer {token}")), ("Dormouse-Cache", "max-age=60")];
        let (_, outcome, answer) = http.send(BY_TOKEN, &headers, &body).await;
        (outcome, answer["rows"][0].clone())
    };
    let (ann, bob) = (signer.token("ann"), signer.token("bob"));
    let (outcome, first) = ask(&ann).await;
    assert_eq!((outcome.as_str(), &first["s"]), ("miss", &json!("ann")));
    assert_eq!(ask(&ann).await, ("hit".to_owned(), first.clone()));
    let (outcome, second) = ask(&bob).await;
    assert_eq!((outcome.as_str(), &second["s"]), ("miss", &json!("bob")));
    let connection = BY_TOKEN.replace("alice", &format!("alice:{}", PASSWORD.replace('$', "%24")));
    let (_, outcome, third) = http.send(&connection, &[("Dormouse-Cache", "max-age=60")], &body).await;
    assert_eq!((outcome.as_str(), &third["rows"][0]["s"]), ("miss", &Value::Null));
    assert_eq!(ask(&ann).await, ("hit".to_owned(), first));

    // Not kept, but with the claims all the same.
    let body = json!({"query": format!("select {SUBJECT} s, random()::text t")});
    let headers = [("Authorization", &*format!("Bearer {ann}")), ("Dormouse-Cache", "max-age=60")];
    let (_, outcome, answer) = http.send(BY_TOKEN, &headers, &body).await;
    assert_eq!((outcome.as_str(), &answer["rows"][0]["s"]), ("bypass", &json!("ann")));
}

/// A session in a WebSocket, opened with a token.
async fn in_websocket(world: &World, host: &str, token: &str) -> Result<tokio_postgres::Client, String> {
    world.in_websocket(host, Some(token), "does not matter").await
}

#[tokio::test]
async fn a_session_in_a_websocket_has_the_claims_too() {
    let world = World::start(&["--allow-cleartext", "--pool-size", "1"]).await;
    let signer = Signer::new("a", Algorithm::EdDSA);
    let issuer = Issuer::start(&[&signer]).await;
    trust(&world, &issuer);
    let question = format!("select {SUBJECT}");
    let subject = async |client: &tokio_postgres::Client| {
        let row = client.query_one(&question, &[]).await.expect("an answer");
        row.get::<_, Option<String>>(0).unwrap_or_default()
    };
    let ann = in_websocket(&world, "ep-a.localhost", &signer.token("ann")).await.expect("a session");
    assert_eq!(subject(&ann).await, "ann");
    ann.batch_execute("reset all").await.expect("done");
    ann.batch_execute("discard all").await.expect("done");
    assert_eq!(subject(&ann).await, "ann", "a session's own");

    // Pooled: all through one server connection.
    let ann = in_websocket(&world, "ep-a-pooler.localhost", &signer.token("ann")).await.expect("a session");
    let bob = in_websocket(&world, "ep-a-pooler.localhost", &signer.token("bob")).await.expect("a session");
    let nobody = world.connect("endpoint=ep-a-pooler").await.expect("a session");
    for _ in 0..5 {
        assert_eq!((subject(&ann).await.as_str(), subject(&nobody).await.as_str()), ("ann", ""));
        assert_eq!((subject(&bob).await.as_str(), subject(&ann).await.as_str()), ("bob", "ann"));
    }
    let stranger = Signer::new("a", Algorithm::EdDSA);
    let refused = in_websocket(&world, "ep-a.localhost", &stranger.token("ann")).await.map(|_| ());
    assert!(refused.is_err_and(|error| error.contains("password authentication failed")));
}
