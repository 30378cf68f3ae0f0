//! What this host offers: Postgres's programs, a user for it, and directories that it can reach.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

use nix::unistd::{Uid, User};

/// Something the host lacks; each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No Postgres.
    #[error(
        "PostgreSQL 15 was not found ({0}); install it with `apt-get install postgresql-15` or name its directory with --postgres-bin-dir"
    )]
    Postgres(String),
    /// No unprivileged user.
    #[error("Postgres does not run as root and there is no user {0:?}; name one with --postgres-user")]
    User(String),
    /// A directory cannot be made or is not ours.
    #[error("directory {}: {reason}", .path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// Debian's place.
const DEBIAN_BIN_DIR: &str = "/usr/lib/postgresql/15/bin";

/// The directory of PostgreSQL 15's programs: as asked for, Debian's, or what `pg_config` says.
pub fn postgres_bin_dir(asked: Option<&Path>) -> Result<PathBuf, HostError> {
    if let Some(asked) = asked {
        return check_version(asked).map(|()| asked.to_owned());
    }
    let debian = Path::new(DEBIAN_BIN_DIR);
    if debian.join("postgres").exists() {
        return check_version(debian).map(|()| debian.to_owned());
    }
    let output = Command::new("pg_config").arg("--bindir").output();
    let output = output.map_err(|e| HostError::Postgres(format!("no {DEBIAN_BIN_DIR}, and pg_config: {e}")))?;
    let directory = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    check_version(&directory).map(|()| directory)
}

fn check_version(directory: &Path) -> Result<(), HostError> {
    let program = directory.join("postgres");
    let output = Command::new(&program).arg("--version").output();
    let output = output.map_err(|e| HostError::Postgres(format!("{}: {e}", program.display())))?;
    let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if version.contains(" 15.") {
        return Ok(());
    }
    Err(HostError::Postgres(format!("{} is {version:?}, not version 15", program.display())))
}

/// The user to run Postgres as: only when this process is root.
pub fn postgres_user(asked: Option<&str>) -> Result<Option<String>, HostError> {
    if !Uid::effective().is_root() {
        return Ok(None);
    }
    let known = |name: &str| User::from_name(name).ok().flatten().is_some();
    match asked {
        Some(asked) if known(asked) => Ok(Some(asked.to_owned())),
        Some(asked) => Err(HostError::User(asked.to_owned())),
        None => ["postgres", "nobody"]
            .into_iter()
            .find(|name| known(name))
            .map(|name| Some(name.to_owned()))
            .ok_or_else(|| HostError::User("postgres".into())),
    }
}

/// The directory for computes' expendable files: as asked for, or below `/dev/shm` (memory), or below `/tmp`.
pub fn runtime_dir(asked: Option<&Path>) -> Result<PathBuf, HostError> {
    let directory = match asked {
        Some(asked) => asked.to_owned(),
        None => {
            let parent = [Path::new("/dev/shm"), Path::new("/tmp")].into_iter().find(|path| path.is_dir());
            parent.unwrap_or(Path::new("/tmp")).join(own_name())
        }
    };
    make_own(&directory)?;
    Ok(directory)
}

/// A directory on disk that the user of Postgres can reach: `name` below `data_dir`, or below `/var/tmp` when a parent of
/// `data_dir` (such as `/root`) is closed to it.
pub fn disk_dir(data_dir: &Path, name: &str) -> Result<PathBuf, HostError> {
    let directory = data_dir.join(name);
    if !Uid::effective().is_root() || is_open_to_all(data_dir) {
        make_own(&directory)?;
        return Ok(directory);
    }
    let parent = Path::new("/var/tmp").join(own_name());
    make_own(&parent)?;
    let directory = parent.join(name);
    make_own(&directory)?;
    Ok(directory)
}

fn own_name() -> String {
    format!("dormouse-{}", Uid::effective())
}

/// True when every directory up to the root may be entered by anyone.
fn is_open_to_all(path: &Path) -> bool {
    let Ok(path) = path.canonicalize() else { return false };
    path.ancestors().all(|part| fs::metadata(part).is_ok_and(|meta| meta.permissions().mode() & 0o001 != 0))
}

/// Makes a directory that others may pass through at most. One that someone else made is refused: `/dev/shm` and `/tmp` are
/// open to everyone.
fn make_own(path: &Path) -> Result<(), HostError> {
    let failed = |reason: String| HostError::Directory { path: path.to_owned(), reason };
    let mode = if Uid::effective().is_root() { 0o711 } else { 0o700 };
    match fs::DirBuilder::new().recursive(false).mode(mode).create(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(path).map_err(|e| failed(e.to_string()))?;
        }
        Err(e) => return Err(failed(e.to_string())),
    }
    let meta = fs::symlink_metadata(path).map_err(|e| failed(e.to_string()))?;
    if !meta.is_dir() || meta.uid() != Uid::effective().as_raw() {
        return Err(failed(
            "exists and belongs to someone else; choose another with --runtime-dir or --data-dir".into(),
        ));
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|e| failed(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_in_place_of_directories_are_refused() {
        let base = std::env::temp_dir().join(format!("dormouse-host-{}", uuid::Uuid::new_v4()));
        let own = base.join("own");
        assert_eq!(runtime_dir(Some(&own)).expect("made"), own);
        runtime_dir(Some(&own)).expect("made before");
        std::os::unix::fs::symlink(&own, base.join("link")).expect("link");
        assert!(runtime_dir(Some(&base.join("link"))).is_err());
        fs::remove_dir_all(base).expect("clean up");
    }
}
