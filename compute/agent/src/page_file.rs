//! The file of cached pages: a compute's own while it runs, and what is left of it while the compute sleeps.
//!
//! After a clean stop the file stays, with a list of the pages in it that says which branch they are of, and as of where. A wake
//! takes both over at once; whether the pages are still the latest is seen when the start of the new term is known.

use std::{
    collections::hash_map::DefaultHasher,
    fs::Metadata,
    hash::{Hash, Hasher},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use types::EndpointId;

/// Endings of the names of a sleeping cache's pages and of their list.
const ASLEEP: &str = "asleep";
const ASLEEP_LIST: &str = "asleep-list";

/// Longest list that is read: 30 million pages.
const MAX_LIST_BYTES: u64 = 1 << 30;

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
        remove(&path)?;
        Ok(PageFile(path))
    }

    /// Puts what the last compute left asleep in the file's place and answers its list; `None` when there is nothing. Either
    /// way it can be had only once.
    pub fn take_asleep(&self) -> Option<Vec<u8>> {
        let (pages, list) = (self.0.with_extension(ASLEEP), self.0.with_extension(ASLEEP_LIST));
        let short = std::fs::metadata(&list).is_ok_and(|file| file.len() <= MAX_LIST_BYTES);
        let content = if short { std::fs::read(&list).ok() } else { None };
        let taken = content.filter(|_| std::fs::rename(&pages, &self.0).is_ok());
        for left in [&list, &pages] {
            if let Err(error) = remove(left) {
                tracing::warn!(path = %left.display(), %error, "removing what a page cache left");
            }
        }
        taken
    }

    /// Leaves the file to the next compute, with this list, if it takes no more than `limit_bytes`. The oldest of others make
    /// way: those in the directories beside this file's.
    pub fn leave_asleep(&self, list: &[u8], limit_bytes: u64) -> io::Result<()> {
        let own_bytes = allocated(&std::fs::metadata(&self.0)?);
        if own_bytes > limit_bytes || list.len() as u64 > MAX_LIST_BYTES {
            return Ok(());
        }
        if let Some(directories) = self.0.parent().and_then(Path::parent) {
            make_room(directories, limit_bytes - own_bytes)?;
        }
        let pages = self.0.with_extension(ASLEEP);
        std::fs::rename(&self.0, &pages)?;
        // Written whole or not believed: it ends with a checksum.
        std::fs::write(self.0.with_extension(ASLEEP_LIST), list).inspect_err(|_| {
            let _ = remove(&pages);
        })
    }
}

impl Drop for PageFile {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "removing the page cache");
        }
        // Left alone when it holds other files.
        if let Some(directory) = self.0.parent() {
            let _ = std::fs::remove_dir(directory);
        }
    }
}

/// Removes the oldest sleeping caches in the directories below `directories` until the others take `limit_bytes` at most.
fn make_room(directories: &Path, limit_bytes: u64) -> io::Result<()> {
    let mut asleep = Vec::new();
    for directory in std::fs::read_dir(directories)?.flatten() {
        let Ok(files) = std::fs::read_dir(directory.path()) else { continue };
        let paths = files.flatten().map(|file| file.path());
        asleep.extend(paths.filter(|path| path.extension().is_some_and(|ending| ending == ASLEEP)).filter_map(age));
    }
    asleep.sort_unstable();
    let mut bytes: u64 = asleep.iter().map(|(_, bytes, _)| bytes).sum();
    for (_, file_bytes, path) in asleep {
        if bytes <= limit_bytes {
            break;
        }
        remove(&path.with_extension(ASLEEP_LIST))?;
        remove(&path)?;
        bytes -= file_bytes;
    }
    Ok(())
}

/// When a file was last written, what it takes, and its path; `None` when it has gone meanwhile.
fn age(path: PathBuf) -> Option<(SystemTime, u64, PathBuf)> {
    let file = std::fs::metadata(&path).ok()?;
    Some((file.modified().ok()?, allocated(&file), path))
}

/// Bytes on disk: the file has holes.
fn allocated(file: &Metadata) -> u64 {
    file.blocks() * 512
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    fn file(directories: &Path, endpoint: &str) -> PageFile {
        let endpoint = EndpointId::new(endpoint).expect("id");
        let directory = directories.join(endpoint.as_str());
        std::fs::create_dir_all(&directory).expect("mkdir");
        PageFile::claim(PageFile::path_in(&directory, &endpoint, Path::new("/run/c"))).expect("claim")
    }

    fn leave(directories: &Path, endpoint: &str, limit_kib: u64) {
        let file = file(directories, endpoint);
        std::fs::write(&file.0, vec![1; 64 * KIB as usize]).expect("write");
        file.leave_asleep(endpoint.as_bytes(), limit_kib * KIB).expect("leave");
        // Ages are told by clocks that may be coarse.
        std::thread::sleep(std::time::Duration::from_millis(20));
    }

    fn take(directories: &Path, endpoint: &str) -> Option<Vec<u8>> {
        let file = file(directories, endpoint);
        let list = file.take_asleep();
        assert_eq!(list.is_some(), file.0.exists());
        list
    }

    #[test]
    fn what_is_left_can_be_taken_once_and_the_oldest_makes_way() {
        let directories = std::env::temp_dir().join(format!("dormouse-page-files-{}", std::process::id()));
        std::fs::create_dir_all(&directories).expect("mkdir");
        assert_eq!(take(&directories, "a"), None);
        leave(&directories, "a", 1000);
        assert_eq!(take(&directories, "a").as_deref(), Some(&b"a"[..]));
        assert_eq!(take(&directories, "a"), None);

        leave(&directories, "a", 150);
        leave(&directories, "b", 150);
        leave(&directories, "c", 150);
        assert_eq!(take(&directories, "a"), None, "there is room for two");
        assert_eq!(take(&directories, "b").as_deref(), Some(&b"b"[..]));
        leave(&directories, "d", 10);
        assert_eq!(take(&directories, "d"), None, "it is too large itself");
        assert_eq!(take(&directories, "c").as_deref(), Some(&b"c"[..]));
        std::fs::remove_dir_all(&directories).expect("clean up");
    }
}
