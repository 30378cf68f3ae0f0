//! What a WAL record changes, in terms of stored things.

use types::{BlockNumber, Lsn, Oid, PageTag, RelTag};

/// A simple LRU area of Postgres (`access/slru.h`), as far as WAL describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[repr(u8)]
pub enum SlruKind {
    /// `pg_xact`: two status bits per transaction.
    Clog = 0,
    /// `pg_multixact/offsets`.
    MultiXactOffsets = 1,
    /// `pg_multixact/members`.
    MultiXactMembers = 2,
    /// `pg_commit_ts`.
    CommitTs = 3,
}

impl SlruKind {
    /// All kinds.
    pub const ALL: [SlruKind; 4] =
        [SlruKind::Clog, SlruKind::MultiXactOffsets, SlruKind::MultiXactMembers, SlruKind::CommitTs];

    /// Its directory below the data directory; pages are in segment files of 32, named `{:04X}` of `page / 32`.
    pub fn directory(self) -> &'static str {
        match self {
            SlruKind::Clog => "pg_xact",
            SlruKind::MultiXactOffsets => "pg_multixact/offsets",
            SlruKind::MultiXactMembers => "pg_multixact/members",
            SlruKind::CommitTs => "pg_commit_ts",
        }
    }
}

/// One effect of a record. A record's effects are listed in the order in which redo performs them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The record, applied with `redo_page`, changes this relation page. A block beyond the relation's size extends it,
    /// and any gap in between is pages of zeroes.
    Page {
        /// The page.
        tag: PageTag,
        /// Redo does not need the page's old content (a full-page image or an initialisation).
        will_init: bool,
    },
    /// The record, applied with `redo_slru_page`, changes this page.
    SlruPage {
        /// Which area.
        slru: SlruKind,
        /// Page number counted from the area's start (not within a segment).
        page: u32,
        /// Redo does not need the page's old content.
        will_init: bool,
    },
    /// All segments wholly before the one that holds this page are removed (wraparound as in `SimpleLruTruncate`).
    SlruTruncate {
        /// Which area.
        slru: SlruKind,
        /// The first page that is still needed.
        cutoff_page: u32,
    },
    /// The fork exists from here on (with no blocks, if it is new).
    CreateRel(RelTag),
    /// The fork now has exactly this many blocks, if it had more.
    TruncateRel {
        /// The fork.
        rel: RelTag,
        /// Blocks that stay.
        blocks: BlockNumber,
    },
    /// All forks of the relation of this main fork are gone.
    DropRel(RelTag),
    /// A database directory exists from here on, with a `PG_VERSION` file and no relations.
    CreateDatabase { spc: Oid, db: Oid },
    /// A database directory becomes a copy of another, relations, relation map and all, as of this record.
    CopyDatabase { src_spc: Oid, src_db: Oid, spc: Oid, db: Oid },
    /// A database directory and everything in it is gone.
    DropDatabase { spc: Oid, db: Oid },
    /// New content of a `pg_filenode.map` (512 bytes); `db` 0 is the shared one in `global`.
    RelationMap { spc: Oid, db: Oid, content: Box<[u8]> },
    /// A transaction is prepared: `content` is its `pg_twophase` file, checksum included.
    TwoPhaseCreate { xid: u32, content: Box<[u8]> },
    /// A prepared transaction has ended.
    TwoPhaseRemove { xid: u32 },
    /// A tablespace exists.
    CreateTablespace { oid: Oid, path: Box<str> },
    /// A tablespace is gone.
    DropTablespace { oid: Oid },
    /// A transaction committed at this time (microseconds since 2000-01-01 UTC).
    Commit { timestamp_us: i64 },
    /// Transactions of a replication origin have been applied up to here, as the origin counts. `force`: also where that
    /// goes back.
    AdvanceOrigin { origin: u16, remote_lsn: Lsn, force: bool },
    /// A replication origin is forgotten.
    DropOrigin { origin: u16 },
    /// Content of a small file that Dormouse keeps with the branch (statistics): from a logical message that the agent wrote
    /// with the prefix [`crate::AUX_FILE_PREFIX`]. Empty content removes it.
    AuxFile { path: Box<str>, content: Box<[u8]> },
}
