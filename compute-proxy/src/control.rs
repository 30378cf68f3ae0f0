//! Calls to the control plane's internal API.

use std::{sync::Arc, time::Duration};

use control_plane_api::internal::{ApiError, ENDPOINT_NOT_FOUND, RoleAuth, Wake};
use reqwest::{Client, Method, Response, StatusCode, Url};
use serde::de::DeserializeOwned;
use types::EndpointId;

/// Bytes that an answer may have: a verifier, and lists of bounded length.
const ANSWER_MAX_BYTES: usize = 256 * 1024;

/// How long a question about a role may take.
const ROLE_TIMEOUT: Duration = Duration::from_secs(5);

/// The control plane.
#[derive(Clone)]
pub struct ControlPlane {
    client: Client,
    base: Url,
    token: Arc<str>,
    wake_timeout: Duration,
}

impl ControlPlane {
    /// A client for the control plane at `base`; connects when first used.
    pub fn new(base: Url, token: &str, wake_timeout: Duration) -> reqwest::Result<Self> {
        // The control plane is a peer, never behind a proxy that the environment names.
        let client = Client::builder().no_proxy().connect_timeout(ROLE_TIMEOUT).build()?;
        Ok(Self { client, base, token: token.into(), wake_timeout })
    }

    /// What is needed to check a login.
    pub async fn role_auth(&self, endpoint: &EndpointId, role: &str) -> Result<RoleAuth, ControlError> {
        let path = ["internal", "v1", "endpoints", endpoint.as_str(), "roles", role];
        self.call(Method::GET, &path, ROLE_TIMEOUT).await
    }

    /// Wakes an endpoint; answers when it takes connections.
    pub async fn wake(&self, endpoint: &EndpointId) -> Result<Wake, ControlError> {
        let path = ["internal", "v1", "endpoints", endpoint.as_str(), "wake"];
        self.call(Method::POST, &path, self.wake_timeout).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        timeout: Duration,
    ) -> Result<T, ControlError> {
        let mut url = self.base.clone();
        // Segments are escaped: a role may hold any character.
        url.path_segments_mut().map_err(|()| ControlError::Url)?.pop_if_empty().extend(path);
        let request = self.client.request(method, url).bearer_auth(&self.token).timeout(timeout);
        let response = request.send().await.map_err(ControlError::unreachable)?;
        let status = response.status();
        let body = bounded_body(response).await?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|error| ControlError::Answer(error.to_string()));
        }
        let error = serde_json::from_slice(&body).unwrap_or_else(|_| ApiError {
            code: String::new(),
            message: format!("the control plane answered with status {status}"),
        });
        Err(ControlError::Refused { status, error })
    }
}

async fn bounded_body(mut response: Response) -> Result<Vec<u8>, ControlError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(ControlError::unreachable)? {
        if body.len() + chunk.len() > ANSWER_MAX_BYTES {
            return Err(ControlError::Answer("it is too long".to_owned()));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ControlError {
    /// No answer.
    #[error("the control plane cannot be reached: {0}")]
    Unreachable(Arc<reqwest::Error>),
    /// An answer that makes no sense.
    #[error("the control plane's answer cannot be read: {0}")]
    Answer(String),
    /// The control plane said no.
    #[error("{error}")]
    Refused {
        /// HTTP status.
        status: StatusCode,
        /// Its words.
        error: ApiError,
    },
    /// The configured URL can't be a base.
    #[error("the URL of the control plane is no http URL")]
    Url,
    /// The call ended without an answer.
    #[error("the call of the control plane was given up")]
    GivenUp,
}

impl ControlError {
    fn unreachable(error: reqwest::Error) -> Self {
        Self::Unreachable(Arc::new(error.without_url()))
    }

    /// True for a 404.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { status: StatusCode::NOT_FOUND, .. })
    }

    /// True when it is the endpoint that does not exist.
    pub fn is_endpoint_not_found(&self) -> bool {
        matches!(self, Self::Refused { status: StatusCode::NOT_FOUND, error }
            if error.code.eq_ignore_ascii_case(ENDPOINT_NOT_FOUND))
    }

    /// True when the control plane is down or in trouble, false when it has decided.
    pub fn is_outage(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Answer(_) | Self::GivenUp => true,
            Self::Refused { status, .. } => status.is_server_error(),
            Self::Url => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_told_apart() {
        let refused = |status, code: &str| ControlError::Refused {
            status,
            error: ApiError { code: code.to_owned(), message: String::new() },
        };
        assert!(refused(StatusCode::NOT_FOUND, "ENDPOINT_NOT_FOUND").is_endpoint_not_found());
        assert!(!refused(StatusCode::NOT_FOUND, "").is_endpoint_not_found());
        assert!(refused(StatusCode::NOT_FOUND, "").is_not_found());
        assert!(refused(StatusCode::BAD_GATEWAY, "").is_outage());
        assert!(!refused(StatusCode::UNAUTHORIZED, "").is_outage());
    }
}
