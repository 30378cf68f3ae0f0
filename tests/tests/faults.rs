//! Faults of a compute's surroundings: the pageserver away under load, the agent killed, its disk full or damaged.

use std::{
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use e2e::{Cluster, ClusterOptions, Project, SmallDisk, processes, sql};
use serde_json::json;

/// An installation whose computes have hardly any memory, and one project.
async fn small(kept_mib: &str) -> anyhow::Result<(Cluster, Project)> {
    let arguments = ["--page-cache-mib", "1", "--kept-pages-mib", kept_mib].map(str::to_owned).into();
    let cluster = Cluster::start(ClusterOptions { arguments, ..ClusterOptions::default() }).await?;
    let project = with_little_memory(&cluster).await?;
    Ok((cluster, project))
}

async fn with_little_memory(cluster: &Cluster) -> anyhow::Result<Project> {
    let api = cluster.api()?;
    let project = api.create_project("faults").await?;
    let path = format!("/projects/{}/endpoints/{}", project.id, project.endpoint);
    let settings = json!({"endpoint": {"settings": {"pg_settings": {"shared_buffers": "1MB"}}}});
    api.wait_state(&project.id, &project.endpoint, "active", Duration::from_secs(60)).await?;
    api.ok("PATCH".parse()?, &path, Some(settings)).await?;
    api.suspend(&project.id, &project.endpoint).await?;
    Ok(project)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_wait_while_the_pageserver_is_away() -> anyhow::Result<()> {
    let (cluster, project) = small("400").await?;
    let outcome = pageserver_away(&cluster, &project).await;
    outcome.map_err(|error| error.context(cluster.log()))
}

async fn pageserver_away(cluster: &Cluster, project: &Project) -> anyhow::Result<()> {
    sql::pgbench(&project.uri, &["-i", "-q", "-s", "5"]).await?;
    // Everything comes from the pageserver again.
    cluster.api()?.suspend(&project.id, &project.endpoint).await?;
    let uri = project.uri.clone();
    let bench = tokio::spawn(async move { sql::pgbench(&uri, &["-c", "4", "-j", "2", "-T", "14", "-n"]).await });
    tokio::time::sleep(Duration::from_secs(2)).await;
    // The supervisor starts it again and again.
    let back = Instant::now() + Duration::from_secs(10);
    let mut kills = 0;
    while Instant::now() < back {
        kills += u32::from(cluster.kill_service("pageserver").await.is_ok());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    ensure!(kills > 2, "it was killed only {kills} times");
    let said = bench.await?.context("no client may see an error")?;
    ensure!(said.contains("number of failed transactions: 0"), "{said}");
    let sums =
        "select (select sum(abalance) from pgbench_accounts) = (select coalesce(sum(delta), 0) from pgbench_history)
        and (select sum(tbalance) from pgbench_tellers) = (select coalesce(sum(delta), 0) from pgbench_history)";
    ensure!(sql::ask(&project.uri, sums).await? == "t", "the books do not balance");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compute_dies_with_its_agent_and_the_next_one_is_right() -> anyhow::Result<()> {
    let (cluster, project) = small("64").await?;
    let outcome = agent_killed(&cluster, &project).await;
    outcome.map_err(|error| error.context(cluster.log()))
}

async fn agent_killed(cluster: &Cluster, project: &Project) -> anyhow::Result<()> {
    sql::psql(&project.uri, "create table t (a int primary key)").await?;
    let client = sql::connect(&project.uri).await?;
    for round in 0..3 {
        let from = round * 1000;
        let insert = format!("insert into t select generate_series({from}, {from} + 999)");
        sql::psql(&project.uri, &insert).await?;
        // What is not committed must not be there afterwards.
        let open = sql::connect(&project.uri).await?;
        open.batch_execute("begin; insert into t select generate_series(100000, 130000)").await?;
        let running = processes::postgres_below(&cluster.runtime_dir());
        let postmaster = running.iter().find(|p| p.command.contains(" -D ")).context("no postmaster")?;
        processes::kill_hard(postmaster.parent)?;
        let old: Vec<i32> = running.iter().map(|p| p.pid).collect();
        let gone = || processes::postgres_below(&cluster.runtime_dir()).iter().all(|p| !old.contains(&p.pid));
        processes::wait_until("Postgres to die with its agent", Duration::from_secs(15), gone).await?;
        ensure!(open.batch_execute("commit").await.is_err(), "a session outlived its server");
        let rows = sql::ask(&project.uri, "select concat_ws(' ', count(*), max(a)) from t").await?;
        ensure!(rows == format!("{} {}", from + 1000, from + 999), "after kill {round}: {rows}");
    }
    ensure!(sql::value(&client, "select 1").await.is_err(), "a connection outlived its server");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_to_the_cache_file_is_found_and_the_pages_fetched_again() -> anyhow::Result<()> {
    let (cluster, project) = small("400").await?;
    let outcome = cache_damaged(&cluster, &project).await;
    outcome.map_err(|error| error.context(cluster.log()))
}

async fn cache_damaged(cluster: &Cluster, project: &Project) -> anyhow::Result<()> {
    let client = || async { cluster.superuser(&project.endpoint, "dormouse").await };
    sql::psql(&project.uri, "create table t as select i a, repeat('c', 300) b from generate_series(1, 30000) i")
        .await?;
    cluster.api()?.suspend(&project.id, &project.endpoint).await?;
    let sum = "select concat_ws(' ', count(*), sum(a), min(b) = max(b)) from t";
    let wanted = sql::ask(&project.uri, sum).await?;
    client().await?.batch_execute("alter system set dormouse.page_cache_mib = 4").await?;
    client().await?.batch_execute("select pg_reload_conf()").await?;
    // Until the agent has seen the new limit, and what needs no keeping is no longer kept.
    tokio::time::sleep(Duration::from_secs(3)).await;
    for _ in 0..3 {
        ensure!(sql::ask(&project.uri, sum).await? == wanted);
        let pages = damage(&page_file(&cluster.data_dir())?)?;
        ensure!(pages > 200, "only {pages} pages were cached");
        let again = sql::ask(&project.uri, sum).await?;
        ensure!(again == wanted, "{again} was {wanted}");
    }
    let log = cluster.data_dir().join(format!("logs/{}.log", project.endpoint));
    let noticed =
        || std::fs::read_to_string(&log).is_ok_and(|text| text.contains("pages in the page cache's file were damaged"));
    processes::wait_until("the agent to tell of the damage", Duration::from_secs(10), noticed).await
}

/// The only file of cached pages below a directory.
fn page_file(dir: &Path) -> anyhow::Result<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir)?.flatten() {
            if entry.file_type()?.is_dir() {
                open.push(entry.path());
            } else if entry.path().extension().is_some_and(|e| e == "pages") {
                found.push(entry.path());
            }
        }
    }
    ensure!(found.len() == 1, "{found:?}");
    found.pop().context("no file of pages")
}

/// Flips a bit in each page; how many there are.
fn damage(path: &Path) -> anyhow::Result<u64> {
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    let pages = file.metadata()?.len() / 8192;
    for page in 0..pages {
        let mut byte = [0];
        file.read_exact_at(&mut byte, page * 8192 + 5000)?;
        file.write_all_at(&[byte[0] ^ 1], page * 8192 + 5000)?;
    }
    Ok(pages)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_below_the_cache_fails_the_statement_only() -> anyhow::Result<()> {
    let arguments = ["--page-cache-mib", "1000", "--kept-pages-mib", "1000"].map(str::to_owned).into();
    let mut cluster = Cluster::prepare(ClusterOptions { arguments, ..ClusterOptions::default() })?;
    let Some(_disk) = SmallDisk::mount(&cluster.data_dir().join("page-cache"), "40m")? else {
        eprintln!("skipped: mounting a small disk needs root");
        return Ok(());
    };
    cluster.up().await?;
    let outcome = cache_disk_full(&cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn cache_disk_full(cluster: &Cluster) -> anyhow::Result<()> {
    let project = with_little_memory(cluster).await?;
    let client = sql::connect(&project.uri).await?;
    client
        .batch_execute("create table t (a int, b text); insert into t select i, 'x' from generate_series(1, 1000) i")
        .await?;
    let large = "insert into t select i, repeat('d', 900) from generate_series(1, 100000) i";
    let error = client.batch_execute(large).await.err().context("100 MB fitted on a disk of 40")?;
    let message = error.as_db_error().context("an error of the server, not of the connection")?.message().to_owned();
    ensure!(message.contains("No space left on device"), "{message}");
    // The same session goes on, and can do what does fit, any number of times.
    for round in 1..=8 {
        client.batch_execute("insert into t select i, repeat('d', 900) from generate_series(1, 8000) i").await?;
        ensure!(sql::value(&client, "select count(*) from t").await? == (1000 + round * 8000).to_string());
        tokio::time::sleep(Duration::from_millis(1500)).await;
    }
    drop(client);
    cluster.api()?.suspend(&project.id, &project.endpoint).await?;
    // Reading more than the disk holds needs no room.
    ensure!(sql::ask(&project.uri, "select count(*) from t where b <> ''").await? == "65000");
    Ok(())
}
