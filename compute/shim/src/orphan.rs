//! No backend outlives its postmaster.
//!
//! A backend that waits on a semaphore for a lock whose holder is gone never learns that the postmaster is gone too: it would
//! hold its client's connection for ever. The kernel ends it instead. Postgres itself asks the kernel for `SIGPWR` at that
//! moment (`PostmasterDeathSignalInit` in `storage/ipc/pmsignal.c`), which only a backend that looks notices: the hook of
//! `prctl` turns that into [`SIGNAL`].

use std::{
    ffi::c_ulong,
    sync::atomic::{AtomicI32, Ordering::Relaxed},
};

/// What ends a backend whose postmaster is gone.
pub const SIGNAL: c_ulong = libc::SIGKILL as c_ulong;

/// Who forks.
static PARENT: AtomicI32 = AtomicI32::new(0);

/// From here on, every child that this process forks is killed when this process ends.
pub fn die_with_the_postmaster() {
    // SAFETY: both handlers make system calls only. Without memory for them (the only failure), children live on as in any
    // other Postgres.
    let _ = unsafe { libc::pthread_atfork(Some(before_fork), None, Some(in_child)) };
}

extern "C" fn before_fork() {
    // SAFETY: no arguments, no failure.
    PARENT.store(unsafe { libc::getpid() }, Relaxed);
}

extern "C" fn in_child() {
    // SAFETY: system calls with plain arguments.
    unsafe {
        libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, SIGNAL, 0, 0, 0);
        // The parent may have ended before the kernel was told.
        if libc::getppid() != PARENT.load(Relaxed) {
            libc::_exit(1);
        }
    }
}
