//! `dormouse roles` and `dormouse databases`.

use clap::{Args, Subcommand};
use control_plane_api::v2::{
    Database, DatabaseEnvelope, DatabaseFields, DatabaseList, DatabaseRequest, Operation, Role, RoleEnvelope,
    RoleFields, RoleList, RoleRequest,
};

use super::super::{
    Api, Connection, ProjectChoice,
    output::{Output, or_dash},
    select::{self, segment},
};

/// Which branch.
#[derive(Args, Clone)]
pub struct BranchChoice {
    /// The branch, by name or id [default: the project's default branch]
    #[arg(long)]
    branch: Option<String>,
    #[command(flatten)]
    project: ProjectChoice,
    #[command(flatten)]
    connection: Connection,
}

impl BranchChoice {
    async fn find(&self) -> anyhow::Result<(Api, String)> {
        let api = Api::new(&self.connection)?;
        let project = select::project(&api, &self.project).await?;
        let branch = select::branch(&api, &project, self.branch.as_deref()).await?;
        Ok((api, format!("/projects/{}/branches/{}", project.id, branch.id)))
    }
}

/// What can be done with roles.
#[derive(Subcommand)]
pub enum RoleCommand {
    /// List a branch's roles
    List {
        #[command(flatten)]
        branch: BranchChoice,
    },
    /// Make a role; its password is shown
    Create {
        /// Its name
        name: String,
        #[command(flatten)]
        branch: BranchChoice,
    },
    /// Give a role a new password, which is shown
    ResetPassword {
        /// Its name
        name: String,
        #[command(flatten)]
        branch: BranchChoice,
    },
    /// Delete a role that owns no database
    Delete {
        /// Its name
        name: String,
        #[command(flatten)]
        branch: BranchChoice,
    },
}

/// What can be done with databases.
#[derive(Subcommand)]
pub enum DatabaseCommand {
    /// List a branch's databases
    List {
        #[command(flatten)]
        branch: BranchChoice,
    },
    /// Make a database
    Create {
        /// Its name
        name: String,
        /// The role that owns it
        #[arg(long)]
        owner: String,
        #[command(flatten)]
        branch: BranchChoice,
    },
    /// Delete a database with all its data
    Delete {
        /// Its name
        name: String,
        #[command(flatten)]
        branch: BranchChoice,
    },
}

/// Does it.
pub async fn run_role(command: RoleCommand) -> anyhow::Result<()> {
    match command {
        RoleCommand::List { branch } => {
            let (api, base) = branch.find().await?;
            let list: RoleList = api.get(&format!("{base}/roles")).await?;
            print_roles(branch.connection.output, &list, &list.roles)
        }
        RoleCommand::Create { name, branch } => {
            let (api, base) = branch.find().await?;
            let request = RoleRequest { role: RoleFields { name } };
            print_role(&branch, api.post(&format!("{base}/roles"), &request).await?)
        }
        RoleCommand::ResetPassword { name, branch } => {
            let (api, base) = branch.find().await?;
            let path = format!("{base}/roles/{}/reset_password", segment(&name));
            print_role(&branch, api.post(&path, &()).await?)
        }
        RoleCommand::Delete { name, branch } => {
            let (api, base) = branch.find().await?;
            print_role(&branch, api.delete(&format!("{base}/roles/{}", segment(&name))).await?)
        }
    }
}

/// Does it.
pub async fn run_database(command: DatabaseCommand) -> anyhow::Result<()> {
    match command {
        DatabaseCommand::List { branch } => {
            let (api, base) = branch.find().await?;
            let list: DatabaseList = api.get(&format!("{base}/databases")).await?;
            print_databases(branch.connection.output, &list, &list.databases)
        }
        DatabaseCommand::Create { name, owner, branch } => {
            let (api, base) = branch.find().await?;
            let request = DatabaseRequest { database: DatabaseFields { name, owner_name: owner } };
            print_database(&branch, api.post(&format!("{base}/databases"), &request).await?)
        }
        DatabaseCommand::Delete { name, branch } => {
            let (api, base) = branch.find().await?;
            print_database(&branch, api.delete(&format!("{base}/databases/{}", segment(&name))).await?)
        }
    }
}

/// The change is kept in any case; a running compute that could not take it yet gets it at its next wake.
fn warn_of_failures(operations: &[Operation]) {
    for operation in operations {
        if let Some(error) = &operation.error {
            eprintln!("dormouse: {} did not succeed and is tried again at the next wake: {error}", operation.action);
        }
    }
}

fn print_role(branch: &BranchChoice, answer: RoleEnvelope) -> anyhow::Result<()> {
    warn_of_failures(&answer.operations);
    print_roles(branch.connection.output, &answer, std::slice::from_ref(&answer.role))
}

fn print_database(branch: &BranchChoice, answer: DatabaseEnvelope) -> anyhow::Result<()> {
    warn_of_failures(&answer.operations);
    print_databases(branch.connection.output, &answer, std::slice::from_ref(&answer.database))
}

fn print_roles(output: Output, answer: &impl serde::Serialize, roles: &[Role]) -> anyhow::Result<()> {
    let rows = roles.iter().map(|r| [r.name.clone(), or_dash(r.password.as_ref()), r.updated_at.clone()]);
    output.print(answer, ["name", "password", "updated"], rows)
}

fn print_databases(output: Output, answer: &impl serde::Serialize, databases: &[Database]) -> anyhow::Result<()> {
    let rows = databases.iter().map(|d| [d.name.clone(), d.owner_name.clone(), d.created_at.clone()]);
    output.print(answer, ["name", "owner", "created"], rows)
}
