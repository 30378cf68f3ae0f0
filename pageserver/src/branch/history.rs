//! Positions of a branch's history: by time, and where a child may leave it.

use std::sync::Arc;

use types::{Lsn, WAL_SEGMENT_BYTES};

use super::Branch;
use crate::{
    error::StorageError,
    storage::{CommitTime, Key, Kind, Value},
};

/// Bytes of the header of a WAL page (`SizeOfXLogShortPHD`) and of a segment's first (`SizeOfXLogLongPHD`).
const PAGE_HEADER_BYTES: u64 = 24;
const SEGMENT_HEADER_BYTES: u64 = 40;

/// The last position at or before `lsn` where WAL may go on: aligned, and not inside a page header. No record ends
/// between the two, so the state is the same; the end of a record stays as it is.
pub fn branch_point(lsn: Lsn) -> Lsn {
    let aligned = Lsn(lsn.0 & !7);
    let first_page = aligned.page_start().0.is_multiple_of(WAL_SEGMENT_BYTES);
    let header = if first_page { SEGMENT_HEADER_BYTES } else { PAGE_HEADER_BYTES };
    // Right behind the header nothing has ended either: that is the page's start in other words.
    if aligned.page_offset() <= header { aligned.page_start() } else { aligned }
}

impl Branch {
    /// The last position all of whose commits are at or before `timestamp_us`. Errors when that is before the branch's
    /// own history.
    pub async fn lsn_by_timestamp(self: &Arc<Self>, timestamp_us: i64) -> Result<Lsn, StorageError> {
        let tip = self.tip().last_record_lsn;
        let mut older = self.ancestor_ready().await?.map(|(branch, lsn)| (branch.clone(), lsn));
        while let Some((branch, lsn)) = older {
            if branch.first_commit_after(timestamp_us, lsn).await?.is_some() {
                let message = format!(
                    "that time is before the history of branch {}, which starts at {}",
                    self.name(),
                    self.start_lsn()
                );
                return Err(StorageError::Invalid(message));
            }
            let next = branch.ancestor_ready().await?;
            older = next.map(|(ancestor, ancestor_lsn)| (ancestor.clone(), ancestor_lsn.min(lsn)));
        }
        let first = self.first_commit_after(timestamp_us, tip).await?;
        Ok(first.map_or(tip, |commit| commit.before))
    }

    /// The first of the branch's own commits, in WAL order and up to `at`, whose time is after `timestamp_us`. The
    /// stored times only ever grow, so it is the first stored one that is.
    async fn first_commit_after(&self, timestamp_us: i64, at: Lsn) -> Result<Option<CommitTime>, StorageError> {
        let mut from = CommitTime::key(timestamp_us).block;
        let mut seconds = 0u32;
        loop {
            let until = from.saturating_add(seconds);
            let commits = self.commits(Key::commit_time(from), Key::commit_time(until), at).await?;
            let first =
                commits.into_iter().filter(|(_, commit)| commit.timestamp_us > timestamp_us).min_by_key(|c| c.0);
            match first {
                Some((_, commit)) => return Ok(Some(commit)),
                None if until == u32::MAX => return Ok(None),
                None => {
                    from = until + 1;
                    seconds = seconds.saturating_mul(8).saturating_add(1);
                }
            }
        }
    }

    async fn commits(&self, first: Key, last: Key, at: Lsn) -> Result<Vec<(Lsn, CommitTime)>, StorageError> {
        let mut commits = Vec::new();
        let mut malformed = None;
        let mut keep = |key: Key, lsn: Lsn, value: &Value| {
            if key.kind != Kind::CommitTime || lsn > at {
                return;
            }
            match value {
                Value::Image(content) => match CommitTime::decode(content) {
                    Some(commit) => commits.push((lsn, commit)),
                    None => malformed = Some((key, lsn)),
                },
                Value::Tombstone | Value::Record(_) => malformed = Some((key, lsn)),
            }
        };
        let view = self.view(|memory| memory.scan(first, last).for_each(|(key, lsn, value)| keep(key, lsn, value)));
        for layer in view.layers.iter() {
            layer.scan(&self.shared.remote, first, last, |key, lsn, value| keep(key, lsn, &value)).await?;
        }
        match malformed {
            None => Ok(commits),
            Some((key, lsn)) => Err(StorageError::Unmakeable {
                branch: self.name.clone(),
                what: key.to_string(),
                lsn,
                reason: "the stored commit time is malformed".to_owned(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branch_points_keep_record_ends_and_avoid_headers() {
        for (given, point) in [
            (0x100_2000, 0x100_2000),
            (0x100_2008, 0x100_2000),
            (0x100_2018, 0x100_2000),
            (0x100_2020, 0x100_2020),
            (0x100_2025, 0x100_2020),
            (0x100_0028, 0x100_0000),
            (0x100_0030, 0x100_0030),
        ] {
            assert_eq!(branch_point(Lsn(given)), Lsn(point), "{given:x}");
        }
    }
}
