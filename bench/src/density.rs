//! Many projects that nobody uses: what each costs in the object store and in the pageserver's memory, how fast they are
//! made, and how soon every service is back after a restart of all.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use e2e::{Api, Cluster, ClusterOptions, processes};
use futures::{StreamExt, TryStreamExt};
use pageserver_client::PageserverClient;
use serde_json::json;
use types::{BranchRef, ForkNumber, Lsn, RelTag};
use wire::pageserver::ReadLsn;

/// Requests under way while projects are made and branches are touched.
const CONCURRENCY: usize = 8;
/// The pageserver lets go of branches after this.
const IDLE_DETACH_SECONDS: u64 = 5;
/// It looks every 10 s; and an ancestor goes in the look after its last child.
const DETACHED_WITHIN: Duration = Duration::from_secs(40);
/// `pg_database`, which every branch has.
const PG_DATABASE: RelTag = RelTag { spc: 1664, db: 0, rel: 1262, fork: ForkNumber::Main };
const SERVICES: [&str; 4] = ["control-plane", "pageserver", "safekeeper", "proxy"];

/// Makes `projects` projects (at least 2) without starting their computes, restarts everything, and looks.
pub async fn run(projects: usize) -> anyhow::Result<()> {
    ensure!(projects >= 2, "two halves are compared: --projects must be 2 or more");
    println!(
        "density: {projects} projects made through the API, their computes not started; then a restart of every service"
    );
    let environment = [
        ("DORMOUSE_IDLE_DETACH_SECONDS", IDLE_DETACH_SECONDS.to_string()),
        // The supervisor then says how long each service took to start; the services themselves are as quiet as ever.
        ("DORMOUSE_LOG", "warn,dormouse::up=debug".to_owned()),
    ];
    let environment = environment.map(|(name, value)| (name.to_owned(), value)).into();
    let mut cluster = Cluster::start(ClusterOptions { environment, ..ClusterOptions::default() }).await?;
    let api = cluster.api()?;
    let store = cluster.data_dir().join("object-store");
    let before = bytes_below(&store)?;
    let start = Instant::now();
    let branches: Vec<BranchRef> = futures::stream::iter(0..projects)
        .map(|number| make(&api, number))
        .buffer_unordered(CONCURRENCY)
        .try_collect()
        .await?;
    let projects_s = projects as f64 / start.elapsed().as_secs_f64();
    let project_kb = (bytes_below(&store)? - before) as f64 / 1024.0 / projects as f64;

    cluster.down().await?;
    let restart = Instant::now();
    cluster.up().await?;
    println!("all services answer {:.2} s after the restart", restart.elapsed().as_secs_f64());
    let mut figures = Vec::new();
    for service in SERVICES {
        let (memory_mib, start_ms) = look(&cluster, service)?;
        println!("{service}: {memory_mib:.1} MiB, started in {start_ms} ms");
        let name = service.replace('-', "_");
        figures.push(format!("{name}_mib={memory_mib:.1} {name}_start_ms={start_ms}"));
    }

    let pageserver = cluster.pageserver()?;
    // What the first use of anything costs, and what memory a crowd leaves behind that the next one finds, is not the
    // branches' price: half of them go first.
    let (first, second) = branches.split_at(projects / 2);
    touch(&pageserver, first).await?;
    tokio::time::sleep(DETACHED_WITHIN).await;
    let (unused, _) = look(&cluster, "pageserver")?;
    let start = Instant::now();
    touch(&pageserver, second).await?;
    let attach_ms = start.elapsed().as_secs_f64() * 1000.0 / second.len() as f64;
    let (attached, _) = look(&cluster, "pageserver")?;
    tokio::time::sleep(DETACHED_WITHIN).await;
    let (idle, _) = look(&cluster, "pageserver")?;
    println!(
        "pageserver: {unused:.1} MiB after the use of one half, {attached:.1} MiB with the other in use, {idle:.1} MiB when idle again"
    );
    let per_branch = |mib: f64| (mib - unused).max(0.0) * 1024.0 / second.len() as f64;
    cluster.down().await?;
    println!(
        "projects={projects} projects_s={projects_s:.1} project_kb={project_kb:.2} branch_kb={:.2} used_branch_kb={:.1} attach_ms={attach_ms:.2} {}",
        per_branch(idle),
        per_branch(attached),
        figures.join(" ")
    );
    Ok(())
}

async fn make(api: &Api, number: usize) -> anyhow::Result<BranchRef> {
    let body = json!({"project": {"name": format!("p{number}"), "start_compute": false}});
    let made = api.ok("POST".parse()?, "/projects", Some(body)).await?;
    let id = |pointer| anyhow::Ok(e2e::api::text(&made, pointer)?);
    Ok(BranchRef { project: id("/project/id")?.parse()?, branch: id("/branch/id")?.parse()? })
}

/// Reads something of each branch, which attaches it.
async fn touch(pageserver: &PageserverClient, branches: &[BranchRef]) -> anyhow::Result<()> {
    let at = ReadLsn { request: Lsn::MAX, not_modified_since: Lsn::INVALID };
    let reads = branches.iter().map(|branch| async move {
        let size = pageserver.rel_size(branch, PG_DATABASE, at).await?;
        ensure!(size.is_some(), "{branch} has no pg_database");
        Ok(())
    });
    futures::stream::iter(reads).buffer_unordered(CONCURRENCY).try_collect::<Vec<()>>().await?;
    Ok(())
}

/// Resident memory in MiB, and the time from a service's start to its listening in milliseconds, of the largest and slowest
/// process of that service.
fn look(cluster: &Cluster, service: &str) -> anyhow::Result<(f64, u64)> {
    let found = processes::children_with(cluster.up_pid()?, &format!("dormouse {service}"));
    ensure!(!found.is_empty(), "no process of {service}");
    let mut memory_mib: f64 = 0.0;
    for process in &found {
        let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("VmRSS")?;
        let kib: f64 = line.split_whitespace().nth(1).context("VmRSS")?.parse()?;
        memory_mib = memory_mib.max(kib / 1024.0);
    }
    Ok((memory_mib, cluster.start_ms(service)?))
}

fn bytes_below(directory: &Path) -> anyhow::Result<u64> {
    let (mut bytes, mut open) = (0, vec![directory.to_owned()]);
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory)?.flatten() {
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                open.push(entry.path());
            } else {
                bytes += metadata.len();
            }
        }
    }
    Ok(bytes)
}
