//! `dormouse`: serverless Postgres in one program. Each subcommand is a service, the whole installation, or a call to its API.

mod cli;
mod logging;
mod paths;
mod services;
mod shim;
mod signals;
mod storage;
mod template;
mod up;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::logging::LogFormat;

/// Gives memory back that is not used any more, where glibc's keeps it: thousands of branches come and go in a pageserver.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const EXAMPLES: &str = "\
Examples:
  dormouse up                                 run everything on this machine
  dormouse projects create --name demo        make a project (a database with its own history)
  dormouse psql                               connect to its main branch; it wakes by itself
  dormouse branches create --name dev         branch it, with all data, in milliseconds
  dormouse psql dev -- -c 'select 1'          connect to the branch
  dormouse branches create --name before --at-timestamp $(date -u -d '1 hour ago' +%FT%TZ)

Logs go to standard error; DORMOUSE_LOG filters them (DORMOUSE_LOG=debug, DORMOUSE_LOG=dormouse_pageserver=trace).";

/// Serverless Postgres: stock PostgreSQL that sleeps when idle, wakes on its first connection and branches in milliseconds
#[derive(Parser)]
#[command(name = "dormouse", version, after_help = EXAMPLES, max_term_width = 110)]
struct Arguments {
    /// Shape of log lines
    #[arg(long, global = true, value_enum, default_value = "text", env = "DORMOUSE_LOG_FORMAT")]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Up(Box<up::UpArguments>),
    #[command(flatten)]
    Service(services::ServiceCommand),
    /// The data that new projects start from
    #[command(subcommand)]
    Template(template::TemplateCommand),
    /// Whether what the object store has is whole
    #[command(subcommand)]
    Storage(storage::StorageCommand),
    #[command(flatten)]
    Client(cli::ClientCommand),
}

fn main() -> ExitCode {
    let Arguments { log_format, command } = Arguments::parse();
    let outcome = match command {
        Command::Up(arguments) => up::main(*arguments, log_format),
        Command::Service(service) => services::main(service, log_format),
        Command::Template(command) => template::main(command, log_format),
        Command::Storage(command) => storage::main(command, log_format),
        Command::Client(command) => cli::main(command, log_format),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("dormouse: {error:#}");
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        super::Arguments::command().debug_assert();
    }
}
