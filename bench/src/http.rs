//! One query by HTTP, by a fresh connection with TLS and SCRAM, and by a held one, in turn; then as many requests as there is
//! time for, with answers from Postgres and with kept ones.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use bytes::Bytes;
use e2e::{Cluster, ClusterOptions, Project, http::HttpSql, processes};
use futures::future::try_join_all;
use http_body_util::{BodyExt, Full};
use hyper::{
    Request,
    client::conn::http1::{SendRequest, handshake},
    header::HeaderValue,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpStream, task::JoinHandle, time::sleep};
use tokio_postgres::{Client, Config, types::Type};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

use crate::{Samples, peer::median};

/// One-shot queries of each kind in each round.
const QUERIES: usize = 300;

/// Requests in flight when they are counted.
const IN_FLIGHT: usize = 32;

const TEXT: &str = "select abalance from accounts where aid = $1";

/// Of a kind, one after the other.
const QUERIES_IN_A_ROW: usize = 20;

/// After fresh connections: the proxy, too, is done with them.
const PAUSE: Duration = Duration::from_millis(5);

/// Rows of the table.
const ROWS: usize = 10_000;

/// Runs `rounds` rounds; counts requests for `seconds` in each.
pub async fn run(rounds: usize, seconds: u32) -> anyhow::Result<()> {
    println!(
        "http: one query over HTTPS, over a fresh connection (TCP, TLS, SCRAM), over a held one; all to the pooled host"
    );
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let project = prepared_project(&cluster).await?;
    let http = Arc::new(HttpSql::new(&cluster, &project)?);
    let mut config: Config = project.uri.parse()?;
    config.options(format!("endpoint={}-pooler", project.endpoint));
    let held = Arc::new(connect(&config).await?.0);
    let [mut fresh_ratios, mut held_ratios, mut http_rates, mut cached_rates] = [const { Vec::new() }; 4];
    for round in 0..=rounds {
        let kept = Kept::connect(cluster.http_port(), &project.uri).await?;
        // In a task of its own: this one's thread runs no others, so that whatever it waits for would have to wake it.
        let timing = tokio::spawn(single(kept, config.clone(), held.clone()));
        let [by_http, by_fresh, by_held] = timing.await??;
        let requests = rate(&cluster, &http, &[], seconds).await?;
        let cached = rate(&cluster, &http, &[("Dormouse-Cache", "max-age=3600")], seconds).await?;
        // The first round only warms up.
        if round > 0 {
            println!(
                "round {round}: http {by_http:.0} us, fresh {by_fresh:.0} us, held {by_held:.0} us; {requests}; kept: {cached}"
            );
            fresh_ratios.push(by_http / by_fresh);
            held_ratios.push(by_http / by_held);
            http_rates.push(requests.per_core);
            cached_rates.push(cached.per_core);
        }
    }
    cluster.down().await?;
    println!(
        "http_vs_fresh={:.2} http_vs_held={:.2} http_rps={:.0} cached_rps={:.0}",
        median(fresh_ratios),
        median(held_ratios),
        median(http_rates),
        median(cached_rates)
    );
    Ok(())
}

async fn prepared_project(cluster: &Cluster) -> anyhow::Result<Project> {
    let api = cluster.api()?;
    let project = api.create_project("bench").await?;
    let path = format!("/projects/{}/endpoints/{}", project.id, project.endpoint);
    api.ok("PATCH".parse()?, &path, Some(json!({"endpoint": {"suspend_timeout_seconds": 604_800}}))).await?;
    let http = HttpSql::new(cluster, &project)?;
    http.rows("create table accounts (aid int primary key, abalance int)", json!([])).await?;
    http.rows("insert into accounts select n, n from generate_series(1, $1::int) n", json!([ROWS])).await?;
    http.rows("analyze accounts", json!([])).await?;
    Ok(project)
}

/// A connection, and the task that ends with it.
async fn connect(config: &Config) -> anyhow::Result<(Client, JoinHandle<()>)> {
    let (client, connection) = config.connect(e2e::sql::tls()?).await?;
    // Its errors are its client's.
    Ok((client, tokio::spawn(async move { drop(connection.await) })))
}

/// One kept connection for requests, with no more around it than `tokio_postgres` has: what a larger HTTP client does for each
/// request says nothing of the proxy.
struct Kept {
    requests: SendRequest<Full<Bytes>>,
    connection_string: HeaderValue,
}

