//! One client connection from its first byte to its last.

use std::{borrow::Cow, io, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};

use bytes::BytesMut;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::either::Either;

use crate::{
    cancel::{CancelGuard, CancelTarget},
    compute::{self, OpenError, Opened},
    end::{EndReason, Stop},
    endpoint_name::{self, Choice, EndpointName, Options},
    handshake::{self, CancelRequest, HandshakeError, Packet, Startup, TLS_HANDSHAKE_BYTE},
    login,
    messages::{self, FatalError},
    pooling,
    proxy_protocol::{PREFIX_BYTES, Prefix, ProxyHeaderError},
    server::{ByteStream, ClientStream, Shared},
    splice::splice,
    tls::{Protocol, TlsInfo},
    token::{CLAIMS_SETTING, Claims},
    wake::{WakeError, Woken},
};

/// How long passing on a cancel request may take.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a client that was refused may take to read why.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

/// Serves one connection, and logs how it ended.
pub async fn serve(shared: Arc<Shared>, tcp: TcpStream, peer: SocketAddr) {
    attend(&shared, peer, Box::pin(greet(&shared, tcp, peer))).await;
}

/// Serves a client that speaks Postgres's protocol inside something else, and logs how it ended.
pub async fn serve_inside(shared: Arc<Shared>, stream: Box<dyn ByteStream>, arrival: Arrival, peer: SocketAddr) {
    attend(&shared, peer, Box::pin(greet_inside(stream, arrival, peer))).await;
}

/// The greeting, and what comes before a session, are in memory of their own: a session's would keep room for them to its end.
async fn attend(
    shared: &Shared,
    peer: SocketAddr,
    greeting: Pin<Box<impl Future<Output = Result<Greeting, EndReason>>>>,
) {
    let begun = Instant::now();
    let login_deadline = begun + shared.config.handshake_timeout;
    let mut who = Who { peer, user: String::new(), endpoint: String::new(), tls: false, cold: false };
    let greeted = tokio::select! {
        () = shared.draining.cancelled() => Err(EndReason::Shutdown),
        greeted = timeout_at(login_deadline, greeting) => greeted.unwrap_or(Err(EndReason::HandshakeTimeout)),
    };
    let reason = match greeted {
        Ok(greeting) => run(shared, greeting, login_deadline, &mut who).await,
        Err(reason) => reason,
    };
    let seconds = begun.elapsed().as_secs_f64();
    let peer = who.peer;
    if who.user.is_empty() || reason == EndReason::LeftBeforeLogin {
        tracing::debug!(%peer, %reason, seconds, "connection ended");
    } else {
        let Who { user: role, endpoint, tls, cold, .. } = who;
        tracing::info!(%peer, endpoint, role, tls, cold, %reason, seconds, "session ended");
    }
}

/// How a client has come in, as far as its login is concerned.
#[derive(Debug, Clone, Default)]
pub struct Arrival {
    /// The host name that it asked for: in TLS, or in a WebSocket's address.
    pub host: Option<String>,
    /// Nobody in between can read what it sends.
    pub encrypted: bool,
    /// Data for channel binding, where Postgres's own protocol is inside TLS.
    pub end_point: Option<Arc<[u8]>>,
    /// It sends its password in clear text, perhaps before it is asked.
    pub sends_password: bool,
    /// A JSON Web Token that counts in place of its password.
    pub token: Option<String>,
}

impl Arrival {
    /// Of a client that speaks Postgres's protocol inside TLS.
    pub fn inside_tls(info: TlsInfo) -> Self {
        Self { host: info.sni, encrypted: true, end_point: info.end_point, ..Self::default() }
    }
}

/// What the log says of a session.
struct Who {
    /// The client's address; where a load balancer told it, that.
    peer: SocketAddr,
    user: String,
    endpoint: String,
    tls: bool,
    cold: bool,
}

