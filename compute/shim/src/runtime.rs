//! Whether the shim is active in this process, and where its data directory and cache are.

use std::{
    cell::UnsafeCell,
    ffi::{CStr, c_char},
    sync::atomic::{AtomicBool, AtomicU8, Ordering::*},
};

use page_cache::Shared;

use crate::{
    orphan,
    path::{self, Named},
};

/// Longest path, as Linux has it.
const PATH_MAX: usize = 4096;

/// What an active process knows.
pub struct Runtime {
    /// The page cache.
    pub shared: Shared,
    /// The agent's socket.
    pub socket: &'static CStr,
    /// The data directory as it was named to us, and with symbolic links followed.
    roots: [&'static [u8]; 2],
}

const UNKNOWN: u8 = 0;
const BUSY: u8 = 1;
const INACTIVE: u8 = 2;
const ACTIVE: u8 = 3;

static STATE: AtomicU8 = AtomicU8::new(UNKNOWN);
static CWD_IS_ROOT: AtomicBool = AtomicBool::new(false);
static RUNTIME: Cell = Cell(UnsafeCell::new(None));

struct Cell(UnsafeCell<Option<Runtime>>);
// SAFETY: written once, before `STATE` says `ACTIVE`; Postgres has one thread.
unsafe impl Sync for Cell {}

/// The runtime; `None` in any program but a `postgres` that was started with our environment.
pub fn runtime() -> Option<&'static Runtime> {
    match STATE.load(Acquire) {
        // SAFETY: `ACTIVE` says that it was written and will not be again.
        ACTIVE => unsafe { (*RUNTIME.0.get()).as_ref() },
        UNKNOWN => start(),
        // `BUSY`: a call from within our own start.
        _ => None,
    }
}

#[cold]
fn start() -> Option<&'static Runtime> {
    STATE.store(BUSY, Relaxed);
    let Some(started) = Runtime::from_environment() else {
        STATE.store(INACTIVE, Release);
        return None;
    };
    // SAFETY: `BUSY` keeps everybody else away.
    unsafe { *RUNTIME.0.get() = Some(started) };
    STATE.store(ACTIVE, Release);
    note_cwd();
    orphan::die_with_the_postmaster();
    runtime()
}

impl Runtime {
    fn from_environment() -> Option<Runtime> {
        let root = variable(c"DORMOUSE_SHIM_PGDATA")?;
        if !program_is_postgres() {
            return None;
        }
        let needed = |name: &CStr| variable(name).unwrap_or_else(|| die("an environment variable is missing"));
        let socket = needed(c"DORMOUSE_SHIM_SOCKET");
        let shared = Shared::open(needed(c"DORMOUSE_SHIM_INDEX"), needed(c"DORMOUSE_SHIM_PAGES"))
            .unwrap_or_else(|_| die("cannot open the page cache"));
        Some(Runtime { shared, socket, roots: [trim(root.to_bytes()), trim(real_path(root).to_bytes())] })
    }

    #[cfg(test)]
    pub fn for_test(shared: Shared) -> Runtime {
        Runtime { shared, socket: c"/nowhere", roots: [b"/nowhere", b"/nowhere"] }
    }

    /// What a path names, if it is one of ours.
    fn name(&self, path: &[u8]) -> Named {
        self.relative(path).map_or(Named::Other, path::parse)
    }

    /// A path below the data directory, relative to it; it may begin with a slash. `None` for one that is elsewhere.
    pub fn relative<'a>(&self, path: &'a [u8]) -> Option<&'a [u8]> {
        if path.first() != Some(&b'/') {
            return CWD_IS_ROOT.load(Relaxed).then_some(path);
        }
        let below = |root: &&[u8]| path.strip_prefix(*root).filter(|rest| rest.first() == Some(&b'/'));
        self.roots.iter().find_map(below)
    }
}

/// The runtime and what a path names; `None` where the shim is not active.
///
/// # Safety
/// `path` is a C string.
pub unsafe fn named(path: *const c_char) -> Option<(&'static Runtime, Named)> {
    let runtime = runtime()?;
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    Some((runtime, runtime.name(unsafe { CStr::from_ptr(path) }.to_bytes())))
}

/// Postgres changes to its data directory at start and uses relative paths from then on.
pub fn note_cwd() {
    if STATE.load(Acquire) != ACTIVE {
        return;
    }
    let Some(runtime) = runtime() else { return };
    let mut buf = [0u8; PATH_MAX];
    // SAFETY: pointer and length describe `buf`; the raw call returns the length with its NUL, or an error.
    let length = unsafe { libc::syscall(libc::SYS_getcwd, buf.as_mut_ptr(), buf.len()) };
    let cwd = usize::try_from(length).ok().and_then(|length| buf.get(..length.saturating_sub(1)));
    CWD_IS_ROOT.store(cwd.is_some_and(|cwd| runtime.roots.contains(&cwd)), Relaxed);
}

fn variable(name: &CStr) -> Option<&'static CStr> {
    // SAFETY: the name is a C string.
    let value = unsafe { libc::getenv(name.as_ptr()) };
    if value.is_null() {
        return None;
    }
    // SAFETY: a C string. A copy, since Postgres overwrites its environment's memory to show its state in `ps`.
    let copy = unsafe { libc::strdup(value) };
    // SAFETY: never freed.
    (!copy.is_null()).then(|| unsafe { CStr::from_ptr(copy) })
}

fn real_path(path: &'static CStr) -> &'static CStr {
    // SAFETY: a C string; the result is allocated and never freed.
    let real = unsafe { libc::realpath(path.as_ptr(), std::ptr::null_mut()) };
    // SAFETY: as above.
    if real.is_null() { path } else { unsafe { CStr::from_ptr(real) } }
}

fn trim(mut path: &'static [u8]) -> &'static [u8] {
    while let Some(shorter) = path.strip_suffix(b"/") {
        path = shorter;
    }
    path
}

fn program_is_postgres() -> bool {
    let mut buf = [0u8; PATH_MAX];
    // SAFETY: the path is a C string; pointer and length describe `buf`.
    let length = unsafe {
        let path = c"/proc/self/exe".as_ptr();
        libc::syscall(libc::SYS_readlinkat, libc::AT_FDCWD, path, buf.as_mut_ptr(), buf.len())
    };
    let path = usize::try_from(length).ok().and_then(|length| buf.get(..length)).unwrap_or_default();
    path.rsplit(|byte| *byte == b'/').next() == Some(b"postgres")
}

/// Going on without the cache would show Postgres an empty data directory.
fn die(reason: &str) -> ! {
    for part in ["dormouse shim: ", reason, "\n"] {
        // SAFETY: pointer and length describe `part`; the second call ends the process.
        unsafe { libc::syscall(libc::SYS_write, 2, part.as_ptr(), part.len()) };
    }
    // SAFETY: ends the process.
    unsafe { libc::_exit(1) }
}
