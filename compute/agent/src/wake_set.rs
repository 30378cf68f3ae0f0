//! What Postgres reads in its first second, kept over a sleep: the next start has it there before Postgres asks for it.
//!
//! A hint and nothing more: pages and sizes are fetched anew, as of where the start found the end of WAL. The list travels
//! as a small file of the branch's base files, so that branches have it from their parents.

use std::{sync::Arc, time::Duration};

use page_cache::PageCache;
use pageserver_client::ClientError;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio_util::sync::DropGuard;
use types::{BlockNumber, Lsn, PageTag, RelTag};
use wire::pageserver::{BaseFiles, MAX_PAGES_PER_REQUEST, ReadLsn};

use crate::backend::AgentBackend;

/// Its path among the base files; it is not written to the data directory.
pub const WAKE_SET_FILE: &str = "dormouse.wake_set";

/// First byte of the file.
const VERSION: u8 = 1;

/// Most pages, and most forks, that are noted.
const MAX_PAGES: usize = 512;
const MAX_RELS: usize = 512;

/// How long reads are noted.
const NOTED_FOR: Duration = Duration::from_secs(1);

/// A start waits no longer than this for what only makes it faster.
const FETCH_LIMIT: Duration = Duration::from_millis(500);

/// Pages and forks, in order, each once.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WakeSet {
    version: u8,
    pages: Vec<PageTag>,
    rels: Vec<RelTag>,
}

impl WakeSet {
    /// What the last compute left; empty when there is nothing of use.
    pub fn kept(base: &BaseFiles) -> WakeSet {
        let file = base.files.iter().find(|file| file.path == WAKE_SET_FILE);
        file.and_then(|file| WakeSet::decode(&file.content)).unwrap_or_default()
    }

    fn new(mut pages: Vec<PageTag>, mut rels: Vec<RelTag>) -> WakeSet {
        pages.sort_unstable();
        rels.sort_unstable();
        WakeSet { version: VERSION, pages, rels }
    }

    fn decode(content: &[u8]) -> Option<WakeSet> {
        let set: WakeSet = postcard::from_bytes(content).ok()?;
        (set.version == VERSION && set.pages.len() <= MAX_PAGES && set.rels.len() <= MAX_RELS).then_some(set)
    }

    /// Fetches everything as of `at`, where the compute's WAL begins, into the cache. `done` is dropped at the end, for
    /// better or worse: until then no backend may learn of a fork otherwise, so that none can have changed it.
    pub async fn prefill(self, backend: Arc<AgentBackend>, cache: PageCache, at: Lsn, done: DropGuard) {
        match tokio::time::timeout(FETCH_LIMIT, self.fetch(&backend, at)).await {
            Ok(Ok(fetched)) => {
                let deposited = tokio::task::spawn_blocking(move || fetched.deposit(&backend, &cache, at)).await;
                if !matches!(deposited, Ok(Ok(()))) {
                    tracing::warn!(?deposited, "filling the page cache ahead");
                }
            }
            Ok(Err(error)) => tracing::warn!(%error, "fetching pages ahead"),
            Err(_) => tracing::warn!("fetching pages ahead took too long"),
        }
        drop(done);
    }

    async fn fetch(self, backend: &Arc<AgentBackend>, at: Lsn) -> Result<Fetched, ClientError> {
        let at = ReadLsn { request: at, not_modified_since: at };
        let (mut sizes, mut pages) = (JoinSet::new(), JoinSet::new());
        for tags in self.pages.chunks(MAX_PAGES_PER_REQUEST) {
            let (backend, tags) = (backend.clone(), tags.to_vec());
            pages.spawn(async move {
                let pages = backend.pageserver.get_pages(&backend.branch, tags.clone(), at).await?;
                Ok::<_, ClientError>(tags.into_iter().zip(pages).collect::<Vec<_>>())
            });
        }
        for rel in self.rels {
            let backend = backend.clone();
            sizes.spawn(async move { (rel, backend.pageserver.rel_size(&backend.branch, rel, at).await) });
        }
        let mut fetched = Fetched::default();
        for (rel, blocks) in sizes.join_all().await {
            fetched.sizes.push((rel, blocks?));
        }
        for chunk in pages.join_all().await {
            fetched.pages.extend(chunk?);
        }
        Ok(fetched)
    }
}

