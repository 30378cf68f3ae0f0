//! Small files that outlive the compute: replication slots, and what logical decoding needs besides WAL. Their content goes
//! into WAL, before Postgres relies on it, as messages that the pageserver makes base files of.
//!
//! Postgres makes each of them durable in its own way: a slot's state and a snapshot are written beside and renamed into
//! place, a mapping of a rewritten catalogue is synced once when it is complete. Those are the moments at which it is kept.
//! What a checkpointer does during a shutdown is left to the agent, which compares the directory with what is known.

use std::{
    ffi::{CStr, c_char, c_int},
    io::Write,
};

use page_cache::Errno;

use crate::{
    postgres::{self, Message},
    real,
    runtime::{Runtime, runtime},
};

/// Prefix of the messages; the path follows (`wal_redo::AUX_FILE_PREFIX`).
const PREFIX: &[u8] = b"dormouse-file:";
/// Room for prefix, path and closing zero.
const MAX_NAME_BYTES: usize = 256;
/// A larger file cannot be kept: the call fails, and with it what Postgres is about to do.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// Where a slot's state has its persistency, and the value of one that ends with its session (`RS_TEMPORARY`).
const PERSISTENCY: std::ops::Range<usize> = 84..88;
const TEMPORARY: [u8; 4] = 2u32.to_le_bytes();

