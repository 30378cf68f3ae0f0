//! From the connection to a session: encryption, the start-up packet, the token as a password, and whether this safekeeper can serve
//! the branch.
//!
//! The branch is the user's name, `<project>/<branch>`: a standby's walreceiver sets the database's name itself.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::BytesMut;
use pgwire::messages::{
    DecodeContext, Message,
    startup::{
        Authentication, GssEncRequest, NegotiateProtocolVersion, ParameterStatus, PasswordMessageFamily, SslRequest,
        Startup,
    },
};
use tokio::{net::TcpStream, time::Instant};
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use types::{BranchId, BranchRef, ProjectId};
use wire::Claims;

use super::{
    Shared,
    messages::{Wire, WireFault},
    refusal::Refusal,
    session::{self, Follower, Session},
};
use crate::{branch::BranchView, registry::BranchHandle};

/// A client's connection, plain or in TLS.
pub(super) type ClientStream = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// Requests for encryption of either kind, and the start-up packet, are three.
const MAX_STARTUP_PACKETS: usize = 4;
/// A cancel request's code, in place of a protocol version.
const CANCEL_CODE: u32 = 80_877_102;
/// The only version that is spoken: 3.0.
const PROTOCOL: i32 = 3 << 16;
/// Tokens are good for less than this; a longer time is as good as for ever.
const LONGEST_SESSION: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Why a client was not let in; it has been told.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoginError {
    #[error(transparent)]
    Wire(#[from] WireFault),
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// What a start-up packet asked for.
struct Asked {
    startup: Startup,
    encrypted: bool,
}

/// Takes a connection to a session; `None` when the client wanted none. The caller bounds the time.
pub(super) async fn log_in(stream: TcpStream, shared: &Shared) -> Result<Option<Session>, LoginError> {
    let Some((mut wire, asked)) = begin(stream, shared).await? else { return Ok(None) };
    match authenticate(&mut wire, asked, shared).await {
        Ok(Some(follower)) => Ok(Some(Session { wire, follower })),
        Ok(None) => Ok(None),
        Err(LoginError::Refused(refusal)) => {
            wire.refuse_finally(&refusal).await?;
            Err(refusal.into())
        }
        Err(error) => Err(error),
    }
}

/// Tells a client why it is not let in, whoever it is.
pub(super) async fn turn_away(stream: TcpStream, shared: &Shared, refusal: &Refusal) -> Result<(), LoginError> {
    match begin(stream, shared).await? {
        Some((mut wire, _)) => Ok(wire.refuse_finally(refusal).await?),
        None => Ok(()),
    }
}

/// Answers requests for encryption until the start-up packet is there.
async fn begin(stream: TcpStream, shared: &Shared) -> Result<Option<(Wire<ClientStream>, Asked)>, LoginError> {
    let mut wire = Wire::new(Either::Left(stream));
    let mut encrypted = false;
    for _ in 0..MAX_STARTUP_PACKETS {
        let Some(mut packet) = wire.reader.startup().await? else { return Ok(None) };
        match (code_of(&packet), &shared.tls) {
            (Some(CANCEL_CODE), _) => return Ok(None),
            (Some(_), Some(tls)) if SslRequest::is_ssl_request_packet(&packet) && !encrypted => {
                wire.writer.put_byte(b'S');
                wire.writer.flush().await?;
                let Some(Either::Left(stream)) = wire.into_stream() else { return Ok(None) };
                let stream = tls.accept(stream).await.map_err(WireFault::Io)?;
                wire = Wire::new(Either::Right(Box::new(stream)));
                encrypted = true;
            }
            (Some(_), _)
                if SslRequest::is_ssl_request_packet(&packet) || GssEncRequest::is_gss_enc_request_packet(&packet) =>
            {
                wire.writer.put_byte(b'N');
                wire.writer.flush().await?;
            }
            _ => {
                return match Startup::decode(&mut packet, &DecodeContext::default()) {
                    Ok(Some(startup)) => Ok(Some((wire, Asked { startup, encrypted }))),
                    Ok(None) | Err(_) => {
                        let refusal = Refusal::protocol("no start-up packet of protocol version 3");
                        wire.refuse_finally(&refusal).await?;
                        Err(refusal.into())
                    }
                };
            }
        }
    }
    Ok(None)
}

/// The number behind a packet's length.
fn code_of(packet: &BytesMut) -> Option<u32> {
    packet.get(4..)?.first_chunk().map(|code| u32::from_be_bytes(*code))
}

async fn authenticate(
    wire: &mut Wire<ClientStream>,
    asked: Asked,
    shared: &Shared,
) -> Result<Option<Follower>, LoginError> {
    let Asked { startup, encrypted } = asked;
    let parameter = |name: &str| startup.parameters.get(name).map(String::as_str);
    let extensions: Vec<String> = startup.parameters.keys().filter(|name| name.starts_with("_pq_.")).cloned().collect();
    if startup.protocol_number_minor > 0 || !extensions.is_empty() {
        wire.writer.put(&NegotiateProtocolVersion::new(PROTOCOL, extensions))?;
    }
    if shared.tls.is_some() && !encrypted {
        return Err(Refusal::new("28000", "this safekeeper takes connections in TLS only")
            .with_hint("sslmode=require")
            .into());
    }
    check_replication(parameter("replication"))?;
    let user = parameter("user").unwrap_or_default();
    let branch = branch_of(user)?;
    let Some(claims) = ask_token(wire, shared, &branch).await? else { return Ok(None) };
    let (handle, system_identifier) = servable(&branch, shared).await?;
    // Not before: libpq goes on to its next host only when it is refused instead.
    wire.writer.put(&Authentication::Ok)?;
    for (name, value) in parameters(user) {
        wire.writer.put(&ParameterStatus::new(name.to_owned(), value.to_owned()))?;
    }
    wire.writer.ready().await?;
    Ok(Some(Follower { branch, handle, system_identifier, expires: expiry(&claims) }))
}

/// Physical replication, and nothing else.
fn check_replication(value: Option<&str>) -> Result<(), Refusal> {
    match value.unwrap_or_default().to_ascii_lowercase().as_str() {
        "true" | "on" | "yes" | "1" => Ok(()),
        "database" => Err(Refusal::unsupported("logical replication")),
        _ => Err(Refusal::unsupported("a connection without replication=true")),
    }
}

fn branch_of(user: &str) -> Result<BranchRef, Refusal> {
    let named = user.split_once('/').and_then(|(project, branch)| {
        Some(BranchRef { project: ProjectId::new(project).ok()?, branch: BranchId::new(branch).ok()? })
    });
    named.ok_or_else(|| {
        Refusal::new("28000", "the user's name must be <project>/<branch>")
            .with_hint("`dormouse branches follow` prints it, and the password.")
    })
}

/// Asks for the password and checks it; `None` when the client has left instead, as psql does to ask for it.
async fn ask_token(
    wire: &mut Wire<ClientStream>,
    shared: &Shared,
    branch: &BranchRef,
) -> Result<Option<Claims>, LoginError> {
    wire.writer.put(&Authentication::CleartextPassword)?;
    wire.writer.flush().await?;
    let Some(mut frame) = wire.reader.message().await? else { return Ok(None) };
    if frame.kind != b'p' {
        return Err(Refusal::protocol("a password was expected").into());
    }
    let message = PasswordMessageFamily::decode(&mut frame.bytes, &DecodeContext::default());
    let message = message.map_err(WireFault::Message)?;
    let Some(message) = message else { return Err(Refusal::protocol("a password was expected").into()) };
    let token = message.into_password().map_err(WireFault::Message)?.password;
    let no_good = |reason: String| {
        Refusal::new("28P01", reason).with_hint("The password is a token; `dormouse branches follow` makes one.")
    };
    let claims = shared.verifier.verify(&token).map_err(|error| no_good(error.to_string()))?;
    if !claims.allows_wal(branch) {
        return Err(no_good(format!("the token does not allow to read the WAL of branch {branch}")).into());
    }
    Ok(Some(claims))
}

/// The branch's handle and its cluster's identifier, if it can be followed here. Else the client is told to try the next host.
async fn servable(branch: &BranchRef, shared: &Shared) -> Result<(Arc<BranchHandle>, u64), Refusal> {
    let handle = shared.registry.get(branch).ok_or_else(Refusal::stopping)?;
    let (status, membership, identity) = match handle.loaded().await.ok_or_else(Refusal::stopping)? {
        BranchView::Here { status, membership, identity } => (status, membership, identity),
        BranchView::Deleted => return Err(Refusal::deleted()),
        BranchView::Failed(reason) => {
            return Err(Refusal::not_here(format!("the branch's files on this safekeeper can't be used: {reason}")));
        }
        BranchView::Loading => return Err(Refusal::stopping()),
    };
    if membership.is_some_and(|membership| !membership.contains(shared.registry.node())) {
        return Err(Refusal::not_here("this safekeeper has left the branch").with_hint(session::FOLLOW_ANEW));
    }
    if !status.commit_lsn.is_valid() {
        return Err(Refusal::not_here("this safekeeper has none of the branch's WAL yet"));
    }
    let system_identifier = match identity.system_identifier {
        Some(known) => Some(known),
        None => session::named_in_wal(&handle, status.commit_lsn).await,
    };
    let unknown = || {
        Refusal::not_here("this safekeeper does not know the branch's system identifier yet")
            .with_hint("It learns it when the branch's compute starts: connect to the branch once.")
    };
    Ok((Arc::clone(&handle), system_identifier.ok_or_else(unknown)?))
}

/// What libpq, and programs that use it, want to know of a server.
fn parameters(user: &str) -> [(&'static str, &str); 11] {
    [
        ("server_version", session::SERVER_VERSION),
        ("server_encoding", "UTF8"),
        ("client_encoding", "UTF8"),
        ("integer_datetimes", "on"),
        ("standard_conforming_strings", "on"),
        ("DateStyle", "ISO, MDY"),
        ("IntervalStyle", "postgres"),
        ("TimeZone", "UTC"),
        ("in_hot_standby", "off"),
        ("is_superuser", "off"),
        ("session_authorization", user),
    ]
}

fn expiry(claims: &Claims) -> Instant {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Instant::now() + Duration::from_secs(claims.exp).saturating_sub(now).min(LONGEST_SESSION)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_is_the_branch() {
        let branch = branch_of("p-1/br-2").expect("good");
        assert_eq!((branch.project.as_str(), branch.branch.as_str()), ("p-1", "br-2"));
        for bad in ["", "postgres", "p/", "/b", "p/b/c", "../b", "p/.."] {
            assert_eq!(branch_of(bad).expect_err(bad).sqlstate, "28000", "{bad}");
        }
    }

    #[test]
    fn only_physical_replication_is_let_in() {
        for good in ["true", "on", "1", "yes"] {
            assert_eq!(check_replication(Some(good)), Ok(()));
        }
        for bad in [None, Some("false"), Some("database"), Some("x")] {
            assert_eq!(check_replication(bad).expect_err("refused").sqlstate, "0A000");
        }
    }
}
