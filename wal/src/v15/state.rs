//! Records about things that are not relation pages: storage, SLRUs, databases, tablespaces, relation maps, messages.
#![allow(missing_docs)]

use types::{ForkNumber, RelTag};

use super::{RelFileNode, wire_struct};

/// Storage (`catalog/storage_xlog.h`).
pub mod smgr {
    pub const CREATE: u8 = 0x10;
    pub const TRUNCATE: u8 = 0x20;
    /// Bits of [`super::SmgrTruncate::flags`].
    pub const TRUNCATE_HEAP: u32 = 1;
    pub const TRUNCATE_VM: u32 = 2;
    pub const TRUNCATE_FSM: u32 = 4;
}
wire_struct! {
    /// `xl_smgr_create`.
    pub struct SmgrCreate { rnode: RelFileNode, fork_num: i32, }
}
impl SmgrCreate {
    /// The fork that is made; `None` for a fork number that doesn't exist.
    pub fn rel(&self) -> Option<RelTag> {
        let fork = u8::try_from(self.fork_num).ok().and_then(|number| ForkNumber::try_from(number).ok())?;
        Some({ self.rnode }.fork(fork))
    }
}
wire_struct! {
    /// `xl_smgr_truncate`.
    pub struct SmgrTruncate { blkno: u32, rnode: RelFileNode, flags: u32, }
}

/// CLOG (`access/clog.h`).
pub mod clog {
    /// Main data: the page number (i32).
    pub const ZEROPAGE: u8 = 0x00;
    pub const TRUNCATE: u8 = 0x10;
    /// Transactions in a page (`CLOG_XACTS_PER_PAGE`).
    pub const XACTS_PER_PAGE: u32 = 32_768;
}
wire_struct! {
    /// `xl_clog_truncate`.
    pub struct ClogTruncate { pageno: i32, oldest_xact: u32, oldest_xact_db: u32, }
}

/// CommitTs (`access/commit_ts.h`).
pub mod commit_ts {
    /// Main data: the page number (i32).
    pub const ZEROPAGE: u8 = 0x00;
    pub const TRUNCATE: u8 = 0x10;
    /// An entry: a timestamp (i64) and a replication origin (u16), unaligned (`SizeOfCommitTimestampEntry`).
    pub const ENTRY_BYTES: usize = 10;
    /// Entries in a page (`COMMIT_TS_XACTS_PER_PAGE`).
    pub const XACTS_PER_PAGE: u32 = 819;
}
wire_struct! {
    /// `xl_commit_ts_truncate`.
    pub struct CommitTsTruncate { pageno: i32, oldest_xid: u32, }
}

/// MultiXact (`access/multixact.h`, `access/transam/multixact.c`).
pub mod multixact {
    /// Main data: the page number (i32).
    pub const ZERO_OFF_PAGE: u8 = 0x00;
    /// Main data: the page number (i32).
    pub const ZERO_MEM_PAGE: u8 = 0x10;
    pub const CREATE_ID: u8 = 0x20;
    pub const TRUNCATE_ID: u8 = 0x30;
    /// Offsets (u32) in a page (`MULTIXACT_OFFSETS_PER_PAGE`).
    pub const OFFSETS_PER_PAGE: u32 = 2048;
    /// Members in a group: four flag bytes, then four xids (`MULTIXACT_MEMBERS_PER_MEMBERGROUP`).
    pub const MEMBERS_PER_GROUP: u32 = 4;
    /// Bytes of a group (`MULTIXACT_MEMBERGROUP_SIZE`).
    pub const GROUP_BYTES: u32 = 20;
    /// Groups in a page (`MULTIXACT_MEMBERGROUPS_PER_PAGE`); the page's last bytes are unused.
    pub const GROUPS_PER_PAGE: u32 = 409;
    /// Members in a page (`MULTIXACT_MEMBERS_PER_PAGE`).
    pub const MEMBERS_PER_PAGE: u32 = MEMBERS_PER_GROUP * GROUPS_PER_PAGE;
}
wire_struct! {
    /// `xl_multixact_create`; [`MultiXactMember`]s follow.
    pub struct MultiXactCreate { mid: u32, moff: u32, nmembers: u32, }
}
wire_struct! {
    /// `MultiXactMember`.
    pub struct MultiXactMember { xid: u32, status: u32, }
}
impl MultiXactCreate {
    /// The members that follow in `main_data`; `None` when it is cut short.
    pub fn members(main_data: &[u8]) -> Option<(MultiXactCreate, Vec<MultiXactMember>)> {
        let create = MultiXactCreate::from_prefix(main_data)?;
        let wanted = (create.nmembers as usize).checked_mul(MultiXactMember::SIZE)?;
        let bytes = main_data[MultiXactCreate::SIZE..].get(..wanted)?;
        let members = bytes.chunks_exact(MultiXactMember::SIZE).filter_map(MultiXactMember::from_prefix).collect();
        Some((create, members))
    }
}
wire_struct! {
    /// `xl_multixact_truncate`.
    pub struct MultiXactTruncate {
        oldest_multi_db: u32,
        start_trunc_off: u32,
        end_trunc_off: u32,
        start_trunc_memb: u32,
        end_trunc_memb: u32,
    }
}

