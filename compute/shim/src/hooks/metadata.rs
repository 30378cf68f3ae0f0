//! `stat` and its kin, `access`, `chmod`.

use std::ffi::{c_char, c_int};

use libc::{mode_t, stat as Stat};
use page_cache::Errno;

use super::{LibcResult, segment_of};
use crate::{
    path::{Named, Segment},
    real,
    runtime::{Runtime, named},
};

/// What `stat` tells of a segment's file: a regular file of ours, changed just now.
unsafe fn fill(runtime: &Runtime, segment: &Segment, buf: *mut Stat) -> Result<(), Errno> {
    let length = runtime.segment_bytes(segment)?.ok_or(Errno(libc::ENOENT))?;
    // SAFETY: the caller promises a writable `stat`; all zeroes is a valid one. The calls take no pointers but null.
    unsafe {
        buf.write_bytes(0, 1);
        let stat = &mut *buf;
        stat.st_mode = libc::S_IFREG | 0o600;
        stat.st_nlink = 1;
        stat.st_uid = libc::geteuid();
        stat.st_gid = libc::getegid();
        stat.st_ino = u64::from(segment.rel.rel) << 24 | (segment.rel.fork as u64) << 20 | u64::from(segment.number);
        stat.st_size = length.cast_signed();
        stat.st_blksize = 8192;
        stat.st_blocks = (length / 512).cast_signed();
        let now = libc::time(std::ptr::null_mut());
        (stat.st_atime, stat.st_mtime, stat.st_ctime) = (now, now, now);
    }
    Ok(())
}

unsafe fn stat_path(path: *const c_char, buf: *mut Stat) -> Option<c_int> {
    // SAFETY: the caller's promises are libc's.
    match unsafe { named(path) }? {
        // SAFETY: the caller's promises are libc's.
        (runtime, Named::Segment(segment)) => Some(unsafe { fill(runtime, &segment, buf) }.libc()),
        (_, Named::Wal | Named::Database(..) | Named::Other) => None,
    }
}

unsafe fn stat_fd(fd: c_int, buf: *mut Stat) -> Option<c_int> {
    let (runtime, segment, _) = segment_of(fd)?;
    // SAFETY: the caller's promises are libc's.
    Some(unsafe { fill(runtime, &segment, buf) }.libc())
}

macro_rules! stats {
    ($($name:ident, $name64:ident, $of:ident, $target:ident: $type:ty;)*) => {
        $(
            /// # Safety
            /// As libc's.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($target: $type, buf: *mut Stat) -> c_int {
                // SAFETY: the caller's promises are libc's.
                unsafe { $of($target, buf).unwrap_or_else(|| real::$name($target, buf)) }
            }

            /// # Safety
            /// As libc's; `struct stat64` is `struct stat` on 64-bit Linux.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name64($target: $type, buf: *mut Stat) -> c_int {
                // SAFETY: the caller's promises are libc's.
                unsafe { $name($target, buf) }
            }
        )*
    };
}

stats! {
    stat, stat64, stat_path, path: *const c_char;
    lstat, lstat64, stat_path, path: *const c_char;
    fstat, fstat64, stat_fd, fd: c_int;
}

macro_rules! old_stats {
    ($($name:ident, $name64:ident, $of:ident, $target:ident: $type:ty;)*) => {
        $(
            /// As programs built for glibc before 2.33 call it.
            ///
            /// # Safety
            /// As libc's.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(version: c_int, $target: $type, buf: *mut Stat) -> c_int {
                // SAFETY: the caller's promises are libc's.
                unsafe { $of($target, buf).unwrap_or_else(|| real::$name(version, $target, buf)) }
            }

            /// # Safety
            /// As libc's.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name64(version: c_int, $target: $type, buf: *mut Stat) -> c_int {
                // SAFETY: the caller's promises are libc's.
                unsafe { $name(version, $target, buf) }
            }
        )*
    };
}

old_stats! {
    __xstat, __xstat64, stat_path, path: *const c_char;
    __lxstat, __lxstat64, stat_path, path: *const c_char;
    __fxstat, __fxstat64, stat_fd, fd: c_int;
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn access(path: *const c_char, mode: c_int) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe { exists(path).map_or_else(|| real::access(path, mode), LibcResult::libc) }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn chmod(path: *const c_char, mode: mode_t) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe { exists(path).map_or_else(|| real::chmod(path, mode), LibcResult::libc) }
}

/// Whether a segment's file exists; `None` when the path names none.
unsafe fn exists(path: *const c_char) -> Option<Result<(), Errno>> {
    // SAFETY: the caller's promises are libc's.
    match unsafe { named(path) }? {
        (runtime, Named::Segment(segment)) => Some(match runtime.segment_bytes(&segment) {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(Errno(libc::ENOENT)),
            Err(errno) => Err(errno),
        }),
        (_, Named::Wal | Named::Database(..) | Named::Other) => None,
    }
}
