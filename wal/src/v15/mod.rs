//! PostgreSQL 15: resource managers, info codes, record structs, page headers.
//!
//! Field names are Postgres's. Structs are packed images of what stands in WAL: read them with `from_prefix`, which copies, so
//! alignment does not matter. Arrays that follow a struct are not part of it: slice behind `SIZE`.

pub mod btree;
pub mod heap;
pub mod page;
pub mod replication;
pub mod state;
pub mod wal;
pub mod xact;

pub use page::{PageRead, PageWrite};

/// Declares a packed struct that is read from and written to bytes as it is.
macro_rules! wire_struct {
    ($(#[$doc:meta])* pub struct $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::KnownLayout, zerocopy::Immutable, zerocopy::Unaligned,
        )]
        #[repr(C, packed)]
        #[allow(missing_docs)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }

        impl $name {
            /// Bytes that it takes in WAL.
            pub const SIZE: usize = size_of::<$name>();

            /// Reads it from the start of `bytes`; `None` when they are too few.
            #[inline(always)]
            pub fn from_prefix(bytes: &[u8]) -> Option<$name> {
                <$name as zerocopy::FromBytes>::read_from_prefix(bytes).ok().map(|(value, _)| value)
            }
        }
    };
}
pub(crate) use wire_struct;

wire_struct! {
    /// `RelFileNode` (`storage/relfilenode.h`).
    pub struct RelFileNode {
        spc_node: u32,
        db_node: u32,
        rel_node: u32,
    }
}

impl RelFileNode {
    /// As one of our names, of this fork.
    pub fn fork(self, fork: types::ForkNumber) -> types::RelTag {
        types::RelTag { spc: self.spc_node, db: self.db_node, rel: self.rel_node, fork }
    }
}

/// Resource manager numbers (`access/rmgrlist.h`).
pub mod rmgr {
    use crate::record::RmgrId;

    macro_rules! rmgrs {
        ($($number:literal $name:ident $text:literal)*) => {
            $(#[doc = $text] pub const $name: RmgrId = RmgrId($number);)*

            /// The name that `pg_waldump` shows. `None` for a number that PostgreSQL 15 doesn't have, or an extension's own.
            pub fn name(rmgr: RmgrId) -> Option<&'static str> {
                match rmgr {
                    $($name => Some($text),)*
                    RmgrId(_) => None,
                }
            }
        };
    }
    rmgrs! {
        0 XLOG "XLOG"
        1 XACT "Transaction"
        2 SMGR "Storage"
        3 CLOG "CLOG"
        4 DBASE "Database"
        5 TBLSPC "Tablespace"
        6 MULTIXACT "MultiXact"
        7 RELMAP "RelMap"
        8 STANDBY "Standby"
        9 HEAP2 "Heap2"
        10 HEAP "Heap"
        11 BTREE "Btree"
        12 HASH "Hash"
        13 GIN "Gin"
        14 GIST "Gist"
        15 SEQ "Sequence"
        16 SPGIST "SPGist"
        17 BRIN "BRIN"
        18 COMMIT_TS "CommitTs"
        19 REPLORIGIN "ReplicationOrigin"
        20 GENERIC "Generic"
        21 LOGICALMSG "LogicalMessage"
    }

    /// Lowest number of an extension's own resource manager (`RM_MIN_CUSTOM_ID`).
    pub const MIN_CUSTOM: u8 = 128;

    /// True for numbers that may stand in WAL (`RmgrIdIsValid`).
    pub fn is_valid(number: u8) -> bool {
        number <= LOGICALMSG.0 || number >= MIN_CUSTOM
    }
}

/// Info codes of the XLOG resource manager (`catalog/pg_control.h`).
pub mod xlog {
    #![allow(missing_docs)]
    pub const CHECKPOINT_SHUTDOWN: u8 = 0x00;
    pub const CHECKPOINT_ONLINE: u8 = 0x10;
    pub const NOOP: u8 = 0x20;
    pub const NEXTOID: u8 = 0x30;
    pub const SWITCH: u8 = 0x40;
    pub const BACKUP_END: u8 = 0x50;
    pub const PARAMETER_CHANGE: u8 = 0x60;
    pub const RESTORE_POINT: u8 = 0x70;
    pub const FPW_CHANGE: u8 = 0x80;
    pub const END_OF_RECOVERY: u8 = 0x90;
    pub const FPI_FOR_HINT: u8 = 0xA0;
    pub const FPI: u8 = 0xB0;
    pub const OVERWRITE_CONTRECORD: u8 = 0xD0;
}
