//! What must hold before anything is started.

use std::{
    fs::{self, DirBuilder, File},
    net::{SocketAddr, TcpListener},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use nix::{
    fcntl::{Flock, FlockArg},
    unistd::Uid,
};

/// The data directory, made if missing, as an absolute path.
pub fn data_dir(asked: PathBuf) -> anyhow::Result<PathBuf> {
    let path = std::path::absolute(&asked).with_context(|| format!("--data-dir {}", asked.display()))?;
    if !path.is_dir() {
        // Postgres's user must pass through to its caches when this is root.
        let mode = if Uid::effective().is_root() { 0o711 } else { 0o700 };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        }
        DirBuilder::new().mode(mode).create(&path).with_context(|| format!("making {}", path.display()))?;
    }
    Ok(path)
}

/// A directory that only this user may enter: the data directory itself may have to be open to Postgres's user.
pub fn private_dir(path: &Path) -> anyhow::Result<()> {
    let made = || -> std::io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o700))
    };
    made().with_context(|| format!("making {}", path.display()))
}

/// Held while the installation runs.
pub fn lock(data_dir: &Path) -> anyhow::Result<Flock<File>> {
    let path = data_dir.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => bail!(
            "another `dormouse up` runs with the data directory {}; stop it, or choose another with --data-dir",
            data_dir.display()
        ),
        Err((_, error)) => Err(error).with_context(|| format!("locking {}", path.display())),
    }
}

/// Fails when someone listens there; `flag` is what to change.
pub fn port_is_free(address: SocketAddr, what: &str, flag: &str) -> anyhow::Result<()> {
    match TcpListener::bind(address) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
            bail!("port {} ({what}) is already in use; choose another with {flag}", address.port())
        }
        Err(e) => Err(e).with_context(|| format!("port {} ({what}, {flag})", address.port())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_installation_and_a_taken_port_are_refused() {
        let base = std::env::temp_dir().join(format!("dormouse-up-{}", std::process::id()));
        let dir = data_dir(base.join("data")).expect("made");
        let held = lock(&dir).expect("first");
        assert!(lock(&dir).expect_err("second").to_string().contains("--data-dir"));
        drop(held);
        lock(&dir).expect("free again");
        private_dir(&dir.join("logs")).expect("made");
        private_dir(&dir.join("logs")).expect("there");
        assert_eq!(fs::metadata(dir.join("logs")).expect("directory").permissions().mode() & 0o777, 0o700);
        fs::remove_dir_all(base).expect("clean up");

        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        let error = port_is_free(address, "Postgres", "--pg-port").expect_err("taken");
        assert!(error.to_string().contains("--pg-port"));
        drop(listener);
        port_is_free(address, "Postgres", "--pg-port").expect("free");
    }
}
