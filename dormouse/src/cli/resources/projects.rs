//! `dormouse projects`.

use clap::{Args, Subcommand};
use control_plane_api::v2::{
    EndpointDefaults, FirstBranchFields, Project, ProjectCreated, ProjectEnvelope, ProjectFields, ProjectRequest,
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
        ..Default::default()
    };
    let created: ProjectCreated = api.post("/projects", &ProjectRequest { project }).await?;
    print(arguments.connection.output, &created, std::slice::from_ref(&created.project))?;
    if let (Output::Table, Some(uri)) = (arguments.connection.output, created.connection_uris.first()) {
        println!("\nConnect:\n  psql '{}'", uri.connection_uri);
    }
    Ok(())
}

fn print(output: Output, answer: &impl serde::Serialize, projects: &[Project]) -> anyhow::Result<()> {
    let rows =
        projects.iter().map(|p| [p.id.to_string(), p.name.clone(), p.pg_version.to_string(), p.created_at.clone()]);
    output.print(answer, ["id", "name", "postgres", "created"], rows)
}
