//! What the `postgres` program itself tells: it exports its symbols to extensions.

use std::{
    ffi::{CStr, c_int, c_void},
    sync::atomic::{AtomicUsize, Ordering::*},
};

use page_cache::normal_insert_lsn;

/// Where WAL ends in memory: everything logged so far lies before it. `u64::MAX`, "never", where there is no telling.
pub fn insert_lsn() -> u64 {
    static SYMBOL: Symbol = Symbol::new(c"GetXLogInsertRecPtr");
    match SYMBOL.find() {
        // SAFETY: `XLogRecPtr GetXLogInsertRecPtr(void)`, `access/xlog.h`, the same from 9.5 to 18. It takes a spinlock
        // that nobody holds over a file call; relations are written only when shared memory stands.
        Some(found) => {
            normal_insert_lsn(unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> u64>(found)() })
        }
        None => u64::MAX,
    }
}

/// Has Postgres write and sync its WAL up to `lsn`, which comes from [`insert_lsn`]. The caller holds no lock of ours:
/// Postgres may leave by an error.
pub fn flush_wal(lsn: u64) {
    static SYMBOL: Symbol = Symbol::new(c"XLogFlush");
    if let Some(found) = SYMBOL.find() {
        // SAFETY: `void XLogFlush(XLogRecPtr record)`, `access/xlog.h`. Postgres itself calls it before it writes a page, under
        // the same locks.
        unsafe { std::mem::transmute::<*mut c_void, extern "C-unwind" fn(u64)>(found)(lsn) };
    }
}

/// Has Postgres sync what it has inserted into WAL beyond `shipped`; nothing when a quorum holds it all.
///
/// Needed before a page of a visibility map is fetched: its bits are cleared before the record that says so is inserted, and
/// the page may be written, and let go, in between. The one who clears keeps the page pinned until the record is inserted, so
/// when it is read again, that record is in WAL: synced, it is part of what storage answers.
pub fn flush_wal_inserted(shipped: u64) {
    let inserted = insert_lsn();
    if inserted != u64::MAX && inserted > shipped {
        flush_wal(inserted);
    }
}

/// True in the postmaster: it lists database directories at start, to remove temporary files, and wants no relations.
pub fn is_postmaster() -> bool {
    static SYMBOL: Symbol = Symbol::new(c"PostmasterPid");
    // SAFETY: `pid_t PostmasterPid`, `miscadmin.h`.
    SYMBOL.find().is_some_and(|found| unsafe { found.cast::<c_int>().read() == libc::getpid() })
}

/// A symbol that is looked up once.
struct Symbol {
    name: &'static CStr,
    /// 0: not looked up; 1: there is none.
    found: AtomicUsize,
}

impl Symbol {
    const fn new(name: &'static CStr) -> Symbol {
        Symbol { name, found: AtomicUsize::new(0) }
    }

    fn find(&self) -> Option<*mut c_void> {
        let mut found = self.found.load(Relaxed);
        if found == 0 {
            // SAFETY: the name is a C string.
            found = (unsafe { libc::dlsym(libc::RTLD_DEFAULT, self.name.as_ptr()) } as usize).max(1);
            self.found.store(found, Relaxed);
        }
        (found != 1).then_some(found as *mut c_void)
    }
}
