//! SQL over HTTP, as a function without a driver would send it.

use std::time::Duration;

use anyhow::{Context, ensure};
use reqwest::{
    Client, StatusCode, Url,
    header::{HeaderMap, HeaderValue},
};
use serde_json::{Value, json};

use crate::{Cluster, Project};

/// Sends queries of one project.
pub struct HttpSql {
    client: Client,
    url: Url,
    connection: HeaderValue,
}

/// One answer.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Value,
}

impl HttpSql {
    /// A client that keeps its connections to the proxy, and verifies its certificate.
    pub fn new(cluster: &Cluster, project: &Project) -> anyhow::Result<HttpSql> {
        Self::build(cluster, project, usize::MAX)
    }

    /// A client that makes a connection for each request, as a function that has just been started.
    pub fn one_shot(cluster: &Cluster, project: &Project) -> anyhow::Result<HttpSql> {
        Self::build(cluster, project, 0)
    }

    fn build(cluster: &Cluster, project: &Project, kept: usize) -> anyhow::Result<HttpSql> {
        let path = cluster.ca_file();
        let ca = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let client = Client::builder()
            .tls_certs_only([reqwest::Certificate::from_pem(&ca)?])
            .no_proxy()
            // As the driver's own requests from Node.js: its `fetch` does not offer HTTP/2.
            .http1_only()
            .pool_max_idle_per_host(kept)
            .timeout(Duration::from_secs(120))
            .build()?;
        let url = format!("https://localhost:{}/sql", cluster.http_port()).parse()?;
        Ok(HttpSql { client, url, connection: project.uri.parse()? })
    }

    /// Sends a body with further headers.
    pub async fn send(&self, headers: &[(&str, &str)], body: &Value) -> anyhow::Result<Answer> {
        let mut request = self.client.post(self.url.clone()).header("Neon-Connection-String", self.connection.clone());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.body(body.to_string()).send().await?;
        let (status, headers) = (response.status(), response.headers().clone());
        Ok(Answer { status, headers, body: response.json().await? })
    }

    /// The rows of one query, which must succeed.
    pub async fn rows(&self, text: &str, params: Value) -> anyhow::Result<Value> {
        let Answer { status, mut body, .. } = self.send(&[], &json!({"query": text, "params": params})).await?;
        ensure!(status.is_success(), "{text}: {status} {body}");
        Ok(body["rows"].take())
    }
}
