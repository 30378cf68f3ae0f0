//! The published serverless driver against a whole installation, over HTTP and over WebSocket; a crowd of functions that
//! wakes a sleeping database.

use std::{
    future::ready,
    time::{Duration, Instant},
};

use anyhow::ensure;
use e2e::{Cluster, ClusterOptions, http::HttpSql, node, sql};
use futures::future::try_join_all;
use jsonwebtoken::{Algorithm, EncodingKey, Header, get_current_timestamp, jwk::Jwk};
use serde_json::json;

/// What `tests/clients/serverless.mjs` does.
const WORKS: usize = 19;

/// What `tests/clients/jwt.mjs` does.
const TOKEN_WORKS: usize = 5;

/// Functions that begin at the same time.
const CROWD: usize = 2000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_published_driver_works_unmodified() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    driver(&cluster).await.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn driver(cluster: &Cluster) -> anyhow::Result<()> {
    let project = cluster.api()?.create_project("driver").await?;
    let mut command = node::program("node")?;
    command.arg(e2e::repository().join("tests/clients/serverless.mjs"));
    node::about(&mut command, cluster, &project);
    let outcomes = node::outcomes(command).await?;
    ensure!(outcomes.len() == WORKS, "{outcomes:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_published_driver_logs_in_with_tokens() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    tokens(&cluster).await.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn tokens(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("tokens").await?;
    let schema = "create role authenticated login;
        create table notes (owner text, note text);
        insert into notes values ('ann', 'a1'), ('ann', 'a2'), ('bob', 'b1');
        create schema auth;
        grant usage on schema auth to authenticated;
        create function auth.user_id() returns text language sql stable as
          $$select nullif(current_setting('request.jwt.claims', true), '')::json->>'sub'$$;
        alter table notes enable row level security;
        create policy own on notes using (owner = auth.user_id());
        grant select, insert on notes to authenticated";
    sql::psql(&project.uri, schema).await?;
    // It is there already, so that it stays as it is: one that the API makes passes over policies.
    let role = json!({"role": {"name": "authenticated"}});
    let roles = format!("/projects/{}/branches/{}/roles", project.id, project.branch);
    api.ok("POST".parse()?, &roles, Some(role)).await?;

    let (signer, stranger) = (signer()?, signer()?);
    let jwk = Jwk::from_encoding_key(&signer, Algorithm::ES256)?;
    let keys = json!({ "keys": [jwk] }).to_string();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/jwks.json", listener.local_addr()?);
    let router = axum::Router::new().route("/jwks.json", axum::routing::get(move || ready(keys.clone())));
    tokio::spawn(async move { axum::serve(listener, router).await });
    let issuer = json!({"jwks_url": url, "jwt_audience": "shop", "role_names": ["authenticated"]});
    api.ok("POST".parse()?, &format!("/projects/{}/jwks", project.id), Some(issuer)).await?;

    let token = |key: &EncodingKey, subject: &str, lifetime: i64| {
        let expires = get_current_timestamp().saturating_add_signed(lifetime);
        jsonwebtoken::encode(
            &Header::new(Algorithm::ES256),
            &json!({"sub": subject, "aud": "shop", "exp": expires}),
            key,
        )
    };
    let mut url = url::Url::parse(&project.uri)?;
    url.set_username("authenticated").and_then(|()| url.set_password(None)).expect("a URL with a host");
    let mut command = node::program("node")?;
    command.arg(e2e::repository().join("tests/clients/jwt.mjs"));
    node::about(&mut command, cluster, &project);
    command.env("DATABASE_URL", url.as_str());
    command.env("ANN", token(&signer, "ann", 600)?).env("BOB", token(&signer, "bob", 600)?);
    command.env("EXPIRED", token(&signer, "ann", -600)?).env("FORGED", token(&stranger, "ann", 600)?);
    let outcomes = node::outcomes(command).await?;
    ensure!(outcomes.len() == TOKEN_WORKS, "{outcomes:?}");
    Ok(())
}

fn signer() -> anyhow::Result<EncodingKey> {
    let pem = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?.serialize_pem();
    Ok(EncodingKey::from_ec_pem(pem.as_bytes())?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_of_functions_wakes_a_sleeping_database_once() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    crowd(&cluster).await.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn crowd(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("crowd").await?;
    let http = HttpSql::one_shot(cluster, &project)?;
    http.rows("create table visits (n int)", json!([])).await?;
    let before =
        http.rows("select pg_postmaster_start_time()::text t, current_setting('max_connections') m", json!([])).await?;
    ensure!(before[0]["m"] == "100", "{before}");
    api.suspend(&project.id, &project.endpoint).await?;

    // A failed login wakes nothing, whoever sends it.
    let mut stranger = project.clone();
    stranger.uri = stranger.uri.replace(":", "x:").replacen("postgresqlx:", "postgresql:", 1);
    let refused = HttpSql::one_shot(cluster, &stranger)?.send(&[], &json!({"query": "select 1"})).await?;
    ensure!(refused.body["code"] == "28P01", "{}", refused.body);
    ensure!(api.state(&project.id, &project.endpoint).await? == "idle", "a failed login woke it");

    let invoke = |number: usize| {
        let http = &http;
        async move {
            let begun = Instant::now();
            let text = "insert into visits values ($1) returning pg_postmaster_start_time()::text t";
            let rows = http.rows(text, json!([number])).await?;
            anyhow::Ok((begun.elapsed(), rows[0]["t"].clone()))
        }
    };
    let answers = try_join_all((0..CROWD).map(invoke)).await?;
    ensure!(answers.iter().all(|(_, start)| *start == answers[0].1), "one wake for all");
    ensure!(answers[0].1 != before[0]["t"], "it had slept");
    let counted = http.rows("select count(distinct n)::int n from visits", json!([])).await?;
    ensure!(counted[0]["n"] == CROWD, "{counted}");
    let mut times: Vec<Duration> = answers.into_iter().map(|(took, _)| took).collect();
    times.sort();
    let percentile = |percent: usize| times[(times.len() * percent).div_ceil(100) - 1].as_millis();
    println!("crowd={CROWD} burst_p50_ms={} burst_p99_ms={}", percentile(50), percentile(99));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_answer_wakes_nothing_and_is_invalidated_through_the_api() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    kept_answers(&cluster).await.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn kept_answers(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("kept").await?;
    let endpoint = format!("/projects/{}/endpoints/{}", project.id, project.endpoint);
    let http = HttpSql::new(cluster, &project)?;
    http.rows("create table prices (cents int)", json!([])).await?;
    http.rows("insert into prices values (250)", json!([])).await?;
    let settings = json!({"endpoint": {"settings": {"query_cache": {"max_age": 600}}}});
    api.ok("PATCH".parse()?, &endpoint, Some(settings)).await?;
    // Proxies hear of it within a second.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let ask = async |wish: &str| {
        let answer = http.send(&[("Dormouse-Cache", wish)], &json!({"query": "select cents from prices"})).await?;
        let outcome = answer.headers.get("dormouse-cache").and_then(|value| value.to_str().ok()).unwrap_or_default();
        anyhow::Ok((outcome.to_owned(), answer.body["rows"][0]["cents"].as_i64()))
    };
    let kept = |outcome: &str, cents: i64| (outcome.to_owned(), Some(cents));
    ensure!(ask("tag=prices").await? == kept("miss", 250));
    http.send(&[("Dormouse-Cache", "no-store")], &json!({"query": "update prices set cents = 260"})).await?;
    api.suspend(&project.id, &project.endpoint).await?;
    ensure!(ask("tag=prices").await? == kept("hit", 250));
    ensure!(api.state(&project.id, &project.endpoint).await? == "idle", "a kept answer woke it");

    let invalidate = format!("{endpoint}/query_cache/invalidate");
    for (body, wish) in [(Some(json!({"tags": ["prices"]})), "tag=prices"), (None, "tag=prices")] {
        api.ok("POST".parse()?, &invalidate, body).await?;
        tokio::time::sleep(Duration::from_millis(1100)).await;
        ensure!(ask(wish).await? == kept("miss", 260));
        ensure!(ask(wish).await? == kept("hit", 260));
    }

    // What was kept is not given for the state of another time.
    let lsn = http.rows("select pg_current_wal_flush_lsn()::text l", json!([])).await?[0]["l"].clone();
    let update = json!({"query": "update prices set cents = 270"});
    http.send(&[("Dormouse-Cache", "no-store")], &update).await?;
    api.ok("POST".parse()?, &invalidate, None).await?;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    ensure!(ask("tag=prices").await? == kept("miss", 270));
    let body = json!({"source_branch_id": project.branch, "source_lsn": lsn, "preserve_under_name": "before"});
    let restore = format!("/projects/{}/branches/{}/restore", project.id, project.branch);
    api.ok("POST".parse()?, &restore, Some(body)).await?;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    ensure!(ask("tag=prices").await? == kept("miss", 260), "the state of then");
    Ok(())
}
