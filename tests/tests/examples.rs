//! The examples, each against a database that sleeps when it begins.

use anyhow::ensure;
use e2e::{Cluster, ClusterOptions, Project, cluster::free_port, node};
use reqwest::Method;
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_examples_work() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let examples = async {
        for name in ["lambda", "drizzle", "prisma"] {
            module(&cluster, name).await.map_err(|error| error.context(name))?;
        }
        express(&cluster).await.map_err(|error| error.context("express"))?;
        worker(&cluster).await.map_err(|error| error.context("hono-worker"))
    };
    Box::pin(examples).await.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn asleep(cluster: &Cluster, name: &str) -> anyhow::Result<Project> {
    let api = cluster.api()?;
    let project = api.create_project(name).await?;
    api.suspend(&project.id, &project.endpoint).await?;
    Ok(project)
}

/// The same database through its pool.
fn pooled(project: &Project) -> Project {
    let uri = project.uri.replace(&project.endpoint, &format!("{}-pooler", project.endpoint));
    Project { uri, ..project.clone() }
}

async fn module(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    let project = asleep(cluster, name).await?;
    let mut command = node::program("node")?;
    command.arg(e2e::repository().join("tests/clients/examples.mjs")).arg(name);
    node::about(&mut command, cluster, &project);
    let outcomes = node::outcomes(command).await?;
    ensure!(outcomes.len() == 1, "{outcomes:?}");
    Ok(())
}

async fn express(cluster: &Cluster) -> anyhow::Result<()> {
    let project = asleep(cluster, "express").await?;
    let port = free_port()?;
    let mut command = node::program("node")?;
    command.arg(node::examples().join("express.mjs")).env("PORT", port.to_string());
    node::about(&mut command, cluster, &pooled(&project));
    let server = node::Server::start(command, port).await?;
    for page in ["a", "b", "a"] {
        server.ask(Method::POST, &format!("/visits/{page}")).await?;
    }
    let visits = server.ask(Method::GET, "/visits").await?;
    ensure!(visits == json!([{"page": "a", "visits": 2}, {"page": "b", "visits": 1}]), "{visits}");
    Ok(())
}

async fn worker(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = asleep(cluster, "worker").await?;
    let port = free_port()?;
    let home = tempfile::tempdir()?;
    let mut command = node::program("wrangler")?;
    let variables = [
        format!("DATABASE_URL:{}", project.uri),
        format!("SQL_ENDPOINT:https://localhost:{}/sql", cluster.http_port()),
    ];
    command.current_dir(node::examples().join("hono-worker")).args(["dev", "--ip", "127.0.0.1"]);
    command.args(["--port", &port.to_string(), "--inspector-port", "0"]);
    command.args(variables.iter().flat_map(|variable| ["--var", variable]));
    command.envs([("WRANGLER_SEND_METRICS", "false"), ("CI", "1"), ("CLOUDFLARE_CF_FETCH_ENABLED", "false")]);
    command.env("XDG_CONFIG_HOME", home.path());
    command.env("CLOUDFLARE_HYPERDRIVE_LOCAL_CONNECTION_STRING_HYPERDRIVE", hyperdrive(&project)?);
    node::about(&mut command, cluster, &project);
    let server = node::Server::start(command, port).await?;
    ensure!(api.state(&project.id, &project.endpoint).await? == "idle", "nobody has asked yet");
    let answer = server.ask(Method::GET, "/").await?;
    ensure!(answer["greeting"] == "hello from workerd" && answer["server"].as_i64() >= Some(150_000), "{answer}");
    ensure!(api.state(&project.id, &project.endpoint).await? == "active", "one request has woken it");
    api.suspend(&project.id, &project.endpoint).await?;
    let answer = server.ask(Method::GET, "/hyperdrive").await?;
    ensure!(answer == json!({"greeting": "hello through Hyperdrive"}), "{answer}");
    Ok(())
}

/// A Hyperdrive binding keeps host, role, password and database only, so the endpoint goes in front of the password.
fn hyperdrive(project: &Project) -> anyhow::Result<String> {
    let config: tokio_postgres::Config = project.uri.parse()?;
    let text = |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned();
    let (user, database) = (config.get_user().unwrap_or_default(), config.get_dbname().unwrap_or_default());
    let (password, endpoint) = (text(config.get_password()), &project.endpoint);
    let port = config.get_ports().first().copied().unwrap_or(5432);
    Ok(format!(
        "postgresql://{user}:endpoint%3D{endpoint}-pooler%3B{password}@localhost:{port}/{database}?sslmode=require"
    ))
}
