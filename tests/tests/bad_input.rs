//! Bad input: each a clear message, a non-zero exit or an error to the client, and nothing damaged.

use std::{net::TcpListener, process::Stdio, time::Duration};

use anyhow::Context;
use e2e::{Cluster, ClusterOptions, SmallDisk, sql};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_get_clear_errors() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let outcome = refuse_clients(&cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn refuse_clients(cluster: &Cluster) -> anyhow::Result<()> {
    let api = cluster.api()?;
    let project = api.create_project("strict").await?;
    let password = project.uri.split(':').nth(2).and_then(|rest| rest.split('@').next()).context("no password")?;

    api.wait_state(&project.id, &project.endpoint, "active", Duration::from_secs(30)).await?;
    api.suspend(&project.id, &project.endpoint).await?;
    let error = failure(&project.uri.replace(password, "wrong")).await;
    assert!(error.contains("password authentication failed"), "{error}");
    assert_eq!(api.state(&project.id, &project.endpoint).await?, "idle", "a wrong password wakes nothing");

    let error = failure(&project.uri.replace(&project.endpoint, "ep-no-such-thing-1")).await;
    // As for a wrong password: nobody without one is to learn which endpoints exist.
    assert!(error.contains("password authentication failed") && error.contains("the endpoint's id"), "{error}");
    let nameless = project.uri.split('?').next().unwrap_or_default().replace(&project.endpoint, "localhost");
    let error = failure(&format!("{nameless}?sslmode=require")).await;
    assert!(error.to_lowercase().contains("endpoint"), "says how to name an endpoint: {error}");
    assert_eq!(api.state(&project.id, &project.endpoint).await?, "idle", "still asleep");

    sql::psql(&project.uri, "create table t as select 1 a").await?;
    for (field, value) in [
        ("parent_lsn", "0/1"),
        ("parent_lsn", "FFFF/0"),
        ("parent_lsn", "nonsense"),
        ("parent_timestamp", "1999-01-01T00:00:00Z"),
        ("parent_timestamp", "tomorrow"),
        ("parent_id", "br-no-such-branch-1"),
    ] {
        let body = json!({"branch": {field: value}});
        let path = format!("/projects/{}/branches", project.id);
        let (status, answer) = api.call("POST".parse()?, &path, Some(body)).await?;
        assert!((400..500).contains(&status), "{field} {value}: {status} {answer}");
        let message = e2e::api::text(&answer, "/message")?;
        assert!(message.len() > 10, "{field} {value}: says what is wrong: {message:?}");
    }
    let stranger = e2e::Api::new(cluster.api_url(), "not-the-key".into());
    assert_eq!(stranger.call("GET".parse()?, "/projects", None).await?.0, 401);
    let (status, _) = api.call("GET".parse()?, "/projects/no-such-project-1", None).await?;
    assert_eq!(status, 404);
    assert_eq!(sql::ask(&project.uri, "select a from t").await?, "1", "nothing was damaged");

    // A second `up` on the same directory, and one on a port that is taken.
    let second = output(cluster.up_command()).await?;
    assert!(!second.0, "a second `up` on the same data directory is refused");
    assert!(second.1.contains("data-dir") || second.1.contains("data directory"), "{}", second.1);
    Ok(())
}

async fn failure(uri: &str) -> String {
    match sql::psql(uri, "select 1").await {
        Ok(row) => panic!("connected, and got {row:?}"),
        Err(error) => format!("{error:#}"),
    }
}

/// Runs to the end: whether it succeeded, and all that it said.
async fn output(command: std::process::Command) -> anyhow::Result<(bool, String)> {
    let mut command = tokio::process::Command::from(command);
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(60), command.output()).await.context("did not end")??;
    let said = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

fn up(data_dir: &std::path::Path) -> anyhow::Result<std::process::Command> {
    let mut command = std::process::Command::new(e2e::cluster::dormouse_binary());
    command.arg("up").arg("--data-dir").arg(data_dir.join("data")).arg("--runtime-dir").arg(data_dir.join("run"));
    for flag in ["--pg-port", "--http-port", "--api-port"] {
        command.args([flag, &e2e::cluster::free_port()?.to_string()]);
    }
    command.args(["--base-port", &e2e::cluster::free_port_range(8)?.to_string()]);
    Ok(command)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn up_says_what_is_wrong() -> anyhow::Result<()> {
    let home = tempfile::tempdir()?;
    let taken = TcpListener::bind(("127.0.0.1", 0))?;
    let port = taken.local_addr()?.port().to_string();
    for flag in ["--pg-port", "--http-port", "--api-port"] {
        let mut command = up(home.path())?;
        command.args([flag, &port]);
        let (succeeded, said) = output(override_last(command, flag, &port)).await?;
        assert!(!succeeded && said.contains(&port) && said.contains(flag), "{flag}: {said}");
    }

    let mut command = up(home.path())?;
    let nowhere = format!("http://127.0.0.1:{}", e2e::cluster::free_port()?);
    command.args(["--object-store", "s3://nowhere/prefix"]).env("AWS_ENDPOINT_URL", &nowhere);
    command.envs([("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_ALLOW_HTTP", "true")]);
    let (succeeded, said) = output(command).await?;
    assert!(!succeeded && said.contains("object store"), "{said}");

    let mut command = up(home.path())?;
    command.args(["--object-store", "ftp://what"]);
    let (succeeded, said) = output(command).await?;
    assert!(!succeeded && said.contains("object-store") || said.contains("object store"), "{said}");
    Ok(())
}

/// The same command with `flag` given once only, as `value`.
fn override_last(command: std::process::Command, flag: &str, value: &str) -> std::process::Command {
    let mut single = std::process::Command::new(command.get_program());
    let arguments: Vec<_> = command.get_args().map(std::ffi::OsStr::to_owned).collect();
    let mut given = false;
    let mut index = 0;
    while index < arguments.len() {
        if arguments[index] == flag {
            if !given {
                single.args([flag, value]);
            }
            given = true;
            index += 2;
        } else {
            single.arg(&arguments[index]);
            index += 1;
        }
    }
    single
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_loses_nothing() -> anyhow::Result<()> {
    let mut cluster = Cluster::prepare(ClusterOptions::default())?;
    let Some(_disk) = SmallDisk::mount(&cluster.data_dir(), "400m")? else {
        eprintln!("skipped: mounting a small disk needs root");
        return Ok(());
    };
    cluster.up().await?;
    let outcome = fill_and_free(&cluster).await;
    outcome.map_err(|error| error.context(cluster.log()))?;
    cluster.down().await
}

async fn fill_and_free(cluster: &Cluster) -> anyhow::Result<()> {
    let project = cluster.api()?.create_project("full").await?;
    sql::psql(&project.uri, "create table t as select generate_series(1, 1000) g").await?;
    let filler = cluster.data_dir().join("filler");
    let mut file = std::fs::File::create(&filler)?;
    let chunk = vec![0u8; 1 << 20];
    while std::io::Write::write_all(&mut file, &chunk).is_ok() {}

    // Writes wait or fail; they are never acknowledged and lost.
    let uri = project.uri.clone();
    let write = "insert into t select generate_series(1001, 400000)";
    let writing = tokio::spawn(async move { sql::psql(&uri, write).await });
    tokio::time::sleep(Duration::from_secs(5)).await;
    let premature = if writing.is_finished() { Some(writing.await?) } else { None };
    let was_acknowledged = matches!(premature, Some(Ok(_)));
    // An open file keeps its room.
    drop(file);
    std::fs::remove_file(&filler)?;
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    let rows = loop {
        match sql::ask(&project.uri, "select count(*) from t").await {
            Ok(rows) => break rows,
            Err(error) if std::time::Instant::now() > deadline => return Err(error.context("never came back")),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    };
    assert!(rows == "1000" || rows == "400000", "a transaction is there whole or not at all: {rows}");
    assert!(!was_acknowledged || rows == "400000", "an acknowledged write was lost");
    sql::psql(&project.uri, "insert into t values (0)").await.context("writing works again")?;
    Ok(())
}

/// A disk that has no room for logs: nobody stops working because it had something to say.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_that_cannot_be_written_stop_nothing() -> anyhow::Result<()> {
    let mut cluster = Cluster::prepare(ClusterOptions::default())?;
    let logs = cluster.data_dir().join("logs");
    std::fs::create_dir_all(&logs)?;
    for service in ["control-plane", "pageserver", "proxy", "safekeeper-1", "safekeeper-2", "safekeeper-3"] {
        std::os::unix::fs::symlink("/dev/full", logs.join(service).with_extension("log"))?;
    }
    cluster.up().await?;
    let project = cluster.api()?.create_project("mute").await?;
    sql::psql(&project.uri, "create table t as select generate_series(1, 1000) g").await?;
    cluster.api()?.suspend(&project.id, &project.endpoint).await?;
    assert_eq!(sql::ask(&project.uri, "select count(*) from t").await?, "1000");
    cluster.down().await
}
