//! `make clients`: clients that nobody here wrote, over direct and pooled connections, with and without TLS; makes the table
//! in `docs/clients.md`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::Context;
use clap::Parser;
use e2e::{Cluster, ClusterOptions, Project, repository};
use tokio_postgres::{Client, Config, NoTls};

/// Kinds of work, in the order of the table.
const WORK: [&str; 7] = ["types", "prepared", "transactions", "pipeline", "copy", "cancel", "settings"];

/// Longest run of one client over one connection.
const TIME_LIMIT_SECONDS: &str = "180";

#[derive(Parser)]
struct Arguments {
    /// Run only clients whose name starts like this.
    #[arg(long, default_value = "")]
    only: String,
    /// Where the table is written; printed when left out.
    #[arg(long)]
    write: Option<PathBuf>,
}

/// A client and how to run it.
struct Driver {
    name: &'static str,
    version: String,
    program: PathBuf,
    arguments: Vec<String>,
    /// Kinds of work that its interface does not offer.
    lacks: &'static [&'static str],
}

/// One of the four ways to connect.
#[derive(Clone, Copy)]
struct Way {
    pooled: bool,
    tls: bool,
}

const WAYS: [Way; 4] = [
    Way { pooled: false, tls: false },
    Way { pooled: false, tls: true },
    Way { pooled: true, tls: false },
    Way { pooled: true, tls: true },
];

type Outcomes = BTreeMap<String, String>;

