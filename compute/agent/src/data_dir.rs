//! Writes a data directory: what a pageserver's base files say, and what every Postgres expects besides.

use std::{
    io::{self, Write},
    os::unix::fs::{FileExt, OpenOptionsExt, symlink},
    path::{Component, Path, PathBuf},
};

use types::{Lsn, WAL_SEGMENT_BYTES};
use wire::pageserver::BaseFiles;

use crate::{
    compute_dir::ComputePaths,
    opening::WalSegment,
    owner::{Owner, give, make_private_dir},
};

/// Directories that Postgres does not make itself (`subdirs` of `initdb`).
const DIRECTORIES: &[&str] = &[
    "global",
    "pg_wal/archive_status",
    "pg_commit_ts",
    "pg_dynshmem",
    "pg_notify",
    "pg_serial",
    "pg_snapshots",
    "pg_subtrans",
    "pg_twophase",
    "pg_multixact/members",
    "pg_multixact/offsets",
    "base",
    "pg_replslot",
    "pg_tblspc",
    "pg_stat",
    "pg_stat_tmp",
    "pg_xact",
    "pg_logical/snapshots",
    "pg_logical/mappings",
];

/// Files that the agent or Postgres makes: never taken from base files.
const OWN_FILES: &[&str] = &[
    "postgresql.conf",
    "postgresql.auto.conf",
    "pg_hba.conf",
    "pg_ident.conf",
    "postmaster.pid",
    "postmaster.opts",
    "standby.signal",
    "recovery.signal",
    "backup_label",
    "tablespace_map",
];

/// Most entries that are accepted of each kind.
const MAX_ENTRIES: usize = 100_000;

/// The data directory could not be written.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// A path that leads out of the data directory, or none at all.
    #[error("base files name a path outside the data directory: {0:?}")]
    Path(String),
    /// More than [`MAX_ENTRIES`] of one kind.
    #[error("base files list {0} entries, over the limit of {MAX_ENTRIES}")]
    TooMany(usize),
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// Which file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Writes into one data directory.
#[derive(Debug, Clone)]
pub struct DataDir {
    root: PathBuf,
    tablespaces: PathBuf,
    owner: Option<Owner>,
}

impl DataDir {
    /// Makes the directories that do not depend on the branch.
    pub fn create(dir: &ComputePaths, owner: Option<Owner>) -> Result<DataDir, DataDirError> {
        let data = DataDir { root: dir.pgdata(), tablespaces: dir.tablespaces(), owner };
        data.make_dir(&data.root)?;
        for relative in DIRECTORIES {
            data.make_relative_dir(relative)?;
        }
        Ok(data)
    }

    /// Writes everything that base files hold except the control file, which depends on where WAL will begin.
    pub fn write_base_files(&self, base: &BaseFiles) -> Result<(), DataDirError> {
        for count in [base.files.len(), base.directories.len(), base.tablespaces.len()] {
            if count > MAX_ENTRIES {
                return Err(DataDirError::TooMany(count));
            }
        }
        // First the links, which directories and files may be behind. The path where the tablespace once lay belongs to
        // another host: its local stand-in is inside the compute directory.
        for (oid, _) in &base.tablespaces {
            let target = self.tablespaces.join(oid.to_string());
            self.make_dir(&self.tablespaces)?;
            self.make_dir(&target)?;
            let link = self.root.join("pg_tblspc").join(oid.to_string());
            symlink(&target, &link).map_err(|source| DataDirError::Io { path: link.clone(), source })?;
        }
        for relative in &base.directories {
            self.make_relative_dir(relative)?;
        }
        let files = base.files.iter().filter(|file| !OWN_FILES.contains(&file.path.as_str()));
        for file in files {
            self.write_file(&file.path, &file.content)?;
        }
        Ok(())
    }

