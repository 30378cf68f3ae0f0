//! The files of a data directory that are not relations, as of an LSN. On the path of every compute start.

use std::{collections::BTreeMap, sync::Arc};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt, TryStreamExt};
use types::{ForkNumber, Lsn, Oid, PAGE_BYTES, RelTag, oids};
use wal::{CheckPoint, v15::replication::origins_file};
use wal_redo::{SLRU_PAGES_PER_SEGMENT, SlruKind};
use wire::pageserver::{BaseFile, BaseFiles};

use crate::{
    branch::Branch,
    error::StorageError,
    read::zero_page,
    storage::{AuxFile, Key, Kind, Value, decode_origin},
};

/// `PG_VERSION`'s content.
const PG_VERSION: &[u8] = b"15\n";
/// Name of a tablespace's directory for this version (`TABLESPACE_VERSION_DIRECTORY`: major version, catalogue version).
const TABLESPACE_VERSION_DIRECTORY: &str = "PG_15_202209061";
/// What `initdb` makes (`subdirs` in `initdb.c`), besides database directories.
const DIRECTORIES: [&str; 22] = [
    "global",
    "pg_wal",
    "pg_wal/archive_status",
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_notify",
    "pg_serial",
    "pg_snapshots",
    "pg_subtrans",
    "pg_twophase",
    "pg_multixact",
    "pg_multixact/members",
    "pg_multixact/offsets",
    "base",
    "pg_replslot",
    "pg_tblspc",
    "pg_stat",
    "pg_stat_tmp",
    "pg_xact",
    "pg_logical",
    "pg_logical/snapshots",
    "pg_logical/mappings",
];
/// Transaction statuses on a page of `pg_xact` (`CLOG_XACTS_PER_PAGE`).
const XIDS_PER_CLOG_PAGE: u32 = 4 * PAGE_BYTES as u32;
/// Offsets on a page of `pg_multixact/offsets` (`MULTIXACT_OFFSETS_PER_PAGE`).
const MULTIS_PER_OFFSETS_PAGE: u32 = PAGE_BYTES as u32 / 4;
/// Members on a page of `pg_multixact/members` (`MULTIXACT_MEMBERS_PER_PAGE`).
const MEMBERS_PER_PAGE: u32 = PAGE_BYTES as u32 / 20 * 4;
/// SLRU pages that are read at a time.
const CONCURRENT_READS: usize = 32;
/// What an answer may hold: well within a frame of the wire.
const MAX_BYTES: usize = 56 << 20;

/// The base files as of `at`, which is waited for. The last answer is kept for whoever asks again.
pub async fn base_files(branch: &Arc<Branch>, at: Lsn) -> Result<Arc<BaseFiles>, StorageError> {
    branch.wait_for(at).await?;
    if at < branch.start_lsn() {
        return Err(branch.outside_history(at));
    }
    let kept = branch.base_files_cache().lock().clone();
    if let Some(files) = kept.filter(|files| files.lsn == at) {
        return Ok(files);
    }
    let files = Arc::new(build(branch, at).await?);
    *branch.base_files_cache().lock() = Some(files.clone());
    Ok(files)
}

async fn build(branch: &Arc<Branch>, at: Lsn) -> Result<BaseFiles, StorageError> {
    let mut values = branch.scan(Key::MIN, Key::last_of(Kind::SlruPage), at).await?;
    let mut single = |key: Key| match values.remove(&key) {
        Some(Value::Image(content)) => Ok(content),
        Some(Value::Tombstone | Value::Record(_)) | None => Err(malformed(branch, &key, at, "there is no such value")),
    };
    let (control_file, checkpoint) = (single(Key::CONTROL_FILE)?, single(Key::CHECKPOINT)?);
    let counters = CheckPoint::from_bytes(&checkpoint)
        .map_err(|error| malformed(branch, &Key::CHECKPOINT, at, &error.to_string()))?;
    let mut tree = Tree::new();
    for (key, value) in &values {
        if let Value::Image(content) = value {
            tree.add(key, content).map_err(|reason| malformed(branch, key, at, reason))?;
        }
    }
    tree.add_origins();
    let pages = slru_pages(branch, at, values).await?;
    tree.files.extend(slru_files(pages, &counters));
    if tree.files.iter().map(|file| file.content.len()).sum::<usize>() > MAX_BYTES {
        return Err(StorageError::Invalid(format!("the base files of branch {} are too large", branch.name())));
    }
    let tip = branch.tip();
    Ok(BaseFiles {
        lsn: at,
        prev_record_lsn: if tip.last_record_lsn == at { tip.prev_record_lsn } else { Lsn::INVALID },
        control_file,
        checkpoint,
        files: tree.files,
        directories: tree.directories,
        tablespaces: tree.tablespaces,
        unlogged: unlogged(branch, at).await?,
    })
}

