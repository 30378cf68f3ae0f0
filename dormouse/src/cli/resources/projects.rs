//! `dormouse projects`.

use std::time::Duration;

use clap::{Args, Subcommand};
use control_plane_api::v2::{
    AllowedIps, EndpointDefaults, FirstBranchFields, Project, ProjectCreated, ProjectEnvelope, ProjectFields,
    ProjectRequest, ProjectSettings, TakeOverRequest,
};

use super::super::{Api, Connection, ProjectChoice, output::Output, select};

/// What can be done with projects.
#[derive(Subcommand)]
pub enum ProjectCommand {
    /// Make a project: a branch `main` with a role, a database and an endpoint
    #[command(after_help = "Example:\n  dormouse projects create --name shop --suspend-timeout 60")]
    Create(CreateArguments),
    /// List all projects
    List {
        #[command(flatten)]
        connection: Connection,
    },
    /// Show a project
    Get(OneArguments),
    /// Change a project's name, history window, sleep, or where its clients may come from
    #[command(
        after_help = "Examples:\n  dormouse projects update shop --history-retention 14d\n  dormouse projects update shop --history-retention 0s    no history: only the newest state is kept\n  dormouse projects update shop --allow-ip 203.0.113.7 --allow-ip 2001:db8::/32\n\nA longer window keeps more from now on; what a shorter one has let go does not come back."
    )]
    Update(UpdateArguments),
    /// Give a project to another pageserver, though the one before may still run
    #[command(
        after_help = "For when a pageserver is lost or must be emptied. Start another one with a number of its own, an empty --data-dir and\nthe same --object-store, then:\n\n  dormouse projects take-over shop --pageserver 2\n\nWhat the pageserver before still writes does not count from then on. The project's computes are put to sleep and wake\nwith the new one."
    )]
    TakeOver {
        #[command(flatten)]
        one: OneArguments,
        /// The number (--id) of the pageserver that is to serve the project
        #[arg(long, value_name = "N")]
        pageserver: u64,
    },
    /// Delete a project with all its branches and data
    Delete(OneArguments),
}

/// `create`.
#[derive(Args)]
pub struct CreateArguments {
    /// Its name [default: its id]
    #[arg(long)]
    name: Option<String>,
    /// Name of its first database [default: dormouse]
    #[arg(long)]
    database: Option<String>,
    /// Name of its first role [default: <database>_owner]
    #[arg(long)]
    role: Option<String>,
    /// Idle seconds before its endpoints sleep; 0 is the default of 300, -1 never
    #[arg(long, allow_hyphen_values = true)]
    suspend_timeout: Option<i64>,
    /// How far back branches can be made, such as 12h or 14d; 30d at most [default: 7d]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    history_retention: Option<Duration>,
    #[command(flatten)]
    connection: Connection,
}

/// `update`.
#[derive(Args)]
pub struct UpdateArguments {
    /// The project, by id or name
    project: String,
    /// A new name
    #[arg(long)]
    name: Option<String>,
    /// How far back branches can be made, such as 12h or 14d; 30d at most
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    history_retention: Option<Duration>,
    /// Idle seconds before new endpoints sleep; 0 is the default of 300, -1 never
    #[arg(long, allow_hyphen_values = true)]
    suspend_timeout: Option<i64>,
    /// Address or network (CIDR) that clients may come from; may be there several times. Takes the place of all before
    #[arg(long = "allow-ip", value_name = "CIDR")]
    allowed_ips: Vec<String>,
    /// Clients may come from anywhere, as at first
    #[arg(long, conflicts_with = "allowed_ips")]
    allow_any_ip: bool,
    /// With --allow-ip: branches that are not protected can be reached from anywhere
    #[arg(long, requires = "allowed_ips")]
    protected_branches_only: bool,
    #[command(flatten)]
    connection: Connection,
}

/// `get` and `delete`.
#[derive(Args)]
pub struct OneArguments {
    /// The project, by id or name
    project: String,
    #[command(flatten)]
    connection: Connection,
}