async fn run(shared: &Shared, greeting: Greeting, login_deadline: Instant, who: &mut Who) -> EndReason {
    let Greeting { mut stream, arrival, packet, peer } = greeting;
    who.peer = peer;
    let startup = match packet {
        Ok(First::Startup(startup)) => startup,
        Ok(First::Cancel(request)) => {
            cancel(shared, request).await;
            // A proper end of TLS: libpq takes any other for a request that failed.
            let _ = timeout(FAREWELL_TIMEOUT, stream.shutdown()).await;
            return EndReason::Cancel;
        }
        Err(error) => return farewell(stream, error.into()).await,
    };
    who.user = startup.user.clone();
    who.tls = arrival.encrypted;
    let prepared = tokio::select! {
        () = shared.draining.cancelled() => {
            let message = "terminating connection due to administrator command";
            Err(Stop::refuse(EndReason::Shutdown, FatalError::new("57P01", message)))
        }
        prepared = Box::pin(prepare(shared, &mut stream, &arrival, &startup, login_deadline, who)) => prepared,
    };
    match prepared {
        Ok(Ready { session: Session::Direct(session), _slot, _cancel }) => {
            splice(stream, session.stream, &shared.kill).await
        }
        Ok(Ready { session: Session::Pooled(session), _slot, .. }) => {
            pooling::serve(stream, session, shared.draining.clone(), shared.kill.clone()).await
        }
        Err(stop) => farewell(stream, stop).await,
    }
}

/// A connection whose first real packet was read.
struct Greeting {
    stream: ClientStream,
    arrival: Arrival,
    packet: Result<First, HandshakeError>,
    /// The client's address; where a load balancer told it, that.
    peer: SocketAddr,
}

enum First {
    Startup(Startup),
    Cancel(CancelRequest),
}

/// Settles encryption and reads the packet that says what the client wants.
///
/// Nothing is read ahead of a packet, so no byte sent before TLS can pass for one sent inside it.
async fn greet(shared: &Shared, mut tcp: TcpStream, peer: SocketAddr) -> Result<Greeting, EndReason> {
    let gone = |_: io::Error| EndReason::LeftBeforeLogin;
    let peer = real_peer(shared, &mut tcp, peer).await?;
    let mut first_byte = [0; 1];
    if tcp.peek(&mut first_byte).await.map_err(gone)? == 0 {
        return Err(EndReason::LeftBeforeLogin);
    }
    if first_byte[0] == TLS_HANDSHAKE_BYTE {
        return greet_inside_tls(shared, tcp, true, peer).await;
    }
    let mut gss_refused = false;
    loop {
        match read_packet(&mut tcp).await.map_err(gone)? {
            Ok(Packet::Ssl) => {
                tcp.write_all(&[messages::ACCEPT_ENCRYPTION]).await.map_err(gone)?;
                return greet_inside_tls(shared, tcp, false, peer).await;
            }
            Ok(Packet::GssEnc) if !gss_refused => {
                tcp.write_all(&[messages::REFUSE_ENCRYPTION]).await.map_err(gone)?;
                gss_refused = true;
            }
            other => {
                let stream = Either::Left(tcp);
                return Ok(Greeting { stream, arrival: Arrival::default(), packet: first(other), peer });
            }
        }
    }
}

/// The client's address: a load balancer's header tells it where there is one.
pub async fn real_peer(shared: &Shared, tcp: &mut TcpStream, peer: SocketAddr) -> Result<SocketAddr, EndReason> {
    if shared.config.proxy_protocol { Ok(read_proxy_header(tcp).await?.unwrap_or(peer)) } else { Ok(peer) }
}

/// The address that a load balancer tells, if it tells one.
async fn read_proxy_header(tcp: &mut TcpStream) -> Result<Option<SocketAddr>, EndReason> {
    let gone = |_: io::Error| EndReason::LeftBeforeLogin;
    let wrong = |error: ProxyHeaderError| {
        tracing::warn!(%error, "not from a load balancer");
        EndReason::ProtocolViolation
    };
    let mut prefix = [0; PREFIX_BYTES];
    tcp.read_exact(&mut prefix).await.map_err(gone)?;
    let prefix = Prefix::parse(&prefix).map_err(wrong)?;
    let mut rest = vec![0; prefix.rest_bytes];
    tcp.read_exact(&mut rest).await.map_err(gone)?;
    prefix.source(&rest).map_err(wrong)
}

/// `direct`: the client began with TLS at once, and must then name Postgres's protocol, as Postgres 17 asks.
async fn greet_inside_tls(
    shared: &Shared,
    tcp: TcpStream,
    direct: bool,
    peer: SocketAddr,
) -> Result<Greeting, EndReason> {
    let (stream, info) = shared.tls.accept(tcp).await.map_err(|error| {
        tracing::debug!(%error, "TLS handshake failed");
        EndReason::Tls
    })?;
    if direct && info.protocol != Protocol::Postgres {
        return Err(EndReason::Tls);
    }
    greet_inside(stream, Arrival::inside_tls(info), peer).await
}

