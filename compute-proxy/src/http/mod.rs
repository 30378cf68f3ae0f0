//! SQL for clients without TCP: over HTTP (`POST /sql`), and Postgres's protocol in a WebSocket (`/v2`), as the
//! `@neondatabase/serverless` driver speaks them.
//!
//! A connection's TLS ends here. Then [`routes`] takes its requests; a client that named Postgres's own protocol in TLS is
//! passed on to `session`.

mod activity;
mod again;
mod answer;
mod budget;
mod cache;
mod cache_policy;
mod cached;
mod connection_string;
mod error;
mod last_login;
mod merged;
mod parameter;
mod repeated;
mod request;
mod routes;
mod serving;
mod sql;
mod stability;
mod tunnel;
mod value;
mod websocket;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};

pub use self::{budget::Budget, cache::AnswerCache, repeated::Repeated};
use crate::{
    end::EndReason,
    handshake::TLS_HANDSHAKE_BYTE,
    server::{ByteStream, Shared},
    session::{self, Arrival},
    tls::Protocol,
};

/// How long a client that was refused may take to read why.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

/// For who speaks plain HTTP where that is not allowed.
const HTTPS_ONLY: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 49\r\n\
    Connection: close\r\n\r\nThis port speaks HTTPS. Use https:// and wss://.\n";

/// Serves one connection to the port for HTTP.
pub async fn serve(shared: Arc<Shared>, tcp: TcpStream, peer: SocketAddr) {
    let deadline = Instant::now() + shared.config.handshake_timeout;
    let opened = tokio::select! {
        () = shared.draining.cancelled() => return,
        opened = timeout_at(deadline, open(&shared, tcp, peer)) => opened.unwrap_or(Err(EndReason::HandshakeTimeout)),
    };
    match opened {
        Ok(Opened::Http1(stream, visitor)) => serving::version_1(shared, stream, visitor).await,
        Ok(Opened::Http2(stream, visitor)) => serving::version_2(shared, stream, visitor).await,
        Ok(Opened::Postgres(stream, arrival, peer)) => session::serve_inside(shared, stream, arrival, peer).await,
        Err(reason) => tracing::debug!(%peer, %reason, "connection ended"),
    }
}

/// Who sends requests over a connection.
#[derive(Debug, Clone)]
struct Visitor {
    /// The client's address; where a load balancer told it, that.
    peer: SocketAddr,
    /// It came with TLS.
    encrypted: bool,
}

enum Opened {
    Http1(Box<dyn ByteStream>, Visitor),
    Http2(Box<dyn ByteStream>, Visitor),
    Postgres(Box<dyn ByteStream>, Arrival, SocketAddr),
}

/// Settles encryption.
async fn open(shared: &Shared, mut tcp: TcpStream, peer: SocketAddr) -> Result<Opened, EndReason> {
    let peer = session::real_peer(shared, &mut tcp, peer).await?;
    let mut first_byte = [0; 1];
    if tcp.peek(&mut first_byte).await.map_err(|_| EndReason::LeftBeforeLogin)? == 0 {
        return Err(EndReason::LeftBeforeLogin);
    }
    if first_byte[0] == TLS_HANDSHAKE_BYTE {
        let (stream, info) = shared.tls.accept_http(tcp).await.map_err(|error| {
            tracing::debug!(%error, "TLS handshake failed");
            EndReason::Tls
        })?;
        let visitor = Visitor { peer, encrypted: true };
        return Ok(match info.protocol {
            Protocol::Postgres => Opened::Postgres(stream, Arrival::inside_tls(info), peer),
            Protocol::Http2 => Opened::Http2(stream, visitor),
            Protocol::Unnamed => Opened::Http1(stream, visitor),
        });
    }
    if shared.config.allow_cleartext {
        return Ok(Opened::Http1(Box::new(tcp), Visitor { peer, encrypted: false }));
    }
    // The client may be gone or slow: nothing more is owed to it.
    let _ = timeout(FAREWELL_TIMEOUT, refuse_plain(tcp)).await;
    Err(EndReason::Tls)
}

/// Says why, and waits until that was read: a close with unread input could throw it away.
async fn refuse_plain(mut tcp: TcpStream) -> std::io::Result<()> {
    tcp.write_all(HTTPS_ONLY).await?;
    tcp.shutdown().await?;
    tokio::io::copy(&mut tcp, &mut tokio::io::sink()).await.map(|_| ())
}