/// Does it.
pub async fn run(command: ProjectCommand) -> anyhow::Result<()> {
    match command {
        ProjectCommand::Create(arguments) => create(arguments).await,
        ProjectCommand::List { connection } => {
            let projects = select::projects(&Api::new(&connection)?).await?;
            print(connection.output, &projects, &projects)
        }
        ProjectCommand::Get(arguments) => {
            let api = Api::new(&arguments.connection)?;
            let project = select::project(&api, &ProjectChoice { project: Some(arguments.project) }).await?;
            print(arguments.connection.output, &project, std::slice::from_ref(&project))
        }
        ProjectCommand::TakeOver { one, pageserver } => {
            let api = Api::new(&one.connection)?;
            let project = select::project(&api, &ProjectChoice { project: Some(one.project) }).await?;
            let path = format!("/projects/{}/take_over", project.id);
            let placed: ProjectEnvelope = api.post(&path, &TakeOverRequest { pageserver }).await?;
            print(one.connection.output, &placed, std::slice::from_ref(&placed.project))
        }
        ProjectCommand::Update(arguments) => update(arguments).await,
        ProjectCommand::Delete(arguments) => {
            let api = Api::new(&arguments.connection)?;
            let project = select::project(&api, &ProjectChoice { project: Some(arguments.project) }).await?;
            let deleted: ProjectEnvelope = api.delete(&format!("/projects/{}", project.id)).await?;
            print(arguments.connection.output, &deleted, std::slice::from_ref(&deleted.project))
        }
    }
}

async fn create(arguments: CreateArguments) -> anyhow::Result<()> {
    let api = Api::new(&arguments.connection)?;
    let project = ProjectFields {
        name: arguments.name,
        branch: Some(FirstBranchFields { name: None, role_name: arguments.role, database_name: arguments.database }),
        default_endpoint_settings: arguments
            .suspend_timeout
            .map(|seconds| EndpointDefaults { suspend_timeout_seconds: Some(seconds) }),
        history_retention_seconds: arguments.history_retention.map(|kept| kept.as_secs()),
        ..Default::default()
    };
    let created: ProjectCreated = api.post("/projects", &ProjectRequest { project }).await?;
    print(arguments.connection.output, &created, std::slice::from_ref(&created.project))?;
    if let (Output::Table, Some(uri)) = (arguments.connection.output, created.connection_uris.first()) {
        println!("\nConnect:\n  psql '{}'", uri.connection_uri);
    }
    Ok(())
}

async fn update(arguments: UpdateArguments) -> anyhow::Result<()> {
    let api = Api::new(&arguments.connection)?;
    let found = select::project(&api, &ProjectChoice { project: Some(arguments.project) }).await?;
    let timeout = arguments.suspend_timeout;
    let (ips, protected_branches_only) = (arguments.allowed_ips, arguments.protected_branches_only);
    let allowed_ips =
        (arguments.allow_any_ip || !ips.is_empty()).then_some(AllowedIps { ips, protected_branches_only });
    let project = ProjectFields {
        name: arguments.name,
        history_retention_seconds: arguments.history_retention.map(|kept| kept.as_secs()),
        default_endpoint_settings: timeout.map(|seconds| EndpointDefaults { suspend_timeout_seconds: Some(seconds) }),
        settings: allowed_ips.map(|allowed| ProjectSettings { allowed_ips: Some(allowed) }),
        ..Default::default()
    };
    let updated: ProjectEnvelope = api.patch(&format!("/projects/{}", found.id), &ProjectRequest { project }).await?;
    print(arguments.connection.output, &updated, std::slice::from_ref(&updated.project))
}

fn print(output: Output, answer: &impl serde::Serialize, projects: &[Project]) -> anyhow::Result<()> {
    let rows = projects.iter().map(|p| {
        let history = humantime::format_duration(Duration::from_secs(p.history_retention_seconds)).to_string();
        let ips = p.settings.allowed_ips.as_ref().filter(|allowed| !allowed.ips.is_empty());
        let clients = ips.map_or_else(|| "anywhere".to_owned(), |allowed| allowed.ips.join(", "));
        [p.id.to_string(), p.name.clone(), p.pg_version.to_string(), history, clients, p.created_at.clone()]
    });
    output.print(answer, ["id", "name", "postgres", "history", "clients from", "created"], rows)
}
