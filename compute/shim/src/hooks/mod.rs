//! libc's names, as Postgres calls them. Each asks whether the call is about one of ours, and else passes it on.

mod data;
mod directories;
mod files;
mod metadata;
mod process;
mod sync;

use std::ffi::c_int;

use page_cache::Errno;

use crate::{
    fds::{self, Fd},
    path::Segment,
    runtime::{Runtime, runtime},
};

/// What Rust passes for a descriptor of ours.
fn segment_of(fd: c_int) -> Option<(&'static Runtime, Segment, u64)> {
    match fds::get(fd) {
        Fd::Segment(segment, position) => Some((runtime()?, segment, position)),
        Fd::Wal | Fd::Other => None,
    }
}

fn set_errno(errno: Errno) {
    // SAFETY: libc's errno location is valid for the calling thread.
    unsafe { *libc::__errno_location() = errno.0 };
}

/// A result in libc's manner: -1 and `errno` on failure.
trait LibcResult<T> {
    fn libc(self) -> T;
}

impl LibcResult<c_int> for Result<(), Errno> {
    fn libc(self) -> c_int {
        match self {
            Ok(()) => 0,
            Err(errno) => {
                set_errno(errno);
                -1
            }
        }
    }
}

impl LibcResult<isize> for Result<usize, Errno> {
    fn libc(self) -> isize {
        match self {
            Ok(count) => count.cast_signed(),
            Err(errno) => {
                set_errno(errno);
                -1
            }
        }
    }
}

/// A libc offset or length as ours; negative ones are `EINVAL`.
fn offset(value: libc::off_t) -> Result<u64, Errno> {
    u64::try_from(value).map_err(|_| Errno(libc::EINVAL))
}
