//! The one call about processes.

use std::ffi::{c_int, c_long, c_ulong};

use crate::{orphan, runtime::runtime};

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prctl(option: c_int, arg2: c_ulong, arg3: c_ulong, arg4: c_ulong, arg5: c_ulong) -> c_int {
    let arg2 = if option == libc::PR_SET_PDEATHSIG && runtime().is_some() { orphan::SIGNAL } else { arg2 };
    // SAFETY: the caller's promises are libc's, whose function makes this system call with all five words too.
    unsafe { libc::syscall(libc::SYS_prctl, c_long::from(option), arg2, arg3, arg4, arg5) as c_int }
}
