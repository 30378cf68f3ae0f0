//! What must be remembered of branches that are idle and have no WAL here, all in one file: a directory and a control file for each would take
//! some 16 KiB.
//!
//! A log of records: length of the body (u32), CRC32C of length and body (u32), body (postcard of branch and `AcceptorState`). The last one
//! of a branch counts, unless the branch has a directory, which is newer. Before the records: magic (u32), format version (u32), and the mark, up to where
//! records have been fsynced (u64, CRC32C as u32), which is written behind each fsync and not synced itself. A record that can't be read is a
//! torn write behind the mark, and damage before it: which branch it was of is not known then, so no branch that is not found is taken for a new one.

use std::{
    collections::HashMap,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use safekeeper_protocol::AcceptorState;
use tracing::{error, info};
use types::BranchRef;

use super::{StorageError, create_durably, sync_dir};

const NAME: &str = "idle";
const TEMPORARY_NAME: &str = "idle.new";
const MAGIC: u32 = 0x5348_4D44;
const FORMAT_VERSION: u32 = 1;
const MARK_AT: u64 = 8;
const RECORDS_AT: u64 = 32;
const HEADER_BYTES: usize = 8;
/// As a slot of a control file.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// The file is written anew when this much of it, and more than half, is out of date.
const WASTE_BYTES: u64 = 1 << 20;

/// The file and where each branch's record is. A branch takes some 100 bytes of memory and some 200 of disk.
pub(crate) struct Shelf {
    data_dir: PathBuf,
    inner: Mutex<Inner>,
}

struct Inner {
    file: File,
    end: u64,
    records: HashMap<BranchRef, Place>,
    /// Bytes of the records that count.
    live_bytes: u64,
    /// Why a branch that is not found may have been here.
    damage: Option<String>,
}

#[derive(Clone, Copy)]
struct Place {
    at: u64,
    bytes: u32,
}

impl Shelf {
    /// Reads the file, or makes an empty one.
    pub fn open(data_dir: &Path) -> Result<Shelf, StorageError> {
        let path = data_dir.join(NAME);
        if !path.exists() {
            replace(data_dir, std::iter::empty())?;
        }
        let bytes = fs::read(&path).map_err(StorageError::io("read", &path))?;
        let file = File::options().read(true).write(true).open(&path).map_err(StorageError::io("open", &path))?;
        let corrupt = |reason: &str| StorageError::Corrupt { path: path.clone(), reason: reason.to_owned() };
        if bytes.get(..4) != Some(&MAGIC.to_le_bytes()) || bytes.get(4..8) != Some(&FORMAT_VERSION.to_le_bytes()) {
            return Err(corrupt("not a list of idle branches that this program can read"));
        }
        let found = scan(&bytes);
        let mark = decode_mark(&bytes).ok_or_else(|| corrupt("its mark can't be read"))?;
        let damage = (found.end < mark).then(|| format!("{} is damaged at byte {}", path.display(), found.end));
        if let Some(reason) = &damage {
            error!(reason, "idle branches may be missing: branches that are not found are refused");
        } else if found.end < bytes.len() as u64 {
            info!(bytes = bytes.len() as u64 - found.end, "cutting off a torn record of an idle branch");
            file.set_len(found.end).map_err(StorageError::io("truncate", &path))?;
        }
        let live_bytes = found.records.values().map(|place| u64::from(place.bytes)).sum();
        let inner = Inner { file, end: found.end, records: found.records, live_bytes, damage };
        Ok(Shelf { data_dir: data_dir.to_owned(), inner: Mutex::new(inner) })
    }

    /// What is remembered of a branch that has no directory; `None`: nothing was ever promised for it.
    pub fn get(&self, branch: &BranchRef) -> Result<Option<AcceptorState>, StorageError> {
        let inner = self.lock();
        let path = self.data_dir.join(NAME);
        let corrupt = |reason: String| StorageError::Corrupt { path: path.clone(), reason };
        let Some(place) = inner.records.get(branch) else {
            return inner.damage.clone().map_or(Ok(None), |reason| Err(corrupt(reason)));
        };
        let mut bytes = vec![0; place.bytes as usize];
        inner.file.read_exact_at(&mut bytes, place.at).map_err(StorageError::io("read", &path))?;
        match decode(&bytes) {
            Some((found, state)) if found == *branch => Ok(Some(state)),
            _ => Err(corrupt(format!("the record of {branch} at byte {}", place.at))),
        }
    }

    /// Puts a branch's state here, durably, and then removes its directory, which must have no WAL.
    pub fn put(&self, branch: &BranchRef, state: &AcceptorState, directory: &Path) -> Result<(), StorageError> {
        let path = self.data_dir.join(NAME);
        let mut inner = self.lock();
        if let Some(reason) = inner.damage.clone() {
            return Err(StorageError::Corrupt { path, reason });
        }
        let record = encode(branch, state).map_err(|reason| StorageError::Corrupt { path: path.clone(), reason })?;
        let place = Place { at: inner.end, bytes: record.len() as u32 };
        let written = inner.file.write_all_at(&record, place.at).and_then(|()| inner.file.sync_data());
        written.map_err(StorageError::io("write", &path))?;
        inner.end += u64::from(place.bytes);
        inner.file.write_all_at(&encode_mark(inner.end), MARK_AT).map_err(StorageError::io("write", &path))?;
        inner.live_bytes += u64::from(place.bytes);
        if let Some(before) = inner.records.insert(branch.clone(), place) {
            inner.live_bytes -= u64::from(before.bytes);
        }
        fs::remove_dir_all(directory).map_err(StorageError::io("remove", directory))?;
        if let Some(project) = directory.parent() {
            // Other branches of the project may have theirs.
            let _ = fs::remove_dir(project);
        }
        if inner.end - RECORDS_AT - inner.live_bytes > WASTE_BYTES.max(inner.live_bytes) {
            self.rewrite(&mut inner)?;
        }
        Ok(())
    }

    /// Makes a branch's directory, durably. What is here of it is out of date once there is a control file in that.
    pub fn make_directory(&self, directory: &Path) -> Result<(), StorageError> {
        // Not while the project's directory is being removed.
        let _inner = self.lock();
        create_durably(directory)
    }

    fn rewrite(&self, inner: &mut Inner) -> Result<(), StorageError> {
        let path = self.data_dir.join(NAME);
        let bytes = fs::read(&path).map_err(StorageError::io("read", &path))?;
        let range = |place: &Place| place.at as usize..place.at as usize + place.bytes as usize;
        let live = inner.records.values().filter_map(|place| bytes.get(range(place)));
        replace(&self.data_dir, live)?;
        let file = File::options().read(true).write(true).open(&path).map_err(StorageError::io("open", &path))?;
        let mut at = RECORDS_AT;
        // A map that is not changed goes through its entries in the same order.
        for place in inner.records.values_mut() {
            place.at = at;
            at += u64::from(place.bytes);
        }
        (inner.file, inner.end) = (file, at);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes a whole file, durably, in the place of what there is.
fn replace<'a>(data_dir: &Path, records: impl Iterator<Item = &'a [u8]>) -> Result<(), StorageError> {
    let (path, temporary) = (data_dir.join(NAME), data_dir.join(TEMPORARY_NAME));
    let mut bytes = [MAGIC.to_le_bytes(), FORMAT_VERSION.to_le_bytes()].concat();
    bytes.resize(RECORDS_AT as usize, 0);
    records.for_each(|record| bytes.extend_from_slice(record));
    let mark = encode_mark(bytes.len() as u64);
    bytes[MARK_AT as usize..MARK_AT as usize + mark.len()].copy_from_slice(&mark);
    let written = fs::write(&temporary, &bytes).and_then(|()| File::open(&temporary)?.sync_all());
    written.map_err(StorageError::io("write", &temporary))?;
    fs::rename(&temporary, &path).map_err(StorageError::io("rename", &temporary))?;
    sync_dir(data_dir)
}

struct Found {
    records: HashMap<BranchRef, Place>,
    /// Behind the last record that can be read with all before it.
    end: u64,
}

fn scan(bytes: &[u8]) -> Found {
    let (mut records, mut at) = (HashMap::new(), RECORDS_AT as usize);
    while let Some(length) = bytes.get(at..).and_then(record_bytes) {
        let Some((branch, _)) = decode(&bytes[at..at + length]) else { break };
        records.insert(branch, Place { at: at as u64, bytes: length as u32 });
        at += length;
    }
    Found { records, end: at as u64 }
}

/// Length of the record at the start of these bytes, if it is all there.
fn record_bytes(bytes: &[u8]) -> Option<usize> {
    let body = u32::from_le_bytes(*bytes.first_chunk()?) as usize;
    let length = HEADER_BYTES + body;
    (body > 0 && body <= MAX_BODY_BYTES && length <= bytes.len()).then_some(length)
}

fn encode(branch: &BranchRef, state: &AcceptorState) -> Result<Vec<u8>, String> {
    let body = postcard::to_stdvec(&(branch, state)).map_err(|error| error.to_string())?;
    if body.len() > MAX_BODY_BYTES {
        return Err(format!("a state of {} bytes does not fit", body.len()));
    }
    let length = (body.len() as u32).to_le_bytes();
    Ok([&length[..], &checksum(length, &body).to_le_bytes(), &body].concat())
}

fn decode(record: &[u8]) -> Option<(BranchRef, AcceptorState)> {
    let (header, body) = record.split_first_chunk::<HEADER_BYTES>()?;
    let length = [header[0], header[1], header[2], header[3]];
    let crc = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
    let is_good = u32::from_le_bytes(length) as usize == body.len() && crc == checksum(length, body);
    let read = |body: &[u8]| postcard::from_bytes(body).ok();
    // Older records lack the last field, where the branch's WAL begins.
    is_good.then(|| read(body).or_else(|| read(&[body, &[0]].concat())))?
}

fn checksum(length: [u8; 4], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&length), body)
}

