//! Reading, writing, seeking and resizing.

use std::{
    ffi::{c_char, c_int, c_uint, c_void},
    slice,
};

use libc::{iovec, off_t, size_t, ssize_t};
use page_cache::{Errno, PageOrigin};

use super::{LibcResult, offset, segment_of, set_errno};
use crate::{
    fds::{self, Fd},
    path::Named,
    real,
    runtime::{named, runtime},
    wal_ahead,
};

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn read(fd: c_int, buf: *mut c_void, count: size_t) -> ssize_t {
    let Some((runtime, segment, position)) = segment_of(fd) else {
        // SAFETY: the caller's promises are libc's.
        return unsafe { real::read(fd, buf, count) };
    };
    // SAFETY: the caller promises `count` writable bytes.
    let result = runtime.read_segment(&segment, unsafe { bytes_mut(buf, count) }, position);
    fds::set(fd, Fd::Segment(segment, position + result.unwrap_or(0) as u64));
    result.libc()
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __read_chk(fd: c_int, buf: *mut c_void, count: size_t, room: size_t) -> ssize_t {
    // SAFETY: the caller's promises are libc's; a count beyond the room is libc's to punish.
    unsafe {
        if count > room || segment_of(fd).is_none() {
            real::__read_chk(fd, buf, count, room)
        } else {
            read(fd, buf, count)
        }
    }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pread(fd: c_int, buf: *mut c_void, count: size_t, at: off_t) -> ssize_t {
    let Some((runtime, segment, _)) = segment_of(fd) else {
        // SAFETY: the caller's promises are libc's.
        return unsafe { real::pread(fd, buf, count, at) };
    };
    // SAFETY: the caller promises `count` writable bytes.
    offset(at).and_then(|at| runtime.read_segment(&segment, unsafe { bytes_mut(buf, count) }, at)).libc()
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pread64(fd: c_int, buf: *mut c_void, count: size_t, at: off_t) -> ssize_t {
    // SAFETY: the caller's promises are libc's.
    unsafe { pread(fd, buf, count, at) }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __pread_chk(fd: c_int, buf: *mut c_void, count: size_t, at: off_t, room: size_t) -> ssize_t {
    // SAFETY: as for `__read_chk`.
    unsafe {
        if count > room || segment_of(fd).is_none() {
            real::__pread_chk(fd, buf, count, at, room)
        } else {
            pread(fd, buf, count, at)
        }
    }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __pread64_chk(fd: c_int, buf: *mut c_void, count: size_t, at: off_t, room: size_t) -> ssize_t {
    // SAFETY: the caller's promises are libc's.
    unsafe { __pread_chk(fd, buf, count, at, room) }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn preadv(fd: c_int, iov: *const iovec, count: c_int, at: off_t) -> ssize_t {
    let Some((runtime, segment, _)) = segment_of(fd) else {
        // SAFETY: the caller's promises are libc's.
        return unsafe { real::preadv(fd, iov, count, at) };
    };
    // SAFETY: the caller promises `count` pieces that describe writable bytes.
    let pieces = unsafe { pieces(iov, count) };
    in_pieces(pieces, at, |piece, at| {
        // SAFETY: as above.
        runtime.read_segment(&segment, unsafe { bytes_mut(piece.iov_base, piece.iov_len) }, at)
    })
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn preadv64(fd: c_int, iov: *const iovec, count: c_int, at: off_t) -> ssize_t {
    // SAFETY: the caller's promises are libc's.
    unsafe { preadv(fd, iov, count, at) }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, buf: *const c_void, count: size_t) -> ssize_t {
    let Some((runtime, segment, position)) = segment_of(fd) else {
        // SAFETY: the caller's promises are libc's.
        return unsafe { real::write(fd, buf, count) };
    };
    // SAFETY: the caller promises `count` readable bytes.
    let result = runtime.write_segment(&segment, unsafe { bytes(buf, count) }, position, PageOrigin::Copy);
    fds::set(fd, Fd::Segment(segment, position + result.unwrap_or(0) as u64));
    result.libc()
}

/// Postgres writes WAL by `pwrite` alone (`XLogWrite` in `xlog.c`).
fn note_wal(fd: c_int, written: ssize_t) {
    if let (Fd::Wal, Ok(bytes), Some(runtime)) = (fds::get(fd), usize::try_from(written), runtime()) {
        wal_ahead::written(runtime.socket, bytes);
    }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite(fd: c_int, buf: *const c_void, count: size_t, at: off_t) -> ssize_t {
    let Some((runtime, segment, _)) = segment_of(fd) else {
        // SAFETY: the caller's promises are libc's.
        let written = unsafe { real::pwrite(fd, buf, count, at) };
        note_wal(fd, written);
        return written;
    };
    // SAFETY: the caller promises `count` readable bytes.
    let data = unsafe { bytes(buf, count) };
    offset(at).and_then(|at| runtime.write_segment(&segment, data, at, PageOrigin::Buffer)).libc()
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite64(fd: c_int, buf: *const c_void, count: size_t, at: off_t) -> ssize_t {
    // SAFETY: the caller's promises are libc's.
    unsafe { pwrite(fd, buf, count, at) }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwritev(fd: c_int, iov: *const iovec, count: c_int, at: off_t) -> ssize_t {
    let Some((runtime, segment, _)) = segment_of(fd) else {
        // SAFETY: the caller's promises are libc's.
        return unsafe { real::pwritev(fd, iov, count, at) };
    };
    // SAFETY: the caller promises `count` pieces that describe readable bytes.
    let pieces = unsafe { pieces(iov, count) };
    in_pieces(pieces, at, |piece, at| {
        // SAFETY: as above.
        let data = unsafe { bytes(piece.iov_base, piece.iov_len) };
        runtime.write_segment(&segment, data, at, PageOrigin::Buffer)
    })
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwritev64(fd: c_int, iov: *const iovec, count: c_int, at: off_t) -> ssize_t {
    // SAFETY: the caller's promises are libc's.
    unsafe { pwritev(fd, iov, count, at) }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lseek(fd: c_int, by: off_t, whence: c_int) -> off_t {
    let Some((runtime, segment, position)) = segment_of(fd) else {
        // SAFETY: the caller's promises are libc's.
        return unsafe { real::lseek(fd, by, whence) };
    };
    let base = match whence {
        libc::SEEK_SET => Ok(0),
        libc::SEEK_CUR => Ok(position),
        libc::SEEK_END => runtime.segment_bytes(&segment).map(|length| length.unwrap_or(0)),
        _ => Err(Errno(libc::EINVAL)),
    };
    match base.and_then(|base| base.checked_add_signed(by).ok_or(Errno(libc::EINVAL))) {
        Ok(position) => {
            fds::set(fd, Fd::Segment(segment, position));
            position.cast_signed()
        }
        Err(errno) => {
            set_errno(errno);
            -1
        }
    }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lseek64(fd: c_int, by: off_t, whence: c_int) -> off_t {
    // SAFETY: the caller's promises are libc's.
    unsafe { lseek(fd, by, whence) }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate(fd: c_int, length: off_t) -> c_int {
    match segment_of(fd) {
        Some((runtime, segment, _)) => {
            offset(length).and_then(|length| runtime.truncate_segment(&segment, length)).libc()
        }
        // SAFETY: the caller's promises are libc's.
        None => unsafe { real::ftruncate(fd, length) },
    }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate64(fd: c_int, length: off_t) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe { ftruncate(fd, length) }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn truncate(path: *const c_char, length: off_t) -> c_int {
    // SAFETY: the caller's promises are libc's.
    match unsafe { named(path) } {
        Some((runtime, Named::Segment(segment))) => truncate_existing(runtime, &segment, length).libc(),
        // SAFETY: the caller's promises are libc's.
        Some((_, Named::Wal | Named::Database(..) | Named::Other)) | None => unsafe { real::truncate(path, length) },
    }
}

fn truncate_existing(
    runtime: &crate::runtime::Runtime,
    segment: &crate::path::Segment,
    length: off_t,
) -> Result<(), Errno> {
    runtime.segment_bytes(segment)?.ok_or(Errno(libc::ENOENT))?;
    runtime.truncate_segment(segment, offset(length)?)
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn truncate64(path: *const c_char, length: off_t) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe { truncate(path, length) }
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_fallocate(fd: c_int, at: off_t, length: off_t) -> c_int {
    let Some((runtime, segment, _)) = segment_of(fd) else {
        // SAFETY: the caller's promises are libc's.
        return unsafe { real::posix_fallocate(fd, at, length) };
    };
    // This one returns its error.
    let end = offset(at).and_then(|at| at.checked_add(offset(length)?).ok_or(Errno(libc::EFBIG)));
    end.and_then(|end| runtime.allocate_segment(&segment, end)).map_or_else(|errno| errno.0, |()| 0)
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_fallocate64(fd: c_int, at: off_t, length: off_t) -> c_int {
    // SAFETY: the caller's promises are libc's.
    unsafe { posix_fallocate(fd, at, length) }
}

/// Postgres 18 copies files with it, if told so, and can do without.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn copy_file_range(
    from: c_int,
    from_at: *mut off_t,
    to: c_int,
    to_at: *mut off_t,
    length: size_t,
    flags: c_uint,
) -> ssize_t {
    if segment_of(from).is_some() || segment_of(to).is_some() {
        set_errno(Errno(libc::EOPNOTSUPP));
        return -1;
    }
    // SAFETY: the caller's promises are libc's.
    unsafe { real::copy_file_range(from, from_at, to, to_at, length, flags) }
}

unsafe fn bytes<'a>(buf: *const c_void, count: usize) -> &'a [u8] {
    // SAFETY: the caller's promise; a null pointer is allowed for no bytes.
    if count == 0 { &[] } else { unsafe { slice::from_raw_parts(buf.cast(), count) } }
}

unsafe fn bytes_mut<'a>(buf: *mut c_void, count: usize) -> &'a mut [u8] {
    // SAFETY: as above.
    if count == 0 { &mut [] } else { unsafe { slice::from_raw_parts_mut(buf.cast(), count) } }
}

unsafe fn pieces<'a>(iov: *const iovec, count: c_int) -> &'a [iovec] {
    match usize::try_from(count) {
        // SAFETY: the caller's promise.
        Ok(count) if count > 0 => unsafe { slice::from_raw_parts(iov, count) },
        Ok(_) | Err(_) => &[],
    }
}

/// Works piece by piece until one comes short or fails; a failure counts only when nothing was done before it.
fn in_pieces(pieces: &[iovec], at: off_t, mut work: impl FnMut(&iovec, u64) -> Result<usize, Errno>) -> ssize_t {
    let mut done = 0;
    for piece in pieces {
        match offset(at).and_then(|at| work(piece, at + done as u64)) {
            Ok(count) => {
                done += count;
                if count < piece.iov_len {
                    break;
                }
            }
            Err(errno) if done == 0 => return Err(errno).libc(),
            Err(_) => break,
        }
    }
    Ok(done).libc()
}
