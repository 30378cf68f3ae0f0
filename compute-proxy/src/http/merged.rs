//! Work that those share who ask for the same thing at the same time. It ends when nobody waits for it any more.

use std::{collections::HashMap, future::Future, hash::Hash};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};
use parking_lot::Mutex;

type Work<V> = Shared<BoxFuture<'static, V>>;

/// Work in progress, by what it is about. Unlike `Coalesce`, whose work goes on for those who come later.
pub struct Merged<K, V: Clone> {
    running: Mutex<HashMap<K, WeakShared<BoxFuture<'static, V>>>>,
}

impl<K, V: Clone> Default for Merged<K, V> {
    fn default() -> Self {
        Self { running: Mutex::default() }
    }
}

impl<K: Copy + Eq + Hash, V: Clone> Merged<K, V> {
    /// Joins the work on `key`, or begins it.
    pub async fn run<F>(&self, key: K, begin: impl FnOnce() -> F) -> V
    where
        F: Future<Output = V> + Send + 'static,
    {
        let work = {
            let mut running = self.running.lock();
            match running.get(&key).and_then(WeakShared::upgrade) {
                // What is done may be too old for who asks now.
                Some(work) if work.peek().is_none() => work,
                _ => {
                    let work = begin().boxed().shared();
                    running.extend(work.downgrade().map(|work| (key, work)));
                    work
                }
            }
        };
        let waiting = Waiting { merged: self, key, work: Some(work.clone()) };
        let value = work.await;
        drop(waiting);
        value
    }
}

/// Somebody waits for work; the last one takes it off the list.
struct Waiting<'a, K: Copy + Eq + Hash, V: Clone> {
    merged: &'a Merged<K, V>,
    key: K,
    work: Option<Work<V>>,
}

impl<K: Copy + Eq + Hash, V: Clone> Drop for Waiting<'_, K, V> {
    fn drop(&mut self) {
        let mut running = self.merged.running.lock();
        let done = self.work.take().is_some_and(|work| work.peek().is_some());
        // It may be the next one's by now.
        let current = running.get(&self.key).and_then(WeakShared::upgrade);
        if current.is_none_or(|current| done && current.peek().is_some()) {
            running.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        time::Duration,
    };

    use tokio::time::{sleep, timeout};

    use super::*;

    #[derive(Clone, Default)]
    struct Counts {
        begun: Arc<AtomicUsize>,
        done: Arc<AtomicUsize>,
    }

    impl Counts {
        async fn work(self) -> usize {
            let number = self.begun.fetch_add(1, Ordering::SeqCst);
            sleep(Duration::from_millis(100)).await;
            self.done.fetch_add(1, Ordering::SeqCst);
            number
        }
    }

    #[tokio::test]
    async fn those_who_ask_together_share_the_answer() {
        let (merged, counts) = (Merged::default(), Counts::default());
        let ask = |key: u8| merged.run(key, || counts.clone().work());
        let (one, two, other) = tokio::join!(ask(1), ask(1), ask(2));
        assert_eq!((one, two, other), (0, 0, 1));
        assert_eq!(ask(1).await, 2, "later ones begin anew");
        assert!(merged.running.lock().is_empty());
    }

    #[tokio::test]
    async fn work_goes_on_while_somebody_waits_and_no_longer() {
        let (merged, counts) = (Merged::default(), Counts::default());
        let ask = || merged.run(1, || counts.clone().work());
        let impatient = timeout(Duration::from_millis(50), ask());
        let (gone, patient) = tokio::join!(impatient, ask());
        assert!(gone.is_err() && patient == 0);
        assert!(timeout(Duration::from_millis(50), ask()).await.is_err());
        sleep(Duration::from_millis(200)).await;
        assert_eq!((counts.begun.load(Ordering::SeqCst), counts.done.load(Ordering::SeqCst)), (2, 1));
        assert!(merged.running.lock().is_empty());
    }
}
