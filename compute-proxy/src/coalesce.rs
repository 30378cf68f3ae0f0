//! One piece of work for all who ask for the same thing at the same time.

use std::{collections::HashMap, future::Future, hash::Hash, sync::Arc};

use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use parking_lot::Mutex;
use tokio::sync::oneshot;

type Running<K, V> = Arc<Mutex<HashMap<K, Shared<BoxFuture<'static, Option<V>>>>>>;

/// Work in progress, by what it is about.
pub struct Coalesce<K, V> {
    running: Running<K, V>,
}

impl<K, V> Default for Coalesce<K, V> {
    fn default() -> Self {
        Self { running: Arc::default() }
    }
}

impl<K, V> Coalesce<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Joins the work on `key`, or begins it. It goes on when all who wait have left. `None`: it panicked.
    pub async fn run<F>(&self, key: K, begin: impl FnOnce() -> F) -> Option<V>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let result = {
            let mut running = self.running.lock();
            match running.get(&key) {
                Some(result) => result.clone(),
                None => {
                    let (sender, receiver) = oneshot::channel();
                    let result = receiver.map(Result::ok).boxed().shared();
                    running.insert(key.clone(), result.clone());
                    let done = Done { key, running: self.running.clone() };
                    let work = begin();
                    tokio::spawn(async move {
                        let value = work.await;
                        // Whoever asks from now on begins anew: this answer may be too old for them.
                        drop(done);
                        // Nobody may be left to hear it.
                        let _ = sender.send(value);
                    });
                    result
                }
            }
        };
        result.await
    }
}

/// Takes the work off the list, even if it panics.
struct Done<K: Eq + Hash, V> {
    key: K,
    running: Running<K, V>,
}

impl<K: Eq + Hash, V> Drop for Done<K, V> {
    fn drop(&mut self) {
        self.running.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use super::*;

    #[tokio::test]
    async fn those_who_ask_together_share_the_answer() {
        let coalesce = Coalesce::<&str, usize>::default();
        let begun = Arc::new(AtomicUsize::new(0));
        let ask = |key| {
            let begun = begun.clone();
            coalesce.run(key, move || async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                begun.fetch_add(1, Ordering::SeqCst)
            })
        };
        assert_eq!(tokio::join!(ask("a"), ask("a")), (Some(0), Some(0)));
        assert_eq!(ask("a").await, Some(1), "later ones begin anew");
        assert!(coalesce.running.lock().is_empty());
    }

    #[tokio::test]
    async fn a_panic_is_no_answer_and_does_not_stay() {
        let coalesce = Coalesce::<(), ()>::default();
        assert_eq!(coalesce.run((), || async { panic!("on purpose") }).await, None);
        assert_eq!(coalesce.run((), || async {}).await, Some(()));
    }
}
