//! A lock between processes: a futex word in shared memory.

use std::sync::atomic::{AtomicU32, Ordering::*};

use crate::sys::Errno;

const FREE: u32 = 0;
const HELD: u32 = 1;
/// Held, and somebody sleeps on it.
const CONTENDED: u32 = 2;

/// How often to look again before sleeping; a critical section is a few hundred nanoseconds, or one page copy.
const SPINS: u32 = 100;

/// Not reentrant. A holder that dies leaves it held: Postgres goes down as a whole then (`restart_after_crash=off`), and
/// the agent only ever waits for a limited time.
#[repr(C, align(64))]
pub struct Lock {
    word: AtomicU32,
}

/// Releases the lock when dropped.
pub struct Guard<'a> {
    word: &'a AtomicU32,
}

impl Lock {
    /// Takes the lock. `ETIMEDOUT` when a limit is given and passes.
    pub fn lock(&self, limit_ms: Option<u32>) -> Result<Guard<'_>, Errno> {
        for _ in 0..SPINS {
            if self.word.compare_exchange_weak(FREE, HELD, Acquire, Relaxed).is_ok() {
                return Ok(Guard { word: &self.word });
            }
            std::hint::spin_loop();
        }
        self.lock_slowly(limit_ms)
    }

    #[cold]
    fn lock_slowly(&self, limit_ms: Option<u32>) -> Result<Guard<'_>, Errno> {
        while self.word.swap(CONTENDED, Acquire) != FREE {
            let limit = limit_ms
                .map(|ms| libc::timespec { tv_sec: i64::from(ms / 1000), tv_nsec: i64::from(ms % 1000) * 1_000_000 });
            let limit_ptr = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
            // SAFETY: the word lives in the mapping; a spurious return only makes us look again.
            let result =
                unsafe { libc::syscall(libc::SYS_futex, self.word.as_ptr(), libc::FUTEX_WAIT, CONTENDED, limit_ptr) };
            if result < 0 && Errno::last().0 == libc::ETIMEDOUT {
                return Err(Errno(libc::ETIMEDOUT));
            }
        }
        Ok(Guard { word: &self.word })
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if self.word.swap(FREE, Release) == CONTENDED {
            // SAFETY: waking takes only the word's address.
            unsafe { libc::syscall(libc::SYS_futex, self.word.as_ptr(), libc::FUTEX_WAKE, 1) };
        }
    }
}
