//! `CREATE DATABASE ... STRATEGY file_copy`: its WAL says only "copy that directory", so the pages are copied here.

use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use types::{Lsn, PageTag};

use super::plan::DatabaseCopy;
use crate::{
    branch::{Branch, Put},
    error::StorageError,
    storage::{Key, Value},
};

/// Pages that are read at a time.
const CONCURRENT_READS: usize = 16;
/// Pages that are stored at a time.
const PAGES_PER_BATCH: usize = 256;

/// Stores the source's pages and relation map, as of the last record applied, under the copy's names at `end_lsn`. Nobody
/// sees them before the record itself is applied; storing them again after an interruption changes nothing.
pub(super) async fn copy_database(branch: &Arc<Branch>, copy: &DatabaseCopy, end_lsn: Lsn) -> Result<(), StorageError> {
    let tip = branch.tip();
    let at = tip.last_record_lsn;
    if let Some(content) = branch.read_value(Key::relation_map(copy.from.0, copy.from.1), at).await? {
        let key = Key::relation_map(copy.to.0, copy.to.1);
        branch.apply([Put { key, lsn: end_lsn, value: Value::Image(content) }], tip);
    }
    let pages = copy.rels.iter().flat_map(|(rel, blocks)| (0..*blocks).map(|block| PageTag { rel: *rel, block }));
    let copied = futures::stream::iter(pages).map(async |source: PageTag| {
        let page = branch.read_page(Key::page(source), at).await?;
        let rel = copy.renamed(source.rel);
        let key = Key::page(PageTag { rel, block: source.block });
        Ok::<Put, StorageError>(Put { key, lsn: end_lsn, value: Value::Image(page) })
    });
    let mut batches = copied.buffered(CONCURRENT_READS).try_chunks(PAGES_PER_BATCH);
    while let Some(batch) = batches.next().await {
        let batch = batch.map_err(|error| error.1)?;
        branch.apply(batch, tip);
        branch.make_room().await;
    }
    Ok(())
}
