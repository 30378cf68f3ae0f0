//! The unprivileged user that Postgres runs as.

use std::{io, os::unix::fs::PermissionsExt, path::Path};

use nix::unistd::{Gid, Uid, User, chown};

/// A user and its group; `None` where the agent itself is unprivileged and simply owns everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    uid: Uid,
    gid: Gid,
}

/// No user to run Postgres as.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// Postgres refuses to run as root.
    #[error("Postgres does not run as root: name an unprivileged user for it")]
    Missing,
    /// The system does not know the user.
    #[error("no such user: {0}")]
    Unknown(String),
    /// The user is root by another name.
    #[error("user {0} is root; Postgres needs an unprivileged one")]
    Root(String),
    /// The user database could not be read.
    #[error("looking up user {0}: {1}")]
    Lookup(String, nix::Error),
}

impl Owner {
    /// The user to switch to: `None` unless the agent is root.
    pub fn resolve(name: Option<&str>) -> Result<Option<Owner>, OwnerError> {
        if !Uid::effective().is_root() {
            return Ok(None);
        }
        let name = name.ok_or(OwnerError::Missing)?;
        let found = User::from_name(name).map_err(|error| OwnerError::Lookup(name.to_owned(), error))?;
        let user = found.ok_or_else(|| OwnerError::Unknown(name.to_owned()))?;
        if user.uid.is_root() {
            return Err(OwnerError::Root(name.to_owned()));
        }
        Ok(Some(Owner { uid: user.uid, gid: user.gid }))
    }

    /// User id.
    pub fn uid(&self) -> u32 {
        self.uid.as_raw()
    }

    /// Group id.
    pub fn gid(&self) -> u32 {
        self.gid.as_raw()
    }
}

/// Gives a path to `owner`; nothing to do when the agent runs as the same user.
pub fn give(path: &Path, owner: Option<Owner>) -> io::Result<()> {
    match owner {
        Some(owner) => Ok(chown(path, Some(owner.uid), Some(owner.gid))?),
        None => Ok(()),
    }
}

/// Makes a directory that only its owner may enter, and its parents.
pub fn make_private_dir(path: &Path, owner: Option<Owner>) -> io::Result<()> {
    std::fs::create_dir_all(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))?;
    give(path, owner)
}
