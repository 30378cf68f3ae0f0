//! A small client of the REST API, as a user's script would have it.

use std::time::Duration;

use anyhow::{Context, bail};
use reqwest::Method;
use serde_json::{Value, json};

/// The API of one installation.
#[derive(Clone)]
pub struct Api {
    url: String,
    key: String,
    client: reqwest::Client,
}

/// A project as its creation answered it.
#[derive(Debug, Clone)]
pub struct Project {
    /// Its id.
    pub id: String,
    /// Its first branch.
    pub branch: String,
    /// That branch's endpoint.
    pub endpoint: String,
    /// How to reach it.
    pub uri: String,
}

/// A branch with an endpoint.
#[derive(Debug, Clone)]
pub struct Branch {
    /// Its id.
    pub id: String,
    /// Its endpoint.
    pub endpoint: String,
    /// How to reach it.
    pub uri: String,
}

impl Api {
    /// With an API key.
    pub fn new(url: String, key: String) -> Api {
        Api { url, key, client: reqwest::Client::new() }
    }

    /// One call: status and JSON (null when the body is empty).
    pub async fn call(&self, method: Method, path: &str, body: Option<Value>) -> anyhow::Result<(u16, Value)> {
        let url = format!("{}/api/v2{path}", self.url);
        let mut request = self.client.request(method, &url).bearer_auth(&self.key).timeout(Duration::from_secs(120));
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.with_context(|| url.clone())?;
        let status = response.status().as_u16();
        let text = response.text().await?;
        let json =
            if text.is_empty() { Value::Null } else { serde_json::from_str(&text).with_context(|| text.clone())? };
        Ok((status, json))
    }

    /// One call that must succeed.
    pub async fn ok(&self, method: Method, path: &str, body: Option<Value>) -> anyhow::Result<Value> {
        let (status, json) = self.call(method.clone(), path, body).await?;
        if !(200..300).contains(&status) {
            bail!("{method} {path}: {status} {json}");
        }
        Ok(json)
    }

    /// `POST /projects`.
    pub async fn create_project(&self, name: &str) -> anyhow::Result<Project> {
        let made = self.ok(Method::POST, "/projects", Some(json!({"project": {"name": name}}))).await?;
        Ok(Project {
            id: text(&made, "/project/id")?,
            branch: text(&made, "/branch/id")?,
            endpoint: text(&made, "/endpoints/0/id")?,
            uri: text(&made, "/connection_uris/0/connection_uri")?,
        })
    }

    /// `POST /projects/{id}/branches` with an endpoint; `branch` holds `name`, `parent_lsn` and so on.
    pub async fn create_branch(&self, project: &str, branch: Value) -> anyhow::Result<Branch> {
        let body = json!({"branch": branch, "endpoints": [{"type": "read_write"}]});
        let made = self.ok(Method::POST, &format!("/projects/{project}/branches"), Some(body)).await?;
        let (id, endpoint) = (text(&made, "/branch/id")?, text(&made, "/endpoints/0/id")?);
        let uri = self.connection_uri(project, &id).await?;
        Ok(Branch { id, endpoint, uri })
    }

    /// `GET /projects/{id}/connection_uri` for the branch's first database and its owner.
    pub async fn connection_uri(&self, project: &str, branch: &str) -> anyhow::Result<String> {
        let databases = self.ok(Method::GET, &format!("/projects/{project}/branches/{branch}/databases"), None).await?;
        let database = text(&databases, "/databases/0/name")?;
        let role = text(&databases, "/databases/0/owner_name")?;
        let path =
            format!("/projects/{project}/connection_uri?branch_id={branch}&database_name={database}&role_name={role}");
        text(&self.ok(Method::GET, &path, None).await?, "/uri")
    }

    /// Makes a project whose compute runs with these settings and does not fall asleep by itself; it is asleep now.
    pub async fn create_project_with(&self, name: &str, settings: &[(&str, &str)]) -> anyhow::Result<Project> {
        let project = self.create_project(name).await?;
        let path = format!("/projects/{}/endpoints/{}", project.id, project.endpoint);
        let settings: serde_json::Map<_, _> =
            settings.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        let body = json!({"endpoint": {"suspend_timeout_seconds": 604_800, "settings": {"pg_settings": settings}}});
        self.wait_state(&project.id, &project.endpoint, "active", Duration::from_secs(60)).await?;
        self.ok(Method::PATCH, &path, Some(body)).await?;
        self.suspend(&project.id, &project.endpoint).await?;
        Ok(project)
    }

    /// Puts an endpoint to sleep and waits until it is.
    pub async fn suspend(&self, project: &str, endpoint: &str) -> anyhow::Result<()> {
        self.ok(Method::POST, &format!("/projects/{project}/endpoints/{endpoint}/suspend"), None).await?;
        self.wait_state(project, endpoint, "idle", Duration::from_secs(60)).await
    }

    /// The endpoint's `current_state`.
    pub async fn state(&self, project: &str, endpoint: &str) -> anyhow::Result<String> {
        let got = self.ok(Method::GET, &format!("/projects/{project}/endpoints/{endpoint}"), None).await?;
        text(&got, "/endpoint/current_state")
    }

    /// Waits until the endpoint's `current_state` is `wanted`.
    pub async fn wait_state(&self, project: &str, endpoint: &str, wanted: &str, limit: Duration) -> anyhow::Result<()> {
        let deadline = std::time::Instant::now() + limit;
        loop {
            let state = self.state(project, endpoint).await?;
            if state == wanted {
                return Ok(());
            }
            if std::time::Instant::now() > deadline {
                bail!("endpoint {endpoint} is {state} after {limit:?}, not {wanted}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// The string at a JSON pointer.
pub fn text(json: &Value, pointer: &str) -> anyhow::Result<String> {
    let found = json.pointer(pointer).and_then(Value::as_str);
    found.map(str::to_owned).with_context(|| format!("no text at {pointer} in {json}"))
}
