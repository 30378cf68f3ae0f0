//! The control file: what an acceptor must remember.
//!
//! Two slots of [`SLOT_BYTES`], written in turn, so that a torn write leaves the other and each update costs one fdatasync. Once that is
//! done the other slot gets the same, which is not synced by itself: if one of them rots later, nothing that was promised is forgotten.
//! A slot: magic (u32), format version (u32), sequence number (u64), length of the body (u32), CRC32C of sequence, length
//! and body (u32), body (postcard of `AcceptorState`); integers little-endian. The valid slot with the highest sequence
//! counts.
//!
//! Behind the slots, the mark: up to where WAL has been acknowledged (u64), and its CRC32C (u32). It is written with each flush of
//! WAL but not synced by itself, so that it costs next to nothing: exact as long as the machine stays up, and a lower bound after that.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use safekeeper_protocol::{AcceptorState, ProposerId, TermHistory};
use serde::{Deserialize, Serialize};
use tracing::warn;
use types::{Lsn, MembershipGeneration, Term};

use super::{StorageError, sync_dir};

const NAME: &str = "control";
const TEMPORARY_NAME: &str = "control.new";
const MAGIC: u32 = 0x4B53_4D44;
const FORMAT_VERSION: u32 = 5;
/// The version before safekeepers knew where a branch's WAL begins: its last field is missing.
const FORMAT_WITHOUT_BRANCH_START: u32 = 4;
/// The version before safekeepers copied WAL to the object store themselves: one more is missing.
const FORMAT_WITHOUT_OFFLOAD: u32 = 3;
/// The version before memberships could change.
const FORMAT_WITHOUT_MEMBERSHIP: u32 = 2;
const HEADER_BYTES: usize = 24;
/// Holds the longest term history that is accepted (2,000 entries of at most 20 bytes), and a membership of dozens.
const SLOT_BYTES: u64 = 64 * 1024;
const MARK_AT: u64 = 2 * SLOT_BYTES;
const MARK_BYTES: usize = 12;

pub(super) struct ControlFile {
    file: File,
    path: PathBuf,
    sequence: u64,
}

impl ControlFile {
    /// Writes a first control file, durably.
    pub fn create(directory: &Path, state: &AcceptorState) -> Result<ControlFile, StorageError> {
        let temporary = directory.join(TEMPORARY_NAME);
        let path = directory.join(NAME);
        let open = File::options().read(true).write(true).create(true).truncate(true).open(&temporary);
        let file = open.map_err(StorageError::io("create", &temporary))?;
        let mut control = ControlFile { file, path, sequence: 0 };
        control.store(state)?;
        fs::rename(&temporary, &control.path).map_err(StorageError::io("rename", &temporary))?;
        sync_dir(directory)?;
        Ok(control)
    }

    /// Reads the control file; `None` when there is none.
    pub fn load(directory: &Path) -> Result<Option<(ControlFile, AcceptorState)>, StorageError> {
        let path = directory.join(NAME);
        let file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StorageError::Io { action: "open", path, source }),
        };
        let mut bytes = fs::read(&path).map_err(StorageError::io("read", &path))?;
        bytes.truncate(MARK_AT as usize);
        let (first, second) = bytes.split_at(bytes.len().min(SLOT_BYTES as usize));
        let (first, second) = (decode(first), decode(second));
        let best = [&first, &second].into_iter().flatten().max_by_key(|(sequence, _)| *sequence).cloned();
        let reason = || format!("first slot: {}; second slot: {}", error_of(&first), error_of(&second));
        let Some((sequence, state)) = best else {
            return Err(StorageError::Corrupt { path, reason: reason() });
        };
        if first.is_err() || second.is_err() {
            warn!(path = %path.display(), reason = reason(), "one slot of the control file is torn or damaged, the other is used");
        }
        Ok(Some((ControlFile { file, path, sequence }, state)))
    }

    /// Makes a state durable.
    pub fn store(&mut self, state: &AcceptorState) -> Result<(), StorageError> {
        let sequence = self.sequence + 1;
        let slot =
            encode(sequence, state).map_err(|reason| StorageError::Corrupt { path: self.path.clone(), reason })?;
        let [this, other] = [sequence % 2, (sequence + 1) % 2].map(|number| number * SLOT_BYTES);
        let written = self.file.write_all_at(&slot, this).and_then(|()| self.file.sync_data());
        written.map_err(StorageError::io("write", &self.path))?;
        self.sequence = sequence;
        // The next state is written to the other slot: until that is durable, this one is not touched.
        if let Err(error) = self.file.write_all_at(&slot, other) {
            warn!(path = %self.path.display(), %error, "the control file's second copy was not written");
        }
        Ok(())
    }

    /// Notes up to where WAL has been acknowledged; not synced.
    pub fn mark(&self, lsn: Lsn) -> Result<(), StorageError> {
        self.file.write_all_at(&encode_mark(lsn), MARK_AT).map_err(StorageError::io("write", &self.path))
    }

    /// What was noted; `None` when there is nothing that can be read.
    pub fn marked(&self) -> Option<Lsn> {
        let mut mark = [0; MARK_BYTES];
        self.file.read_exact_at(&mut mark, MARK_AT).ok()?;
        decode_mark(&mark)
    }
}

