//! Has the agent send WAL on while it is being written: a bulk load's next sync then waits for its last part only.

use std::{
    ffi::CStr,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use crate::agent;

/// The agent is told of every so many bytes: far more than small transactions write before they sync.
const TELL_EVERY_BYTES: usize = 256 * 1024;

/// Bytes of WAL that this process has written and the agent has not been told of.
static UNTOLD: AtomicUsize = AtomicUsize::new(0);

/// Takes note of a write to a WAL segment.
pub fn written(socket: &CStr, bytes: usize) {
    let untold = UNTOLD.load(Relaxed) + bytes;
    UNTOLD.store(untold, Relaxed);
    if untold >= TELL_EVERY_BYTES {
        synced();
        agent::wal_written(socket);
    }
}

/// The agent hears, or has heard, of everything.
pub fn synced() {
    UNTOLD.store(0, Relaxed);
}
