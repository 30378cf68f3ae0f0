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
        let mut older = self.ancestor_ready().await?;
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
            older = next.map(|(ancestor, ancestor_lsn)| (ancestor, ancestor_lsn.min(lsn)));
        }
        let first = self.first_commit_after(timestamp_us, tip).await?;
        Ok(first.map_or(tip, |commit| commit.before))
    }

    /// Where the branch's own part of a history window that begins at `since_us` begins: its own start, if the window begins
    /// before that.
    pub async fn window_start(self: &Arc<Self>, since_us: i64) -> Result<Lsn, StorageError> {
        match self.lsn_by_timestamp(since_us).await {
            Ok(lsn) => Ok(lsn.max(self.start_lsn())),
            Err(StorageError::Invalid(_)) => Ok(self.start_lsn()),
            Err(error) => Err(error),
        }
    }

    /// When the latest commit at or before `lsn` was, in this branch or those it comes from; `None` when no commit's time
    /// is stored there.
    pub async fn timestamp_by_lsn(self: &Arc<Self>, lsn: Lsn) -> Result<Option<i64>, StorageError> {
        let (mut branch, mut at) = (self.clone(), lsn);
        loop {
            if let Some(commit) = branch.last_commit(at).await? {
                return Ok(Some(commit.timestamp_us));
            }
            let Some((ancestor, left_at)) = branch.ancestor_ready().await? else {
                return Ok(None);
            };
            at = at.min(left_at);
            branch = ancestor;
        }
    }

    /// The last of the branch's own stored commits at or before `at`. Looks at memory, then at layers from the newest one
    /// back, no further than needed: commits of an older layer are older.
    async fn last_commit(&self, at: Lsn) -> Result<Option<CommitTime>, StorageError> {
        let (first, end) = (Key::of(Kind::CommitTime), Key::last_of(Kind::CommitTime));
        let mut latest = LatestCommit { at, found: None, malformed: None };
        let view =
            self.view(|memory| memory.scan(first, end).for_each(|(key, lsn, value)| latest.see(key, lsn, &value)));
        let mut layers: Vec<_> = view.layers.iter().filter(|layer| layer.meta.start_lsn < at).collect();
        layers.sort_by_key(|layer| std::cmp::Reverse(layer.meta.end_lsn));
        for layer in layers {
            if latest.found.is_some_and(|(lsn, _)| lsn >= layer.meta.end_lsn) {
                break;
            }
            layer.scan(&self.shared.remote, first, end, |key, lsn, value| latest.see(key, lsn, &value)).await?;
        }
        match latest.malformed {
            None => Ok(latest.found.map(|(_, commit)| commit)),
            Some((key, lsn)) => Err(self.malformed_commit(key, lsn)),
        }
    }

    fn malformed_commit(&self, key: Key, lsn: Lsn) -> StorageError {
        StorageError::Unmakeable {
            branch: self.name.clone(),
            what: key.to_string(),
            lsn,
            reason: "the stored commit time is malformed".to_owned(),
        }
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
            match decode_commit(value) {
                Some(commit) => commits.push((lsn, commit)),
                None => malformed = Some((key, lsn)),
            }
        };
        let view = self.view(|memory| memory.scan(first, last).for_each(|(key, lsn, value)| keep(key, lsn, &value)));
        for layer in view.layers.iter() {
            layer.scan(&self.shared.remote, first, last, |key, lsn, value| keep(key, lsn, &value)).await?;
        }
        match malformed {
            None => Ok(commits),
            Some((key, lsn)) => Err(self.malformed_commit(key, lsn)),
        }
    }
}

/// The latest commit up to `at` among those seen.
struct LatestCommit {
    at: Lsn,
    found: Option<(Lsn, CommitTime)>,
    malformed: Option<(Key, Lsn)>,
}

impl LatestCommit {
    fn see(&mut self, key: Key, lsn: Lsn, value: &Value) {
        if lsn > self.at || self.found.is_some_and(|(known, _)| known >= lsn) {
            return;
        }
        match decode_commit(value) {
            Some(commit) => self.found = Some((lsn, commit)),
            None => self.malformed = Some((key, lsn)),
        }
    }
}

fn decode_commit(value: &Value) -> Option<CommitTime> {
    match value {
        Value::Image(content) => CommitTime::decode(content),
        Value::Tombstone | Value::Record(_) => None,
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
