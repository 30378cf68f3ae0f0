//! Opening, closing and duplicating descriptors.

use std::ffi::{CStr, c_char, c_int, c_void};

use libc::mode_t;
use page_cache::Errno;

use super::{LibcResult, set_errno};
use crate::{
    fds::{self, Fd},
    kept_files,
    path::{Named, Segment},
    real,
    relation::OpenMode,
    runtime::{Runtime, named, note_cwd, runtime},
};

/// # Safety
/// As libc's; the mode is read as variadic integers are passed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe {
        match named(path) {
            Some((runtime, Named::Segment(segment))) => open_segment(runtime, segment, flags),
            Some((_, Named::Wal)) => open_wal(path, flags, mode),
            Some((_, Named::Database(..) | Named::Other)) | None => real::open(path, flags, mode),
        }
    }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe { open(path, flags | libc::O_LARGEFILE, mode) }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe { if dir == libc::AT_FDCWD { open(path, flags, mode) } else { real::openat(dir, path, flags, mode) } }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe { openat(dir, path, flags | libc::O_LARGEFILE, mode) }
}

/// The real descriptor behind a segment refuses to be read or written: a call that gets past the shim fails.
unsafe fn open_segment(runtime: &Runtime, segment: Segment, flags: c_int) -> c_int {
    let has = |flag| flags & flag != 0;
    let mode = OpenMode { create: has(libc::O_CREAT), exclusive: has(libc::O_EXCL), truncate: has(libc::O_TRUNC) };
    if let Err(errno) = runtime.open_segment(&segment, mode) {
        set_errno(errno);
        return -1;
    }
    // SAFETY: the path is a C string.
    let fd = unsafe { real::open(c"/".as_ptr(), libc::O_PATH | libc::O_CLOEXEC, 0) };
    // SAFETY: the descriptor is ours.
    unsafe { note(fd, Fd::Segment(segment, 0)) }
}

unsafe fn open_wal(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe { note(real::open(path, flags, mode), Fd::Wal) }
}

unsafe fn note(fd: c_int, stands_for: Fd) -> c_int {
    if fd >= 0 && !fds::set(fd, stands_for) {
        // SAFETY: a descriptor just opened.
        unsafe { real::close(fd) };
        set_errno(Errno(libc::EMFILE));
        return -1;
    }
    fd
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    fds::set(fd, Fd::Other);
    // SAFETY: the caller's promises are libc's.
    unsafe { real::close(fd) }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup(fd: c_int) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe { note(real::dup(fd), fds::get(fd)) }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup2(fd: c_int, to: c_int) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe { note(real::dup2(fd, to), fds::get(fd)) }
}

/// # Safety
/// As libc's; the argument is read as variadic integers and pointers are passed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fcntl(fd: c_int, command: c_int, argument: *mut c_void) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe {
        match command {
            libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => note(real::fcntl(fd, command, argument), fds::get(fd)),
            _ => real::fcntl(fd, command, argument),
        }
    }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fcntl64(fd: c_int, command: c_int, argument: *mut c_void) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe { fcntl(fd, command, argument) }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn chdir(path: *const c_char) -> c_int {
    // SAFETY: the caller's promises are libc's.
    let result = unsafe { real::chdir(path) };
    note_cwd();
    result
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fchdir(fd: c_int) -> c_int {
    // SAFETY: the caller's promises are libc's.
    let result = unsafe { real::fchdir(fd) };
    note_cwd();
    result
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe {
        match named(path) {
            Some((runtime, Named::Segment(segment))) => runtime.unlink_segment(&segment).libc(),
            Some((_, Named::Other)) => match kept_files::before_unlink(path) {
                Ok(()) => real::unlink(path),
                error => error.libc(),
            },
            Some((_, Named::Wal | Named::Database(..))) | None => real::unlink(path),
        }
    }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe {
        if is_segment(from) || is_segment(to) {
            return Err(Errno(libc::EXDEV)).libc();
        }
        match kept_files::before_rename(from, to) {
            Ok(()) => real::rename(from, to),
            error => error.libc(),
        }
    }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn link(from: *const c_char, to: *const c_char) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe {
        if is_segment(from) || is_segment(to) {
            return Err(Errno(libc::EXDEV)).libc();
        }
        real::link(from, to)
    }
}

/// Postgres makes symbolic links for tablespaces only, and there is no other disk that a tablespace could be on: what is in
/// one lies where everything else lies. Refusing here, before anything is logged, is an ordinary error of the statement.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn symlink(to: *const c_char, link: *const c_char) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe {
        if runtime().is_some() && !link.is_null() && CStr::from_ptr(link).to_bytes().starts_with(b"pg_tblspc/") {
            return Err(Errno(libc::EOPNOTSUPP)).libc();
        }
        real::symlink(to, link)
    }
}

/// Postgres renames and links no relation files; if it did, saying so beats losing one.
unsafe fn is_segment(path: *const c_char) -> bool {
    // SAFETY: the caller's promises are libc's.
    matches!(unsafe { named(path) }, Some((_, Named::Segment(_))))
}
