//! Where an installation's files are on this host.

use std::path::PathBuf;

/// The data directory when none is named: `$XDG_DATA_HOME/dormouse`, or `~/.local/share/dormouse`.
pub fn default_data_dir() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("XDG_DATA_HOME")
        .or_else(|| from("HOME").map(|home| home.join(".local/share")))
        .unwrap_or_else(|| PathBuf::from("/var/lib"))
        .join("dormouse")
}