fn encode_mark(end: u64) -> [u8; 12] {
    let mut mark = [0; 12];
    mark[..8].copy_from_slice(&end.to_le_bytes());
    let crc = crc32c::crc32c(&mark[..8]);
    mark[8..].copy_from_slice(&crc.to_le_bytes());
    mark
}

fn decode_mark(bytes: &[u8]) -> Option<u64> {
    let (end, crc) = bytes.get(MARK_AT as usize..MARK_AT as usize + 12)?.split_at(8);
    (crc == crc32c::crc32c(end).to_le_bytes()).then(|| end.first_chunk().map(|end| u64::from_le_bytes(*end)))?
}

#[cfg(test)]
mod tests {
    use types::{BranchId, Lsn, ProjectId, Term};

    use super::*;

    fn branch(name: &str) -> BranchRef {
        BranchRef { project: ProjectId::new("p").expect("id"), branch: BranchId::new(name).expect("id") }
    }

    fn state(term: u64) -> AcceptorState {
        AcceptorState { term: Term(term), flush_lsn: Lsn(term * 8), log_start_lsn: Lsn(term * 8), ..Default::default() }
    }

    fn put(shelf: &Shelf, dir: &Path, name: &str, term: u64) {
        let directory = dir.join("p").join(name);
        fs::create_dir_all(&directory).expect("directory");
        shelf.put(&branch(name), &state(term), &directory).expect("put");
        assert!(!directory.exists());
    }