fn encode_mark(lsn: Lsn) -> [u8; MARK_BYTES] {
    let mut mark = [0; MARK_BYTES];
    mark[..8].copy_from_slice(&lsn.0.to_le_bytes());
    let crc = crc32c::crc32c(&mark[..8]);
    mark[8..].copy_from_slice(&crc.to_le_bytes());
    mark
}

fn decode_mark(mark: &[u8; MARK_BYTES]) -> Option<Lsn> {
    let (lsn, crc) = mark.split_at(8);
    let is_good = crc == crc32c::crc32c(lsn).to_le_bytes();
    Some(Lsn(u64::from_le_bytes(*lsn.first_chunk()?))).filter(|_| is_good)
}

fn encode(sequence: u64, state: &AcceptorState) -> Result<Vec<u8>, String> {
    let body = postcard::to_stdvec(state).map_err(|e| e.to_string())?;
    if body.len() + HEADER_BYTES > SLOT_BYTES as usize {
        return Err(format!("a state of {} bytes does not fit", body.len()));
    }
    let length = (body.len() as u32).to_le_bytes();
    let mut slot = Vec::with_capacity(HEADER_BYTES + body.len());
    slot.extend_from_slice(&MAGIC.to_le_bytes());
    slot.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    slot.extend_from_slice(&sequence.to_le_bytes());
    slot.extend_from_slice(&length);
    slot.extend_from_slice(&checksum(sequence, length, &body).to_le_bytes());
    slot.extend_from_slice(&body);
    Ok(slot)
}

fn decode(slot: &[u8]) -> Result<(u64, AcceptorState), String> {
    let header = slot.first_chunk::<HEADER_BYTES>().ok_or("not written")?;
    let word = |at: usize| [header[at], header[at + 1], header[at + 2], header[at + 3]];
    if u32::from_le_bytes(word(0)) != MAGIC {
        return Err("not a control file".to_owned());
    }
    let version = u32::from_le_bytes(word(4));
    if !(FORMAT_WITHOUT_MEMBERSHIP..=FORMAT_VERSION).contains(&version) {
        return Err(format!("format version {version}, this program knows {FORMAT_VERSION}"));
    }
    let sequence = u64::from(u32::from_le_bytes(word(8))) | u64::from(u32::from_le_bytes(word(12))) << 32;
    let length = u32::from_le_bytes(word(16)) as usize;
    let body = slot[HEADER_BYTES..].get(..length).ok_or("cut short")?;
    if checksum(sequence, word(16), body) != u32::from_le_bytes(word(20)) {
        return Err("checksum mismatch".to_owned());
    }
    let state = match version {
        FORMAT_WITHOUT_MEMBERSHIP => postcard::from_bytes::<StateWithoutMembership>(body).map(AcceptorState::from),
        FORMAT_WITHOUT_OFFLOAD => postcard::from_bytes::<AcceptorState>(&[body, &[0, 0]].concat()).map(|mut state| {
            // Nobody but the pageserver stored anything then.
            state.pageserver_lsn = state.remote_consistent_lsn;
            state
        }),
        FORMAT_WITHOUT_BRANCH_START => postcard::from_bytes(&[body, &[0]].concat()),
        _ => postcard::from_bytes(body),
    };
    Ok((sequence, state.map_err(|e| e.to_string())?))
}

