//! `dormouse branches`.

use clap::{Args, Subcommand};
use control_plane_api::v2::{
    Branch, BranchCreated, BranchEnvelope, BranchFields, BranchRequest, EndpointFields, RestoreRequest, WalReader,
    WalReaderRequest,
};

use super::{
    super::{
        Api, Connection, ProjectChoice,
        output::{Output, bytes, or_dash},
        select,
    },
    history,
};

/// What can be done with branches.
#[derive(Subcommand)]
pub enum BranchCommand {
    /// Make a branch: all of its parent's data as of now, or as of a past moment, at once
    #[command(
        after_help = "Examples:\n  dormouse branches create --name dev\n  dormouse branches create --name before --at-timestamp $(date -u -d '1 hour ago' +%FT%TZ)\n  dormouse branches create --name exact --parent dev --at-lsn 0/1A2B3C8"
    )]
    Create(CreateArguments),
    /// List a project's branches with their sizes: data (all relations), history (own WAL that is kept), stored (own objects)
    List {
        #[command(flatten)]
        project: ProjectChoice,
        #[command(flatten)]
        connection: Connection,
    },
    /// Show a branch
    Get(OneArguments),
    /// Delete a branch that has no children
    Delete(OneArguments),
    /// Set a branch back to an earlier point, in place: it keeps its name, id and endpoint
    #[command(
        after_help = "Examples:\n  dormouse branches restore main --at-timestamp $(date -u -d '1 hour ago' +%FT%TZ) --keep-as before-restore\n  dormouse branches restore main --at-lsn 0/1A2B3C8 --keep-as before-restore\n  dormouse branches restore dev --from main      dev gets the newest state of main; what it was is deleted\n\nThe branch's compute is put to sleep, open connections end, and the next connection finds the restored state.\nWhat the branch was stays under the name of --keep-as, with its children; the restored branch is a child of it.\nTo delete it later, first `dormouse branches detach` the restored branch."
    )]
    Restore(RestoreArguments),
    /// Give a branch all its data to itself, so that its parent can be deleted
    #[command(
        after_help = "Example:\n  dormouse branches detach dev && dormouse branches delete old-main\n\nCopies what the branch still reads from its parents; it stays usable meanwhile. Its history begins where it left its parent."
    )]
    Detach(OneArguments),
    /// Show how far back a branch's history reaches; find the position of a time and the time of a position
    #[command(
        after_help = "Examples:\n  dormouse branches history main\n  dormouse branches history main --at-timestamp $(date -u -d '1 hour ago' +%FT%TZ)\n  dormouse branches history main --at-lsn 0/1A2B3C8\n\nThe window is the project's: `dormouse projects update <project> --history-retention 14d` changes it."
    )]
    History(history::HistoryArguments),
    /// Print how a standby or pg_receivewal follows a branch straight from the safekeepers, without waking its compute
    #[command(
        after_help = "Examples:\n  pg_receivewal -D archive -d \"$(dormouse branches follow main)\"\n  echo \"primary_conninfo = '$(dormouse branches follow main)'\" >> standby/postgresql.auto.conf\n\nIt has a token in it, which reads this branch's WAL and nothing else, and can't be taken back.\nMake the standby with pg_basebackup from the branch itself (`dormouse connection-string`)."
    )]
    Follow(FollowArguments),
    /// Keep single positions of a branch's history beyond its window
    #[command(subcommand, visible_alias = "lease")]
    Leases(history::LeaseCommand),
}

/// `create`.
#[derive(Args)]
pub struct CreateArguments {
    /// Its name [default: its id]
    #[arg(long)]
    name: Option<String>,
    /// What to branch from, by name or id [default: the project's default branch]
    #[arg(long)]
    parent: Option<String>,
    /// At this position of the parent's WAL
    #[arg(long, value_name = "LSN", conflicts_with = "at_timestamp")]
    at_lsn: Option<String>,
    /// As of this time (RFC 3339, as `date -u +%FT%TZ` prints it)
    #[arg(long, value_name = "TIME")]
    at_timestamp: Option<String>,
    /// Idle seconds before its endpoint sleeps; 0 is the default of 300, -1 never
    #[arg(long, allow_hyphen_values = true)]
    suspend_timeout: Option<i64>,
    /// Without an endpoint: it cannot be connected to until it gets one
    #[arg(long)]
    no_endpoint: bool,
    #[command(flatten)]
    project: ProjectChoice,
    #[command(flatten)]
    connection: Connection,
}

/// `restore`.
#[derive(Args)]
pub struct RestoreArguments {
    #[command(flatten)]
    branch: OneArguments,
    /// The branch whose state it gets [default: its own]
    #[arg(long, value_name = "BRANCH")]
    from: Option<String>,
    #[command(flatten)]
    point: history::PointArguments,
    /// Keep what the branch was as a branch of this name; needed unless it is restored from another and has no children
    #[arg(long, value_name = "NAME")]
    keep_as: Option<String>,
}

/// `follow`.
#[derive(Args)]
pub struct FollowArguments {
    #[command(flatten)]
    branch: OneArguments,
    /// How long it can be used [default: 90 days; at most 365]
    #[arg(long, value_name = "SECONDS")]
    expires_in_seconds: Option<u64>,
}

/// A branch, and how to reach the API: what commands about one branch have in common.
#[derive(Args)]
pub struct OneArguments {
    /// The branch, by id or name
    branch: String,
    #[command(flatten)]
    project: ProjectChoice,
    /// How to reach the API.
    #[command(flatten)]
    pub connection: Connection,
}