    /// Writes one file; its directory is made when it is missing.
    pub fn write_file(&self, relative: &str, content: &[u8]) -> Result<(), DataDirError> {
        let path = self.root.join(checked(relative)?);
        let failed = |source| DataDirError::Io { path: path.clone(), source };
        let mut options = std::fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let opened = match options.open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = checked(relative)?.parent().unwrap_or(Path::new(""));
                self.make_relative_dir(&parent.to_string_lossy())?;
                options.open(&path)
            }
            opened => opened,
        };
        opened.and_then(|mut file| file.write_all(content)).map_err(failed)?;
        give(&path, self.owner).map_err(failed)
    }

    /// Writes a WAL segment file of full length, with holes.
    pub fn write_segment(&self, segment: &WalSegment) -> Result<(), DataDirError> {
        let relative = format!("pg_wal/{}", segment.name);
        self.write_file(&relative, b"")?;
        let path = self.root.join(relative);
        let write_pieces = || {
            let file = std::fs::OpenOptions::new().write(true).open(&path)?;
            file.set_len(WAL_SEGMENT_BYTES)?;
            segment.pieces.iter().try_for_each(|(offset, bytes)| file.write_all_at(bytes, *offset))
        };
        write_pieces().map_err(|source| DataDirError::Io { path: path.clone(), source })
    }

    /// Writes WAL at its place in segment files, which are made where they are missing.
    pub fn write_wal(&self, at: Lsn, mut bytes: &[u8]) -> Result<(), DataDirError> {
        let mut at = at;
        while !bytes.is_empty() {
            let room = (WAL_SEGMENT_BYTES - at.segment_offset()) as usize;
            let (piece, rest) = bytes.split_at(bytes.len().min(room));
            let path = self.root.join("pg_wal").join(at.segment_file_name());
            if !path.exists() {
                self.write_segment(&WalSegment { name: at.segment_file_name(), pieces: Vec::new() })?;
            }
            let file = std::fs::OpenOptions::new().write(true).open(&path);
            let written = file.and_then(|file| file.write_all_at(piece, at.segment_offset()));
            written.map_err(|source| DataDirError::Io { path, source })?;
            at += piece.len() as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// Makes a directory below the data directory, each step of its path private and Postgres's own.
    fn make_relative_dir(&self, relative: &str) -> Result<(), DataDirError> {
        let mut path = self.root.clone();
        for component in checked(relative)?.components() {
            path.push(component);
            if !path.is_dir() {
                self.make_dir(&path)?;
            }
        }
        Ok(())
    }

    fn make_dir(&self, path: &Path) -> Result<(), DataDirError> {
        make_private_dir(path, self.owner).map_err(|source| DataDirError::Io { path: path.to_owned(), source })
    }
}

/// Refuses paths that are absolute, empty or climb.
fn checked(relative: &str) -> Result<&Path, DataDirError> {
    let path = Path::new(relative);
    let plain = path.components().all(|component| matches!(component, Component::Normal(_)));
    let good = plain && !relative.is_empty() && !relative.contains('\0');
    if good { Ok(path) } else { Err(DataDirError::Path(relative.chars().take(200).collect())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute_dir::ComputeDir;
    use bytes::Bytes;
    use wire::pageserver::BaseFile;

    fn base(files: &[(&str, &str)], tablespaces: &[u32]) -> BaseFiles {
        let file = |(path, content): &(&str, &str)| BaseFile {
            path: (*path).to_owned(),
            content: Bytes::copy_from_slice(content.as_bytes()),
        };
        BaseFiles {
            lsn: Lsn(8),
            prev_record_lsn: Lsn::INVALID,
            control_file: Bytes::new(),
            checkpoint: Bytes::new(),
            files: files.iter().map(file).collect(),
            directories: tablespaces.iter().map(|oid| format!("pg_tblspc/{oid}/PG_15_202209061/5")).collect(),
            tablespaces: tablespaces.iter().map(|oid| (*oid, "/srv/elsewhere".to_owned())).collect(),
            unlogged: Vec::new(),
        }
    }

    fn data_dir(name: &str) -> (ComputeDir, DataDir) {
        let root = std::env::temp_dir().join(format!("dormouse-data-dir-{}-{name}", std::process::id()));
        let dir = ComputeDir::claim(&root, None).expect("claim");
        let data = DataDir::create(&dir, None).expect("create");
        (dir, data)
    }

    #[test]
    fn files_directories_and_tablespaces_are_made() {
        let (dir, data) = data_dir("made");
        let content =
            base(&[("PG_VERSION", "15\n"), ("base/5/PG_VERSION", "15\n"), ("pg_hba.conf", "evil")], &[16_400]);
        data.write_base_files(&content).expect("write");
        assert_eq!(std::fs::read_to_string(dir.pgdata().join("base/5/PG_VERSION")).expect("read"), "15\n");
        assert!(!dir.pgdata().join("pg_hba.conf").exists());
        assert!(dir.pgdata().join("pg_wal/archive_status").is_dir());
        assert!(dir.root().join("tablespaces/16400/PG_15_202209061/5").is_dir());
    }

    #[test]
    fn paths_that_lead_outside_are_refused() {
        let (_dir, data) = data_dir("outside");
        for bad in ["/etc/passwd", "../x", "base/../../x", "", ".", "a\0b"] {
            let refused = data.write_base_files(&base(&[(bad, "x")], &[]));
            assert!(matches!(refused, Err(DataDirError::Path(_))), "{bad:?}");
        }
    }
}
