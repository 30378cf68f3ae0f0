//! A disk that is soon full.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// A small tmpfs; unmounted when dropped.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one of this size (`mount -o size=`); `None` when this is not root, who alone can.
    pub fn mount(at: &Path, size: &str) -> anyhow::Result<Option<SmallDisk>> {
        if !nix::unistd::geteuid().is_root() {
            return Ok(None);
        }
        std::fs::create_dir_all(at)?;
        let options = format!("size={size},mode=755");
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).status()?;
        Ok(status.success().then(|| SmallDisk(at.to_owned())))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