    fn term(shelf: &Shelf, name: &str) -> Option<u64> {
        shelf.get(&branch(name)).expect("get").map(|state| state.term.0)
    }

    #[test]
    fn the_last_state_of_each_branch_is_found_again() {
        let dir = tempfile::tempdir().expect("dir");
        let shelf = Shelf::open(dir.path()).expect("open");
        assert_eq!(term(&shelf, "a"), None);
        put(&shelf, dir.path(), "a", 1);
        put(&shelf, dir.path(), "b", 2);
        put(&shelf, dir.path(), "a", 3);
        assert!(!dir.path().join("p").exists(), "nothing is left of a project whose branches are all idle");
        for shelf in [&shelf, &Shelf::open(dir.path()).expect("again")] {
            assert_eq!((term(shelf, "a"), term(shelf, "b"), term(shelf, "c")), (Some(3), Some(2), None));
        }
        shelf.make_directory(&dir.path().join("p/a")).expect("make");
        assert!(dir.path().join("p/a").is_dir());
        assert_eq!(term(&shelf, "a"), Some(3), "it counts until there is a control file");
    }

    #[test]
    fn a_record_from_before_branch_starts_is_read() {
        let was = AcceptorState { system_identifier: Some(9), pageserver_lsn: Lsn(1 << 40), ..state(4) };
        let body = postcard::to_stdvec(&(branch("a"), &was)).expect("body");
        let body = &body[..body.len() - 1];
        let length = (body.len() as u32).to_le_bytes();
        let record = [&length[..], &checksum(length, body).to_le_bytes(), body].concat();
        assert_eq!(decode(&record), Some((branch("a"), was.clone())));
        let now = AcceptorState { branch_start_lsn: Lsn(1 << 30), ..was };
        assert_eq!(decode(&encode(&branch("a"), &now).expect("encode")), Some((branch("a"), now)));
    }

