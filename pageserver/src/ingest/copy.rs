//! `CREATE DATABASE ... STRATEGY file_copy`: its WAL says only "copy that directory", so the pages are copied here.

use std::sync::Arc;

use types::{Lsn, PageTag};

use super::plan::DatabaseCopy;
use crate::{
    branch::{Branch, Put},
    error::StorageError,
    storage::{Key, Value},
};

/// Pages that are read and stored at a time.
const PAGES_PER_BATCH: u32 = 256;

/// Stores the source's pages and relation map, as of the last record applied, under the copy's names at `end_lsn`. Nobody
/// sees them before the record itself is applied; storing them again after an interruption changes nothing.
pub(super) async fn copy_database(branch: &Arc<Branch>, copy: &DatabaseCopy, end_lsn: Lsn) -> Result<(), StorageError> {
    let tip = branch.tip();
    let at = tip.last_record_lsn;
    if let Some(content) = branch.read_value(Key::relation_map(copy.from.0, copy.from.1), at).await? {
        let key = Key::relation_map(copy.to.0, copy.to.1);
        branch.apply([Put { key, lsn: end_lsn, value: Value::Image(content) }], tip);
    }
    for (rel, blocks) in &copy.rels {
        let mut block = 0;
        while block < *blocks {
            let end = blocks.min(&(block + PAGES_PER_BATCH)).to_owned();
            let sources: Vec<PageTag> = (block..end).map(|block| PageTag { rel: *rel, block }).collect();
            let pages = branch.get_pages(&sources, at).await?;
            let to = copy.renamed(*rel);
            let puts = (block..end).zip(pages).map(|(block, page)| {
                let key = Key::page(PageTag { rel: to, block });
                Put { key, lsn: end_lsn, value: Value::Image(page) }
            });
            branch.apply(puts, tip);
            branch.make_room().await;
            block = end;
        }
    }
    Ok(())
}
