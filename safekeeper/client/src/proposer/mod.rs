//! A compute's WAL, shipped to a majority of safekeepers.

mod driver;
mod peer;
mod scanner;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep};
use types::{BranchRef, Lsn, Membership, MembershipGeneration, NodeId, Term};

use self::driver::{Command, Driver, Told};

/// How often it is looked whether safekeepers have caught up.
const CATCH_UP_INTERVAL: Duration = Duration::from_millis(20);

/// A won term, through which WAL is shipped. Cheap to clone; the work is done by a task that ends with the last clone.
#[derive(Clone)]
pub struct WalProposer {
    commands: mpsc::UnboundedSender<Command>,
    progress: watch::Receiver<Progress>,
    /// Only says whether and why it is fenced, so that who waits for that is not woken by each commit.
    fence: watch::Receiver<Option<Arc<str>>>,
    end_lsn: Arc<Mutex<Lsn>>,
}

/// What a proposer is given.
#[derive(Clone)]
pub struct ProposerConfig {
    /// The branch.
    pub branch: BranchRef,
    /// The branch's safekeepers.
    pub membership: Membership,
    /// Whether it goes over to a newer membership that a safekeeper has been told of. The control plane, which makes them, does not:
    /// its own election then ends with [`ElectError::Outdated`].
    pub follows_membership: bool,
    /// A token that allows the branch. Never logged.
    pub token: String,
    /// Where the branch's WAL begins when no safekeeper has any of it yet.
    pub branch_start_lsn: Lsn,
    /// The cluster's identifier (`pg_control`); safekeepers that know another one refuse.
    pub system_identifier: Option<u64>,
}

/// A term that was won.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Elected {
    /// The term.
    pub term: Term,
    /// End of the log, committed: WAL is appended from here.
    pub start_lsn: Lsn,
}

/// Why no term was won.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ElectError {
    /// The configuration makes no sense.
    #[error("{0}")]
    Config(String),
    /// The token is no good.
    #[error("{0}")]
    Denied(String),
    /// Somebody else won a newer term meanwhile.
    #[error("fenced: {0}")]
    Fenced(String),
    /// The branch has been deleted from the safekeepers.
    #[error("the branch has been deleted")]
    Deleted,
    /// The safekeepers know a newer membership than this proposer was given.
    #[error("safekeepers know membership {known} of the branch, {given} was given")]
    Outdated {
        /// Of the configuration.
        given: MembershipGeneration,
        /// Theirs.
        known: MembershipGeneration,
    },
}

/// How far a proposer has come with its membership.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MembershipStatus {
    /// The membership by which it counts.
    pub generation: MembershipGeneration,
    /// It has committed under it: a joint one may be completed.
    pub established: bool,
    /// Members that do not have, as far as is known, everything that is committed.
    pub lagging: Vec<NodeId>,
}

/// A newer term was won by somebody else: nothing will be committed through this proposer any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("fenced: {0}")]
pub struct Fenced(
    /// By what.
    pub String,
);

#[derive(Debug, Clone, Default)]
struct Progress {
    commit_lsn: Lsn,
    fenced: Option<Arc<str>>,
}

impl WalProposer {
    /// Wins a term above all earlier ones, which fences whoever held them, and brings a majority up to the log's end.
    ///
    /// Waits, and logs why, while no majority answers. Errors only when waiting is of no use. Dropping the future gives up.
    pub async fn elect(config: ProposerConfig) -> Result<(WalProposer, Elected), ElectError> {
        check(&config)?;
        let (commands, command_queue) = mpsc::unbounded_channel();
        let (progress, watcher) = watch::channel(Progress::default());
        let (fence, fence_watcher) = watch::channel(None);
        let (result, elected) = oneshot::channel();
        tokio::spawn(Driver::new(config, Told { progress, fence }, result).run(command_queue));
        let elected =
            elected.await.unwrap_or_else(|_| Err(ElectError::Config("the proposer's task ended".to_owned())))?;
        let end_lsn = Arc::new(Mutex::new(elected.start_lsn));
        Ok((WalProposer { commands, progress: watcher, fence: fence_watcher, end_lsn }, elected))
    }

    /// Takes WAL to be shipped and returns at once. It must follow on what was appended before (first: on
    /// [`Elected::start_lsn`]) and end at the end of a whole record.
    ///
    /// # Panics
    /// When `begin` is not the log's end: shipping on would corrupt the log.
    pub fn append(&self, begin: Lsn, wal: Bytes) -> Result<(), Fenced> {
        // The lock is held while sending, so that appends from several tasks are queued in the order of their positions.
        let mut end_lsn = self.end_lsn.lock().unwrap_or_else(PoisonError::into_inner);
        assert_eq!(begin, *end_lsn, "WAL must be appended at the log's end");
        if let Some(reason) = self.fenced() {
            return Err(Fenced(reason));
        }
        let length = wal.len() as u64;
        self.commands.send(Command::Append(wal)).map_err(|_| self.stopped())?;
        *end_lsn += length;
        Ok(())
    }

