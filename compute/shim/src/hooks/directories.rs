//! Reading directories.

use std::ffi::{c_char, c_int};

use libc::{DIR, dirent};
use page_cache::Errno;

use super::set_errno;
use crate::{
    dirs,
    path::Named,
    real,
    runtime::{named, runtime},
};

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn opendir(path: *const c_char) -> *mut DIR {
    // SAFETY: the caller's promises are libc's.
    let (named, dir) = unsafe { (named(path), real::opendir(path)) };
    if let Some((_, Named::Database(spc, db))) = named
        && !dir.is_null()
        && !dirs::opened(dir, spc, db)
    {
        // SAFETY: just opened.
        unsafe { real::closedir(dir) };
        set_errno(Errno(libc::EMFILE));
        return std::ptr::null_mut();
    }
    dir
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn readdir(dir: *mut DIR) -> *mut dirent {
    let Some(runtime) = runtime() else {
        // SAFETY: the caller's promises are libc's.
        return unsafe { real::readdir(dir) };
    };
    // SAFETY: `errno` tells an error from the end, so it must be clear before; the caller's promises are libc's.
    let entry = unsafe {
        set_errno(Errno(0));
        real::readdir(dir)
    };
    if !entry.is_null() || Errno::last() != Errno(0) {
        return entry;
    }
    match dirs::next_entry(runtime, dir) {
        Ok(entry) => {
            // Talking to the agent may have left something.
            set_errno(Errno(0));
            entry
        }
        Err(errno) => {
            set_errno(errno);
            std::ptr::null_mut()
        }
    }
}

/// # Safety
/// As libc's; `struct dirent64` is `struct dirent` on 64-bit Linux.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn readdir64(dir: *mut DIR) -> *mut dirent {
    // SAFETY: the caller's promises are libc's.
    unsafe { readdir(dir) }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn closedir(dir: *mut DIR) -> c_int {
    dirs::closed(dir);
    // SAFETY: the caller's promises are libc's.
    unsafe { real::closedir(dir) }
}
