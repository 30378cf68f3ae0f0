//! The control plane's internal API, as far as a proxy sees it.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{Path as UrlPath, Request, State},
    http::{StatusCode, header::AUTHORIZATION},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use control_plane_api::internal::{ApiError, ENDPOINT_NOT_FOUND, QueryCache, RoleAuth, TokenIssuer, Wake};
use ipnet::IpNet;
use parking_lot::Mutex;
use postgres_protocol::password::scram_sha_256;
use tokio::net::TcpListener;
use types::{BranchId, BranchRef, EndpointId, ProjectId};

/// What the proxy must present.
pub const TOKEN: &str = "a-service-token";

pub struct FakeControlPlane {
    pub url: String,
    state: Arc<ControlState>,
}

pub struct ControlState {
    endpoints: HashMap<String, Arc<FakeEndpoint>>,
    /// While set, no request gets an answer.
    hangs: AtomicBool,
    /// While set, all requests fail.
    fails: AtomicBool,
}

pub struct FakeEndpoint {
    id: EndpointId,
    pub wakes: AtomicUsize,
    pub role_lookups: AtomicUsize,
    pub wake_delay: Mutex<Duration>,
    /// Sockets to answer before the real one.
    pub dead_sockets: Mutex<Vec<PathBuf>>,
    pub enabled: AtomicBool,
    pub verifiers: Mutex<HashMap<String, Option<String>>>,
    pub query_cache: Mutex<QueryCache>,
    /// By role.
    pub token_issuers: Mutex<HashMap<String, Vec<TokenIssuer>>>,
    pub allowed_ips: Mutex<Vec<IpNet>>,
    socket: PathBuf,
}

impl FakeControlPlane {
    /// Serves endpoints `ep-a` and `ep-b`; `alice`, `carol` and `dave` (a superuser) have a password, `bob` none.
    pub async fn start(socket: &Path) -> Self {
        let endpoints = ["ep-a", "ep-b"].map(|id| (id.to_owned(), Arc::new(FakeEndpoint::new(id, socket))));
        let endpoints = HashMap::from(endpoints);
        let state = Arc::new(ControlState { endpoints, hangs: false.into(), fails: false.into() });
        let router = Router::new()
            .route("/internal/v1/endpoints/{endpoint}/roles/{role}", get(role_auth))
            .route("/internal/v1/endpoints/{endpoint}/wake", post(wake))
            .layer(middleware::from_fn_with_state(state.clone(), guard))
            .with_state(state.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let url = format!("http://{}", listener.local_addr().expect("address"));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { url, state }
    }

    pub fn endpoint(&self, id: &str) -> Arc<FakeEndpoint> {
        self.state.endpoints[id].clone()
    }

    pub fn wakes(&self) -> usize {
        self.state.endpoints.values().map(|endpoint| endpoint.wakes.load(Ordering::SeqCst)).sum()
    }

    pub fn hang(&self, hangs: bool) {
        self.state.hangs.store(hangs, Ordering::SeqCst);
    }

    pub fn fail(&self, fails: bool) {
        self.state.fails.store(fails, Ordering::SeqCst);
    }
}

impl FakeEndpoint {
    fn new(id: &str, socket: &Path) -> Self {
        let verifiers = HashMap::from([
            ("alice".to_owned(), Some(scram_sha_256(super::PASSWORD.as_bytes()))),
            ("carol".to_owned(), Some(scram_sha_256(super::PASSWORD.as_bytes()))),
            ("dave".to_owned(), Some(scram_sha_256(super::PASSWORD.as_bytes()))),
            ("bob".to_owned(), None),
        ]);
        Self {
            id: EndpointId::new(id).expect("id"),
            wakes: 0.into(),
            role_lookups: 0.into(),
            wake_delay: Mutex::default(),
            dead_sockets: Mutex::default(),
            enabled: true.into(),
            verifiers: Mutex::new(verifiers),
            query_cache: Mutex::default(),
            token_issuers: Mutex::default(),
            allowed_ips: Mutex::default(),
            socket: socket.to_owned(),
        }
    }

    pub fn set_password(&self, role: &str, password: &str) {
        self.verifiers.lock().insert(role.to_owned(), Some(scram_sha_256(password.as_bytes())));
    }
}

async fn guard(State(state): State<Arc<ControlState>>, request: Request, next: Next) -> Response {
    let token = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    if token != Some(format!("Bearer {TOKEN}").as_str()) {
        return error(StatusCode::UNAUTHORIZED, "", "bad token");
    }
    while state.hangs.load(Ordering::SeqCst) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    if state.fails.load(Ordering::SeqCst) {
        return error(StatusCode::SERVICE_UNAVAILABLE, "", "the metadata store is down");
    }
    next.run(request).await
}

async fn role_auth(
    State(state): State<Arc<ControlState>>,
    UrlPath((endpoint, role)): UrlPath<(String, String)>,
) -> Response {
    let Some(endpoint) = state.endpoints.get(&endpoint) else { return no_endpoint() };
    endpoint.role_lookups.fetch_add(1, Ordering::SeqCst);
    let Some(scram_verifier) = endpoint.verifiers.lock().get(&role).cloned() else {
        return error(StatusCode::NOT_FOUND, "ROLE_NOT_FOUND", "role not found");
    };
    let branch =
        BranchRef { project: ProjectId::new("project").expect("id"), branch: BranchId::new("branch").expect("id") };
    let query_cache = endpoint.query_cache.lock().clone();
    let token_issuers = endpoint.token_issuers.lock().get(&role).cloned().unwrap_or_default();
    let allowed_ips = endpoint.allowed_ips.lock().clone();
    let enabled = endpoint.enabled.load(Ordering::SeqCst);
    Json(RoleAuth { branch, scram_verifier, enabled, query_cache, token_issuers, allowed_ips }).into_response()
}

async fn wake(State(state): State<Arc<ControlState>>, UrlPath(endpoint): UrlPath<String>) -> Response {
    let Some(endpoint) = state.endpoints.get(&endpoint) else { return no_endpoint() };
    endpoint.wakes.fetch_add(1, Ordering::SeqCst);
    let delay = *endpoint.wake_delay.lock();
    tokio::time::sleep(delay).await;
    let postgres_socket = endpoint.dead_sockets.lock().pop().unwrap_or_else(|| endpoint.socket.clone());
    Json(Wake { endpoint: endpoint.id.clone(), postgres_socket, cold: !delay.is_zero() }).into_response()
}

fn no_endpoint() -> Response {
    error(StatusCode::NOT_FOUND, ENDPOINT_NOT_FOUND, "endpoint not found")
}

fn error(status: StatusCode, code: &str, message: &str) -> Response {
    (status, Json(ApiError { code: code.to_owned(), message: message.to_owned() })).into_response()
}
