//! `global/pg_control` (`catalog/pg_control.h`, `ControlFileData` of PostgreSQL 15).

use types::Lsn;
use zerocopy::{FromBytes, IntoBytes};

use crate::{checkpoint::CheckPoint, v15::wire_struct};

/// Bytes of the file (`PG_CONTROL_FILE_SIZE`).
pub const CONTROL_FILE_BYTES: usize = 8192;
/// `PG_CONTROL_VERSION` of PostgreSQL 15.
const CONTROL_VERSION: u32 = 1300;
/// `DB_SHUTDOWNED`.
const STATE_SHUTDOWNED: u32 = 1;
/// Where the checksum stands; it covers everything before.
const CRC_AT: usize = Contents::SIZE;

wire_struct! {
    /// `ControlFileData` up to its checksum.
    pub struct Contents {
        system_identifier: u64,
        pg_control_version: u32,
        catalog_version_no: u32,
        /// `DBState`.
        state: u32,
        padding_1: u32,
        /// Seconds since 1970.
        time: i64,
        check_point: u64,
        check_point_copy: CheckPoint,
        unlogged_lsn: u64,
        min_recovery_point: u64,
        min_recovery_point_tli: u32,
        padding_2: u32,
        backup_start_point: u64,
        backup_end_point: u64,
        backup_end_required: u8,
        padding_3: [u8; 3],
        wal_level: i32,
        wal_log_hints: u8,
        padding_4: [u8; 3],
        max_connections: i32,
        max_worker_processes: i32,
        max_wal_senders: i32,
        max_prepared_xacts: i32,
        max_locks_per_xact: i32,
        track_commit_timestamp: u8,
        padding_5: [u8; 3],
        max_align: u32,
        float_format: [u8; 8],
        blcksz: u32,
        relseg_size: u32,
        xlog_blcksz: u32,
        xlog_seg_size: u32,
        name_data_len: u32,
        index_max_keys: u32,
        toast_max_chunk_size: u32,
        loblksize: u32,
        float8_by_val: u8,
        padding_6: [u8; 3],
        data_checksum_version: u32,
        mock_authentication_nonce: [u8; 32],
    }
}

/// A parsed `pg_control`. [`Contents`] may be changed; the checksum is made when it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlFile {
    /// Its fields.
    pub contents: Contents,
}

/// Why bytes are not a `pg_control` of PostgreSQL 15.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlFileError {
    /// Fewer bytes than the struct has.
    #[error("pg_control of {0} bytes is cut short")]
    TooShort(usize),
    /// Another major version.
    #[error("pg_control has format {0}, not {CONTROL_VERSION} of PostgreSQL 15")]
    OtherVersion(u32),
    /// Damaged.
    #[error("pg_control has a wrong checksum")]
    BadCrc,
    /// Built with, or initialised with, other sizes than Dormouse's.
    #[error("pg_control says {what} is {found}, not {wanted}")]
    OtherSize {
        /// The field.
        what: &'static str,
        /// Its value.
        found: u32,
        /// What it has to be.
        wanted: u32,
    },
}

impl ControlFile {
    /// Reads the file. Errors when it is damaged, of another version, or of a cluster with other page or segment sizes.
    pub fn parse(bytes: &[u8]) -> Result<ControlFile, ControlFileError> {
        let short = ControlFileError::TooShort(bytes.len());
        let (contents, rest) = Contents::read_from_prefix(bytes).map_err(|_| short.clone())?;
        if contents.pg_control_version != CONTROL_VERSION {
            return Err(ControlFileError::OtherVersion(contents.pg_control_version));
        }
        let crc = rest.first_chunk().map(|crc| u32::from_le_bytes(*crc)).ok_or(short)?;
        if crc != crc32c::crc32c(&bytes[..CRC_AT]) {
            return Err(ControlFileError::BadCrc);
        }
        let sizes = [
            ("block size", contents.blcksz, types::PAGE_BYTES as u32),
            ("blocks per relation segment", contents.relseg_size, types::REL_SEGMENT_BLOCKS),
            ("WAL block size", contents.xlog_blcksz, types::XLOG_PAGE_BYTES as u32),
            ("WAL segment size", contents.xlog_seg_size, types::WAL_SEGMENT_BYTES as u32),
            ("data checksum version", contents.data_checksum_version, 0),
        ];
        match sizes.into_iter().find(|(_, found, wanted)| found != wanted) {
            Some((what, found, wanted)) => Err(ControlFileError::OtherSize { what, found, wanted }),
            None => Ok(ControlFile { contents }),
        }
    }

    /// The file, with its checksum.
    pub fn to_bytes(&self) -> [u8; CONTROL_FILE_BYTES] {
        let mut bytes = [0; CONTROL_FILE_BYTES];
        bytes[..CRC_AT].copy_from_slice(self.contents.as_bytes());
        let crc = crc32c::crc32c(&bytes[..CRC_AT]);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The cluster's identifier, which also stands in WAL.
    pub fn system_identifier(&self) -> u64 {
        self.contents.system_identifier
    }

    /// Start of the last checkpoint's record.
    pub fn checkpoint_lsn(&self) -> Lsn {
        Lsn(self.contents.check_point)
    }

    /// The last checkpoint.
    pub fn checkpoint(&self) -> CheckPoint {
        self.contents.check_point_copy
    }

    /// True after a clean stop (`DB_SHUTDOWNED`): a start needs no recovery.
    pub fn is_shut_down(&self) -> bool {
        self.contents.state == STATE_SHUTDOWNED
    }

    /// Makes it the `pg_control` of a cluster that was cleanly stopped by the shutdown checkpoint whose record starts at
    /// `checkpoint_lsn`: a start needs that record and nothing before it.
    pub fn set_shutdown_at(&mut self, checkpoint_lsn: Lsn, checkpoint: &CheckPoint) {
        let contents = &mut self.contents;
        contents.state = STATE_SHUTDOWNED;
        contents.time = checkpoint.time;
        contents.check_point = checkpoint_lsn.0;
        contents.check_point_copy = checkpoint.for_shutdown_at(checkpoint_lsn);
        contents.min_recovery_point = 0;
        contents.min_recovery_point_tli = 0;
        contents.backup_start_point = 0;
        contents.backup_end_point = 0;
        contents.backup_end_required = 0;
    }
}
