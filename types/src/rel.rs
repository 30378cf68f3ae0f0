//! Names of relations, their forks and their pages.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A Postgres object id.
pub type Oid = u32;

/// Object ids that Postgres fixes (`catalog/pg_tablespace.dat`, `catalog/pg_database.dat`).
pub mod oids {
    use super::Oid;
    /// `pg_default`: relations below `base/<database>/`.
    pub const DEFAULT_TABLESPACE: Oid = 1663;
    /// `pg_global`: relations below `global/`, whose database is 0.
    pub const GLOBAL_TABLESPACE: Oid = 1664;
    /// `template1`.
    pub const TEMPLATE1_DATABASE: Oid = 1;
}

/// One of a relation's forks (`ForkNumber` in `common/relpath.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum ForkNumber {
    /// The data itself.
    Main = 0,
    /// Free space map.
    Fsm = 1,
    /// Visibility map.
    Vm = 2,
    /// What an unlogged relation is reset to.
    Init = 3,
}

/// A fork number above 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unknown relation fork number {0}")]
pub struct UnknownFork(pub u8);

impl ForkNumber {
    /// All forks, main first.
    pub const ALL: [ForkNumber; 4] = [ForkNumber::Main, ForkNumber::Fsm, ForkNumber::Vm, ForkNumber::Init];

    /// The suffix of the fork's file name: empty, `_fsm`, `_vm` or `_init`.
    pub fn suffix(self) -> &'static str {
        match self {
            ForkNumber::Main => "",
            ForkNumber::Fsm => "_fsm",
            ForkNumber::Vm => "_vm",
            ForkNumber::Init => "_init",
        }
    }
}

impl TryFrom<u8> for ForkNumber {
    type Error = UnknownFork;
    fn try_from(number: u8) -> Result<ForkNumber, UnknownFork> {
        ForkNumber::ALL.get(usize::from(number)).copied().ok_or(UnknownFork(number))
    }
}

/// A fork of a relation (`RelFileNode` of `storage/relfilenode.h` plus the fork).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RelTag {
    /// Tablespace.
    pub spc: Oid,
    /// Database; 0 for the shared relations below `global/`.
    pub db: Oid,
    /// The relation's file number (`relfilenode`).
    pub rel: Oid,
    /// Which fork.
    pub fork: ForkNumber,
}

impl RelTag {
    /// The same relation's other fork.
    pub fn with_fork(self, fork: ForkNumber) -> RelTag {
        RelTag { fork, ..self }
    }
}

impl fmt::Display for RelTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}{}", self.spc, self.db, self.rel, self.fork.suffix())
    }
}

impl fmt::Debug for RelTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A page's index in its fork (`BlockNumber`), or, where a type says so, a count of pages.
pub type BlockNumber = u32;

/// A page of a relation (`BufferTag`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageTag {
    /// The fork.
    pub rel: RelTag,
    /// The page's index in it.
    pub block: BlockNumber,
}

impl fmt::Display for PageTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} block {}", self.rel, self.block)
    }
}

impl fmt::Debug for PageTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