/// The body in [`FORMAT_WITHOUT_MEMBERSHIP`].
#[derive(Debug, Serialize, Deserialize)]
struct StateWithoutMembership {
    term: Term,
    voted_for: Option<ProposerId>,
    history: TermHistory,
    system_identifier: Option<u64>,
    log_start_lsn: Lsn,
    flush_lsn: Lsn,
    commit_lsn: Lsn,
    remote_consistent_lsn: Lsn,
    doubtful: bool,
}

impl From<StateWithoutMembership> for AcceptorState {
    fn from(old: StateWithoutMembership) -> AcceptorState {
        AcceptorState {
            term: old.term,
            voted_for: old.voted_for,
            history: old.history,
            system_identifier: old.system_identifier,
            log_start_lsn: old.log_start_lsn,
            flush_lsn: old.flush_lsn,
            commit_lsn: old.commit_lsn,
            remote_consistent_lsn: old.remote_consistent_lsn,
            doubtful: old.doubtful,
            generation: MembershipGeneration::FIRST,
            membership: None,
            pageserver_lsn: old.remote_consistent_lsn,
            branch_start_lsn: Lsn::INVALID,
        }
    }
}

fn checksum(sequence: u64, length: [u8; 4], body: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&sequence.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c_append(crc, &length), body)
}

