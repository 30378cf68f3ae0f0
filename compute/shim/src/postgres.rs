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

/// A logical message of no database, which no SQL can write (`xl_logical_message` in `replication/message.h`): its header, its
/// prefix with the closing zero, its content.
pub struct Message<'a> {
    /// With the closing zero.
    pub prefix: &'a [u8],
    /// What it says.
    pub content: &'a [u8],
}

/// `RM_LOGICALMSG_ID`, `XLOG_LOGICAL_MESSAGE`.
const LOGICAL_MESSAGE: (u8, u8) = (21, 0);
/// `XLOG_MARK_UNIMPORTANT`: by itself no reason for a checkpoint or another snapshot of running transactions, or an idle
/// server that is decoded would write such messages for ever.
const MARK_UNIMPORTANT: u8 = 0x02;

/// Writes a message into WAL; returns its end, `None` where that cannot be. The caller is in no critical section and holds no
/// lock of ours: Postgres may leave by an error.
pub fn log_message(message: &Message<'_>) -> Option<u64> {
    static BEGIN: Symbol = Symbol::new(c"XLogBeginInsert");
    static REGISTER: Symbol = Symbol::new(c"XLogRegisterData");
    static FLAGS: Symbol = Symbol::new(c"XLogSetRecordFlags");
    static INSERT: Symbol = Symbol::new(c"XLogInsert");
    let (begin, register, flags, insert) = (BEGIN.find()?, REGISTER.find()?, FLAGS.find()?, INSERT.find()?);
    let mut header = [0u8; 24];
    header[8..16].copy_from_slice(&(message.prefix.len() as u64).to_le_bytes());
    header[16..].copy_from_slice(&(message.content.len() as u64).to_le_bytes());
    // SAFETY: `access/xloginsert.h`: `void XLogBeginInsert(void)`, `void XLogRegisterData(char *, int)`, `void
    // XLogSetRecordFlags(uint8)`, `XLogRecPtr XLogInsert(RmgrId, uint8)`. What is registered lives until it is inserted. Postgres
    // is within a file call of its own, not within another insertion.
    unsafe {
        let begin: extern "C-unwind" fn() = std::mem::transmute(begin);
        let register: extern "C-unwind" fn(*const u8, c_int) = std::mem::transmute(register);
        let flags: extern "C-unwind" fn(u8) = std::mem::transmute(flags);
        let insert: extern "C-unwind" fn(u8, u8) -> u64 = std::mem::transmute(insert);
        begin();
        for part in [&header, message.prefix, message.content] {
            register(part.as_ptr(), c_int::try_from(part.len()).unwrap_or(0));
        }
        flags(MARK_UNIMPORTANT);
        Some(insert(LOGICAL_MESSAGE.0, LOGICAL_MESSAGE.1))
    }
}

/// False while Postgres starts, and in a checkpointer that has been told to shut down: anything logged beside the shutdown
/// checkpoint would be a panic.
pub fn may_log() -> bool {
    static RECOVERY: Symbol = Symbol::new(c"RecoveryInProgress");
    static SHUTDOWN: Symbol = Symbol::new(c"ShutdownRequestPending");
    let (Some(recovery), Some(shutdown)) = (RECOVERY.find(), SHUTDOWN.find()) else { return false };
    // SAFETY: `bool RecoveryInProgress(void)`, `access/xlog.h`; `volatile sig_atomic_t ShutdownRequestPending`,
    // `postmaster/interrupt.h`.
    unsafe {
        let recovery: extern "C" fn() -> bool = std::mem::transmute(recovery);
        shutdown.cast::<c_int>().read_volatile() == 0 && !recovery()
    }
}

/// True within a transaction that has an id, as one that writes has.
pub fn has_transaction_id() -> bool {
    static SYMBOL: Symbol = Symbol::new(c"GetTopTransactionIdIfAny");
    // SAFETY: `TransactionId GetTopTransactionIdIfAny(void)`, `access/xact.h`.
    SYMBOL
        .find()
        .is_some_and(|found| unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> u32>(found)() } != 0)
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
