//! `make demo`: the whole life of a database, each step explained, timed and checked.

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use e2e::{Cluster, ClusterOptions, Project, api::Branch, processes, s3, sql};
use serde_json::json;

/// Shows, and checks, what Dormouse does: a database that sleeps in an object store.
#[derive(Parser)]
struct Arguments {
    /// Where the data lives: a local directory, or an S3-compatible server that the demo starts.
    #[arg(long, value_enum, default_value_t = Store::Local)]
    object_store: Store,
    /// pgbench's scale: 1 is 100,000 accounts.
    #[arg(long, default_value_t = 10)]
    scale: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Store {
    Local,
    S3,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut table = Table::default();
    let outcome = tokio::select! {
        outcome = demo(&arguments, &mut table) => outcome,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    table.print();
    match outcome {
        Ok(()) => {
            println!("\nAll checks passed.");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("\nFAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The steps that were done, with their times.
#[derive(Default)]
struct Table {
    rows: Vec<(String, Duration, String)>,
    started: Option<(String, Instant)>,
}

impl Table {
    fn step(&mut self, title: &str, explanation: &str) {
        println!("\n== {}. {title}", self.rows.len() + 1);
        println!("   {explanation}");
        self.started = Some((title.to_owned(), Instant::now()));
    }

    fn done(&mut self, seen: impl Into<String>) {
        let seen = seen.into();
        if let Some((title, start)) = self.started.take() {
            let took = start.elapsed();
            println!("   -> {seen}   [{}]", millis(took));
            self.rows.push((title, took, seen));
        }
    }

    fn print(&self) {
        println!("\n{:<52} {:>12}  seen", "step", "time");
        for (title, took, seen) in &self.rows {
            println!("{title:<52} {:>12}  {seen}", millis(*took));
        }
        if let Some((title, start)) = &self.started {
            println!("{title:<52} {:>12}  did not finish", millis(start.elapsed()));
        }
    }
}

fn millis(took: Duration) -> String {
    format!("{:.1} ms", took.as_secs_f64() * 1000.0)
}

async fn demo(arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
    let server = if arguments.object_store == Store::S3 { Some(s3::S3Server::start().await?) } else { None };
    let options = ClusterOptions {
        object_store: server.as_ref().map(|_| format!("s3://{}/demo", s3::BUCKET)),
        environment: server.as_ref().map(s3::S3Server::environment).unwrap_or_default(),
        arguments: Vec::new(),
        warm: true,
    };
    table.step(
        "dormouse up",
        "Starts control plane, proxy, three safekeepers and a pageserver, and makes the template once with initdb.",
    );
    let mut cluster = Cluster::start(options).await?;
    let place = server.as_ref().map_or("a local directory", |_| "an S3-compatible server");
    table.done(format!("API on {}, Postgres on port {}, data in {place}", cluster.api_url(), cluster.pg_port()));

    let outcome = tour(arguments, &cluster, table).await;
    if outcome.is_err() {
        println!("\n{}", cluster.log());
    }
    outcome?;
    table.step("Ctrl-C", "Stops everything cleanly; the demo's directories are removed.");
    cluster.down().await?;
    table.done("stopped, nothing left running");
    Ok(())
}

async fn tour(arguments: &Arguments, cluster: &Cluster, table: &mut Table) -> anyhow::Result<()> {
    let api = cluster.api()?;
    table.step(
        "create a project through the REST API",
        "A project is a branch of the template: no initdb, no copy. Its compute starts in the background.",
    );
    let project = api.create_project("demo").await?;
    table.done(format!("project {}, branch {}, endpoint {}", project.id, project.branch, project.endpoint));

    table.step(
        "first psql through the proxy",
        "The proxy checks the password, waits until the compute has made its role and database, and connects.",
    );
    let version = sql::psql(&project.uri, "select version()").await?;
    table.done(version.split(" on ").next().unwrap_or_default());

    load(arguments, &project, table).await?;
    let checksum = sleep_and_wake(cluster, &project, table).await?;
    branches(cluster, &project, table).await?;
    lose_the_pageserver(cluster, &project, &checksum, table).await?;
    kill_the_compute(cluster, &project, table).await
}

/// A number that changes when any row of pgbench's tables does.
const CHECKSUM: &str = "select md5(concat(
    (select concat(count(*), ':', sum(hashtextextended(a::text, 0)::numeric)) from pgbench_accounts a),
    (select concat(count(*), ':', sum(hashtextextended(b::text, 0)::numeric)) from pgbench_branches b),
    (select concat(count(*), ':', sum(hashtextextended(t::text, 0)::numeric)) from pgbench_tellers t),
    (select concat(count(*), ':', sum(hashtextextended(h::text, 0)::numeric)) from pgbench_history h)))";

async fn load(arguments: &Arguments, project: &Project, table: &mut Table) -> anyhow::Result<()> {
    table.step(
        &format!("pgbench -i at scale {}", arguments.scale),
        "Every commit below is on a majority of safekeepers before the client hears of it.",
    );
    sql::pgbench(&project.uri, &["-i", "-q", "-s", &arguments.scale.to_string()]).await?;
    table.done(format!("{} accounts", arguments.scale * 100_000));

    table.step("pgbench for 5 seconds", "4 clients, TPC-B, through the proxy over TLS.");
    let output = sql::pgbench(&project.uri, &["-c", "4", "-j", "2", "-T", "5", "-n"]).await?;
    let tps = output.lines().find(|line| line.starts_with("tps")).unwrap_or("no tps line");
    table.done(tps);
    Ok(())
}

async fn sleep_and_wake(cluster: &Cluster, project: &Project, table: &mut Table) -> anyhow::Result<String> {
    let api = cluster.api()?;
    table.step("checksum", "Over all rows of pgbench's four tables.");
    let checksum = sql::ask(&project.uri, CHECKSUM).await?;
    table.done(checksum.clone());

    table.step("sleep", "Postgres stops; its directory goes. What is left of the compute: nothing.");
    api.suspend(&project.id, &project.endpoint).await?;
    ensure_asleep(cluster, project)?;
    table.done("no postgres process, compute directory gone");

    table.step("wake by one connection", "From connecting at the proxy to the first row.");
    let accounts = sql::ask(&project.uri, "select abalance from pgbench_accounts where aid = 4242").await?;
    table.done(format!("first row: {accounts}"));

    table.step("checksum again", "The compute is new; every page comes from the pageserver.");
    let again = sql::ask(&project.uri, CHECKSUM).await?;
    ensure!(again == checksum, "checksum is {again} after the wake, was {checksum}");
    table.done("the same");
    Ok(checksum)
}

fn ensure_asleep(cluster: &Cluster, project: &Project) -> anyhow::Result<()> {
    let running = processes::postgres_below(&cluster.runtime_dir());
    ensure!(running.is_empty(), "still running: {running:?}");
    let compute_dir = cluster.runtime_dir().join(&project.endpoint);
    ensure!(!compute_dir.exists(), "{} is still there", compute_dir.display());
    Ok(())
}

async fn branches(cluster: &Cluster, project: &Project, table: &mut Table) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let client = sql::connect(&project.uri).await?;
    let before = sql::value(&client, "select pg_current_wal_flush_lsn()").await?;
    client.batch_execute("delete from pgbench_accounts where aid <= 1000").await?;
    let rows = "select count(*) from pgbench_accounts";
    let parent_rows = sql::value(&client, rows).await?;
    drop(client);

    table.step("branch from head", "A new manifest that points at its parent: no data is copied.");
    let head = api.create_branch(&project.id, json!({"name": "from-head", "parent_id": project.branch})).await?;
    table.done(head.id.clone());

    table.step(
        "branch as of before a delete",
        &format!("1000 accounts were deleted after {before}; this branch has them."),
    );
    let body = json!({"name": "before-delete", "parent_id": project.branch, "parent_lsn": before});
    let past = api.create_branch(&project.id, body).await?;
    table.done(past.id.clone());

    table.step("the branches differ, the parent is untouched", "Each has its own compute; each writes for itself.");
    let head_rows = sql::ask(&head.uri, rows).await?;
    let past_rows = sql::ask(&past.uri, rows).await?;
    ensure!(head_rows == parent_rows, "branch from head has {head_rows} accounts, its parent {parent_rows}");
    let expected: u64 = parent_rows.parse::<u64>()? + 1000;
    ensure!(past_rows == expected.to_string(), "branch of the past has {past_rows} accounts, not {expected}");
    sql::psql(&head.uri, "truncate pgbench_accounts").await?;
    let (emptied, parent_now) = (sql::ask(&head.uri, rows).await?, sql::ask(&project.uri, rows).await?);
    ensure!(emptied == "0" && parent_now == parent_rows, "parent has {parent_now} accounts, had {parent_rows}");
    table.done(format!("parent {parent_rows}, from head {head_rows} then 0, before delete {past_rows}"));

    table.step("delete both branches", "The parent keeps its data and its endpoint.");
    for Branch { id, .. } in [head, past] {
        api.ok("DELETE".parse()?, &format!("/projects/{}/branches/{id}", project.id), None).await?;
    }
    ensure!(sql::ask(&project.uri, rows).await? == parent_rows, "the parent changed");
    table.done("gone");
    Ok(())
}

async fn lose_the_pageserver(
    cluster: &Cluster,
    project: &Project,
    checksum: &str,
    table: &mut Table,
) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let before = sql::ask(&project.uri, CHECKSUM).await?;
    ensure!(before != checksum, "the delete changed nothing");
    api.suspend(&project.id, &project.endpoint).await?;
    table.step(
        "lose the pageserver: SIGKILL, its disk wiped",
        "Local disks are caches; the object store is the truth. The supervisor starts a new pageserver on an empty disk.",
    );
    let disk = cluster.data_dir().join("pageserver");
    // With a local store there is no cache on disk at all: its own directory would be a copy beside the original.
    let objects =
        cluster.data_dir().join("object-store/projects").join(&project.id).join("branches").join(&project.branch);
    processes::wait_until("the pageserver to upload", Duration::from_secs(60), || {
        disk.exists() || has_layers(&objects)
    })
    .await?;
    let old = cluster.kill_service("pageserver").await?;
    if disk.exists() {
        std::fs::remove_dir_all(&disk).with_context(|| disk.display().to_string())?;
    }
    let after = sql::ask(&project.uri, CHECKSUM).await?;
    ensure!(after == before, "checksum is {after}, was {before}");
    table.done(format!("process {old} killed, nothing left in {}, checksum the same", disk.display()));
    Ok(())
}

/// True when a branch's folder of the local object store holds a layer.
fn has_layers(objects: &std::path::Path) -> bool {
    std::fs::read_dir(objects.join("layers")).is_ok_and(|entries| entries.flatten().next().is_some())
}

/// Clients that write rows of the ledger during the crash.
const WRITERS: u32 = 8;

async fn kill_the_compute(cluster: &Cluster, project: &Project, table: &mut Table) -> anyhow::Result<()> {
    sql::psql(&project.uri, "create table ledger (writer int, number int, primary key (writer, number))").await?;
    table.step(
        "kill -9 the compute in mid-pgbench",
        "8 writers note each commit that was acknowledged; Postgres and its agent are killed under them.",
    );
    let acknowledged: Vec<Arc<AtomicU32>> = (0..WRITERS).map(|_| Arc::default()).collect();
    let mut writers = Vec::new();
    for (writer, counter) in acknowledged.iter().enumerate() {
        let client = sql::connect(&project.uri).await?;
        writers.push(tokio::spawn(write_until_it_breaks(client, writer as i32, counter.clone())));
    }
    let uri = project.uri.clone();
    let bench = tokio::spawn(async move { sql::pgbench(&uri, &["-c", "2", "-T", "30", "-n"]).await });
    tokio::time::sleep(Duration::from_secs(3)).await;
    let compute = processes::postgres_below(&cluster.runtime_dir());
    let postmaster = compute.iter().find(|p| p.command.contains(" -D ")).context("no postmaster found")?;
    processes::kill_hard(postmaster.parent)?;
    let _ = processes::kill_hard(postmaster.pid);
    for writer in writers {
        writer.await?;
    }
    ensure!(bench.await?.is_err(), "pgbench did not notice that its server was killed");
    let total: u32 = acknowledged.iter().map(|n| n.load(Ordering::SeqCst)).sum();
    table.done(format!("{total} commits had been acknowledged"));

    table.step("wake after the crash", "A new term fences the dead compute; there is nothing to recover.");
    sql::ask(&project.uri, "select 1").await?;
    table.done("ready");

    table.step("every acknowledged commit is there", "Each writer's rows, up to the last that it was told of.");
    let client = sql::connect(&project.uri).await?;
    for (writer, counter) in acknowledged.iter().enumerate() {
        let wanted = counter.load(Ordering::SeqCst);
        ensure!(wanted > 0, "writer {writer} never committed");
        let query = format!("select count(*) from ledger where writer = {writer} and number <= {wanted}");
        let found = sql::value(&client, &query).await?;
        ensure!(found == wanted.to_string(), "writer {writer}: {found} of {wanted} acknowledged rows are there");
    }
    table.done(format!("{total} of {total}"));
    Ok(())
}

/// Inserts 1, 2, 3 … until the connection breaks; `acknowledged` is the last whose commit was confirmed.
async fn write_until_it_breaks(client: tokio_postgres::Client, writer: i32, acknowledged: Arc<AtomicU32>) {
    for number in 1.. {
        if client.execute("insert into ledger values ($1, $2)", &[&writer, &(number as i32)]).await.is_err() {
            return;
        }
        acknowledged.store(number, Ordering::SeqCst);
    }
}
