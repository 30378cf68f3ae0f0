//! A client of the REST API.

use std::{path::Path, time::Duration};

use anyhow::{Context, bail};
use control_plane::{config::api_url_path, keys::KeyPaths};
use control_plane_api::internal::ApiError;
use reqwest::{Method, header};
use serde::{Serialize, de::DeserializeOwned};

use super::Connection;
use crate::paths;

/// Longer than the server's own limit.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(250);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Calls below `/api/v2`.
pub struct Api {
    base: String,
    key: String,
    http: reqwest::Client,
}

impl Api {
    /// By flags, environment or the files of a data directory on this machine.
    pub fn new(connection: &Connection) -> anyhow::Result<Api> {
        let data_dir = connection.data_dir.clone().unwrap_or_else(paths::default_data_dir);
        let url = match &connection.api_url {
            Some(url) => url.clone(),
            None => read(&api_url_path(&data_dir))
                .context("where is the API? Start `dormouse up`, or give --api-url or --data-dir")?,
        };
        let key = match &connection.api_key {
            Some(key) => key.clone(),
            None => read(&KeyPaths::new(&data_dir).admin)
                .context("no API key: give --api-key (or DORMOUSE_API_KEY) or --data-dir")?,
        };
        let url = url.trim().trim_end_matches('/');
        let base = if url.ends_with("/api/v2") { url.to_owned() } else { format!("{url}/api/v2") };
        let http = reqwest::Client::builder().timeout(REQUEST_TIMEOUT).connect_timeout(CONNECT_TIMEOUT).build()?;
        Ok(Api { base, key: key.trim().to_owned(), http })
    }

    /// Reads.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::GET, path, None::<&()>).await
    }

    /// Makes, or does.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// Changes.
    pub async fn patch<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        self.call(Method::PATCH, path, Some(body)).await
    }

    /// Deletes.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::DELETE, path, None::<&()>).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> anyhow::Result<T> {
        let url = format!("{}{path}", self.base);
        let mut request = self.http.request(method, &url).header(header::AUTHORIZATION, format!("Bearer {}", self.key));
        if let Some(body) = body {
            request = request.header(header::CONTENT_TYPE, "application/json").body(serde_json::to_vec(body)?);
        }
        let response = request.send().await.map_err(|error| {
            let hint = if error.is_connect() { "; is `dormouse up` running?" } else { "" };
            anyhow::anyhow!("no answer from the API at {}{hint} ({})", self.base, root_cause(&error))
        })?;
        let status = response.status();
        let text = response.bytes().await.context("reading the API's answer")?;
        if !status.is_success() {
            match serde_json::from_slice::<ApiError>(&text) {
                Ok(error) => bail!("{}", error.message),
                Err(_) => bail!("the API answered {status}"),
            }
        }
        serde_json::from_slice(&text).with_context(|| format!("the answer of {url} is not what was expected"))
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}
