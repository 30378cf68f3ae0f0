//! `dormouse branches history` and `dormouse branches leases`.

use std::time::Duration;

use clap::{Args, Subcommand};
use control_plane_api::v2::{BranchHistoryEnvelope, Lease, LeaseEnvelope, LeaseFields, LeaseList, LeaseRequest};

use super::{
    super::{output::or_dash, select::segment},
    branches::{OneArguments, find},
};

/// A point of a branch's history.
#[derive(Args)]
pub struct PointArguments {
    /// This position of the branch's WAL
    #[arg(long, value_name = "LSN", conflicts_with = "at_timestamp")]
    pub at_lsn: Option<String>,
    /// This time (RFC 3339, as `date -u +%FT%TZ` prints it)
    #[arg(long, value_name = "TIME")]
    pub at_timestamp: Option<String>,
}

/// `history`.
#[derive(Args)]
pub struct HistoryArguments {
    #[command(flatten)]
    branch: OneArguments,
    #[command(flatten)]
    point: PointArguments,
}

/// What can be done with leases.
#[derive(Subcommand)]
pub enum LeaseCommand {
    /// Keep a position of a branch's history for some time, though it may fall out of the project's window
    #[command(
        after_help = "A lease is for work that reads one state for long, such as an export or an audit: until it ends, branches can be\nmade at its position.\n\nExamples:\n  dormouse branches leases create main --for 12h\n  dormouse branches leases create main --at-timestamp $(date -u -d '1 hour ago' +%FT%TZ) --for 30d"
    )]
    Create {
        #[command(flatten)]
        branch: OneArguments,
        #[command(flatten)]
        point: PointArguments,
        /// How long it holds, such as 90s, 12h or 30d (the longest)
        #[arg(long = "for", value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
        duration: Duration,
    },
    /// List a branch's leases
    List(OneArguments),
    /// End a lease before its time is over
    Delete {
        #[command(flatten)]
        branch: OneArguments,
        /// The lease's id, from `list`
        lease: String,
    },
}

/// Shows a branch's history.
pub async fn show(arguments: HistoryArguments) -> anyhow::Result<()> {
    let (api, path) = find(&arguments.branch).await?;
    let query = match (&arguments.point.at_lsn, &arguments.point.at_timestamp) {
        (Some(lsn), _) => format!("?lsn={}", segment(lsn)),
        (None, Some(time)) => format!("?timestamp={}", segment(time)),
        (None, None) => String::new(),
    };
    let answer: BranchHistoryEnvelope = api.get(&format!("{path}/history{query}")).await?;
    let history = answer.history.clone();
    let kept = humantime::format_duration(Duration::from_secs(history.history_retention_seconds)).to_string();
    let row = [
        kept,
        or_dash(history.start_lsn),
        or_dash(history.end_lsn),
        or_dash(history.end_timestamp),
        or_dash(history.lsn),
        or_dash(history.timestamp),
    ];
    arguments.branch.connection.output.print(
        &answer,
        ["window", "first lsn", "last lsn", "last commit", "lsn", "its last commit"],
        [row],
    )
}

/// Does it.
pub async fn run_lease(command: LeaseCommand) -> anyhow::Result<()> {
    match command {
        LeaseCommand::Create { branch, point, duration } => {
            let (api, path) = find(&branch).await?;
            let lease =
                LeaseFields { lsn: point.at_lsn, timestamp: point.at_timestamp, seconds: Some(duration.as_secs()) };
            let made: LeaseEnvelope = api.post(&format!("{path}/leases"), &LeaseRequest { lease }).await?;
            print(&branch, &made, std::slice::from_ref(&made.lease))
        }
        LeaseCommand::List(branch) => {
            let (api, path) = find(&branch).await?;
            let list: LeaseList = api.get(&format!("{path}/leases")).await?;
            print(&branch, &list, &list.leases)
        }
        LeaseCommand::Delete { branch, lease } => {
            let (api, path) = find(&branch).await?;
            let ended: LeaseEnvelope = api.delete(&format!("{path}/leases/{}", segment(&lease))).await?;
            print(&branch, &ended, std::slice::from_ref(&ended.lease))
        }
    }
}

fn print(branch: &OneArguments, answer: &impl serde::Serialize, leases: &[Lease]) -> anyhow::Result<()> {
    let rows = leases.iter().map(|l| [l.id.clone(), l.branch_id.to_string(), or_dash(l.lsn), l.expires_at.clone()]);
    branch.connection.output.print(answer, ["id", "branch", "lsn", "expires"], rows)
}
