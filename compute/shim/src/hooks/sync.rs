//! Syncs: of WAL, a quorum's; of everything else nothing, since every local file is expendable or its content is in WAL.

use std::ffi::{c_int, c_uint};

use libc::off_t;

use super::LibcResult;
use crate::{
    agent,
    fds::{self, Fd},
    kept_files, real,
    runtime::runtime,
    wal_ahead,
};

/// The WAL went through the kernel's cache into a file that the agent reads; whether it reached this disk is no matter.
fn sync(fd: c_int) -> Option<c_int> {
    let runtime = runtime()?;
    Some(match fds::get(fd) {
        Fd::Wal => {
            wal_ahead::synced();
            agent::sync_wal(runtime.socket).libc()
        }
        Fd::Other => kept_files::before_sync(fd).libc(),
        Fd::Segment(..) => 0,
    })
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fsync(fd: c_int) -> c_int {
    // SAFETY: the caller's promises are libc's.
    sync(fd).unwrap_or_else(|| unsafe { real::fsync(fd) })
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdatasync(fd: c_int) -> c_int {
    // SAFETY: the caller's promises are libc's.
    sync(fd).unwrap_or_else(|| unsafe { real::fdatasync(fd) })
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn syncfs(fd: c_int) -> c_int {
    // SAFETY: the caller's promises are libc's.
    if runtime().is_some() { 0 } else { unsafe { real::syncfs(fd) } }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sync_file_range(fd: c_int, at: off_t, bytes: off_t, flags: c_uint) -> c_int {
    // SAFETY: the caller's promises are libc's.
    if runtime().is_some() { 0 } else { unsafe { real::sync_file_range(fd, at, bytes, flags) } }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_fadvise(fd: c_int, at: off_t, length: off_t, advice: c_int) -> c_int {
    match fds::get(fd) {
        Fd::Segment(..) => 0,
        // SAFETY: the caller's promises are libc's.
        Fd::Wal | Fd::Other => unsafe { real::posix_fadvise(fd, at, length, advice) },
    }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_fadvise64(fd: c_int, at: off_t, length: off_t, advice: c_int) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe { posix_fadvise(fd, at, length, advice) }
}
