//! The branches that are in memory: loaded when asked for, dropped when idle.

use std::{
    collections::HashMap,
    fs::File,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use types::{BranchRef, NodeId};

use crate::branch::{BranchActor, BranchCommand, BranchView};

/// Messages that may wait for a branch; each is at most some MiB.
const INBOX_MESSAGES: usize = 32;

pub(crate) struct Registry {
    node: NodeId,
    data_dir: PathBuf,
    idle_after: Duration,
    branches: Mutex<Branches>,
    /// See [`BranchActor`]'s.
    lock: Arc<File>,
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
}

impl Registry {
    pub fn new(node: NodeId, data_dir: PathBuf, idle_after: Duration, lock: Arc<File>) -> Registry {
        Registry { node, data_dir, idle_after, branches: Mutex::default(), lock }
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
        let handle = Arc::new(BranchHandle { inbox, view, directory: directory.clone() });
        branches.handles.insert(branch.clone(), Arc::clone(&handle));
        while branches.actors.try_join_next().is_some() {}
        let (registry, lock) = (Arc::downgrade(self), Arc::clone(&self.lock));
        let actor = BranchActor::new(self.node, branch.clone(), directory, publish, registry, lock);
        branches.actors.spawn(actor.run(commands, self.idle_after));
        Some(handle)
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
