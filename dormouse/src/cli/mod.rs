//! Calls to the REST API as commands, for people and for scripts.
//!
//! On the machine that runs `dormouse up` nothing has to be said: address and key are in the data directory.

mod api;
mod connect;
mod output;
mod resources;
mod select;

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Subcommand};

use crate::logging::{self, LogFormat};
use api::Api;
use output::Output;

/// How to reach the API, and how to print what it says.
#[derive(Args, Clone)]
pub struct Connection {
    /// URL of the API [default: what <data-dir>/api.url says]
    #[arg(long, env = "DORMOUSE_API_URL", value_name = "URL", help_heading = "API")]
    api_url: Option<String>,
    /// API key [default: what <data-dir>/admin.key says]
    #[arg(long, env = "DORMOUSE_API_KEY", hide_env_values = true, value_name = "KEY", help_heading = "API")]
    api_key: Option<String>,
    /// Data directory of the installation on this machine [default: ~/.local/share/dormouse]
    #[arg(long, env = "DORMOUSE_DATA_DIR", help_heading = "API")]
    data_dir: Option<PathBuf>,
    /// Shape of the answer
    #[arg(long, value_enum, default_value = "table", env = "DORMOUSE_OUTPUT", help_heading = "API")]
    pub output: Output,
}

/// Which project a command is about.
#[derive(Args, Clone)]
pub struct ProjectChoice {
    /// The project, by id or name; needed only when there are several
    #[arg(long, env = "DORMOUSE_PROJECT", value_name = "PROJECT")]
    project: Option<String>,
}

/// Commands that call the API.
#[derive(Subcommand)]
pub enum ClientCommand {
    /// Make, list and delete projects
    #[command(subcommand, visible_alias = "project")]
    Projects(resources::projects::ProjectCommand),
    /// Make, list and delete branches
    #[command(subcommand, visible_alias = "branch")]
    Branches(resources::branches::BranchCommand),
    /// Make, start, suspend and delete endpoints
    #[command(subcommand, visible_alias = "endpoint")]
    Endpoints(resources::endpoints::EndpointCommand),
    /// Make, list and delete roles
    #[command(subcommand, visible_alias = "role")]
    Roles(resources::catalog::RoleCommand),
    /// Make, list and delete databases
    #[command(subcommand, visible_alias = "database")]
    Databases(resources::catalog::DatabaseCommand),
    /// Whose JSON Web Tokens stand for passwords
    #[command(subcommand)]
    Jwks(resources::jwks::JwksCommand),
    /// List, add, replace and remove safekeepers
    #[command(subcommand)]
    Safekeepers(resources::safekeepers::SafekeeperCommand),
    /// Print how to connect to a branch
    #[command(visible_alias = "cs")]
    ConnectionString(connect::ConnectionStringArguments),
    /// Run psql on a branch
    Psql(connect::PsqlArguments),
}

/// Runs a command.
pub fn main(command: ClientCommand, format: LogFormat) -> anyhow::Result<ExitCode> {
    logging::start(format, "warn");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(Box::pin(run(command)))
}

async fn run(command: ClientCommand) -> anyhow::Result<ExitCode> {
    match command {
        ClientCommand::Projects(command) => resources::projects::run(command).await?,
        ClientCommand::Branches(command) => resources::branches::run(command).await?,
        ClientCommand::Endpoints(command) => resources::endpoints::run(command).await?,
        ClientCommand::Roles(command) => resources::catalog::run_role(command).await?,
        ClientCommand::Databases(command) => resources::catalog::run_database(command).await?,
        ClientCommand::Jwks(command) => resources::jwks::run(command).await?,
        ClientCommand::Safekeepers(command) => resources::safekeepers::run(command).await?,
        ClientCommand::ConnectionString(arguments) => connect::connection_string(arguments).await?,
        ClientCommand::Psql(arguments) => return connect::psql(arguments).await,
    }
    Ok(ExitCode::SUCCESS)
}