impl Kept {
    async fn connect(port: u16, uri: &str) -> anyhow::Result<Kept> {
        let tcp = TcpStream::connect(("127.0.0.1", port)).await?;
        tcp.set_nodelay(true)?;
        let tls = TlsConnector::from(Arc::new(e2e::sql::tls_config()?));
        let stream = tls.connect(ServerName::try_from("localhost")?, tcp).await?;
        let (requests, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Kept { requests, connection_string: uri.parse()? })
    }

    async fn rows(&mut self, text: &str, params: Value) -> anyhow::Result<Value> {
        let body = json!({"query": text, "params": params}).to_string();
        let request = Request::post("/sql")
            .header("Host", "localhost")
            .header("Neon-Connection-String", self.connection_string.clone())
            .body(Full::from(body))?;
        let response = self.requests.send_request(request).await?;
        let status = response.status();
        let mut answer: Value = serde_json::from_slice(&response.into_body().collect().await?.to_bytes())?;
        ensure!(status.is_success(), "{text}: {status} {answer}");
        Ok(answer["rows"].take())
    }
}

/// Medians in microseconds: by HTTP, by a fresh connection, by the held one. In turn, several of a kind after each other: what
/// the end of a fresh connection costs is not to be paid by the next request of another kind.
async fn single(mut kept: Kept, config: Config, held: Arc<Client>) -> anyhow::Result<[f64; 3]> {
    let mut samples = [const { Samples(Vec::new()) }; 3];
    for aids in (1..=QUERIES as i32).collect::<Vec<_>>().chunks(QUERIES_IN_A_ROW) {
        for aid in aids {
            let begun = Instant::now();
            ensure!(balance(&kept.rows(TEXT, json!([aid])).await?) == Some(i64::from(*aid)), "a wrong row");
            samples[0].0.push(begun.elapsed());
        }
        for aid in aids {
            let begun = Instant::now();
            held.query_typed(TEXT, &[(aid, Type::INT4)]).await?;
            samples[2].0.push(begun.elapsed());
        }
        for aid in aids {
            let begun = Instant::now();
            let (fresh, ending) = connect(&config).await?;
            fresh.query_typed(TEXT, &[(aid, Type::INT4)]).await?;
            samples[1].0.push(begun.elapsed());
            drop(fresh);
            ending.await?;
        }
        sleep(PAUSE).await;
    }
    Ok(samples.map(|mut samples| {
        samples.0.sort();
        samples.percentile_ms(50) * 1000.0
    }))
}

fn balance(rows: &Value) -> Option<i64> {
    rows[0]["abalance"].as_i64()
}

/// How many requests were answered.
struct Rate {
    /// In a second of time.
    per_second: f64,
    /// In a second of the proxy's processor time.
    per_core: f64,
}

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.0} requests/s, {:.0} per core of the proxy", self.per_second, self.per_core)
    }
}

async fn rate(cluster: &Cluster, http: &HttpSql, headers: &[(&str, &str)], seconds: u32) -> anyhow::Result<Rate> {
    let found = processes::children_with(cluster.up_pid()?, "dormouse proxy");
    let proxy = found.first().context("no process of the proxy")?.pid;
    let (begun, before) = (Instant::now(), processor_seconds(proxy)?);
    let until = begun + Duration::from_secs(u64::from(seconds));
    let ask = |_| async move {
        let mut answered = 0_usize;
        while Instant::now() < until {
            let body = json!({"query": TEXT, "params": [1 + answered % 100]});
            let answer = http.send(headers, &body).await?;
            ensure!(answer.status.is_success(), "{}", answer.body);
            answered += 1;
        }
        anyhow::Ok(answered)
    };
    let answered: usize = try_join_all((0..IN_FLIGHT).map(ask)).await?.into_iter().sum();
    let answered = answered as f64;
    let per_second = answered / begun.elapsed().as_secs_f64();
    Ok(Rate { per_second, per_core: answered / (processor_seconds(proxy)? - before) })
}

/// Processor time that a process has used.
fn processor_seconds(pid: i32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold anything; then come the state and more numbers.
    let after_name = stat.rsplit(") ").next().context("a name")?;
    let ticks = |index: usize| -> anyhow::Result<f64> {
        Ok(after_name.split(' ').nth(index).context("a number")?.parse::<u64>()? as f64)
    };
    let ticks_per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("ticks")? as f64;
    Ok((ticks(11)? + ticks(12)?) / ticks_per_second)
}
