//! System calls, made raw: inside `postgres` libc's own names lead into the shim.

use std::{ffi::CStr, io::IoSlice};

/// An error number of the operating system (`EIO`, `ENOSPC`, ...).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// The calling thread's `errno`.
    pub fn last() -> Errno {
        // SAFETY: libc's errno location is valid for the calling thread.
        Errno(unsafe { *libc::__errno_location() })
    }
}

impl From<Errno> for std::io::Error {
    fn from(errno: Errno) -> std::io::Error {
        std::io::Error::from_raw_os_error(errno.0)
    }
}

fn check(result: libc::c_long) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| Errno::last())
}

/// Opens a file; always close-on-exec.
pub fn open(path: &CStr, flags: i32, mode: u32) -> Result<i32, Errno> {
    // SAFETY: the path is a C string that outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags | libc::O_CLOEXEC, mode) };
    check(fd).map(|fd| fd as i32)
}

/// Closes a descriptor of our own.
pub fn close(fd: i32) {
    // SAFETY: closing takes no pointers; the descriptor is ours.
    unsafe { libc::syscall(libc::SYS_close, fd) };
}

/// Fills `buf` from `offset`; a file that ends earlier is `EIO`.
pub fn read_exact_at(fd: i32, buf: &mut [u8], offset: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < buf.len() {
        let rest = &mut buf[done..];
        // SAFETY: pointer and length describe `rest`.
        let got = unsafe {
            libc::syscall(libc::SYS_pread64, fd, rest.as_mut_ptr(), rest.len(), (offset + done as u64) as libc::off_t)
        };
        match check(got) {
            Ok(0) => return Err(Errno(libc::EIO)),
            Ok(n) => done += n,
            Err(Errno(libc::EINTR)) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Writes all of `buf` at `offset`.
pub fn write_all_at(fd: i32, buf: &[u8], offset: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < buf.len() {
        let rest = &buf[done..];
        // SAFETY: pointer and length describe `rest`.
        let put = unsafe {
            libc::syscall(libc::SYS_pwrite64, fd, rest.as_ptr(), rest.len(), (offset + done as u64) as libc::off_t)
        };
        match check(put) {
            Ok(0) => return Err(Errno(libc::ENOSPC)),
            Ok(n) => done += n,
            Err(Errno(libc::EINTR)) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Writes all parts, one behind the other, from `offset` on: at most `UIO_MAXIOV` (1024) of them.
pub fn write_parts_at(fd: i32, parts: &[IoSlice<'_>], offset: u64) -> Result<(), Errno> {
    // SAFETY: an `IoSlice` is laid out as an `iovec`; pointer and length describe `parts`.
    let put =
        unsafe { libc::syscall(libc::SYS_pwritev, fd, parts.as_ptr(), parts.len(), offset as libc::off_t, 0_usize) };
    let mut done = match check(put) {
        Err(Errno(libc::EINTR)) => 0,
        outcome => outcome?,
    };
    // What a short write left.
    let mut at = offset;
    for part in parts {
        let there = done.min(part.len());
        write_all_at(fd, &part[there..], at + there as u64)?;
        done -= there;
        at += part.len() as u64;
    }
    Ok(())
}

/// Gives `len` bytes of a file from `offset` on real storage, so that touching its mapping can't fail.
pub fn allocate(fd: i32, offset: u64, len: u64) -> Result<(), Errno> {
    loop {
        // SAFETY: no pointers.
        let result = unsafe { libc::syscall(libc::SYS_fallocate, fd, 0, offset as libc::off_t, len as libc::off_t) };
        match check(result) {
            Err(Errno(libc::EINTR)) => {}
            done => return done.map(drop),
        }
    }
}

/// Gives `len` bytes of a file from `offset` back to the file system; they read as zeroes.
pub fn punch(fd: i32, offset: u64, len: u64) -> Result<(), Errno> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: no pointers.
    let result = unsafe { libc::syscall(libc::SYS_fallocate, fd, mode, offset as libc::off_t, len as libc::off_t) };
    match check(result) {
        // A file system without holes keeps the room.
        Err(Errno(libc::EOPNOTSUPP)) => Ok(()),
        done => done.map(drop),
    }
}

/// Makes a file `len` bytes long; what is new is a hole.
pub fn set_length(fd: i32, len: u64) -> Result<(), Errno> {
    // SAFETY: no pointers.
    check(unsafe { libc::syscall(libc::SYS_ftruncate, fd, len as libc::off_t) }).map(drop)
}

/// Maps `len` bytes of a file shared and writable.
pub fn map(fd: i32, len: usize) -> Result<*mut u8, Errno> {
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let base =
        unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0) };
    if base == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(base.cast()) }
}

/// Ends a mapping made by [`map`].
pub fn unmap(base: *mut u8, len: usize) {
    // SAFETY: only called with what `map` returned, when nothing refers to it any more.
    unsafe { libc::munmap(base.cast(), len) };
}