    /// Names the cluster's identifier, when it was not known at the election: safekeepers are told with the next WAL.
    pub fn identify(&self, system_identifier: u64) -> Result<(), Fenced> {
        self.commands.send(Command::Identify(system_identifier)).map_err(|_| self.stopped())
    }

    /// Up to here a majority holds the WAL durably.
    pub fn commit_lsn(&self) -> Lsn {
        self.progress.borrow().commit_lsn
    }

    /// Waits until a majority holds the WAL up to `lsn`, for ever while a majority can't be reached. Cancel-safe.
    pub async fn wait_committed(&self, lsn: Lsn) -> Result<(), Fenced> {
        let mut progress = self.progress.clone();
        let reached = progress.wait_for(|p| p.commit_lsn >= lsn || p.fenced.is_some()).await;
        match reached {
            Ok(progress) if progress.commit_lsn >= lsn => Ok(()),
            Ok(progress) => Err(Fenced(progress.fenced.as_deref().unwrap_or_default().to_owned())),
            Err(_) => Err(self.stopped()),
        }
    }

    /// Why this proposer is fenced, if it is.
    pub fn fenced(&self) -> Option<String> {
        self.progress.borrow().fenced.as_deref().map(str::to_owned)
    }

    /// Waits until this proposer is fenced. Cancel-safe.
    pub async fn wait_fenced(&self) -> Fenced {
        let mut fence = self.fence.clone();
        let fenced = fence.wait_for(Option::is_some).await.ok().and_then(|fenced| fenced.clone());
        fenced.map_or_else(|| self.stopped(), |reason| Fenced(reason.to_string()))
    }

    /// Goes over to a newer membership; an older one changes nothing.
    pub fn set_membership(&self, membership: Membership) -> Result<(), Fenced> {
        self.commands.send(Command::SetMembership(membership)).map_err(|_| self.stopped())
    }

    /// How far it has come with its membership.
    pub async fn membership(&self) -> Result<MembershipStatus, Fenced> {
        let (reply, status) = oneshot::channel();
        self.commands.send(Command::Membership(reply)).map_err(|_| self.stopped())?;
        status.await.map_err(|_| self.stopped())
    }

    /// Waits until everything is committed and all reachable safekeepers have stored that it is, and closes the connections.
    /// One that is waiting to be reached again is tried at once. Takes at most 3 seconds.
    pub async fn finish(self) {
        let (reply, finished) = oneshot::channel();
        if self.commands.send(Command::Finish(reply)).is_ok() {
            // An error means that the task is gone, which is what was wanted.
            let _ = finished.await;
        }
    }

    fn stopped(&self) -> Fenced {
        Fenced(self.fenced().unwrap_or_else(|| "the proposer has been finished".to_owned()))
    }
}

/// The commit position of a branch that has no compute: wins a term, so that whatever reached a majority is known to be
/// committed, and lets it go again. Fences a compute that runs after all.
pub async fn settle(config: ProposerConfig) -> Result<Lsn, ElectError> {
    let (proposer, elected) = WalProposer::elect(config).await?;
    proposer.finish().await;
    Ok(elected.start_lsn)
}

/// [`settle`] for a branch whose membership changes: under the joint membership, so that this is established, and waiting, at most
/// so long, until these safekeepers have everything that is committed. Answers which of them have not.
pub async fn carry_over(config: ProposerConfig, to: &[NodeId], limit: Duration) -> Result<Vec<NodeId>, ElectError> {
    let (proposer, _) = WalProposer::elect(config).await?;
    let deadline = Instant::now() + limit;
    let lagging = loop {
        let status = proposer.membership().await.map_err(|Fenced(reason)| ElectError::Fenced(reason))?;
        let lagging: Vec<NodeId> = status.lagging.into_iter().filter(|node| to.contains(node)).collect();
        if lagging.is_empty() || Instant::now() >= deadline {
            break lagging;
        }
        sleep(CATCH_UP_INTERVAL).await;
    };
    proposer.finish().await;
    Ok(lagging)
}

fn check(config: &ProposerConfig) -> Result<(), ElectError> {
    config.membership.check().map_err(|error| ElectError::Config(error.to_string()))?;
    if !config.branch_start_lsn.is_valid() {
        return Err(ElectError::Config("branch_start_lsn is 0/0".to_owned()));
    }
    Ok(())
}