/// A file that is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept<'a> {
    /// `pg_replslot/<slot>/state`; the slot's directory may still be called `<slot>.tmp`.
    Slot(&'a [u8]),
    /// `pg_logical/snapshots/<LSN>.snap`: running transactions at a point from which decoding may start.
    Snapshot(&'a [u8]),
    /// `pg_logical/mappings/map-...`: where a rewritten catalogue's rows went.
    Mapping(&'a [u8]),
}

impl<'a> Kept<'a> {
    fn parse(relative: &'a [u8]) -> Option<Kept<'a>> {
        let relative = relative.strip_prefix(b"/").unwrap_or(relative);
        if let Some(path) = relative.strip_prefix(b"pg_replslot/") {
            let slot = path.strip_suffix(b"/state")?;
            return is_file_name(slot).then(|| Kept::Slot(slot.strip_suffix(b".tmp").unwrap_or(slot)));
        }
        if let Some(file) = relative.strip_prefix(b"pg_logical/snapshots/") {
            return (is_file_name(file) && file.ends_with(b".snap")).then_some(Kept::Snapshot(file));
        }
        let file = relative.strip_prefix(b"pg_logical/mappings/")?;
        (is_file_name(file) && file.starts_with(b"map-")).then_some(Kept::Mapping(file))
    }

    fn name(&self) -> Option<Name> {
        let (directory, file, rest): (&[u8], _, &[u8]) = match self {
            Kept::Slot(slot) => (b"pg_replslot/", slot, b"/state"),
            Kept::Snapshot(file) => (b"pg_logical/snapshots/", file, b""),
            Kept::Mapping(file) => (b"pg_logical/mappings/", file, b""),
        };
        let mut name = Name { bytes: [0; MAX_NAME_BYTES], length: 0 };
        [PREFIX, directory, file, rest, b"\0"].iter().try_for_each(|part| name.push(part))?;
        Some(name)
    }
}

fn is_file_name(name: &[u8]) -> bool {
    !name.is_empty() && name != b"." && name != b".." && !name.contains(&b'/')
}

/// The prefix of a message.
struct Name {
    bytes: [u8; MAX_NAME_BYTES],
    length: usize,
}

impl Name {
    fn push(&mut self, part: &[u8]) -> Option<()> {
        let end = self.length + part.len();
        self.bytes.get_mut(self.length..end)?.copy_from_slice(part);
        self.length = end;
        Some(())
    }
}

/// Called before a rename: a file that is kept comes to be, or a slot's directory is renamed because the slot is dropped.
///
/// # Safety
/// Both are C strings.
pub unsafe fn before_rename(from: *const c_char, to: *const c_char) -> Result<(), Errno> {
    let Some(runtime) = runtime() else { return Ok(()) };
    // SAFETY: the caller's promise.
    let (from_path, to_path) = unsafe { (CStr::from_ptr(from), CStr::from_ptr(to)) };
    let Some(to_relative) = runtime.relative(to_path.to_bytes()) else { return Ok(()) };
    match Kept::parse(to_relative) {
        Some(kept @ (Kept::Slot(_) | Kept::Snapshot(_))) => {
            let file = Mapped::open(from_path)?;
            let Some(end) = keep(&kept, file.bytes())? else { return Ok(()) };
            if matches!(kept, Kept::Slot(_)) {
                // Once it is in place Postgres removes what the slot needed before: WAL, and rows of catalogues.
                postgres::flush_wal(end);
            }
            Ok(())
        }
        Some(Kept::Mapping(_)) => Ok(()),
        None => before_drop(runtime, from_path, to_relative),
    }
}

/// `pg_replslot/<slot>` to `pg_replslot/<slot>.tmp`: the slot is dropped.
fn before_drop(runtime: &Runtime, from: &CStr, to: &[u8]) -> Result<(), Errno> {
    let Some(relative) = runtime.relative(from.to_bytes()) else { return Ok(()) };
    let name = relative.strip_prefix(b"/").unwrap_or(relative).strip_prefix(b"pg_replslot/");
    let Some(slot) = name.filter(|slot| is_file_name(slot) && to.ends_with(b".tmp")) else { return Ok(()) };
    let mut path = Name { bytes: [0; MAX_NAME_BYTES], length: 0 };
    let joined = [from.to_bytes(), b"/state\0"].iter().try_for_each(|part| path.push(part));
    joined.ok_or(Errno(libc::ENAMETOOLONG))?;
    let state = CStr::from_bytes_until_nul(&path.bytes).map_err(|_| Errno(libc::EINVAL))?;
    if Mapped::open(state).is_ok_and(|file| is_temporary(file.bytes())) {
        return Ok(());
    }
    if let Some(end) = keep(&Kept::Slot(slot), b"")? {
        postgres::flush_wal(end);
    }
    Ok(())
}

/// Called before a file is removed.
///
/// # Safety
/// A C string.
pub unsafe fn before_unlink(path: *const c_char) -> Result<(), Errno> {
    let Some(runtime) = runtime() else { return Ok(()) };
    // SAFETY: the caller's promise.
    let kept = runtime.relative(unsafe { CStr::from_ptr(path) }.to_bytes()).and_then(Kept::parse);
    match kept {
        Some(kept @ (Kept::Snapshot(_) | Kept::Mapping(_))) => keep(&kept, b"").map(drop),
        // A slot goes with its directory.
        Some(Kept::Slot(_)) | None => Ok(()),
    }
}

/// Called when a file that is not one of the shim's is synced. A mapping is by the transaction that wrote it; that checkpoints
/// sync it again changes nothing.
pub fn before_sync(fd: c_int) -> Result<(), Errno> {
    if !postgres::has_transaction_id() {
        return Ok(());
    }
    let Some(runtime) = runtime() else { return Ok(()) };
    let link = DescriptorLink::of(fd);
    let mut buf = [0u8; 1024];
    match link.target(&mut buf).and_then(|path| runtime.relative(path)).and_then(Kept::parse) {
        // The descriptor itself may be for writing only.
        Some(kept @ Kept::Mapping(_)) => keep(&kept, Mapped::open(link.path())?.bytes()).map(drop),
        Some(Kept::Slot(_) | Kept::Snapshot(_)) | None => Ok(()),
    }
}

/// `/proc/self/fd/<descriptor>`: a symbolic link to a descriptor's file.
struct DescriptorLink([u8; 32]);

impl DescriptorLink {
    fn of(fd: c_int) -> DescriptorLink {
        let mut path = [0; 32];
        let mut rest = &mut path[..31];
        // A descriptor has ten digits at most.
        let _ = write!(rest, "/proc/self/fd/{fd}");
        DescriptorLink(path)
    }

    fn path(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or(c"")
    }

    fn target<'a>(&self, buf: &'a mut [u8]) -> Option<&'a [u8]> {
        // SAFETY: the path is a C string; pointer and length describe `buf`.
        let length = unsafe { libc::readlink(self.path().as_ptr(), buf.as_mut_ptr().cast(), buf.len()) };
        usize::try_from(length).ok().and_then(|length| buf.get(..length))
    }
}

fn is_temporary(state: &[u8]) -> bool {
    state.get(PERSISTENCY) == Some(&TEMPORARY)
}

/// Writes a file's content, empty to remove it, into WAL. Answers where the message ends; `None` when there is none.
fn keep(kept: &Kept<'_>, content: &[u8]) -> Result<Option<u64>, Errno> {
    if matches!(kept, Kept::Slot(_)) && is_temporary(content) || !postgres::may_log() {
        return Ok(None);
    }
    let name = kept.name().ok_or(Errno(libc::ENAMETOOLONG))?;
    Ok(postgres::log_message(&Message { prefix: &name.bytes[..name.length], content }))
}

/// A file in memory: nothing is allocated, and an error that leaves past this leaks no more than address space.
struct Mapped {
    start: *mut libc::c_void,
    length: usize,
}

impl Mapped {
    fn open(path: &CStr) -> Result<Mapped, Errno> {
        // SAFETY: the path is a C string.
        let fd = unsafe { real::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC, 0) };
        if fd < 0 {
            return Err(Errno::last());
        }
        let mapped = Mapped::of(fd);
        // SAFETY: a descriptor just opened.
        unsafe { real::close(fd) };
        mapped
    }

    fn of(fd: c_int) -> Result<Mapped, Errno> {
        // SAFETY: all zeroes is a valid `stat`, and the pointer is to one.
        let (result, stat) = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            (libc::syscall(libc::SYS_fstat, fd, &raw mut stat), stat)
        };
        if result != 0 {
            return Err(Errno::last());
        }
        let bytes = stat.st_size.cast_unsigned();
        if bytes > MAX_FILE_BYTES {
            return Err(Errno(libc::EFBIG));
        }
        let length = bytes as usize;
        if length == 0 {
            return Ok(Mapped { start: std::ptr::null_mut(), length });
        }
        // SAFETY: a new private mapping of a file that nobody cuts.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, libc::MAP_PRIVATE, fd, 0) };
        if start == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(Mapped { start, length }) }
    }

    fn bytes(&self) -> &[u8] {
        if self.length == 0 {
            return &[];
        }
        // SAFETY: the mapping lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.cast(), self.length) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if self.length > 0 {
            // SAFETY: our own mapping.
            unsafe { libc::munmap(self.start, self.length) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(path: &str) -> Option<String> {
        let name = Kept::parse(path.as_bytes())?.name()?;
        Some(String::from_utf8_lossy(&name.bytes[PREFIX.len()..name.length - 1]).into_owned())
    }

    #[test]
    fn kept_files_are_found_under_the_name_they_will_have() {
        for path in ["pg_replslot/s/state", "/pg_replslot/s/state", "pg_replslot/s.tmp/state"] {
            assert_eq!(name(path).as_deref(), Some("pg_replslot/s/state"), "{path}");
        }
        for path in ["pg_logical/snapshots/0-15D3C38.snap", "pg_logical/mappings/map-5-4eb-0_1-2-3"] {
            assert_eq!(name(path).as_deref(), Some(path));
        }
    }

    #[test]
    fn others_are_not_kept() {
        for path in [
            "pg_replslot/s/state.tmp",
            "pg_replslot/s/xid-700-lsn-0-1000000.spill",
            "pg_replslot/s",
            "pg_replslot//state",
            "pg_replslot/../state",
            "pg_logical/snapshots/0-15D3C38.snap.77.tmp",
            "pg_logical/replorigin_checkpoint",
            "pg_logical/mappings/x",
            "pg_stat/pgstat.stat",
        ] {
            assert_eq!(name(path), None, "{path}");
        }
        assert_eq!(name(&format!("pg_replslot/{}/state", "x".repeat(250))), None);
    }

    #[test]
    fn a_descriptors_path_is_found() {
        let file = std::fs::File::open("/proc/self/status").expect("open");
        let mut buf = [0; 1024];
        let link = DescriptorLink::of(std::os::fd::AsRawFd::as_raw_fd(&file));
        let path = link.target(&mut buf).expect("a path");
        assert!(path.starts_with(b"/proc/") && path.ends_with(b"/status"));
    }
}
