//! Stored records applied to a page.

use bytes::Bytes;
use types::{Lsn, PAGE_BYTES, PageTag};
use wal::DecodedRecord;

use crate::storage::{Key, StoredRecord};

/// More records than this are applied off the async workers: at about a tenth of a microsecond each, fewer take no longer than it
/// takes to hand them over.
const INLINE_RECORDS: usize = 256;

/// Applies the records, oldest first, to `base`. Errors say which record could not be applied.
pub(crate) async fn replay(key: Key, base: Bytes, records: Vec<(Lsn, StoredRecord)>) -> Result<Bytes, String> {
    if records.len() <= INLINE_RECORDS {
        return replay_now(key, &base, records);
    }
    let task = tokio::task::spawn_blocking(move || replay_now(key, &base, records));
    task.await.unwrap_or_else(|error| Err(error.to_string()))
}

fn replay_now(key: Key, base: &[u8], records: Vec<(Lsn, StoredRecord)>) -> Result<Bytes, String> {
    let mut made: Box<[u8]> = base.into();
    let bytes = made.len();
    let page: &mut [u8; PAGE_BYTES] = made.as_mut().try_into().map_err(|_| format!("a page of {bytes} bytes"))?;
    let mut record = DecodedRecord::blank();
    for (end_lsn, stored) in &records {
        wal::decode_into(&mut record, stored.start_lsn, *end_lsn, &stored.raw)
            .map_err(|reason| format!("record that ends at {end_lsn}: {reason}"))?;
        match (key.slru_kind(), key.rel_tag()) {
            (Some(slru), _) => {
                wal_redo::redo_slru_page(page, slru, key.block, &record).map_err(|error| error.to_string())?;
            }
            (None, Some(rel)) => {
                let tag = PageTag { rel, block: key.block };
                wal_redo::redo_page(page, &tag, &record).map_err(|error| error.to_string())?;
            }
            (None, None) => return Err("records are stored under a key of no page".to_owned()),
        }
    }
    Ok(Bytes::from(made))
}