    #[test]
    fn what_is_out_of_date_is_given_back() {
        let dir = tempfile::tempdir().expect("dir");
        let shelf = Shelf::open(dir.path()).expect("open");
        put(&shelf, dir.path(), "quiet", 7);
        for term in 1..=20 {
            put(&shelf, dir.path(), "busy", term);
        }
        let path = dir.path().join(NAME);
        let before = fs::metadata(&path).expect("file").len();
        shelf.rewrite(&mut shelf.lock()).expect("rewrite");
        let after = fs::metadata(&path).expect("file").len();
        assert!(after < before / 5, "{before} bytes became {after}");
        put(&shelf, dir.path(), "later", 3);
        for shelf in [&shelf, &Shelf::open(dir.path()).expect("again")] {
            let terms = ["quiet", "busy", "later"].map(|name| term(shelf, name));
            assert_eq!(terms, [Some(7), Some(20), Some(3)]);
        }
    }

    #[test]
    fn a_torn_record_is_cut_off_and_damage_is_not_taken_for_one() {
        let dir = tempfile::tempdir().expect("dir");
        let shelf = Shelf::open(dir.path()).expect("open");
        put(&shelf, dir.path(), "a", 1);
        put(&shelf, dir.path(), "b", 2);
        let path = dir.path().join(NAME);
        let whole = fs::read(&path).expect("read");
        let torn = [&whole[..], &encode(&branch("c"), &state(3)).expect("encode")[..20]].concat();
        fs::write(&path, torn).expect("write");
        let shelf = Shelf::open(dir.path()).expect("open");
        assert_eq!((term(&shelf, "a"), term(&shelf, "b"), term(&shelf, "c")), (Some(1), Some(2), None));
        put(&shelf, dir.path(), "c", 4);
        assert_eq!(term(&Shelf::open(dir.path()).expect("open"), "c"), Some(4));

        for at in [RECORDS_AT as usize + 20, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[at] ^= 4;
            fs::write(&path, damaged).expect("write");
            let shelf = Shelf::open(dir.path()).expect("open");
            assert!(shelf.get(&branch("b")).is_err(), "it may have voted");
            assert!(shelf.get(&branch("new")).is_err(), "it may be the damaged one");
            assert_eq!(shelf.get(&branch("a")).is_ok(), at == whole.len() - 1);
        }
    }
}