fn error_of(slot: &Result<(u64, AcceptorState), String>) -> &str {
    slot.as_ref().err().map_or("good", String::as_str)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, option, prelude::*, sample::Index};
    use safekeeper_protocol::{TermStart, history::MAX_HISTORY_ENTRIES};
    use types::{Member, Membership, NodeId};

    use super::*;

    fn state(term: u64) -> AcceptorState {
        AcceptorState { term: Term(term), flush_lsn: Lsn(term * 8), ..AcceptorState::default() }
    }

    fn loaded(directory: &Path) -> (ControlFile, AcceptorState) {
        ControlFile::load(directory).expect("load").expect("there")
    }

    #[test]
    fn a_torn_write_leaves_the_state_before() {
        let dir = tempfile::tempdir().expect("dir");
        assert!(ControlFile::load(dir.path()).expect("load").is_none());
        let mut control = ControlFile::create(dir.path(), &state(1)).expect("create");
        for term in 2..=5 {
            control.store(&state(term)).expect("store");
            assert_eq!(loaded(dir.path()).1, state(term));
        }
        // The sixth, as far as it came.
        let next = encode(6, &state(6)).expect("encode");
        control.file.write_all_at(&next[..HEADER_BYTES], 0).expect("torn");
        let (mut control, last) = loaded(dir.path());
        assert_eq!(last, state(5));
        control.store(&state(7)).expect("store");
        assert_eq!(loaded(dir.path()).1, state(7));
    }

    #[test]
    fn one_slot_may_rot() {
        let dir = tempfile::tempdir().expect("dir");
        let mut control = ControlFile::create(dir.path(), &state(1)).expect("create");
        for term in 2..=5 {
            control.store(&state(term)).expect("store");
            for at in [0, SLOT_BYTES] {
                let path = dir.path().join(NAME);
                let good = fs::read(&path).expect("read");
                control.file.write_all_at(&[0xEE; 3], at + HEADER_BYTES as u64).expect("damage");
                assert_eq!(loaded(dir.path()).1, state(term), "what was promised is not forgotten");
                fs::write(&path, good).expect("write");
            }
        }
        // One that has rotted is written again.
        control.file.write_all_at(&[0xEE; 32], SLOT_BYTES).expect("damage");
        let (mut control, _) = loaded(dir.path());
        control.store(&state(6)).expect("store");
        control.file.write_all_at(&[0xEE; 32], 0).expect("damage");
        assert_eq!(loaded(dir.path()).1, state(6));
        control.file.write_all_at(&[0xEE; 32], SLOT_BYTES).expect("damage");
        assert!(matches!(ControlFile::load(dir.path()), Err(StorageError::Corrupt { .. })));
    }

    #[test]
    fn a_mark_is_read_back_and_no_other() {
        let dir = tempfile::tempdir().expect("dir");
        let mut control = ControlFile::create(dir.path(), &state(1)).expect("create");
        assert_eq!(control.marked(), None);
        control.mark(Lsn(88)).expect("mark");
        control.store(&state(2)).expect("store");
        control.store(&state(3)).expect("store");
        let (control, loaded) = ControlFile::load(dir.path()).expect("load").expect("there");
        assert_eq!(loaded, state(3));
        assert_eq!(control.marked(), Some(Lsn(88)));
        for at in 0..MARK_BYTES {
            let mut damaged = encode_mark(Lsn(88));
            damaged[at] ^= 4;
            assert_eq!(decode_mark(&damaged), None);
        }
    }

    #[test]
    fn a_control_file_from_before_memberships_is_read() {
        let old = StateWithoutMembership {
            term: Term(7),
            voted_for: Some(ProposerId(1)),
            history: TermHistory::new(vec![TermStart { term: Term(7), start_lsn: Lsn(8) }]),
            system_identifier: Some(9),
            log_start_lsn: Lsn(8),
            flush_lsn: Lsn(24),
            commit_lsn: Lsn(16),
            remote_consistent_lsn: Lsn(3),
            doubtful: true,
        };
        let slot = slot_of(FORMAT_WITHOUT_MEMBERSHIP, &postcard::to_stdvec(&old).expect("body"));
        let expected = AcceptorState::from(old);
        assert_eq!((expected.generation, expected.flush_lsn), (MembershipGeneration::FIRST, Lsn(24)));
        assert_eq!(decode(&slot), Ok((5, expected)));
    }

    #[test]
    fn a_control_file_from_before_offloading_is_read() {
        let expected = AcceptorState { remote_consistent_lsn: Lsn(16), pageserver_lsn: Lsn(16), ..state(4) };
        let now = postcard::to_stdvec(&AcceptorState { pageserver_lsn: Lsn(0), ..expected.clone() }).expect("body");
        let slot = slot_of(FORMAT_WITHOUT_OFFLOAD, &now[..now.len() - 2]);
        assert_eq!(decode(&slot), Ok((5, expected)));
    }

    #[test]
    fn a_control_file_from_before_branch_starts_is_read() {
        let expected = AcceptorState { pageserver_lsn: Lsn(1 << 40), system_identifier: Some(9), ..state(4) };
        let now = postcard::to_stdvec(&expected).expect("body");
        assert_eq!(decode(&slot_of(FORMAT_WITHOUT_BRANCH_START, &now[..now.len() - 1])), Ok((5, expected)));
        assert!(decode(&slot_of(FORMAT_VERSION, &now[..now.len() - 1])).is_err());
        assert!(decode(&slot_of(FORMAT_VERSION + 1, &now)).is_err());
    }

    /// A slot of another version, with the sequence number 5.
    fn slot_of(version: u32, body: &[u8]) -> Vec<u8> {
        let mut slot = encode(5, &state(1)).expect("encode");
        let length = (body.len() as u32).to_le_bytes();
        slot.truncate(HEADER_BYTES);
        slot[4..8].copy_from_slice(&version.to_le_bytes());
        slot[16..20].copy_from_slice(&length);
        slot[20..24].copy_from_slice(&checksum(5, length, body).to_le_bytes());
        slot.extend_from_slice(body);
        slot
    }

    /// A control file with these slots, each as long as its space.
    fn write_slots(directory: &Path, slots: [&[u8]; 2]) {
        let mut file = vec![0; 2 * SLOT_BYTES as usize];
        for (slot, at) in slots.into_iter().zip([0, SLOT_BYTES as usize]) {
            let length = slot.len().min(SLOT_BYTES as usize);
            file[at..at + length].copy_from_slice(&slot[..length]);
        }
        fs::write(directory.join(NAME), file).expect("write");
    }

    fn any_state() -> impl Strategy<Value = AcceptorState> {
        let entries = vec((any::<u64>(), any::<u64>()), 0..40);
        let voted_for = option::of(any::<u128>().prop_map(ProposerId));
        let member = (any::<u64>(), "[a-z.]{1,20}:[0-9]{1,5}");
        let member = member.prop_map(|(node, address)| Member { node: NodeId(node), address });
        let sets = (vec(member.clone(), 1..6), option::of(vec(member, 1..6)));
        (any::<[u64; 8]>(), voted_for, option::of(any::<u64>()), entries, any::<bool>(), option::of(sets)).prop_map(
            |(numbers, voted_for, system_identifier, entries, doubtful, sets)| {
                let [term, log_start, flush, commit, remote, generation, pageserver, branch_start] = numbers;
                let generation = MembershipGeneration(generation);
                let start = |(term, lsn)| TermStart { term: Term(term), start_lsn: Lsn(lsn) };
                AcceptorState {
                    term: Term(term),
                    voted_for,
                    history: TermHistory::new(entries.into_iter().map(start).collect()),
                    system_identifier,
                    log_start_lsn: Lsn(log_start),
                    flush_lsn: Lsn(flush),
                    commit_lsn: Lsn(commit),
                    remote_consistent_lsn: Lsn(remote),
                    doubtful,
                    generation,
                    membership: sets.map(|(members, new_members)| Membership { generation, members, new_members }),
                    pageserver_lsn: Lsn(pageserver),
                    branch_start_lsn: Lsn(branch_start),
                }
            },
        )
    }

    /// What may happen to a slot.
    fn damage() -> impl Strategy<Value = Vec<(Index, u8)>> {
        vec((any::<Index>(), 1..=255u8), 1..8)
    }

    fn damaged(slot: &[u8], damage: &[(Index, u8)]) -> Vec<u8> {
        let mut slot = slot.to_vec();
        for (at, flip) in damage {
            let at = at.index(slot.len());
            slot[at] ^= flip;
        }
        slot
    }

    proptest! {
        #[test]
        fn random_bytes_are_an_error(bytes in vec(any::<u8>(), 0..300)) {
            prop_assert!(decode(&bytes).is_err());
        }

        #[test]
        fn random_bodies_with_a_good_checksum_do_no_harm(sequence: u64, body in vec(any::<u8>(), 0..300)) {
            let mut slot = encode(sequence, &state(1)).expect("encode");
            let length = (body.len() as u32).to_le_bytes();
            slot.truncate(HEADER_BYTES);
            slot[16..20].copy_from_slice(&length);
            slot[20..24].copy_from_slice(&checksum(sequence, length, &body).to_le_bytes());
            slot.extend_from_slice(&body);
            // Whatever it means: no panic, and no memory for what only its lengths promise.
            let _ = decode(&slot);
        }

        #[test]
        fn what_is_stored_comes_back_and_no_part_of_it_does(sequence: u64, state in any_state(), cut: Index) {
            let slot = encode(sequence, &state).expect("encode");
            prop_assert_eq!(decode(&slot), Ok((sequence, state)));
            prop_assert!(decode(&slot[..cut.index(slot.len())]).is_err());
        }

        #[test]
        fn a_damaged_slot_falls_back_to_the_other(
            sequence in 1..u64::MAX,
            older in any_state(),
            newer in any_state(),
            damage in damage(),
        ) {
            let dir = tempfile::tempdir().expect("dir");
            let good = encode(sequence, &older).expect("encode");
            let latest = encode(sequence + 1, &newer).expect("encode");
            let bad = damaged(&latest, &damage);
            // Flips may cancel each other out.
            let expected = if bad == latest { &newer } else { &older };
            for slots in [[&good[..], &bad[..]], [&bad[..], &good[..]]] {
                write_slots(dir.path(), slots);
                let (_, loaded) = ControlFile::load(dir.path()).expect("load").expect("there");
                prop_assert_eq!(&loaded, expected);
            }
            if bad != latest {
                write_slots(dir.path(), [&bad, &bad]);
                prop_assert!(ControlFile::load(dir.path()).is_err());
            }
        }
    }

    #[test]
    fn the_longest_history_fits() {
        let entry = TermStart { term: Term(u64::MAX), start_lsn: Lsn(u64::MAX) };
        let history = TermHistory::new(vec![entry; MAX_HISTORY_ENTRIES]);
        encode(u64::MAX, &AcceptorState { history, ..state(u64::MAX / 8) }).expect("fits");
    }
}
