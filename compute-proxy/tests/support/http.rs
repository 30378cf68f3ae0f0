//! Requests to `/sql`.

use reqwest::{Client, StatusCode};
use serde_json::{Value, json};

use super::{PASSWORD, World};

/// A client of the proxy that trusts its certificate.
pub struct Http<'a> {
    world: &'a World,
    pub client: Client,
}

impl<'a> Http<'a> {
    pub fn new(world: &'a World) -> Self {
        Self { world, client: world.http_client() }
    }

    pub fn url(&self, path: &str) -> String {
        format!("https://localhost:{}{path}", self.world.http_address.port())
    }

    pub async fn send(
        &self,
        connection: &str,
        headers: &[(&str, &str)],
        body: impl Into<reqwest::Body>,
    ) -> (StatusCode, Value) {
        let mut request = self.client.post(self.url("/sql")).header("Neon-Connection-String", connection).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.expect("an answer");
        assert_eq!(response.headers()["access-control-allow-origin"], "*");
        (response.status(), response.json().await.expect("JSON"))
    }

    pub async fn raw(&self, body: impl Into<reqwest::Body>) -> (StatusCode, Value) {
        self.send(&connection("alice"), &[], body).await
    }

    pub async fn ok(&self, body: Value) -> Value {
        let (status, answer) = self.raw(body.to_string()).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    }

    pub async fn query(&self, text: &str, params: Value) -> Value {
        self.ok(json!({"query": text, "params": params})).await
    }

    /// The code of the error.
    pub async fn code(&self, body: impl Into<reqwest::Body>) -> String {
        let (status, answer) = self.raw(body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        answer["code"].as_str().expect("a code").to_owned()
    }

    pub async fn error(&self, text: &str) -> String {
        self.code(json!({"query": text}).to_string()).await
    }

    /// One value of one row.
    pub async fn value(&self, text: &str) -> Value {
        let answer = self.query(text, json!([])).await;
        answer["rows"][0].as_object().and_then(|row| row.values().next().cloned()).unwrap_or_default()
    }
}

/// A connection string of a role.
pub fn connection(role: &str) -> String {
    format!("postgresql://{role}:{}@ep-a.localhost/postgres", PASSWORD.replace('$', "%24"))
}
