//! `make regress`: PostgreSQL's core, isolation and contrib tests on a stock server and on a Dormouse compute with hardly
//! any memory, then a sleep and the loss of the pageserver's disk, and everything must be the same. With `--through pooler`: on a
//! compute, directly and through its pool.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::Parser;
use e2e::{
    Api, Cluster, ClusterOptions, Project, processes,
    regress::{Comparison, Dump, Pooled, Sources, Suite, Target, amcheck, compare, through_the_pooler},
    sql,
    stock::{StockServer, host_user},
};

/// Settings of both servers: little memory, and what some contrib modules' tests ask for.
const SETTINGS: &[(&str, &str)] = &[
    ("shared_buffers", "1MB"),
    ("wal_level", "logical"),
    ("max_prepared_transactions", "100"),
    ("max_replication_slots", "4"),
    ("shared_preload_libraries", "pg_stat_statements"),
    ("compute_query_id", "regress"),
    ("logical_decoding_work_mem", "64kB"),
    // Small, so that the compute ships and evicts what a larger one would only begin with.
    ("max_wal_size", "256MB"),
    ("timezone", "UTC"),
    ("datestyle", "iso, mdy"),
];

/// The compute's cache for pages that can be fetched again.
const PAGE_CACHE_MIB: &str = "16";

