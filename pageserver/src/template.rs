//! Importing a cleanly stopped cluster as a template: a branch without ancestor that others are made from.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use types::{BranchRef, ForkNumber, Generation, Lsn, Oid, PAGE_BYTES, PageTag, REL_SEGMENT_BLOCKS, RelTag, oids};
use wal::{ControlFile, WalStreamDecoder, control_file::ControlFileError};
use wal_redo::{SLRU_PAGES_PER_SEGMENT, SlruKind};

use crate::{
    branch::prepare_layer,
    error::StorageError,
    layer::{Layer, LayerBuilder, LayerKind},
    remote::{BranchNames, DiskCache, Manifest, ObjectStoreConfig, ObjectStoreConfigError, Remote},
    storage::{Key, Value},
};

/// Image layers are cut at this size.
const LAYER_BYTES: usize = 64 << 20;
/// A template's objects are written under this generation: no pageserver has it.
const TEMPLATE_GENERATION: Generation = Generation(0);

/// Why a cluster could not be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// A file could not be read.
    #[error("{path}: {source}")]
    File {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// `pg_control` is not usable.
    #[error("pg_control: {0}")]
    ControlFile(#[from] ControlFileError),
    /// The cluster was not stopped cleanly.
    #[error("the cluster was not shut down cleanly")]
    NotShutDown,
    /// The last checkpoint is not in `pg_wal`.
    #[error("the shutdown checkpoint at {at}: {reason}")]
    Checkpoint {
        /// Where it should be.
        at: Lsn,
        /// What is there.
        reason: String,
    },
    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    Unexpected {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The object store's settings are no good.
    #[error(transparent)]
    Config(#[from] ObjectStoreConfigError),
    /// The object store did not do it.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// Reads the data directory of a cleanly stopped cluster and writes it to the object store as `branch`; answers the
/// position it stands at, the end of the shutdown checkpoint. Does nothing when the branch is there already. `progress`
/// is told how many of how many bytes have been read.
pub async fn import_template(
    store: &ObjectStoreConfig,
    branch: &BranchRef,
    pgdata: &Path,
    progress: impl Fn(u64, u64),
) -> Result<Lsn, ImportError> {
    let remote = Remote::open(store, DiskCache::disabled(), 0)?;
    import(&remote, branch, pgdata, progress).await
}

/// Where the template stands, if it has been imported.
pub async fn template_exists(store: &ObjectStoreConfig, branch: &BranchRef) -> Result<Option<Lsn>, ImportError> {
    let remote = Remote::open(store, DiskCache::disabled(), 0)?;
    Ok(remote.manifest(branch).await?.map(|(_, manifest)| manifest.remote_consistent_lsn))
}

/// As [`import_template`], into an open store.
pub async fn import(
    remote: &Remote,
    branch: &BranchRef,
    pgdata: &Path,
    progress: impl Fn(u64, u64),
) -> Result<Lsn, ImportError> {
    if let Some((_, manifest)) = remote.manifest(branch).await? {
        return Ok(manifest.remote_consistent_lsn);
    }
    let control_bytes = read_file(&pgdata.join("global/pg_control"))?;
    let control = ControlFile::parse(&control_bytes)?;
    if !control.is_shut_down() {
        return Err(ImportError::NotShutDown);
    }
    let (start, lsn) = (control.checkpoint_lsn(), checkpoint_end(pgdata, control.checkpoint_lsn())?);
    let mut upload =
        Upload { remote, names: BranchNames::new(branch), lsn, builder: LayerBuilder::default(), layers: Vec::new() };
    let cluster = Cluster::list(pgdata)?;
    upload.add(Key::CONTROL_FILE, Value::Image(control_bytes));
    upload.add(Key::CHECKPOINT, Value::Image(Bytes::copy_from_slice(&control.checkpoint().to_bytes())));
    for (spc, db, path) in &cluster.relation_maps {
        upload.add(Key::relation_map(*spc, *db), Value::Image(read_file(path)?));
    }
    for (spc, db) in &cluster.databases {
        upload.add(Key::database(*spc, *db), Value::Image(Bytes::new()));
    }
    for (slru, segment, path) in &cluster.slru_segments {
        for (index, page) in read_file(path)?.chunks_exact(PAGE_BYTES).enumerate() {
            let page_number = segment * SLRU_PAGES_PER_SEGMENT + index as u32;
            upload.add(Key::slru(*slru, page_number), Value::Image(Bytes::copy_from_slice(page)));
        }
    }
    for fork in &cluster.forks {
        upload.add(Key::rel_size(fork.rel), Value::rel_size(fork.blocks));
    }
    let total: u64 = cluster.forks.iter().map(|fork| u64::from(fork.blocks) * PAGE_BYTES as u64).sum();
    let mut done = 0;
    for fork in &cluster.forks {
        upload.add_pages(fork).await?;
        done += u64::from(fork.blocks) * PAGE_BYTES as u64;
        progress(done, total);
    }
    upload.finish_layer().await?;
    let mut manifest = Manifest::new(None, lsn, start);
    manifest.logical_bytes = Some(total);
    manifest.layers = upload.layers.iter().map(|layer| layer.meta.clone()).collect();
    // The images speak for all keys, also behind the last that there is.
    if let Some(last) = manifest.layers.last_mut() {
        last.last_key = Key::MAX;
    }
    let object = upload.names.manifest(TEMPLATE_GENERATION);
    let encoded = manifest
        .encode()
        .map_err(|error| StorageError::Store { object: object.to_string(), reason: error.to_string() })?;
    remote.put(&object, encoded.into()).await?;
    Ok(lsn)
}

/// Layers on their way to the store.
struct Upload<'a> {
    remote: &'a Remote,
    names: BranchNames,
    lsn: Lsn,
    builder: LayerBuilder,
    layers: Vec<std::sync::Arc<Layer>>,
}

impl Upload<'_> {
    fn add(&mut self, key: Key, value: Value) {
        self.builder.add(key, self.lsn, &value);
    }

    async fn add_pages(&mut self, fork: &Fork) -> Result<(), ImportError> {
        let mut block = 0;
        for path in &fork.segments {
            let mut file = File::open(path).map_err(|source| ImportError::File { path: path.clone(), source })?;
            let pages_end = (block + REL_SEGMENT_BLOCKS).min(fork.blocks);
            while block < pages_end {
                let mut page = [0; PAGE_BYTES];
                file.read_exact(&mut page).map_err(|source| ImportError::File { path: path.clone(), source })?;
                let content = if page == [0; PAGE_BYTES] { Bytes::new() } else { Bytes::copy_from_slice(&page) };
                self.add(Key::page(PageTag { rel: fork.rel, block }), Value::Image(content));
                block += 1;
                if self.builder.bytes_so_far() >= LAYER_BYTES {
                    self.finish_layer().await?;
                }
            }
        }
        Ok(())
    }

    async fn finish_layer(&mut self) -> Result<(), ImportError> {
        let built = std::mem::take(&mut self.builder).finish();
        let Some((_, last)) = built.keys else { return Ok(()) };
        let first = self.layers.last().and_then(|before| before.meta.last_key.next()).unwrap_or(Key::MIN);
        let named = (TEMPLATE_GENERATION, self.layers.len() as u64);
        let sort = (LayerKind::Image, 0);
        let (layer, bytes) = prepare_layer(&self.names, built, sort, (self.lsn, self.lsn), (first, last), named);
        self.remote.put(layer.object(), bytes).await?;
        self.layers.push(layer);
        Ok(())
    }
}

/// What a data directory holds, each list in the order of keys.
#[derive(Default)]
struct Cluster {
    relation_maps: Vec<(Oid, Oid, PathBuf)>,
    databases: Vec<(Oid, Oid)>,
    slru_segments: Vec<(SlruKind, u32, PathBuf)>,
    forks: Vec<Fork>,
}

/// A fork's segment files.
struct Fork {
    rel: RelTag,
    blocks: u32,
    segments: Vec<PathBuf>,
}

impl Cluster {
    fn list(pgdata: &Path) -> Result<Cluster, ImportError> {
        let mut cluster = Cluster::default();
        if let Some(entry) = list(&pgdata.join("pg_tblspc"))?.first() {
            let reason = "clusters with tablespaces are not imported".to_owned();
            return Err(ImportError::Unexpected { path: entry.clone(), reason });
        }
        cluster.add_database(oids::GLOBAL_TABLESPACE, 0, &pgdata.join("global"))?;
        for directory in list(&pgdata.join("base"))? {
            let Ok(db) = name_of(&directory).parse::<Oid>() else { continue };
            cluster.databases.push((oids::DEFAULT_TABLESPACE, db));
            cluster.add_database(oids::DEFAULT_TABLESPACE, db, &directory)?;
        }
        for slru in SlruKind::ALL {
            for path in list(&pgdata.join(slru.directory()))? {
                // Longer names would be of another version; `pg_multixact` has the two areas as directories.
                if let Ok(segment) = u32::from_str_radix(name_of(&path), 16) {
                    cluster.slru_segments.push((slru, segment, path));
                }
            }
        }
        cluster.relation_maps.sort();
        cluster.databases.sort();
        cluster.slru_segments.sort();
        cluster.forks.sort_by_key(|fork| fork.rel);
        Ok(cluster)
    }

    fn add_database(&mut self, spc: Oid, db: Oid, directory: &Path) -> Result<(), ImportError> {
        for path in list(directory)? {
            let name = name_of(&path);
            if name == "pg_filenode.map" {
                self.relation_maps.push((spc, db, path));
            } else if let Some((rel, fork)) = parse_fork_name(name) {
                self.forks.push(read_fork(RelTag { spc, db, rel, fork }, path)?);
            }
        }
        Ok(())
    }
}

/// The relation and fork of a first segment's file name; `None` for later segments and other files.
fn parse_fork_name(name: &str) -> Option<(Oid, ForkNumber)> {
    let (number, suffix) = name.split_at(name.find(|c: char| !c.is_ascii_digit()).unwrap_or(name.len()));
    let fork = ForkNumber::ALL.into_iter().find(|fork| fork.suffix() == suffix)?;
    Some((number.parse().ok()?, fork))
}

/// Finds a fork's further segments and its size.
fn read_fork(rel: RelTag, first: PathBuf) -> Result<Fork, ImportError> {
    let mut fork = Fork { rel, blocks: 0, segments: Vec::new() };
    loop {
        let number = fork.segments.len();
        let path = if number == 0 { first.clone() } else { first.with_extension(number.to_string()) };
        let bytes = match std::fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && number > 0 => return Ok(fork),
            Err(source) => return Err(ImportError::File { path, source }),
        };
        let blocks = bytes / PAGE_BYTES as u64;
        if !bytes.is_multiple_of(PAGE_BYTES as u64) || blocks > u64::from(REL_SEGMENT_BLOCKS) {
            return Err(ImportError::Unexpected { path, reason: format!("it has {bytes} bytes") });
        }
        fork.blocks += blocks as u32;
        fork.segments.push(path);
        if blocks < u64::from(REL_SEGMENT_BLOCKS) {
            return Ok(fork);
        }
    }
}

/// Where the record that starts at `at` ends.
fn checkpoint_end(pgdata: &Path, at: Lsn) -> Result<Lsn, ImportError> {
    let path = pgdata.join("pg_wal").join(at.segment_file_name());
    let segment = read_file(&path)?;
    let mut decoder = WalStreamDecoder::new(at);
    let from = decoder.fed_until();
    decoder.feed(from, segment.get(from.segment_offset() as usize..).unwrap_or_default());
    match decoder.poll_record() {
        Ok(Some(record)) if record.start_lsn == at => Ok(record.end_lsn),
        Ok(_) => Err(ImportError::Checkpoint { at, reason: "no whole record".to_owned() }),
        Err(error) => Err(ImportError::Checkpoint { at, reason: error.to_string() }),
    }
}

fn name_of(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn list(directory: &Path) -> Result<Vec<PathBuf>, ImportError> {
    let failed = |source| ImportError::File { path: directory.to_owned(), source };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        paths.push(entry.map_err(failed)?.path());
    }
    paths.sort();
    Ok(paths)
}

fn read_file(path: &Path) -> Result<Bytes, ImportError> {
    let content = std::fs::read(path).map_err(|source| ImportError::File { path: path.to_owned(), source })?;
    Ok(content.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fork_names_are_told_from_other_files() {
        assert_eq!(parse_fork_name("1259"), Some((1259, ForkNumber::Main)));
        assert_eq!(parse_fork_name("1259_vm"), Some((1259, ForkNumber::Vm)));
        assert_eq!(parse_fork_name("16384_init"), Some((16384, ForkNumber::Init)));
        for other in ["1259.1", "1259_vm.1", "pg_internal.init", "PG_VERSION", "t3_16384", "pgsql_tmp", "99999999999"] {
            assert_eq!(parse_fork_name(other), None, "{other}");
        }
    }
}
