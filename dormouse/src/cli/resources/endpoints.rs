//! `dormouse endpoints`.

use clap::{Args, Subcommand};
use control_plane_api::v2::{Endpoint, EndpointEnvelope, EndpointFields, EndpointRequest};

use super::super::{
    Api, Connection, ProjectChoice,
    output::{Output, or_dash},
    select,
};

/// What can be done with endpoints.
#[derive(Subcommand)]
pub enum EndpointCommand {
    /// Make an endpoint for a branch that has none
    Create(CreateArguments),
    /// List a project's endpoints and whether they are awake
    List {
        #[command(flatten)]
        project: ProjectChoice,
        #[command(flatten)]
        connection: Connection,
    },
    /// Wake an endpoint without connecting to it
    Start(OneArguments),
    /// Put an endpoint to sleep now
    Suspend(OneArguments),
    /// Delete an endpoint; its branch stays
    Delete(OneArguments),
}

/// `create`.
#[derive(Args)]
pub struct CreateArguments {
    /// The branch, by id or name
    branch: String,
    /// Idle seconds before it sleeps; 0 is the default of 300, -1 never
    #[arg(long, allow_hyphen_values = true)]
    suspend_timeout: Option<i64>,
    #[command(flatten)]
    project: ProjectChoice,
    #[command(flatten)]
    connection: Connection,
}

/// `start`, `suspend` and `delete`.
#[derive(Args)]
pub struct OneArguments {
    /// The endpoint, by its id or by its branch's name or id
    endpoint: String,
    #[command(flatten)]
    project: ProjectChoice,
    #[command(flatten)]
    connection: Connection,
}

/// Does it.
pub async fn run(command: EndpointCommand) -> anyhow::Result<()> {
    match command {
        EndpointCommand::Create(arguments) => {
            let api = Api::new(&arguments.connection)?;
            let project = select::project(&api, &arguments.project).await?;
            let branch = select::branch(&api, &project, Some(&arguments.branch)).await?;
            let endpoint = EndpointFields {
                branch_id: Some(branch.id.to_string()),
                suspend_timeout_seconds: arguments.suspend_timeout,
                ..Default::default()
            };
            let path = format!("/projects/{}/endpoints", project.id);
            print_one(arguments.connection.output, api.post(&path, &EndpointRequest { endpoint }).await?)
        }
        EndpointCommand::List { project, connection } => {
            let api = Api::new(&connection)?;
            let project = select::project(&api, &project).await?;
            let endpoints = select::endpoints(&api, &project.id).await?;
            print(connection.output, &endpoints, &endpoints)
        }
        EndpointCommand::Start(arguments) => {
            let (api, path) = find(&arguments).await?;
            print_one(arguments.connection.output, api.post(&format!("{path}/start"), &()).await?)
        }
        EndpointCommand::Suspend(arguments) => {
            let (api, path) = find(&arguments).await?;
            print_one(arguments.connection.output, api.post(&format!("{path}/suspend"), &()).await?)
        }
        EndpointCommand::Delete(arguments) => {
            let (api, path) = find(&arguments).await?;
            print_one(arguments.connection.output, api.delete(&path).await?)
        }
    }
}

async fn find(arguments: &OneArguments) -> anyhow::Result<(Api, String)> {
    let api = Api::new(&arguments.connection)?;
    let project = select::project(&api, &arguments.project).await?;
    let endpoint = select::endpoint(&api, &project, &arguments.endpoint).await?;
    Ok((api, format!("/projects/{}/endpoints/{}", project.id, endpoint.id)))
}

fn print_one(output: Output, answer: EndpointEnvelope) -> anyhow::Result<()> {
    print(output, &answer, std::slice::from_ref(&answer.endpoint))
}

fn print(output: Output, answer: &impl serde::Serialize, endpoints: &[Endpoint]) -> anyhow::Result<()> {
    let rows = endpoints.iter().map(|e| {
        let state = match &e.pending_state {
            Some(pending) => format!("{} -> {pending}", e.current_state),
            None => e.current_state.clone(),
        };
        let timeout = match e.suspend_timeout_seconds {
            0 => "default".to_owned(),
            -1 => "never".to_owned(),
            seconds => format!("{seconds} s"),
        };
        [e.id.to_string(), e.branch_id.to_string(), state, timeout, or_dash(e.last_active.as_ref())]
    });
    output.print(answer, ["id", "branch", "state", "sleeps after", "last active"], rows)
}