/// Does it.
pub async fn run(command: BranchCommand) -> anyhow::Result<()> {
    match command {
        BranchCommand::Create(arguments) => create(arguments).await,
        BranchCommand::List { project, connection } => {
            let api = Api::new(&connection)?;
            let project = select::project(&api, &project).await?;
            let branches = select::branches(&api, &project.id).await?;
            print(connection.output, &branches, &branches)
        }
        BranchCommand::Get(arguments) => {
            let (api, path) = find(&arguments).await?;
            let shown: BranchEnvelope = api.get(&path).await?;
            print(arguments.connection.output, &shown, std::slice::from_ref(&shown.branch))
        }
        BranchCommand::Delete(arguments) => {
            let (api, path) = find(&arguments).await?;
            let deleted: BranchEnvelope = api.delete(&path).await?;
            print(arguments.connection.output, &deleted, std::slice::from_ref(&deleted.branch))
        }
        BranchCommand::Restore(arguments) => restore(arguments).await,
        BranchCommand::Detach(arguments) => {
            let (api, path) = find(&arguments).await?;
            let detached: BranchEnvelope = api.post(&format!("{path}/detach"), &()).await?;
            print(arguments.connection.output, &detached, std::slice::from_ref(&detached.branch))
        }
        BranchCommand::History(arguments) => history::show(arguments).await,
        BranchCommand::Follow(arguments) => follow(arguments).await,
        BranchCommand::Leases(command) => history::run_lease(command).await,
    }
}

/// The API, and the branch's path in it.
pub async fn find(arguments: &OneArguments) -> anyhow::Result<(Api, String)> {
    let api = Api::new(&arguments.connection)?;
    let project = select::project(&api, &arguments.project).await?;
    let branch = select::branch(&api, &project, Some(&arguments.branch)).await?;
    Ok((api, format!("/projects/{}/branches/{}", project.id, branch.id)))
}

async fn follow(arguments: FollowArguments) -> anyhow::Result<()> {
    let (api, path) = find(&arguments.branch).await?;
    let request = WalReaderRequest { expires_in_seconds: arguments.expires_in_seconds };
    let reader: WalReader = api.post(&format!("{path}/wal_reader"), &request).await?;
    match arguments.branch.connection.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&reader)?),
        Output::Table => {
            println!("{}", reader.conninfo);
            if !reader.missing_safekeepers.is_empty() {
                let missing: Vec<String> = reader.missing_safekeepers.iter().map(ToString::to_string).collect();
                eprintln!("safekeepers that did not say where they give out WAL are not in it: {}", missing.join(", "));
            }
        }
    }
    Ok(())
}

async fn restore(arguments: RestoreArguments) -> anyhow::Result<()> {
    let one = arguments.branch;
    let api = Api::new(&one.connection)?;
    let project = select::project(&api, &one.project).await?;
    let branch = select::branch(&api, &project, Some(&one.branch)).await?;
    let source = select::branch(&api, &project, Some(arguments.from.as_deref().unwrap_or(branch.id.as_str()))).await?;
    let request = RestoreRequest {
        source_branch_id: source.id.to_string(),
        source_lsn: arguments.point.at_lsn,
        source_timestamp: arguments.point.at_timestamp,
        preserve_under_name: arguments.keep_as,
    };
    let path = format!("/projects/{}/branches/{}/restore", project.id, branch.id);
    let restored: BranchEnvelope = api.post(&path, &request).await?;
    print(one.connection.output, &restored, std::slice::from_ref(&restored.branch))
}

async fn create(arguments: CreateArguments) -> anyhow::Result<()> {
    let api = Api::new(&arguments.connection)?;
    let project = select::project(&api, &arguments.project).await?;
    let parent = match &arguments.parent {
        Some(parent) => Some(select::branch(&api, &project, Some(parent)).await?.id.to_string()),
        None => None,
    };
    let endpoint = EndpointFields {
        kind: Some("read_write".into()),
        suspend_timeout_seconds: arguments.suspend_timeout,
        ..Default::default()
    };
    let request = BranchRequest {
        branch: BranchFields {
            name: arguments.name,
            parent_id: parent,
            parent_lsn: arguments.at_lsn,
            parent_timestamp: arguments.at_timestamp,
            protected: None,
        },
        endpoints: if arguments.no_endpoint { Vec::new() } else { vec![endpoint] },
    };
    let created: BranchCreated = api.post(&format!("/projects/{}/branches", project.id), &request).await?;
    print(arguments.connection.output, &created, std::slice::from_ref(&created.branch))?;
    if let (Output::Table, Some(uri)) = (arguments.connection.output, created.connection_uris.first()) {
        println!("\nConnect:\n  psql '{}'", uri.connection_uri);
    }
    Ok(())
}

fn print(output: Output, answer: &impl serde::Serialize, branches: &[Branch]) -> anyhow::Result<()> {
    let rows = branches.iter().map(|b| {
        let name = if b.default { format!("{} (default)", b.name) } else { b.name.clone() };
        let parent = or_dash(b.parent_id.as_ref());
        let [logical, history, stored] =
            [b.logical_size, b.history_size, b.stored_size].map(|size| or_dash(size.map(bytes)));
        [b.id.to_string(), name, parent, or_dash(b.parent_lsn), logical, history, stored, b.created_at.clone()]
    });
    let columns = ["id", "name", "parent", "parent lsn", "data", "history", "stored", "created"];
    output.print(answer, columns, rows)
}
