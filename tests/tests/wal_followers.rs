//! Postgres's own replication straight from the safekeepers: a stock standby and `pg_receivewal` follow a branch that sleeps although
//! they are connected, that crashes, and whose safekeepers go one after the other.

use std::{path::Path, time::Duration};

use anyhow::{Context, ensure};
use e2e::{
    Api, Cluster, ClusterOptions, Project,
    api::text,
    archive::{self, client},
    processes, sql,
    stock::{StockServer, run},
};
use reqwest::Method;
use serde_json::json;

const A_WHILE: Duration = Duration::from_secs(60);
/// The branch falls asleep after so long.
const SUSPEND_SECONDS: u64 = 3;
const ROWS: &str = "select format('%s %s', count(*), sum(i)) from followed";
const STARTED: &str = "select pg_postmaster_start_time()::text";
const RECEIVER: &str = "select coalesce(max(status || ' from ' || sender_port), 'nothing') from pg_stat_wal_receiver";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_and_an_archive_follow_from_the_safekeepers_and_wake_nobody() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = follow(&cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn follow(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("followed").await?;
    api.wait_state(&project.id, &project.endpoint, "active", A_WHILE).await?;
    sql::psql(&project.uri, "create table followed (i bigint); insert into followed values (1)").await?;
    let endpoint = format!("/projects/{}/endpoints/{}", project.id, project.endpoint);
    let body = json!({"endpoint": {"suspend_timeout_seconds": SUSPEND_SECONDS}});
    api.ok(Method::PATCH, &endpoint, Some(body)).await?;

    let conninfo = cluster.command_line(&["branches", "follow", &project.branch]).await?.trim().to_owned();
    others_are_closed(cluster, &api, &conninfo).await?;
    let (_home, archive) = archive::directory()?;
    let mut standby = StockServer::on(|data| make_standby(data, &project, &conninfo))?;
    let mut receiver = archive::receive(&conninfo, &archive, None)?;
    let begin = sql::ask(&project.uri, "select pg_current_wal_lsn()::text").await?;
    standby.start().await?;
    let followed = rounds(cluster, &api, &project, &mut standby).await;
    followed.with_context(|| format!("the standby says:\n{}", standby.log()))?;

    sql::psql(&project.uri, "insert into followed values (0)").await?;
    let end = sql::ask(&project.uri, "select pg_current_wal_flush_lsn()::text").await?;
    archive::wait_for(&archive, &begin, &end, A_WHILE).await?;
    ensure!(receiver.try_wait()?.is_none(), "pg_receivewal has ended");
    archive::stop(receiver)?;
    standby.stop()
}

/// From a base backup of the branch's compute, with a slot there that keeps WAL, to follow the safekeepers.
fn make_standby(data: &Path, project: &Project, conninfo: &str) -> anyhow::Result<()> {
    let backup = ["-d", &project.uri, "-C", "-S", "standby", "-X", "stream", "-c", "fast", "-D"];
    run(client("pg_basebackup")?.args(backup).arg(data))?;
    let conf = format!(
        "primary_conninfo = '{conninfo}'\nwal_retrieve_retry_interval = '200ms'\nwal_receiver_status_interval = '1s'\n"
    );
    std::fs::write(data.join("standby.signal"), "")?;
    Ok(std::fs::write(data.join("postgresql.auto.conf"), conf)?)
}

/// The token is for one branch, and for no slots.
async fn others_are_closed(cluster: &Cluster, api: &Api, conninfo: &str) -> anyhow::Result<()> {
    let other = api.create_project("other").await?;
    let path = format!("/projects/{}/branches/{}/wal_reader", other.id, other.branch);
    let others = text(&api.ok(Method::POST, &path, None).await?, "/conninfo")?;
    let password = |conninfo: &str| {
        conninfo.split(' ').find(|part| part.starts_with("password=")).map(str::to_owned).context("a password")
    };
    let crossed = others.replace(&password(&others)?, &password(conninfo)?);
    let ask = |conninfo: &str, command: &str| {
        let mut psql = client("psql")?;
        run(psql.args(["-X", "-A", "-t", "-c", command]).arg(format!("{conninfo} replication=true")))
    };
    // Nothing of a branch is on safekeepers before its first wake.
    ensure!(ask(&others, "IDENTIFY_SYSTEM").is_err());
    sql::ask(&other.uri, "select 1").await?;
    // A project's roles may not ask for it.
    let superuser = cluster.superuser(&other.endpoint, "postgres").await?;
    let system = sql::value(&superuser, "select system_identifier::text from pg_control_system()").await?;
    let identified = ask(&others, "IDENTIFY_SYSTEM")?;
    ensure!(identified.starts_with(&format!("{system}|1|")), "{identified}, the branch's is {system}");
    ensure!(ask(&crossed, "IDENTIFY_SYSTEM").is_err(), "a token opened another branch");
    ensure!(ask(conninfo, "CREATE_REPLICATION_SLOT s PHYSICAL").is_err());
    Ok(())
}

async fn rounds(cluster: &Cluster, api: &Api, project: &Project, standby: &mut StockServer) -> anyhow::Result<()> {
    for round in 2..7i64 {
        let insert = format!("insert into followed select {round} * 1000 + g from generate_series(1, 500) g");
        sql::psql(&project.uri, &insert).await?;
        same_rows(&project.uri, standby).await?;
        let started = sql::ask(&project.uri, STARTED).await?;
        if round % 2 == 0 {
            // By itself, though it is followed; and the standby's changes of safekeeper wake nobody.
            api.wait_state(&project.id, &project.endpoint, "idle", A_WHILE).await?;
            for service in ["safekeeper-1", "safekeeper-2"] {
                kill_hard(cluster, service)?;
                streams(standby).await?;
            }
            ensure!(api.state(&project.id, &project.endpoint).await? == "idle", "somebody woke it");
        } else {
            cluster.kill_compute(&project.endpoint)?;
            kill_hard(cluster, "safekeeper-3")?;
        }
        sql::psql(&project.uri, &format!("insert into followed values ({round})")).await?;
        same_rows(&project.uri, standby).await?;
        ensure!(sql::ask(&project.uri, STARTED).await? != started, "the compute did not start anew");
        match round {
            4 => standby.stop()?,
            5 => standby.kill()?,
            _ => continue,
        }
        sql::psql(&project.uri, &format!("insert into followed values ({round})")).await?;
        standby.start().await?;
        same_rows(&project.uri, standby).await?;
    }
    // The first of the hosts stays down: the standby goes on with the others.
    let up = cluster.up_pid()?;
    let down = tokio::spawn(async move {
        loop {
            processes::children_with(up, "safekeeper-1").iter().for_each(|found| drop(processes::kill_hard(found.pid)));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    standby.stop()?;
    standby.start().await?;
    sql::psql(&project.uri, "insert into followed values (7)").await?;
    let same = same_rows(&project.uri, standby).await;
    let receiver = sql::value(&standby.connect("postgres").await?, RECEIVER).await?;
    down.abort();
    same?;
    let first = format!("streaming from {}", cluster.safekeepers()[2].port() + 1);
    ensure!(receiver.starts_with("streaming") && receiver != first, "it {receiver}");
    Ok(())
}

/// Kills a safekeeper; it is started again.
fn kill_hard(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    let found = processes::children_with(cluster.up_pid()?, name);
    processes::kill_hard(found.first().with_context(|| format!("no process of {name}"))?.pid)
}

/// Waits until the standby is connected to a safekeeper.
async fn streams(standby: &StockServer) -> anyhow::Result<()> {
    let client = standby.connect("postgres").await?;
    let began = std::time::Instant::now();
    loop {
        let receiver = sql::value(&client, RECEIVER).await?;
        if receiver.starts_with("streaming") {
            return Ok(());
        }
        ensure!(began.elapsed() < A_WHILE, "the standby receives {receiver}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn same_rows(uri: &str, standby: &StockServer) -> anyhow::Result<()> {
    let config: tokio_postgres::Config = uri.parse()?;
    let database = config.get_dbname().context("a database")?;
    sql::same_answers(uri, &standby.connect(database).await?, ROWS, A_WHILE).await
}
