//! `dormouse jwks`.

use clap::{Args, Subcommand};
use control_plane_api::v2::{Jwks, JwksEnvelope, JwksFields, JwksList};

use super::super::{
    Api, Connection, ProjectChoice,
    output::{Output, or_dash},
    select::{self, segment},
};

/// What can be done with issuers of tokens.
#[derive(Subcommand)]
pub enum JwksCommand {
    /// Let an issuer's tokens stand for the passwords of roles, over HTTP and WebSocket
    #[command(
        after_help = "Example:\n  dormouse jwks add https://auth.example.com/.well-known/jwks.json \\\n    --audience shop --issuer https://auth.example.com/ --role authenticated\n\nThe roles must exist (dormouse roles create). Without --audience and --issuer whatever these keys have signed is good:\nname both where the issuer has other customers too."
    )]
    Add(AddArguments),
    /// List a project's issuers
    List(ProjectArguments),
    /// Remove an issuer: its tokens are good for nothing any more
    Delete {
        /// The id that `list` shows
        id: String,
        #[command(flatten)]
        project: ProjectArguments,
    },
}

/// `add`.
#[derive(Args)]
pub struct AddArguments {
    /// URL of its JSON Web Key Set
    #[arg(value_name = "URL")]
    url: String,
    /// Role that its tokens may take; may be there several times [default: authenticator, authenticated, anonymous]
    #[arg(long = "role", value_name = "ROLE")]
    roles: Vec<String>,
    /// Must be among a token's `aud`
    #[arg(long)]
    audience: Option<String>,
    /// Must be a token's `iss`
    #[arg(long)]
    issuer: Option<String>,
    /// Your name for it [default: the URL's host]
    #[arg(long)]
    name: Option<String>,
    /// The only branch that it counts for, by name or id [default: all of the project's]
    #[arg(long)]
    branch: Option<String>,
    #[command(flatten)]
    project: ProjectArguments,
}

/// Which project, and how to reach it.
#[derive(Args)]
pub struct ProjectArguments {
    #[command(flatten)]
    project: ProjectChoice,
    #[command(flatten)]
    connection: Connection,
}

/// Does it.
pub async fn run(command: JwksCommand) -> anyhow::Result<()> {
    match command {
        JwksCommand::Add(arguments) => add(arguments).await,
        JwksCommand::List(ProjectArguments { project, connection }) => {
            let api = Api::new(&connection)?;
            let project = select::project(&api, &project).await?;
            let list: JwksList = api.get(&format!("/projects/{}/jwks", project.id)).await?;
            print(connection.output, &list, &list.jwks)
        }
        JwksCommand::Delete { id, project: ProjectArguments { project, connection } } => {
            let api = Api::new(&connection)?;
            let project = select::project(&api, &project).await?;
            let deleted: Jwks = api.delete(&format!("/projects/{}/jwks/{}", project.id, segment(&id))).await?;
            print(connection.output, &deleted, std::slice::from_ref(&deleted))
        }
    }
}

async fn add(arguments: AddArguments) -> anyhow::Result<()> {
    let AddArguments { url, roles, audience, issuer, name, branch, project } = arguments;
    let ProjectArguments { project, connection } = project;
    let api = Api::new(&connection)?;
    let project = select::project(&api, &project).await?;
    let branch_id = match branch {
        Some(branch) => Some(select::branch(&api, &project, Some(&branch)).await?.id.to_string()),
        None => None,
    };
    let fields = JwksFields {
        jwks_url: url,
        provider_name: name,
        branch_id,
        jwt_audience: audience,
        jwt_issuer: issuer,
        role_names: (!roles.is_empty()).then_some(roles),
    };
    let made: JwksEnvelope = api.post(&format!("/projects/{}/jwks", project.id), &fields).await?;
    print(connection.output, &made, std::slice::from_ref(&made.jwks))
}

fn print(output: Output, answer: &impl serde::Serialize, jwks: &[Jwks]) -> anyhow::Result<()> {
    let rows = jwks.iter().map(|j| {
        let [audience, issuer, branch] =
            [or_dash(j.jwt_audience.as_ref()), or_dash(j.jwt_issuer.as_ref()), or_dash(j.branch_id.as_ref())];
        [j.id.clone(), j.provider_name.clone(), j.jwks_url.clone(), audience, issuer, j.role_names.join(", "), branch]
    });
    output.print(answer, ["id", "name", "url", "audience", "issuer", "roles", "branch"], rows)
}
