//! The shim inside this program, and where it is put for Postgres to load.

use std::{
    collections::hash_map::DefaultHasher,
    fs,
    hash::Hasher,
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::Context;
use control_plane::host;
use nix::sys::statvfs::{FsFlags, statvfs};

/// `libdormouse_shim.so` as built with this program.
const SHIM: &[u8] = include_bytes!(env!("DORMOUSE_SHIM_LIBRARY"));

/// Writes the shim, once, where Postgres's user can map it: below the runtime directory, or on disk where that is mounted
/// `noexec` (as containers mount `/dev/shm`).
pub fn install(runtime_dir: Option<&Path>, data_dir: &Path) -> anyhow::Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    hasher.write(SHIM);
    let name = format!("libdormouse_shim-{:016x}.so", hasher.finish());
    let runtime_dir = host::runtime_dir(runtime_dir)?;
    let directory = if may_execute(&runtime_dir) {
        host::runtime_dir(Some(&runtime_dir.join("lib")))?
    } else {
        host::disk_dir(&std::path::absolute(data_dir)?, "lib")?
    };
    let path = directory.join(name);
    // The directory is ours alone to write, so what is there was put there by us: whole, as it was renamed into place.
    let there = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file() && meta.size() == SHIM.len() as u64);
    if !there {
        write(&path).with_context(|| format!("writing the shim to {}", path.display()))?;
    }
    Ok(path)
}

fn may_execute(directory: &Path) -> bool {
    statvfs(directory).is_ok_and(|stat| !stat.flags().contains(FsFlags::ST_NOEXEC))
}

fn write(path: &Path) -> std::io::Result<()> {
    let temporary = path.with_extension(format!("new-{}", std::process::id()));
    let mut file = fs::File::create(&temporary)?;
    file.write_all(SHIM)?;
    file.set_permissions(fs::Permissions::from_mode(0o755))?;
    drop(file);
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shim_is_inside_and_is_written_once() {
        assert_eq!(&SHIM[..4], b"\x7fELF");
        let base = std::env::temp_dir().join(format!("dormouse-shim-{}", std::process::id()));
        fs::create_dir_all(&base).expect("mkdir");
        let first = install(Some(&base.join("run")), &base).expect("install");
        let written = fs::metadata(&first).expect("file").modified().expect("time");
        let second = install(Some(&base.join("run")), &base).expect("again");
        assert_eq!((first, written), (second.clone(), fs::metadata(&second).expect("file").modified().expect("time")));
        fs::remove_dir_all(base).expect("clean up");
    }
}
