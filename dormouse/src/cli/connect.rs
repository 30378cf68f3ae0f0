//! Connection strings and psql.

use std::{
    os::unix::process::CommandExt,
    process::{Command, ExitCode},
};

use anyhow::Context;
use clap::Args;
use control_plane_api::v2::UriAnswer;
use url::Url;

use super::{
    Api, Connection, ProjectChoice,
    output::Output,
    select::{self, segment},
};

/// What to connect to.
#[derive(Args, Clone)]
pub struct Target {
    /// The branch, by name or id [default: the project's default branch]
    branch: Option<String>,
    #[command(flatten)]
    project: ProjectChoice,
    /// Role to log in as [default: the database's owner]
    #[arg(long)]
    role: Option<String>,
    /// Database [default: the branch's first]
    #[arg(long)]
    database: Option<String>,
    /// Through the pool of connections
    #[arg(long)]
    pooled: bool,
    #[command(flatten)]
    connection: Connection,
}

/// `dormouse connection-string`.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  psql \"$(dormouse connection-string)\"\n  dormouse connection-string dev --role app --database orders"
)]
pub struct ConnectionStringArguments {
    #[command(flatten)]
    target: Target,
}

/// `dormouse psql`.
#[derive(Args)]
#[command(after_help = "Examples:\n  dormouse psql\n  dormouse psql dev\n  dormouse psql dev -- -c 'select version()'")]
pub struct PsqlArguments {
    #[command(flatten)]
    target: Target,
    /// Passed on to psql
    #[arg(last = true, value_name = "PSQL ARGUMENTS")]
    rest: Vec<String>,
}

/// Prints a branch's connection string.
pub async fn connection_string(arguments: ConnectionStringArguments) -> anyhow::Result<()> {
    let answer = find(&arguments.target).await?;
    match arguments.target.connection.output {
        Output::Table => println!("{}", answer.uri),
        Output::Json => println!("{}", serde_json::to_string_pretty(&answer)?),
    }
    Ok(())
}

async fn find(target: &Target) -> anyhow::Result<UriAnswer> {
    let api = Api::new(&target.connection)?;
    let project = select::project(&api, &target.project).await?;
    let branch = select::branch(&api, &project, target.branch.as_deref()).await?;
    let mut path = format!("/projects/{}/connection_uri?branch_id={}&pooled={}", project.id, branch.id, target.pooled);
    for (name, value) in [("role_name", &target.role), ("database_name", &target.database)] {
        if let Some(value) = value {
            path.push_str(&format!("&{name}={}", segment(value)));
        }
    }
    api.get(&path).await
}

/// Becomes psql.
pub async fn psql(arguments: PsqlArguments) -> anyhow::Result<ExitCode> {
    let uri = find(&arguments.target).await?.uri;
    // By environment: other users of this machine can read a program's arguments.
    let error = Command::new("psql").args(&arguments.rest).envs(environment(&uri)?).exec();
    Err(error).context("running psql (Debian's package postgresql-client-15 has it)")
}

/// A connection string as libpq's environment variables.
fn environment(uri: &str) -> anyhow::Result<Vec<(&'static str, String)>> {
    let uri = Url::parse(uri).context("the API's connection string")?;
    let decode = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
    let mut variables = vec![
        ("PGHOST", uri.host_str().unwrap_or_default().to_owned()),
        ("PGPORT", uri.port().unwrap_or(5432).to_string()),
        ("PGUSER", decode(uri.username())),
        ("PGPASSWORD", decode(uri.password().unwrap_or_default())),
        ("PGDATABASE", decode(uri.path().trim_start_matches('/'))),
    ];
    for (name, value) in uri.query_pairs() {
        let variable = match name.as_ref() {
            "sslmode" => "PGSSLMODE",
            "options" => "PGOPTIONS",
            "channel_binding" => "PGCHANNELBINDING",
            other => anyhow::bail!("the API's connection string has a parameter {other:?} that is not known here"),
        };
        variables.push((variable, value.into_owned()));
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_strings_become_variables() {
        let uri = "postgresql://o%40x:p%2Fw@localhost:55432/d%20b?sslmode=require&options=endpoint%3Dep-a";
        let variables = environment(uri).expect("variables");
        let value = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.as_str());
        assert_eq!((value("PGUSER"), value("PGPASSWORD")), (Some("o@x"), Some("p/w")));
        assert_eq!((value("PGHOST"), value("PGPORT")), (Some("localhost"), Some("55432")));
        assert_eq!((value("PGDATABASE"), value("PGOPTIONS")), (Some("d b"), Some("endpoint=ep-a")));
        assert!(environment("postgresql://localhost/d?sslcert=x").is_err());
    }
}
