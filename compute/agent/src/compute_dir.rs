//! A compute's private directory and what is where in it.

use std::{
    collections::hash_map::DefaultHasher,
    fs::{File, OpenOptions},
    hash::{Hash, Hasher},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use nix::fcntl::{Flock, FlockArg};

use crate::owner::{Owner, make_private_dir};

/// The name that Postgres gives its socket; the port is part of the name only.
const POSTGRES_SOCKET: &str = ".s.PGSQL.5432";

/// Longest address of a Unix socket, bytes, without the closing zero (`sockaddr_un.sun_path`).
const MAX_SOCKET_PATH_BYTES: usize = 107;

/// How often and how fast the removal of what a killed compute left is tried again.
const REMOVE_ATTEMPTS: u32 = 50;
const REMOVE_PAUSE: Duration = Duration::from_millis(20);

/// Claimed for this process: no other agent uses the directory as long as this lives, and a dead one's claim is void.
/// Dropped, it is removed with everything in it.
#[derive(Debug)]
pub struct ComputeDir {
    paths: ComputePaths,
    _claim: Flock<File>,
}

/// What is where in a compute's directory.
#[derive(Debug, Clone)]
pub struct ComputePaths {
    root: PathBuf,
    /// Different for every claim.
    nonce: u32,
}

impl std::ops::Deref for ComputeDir {
    type Target = ComputePaths;
    fn deref(&self) -> &ComputePaths {
        &self.paths
    }
}

/// The directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ComputeDirError {
    /// A socket in it would have an address that is too long.
    #[error("the path of the compute directory is too long for a Unix socket by {excess} bytes: {path}")]
    TooLong {
        /// The directory.
        path: PathBuf,
        /// Bytes over the limit.
        excess: usize,
    },
    /// The path is relative.
    #[error("the path of the compute directory is not absolute: {0}")]
    Relative(PathBuf),
    /// Another agent is alive in it.
    #[error("another compute is running in {0}")]
    InUse(PathBuf),
    /// The file system refused.
    #[error("compute directory {path}: {source}")]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl ComputeDir {
    /// Makes the directory, empty and with mode 0700. What a dead compute left in it is removed.
    pub fn claim(root: &Path, owner: Option<Owner>) -> Result<ComputeDir, ComputeDirError> {
        check_path(root)?;
        let failed = |source| ComputeDirError::Io { path: root.to_owned(), source };
        make_private_dir(root, owner).map_err(failed)?;
        let directory = open_directory(root).map_err(failed)?;
        let claim = match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(claim) => claim,
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Err(ComputeDirError::InUse(root.to_owned())),
            Err((_, error)) => return Err(failed(error.into())),
        };
        // Its last user may have removed the directory between the opening and the claim.
        let same = std::fs::metadata(root).is_ok_and(|now| claim.metadata().is_ok_and(|held| held.ino() == now.ino()));
        if !same {
            return Err(ComputeDirError::InUse(root.to_owned()));
        }
        remove_contents(root).map_err(failed)?;
        Ok(ComputeDir { paths: ComputePaths { root: root.to_owned(), nonce: nonce() }, _claim: claim })
    }
}

impl ComputePaths {
    /// The directory itself, which also holds Postgres's socket.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Postgres's data directory.
    pub fn pgdata(&self) -> PathBuf {
        self.root.join("pgdata")
    }

    /// Where tablespaces' symbolic links point to, a directory for each.
    pub fn tablespaces(&self) -> PathBuf {
        self.root.join("tablespaces")
    }

    /// Postgres's socket.
    pub fn postgres_socket(&self) -> PathBuf {
        self.root.join(POSTGRES_SOCKET)
    }

    /// The agent's HTTP socket.
    pub fn agent_socket(&self) -> PathBuf {
        self.root.join("agent.sock")
    }

    /// The socket on which the agent answers the shim. Its name is new each time: a backend of a compute that was killed may
    /// outlive it by a moment, and must not be told by the next agent that its WAL is safe.
    pub fn shim_socket(&self) -> PathBuf {
        self.root.join(format!("shim.{:08x}", self.nonce))
    }

    /// The page cache's shared index.
    pub fn page_cache_index(&self) -> PathBuf {
        self.root.join("page-cache")
    }
}

impl Drop for ComputeDir {
    fn drop(&mut self) {
        match std::fs::remove_dir_all(&self.paths.root) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(path = %self.paths.root.display(), %error, "removing the compute directory"),
        }
    }
}

/// Of the process and the time: two claims of one directory differ in at least one.
fn nonce() -> u32 {
    let mut hasher = DefaultHasher::new();
    (std::process::id(), SystemTime::now()).hash(&mut hasher);
    hasher.finish() as u32
}

fn check_path(root: &Path) -> Result<(), ComputeDirError> {
    if !root.is_absolute() {
        return Err(ComputeDirError::Relative(root.to_owned()));
    }
    let length = root.join(POSTGRES_SOCKET).as_os_str().len();
    match length.checked_sub(MAX_SOCKET_PATH_BYTES) {
        Some(excess) if excess > 0 => Err(ComputeDirError::TooLong { path: root.to_owned(), excess }),
        _ => Ok(()),
    }
}

fn open_directory(root: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(root)
}

/// Removes all that is in a directory. What a killed compute has not yet let go of may still be growing: tried again.
fn remove_contents(root: &Path) -> io::Result<()> {
    for _ in 0..REMOVE_ATTEMPTS {
        match remove_contents_once(root) {
            Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound) => {
                std::thread::sleep(REMOVE_PAUSE);
            }
            done => return done,
        }
    }
    remove_contents_once(root)
}

fn remove_contents_once(root: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(root)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("dormouse-compute-dir-{}-{name}", std::process::id()))
    }

    #[test]
    fn a_live_directory_is_refused_and_a_dead_ones_content_removed() {
        let root = scratch("claim");
        std::fs::create_dir_all(root.join("pgdata")).expect("what a killed agent leaves");
        let first = ComputeDir::claim(&root, None).expect("claim");
        assert!(!first.pgdata().exists());
        assert!(matches!(ComputeDir::claim(&root, None), Err(ComputeDirError::InUse(_))));
        assert!(root.exists());
        drop(first);
        assert!(!root.exists());
    }

    #[test]
    fn the_shims_socket_is_another_each_time_and_its_name_is_no_longer_than_postgres_has() {
        let claim = || ComputeDir::claim(&scratch("nonce"), None).expect("claim").shim_socket();
        let (first, second) = (claim(), claim());
        assert_ne!(first, second);
        assert!(first.file_name().expect("name").len() <= POSTGRES_SOCKET.len());
    }

    #[test]
    fn paths_that_leave_no_room_for_a_socket_are_refused() {
        let long = PathBuf::from("/").join("x".repeat(MAX_SOCKET_PATH_BYTES - 1 - POSTGRES_SOCKET.len()));
        assert!(matches!(check_path(&long), Err(ComputeDirError::TooLong { excess: 1, .. })));
        let fits = PathBuf::from("/").join("x".repeat(MAX_SOCKET_PATH_BYTES - 2 - POSTGRES_SOCKET.len()));
        assert!(check_path(&fits).is_ok());
        assert!(matches!(check_path(Path::new("x")), Err(ComputeDirError::Relative(_))));
    }
}
