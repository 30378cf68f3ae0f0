//! `dormouse safekeepers`.

use std::time::Duration;

use clap::{Args, Subcommand};
use control_plane_api::safekeepers::{AddSafekeeper, SafekeeperState, Safekeepers};
use types::NodeId;

use super::super::{Api, Connection};

/// How often progress is asked for.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

const GIB: f64 = (1 << 30) as f64;

/// What can be done with safekeepers. Writes go on meanwhile.
#[derive(Subcommand)]
pub enum SafekeeperCommand {
    /// List the safekeepers, and how far branches have come with the last change
    List {
        #[command(flatten)]
        connection: Connection,
    },
    /// Have every branch kept by a further safekeeper, which runs already
    Add {
        #[command(flatten)]
        new: NewSafekeeper,
        #[command(flatten)]
        following: Following,
    },
    /// Put a new safekeeper, which runs already, in the place of another, which may be gone
    Replace {
        /// Number of the one that leaves
        old: u64,
        #[command(flatten)]
        new: NewSafekeeper,
        #[command(flatten)]
        following: Following,
    },
    /// Have no branch kept by a safekeeper any more. Said again of one that is leaving and will never answer: forget it
    Remove {
        /// Its number
        id: u64,
        #[command(flatten)]
        following: Following,
    },
}

/// A safekeeper that is new.
#[derive(Args)]
pub struct NewSafekeeper {
    /// Its number, which no safekeeper has had before
    id: u64,
    /// Where it is reached, as host:port
    address: String,
}

/// Whether to wait.
#[derive(Args)]
pub struct Following {
    /// Do not wait until all branches have followed
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    connection: Connection,
}

/// Does it.
pub async fn run(command: SafekeeperCommand) -> anyhow::Result<()> {
    match command {
        SafekeeperCommand::List { connection } => {
            let answer = Api::new(&connection)?.get("/safekeepers").await?;
            print(&connection, &answer)
        }
        SafekeeperCommand::Add { new, following } => {
            let api = Api::new(&following.connection)?;
            let answer = api.post("/safekeepers", &new.request()).await?;
            follow(&api, following, answer).await
        }
        SafekeeperCommand::Replace { old, new, following } => {
            let api = Api::new(&following.connection)?;
            let answer = api.post(&format!("/safekeepers/{old}/replace"), &new.request()).await?;
            follow(&api, following, answer).await
        }
        SafekeeperCommand::Remove { id, following } => {
            let api = Api::new(&following.connection)?;
            let answer = api.delete(&format!("/safekeepers/{id}")).await?;
            follow(&api, following, answer).await
        }
    }
}

impl NewSafekeeper {
    fn request(self) -> AddSafekeeper {
        AddSafekeeper { id: NodeId(self.id), address: self.address }
    }
}

/// Shows progress until all branches have followed.
async fn follow(api: &Api, following: Following, begun: Safekeepers) -> anyhow::Result<()> {
    let (mut now, mut shown) = (begun, None);
    while !following.no_wait && now.branches.changing > 0 {
        let progress = (now.branches.changing, now.branches.troubles.first().cloned());
        if shown.as_ref() != Some(&progress) {
            let (done, total) = (now.branches.total - now.branches.changing, now.branches.total);
            eprintln!("{done} of {total} branches have followed");
            progress.1.iter().for_each(|trouble| eprintln!("  {trouble}"));
            shown = Some(progress);
        }
        tokio::time::sleep(PROGRESS_INTERVAL).await;
        now = api.get("/safekeepers").await?;
    }
    print(&following.connection, &now)
}

fn print(connection: &Connection, answer: &Safekeepers) -> anyhow::Result<()> {
    let rows = answer.safekeepers.iter().map(|safekeeper| {
        let state = match safekeeper.state {
            SafekeeperState::Member => "member",
            SafekeeperState::Leaving => "leaving",
        };
        let (id, branches) = (safekeeper.id.to_string(), safekeeper.branches.to_string());
        let free = safekeeper.free_bytes.map_or("?".to_owned(), |bytes| format!("{:.1}", bytes as f64 / GIB));
        let trouble = safekeeper.trouble.clone().unwrap_or_default();
        [id, safekeeper.address.clone(), state.to_owned(), branches, free, trouble]
    });
    connection.output.print(answer, ["id", "address", "state", "branches", "free GiB", "trouble"], rows)?;
    if answer.branches.changing > 0 {
        eprintln!("{} of {} branches are on their way", answer.branches.changing, answer.branches.total);
        answer.branches.troubles.iter().for_each(|trouble| eprintln!("  {trouble}"));
    }
    Ok(())
}
