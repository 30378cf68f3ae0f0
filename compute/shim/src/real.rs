//! libc's own functions, found behind ours on first use: other libraries' constructors call `open` before ours has run.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    sync::atomic::{AtomicPtr, Ordering::*},
};

use libc::{DIR, dirent, iovec, mode_t, off_t, size_t, ssize_t, stat as Stat};

/// The next definition of a name after this library's. Without it nothing can go on.
fn resolve(cell: &AtomicPtr<c_void>, name: &CStr) -> *mut c_void {
    let known = cell.load(Relaxed);
    if !known.is_null() {
        return known;
    }
    // SAFETY: the name is a C string.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    if found.is_null() {
        // SAFETY: ends the process.
        unsafe { libc::abort() };
    }
    cell.store(found, Relaxed);
    found
}

macro_rules! real {
    ($($name:ident($($arg:ident: $type:ty),*) -> $ret:ty;)*) => {
        $(
            /// libc's own function of this name.
            ///
            /// # Safety
            /// As libc's.
            #[allow(dead_code)]
            pub unsafe fn $name($($arg: $type),*) -> $ret {
                static CELL: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
                const NAME: &CStr = match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => panic!("a name without NUL"),
                };
                let found = resolve(&CELL, NAME);
                // SAFETY: libc's function of that name has this signature (variadic ones take integers alike).
                unsafe {
                    let function: unsafe extern "C" fn($($type),*) -> $ret = std::mem::transmute(found);
                    function($($arg),*)
                }
            }
        )*
    };
}

real! {
    open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int;
    openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int;
    close(fd: c_int) -> c_int;
    read(fd: c_int, buf: *mut c_void, count: size_t) -> ssize_t;
    __read_chk(fd: c_int, buf: *mut c_void, count: size_t, room: size_t) -> ssize_t;
    write(fd: c_int, buf: *const c_void, count: size_t) -> ssize_t;
    pread(fd: c_int, buf: *mut c_void, count: size_t, offset: off_t) -> ssize_t;
    __pread_chk(fd: c_int, buf: *mut c_void, count: size_t, offset: off_t, room: size_t) -> ssize_t;
    pwrite(fd: c_int, buf: *const c_void, count: size_t, offset: off_t) -> ssize_t;
    preadv(fd: c_int, iov: *const iovec, count: c_int, offset: off_t) -> ssize_t;
    pwritev(fd: c_int, iov: *const iovec, count: c_int, offset: off_t) -> ssize_t;
    lseek(fd: c_int, offset: off_t, whence: c_int) -> off_t;
    ftruncate(fd: c_int, length: off_t) -> c_int;
    truncate(path: *const c_char, length: off_t) -> c_int;
    fsync(fd: c_int) -> c_int;
    fdatasync(fd: c_int) -> c_int;
    syncfs(fd: c_int) -> c_int;
    sync_file_range(fd: c_int, offset: off_t, bytes: off_t, flags: c_uint) -> c_int;
    posix_fadvise(fd: c_int, offset: off_t, length: off_t, advice: c_int) -> c_int;
    posix_fallocate(fd: c_int, offset: off_t, length: off_t) -> c_int;
    copy_file_range(from: c_int, from_at: *mut off_t, to: c_int, to_at: *mut off_t, length: size_t, flags: c_uint)
        -> ssize_t;
    stat(path: *const c_char, buf: *mut Stat) -> c_int;
    lstat(path: *const c_char, buf: *mut Stat) -> c_int;
    fstat(fd: c_int, buf: *mut Stat) -> c_int;
    __xstat(version: c_int, path: *const c_char, buf: *mut Stat) -> c_int;
    __lxstat(version: c_int, path: *const c_char, buf: *mut Stat) -> c_int;
    __fxstat(version: c_int, fd: c_int, buf: *mut Stat) -> c_int;
    access(path: *const c_char, mode: c_int) -> c_int;
    chmod(path: *const c_char, mode: mode_t) -> c_int;
    unlink(path: *const c_char) -> c_int;
    rename(from: *const c_char, to: *const c_char) -> c_int;
    link(from: *const c_char, to: *const c_char) -> c_int;
    symlink(to: *const c_char, link: *const c_char) -> c_int;
    chdir(path: *const c_char) -> c_int;
    fchdir(fd: c_int) -> c_int;
    opendir(path: *const c_char) -> *mut DIR;
    readdir(dir: *mut DIR) -> *mut dirent;
    closedir(dir: *mut DIR) -> c_int;
    dup(fd: c_int) -> c_int;
    dup2(fd: c_int, to: c_int) -> c_int;
    fcntl(fd: c_int, command: c_int, argument: *mut c_void) -> c_int;
}
