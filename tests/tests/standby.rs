//! Postgres's own replication of a branch's WAL, through the front door: a stock standby and `pg_receivewal` follow a branch while its compute
//! sleeps, is waked by them, and crashes.

use std::time::Duration;

use anyhow::{Context, ensure};
use e2e::{
    Cluster, ClusterOptions, Project,
    archive::{self, client},
    sql,
    stock::{StockServer, run},
};

const A_WHILE: Duration = Duration::from_secs(60);
const ROWS: &str = "select format('%s %s', count(*), sum(i)) from followed";
const STARTED: &str = "select pg_postmaster_start_time()::text";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_and_an_archive_follow_over_sleeps_and_crashes() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = follow(&cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn follow(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("primary").await?;
    api.wait_state(&project.id, &project.endpoint, "active", A_WHILE).await?;
    sql::psql(&project.uri, "create table followed (i bigint); insert into followed values (1)").await?;
    let (_home, archive) = archive::directory()?;
    run(client("pg_receivewal")?.args(["-d", &project.uri, "-S", "archive", "--create-slot", "--if-not-exists"]))?;
    let mut receiver = archive::receive(&project.uri, &archive, Some("archive"))?;
    let mut standby = StockServer::on(|data| {
        let backup = ["-d", &project.uri, "-R", "-C", "-S", "standby", "-X", "stream", "-c", "fast", "-D"];
        run(client("pg_basebackup")?.args(backup).arg(data))?;
        let auto = data.join("postgresql.auto.conf");
        let mut conf = std::fs::read_to_string(&auto)?;
        conf.push_str("wal_retrieve_retry_interval = '200ms'\n");
        Ok(std::fs::write(&auto, conf)?)
    })?;
    let begin = sql::ask(&project.uri, "select pg_current_wal_lsn()::text").await?;
    standby.start().await?;
    let followed = rounds(cluster, &project, &mut standby).await;
    followed.with_context(|| format!("the standby says:\n{}", standby.log()))?;

    sql::psql(&project.uri, "insert into followed values (0)").await?;
    let end = sql::ask(&project.uri, "select pg_current_wal_flush_lsn()::text").await?;
    archive::wait_for(&archive, &begin, &end, A_WHILE).await?;
    ensure!(receiver.try_wait()?.is_none(), "pg_receivewal has ended");
    archive::stop(receiver)?;
    standby.stop()
}

async fn rounds(cluster: &Cluster, project: &Project, standby: &mut StockServer) -> anyhow::Result<()> {
    for round in 2..7i64 {
        let insert = format!("insert into followed select {round} * 1000 + g from generate_series(1, 500) g");
        sql::psql(&project.uri, &insert).await?;
        let started = sql::ask(&project.uri, STARTED).await?;
        if round % 2 == 0 {
            let suspend = format!("/projects/{}/endpoints/{}/suspend", project.id, project.endpoint);
            cluster.api()?.ok(reqwest::Method::POST, &suspend, None).await?;
        } else {
            cluster.kill_compute(&project.endpoint)?;
        }
        same_rows(&project.uri, standby).await?;
        ensure!(sql::ask(&project.uri, STARTED).await? != started, "the compute did not start anew");
        // It reads its own WAL again, which it was sent again from a segment's start.
        match round {
            4 => standby.stop()?,
            5 => standby.kill()?,
            _ => continue,
        }
        sql::psql(&project.uri, &format!("insert into followed values ({round})")).await?;
        standby.start().await?;
        same_rows(&project.uri, standby).await?;
    }
    Ok(())
}

async fn same_rows(uri: &str, standby: &StockServer) -> anyhow::Result<()> {
    let database = sql::ask(uri, "select current_database()").await.unwrap_or_else(|_| "dormouse".to_owned());
    sql::same_answers(uri, &standby.connect(&database).await?, ROWS, A_WHILE).await
}
