//! Reading ahead of backends that read in order: batches of pages are fetched, several at a time, before they are asked for.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    thread::available_parallelism,
};

use tokio::{
    runtime::{Builder, Runtime},
    sync::{Semaphore, watch},
};
use types::{BlockNumber, PAGE_BYTES, PageTag, RelTag};

use crate::{PageCache, backend::ShimBackend};

/// Pages of one batch: they come with one request.
const BATCH_PAGES: BlockNumber = 32;

/// Batches that are fetched ahead of a reader.
const WINDOW_BATCHES: u32 = 8;

/// Batches on their way at a time, for all readers: 8 MiB at most.
const MAX_BATCHES: usize = 32;

/// Readers that are remembered; others begin anew.
const MAX_STREAMS: usize = 64;

/// Threads that fetch ahead at most.
const MAX_THREADS: usize = 4;

/// A batch: fork and number.
type Batch = (RelTag, u32);

/// Fetches ahead. Clones are the same.
#[derive(Clone)]
pub struct ReadAhead {
    backend: Arc<dyn ShimBackend>,
    cache: PageCache,
    state: Arc<Mutex<State>>,
    places: Arc<Semaphore>,
    threads: Arc<Threads>,
}

/// A runtime for reading ahead, made when something first is: a scan must not hold up commits.
#[derive(Default)]
struct Threads(OnceLock<Option<Runtime>>);

#[derive(Default)]
struct State {
    /// By fork: the first batch that has not been asked for, and the batch at which its reader was seen last.
    streams: Vec<(RelTag, u32, u32)>,
    next_victim: usize,
    /// Closed once the batch has arrived, or will not.
    on_their_way: HashMap<Batch, watch::Receiver<()>>,
}

impl ReadAhead {
    /// Pages of `backend` go to `cache`.
    pub fn new(backend: Arc<dyn ShimBackend>, cache: PageCache) -> ReadAhead {
        let places = Arc::new(Semaphore::new(MAX_BATCHES));
        ReadAhead { backend, cache, state: Arc::default(), places, threads: Arc::default() }
    }

    /// A backend reads this fork in order and is about to read this block: what follows is fetched. Returns at once.
    pub fn hint(&self, tag: &PageTag) {
        // Only a fork that is known to exist has an end; a reader has just asked for it.
        let Ok(Some(blocks)) = self.cache.rel_blocks(tag.rel) else { return };
        let here = tag.block / BATCH_PAGES;
        let end = blocks.div_ceil(BATCH_PAGES).min(here.saturating_add(WINDOW_BATCHES));
        // The lock must not be held by the loop: fetching takes it.
        let wanted = self.state().advance(tag.rel, here, end);
        for number in wanted {
            self.fetch((tag.rel, number), blocks);
        }
    }

    /// Waits for the batch that holds the page, if it is on its way.
    pub async fn wait_for(&self, tag: &PageTag) -> bool {
        let batch = (tag.rel, tag.block / BATCH_PAGES);
        let Some(mut arrival) = self.state().on_their_way.get(&batch).cloned() else { return false };
        // Nothing is ever sent: it ends when the sender goes.
        while arrival.changed().await.is_ok() {}
        true
    }