async fn greet_inside(
    mut stream: Box<dyn ByteStream>,
    arrival: Arrival,
    peer: SocketAddr,
) -> Result<Greeting, EndReason> {
    let packet = read_packet(&mut stream).await.map_err(|_| EndReason::LeftBeforeLogin)?;
    Ok(Greeting { stream: Either::Right(stream), arrival, packet: first(packet), peer })
}

fn first(packet: Result<Packet, HandshakeError>) -> Result<First, HandshakeError> {
    match packet? {
        Packet::Startup(startup) => Ok(First::Startup(startup)),
        Packet::Cancel(request) => Ok(First::Cancel(request)),
        Packet::Ssl | Packet::GssEnc => Err(HandshakeError::EncryptionAgain),
    }
}

async fn read_packet(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Result<Packet, HandshakeError>> {
    let mut length_word = [0; 4];
    stream.read_exact(&mut length_word).await?;
    let bytes = match handshake::body_bytes(length_word) {
        Ok(bytes) => bytes,
        Err(error) => return Ok(Err(error)),
    };
    let mut body = vec![0; bytes];
    stream.read_exact(&mut body).await?;
    Ok(Packet::parse(&body))
}

/// A key that nobody has is ignored, and the client is told nothing in any case: that is the protocol.
async fn cancel(shared: &Shared, request: CancelRequest) {
    let Some(target) = shared.cancels.find(request) else { return };
    match timeout(CANCEL_TIMEOUT, target.cancel()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "cannot pass a cancel request on"),
        Err(_) => tracing::warn!("a compute did not take a cancel request in time"),
    }
}

/// A session that may begin.
struct Ready {
    session: Session,
    _slot: OwnedSemaphorePermit,
    _cancel: Option<CancelGuard>,
}

enum Session {
    /// With a server connection of its own.
    Direct(Opened),
    /// With one at a time from the pool.
    Pooled(pooling::Session),
}

/// Login, wake, and Postgres's greeting passed on.
async fn prepare(
    shared: &Shared,
    stream: &mut ClientStream,
    arrival: &Arrival,
    startup: &Startup,
    login_deadline: Instant,
    who: &mut Who,
) -> Result<Ready, Stop> {
    let slot = shared.session_slot().ok_or_else(|| {
        Stop::refuse(EndReason::TooManyConnections, FatalError::new("53300", "sorry, too many clients already"))
    })?;
    let options = Options::parse(startup.options.as_deref().unwrap_or(""))?;
    let logging_in = log_in(shared, stream, arrival, startup, &options, who);
    let (EndpointName { endpoint, pooled }, claims) =
        timeout_at(login_deadline, logging_in).await.map_err(|_| Stop::silent(EndReason::HandshakeTimeout))??;
    let startup = &match claims {
        Some(claims) => Cow::Owned(with_claims(startup, &claims)),
        None => Cow::Borrowed(startup),
    };
    if pooled {
        let mode = options.pool_mode.unwrap_or(shared.config.pool_mode);
        let Shared { pools, cancels, .. } = shared;
        let rest = options.rest.as_deref();
        let session = pooling::greet(pools, cancels, stream, &endpoint, startup, rest, mode).await?;
        return Ok(Ready { session: Session::Pooled(session), _slot: slot, _cancel: None });
    }

    let message = compute::encode_startup(startup, options.rest.as_deref())
        .map_err(|_| Stop::refuse(EndReason::Internal, FatalError::new("XX000", "cannot pass the parameters on")))?;
    let wake_deadline = Instant::now() + shared.config.wake_timeout;
    let opened = shared.waker.open(&endpoint, &message, wake_deadline).await;
    let Woken { session, socket, cold } = opened.map_err(|error| wake_refusal(&endpoint, error))?;
    who.cold = cold;

    let mut greeting = BytesMut::from(&session.before_key[..]);
    let target = session.key.map(|key| Arc::new(CancelTarget { socket, key }));
    let guard = target.map(|target| shared.cancels.register(Some(target)));
    if let Some(key) = guard.as_ref().map(CancelGuard::key) {
        greeting.extend_from_slice(&messages::backend_key_data(key.process_id, key.secret));
    }
    greeting.extend_from_slice(&session.after_key);
    stream.write_all(&greeting).await?;
    stream.flush().await?;
    Ok(Ready { session: Session::Direct(session), _slot: slot, _cancel: guard })
}

