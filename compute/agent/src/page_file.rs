//! The file of cached pages, removed with the compute that made it.

use std::path::{Path, PathBuf};

use types::EndpointId;

/// Removes the file when it is dropped.
#[derive(Debug)]
pub struct PageFile(PathBuf);

impl PageFile {
    /// Its name in a directory that computes may share.
    pub fn path_in(directory: &Path, endpoint: &EndpointId) -> PathBuf {
        directory.join(format!("{endpoint}.pages"))
    }

    /// Takes charge of the file, which need not exist yet.
    pub fn claim(path: PathBuf) -> PageFile {
        PageFile(path)
    }
}

impl Drop for PageFile {
    fn drop(&mut self) {
        match std::fs::remove_file(&self.0) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(path = %self.0.display(), %error, "removing the page cache"),
        }
        // Left alone when it holds other computes' files.
        if let Some(directory) = self.0.parent() {
            let _ = std::fs::remove_dir(directory);
        }
    }
}