#[derive(Parser)]
struct Arguments {
    /// PostgreSQL's source, as `scripts/postgres-source.sh` prints it.
    #[arg(long)]
    source: PathBuf,
    /// Run only suites whose name starts like this: core, isolation, contrib/ltree.
    #[arg(long, default_value = "")]
    only: String,
    /// Something else: the core suite on a compute, directly and through its pool in session and in transaction mode.
    #[arg(long, value_name = "WHAT")]
    through: Option<Through>,
    /// Where outputs and dumps are left.
    #[arg(long, default_value = "target/regress")]
    keep: PathBuf,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Through {
    Pooler,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match arguments.through {
        None => run(&arguments).await.map(|comparison| told(&comparison)),
        Some(Through::Pooler) => pooled(&arguments).await,
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("regress failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints the figures; whether nothing differs.
fn told(comparison: &Comparison) -> bool {
    let Comparison { peer_passed, passed, differing } = comparison;
    println!("stock_passed={peer_passed} dormouse_passed={passed} differing={}", differing.len());
    differing.is_empty()
}

/// Through the pool; whether nothing differs in session mode, and nothing else than what is explained in transaction mode.
async fn pooled(arguments: &Arguments) -> anyhow::Result<bool> {
    e2e::emptied_directory(&arguments.keep)?;
    let sources = Sources::prepare(&arguments.source)?;
    let Pooled { session, transaction, unexplained } = through_the_pooler(&sources, &arguments.keep).await?;
    println!("session mode differs in: {}", listed(&session.differing));
    println!("transaction mode differs in: {}", listed(&transaction.differing));
    println!("of these not explained in docs/pooling.md: {}", listed(&unexplained));
    println!(
        "direct_passed={} session_passed={} session_differing={} transaction_passed={} transaction_differing={} unexplained={}",
        session.peer_passed,
        session.passed,
        session.differing.len(),
        transaction.passed,
        transaction.differing.len(),
        unexplained.len()
    );
    Ok(session.differing.is_empty() && unexplained.is_empty())
}

fn listed(tests: &[String]) -> String {
    if tests.is_empty() { "nothing".to_owned() } else { tests.join(", ") }
}

async fn run(arguments: &Arguments) -> anyhow::Result<Comparison> {
    e2e::emptied_directory(&arguments.keep)?;
    let sources = Sources::prepare(&arguments.source)?;
    let limits = ["--page-cache-mib", PAGE_CACHE_MIB].map(str::to_owned).into();
    let mut cluster = Cluster::start(ClusterOptions { arguments: limits, ..ClusterOptions::default() }).await?;
    let outcome = both(arguments, &sources, &cluster).await;
    let comparison = outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await?;
    Ok(comparison)
}

async fn both(arguments: &Arguments, sources: &Sources, cluster: &Cluster) -> anyhow::Result<Comparison> {
    let api = cluster.api()?;
    let project = with_settings(&api).await?;
    let mut server = StockServer::create(SETTINGS)?;
    server.start().await?;
    let stock = Target::local("stock", server.socket_dir());
    let dormouse = Target::local("dormouse", cluster.runtime_dir().join(&project.endpoint));
    // Stays connected: nobody else may see the compute as idle and put it to sleep.
    let awake = cluster.superuser(&project.endpoint, "postgres").await?;
    make_alike(&awake, &server.connect("postgres").await?).await?;

    let mut total = Comparison::default();
    let mut suites = vec![sources.core()?, sources.isolation()?];
    suites.extend(sources.contrib()?);
    suites.retain(|suite| suite.name.starts_with(&arguments.only));
    let mut autovacuum = true;
    for suite in &suites {
        if autovacuum && suite.name.starts_with("contrib") {
            // Several modules' tests ask for it, to see dead rows where they left them.
            for client in [&awake, &server.connect("postgres").await?] {
                client.batch_execute("alter system set autovacuum = off").await?;
                client.batch_execute("select pg_reload_conf()").await?;
            }
            autovacuum = false;
        }
        total += on_both(sources, suite, &stock, &dormouse, &arguments.keep)?;
    }
    drop(awake);
    let after = after_a_sleep(cluster, &project, &stock, &dormouse, &arguments.keep).await?;
    total.differing.extend(after);
    server.stop()?;
    Ok(total)
}

/// A project whose compute runs with the settings.
async fn with_settings(api: &Api) -> anyhow::Result<Project> {
    let project = api.create_project_with("regress", SETTINGS).await?;
    anyhow::ensure!(sql::ask(&project.uri, "show shared_buffers").await? == "1MB", "the settings were not taken");
    Ok(project)
}

/// Makes the roles and databases of a new project on the stock server too, so that dumps compare, and takes back what
/// Dormouse closes on purpose.
async fn make_alike(dormouse: &tokio_postgres::Client, stock: &tokio_postgres::Client) -> anyhow::Result<()> {
    let roles = dormouse
        .query(
            "select format('create role %I %s %s %s %s', rolname, case when rolcanlogin then 'login' else 'nologin' end,
                case when rolcreatedb then 'createdb' else '' end, case when rolcreaterole then 'createrole' else '' end,
                concat_ws(' ', case when rolreplication then 'replication' end, case when rolbypassrls then 'bypassrls' end))
             from pg_roles where oid >= 16384 order by oid",
            &[],
        )
        .await?;
    let members = dormouse
        .query(
            "select format('grant %I to %I', g.rolname, m.rolname) from pg_auth_members a
             join pg_roles g on g.oid = a.roleid join pg_roles m on m.oid = a.member where m.oid >= 16384",
            &[],
        )
        .await?;
    let databases = dormouse
        .query(
            "select format('create database %I owner %I', datname, pg_get_userbyid(datdba))
             from pg_database where datname not in ('postgres', 'template0', 'template1')",
            &[],
        )
        .await?;
    for row in roles.iter().chain(&members).chain(&databases) {
        stock.batch_execute(row.get(0)).await?;
    }
    // `dblink` and `postgres_fdw` connect to their own server as the user that it runs as.
    let role = format!("create role \"{}\" superuser login", host_user()?);
    for client in [dormouse, stock] {
        client.batch_execute(&role).await?;
    }
    // Dormouse lets nobody grant the roles through which a member reaches the host. That is its one change to a stock
    // server's catalog, and `create_role` grants them.
    dormouse.batch_execute("set allow_system_table_mods = on").await?;
    let host_roles = "'pg_execute_server_program', 'pg_read_server_files', 'pg_write_server_files'";
    let open = format!("update pg_authid set rolsuper = false where rolname in ({host_roles})");
    dormouse.batch_execute(&open).await?;
    dormouse.batch_execute("reset allow_system_table_mods").await?;
    Ok(())
}

fn on_both(
    sources: &Sources,
    suite: &Suite,
    stock: &Target,
    dormouse: &Target,
    keep: &Path,
) -> anyhow::Result<Comparison> {
    let timed = |target: &Target| {
        let start = Instant::now();
        sources.run(suite, target, keep).map(|outcomes| (outcomes, start.elapsed()))
    };
    let ((left, stock_took), (right, dormouse_took)) = (timed(stock)?, timed(dormouse)?);
    let comparison = compare(&suite.name, (stock.name, &left), (dormouse.name, &right));
    println!(
        "{:<34} {:>4} tests: {} pass on stock ({:.1} s), {} on dormouse ({:.1} s), {} differ",
        suite.name,
        left.passed.len(),
        comparison.peer_passed,
        stock_took.as_secs_f64(),
        comparison.passed,
        dormouse_took.as_secs_f64(),
        comparison.differing.len()
    );
    Ok(comparison)
}

/// Sleep, the pageserver's disk wiped, wake: the things that are not as before, or not as on the stock server.
async fn after_a_sleep(
    cluster: &Cluster,
    project: &Project,
    stock: &Target,
    dormouse: &Target,
    keep: &Path,
) -> anyhow::Result<Vec<String>> {
    let mut differing = Vec::new();
    let mut count = |what: &str, difference: Option<String>| {
        println!("{what}: {}", if difference.is_none() { "yes" } else { "NO" });
        if let Some(difference) = difference {
            differing.push(what.to_owned());
            println!("{difference}");
        }
    };
    let before = Dump::take(dormouse, &keep.join("dormouse-before.sql"))?;
    let peer = Dump::take(stock, &keep.join("stock.sql"))?;
    count("pg_dumpall equals the stock server's", peer.comparable()?.difference(&before.comparable()?)?);
    cluster.api()?.suspend(&project.id, &project.endpoint).await?;
    let objects =
        cluster.data_dir().join("object-store/projects").join(&project.id).join("branches").join(&project.branch);
    let uploaded = || std::fs::read_dir(objects.join("layers")).is_ok_and(|entries| entries.flatten().next().is_some());
    processes::wait_until("the pageserver to upload", Duration::from_secs(60), uploaded).await?;
    cluster.kill_service("pageserver").await?;
    let disk = cluster.data_dir().join("pageserver");
    if disk.exists() {
        std::fs::remove_dir_all(&disk).with_context(|| disk.display().to_string())?;
    }
    sql::ask(&project.uri, "select 1").await?;
    let after = Dump::take(dormouse, &keep.join("dormouse-after.sql"))?;
    count("pg_dumpall equals the one before the sleep", before.difference(&after)?);
    let found = amcheck(dormouse)?;
    count("pg_amcheck finds nothing", (!found.is_empty()).then_some(found));
    Ok(differing)
}
