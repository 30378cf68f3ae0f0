//! Turns at making pages: however much one project asks for at once, another's next request waits for one turn, not for all
//! of it.
//!
//! So many turns are given out at a time. Who asks for one when all are taken waits in the queue of its project; a turn that
//! is given back goes to the project that has waited longest since its last one.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use parking_lot::Mutex;
use tokio::sync::oneshot;
use types::ProjectId;

/// Gives out turns.
pub struct FairTurns {
    state: Mutex<State>,
}

struct State {
    free: usize,
    queues: HashMap<ProjectId, VecDeque<oneshot::Sender<Turn>>>,
    /// Each project with a queue once, the next to be served first.
    order: VecDeque<ProjectId>,
}

/// Permission to make some pages; given back when dropped.
pub struct Turn {
    /// `None` once it was given back in another way.
    turns: Option<Arc<FairTurns>>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(turns) = self.turns.take() {
            turns.give_back();
        }
    }
}

impl FairTurns {
    /// So many turns at a time.
    pub fn new(turns: usize) -> Arc<FairTurns> {
        let state = State { free: turns, queues: HashMap::new(), order: VecDeque::new() };
        Arc::new(FairTurns { state: Mutex::new(state) })
    }

    /// Waits for a turn; `None` only when the runtime is stopping.
    pub async fn take(self: &Arc<Self>, project: &ProjectId) -> Option<Turn> {
        let waiting = {
            let mut state = self.state.lock();
            if state.free > 0 {
                state.free -= 1;
                return Some(Turn { turns: Some(self.clone()) });
            }
            let (turn, waiting) = oneshot::channel();
            state.enqueue(project, turn);
            waiting
        };
        waiting.await.ok()
    }

    fn give_back(self: &Arc<Self>) {
        loop {
            let next = {
                let mut state = self.state.lock();
                match state.dequeue() {
                    Some(next) => next,
                    None => {
                        state.free += 1;
                        return;
                    }
                }
            };
            match next.send(Turn { turns: Some(self.clone()) }) {
                Ok(()) => return,
                // Who waited is gone: the next one gets it.
                Err(mut turn) => turn.turns = None,
            }
        }
    }
}

impl State {
    fn enqueue(&mut self, project: &ProjectId, turn: oneshot::Sender<Turn>) {
        let queue = self.queues.entry(project.clone()).or_default();
        if queue.is_empty() {
            self.order.push_back(project.clone());
        }
        queue.push_back(turn);
    }

    fn dequeue(&mut self) -> Option<oneshot::Sender<Turn>> {
        let project = self.order.pop_front()?;
        let queue = self.queues.get_mut(&project)?;
        let turn = queue.pop_front();
        if queue.is_empty() {
            self.queues.remove(&project);
        } else {
            self.order.push_back(project);
        }
        turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{FutureExt, StreamExt, stream::FuturesUnordered};

    fn project(name: &str) -> ProjectId {
        ProjectId::new(name).expect("id")
    }

    async fn take(turns: &Arc<FairTurns>, number: usize) -> Option<Turn> {
        turns.take(&project(&format!("p{number}"))).await
    }

    #[tokio::test]
    async fn a_flood_delays_others_by_one_turn_only() {
        let turns = FairTurns::new(2);
        let (flood, quiet) = (project("flood"), project("quiet"));
        let first = turns.take(&flood).await.expect("free");
        let _second = turns.take(&flood).await.expect("free");
        let mut flooding: FuturesUnordered<_> = (0..1000).map(|_| turns.take(&flood)).collect();
        assert!(flooding.next().now_or_never().is_none(), "all turns are taken");
        let mut asking = Box::pin(turns.take(&quiet));
        assert!(asking.as_mut().now_or_never().is_none());
        drop(first);
        let third = flooding.next().now_or_never().flatten().flatten().expect("the flood waited first");
        assert!(asking.as_mut().now_or_never().is_none());
        drop(third);
        assert!(asking.as_mut().now_or_never().flatten().is_some(), "and then it is the other's turn");
    }

    #[tokio::test]
    async fn turns_are_not_lost_with_those_who_gave_up() {
        let turns = FairTurns::new(1);
        let held = turns.take(&project("a")).await.expect("free");
        let mut waiting: Vec<_> = (0..50).map(|n| Box::pin(take(&turns, n))).collect();
        waiting.iter_mut().for_each(|take| assert!(take.as_mut().now_or_never().is_none()));
        let mut last = waiting.pop().expect("the last");
        drop(waiting);
        drop(held);
        let turn = last.as_mut().now_or_never().flatten().expect("all before it are gone");
        drop(turn);
        // One that was handed over and never taken comes back too.
        let (one, other) = (project("a"), project("b"));
        let held = turns.take(&one).now_or_never().flatten().expect("free");
        let mut never = Box::pin(turns.take(&other));
        assert!(never.as_mut().now_or_never().is_none());
        drop(held);
        drop(never);
        assert!(turns.take(&one).now_or_never().flatten().is_some());
    }
}
