//! Preloaded into every program of a benchmark (`LD_PRELOAD`): `fsync` and `fdatasync` take [`DELAY`] longer, as if each process had a disk
//! of its own whose syncs take so long. Benchmarks run on one machine, whose disk does one flush at a time for all who ask; servers that
//! keep copies of each other's data have a disk each.

use std::{sync::OnceLock, time::Duration};

use libc::c_int;

/// The environment variable with the microseconds; without it nothing is delayed.
const DELAY: &str = "DORMOUSE_BENCH_SYNC_US";

fn delay() -> Duration {
    static PARSED: OnceLock<Duration> = OnceLock::new();
    *PARSED.get_or_init(|| {
        let micros = std::env::var(DELAY).ok().and_then(|text| text.parse().ok());
        Duration::from_micros(micros.unwrap_or_default())
    })
}

fn sync(call: libc::c_long, fd: c_int) -> c_int {
    // By default the kernel wakes a sleeper up to 50 us late. The setting is the thread's.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
    std::thread::sleep(delay());
    // After the sleep, for `errno`.
    unsafe { libc::syscall(call, fd) as c_int }
}

/// `fsync(2)`, later.
///
/// # Safety
///
/// As the function itself.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fsync(fd: c_int) -> c_int {
    sync(libc::SYS_fsync, fd)
}

/// `fdatasync(2)`, later.
///
/// # Safety
///
/// As the function itself.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdatasync(fd: c_int) -> c_int {
    sync(libc::SYS_fdatasync, fd)
}
