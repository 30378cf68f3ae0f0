//! The file of cached pages, removed with the compute that made it.

use std::{
    collections::hash_map::DefaultHasher,
    hash::{Hash, Hasher},
    io,
    path::{Path, PathBuf},
};

use types::EndpointId;

/// Removes the file when it is dropped.
#[derive(Debug)]
pub struct PageFile(PathBuf);

impl PageFile {
    /// Its name in a directory that computes may share. One agent at a time has the compute directory, and so the file that
    /// is named after it: a compute that is about to be fenced keeps its own.
    pub fn path_in(directory: &Path, endpoint: &EndpointId, compute_dir: &Path) -> PathBuf {
        let mut hasher = DefaultHasher::new();
        compute_dir.hash(&mut hasher);
        directory.join(format!("{endpoint}-{:016x}.pages", hasher.finish()))
    }

    /// Takes charge of the file, which does not exist then. One that a killed compute left is unlinked rather than written
    /// over: its last backends may still have it open.
    pub fn claim(path: PathBuf) -> io::Result<PageFile> {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(PageFile(path)),
        }
    }
}

impl Drop for PageFile {
    fn drop(&mut self) {
        match std::fs::remove_file(&self.0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(path = %self.0.display(), %error, "removing the page cache"),
        }
        // Left alone when it holds other computes' files.
        if let Some(directory) = self.0.parent() {
            let _ = std::fs::remove_dir(directory);
        }
    }
}