fn malformed(branch: &Branch, key: &Key, lsn: Lsn, reason: &str) -> StorageError {
    StorageError::Unmakeable { branch: branch.name().clone(), what: key.to_string(), lsn, reason: reason.to_owned() }
}

/// What a data directory is made of.
struct Tree {
    files: Vec<BaseFile>,
    directories: Vec<String>,
    tablespaces: Vec<(Oid, String)>,
    /// Replication origins and how far each has been applied.
    origins: Vec<(u16, Lsn)>,
}

impl Tree {
    fn new() -> Tree {
        let version = BaseFile { path: "PG_VERSION".to_owned(), content: Bytes::from_static(PG_VERSION) };
        let directories = DIRECTORIES.iter().map(|&directory| directory.to_owned()).collect();
        Tree { files: vec![version], directories, tablespaces: Vec::new(), origins: Vec::new() }
    }

    fn add(&mut self, key: &Key, content: &Bytes) -> Result<(), &'static str> {
        match key.kind {
            Kind::RelationMap => {
                let path = format!("{}/pg_filenode.map", database_directory(key.spc, key.db));
                self.file(path, content.clone());
            }
            Kind::Database => {
                let directory = database_directory(key.spc, key.db);
                self.file(format!("{directory}/PG_VERSION"), Bytes::from_static(PG_VERSION));
                self.directories.push(directory);
            }
            Kind::Tablespace => {
                let path = String::from_utf8(content.to_vec()).map_err(|_| "its path is not text")?;
                self.tablespaces.push((key.spc, path));
            }
            Kind::TwoPhase => self.file(format!("pg_twophase/{:08X}", key.rel), content.clone()),
            Kind::AuxFile => {
                let file: AuxFile = postcard::from_bytes(content).map_err(|_| "it is not a file")?;
                if !is_inner_path(&file.path) {
                    return Err("its path leads out of the data directory");
                }
                self.file(file.path, file.content);
            }
            Kind::CheckPoint => {
                let origin = key.origin_number().ok_or("there is no such origin")?;
                self.origins.push((origin, decode_origin(content).ok_or("it is not an LSN")?));
            }
            Kind::SlruPage => {}
            Kind::ControlFile | Kind::RelSize | Kind::CommitTime | Kind::RelPage => {
                return Err("it is not a base file");
            }
        }
        Ok(())
    }

    /// The file from which a start takes the origins' progress. There is none on most branches.
    fn add_origins(&mut self) {
        if !self.origins.is_empty() {
            let content = origins_file(self.origins.drain(..));
            self.file("pg_logical/replorigin_checkpoint".to_owned(), content.into());
        }
    }

    fn file(&mut self, path: String, content: Bytes) {
        self.files.push(BaseFile { path, content });
    }
}

