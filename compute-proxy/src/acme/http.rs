//! How the ACME client reaches its server: the HTTP client that the rest of the proxy uses, within limits.

use std::{path::Path, pin::Pin, time::Duration};

use axum::{
    body::{Body, to_bytes},
    http::{Request, Response},
};
use bytes::{Bytes, BytesMut};
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};

use super::AcmeError;
use crate::tls::files::file_error;

/// How long one request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes that a request or an answer may have. Chains of certificates are the longest.
const BODY_MAX_BYTES: usize = 1024 * 1024;

/// An HTTP client for an ACME server.
#[derive(Clone)]
pub struct AcmeHttp(reqwest::Client);

impl AcmeHttp {
    /// For a server whose certificate is from the authority in `ca`; from one that the system trusts without it.
    pub fn new(ca: Option<&Path>) -> Result<Self, AcmeError> {
        let mut builder = reqwest::Client::builder().https_only(true).timeout(REQUEST_TIMEOUT);
        if let Some(path) = ca {
            let pem = std::fs::read(path).map_err(file_error(path))?;
            builder = builder.tls_certs_only(reqwest::Certificate::from_pem_bundle(&pem)?);
        }
        Ok(Self(builder.build()?))
    }

    async fn send(self, request: Request<BodyWrapper<Bytes>>) -> Result<BytesResponse, Error> {
        let other = |error: reqwest::Error| Error::Other(Box::new(error));
        let (head, body) = request.into_parts();
        let body = to_bytes(Body::new(body), BODY_MAX_BYTES).await.map_err(|error| Error::Other(Box::new(error)))?;
        let request = self.0.request(head.method, head.uri.to_string()).headers(head.headers).body(body);
        let mut answer = request.send().await.map_err(other)?;
        let mut response = Response::builder().status(answer.status());
        if let Some(headers) = response.headers_mut() {
            *headers = std::mem::take(answer.headers_mut());
        }
        let mut bytes = BytesMut::new();
        while let Some(chunk) = answer.chunk().await.map_err(other)? {
            if bytes.len() + chunk.len() > BODY_MAX_BYTES {
                return Err(Error::Str("an answer of less than a megabyte"));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(BytesResponse::from(response.body(Body::from(bytes.freeze()))?))
    }
}

impl HttpClient for AcmeHttp {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        Box::pin(self.clone().send(request))
    }
}
