//! A future that is polled again at once when it has woken itself.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use futures::task::AtomicWaker;

/// How often it is polled again before others of its thread get their turn.
const AGAIN_MAX: usize = 8;

/// Nobody polls it: who wakes it wakes its task.
const IDLE: u8 = 0;
/// It is being polled.
const POLLED: u8 = 1;
/// It is being polled and was woken meanwhile.
const WOKEN: u8 = 2;

/// Polls a future, and again when that has woken itself.
///
/// A connection of HTTP/1.1 wakes itself with each request, as whoever reads the body asks for more of it in the same task.
/// By way of the scheduler that costs a system call that wakes another thread, which then looks for work and may take the
/// connection over.
pub struct Again<'a, F> {
    future: Pin<&'a mut F>,
    waker: Waker,
    state: Arc<State>,
}

struct State {
    phase: AtomicU8,
    task: AtomicWaker,
}

impl Wake for State {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let noted = self.phase.compare_exchange(POLLED, WOKEN, Ordering::AcqRel, Ordering::Acquire);
        if noted == Err(IDLE) {
            self.task.wake();
        }
    }
}

impl<'a, F> Again<'a, F> {
    /// Polls `future`.
    pub fn new(future: Pin<&'a mut F>) -> Self {
        let state = Arc::new(State { phase: AtomicU8::new(IDLE), task: AtomicWaker::new() });
        Self { future, waker: state.clone().into(), state }
    }
}

impl<F: Future> Future for Again<'_, F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let Self { future, waker, state } = &mut *self;
        state.task.register(context.waker());
        for _ in 0..AGAIN_MAX {
            state.phase.store(POLLED, Ordering::Release);
            let polled = future.as_mut().poll(&mut Context::from_waker(waker));
            let at_rest = state.phase.compare_exchange(POLLED, IDLE, Ordering::AcqRel, Ordering::Acquire).is_ok();
            if at_rest || polled.is_ready() {
                return polled;
            }
        }
        state.phase.store(IDLE, Ordering::Release);
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin, sync::atomic::AtomicUsize, time::Duration};

    use tokio::{sync::oneshot, task::yield_now, time::timeout};

    use super::*;

    /// Counts how often a task is woken.
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn wakes_itself(mut times: usize) -> impl Future<Output = ()> {
        poll_fn(move |context| {
            if times == 0 {
                return Poll::Ready(());
            }
            times -= 1;
            context.waker().wake_by_ref();
            Poll::Pending
        })
    }

    #[test]
    fn what_wakes_itself_does_not_wake_its_task() {
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(count.clone());
        let mut future = pin!(wakes_itself(AGAIN_MAX - 1));
        let mut again = Again::new(future.as_mut());
        assert!(Pin::new(&mut again).poll(&mut Context::from_waker(&waker)).is_ready());
        assert_eq!(count.0.load(Ordering::SeqCst), 0);
        // Others get their turn in between.
        let mut future = pin!(wakes_itself(AGAIN_MAX));
        let mut again = Again::new(future.as_mut());
        assert!(Pin::new(&mut again).poll(&mut Context::from_waker(&waker)).is_pending());
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert!(Pin::new(&mut again).poll(&mut Context::from_waker(&waker)).is_ready());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn no_wake_is_lost() {
        for round in 0..2000 {
            let (sender, receiver) = oneshot::channel();
            tokio::spawn(async move {
                if round % 2 == 0 {
                    yield_now().await;
                }
                sender.send(round).expect("somebody waits");
            });
            let waiting = async {
                wakes_itself(round % 11).await;
                receiver.await.expect("sent")
            };
            let mut waiting = pin!(waiting);
            let answer = timeout(Duration::from_secs(20), Again::new(waiting.as_mut()));
            assert_eq!(answer.await.expect("woken"), round);
        }
    }
}
