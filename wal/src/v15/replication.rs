//! Files of logical replication: a slot's `pg_replslot/<slot>/state` and `pg_logical/replorigin_checkpoint`.

use types::Lsn;

use super::wire_struct;

/// `SLOT_MAGIC` and `SLOT_VERSION` of `replication/slot.c`.
const SLOT_MAGIC: u32 = 0x0105_1CA1;
const SLOT_VERSION: u32 = 2;
/// What the checksum leaves out: the magic number and the checksum itself.
const UNCHECKED_BYTES: usize = 8;
/// What `length` says: all behind itself.
const LENGTH: u32 = (SlotFile::SIZE - 16) as u32;
/// `RS_PERSISTENT`: the other kinds do not outlive a session.
const PERSISTENT: u32 = 0;

/// `REPLICATION_STATE_MAGIC` of `replication/logical/origin.c`.
const ORIGINS_MAGIC: u32 = 0x1257_DADE;

wire_struct! {
    /// `ReplicationSlotOnDisk` with `ReplicationSlotPersistentData` (`replication/slot.h`), padding included.
    pub struct SlotFile {
        magic: u32,
        checksum: u32,
        version: u32,
        length: u32,
        name: [u8; 64],
        database: u32,
        persistency: u32,
        xmin: u32,
        catalog_xmin: u32,
        restart_lsn: u64,
        invalidated_at: u64,
        confirmed_flush: u64,
        two_phase_at: u64,
        two_phase: u8,
        plugin: [u8; 64],
        padding: [u8; 7],
    }
}

/// The state of a replication slot as its file has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotState(SlotFile);

/// Not the file of a slot of PostgreSQL 15.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotFileError {
    /// Its size, magic number or version.
    #[error("not the state of a replication slot of PostgreSQL 15")]
    Format,
    /// Its checksum.
    #[error("the state of a replication slot has a wrong checksum")]
    Checksum,
}

impl SlotState {
    /// A slot of this content; magic number, version and length are set, the checksum comes with [`SlotState::to_bytes`].
    pub fn new(content: SlotFile) -> SlotState {
        SlotState(SlotFile { magic: SLOT_MAGIC, version: SLOT_VERSION, length: LENGTH, ..content })
    }

    /// Reads a `state` file.
    pub fn parse(content: &[u8]) -> Result<SlotState, SlotFileError> {
        let file = SlotFile::from_prefix(content).filter(|_| content.len() == SlotFile::SIZE);
        let file = file.ok_or(SlotFileError::Format)?;
        if (file.magic, file.version, file.length) != (SLOT_MAGIC, SLOT_VERSION, LENGTH) {
            return Err(SlotFileError::Format);
        }
        if file.checksum != crc32c::crc32c(&content[UNCHECKED_BYTES..]) {
            return Err(SlotFileError::Checksum);
        }
        Ok(SlotState(file))
    }

    /// As a `state` file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = zerocopy::IntoBytes::as_bytes(&self.0).to_vec();
        let checksum = crc32c::crc32c(&bytes[UNCHECKED_BYTES..]);
        bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// It outlives the session that made it.
    pub fn is_persistent(&self) -> bool {
        self.0.persistency == PERSISTENT
    }

    /// It decodes a database's changes; the others are standbys'.
    pub fn is_logical(&self) -> bool {
        self.0.database != 0
    }

    /// The oldest WAL that it needs; `None` when it needs none: nothing is reserved yet, or it was invalidated.
    pub fn restart_lsn(&self) -> Option<Lsn> {
        Some(Lsn(self.0.restart_lsn)).filter(|lsn| lsn.is_valid())
    }

    /// Where the WAL must begin for the slot to be of use. A standby asks for it from a segment's start.
    pub fn needs_from(&self) -> Option<Lsn> {
        let restart_lsn = self.restart_lsn()?;
        Some(if self.is_logical() { restart_lsn } else { restart_lsn.segment_start() })
    }

    /// As Postgres marks a slot whose WAL is gone (`InvalidatePossiblyObsoleteSlot`): whoever uses it gets Postgres's own
    /// error.
    pub fn invalidated(self) -> SlotState {
        SlotState(SlotFile { invalidated_at: self.0.restart_lsn, restart_lsn: 0, ..self.0 })
    }
}

/// Content of `pg_logical/replorigin_checkpoint` (`CheckPointReplicationOrigin`): for each origin, up to where its
/// transactions have been applied here, as the origin counts.
pub fn origins_file(origins: impl IntoIterator<Item = (u16, Lsn)>) -> Vec<u8> {
    let mut content = ORIGINS_MAGIC.to_le_bytes().to_vec();
    for (origin, remote_lsn) in origins {
        content.extend_from_slice(&u64::from(origin).to_le_bytes());
        content.extend_from_slice(&remote_lsn.0.to_le_bytes());
    }
    content.extend_from_slice(&crc32c::crc32c(&content).to_le_bytes());
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot() -> SlotState {
        let zeroed = SlotFile::from_prefix(&[0; SlotFile::SIZE]).expect("size");
        SlotState::new(SlotFile { database: 5, restart_lsn: 0x100_0028, ..zeroed })
    }

    #[test]
    fn a_slot_is_read_and_written_as_postgres_does() {
        assert_eq!(SlotFile::SIZE, 200);
        let bytes = slot().to_bytes();
        let read = SlotState::parse(&bytes).expect("valid");
        assert_eq!(read.restart_lsn(), Some(Lsn(0x100_0028)));
        assert!(read.is_logical() && read.is_persistent());
        assert_eq!({ read.0.length }, 184);
        let lost = SlotState::parse(&read.invalidated().to_bytes()).expect("valid");
        assert_eq!((lost.restart_lsn(), { lost.0.invalidated_at }), (None, 0x100_0028));
    }

    #[test]
    fn other_files_are_no_slots() {
        let bytes = slot().to_bytes();
        assert_eq!(SlotState::parse(&bytes[..199]), Err(SlotFileError::Format));
        assert_eq!(SlotState::parse(&[&bytes[..], &[0]].concat()), Err(SlotFileError::Format));
        for (at, expected) in [(0, SlotFileError::Format), (8, SlotFileError::Format), (97, SlotFileError::Checksum)] {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert_eq!(SlotState::parse(&bad), Err(expected), "byte {at}");
        }
    }
}