    /// Every change of the state is whole before anything can panic.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fetch(&self, batch: Batch, blocks: BlockNumber) {
        let Some(runtime) = self.threads.get() else { return };
        let Ok(place) = self.places.clone().try_acquire_owned() else { return };
        let (arrived, arrival) = watch::channel(());
        if self.state().on_their_way.insert(batch, arrival).is_some() {
            return;
        }
        let this = self.clone();
        runtime.spawn(async move {
            let first = batch.1 * BATCH_PAGES;
            let last = first.saturating_add(BATCH_PAGES).min(blocks);
            let missing = |block| {
                let tag = PageTag { rel: batch.0, block };
                (!this.cache.contains(tag).unwrap_or(true)).then_some(tag)
            };
            let tags: Vec<PageTag> = (first..last).filter_map(missing).collect();
            if !tags.is_empty() {
                this.fill(tags).await;
            }
            this.state().on_their_way.remove(&batch);
            drop((arrived, place));
        });
    }

    async fn fill(&self, tags: Vec<PageTag>) {
        let as_of = self.cache.shipped();
        let pages = match self.backend.get_pages_ahead(tags).await {
            Ok(pages) => pages,
            // Whoever needs one of them asks for it, and is told.
            Err(error) => return tracing::debug!(%error, "cannot read ahead"),
        };
        let mut whole: Vec<(PageTag, &[u8; PAGE_BYTES])> = Vec::with_capacity(pages.len());
        for (tag, page) in &pages {
            match page.as_ref().try_into() {
                Ok(page) => whole.push((*tag, page)),
                Err(_) => tracing::warn!(%tag, bytes = page.len(), "a page of odd length"),
            }
        }
        // This may wait for the disk: the thread is for nothing but reading ahead.
        if let Err(error) = self.cache.deposit_many(&whole, as_of) {
            tracing::warn!(%error, "cannot put pages into the page cache");
        }
    }
}

impl Threads {
    /// `None` when there can be no threads: then nothing is read ahead.
    fn get(&self) -> Option<&Runtime> {
        let made = self.0.get_or_init(|| {
            let threads = available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
            let made =
                Builder::new_multi_thread().worker_threads(threads).thread_name("read-ahead").enable_all().build();
            made.inspect_err(|error| tracing::warn!(%error, "no threads for reading ahead")).ok()
        });
        made.as_ref()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        // The last owner may be a task, which must not wait for threads.
        if let Some(runtime) = self.0.take().flatten() {
            runtime.shutdown_background();
        }
    }
}

impl State {
    /// The batches before `end` that a reader at `here` has not been given yet.
    fn advance(&mut self, rel: RelTag, here: u32, end: u32) -> std::ops::Range<u32> {
        let Some(stream) = self.streams.iter_mut().find(|(other, _, _)| *other == rel) else {
            let stream = (rel, end, here);
            if self.streams.len() < MAX_STREAMS {
                self.streams.push(stream);
            } else {
                self.streams[self.next_victim] = stream;
                self.next_victim = (self.next_victim + 1) % MAX_STREAMS;
            }
            return here..end;
        };
        // Several read one fork together (parallel scans): they go forward as one. Anywhere else a scan has begun.
        let near = here <= stream.1 && here + WINDOW_BATCHES >= stream.2;
        let from = if near { stream.1.max(here) } else { here };
        *stream = (rel, if near { stream.1.max(end) } else { end }, here);
        from..end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::ForkNumber;

    fn rel(number: u32) -> RelTag {
        RelTag { spc: 1663, db: 5, rel: number, fork: ForkNumber::Main }
    }

    #[test]
    fn a_reader_is_given_each_batch_once() {
        let mut state = State::default();
        assert_eq!(state.advance(rel(1), 0, 8), 0..8);
        assert_eq!(state.advance(rel(1), 0, 8), 8..8);
        assert_eq!(state.advance(rel(1), 1, 9), 8..9);
        assert_eq!(state.advance(rel(1), 4, 12), 9..12);
        // A second process of the same scan is a little behind.
        assert!(state.advance(rel(1), 3, 11).is_empty());
        assert_eq!(state.advance(rel(1), 5, 13), 12..13);
    }

    #[test]
    fn elsewhere_a_scan_begins_anew() {
        let mut state = State::default();
        state.advance(rel(1), 100, 108);
        assert_eq!(state.advance(rel(1), 0, 8), 0..8);
        assert_eq!(state.advance(rel(1), 50, 58), 50..58);
        (2..200).for_each(|number| assert_eq!(state.advance(rel(number), 0, 8), 0..8));
        assert_eq!(state.streams.len(), MAX_STREAMS);
    }
}
