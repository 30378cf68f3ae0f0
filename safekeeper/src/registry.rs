//! The branches that are in memory: loaded when asked for, dropped when idle.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bucket::BranchWal;
use safekeeper_protocol::message::NodeStatus;
use tokio::{
    sync::{mpsc, watch},
    task::{JoinSet, spawn_blocking},
    time::sleep,
};
use tracing::warn;
use types::{BranchRef, NodeId};

use crate::{
    branch::{BranchActor, BranchCommand, BranchView, Settings},
    health::free_bytes,
    storage::has_wal,
};

/// Messages that may wait for a branch; each is at most some MiB.
const INBOX_MESSAGES: usize = 32;
/// Between two branches that are loaded because nobody asks for them.
const LOAD_PAUSE: Duration = Duration::from_millis(5);

pub(crate) struct Registry {
    data_dir: PathBuf,
    settings: Settings,
    branches: Mutex<Branches>,
}

#[derive(Default)]
struct Branches {
    closed: bool,
    handles: HashMap<BranchRef, Arc<BranchHandle>>,
    actors: JoinSet<()>,
}

/// A branch in memory. As long as somebody holds one, it stays there.
pub(crate) struct BranchHandle {
    pub inbox: mpsc::Sender<BranchCommand>,
    pub view: watch::Receiver<BranchView>,
    pub directory: PathBuf,
    /// What the object store has of its WAL; `None` when there is no object store.
    pub stored: Option<BranchWal>,
}

impl BranchHandle {
    /// The branch once its files have been read; `None` when the server is stopping.
    pub async fn loaded(&self) -> Option<BranchView> {
        let mut view = self.view.clone();
        let there = view.wait_for(|view| !matches!(view, BranchView::Loading)).await;
        there.ok().map(|view| view.clone())
    }
}

impl Registry {
    pub fn new(data_dir: PathBuf, settings: Settings) -> Registry {
        Registry { data_dir, settings, branches: Mutex::default() }
    }

    /// The branch, loaded if need be; `None` when the server is stopping.
    pub fn get(self: &Arc<Self>, branch: &BranchRef) -> Option<Arc<BranchHandle>> {
        let mut branches = self.lock();
        if branches.closed {
            return None;
        }
        if let Some(handle) = branches.handles.get(branch)
            && !handle.inbox.is_closed()
        {
            return Some(Arc::clone(handle));
        }
        let (inbox, commands) = mpsc::channel(INBOX_MESSAGES);
        let (publish, view) = watch::channel(BranchView::Loading);
        // Ids are DNS labels: they can't leave the directory.
        let directory = self.data_dir.join(branch.project.as_str()).join(branch.branch.as_str());
        let stored = self.settings.offload.as_ref().map(|offload| offload.wal_of(branch));
        let handle = Arc::new(BranchHandle { inbox, view, directory: directory.clone(), stored });
        branches.handles.insert(branch.clone(), Arc::clone(&handle));
        while branches.actors.try_join_next().is_some() {}
        let actor = BranchActor::new(&self.settings, branch.clone(), directory, publish, Arc::downgrade(self));
        branches.actors.spawn(actor.run(commands, self.settings.idle_after));
        Some(handle)
    }

    /// This safekeeper's number.
    pub fn node(&self) -> NodeId {
        self.settings.node
    }

    /// How this safekeeper does.
    pub fn status(&self) -> NodeStatus {
        NodeStatus {
            node: self.settings.node,
            trouble: self.settings.health.trouble(),
            free_bytes: free_bytes(&self.data_dir),
            loaded_branches: self.lock().handles.len() as u64,
            replication: self.settings.replication.clone(),
        }
    }

    /// Tries a disk that has failed now and then. Never ends.
    pub async fn watch_disk(self: Arc<Self>) {
        self.settings.health.watch(self.data_dir.clone()).await;
    }

    /// Loads the branches that have WAL on the local disk, a few at a time, so that it goes to the object store: nobody else may ask for them
    /// after a start.
    pub async fn load_unfinished(self: Arc<Self>) {
        if self.settings.offload.is_none() {
            return;
        }
        let data_dir = self.data_dir.clone();
        let found = spawn_blocking(move || with_wal(&data_dir)).await;
        match found {
            Ok(Ok(branches)) => {
                for branch in branches {
                    self.get(&branch);
                    sleep(LOAD_PAUSE).await;
                }
            }
            Ok(Err(error)) => warn!(%error, "can't look for WAL that has not been copied to the object store"),
            Err(_stopping) => {}
        }
    }

    /// Forgets a branch that nobody uses; false when somebody does.
    pub fn release(&self, branch: &BranchRef) -> bool {
        let mut branches = self.lock();
        let unused = branches.handles.get(branch).is_none_or(|handle| Arc::strong_count(handle) == 1);
        if unused {
            branches.handles.remove(branch);
        }
        unused
    }

    /// Ends all branches; each finishes what it is writing.
    pub async fn close(&self) {
        let actors = {
            let mut branches = self.lock();
            branches.closed = true;
            branches.handles.clear();
            std::mem::take(&mut branches.actors)
        };
        actors.join_all().await;
    }

    fn lock(&self) -> MutexGuard<'_, Branches> {
        self.branches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn with_wal(data_dir: &Path) -> std::io::Result<Vec<BranchRef>> {
    let mut branches = Vec::new();
    for project in directories(data_dir)? {
        for branch in directories(&data_dir.join(&project))? {
            let ids = (project.parse(), branch.parse());
            if let (Ok(project_id), Ok(branch_id)) = ids
                && has_wal(&data_dir.join(&project).join(&branch))?
            {
                branches.push(BranchRef { project: project_id, branch: branch_id });
            }
        }
    }
    Ok(branches)
}

fn directories(parent: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(parent)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.extend(entry.file_name().into_string());
        }
    }
    Ok(names)
}