async fn log_in(
    shared: &Shared,
    stream: &mut ClientStream,
    arrival: &Arrival,
    startup: &Startup,
    options: &Options,
    who: &mut Who,
) -> Result<(EndpointName, Option<Claims>), Stop> {
    if startup.needs_negotiation() {
        stream.write_all(&messages::negotiate_protocol_version(&startup.unknown_extensions)).await?;
    }
    let from = who.peer.ip();
    let domain = shared.config.domain.as_deref();
    let may_ask_password = arrival.encrypted || shared.config.allow_cleartext;
    let chosen = endpoint_name::choose(arrival.host.as_deref(), options, domain)?;
    if let Choice::Named(name) = &chosen
        && !arrival.sends_password
    {
        who.endpoint = name.endpoint.to_string();
        let end_point = arrival.end_point.as_ref();
        shared.login.by_scram(stream, end_point, from, &name.endpoint, &startup.user).await?;
        return Ok((name.clone(), None));
    }
    if !may_ask_password {
        return Err(no_endpoint(domain));
    }
    let sent = login::ask_password(stream).await?;
    let (name, password) = match chosen {
        Choice::Named(name) => (name, &sent[..]),
        Choice::AskPassword => login::endpoint_in_password(&sent, || no_endpoint(domain))?,
    };
    who.endpoint = name.endpoint.to_string();
    let Some(token) = &arrival.token else {
        shared.login.by_password(from, &name.endpoint, &startup.user, password).await?;
        return Ok((name, None));
    };
    let fresh_for = shared.config.auth_cache;
    let (_, claims) = shared.login.by_token(fresh_for, from, &name.endpoint, &startup.user, token).await?;
    Ok((name, Some(claims)))
}

/// A session whose token says who it is for: SQL finds that in a setting.
fn with_claims(startup: &Startup, claims: &Claims) -> Startup {
    let mut startup = startup.clone();
    startup.parameters.retain(|(name, _)| !name.eq_ignore_ascii_case(CLAIMS_SETTING));
    startup.parameters.push((CLAIMS_SETTING.to_owned(), claims.as_str().to_owned()));
    startup
}

/// What a client is told that names no endpoint.
pub fn no_endpoint(domain: Option<&str>) -> Stop {
    let domain = domain.unwrap_or("localhost");
    let hint = format!(
        "Name it in one of three ways: connect with TLS to the host <endpoint>.{domain}; add \
         options=endpoint%3D<endpoint> to the connection string; or, with TLS, write endpoint=<endpoint>; in front of \
         the password."
    );
    let error = FatalError {
        hint: Some(hint),
        ..FatalError::new("08P01", "the connection does not say which endpoint it is for")
    };
    Stop::refuse(EndReason::EndpointName, error)
}

/// What a client is told whose compute gives it no session.
pub fn wake_refusal(endpoint: &types::EndpointId, error: WakeError) -> Stop {
    tracing::warn!(%endpoint, %error, "no session");
    match error {
        WakeError::Control(error) if error.is_endpoint_not_found() => login::endpoint_not_found(endpoint),
        WakeError::Open(OpenError::Refused { response, .. }) => {
            Stop { reason: EndReason::ComputeRefused, response: Some(response) }
        }
        other @ (WakeError::Control(_) | WakeError::Open(_) | WakeError::Timeout) => {
            let message = format!("endpoint \"{endpoint}\" is not available: {other}");
            Stop::refuse(EndReason::WakeFailed, FatalError::new("57P03", message))
        }
    }
}

/// Tells the client why its session ends, and waits a moment until it has read that: a close with unread input would
/// reset the connection and could throw the message away.
async fn farewell(mut stream: ClientStream, stop: Stop) -> EndReason {
    if let Some(response) = stop.response {
        let say = async {
            stream.write_all(&response).await?;
            stream.shutdown().await?;
            let mut ignored = [0; 512];
            while stream.read(&mut ignored).await? > 0 {}
            io::Result::Ok(())
        };
        // The client may be gone or slow: nothing more is owed to it.
        let _ = timeout(FAREWELL_TIMEOUT, say).await;
    }
    stop.reason
}

#[cfg(test)]
mod tests {
    /// The task of a session has room for all that it ever does, to its end: there are ten thousand idle ones.
    #[test]
    fn a_session_takes_little_room() {
        fn bytes<A, B, C, F>(_: fn(A, B, C) -> F) -> usize {
            size_of::<F>()
        }
        let bytes = bytes(super::serve);
        assert!(bytes <= 3 * 1024, "{bytes} bytes");
    }
}