fn is_inner_path(path: &str) -> bool {
    !path.is_empty() && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

/// Where a database's relations are (`GetDatabasePath` in `common/relpath.c`).
fn database_directory(spc: Oid, db: Oid) -> String {
    match spc {
        oids::GLOBAL_TABLESPACE => "global".to_owned(),
        oids::DEFAULT_TABLESPACE => format!("base/{db}"),
        _ => format!("pg_tblspc/{spc}/{TABLESPACE_VERSION_DIRECTORY}/{db}"),
    }
}

type SlruPages = BTreeMap<(SlruKind, u32), Bytes>;

async fn slru_pages(branch: &Arc<Branch>, at: Lsn, values: BTreeMap<Key, Value>) -> Result<SlruPages, StorageError> {
    let read = async |(key, value): (Key, Value)| {
        let slru = key.slru_kind().ok_or_else(|| malformed(branch, &key, at, "there is no such area"))?;
        let page = match value {
            Value::Image(image) if image.len() == PAGE_BYTES => image,
            Value::Image(_) | Value::Tombstone | Value::Record(_) => branch.read_page(key, at).await?,
        };
        Ok::<_, StorageError>(((slru, key.block), page))
    };
    let of_slru = values.into_iter().filter(|(key, _)| key.kind == Kind::SlruPage);
    futures::stream::iter(of_slru).map(read).buffer_unordered(CONCURRENT_READS).try_collect().await
}

/// Segment files up to their last existing page. The pages that a start reads (of the next transaction and multixact)
/// are there even if nothing has been written to them.
fn slru_files(mut pages: SlruPages, counters: &CheckPoint) -> Vec<BaseFile> {
    let next_xid = counters.next_xid as u32;
    let needed = [
        (SlruKind::Clog, next_xid / XIDS_PER_CLOG_PAGE),
        (SlruKind::MultiXactOffsets, counters.next_multi / MULTIS_PER_OFFSETS_PAGE),
        (SlruKind::MultiXactMembers, counters.next_multi_offset / MEMBERS_PER_PAGE),
    ];
    for page in needed {
        pages.entry(page).or_insert_with(zero_page);
    }
    let mut segments: BTreeMap<(SlruKind, u32), BytesMut> = BTreeMap::new();
    for ((slru, page), content) in pages {
        let segment = segments.entry((slru, page / SLRU_PAGES_PER_SEGMENT)).or_default();
        segment.resize((page % SLRU_PAGES_PER_SEGMENT) as usize * PAGE_BYTES, 0);
        segment.extend_from_slice(&content);
    }
    let file = |((slru, segment), content): ((SlruKind, u32), BytesMut)| BaseFile {
        path: format!("{}/{segment:04X}", slru.directory()),
        content: content.freeze(),
    };
    segments.into_iter().map(file).collect()
}

/// Main forks of the relations that have an init fork.
async fn unlogged(branch: &Arc<Branch>, at: Lsn) -> Result<Vec<RelTag>, StorageError> {
    let forks = branch.scan(Key::of(Kind::RelSize), Key::last_of(Kind::RelSize), at).await?;
    let init = forks.keys().filter_map(Key::rel_tag).filter(|rel| rel.fork == ForkNumber::Init);
    Ok(init.map(|rel| rel.with_fork(ForkNumber::Main)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_have_their_gaps_and_the_pages_a_start_needs() {
        let page = Bytes::from(vec![7u8; PAGE_BYTES]);
        let pages = SlruPages::from([((SlruKind::Clog, 33), page.clone()), ((SlruKind::Clog, 2), page)]);
        let mut counters = CheckPoint::from_bytes(&[0; 88]).expect("88 bytes");
        counters.next_xid = (1 << 32) + u64::from(XIDS_PER_CLOG_PAGE) * 35;
        counters.next_multi = 1;
        let files: BTreeMap<_, _> =
            slru_files(pages, &counters).into_iter().map(|file| (file.path, file.content)).collect();
        let lengths: Vec<_> = files.iter().map(|(path, content)| (path.as_str(), content.len() / PAGE_BYTES)).collect();
        let expected = [
            ("pg_multixact/members/0000", 1),
            ("pg_multixact/offsets/0000", 1),
            ("pg_xact/0000", 3),
            ("pg_xact/0001", 4),
        ];
        assert_eq!(lengths, expected);
        assert_eq!(files["pg_xact/0001"][..PAGE_BYTES], [0; PAGE_BYTES], "a gap is zeroes");
        assert_eq!(files["pg_xact/0001"][PAGE_BYTES], 7);
    }

    #[test]
    fn files_stay_inside_the_data_directory() {
        for bad in ["", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a/"] {
            assert!(!is_inner_path(bad), "{bad:?}");
        }
        assert!(is_inner_path("pg_stat/pgstat.stat"));
    }
}