#[tokio::main]
async fn main() -> ExitCode {
    match run(&Arguments::parse()).await {
        Ok(failures) => {
            println!("failures={failures}");
            if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("clients failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: &Arguments) -> anyhow::Result<usize> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let api = cluster.api()?;
    let project = api.create_project("clients").await?;
    api.wait_state(&project.id, &project.endpoint, "active", Duration::from_secs(60)).await?;
    let (mut table, mut failures) = (Vec::new(), 0);
    let wanted = |name: &str| name.starts_with(&arguments.only);
    for driver in drivers()?.iter().filter(|driver| wanted(driver.name)) {
        let mut outcomes = Vec::new();
        for way in WAYS {
            outcomes.push(run_driver(driver, &cluster, &project, way)?);
        }
        failures += add_rows(&mut table, driver.name, &driver.version, driver.lacks, &outcomes);
    }
    if wanted("tokio-postgres") {
        let mut outcomes = Vec::new();
        for way in WAYS {
            outcomes.push(tokio_postgres_outcomes(&project, way).await?);
        }
        failures += add_rows(&mut table, "tokio-postgres", "0.7", &["settings"], &outcomes);
    }
    cluster.down().await?;
    let text = document(&table);
    match &arguments.write {
        Some(path) => std::fs::write(path, text).with_context(|| path.display().to_string())?,
        None => println!("{text}"),
    }
    Ok(failures)
}

fn drivers() -> anyhow::Result<Vec<Driver>> {
    let clients = repository().join("tests/clients");
    let tools = repository().join("target/tools/clients");
    let file = |name: &str| clients.join(name).to_string_lossy().into_owned();
    let python = |name: &'static str, package: &str, lacks| -> anyhow::Result<Driver> {
        let program = tools.join("venv/bin/python");
        let question = format!("import importlib.metadata as m; print(m.version('{package}'))");
        let version = said(Command::new(&program).args(["-c", &question]))?;
        Ok(Driver { name, version, program, arguments: vec![file("client.py"), name.to_owned()], lacks })
    };
    let node = |name: &'static str, package: &str, lacks| -> anyhow::Result<Driver> {
        let manifest = std::fs::read_to_string(tools.join("node_modules").join(package).join("package.json"))?;
        let manifest: serde_json::Value = serde_json::from_str(&manifest)?;
        let version = manifest["version"].as_str().context("a package without a version")?.to_owned();
        Ok(Driver {
            name,
            version,
            program: "node".into(),
            arguments: vec![file("client.mjs"), name.to_owned()],
            lacks,
        })
    };
    let jars = tools.join("jdbc/usr/share/java");
    let psql = e2e::pg_bin_dir().join("psql");
    let psql_version = said(Command::new(&psql).arg("--version"))?;
    Ok(vec![
        Driver {
            name: "psql",
            version: psql_version.split_whitespace().nth(2).unwrap_or_default().to_owned(),
            program: "bash".into(),
            arguments: vec![file("psql.sh"), psql.to_string_lossy().into_owned()],
            lacks: &["pipeline"],
        },
        python("psycopg", "psycopg", &[])?,
        python("asyncpg", "asyncpg", &[])?,
        python("sqlalchemy", "SQLAlchemy", &["pipeline", "copy", "cancel"])?,
        node("pg", "pg", &["pipeline", "copy", "cancel"])?,
        node("postgres", "postgres", &[])?,
        node("drizzle", "drizzle-orm", &["pipeline", "copy", "cancel", "settings"])?,
        Driver {
            name: "JDBC",
            version: jdbc_version(&jars)?,
            program: "java".into(),
            arguments: vec!["-cp".to_owned(), format!("{}/*", jars.display()), file("Client.java")],
            lacks: &[],
        },
    ])
}

fn jdbc_version(jars: &Path) -> anyhow::Result<String> {
    let entries =
        std::fs::read_dir(jars).with_context(|| format!("{}: run scripts/setup.sh clients", jars.display()))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let versions = names.filter_map(|name| {
        let version = name.strip_prefix("postgresql-")?.strip_suffix(".jar")?.to_owned();
        version.starts_with(|first: char| first.is_ascii_digit()).then_some(version)
    });
    versions.max().context("no JDBC driver")
}

fn said(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("{command:?}: run scripts/setup.sh clients"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn options(project: &Project, way: Way) -> String {
    format!("endpoint={}{}", project.endpoint, if way.pooled { "-pooler" } else { "" })
}

/// Runs a client over one connection; what it says of each kind of work.
fn run_driver(driver: &Driver, cluster: &Cluster, project: &Project, way: Way) -> anyhow::Result<Outcomes> {
    let config: Config = project.uri.parse()?;
    let mut command = Command::new("timeout");
    command.arg(TIME_LIMIT_SECONDS).arg(&driver.program).args(&driver.arguments);
    command.env("CLIENT_MODULES", repository().join("target/tools/clients"));
    command.envs([("PG_HOST", "localhost"), ("PG_PORT", &cluster.pg_port().to_string())]);
    command.env("PG_USER", config.get_user().unwrap_or_default());
    command.env("PG_PASSWORD", String::from_utf8_lossy(config.get_password().unwrap_or_default()).as_ref());
    command.env("PG_DATABASE", config.get_dbname().unwrap_or_default());
    command.env("PG_OPTIONS", options(project, way));
    if way.tls {
        command.env("PG_CA", cluster.data_dir().join("tls/ca.pem"));
    }
    let output = command.stdin(Stdio::null()).output()?;
    let lines = String::from_utf8_lossy(&output.stdout).into_owned();
    let outcomes: Outcomes = lines
        .lines()
        .filter_map(|line| line.split_once(": "))
        .filter(|(work, _)| WORK.contains(work))
        .map(|(work, outcome)| (work.to_owned(), outcome.to_owned()))
        .collect();
    if !output.status.success() || outcomes.values().any(|outcome| outcome != "ok") {
        eprintln!("--- {} {}: {}\n{lines}", driver.name, way.name(), output.status);
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(outcomes)
}

impl Way {
    fn name(self) -> &'static str {
        match (self.pooled, self.tls) {
            (false, false) => "direct",
            (false, true) => "direct, TLS",
            (true, false) => "pooled",
            (true, true) => "pooled, TLS",
        }
    }
}

/// Adds one line for each way; the number of failures.
fn add_rows(table: &mut Vec<String>, name: &str, version: &str, lacks: &[&str], outcomes: &[Outcomes]) -> usize {
    let mut failures = 0;
    for (way, outcomes) in WAYS.iter().zip(outcomes) {
        let mut cells = vec![format!("{name} {version}"), way.name().to_owned()];
        for work in WORK {
            let cell = match outcomes.get(work).map(String::as_str) {
                Some("ok") => "yes".to_owned(),
                None if lacks.contains(&work) => "–".to_owned(),
                other => {
                    failures += 1;
                    format!("**no**: {}", other.unwrap_or("did not get there").replace('|', "\\|"))
                }
            };
            cells.push(cell);
        }
        println!("{}", cells.join(" | "));
        table.push(format!("| {} |", cells.join(" | ")));
    }
    failures
}

fn document(table: &[String]) -> String {
    let head = format!("| client | connection | {} |", WORK.join(" | "));
    let rule = format!("|{}", "---|".repeat(WORK.len() + 2));
    format!(
        "# Clients\n\nMade by `make clients`: each client does its usual work against a running installation, over a direct and a \
         `-pooler`\nconnection (transaction mode), without TLS and with it (`verify-full` where the client has that). A dash: the \
         client's interface\ndoes not offer it. What each kind of work is, is in `tests/clients/`.\n\n{head}\n{rule}\n{}\n",
        table.join("\n")
    )
}

async fn tokio_postgres_outcomes(project: &Project, way: Way) -> anyhow::Result<Outcomes> {
    let mut config: Config = project.uri.parse()?;
    config.options(options(project, way));
    let client = if way.tls {
        let (client, connection) = config.connect(e2e::sql::tls()?).await?;
        tokio::spawn(connection);
        client
    } else {
        config.ssl_mode(tokio_postgres::config::SslMode::Disable);
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        client
    };
    let mut outcomes = Outcomes::new();
    let mut note = |work: &str, outcome: anyhow::Result<()>| {
        outcomes.insert(work.to_owned(), outcome.map_or_else(|error| format!("{error:#}"), |()| "ok".to_owned()));
    };
    note("types", types(&client).await);
    note("prepared", prepared(&client).await);
    let mut client = client;
    note("transactions", transactions(&mut client).await);
    note("pipeline", pipeline(&client).await);
    note("copy", copy(&client).await);
    note("cancel", cancel(&client, way.tls).await);
    Ok(outcomes)
}

async fn types(client: &Client) -> anyhow::Result<()> {
    let row = client.query_one("select $1::int, $2::text, array[1, 2]", &[&1, &"ä"]).await?;
    let values: (i32, String, Vec<i32>) = (row.get(0), row.get(1), row.get(2));
    anyhow::ensure!(values == (1, "ä".to_owned(), vec![1, 2]), "{values:?}");
    Ok(())
}

async fn prepared(client: &Client) -> anyhow::Result<()> {
    let statement = client.prepare("select $1::int + 1").await?;
    for number in 0..20 {
        anyhow::ensure!(client.query_one(&statement, &[&number]).await?.get::<_, i32>(0) == number + 1, "{number}");
    }
    Ok(())
}

async fn transactions(client: &mut Client) -> anyhow::Result<()> {
    client.batch_execute("drop table if exists rust_t").await?;
    client.batch_execute("create table rust_t (a int)").await?;
    let transaction = client.transaction().await?;
    transaction.execute("insert into rust_t values (1)", &[]).await?;
    anyhow::ensure!(transaction.execute("select 1/0", &[]).await.is_err(), "no error");
    transaction.rollback().await?;
    let count: i64 = client.query_one("select count(*) from rust_t", &[]).await?.get(0);
    anyhow::ensure!(count == 0, "{count} rows");
    Ok(())
}

async fn pipeline(client: &Client) -> anyhow::Result<()> {
    let (one, two, three) = tokio::join!(
        client.query_one("select 1", &[]),
        client.query_one("select 1/0", &[]),
        client.query_one("select 3", &[])
    );
    anyhow::ensure!(one.is_ok() && two.is_err() && three?.get::<_, i32>(0) == 3, "answers are mixed up");
    Ok(())
}

async fn copy(client: &Client) -> anyhow::Result<()> {
    use futures::SinkExt;
    let mut sink = std::pin::pin!(client.copy_in("copy rust_t from stdin").await?);
    for number in 0..10_000 {
        sink.send(bytes::Bytes::from(format!("{number}\n"))).await?;
    }
    anyhow::ensure!(sink.finish().await? == 10_000, "rows are missing");
    Ok(())
}

async fn cancel(client: &Client, tls: bool) -> anyhow::Result<()> {
    let token = client.cancel_token();
    let (slept, cancelled) = tokio::join!(client.batch_execute("select pg_sleep(30)"), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        if tls {
            token.cancel_query(e2e::sql::tls()?).await?
        } else {
            token.cancel_query(NoTls).await?
        }
        anyhow::Ok(())
    });
    cancelled?;
    anyhow::ensure!(slept.is_err_and(|error| error.code().is_some_and(|code| code.code() == "57014")), "not cancelled");
    Ok(())
}
