//! This process's connection to the agent.

use std::{
    ffi::CStr,
    mem::MaybeUninit,
    sync::atomic::{AtomicI32, Ordering::*},
};

use page_cache::{
    Errno, Page,
    protocol::{Op, RESPONSE_HEAD_BYTES, Request, ResponseHead},
    types::{BlockNumber, ForkNumber, Oid, PageTag, RelTag},
};

use crate::real;

/// The connection and whose it is: a forked child must not speak on its parent's.
static SOCKET: AtomicI32 = AtomicI32::new(-1);
static OWNER: AtomicI32 = AtomicI32::new(0);

/// A connection that breaks is opened anew once: the question may be asked again. The agent is Postgres's parent; when
/// it is gone, so is every hope of an answer.
const ATTEMPTS: u32 = 2;

/// In requests that are about none.
const NO_REL: RelTag = RelTag { spc: 0, db: 0, rel: 0, fork: ForkNumber::Main };

/// Pause before another try when the agent's backlog is full.
const BACKLOG_PAUSE_MICROS: u32 = 2000;

/// Reads a page as WAL describes it.
pub fn get_page(socket: &CStr, tag: &PageTag, page: &mut Page) -> Result<(), Errno> {
    let request = Request { op: Op::GetPage, rel: tag.rel, block: tag.block };
    call(socket, &request, |fd, _| receive(fd, page)).map(drop)
}

/// Says that pages from this one on will probably be wanted.
pub fn read_ahead(socket: &CStr, tag: &PageTag) {
    announce(socket, &Request { op: Op::ReadAhead, rel: tag.rel, block: tag.block });
}

/// Says that there is WAL to be sent on.
pub fn wal_written(socket: &CStr) {
    announce(socket, &Request { op: Op::WalWritten, rel: NO_REL, block: 0 });
}

/// Nobody answers, and nothing is lost when it is not heard.
fn announce(socket: &CStr, request: &Request) {
    if let Ok(fd) = connected(socket)
        && send(fd, &request.encode()).is_err()
    {
        disconnect();
    }
}

/// A fork's size, `None` when there is none such.
pub fn rel_size(socket: &CStr, rel: &RelTag) -> Result<Option<BlockNumber>, Errno> {
    let head = call(socket, &Request { op: Op::RelSize, rel: *rel, block: 0 }, |_, _| Ok(()))?;
    Ok(head.present.then_some(head.value))
}

/// The listed relations of a database directory, encoded.
pub fn list_rels(socket: &CStr, spc: Oid, db: Oid) -> Result<Vec<u8>, Errno> {
    let rel = RelTag { spc, db, rel: 0, fork: ForkNumber::Main };
    let mut listed = Vec::new();
    call(socket, &Request { op: Op::ListRels, rel, block: 0 }, |fd, head| {
        listed = vec![0; head.payload_bytes as usize];
        receive(fd, &mut listed)
    })?;
    Ok(listed)
}

/// Returns when a quorum holds the WAL written so far.
pub fn sync_wal(socket: &CStr) -> Result<(), Errno> {
    call(socket, &Request { op: Op::SyncWal, rel: NO_REL, block: 0 }, |_, _| Ok(())).map(drop)
}

/// One question and its answer. Every failure of the connection is `EIO`.
fn call(
    socket: &CStr,
    request: &Request,
    mut payload: impl FnMut(i32, &ResponseHead) -> Result<(), Broken>,
) -> Result<ResponseHead, Errno> {
    for _ in 0..ATTEMPTS {
        let Ok(fd) = connected(socket) else { break };
        match exchange(fd, request, &mut payload) {
            Ok(head) if head.errno == 0 => return Ok(head),
            Ok(head) => return Err(Errno(head.errno)),
            Err(Broken) => disconnect(),
        }
    }
    Err(Errno(libc::EIO))
}

/// The connection is of no use any more.
struct Broken;

fn exchange(
    fd: i32,
    request: &Request,
    payload: &mut impl FnMut(i32, &ResponseHead) -> Result<(), Broken>,
) -> Result<ResponseHead, Broken> {
    send(fd, &request.encode())?;
    let mut bytes = [0; RESPONSE_HEAD_BYTES];
    receive(fd, &mut bytes)?;
    let head = ResponseHead::decode(&bytes, request.op).ok_or(Broken)?;
    if head.errno == 0 {
        payload(fd, &head)?;
    }
    Ok(head)
}

fn connected(socket: &CStr) -> Result<i32, Broken> {
    // SAFETY: no arguments.
    let pid = unsafe { libc::getpid() };
    if OWNER.load(Relaxed) != pid {
        disconnect();
        OWNER.store(pid, Relaxed);
    }
    let fd = SOCKET.load(Relaxed);
    if fd >= 0 {
        return Ok(fd);
    }
    let fd = connect(socket)?;
    SOCKET.store(fd, Relaxed);
    Ok(fd)
}

fn disconnect() {
    let fd = SOCKET.swap(-1, Relaxed);
    if fd >= 0 {
        // SAFETY: our own descriptor.
        unsafe { real::close(fd) };
    }
}

fn connect(socket: &CStr) -> Result<i32, Broken> {
    // SAFETY: all zeroes is a valid address; the path is checked to fit with its NUL.
    let mut address: libc::sockaddr_un = unsafe { MaybeUninit::zeroed().assume_init() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let path = socket.to_bytes_with_nul();
    if path.len() > address.sun_path.len() {
        return Err(Broken);
    }
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = from.cast_signed();
    }
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(Broken);
    }
    loop {
        // SAFETY: pointer and length describe `address`.
        let result = unsafe {
            libc::connect(fd, (&raw const address).cast(), size_of::<libc::sockaddr_un>() as libc::socklen_t)
        };
        match (result, Errno::last().0) {
            (0, _) => return Ok(fd),
            (_, libc::EINTR) => {}
            // SAFETY: no pointers.
            (_, libc::EAGAIN) => unsafe {
                libc::usleep(BACKLOG_PAUSE_MICROS);
            },
            (_, _) => {
                // SAFETY: our own descriptor.
                unsafe { real::close(fd) };
                return Err(Broken);
            }
        }
    }
}

fn send(fd: i32, bytes: &[u8]) -> Result<(), Broken> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &bytes[done..];
        // SAFETY: pointer and length describe `rest`.
        let sent = unsafe { libc::send(fd, rest.as_ptr().cast(), rest.len(), libc::MSG_NOSIGNAL) };
        done += transferred(sent)?;
    }
    Ok(())
}

fn receive(fd: i32, bytes: &mut [u8]) -> Result<(), Broken> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        // SAFETY: pointer and length describe `rest`.
        let got = unsafe { libc::recv(fd, rest.as_mut_ptr().cast(), rest.len(), 0) };
        if got == 0 {
            return Err(Broken);
        }
        done += transferred(got)?;
    }
    Ok(())
}

/// Bytes of one call: none after a signal.
fn transferred(result: libc::ssize_t) -> Result<usize, Broken> {
    match usize::try_from(result) {
        Ok(bytes) => Ok(bytes),
        Err(_) if Errno::last().0 == libc::EINTR => Ok(0),
        Err(_) => Err(Broken),
    }
}
