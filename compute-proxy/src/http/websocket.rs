//! `/v2`: Postgres's protocol in a WebSocket's binary frames, which need not begin or end where its messages do.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use url::form_urlencoded;

use super::{error::SqlError, request::bearer, routes::Context, tunnel::Tunnel};
use crate::session::{self, Arrival};

/// `?address=<host>:<port>`: the address that the client means, where the WebSocket's own says nothing of it. This is how
/// the driver's users write `wsProxy`.
const ADDRESS: &str = "address";

/// What a connection does once it speaks HTTP no more.
#[derive(Clone, Default)]
pub struct Upgraded(Arc<Mutex<Option<BoxFuture<'static, ()>>>>);

impl Upgraded {
    /// Serves the session that was begun, if one was.
    pub async fn serve(&self) {
        let session = self.0.lock().take();
        if let Some(session) = session {
            session.await;
        }
    }
}

/// Begins a session.
pub fn upgrade(Context { shared, visitor, upgraded, .. }: &Context, mut request: Request) -> Response {
    let response = match create_response_with_body(&request, Body::empty) {
        Ok(response) => response,
        Err(error) => return no_handshake(&error.to_string()),
    };
    let token = match token(request.headers()) {
        Ok(token) => token,
        Err(error) => return error.into_response(),
    };
    let mut parameters = form_urlencoded::parse(request.uri().query().unwrap_or("").as_bytes());
    let address = parameters.find(|(name, _)| name == ADDRESS).map(|(_, address)| address);
    let own = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
    let host = address.as_deref().or(own).map(|address| without_port(address).to_owned());
    let arrival = Arrival { host, encrypted: visitor.encrypted, end_point: None, sends_password: true, token };
    let stream = hyper::upgrade::on(&mut request);
    let (shared, peer) = (shared.clone(), visitor.peer);
    *upgraded.0.lock() = Some(Box::pin(async move {
        match stream.await {
            Ok(stream) => {
                let tunnel = Tunnel::new(TokioIo::new(stream)).await;
                session::serve_inside(shared, Box::new(tunnel), arrival, peer).await;
            }
            Err(error) => tracing::debug!(%peer, %error, "no WebSocket"),
        }
    }));
    response
}

fn token(headers: &HeaderMap) -> Result<Option<String>, SqlError> {
    Ok(bearer(headers)?.map(str::to_owned))
}

fn no_handshake(why: &str) -> Response {
    let error = SqlError::new("08P01", format!("/v2 is a WebSocket: {why}")).with_status(StatusCode::UPGRADE_REQUIRED);
    let upgrade = [
        (header::UPGRADE, HeaderValue::from_static("websocket")),
        (header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13")),
    ];
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