#[derive(Default)]
struct Fetched {
    sizes: Vec<(RelTag, Option<BlockNumber>)>,
    pages: Vec<(PageTag, bytes::Bytes)>,
}

impl Fetched {
    fn deposit(&self, backend: &AgentBackend, cache: &PageCache, at: Lsn) -> std::io::Result<()> {
        for (rel, blocks) in &self.sizes {
            cache.prefill_rel_size(*rel, *blocks)?;
        }
        for (tag, page) in &self.pages {
            let current = backend.last_written.page(tag) <= at && page.iter().any(|byte| *byte != 0);
            if let Ok(page) = page.as_ref().try_into()
                && current
            {
                cache.deposit(*tag, page, at)?;
            }
        }
        cache.forget_uses();
        Ok(())
    }
}

/// Notes what is read.
pub struct WakeNotes {
    before: WakeSet,
    cache: PageCache,
    noted: Arc<Mutex<Option<WakeSet>>>,
}

impl WakeNotes {
    /// To be made when Postgres is ready. `before` is what was fetched for this start.
    pub fn begin(before: WakeSet, cache: PageCache) -> WakeNotes {
        let noted = Arc::new(Mutex::new(None));
        let notes = WakeNotes { before, cache, noted };
        let later = WakeNotes { before: WakeSet::default(), cache: notes.cache.clone(), noted: notes.noted.clone() };
        tokio::spawn(async move {
            tokio::time::sleep(NOTED_FOR).await;
            later.finish();
        });
        notes
    }

    /// What is read from now on does not count any more.
    pub fn finish(&self) {
        let mut noted = self.noted.lock();
        noted.get_or_insert_with(|| WakeSet::new(self.cache.used_pages(MAX_PAGES), self.cache.known_rels(MAX_RELS)));
    }

    /// The file to keep; `None` when the one that is kept is as good.
    pub fn to_keep(&self) -> Option<Vec<u8>> {
        let noted = self.noted.lock();
        let set = noted.as_ref().filter(|set| **set != self.before)?;
        postcard::to_stdvec(set).inspect_err(|error| tracing::warn!(%error, "what was read is not kept")).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::ForkNumber;

    fn tag(rel: u32, block: u32) -> PageTag {
        PageTag { rel: RelTag { spc: 1663, db: 5, rel, fork: ForkNumber::Main }, block }
    }

    fn base(content: Vec<u8>) -> BaseFiles {
        let file = wire::pageserver::BaseFile { path: WAKE_SET_FILE.to_owned(), content: content.into() };
        BaseFiles {
            lsn: Lsn(1),
            prev_record_lsn: Lsn(0),
            control_file: bytes::Bytes::new(),
            checkpoint: bytes::Bytes::new(),
            files: vec![file],
            directories: Vec::new(),
            tablespaces: Vec::new(),
            unlogged: Vec::new(),
        }
    }

    #[test]
    fn a_set_comes_back_and_its_order_does_not_matter() {
        let set = WakeSet::new(vec![tag(2, 1), tag(1, 7)], vec![tag(2, 0).rel, tag(1, 0).rel]);
        assert_eq!(set, WakeSet::new(vec![tag(1, 7), tag(2, 1)], vec![tag(1, 0).rel, tag(2, 0).rel]));
        assert_eq!(WakeSet::kept(&base(postcard::to_stdvec(&set).expect("encodes"))), set);
    }

    #[test]
    fn what_is_damaged_or_too_large_or_foreign_counts_as_nothing() {
        let large = WakeSet::new((0..=MAX_PAGES as u32).map(|block| tag(1, block)).collect(), Vec::new());
        let foreign = WakeSet { version: VERSION + 1, ..WakeSet::new(vec![tag(1, 1)], Vec::new()) };
        for set in [&large, &foreign] {
            assert_eq!(WakeSet::kept(&base(postcard::to_stdvec(set).expect("encodes"))), WakeSet::default());
        }
        assert_eq!(WakeSet::kept(&base(vec![1, 255, 255, 255, 255, 15])), WakeSet::default());
        assert_eq!(WakeSet::kept(&base(Vec::new())), WakeSet::default());
    }
}
