//! `/v2`: Postgres's protocol in a WebSocket's binary frames, which need not begin or end where its messages do. In HTTP/1.1 it takes
//! the connection over; in HTTP/2 it is one of the connection's streams (RFC 8441).

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, StatusCode, Version, header},
    response::{IntoResponse, Response},
};
use futures::future::BoxFuture;
use hyper::ext::Protocol;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use tokio_util::task::TaskTracker;
use url::form_urlencoded;

use super::{error::SqlError, request::bearer, routes::Context, tunnel::Tunnel};
use crate::session::{self, Arrival};

/// `?address=<host>:<port>`: the address that the client means, where the WebSocket's own says nothing of it. This is how
/// the driver's users write `wsProxy`.
const ADDRESS: &str = "address";

/// The only version of WebSockets (RFC 6455, 4.1).
const WEBSOCKET_VERSION: HeaderValue = HeaderValue::from_static("13");

/// The sessions in a connection's WebSockets.
pub enum Upgraded {
    /// One, when the connection speaks HTTP no more.
    Afterwards(Mutex<Option<BoxFuture<'static, ()>>>),
    /// Some, while it goes on.
    Beside(TaskTracker),
}

impl Upgraded {
    /// For HTTP/1.1.
    pub fn afterwards() -> Self {
        Self::Afterwards(Mutex::default())
    }

    /// For HTTP/2.
    pub fn beside() -> Self {
        Self::Beside(TaskTracker::new())
    }

    fn begin(&self, session: impl Future<Output = ()> + Send + 'static) {
        match self {
            Self::Afterwards(one) => *one.lock() = Some(Box::pin(session)),
            Self::Beside(tasks) => {
                tasks.spawn(session);
            }
        }
    }

    /// Serves the session that was begun, if one was, or waits until all have ended.
    pub async fn serve(&self) {
        match self {
            Self::Afterwards(one) => {
                let session = one.lock().take();
                if let Some(session) = session {
                    session.await;
                }
            }
            Self::Beside(tasks) => {
                tasks.close();
                tasks.wait().await;
            }
        }
    }
}

/// Begins a session.
pub fn upgrade(Context { shared, visitor, upgraded, activity, .. }: &Context, mut request: Request) -> Response {
    let response = match accept(&request) {
        Ok(response) => response,
        Err(why) => return no_handshake(&why),
    };
    let token = match token(request.headers()) {
        Ok(token) => token,
        Err(error) => return error.into_response(),
    };
    let Some(leave) = shared.tunnel_slot() else {
        let error = SqlError::new("53300", "sorry, too many clients already");
        return error.with_status(StatusCode::SERVICE_UNAVAILABLE).into_response();
    };
    let mut parameters = form_urlencoded::parse(request.uri().query().unwrap_or("").as_bytes());
    let address = parameters.find(|(name, _)| name == ADDRESS).map(|(_, address)| address);
    let named = || request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let own = request.uri().authority().map(|authority| authority.as_str()).or_else(named);
    let host = address.as_deref().or(own).map(|address| without_port(address).to_owned());
    let arrival = Arrival { host, encrypted: visitor.encrypted, end_point: None, sends_password: true, token };
    let stream = hyper::upgrade::on(&mut request);
    let (shared, peer, open) = (shared.clone(), visitor.peer, activity.begin());
    upgraded.begin(async move {
        match stream.await {
            Ok(stream) => {
                let tunnel = Tunnel::new(TokioIo::new(stream)).await;
                session::serve_inside(shared, Box::new(tunnel), arrival, peer).await;
            }
            Err(error) => tracing::debug!(%peer, %error, "no WebSocket"),
        }
        drop((open, leave));
    });
    response
}

/// The answer that a WebSocket begins with, or what the request lacks.
fn accept(request: &Request) -> Result<Response, String> {
    if request.version() != Version::HTTP_2 {
        return create_response_with_body(request, Body::empty).map_err(|error| error.to_string());
    }
    if request.extensions().get::<Protocol>().is_none_or(|protocol| protocol.as_str() != "websocket") {
        return Err("its :protocol is websocket".to_owned());
    }
    if request.headers().get(header::SEC_WEBSOCKET_VERSION) != Some(&WEBSOCKET_VERSION) {
        return Err("its version is 13".to_owned());
    }
    Ok(Response::new(Body::empty()))
}

fn token(headers: &HeaderMap) -> Result<Option<String>, SqlError> {
    Ok(bearer(headers)?.map(str::to_owned))
}

fn no_handshake(why: &str) -> Response {
    let error = SqlError::new("08P01", format!("/v2 is a WebSocket: {why}")).with_status(StatusCode::UPGRADE_REQUIRED);
    let upgrade =
        [(header::UPGRADE, HeaderValue::from_static("websocket")), (header::SEC_WEBSOCKET_VERSION, WEBSOCKET_VERSION)];
    (upgrade, error).into_response()
}

fn without_port(address: &str) -> &str {
    match address.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !host.ends_with(':') => host,
        _ => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_loses_its_port() {
        for (address, host) in [
            ("ep-a.localhost:5432", "ep-a.localhost"),
            ("ep-a.localhost", "ep-a.localhost"),
            ("127.0.0.1:80", "127.0.0.1"),
            ("[::1]:80", "[::1]"),
            ("::1", "::1"),
            ("", ""),
        ] {
            assert_eq!(without_port(address), host, "{address}");
        }
    }
}