/// Database (`commands/dbcommands_xlog.h`).
pub mod dbase {
    pub const CREATE_FILE_COPY: u8 = 0x00;
    pub const CREATE_WAL_LOG: u8 = 0x10;
    pub const DROP: u8 = 0x20;
}
wire_struct! {
    /// `xl_dbase_create_file_copy_rec`.
    pub struct DbaseCreateFileCopy { db_id: u32, tablespace_id: u32, src_db_id: u32, src_tablespace_id: u32, }
}
wire_struct! {
    /// `xl_dbase_create_wal_log_rec`.
    pub struct DbaseCreateWalLog { db_id: u32, tablespace_id: u32, }
}
wire_struct! {
    /// `xl_dbase_drop_rec`; tablespace ids (u32) follow.
    pub struct DbaseDrop { db_id: u32, ntablespaces: u32, }
}

/// Tablespace (`commands/tablespace.h`).
pub mod tblspc {
    /// Main data: the id (u32) and the directory, ended by a zero byte.
    pub const CREATE: u8 = 0x00;
    /// Main data: the id (u32).
    pub const DROP: u8 = 0x10;
}

/// RelMap (`utils/relmapper.h`).
pub mod relmap {
    pub const UPDATE: u8 = 0x00;
    /// Bytes of a `pg_filenode.map` (`RelMapFile` in `utils/cache/relmapper.c`).
    pub const FILE_BYTES: usize = 512;
}
wire_struct! {
    /// `xl_relmap_update`; `nbytes` bytes, the whole file, follow.
    pub struct RelmapUpdate { dbid: u32, tsid: u32, nbytes: u32, }
}

/// Standby (`storage/standbydefs.h`).
pub mod standby {
    pub const LOCK: u8 = 0x00;
    pub const RUNNING_XACTS: u8 = 0x10;
    pub const INVALIDATIONS: u8 = 0x20;
}
wire_struct! {
    /// `xl_running_xacts`; `xcnt + subxcnt` xids follow.
    pub struct RunningXacts {
        xcnt: u32,
        subxcnt: u32,
        subxid_overflow: u8,
        padding: [u8; 3],
        next_xid: u32,
        oldest_running_xid: u32,
        latest_completed_xid: u32,
    }
}

/// ReplicationOrigin (`replication/origin.h`).
pub mod replorigin {
    pub const SET: u8 = 0x00;
    pub const DROP: u8 = 0x10;
    /// `DoNotReplicateId`: marks what must not be passed on, and has no progress.
    pub const DO_NOT_REPLICATE: u16 = u16::MAX;
}
wire_struct! {
    /// `xl_replorigin_set`.
    pub struct ReplOriginSet { remote_lsn: u64, node_id: u16, force: u8, }
}
wire_struct! {
    /// `xl_replorigin_drop`.
    pub struct ReplOriginDrop { node_id: u16, }
}

/// Sequence (`commands/sequence.h`).
pub mod seq {
    pub const LOG: u8 = 0x00;
}

/// LogicalMessage (`replication/message.h`).
pub mod logicalmsg {
    pub const MESSAGE: u8 = 0x00;
}
wire_struct! {
    /// `xl_logical_message`; the prefix with its zero byte (`prefix_size` counts it) and the message follow.
    pub struct LogicalMessage {
        db_id: u32,
        transactional: u8,
        padding: [u8; 3],
        prefix_size: u64,
        message_size: u64,
    }
}
impl LogicalMessage {
    /// Prefix (without its zero byte) and message of a record's main data; `None` when it is cut short or malformed.
    pub fn parse(main_data: &[u8]) -> Option<(&[u8], &[u8])> {
        let header = LogicalMessage::from_prefix(main_data)?;
        let rest = &main_data[LogicalMessage::SIZE..];
        let (prefix, message) = rest.split_at_checked(usize::try_from(header.prefix_size).ok()?)?;
        let message = message.get(..usize::try_from(header.message_size).ok()?)?;
        Some((prefix.strip_suffix(&[0])?, message))
    }

    /// Main data of a message that belongs to no transaction and no database. `prefix` must hold no zero byte.
    pub fn main_data(prefix: &str, message: &[u8]) -> Vec<u8> {
        let header = LogicalMessage {
            db_id: 0,
            transactional: 0,
            padding: [0; 3],
            prefix_size: prefix.len() as u64 + 1,
            message_size: message.len() as u64,
        };
        let mut data = zerocopy::IntoBytes::as_bytes(&header).to_vec();
        data.extend_from_slice(prefix.as_bytes());
        data.push(0);
        data.extend_from_slice(message);
        data
    }
}

wire_struct! {
    /// `xl_parameter_change` (`access/xlog_internal.h`).
    pub struct ParameterChange {
        max_connections: i32,
        max_worker_processes: i32,
        max_wal_senders: i32,
        max_prepared_xacts: i32,
        max_locks_per_xact: i32,
        wal_level: i32,
        wal_log_hints: u8,
        track_commit_timestamp: u8,
    }
}
wire_struct! {
    /// `xl_end_of_recovery` (`access/xlog_internal.h`).
    pub struct EndOfRecovery { end_time: i64, this_timeline: u32, prev_timeline: u32, }
}
