//! A compute's private directory and what is where in it.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

use crate::owner::{Owner, make_private_dir};

/// The name that Postgres gives its socket; the port is part of the name only.
const POSTGRES_SOCKET: &str = ".s.PGSQL.5432";

/// Longest address of a Unix socket, bytes, without the closing zero (`sockaddr_un.sun_path`).
const MAX_SOCKET_PATH_BYTES: usize = 107;

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
        Ok(ComputeDir { paths: ComputePaths { root: root.to_owned() }, _claim: claim })
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

    /// The socket on which the agent answers the shim.
    pub fn shim_socket(&self) -> PathBuf {
        self.root.join("shim.sock")
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

fn remove_contents(root: &Path) -> io::Result<()> {
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
    fn paths_that_leave_no_room_for_a_socket_are_refused() {
        let long = PathBuf::from("/").join("x".repeat(MAX_SOCKET_PATH_BYTES - 1 - POSTGRES_SOCKET.len()));
        assert!(matches!(check_path(&long), Err(ComputeDirError::TooLong { excess: 1, .. })));
        let fits = PathBuf::from("/").join("x".repeat(MAX_SOCKET_PATH_BYTES - 2 - POSTGRES_SOCKET.len()));
        assert!(check_path(&fits).is_ok());
        assert!(matches!(check_path(Path::new("x")), Err(ComputeDirError::Relative(_))));
    }
}
