//! The API over real HTTP, on the real router and SQLite; storage and computes are fakes that keep count.

mod fakes;
mod proxies;
mod safekeepers;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use control_plane_api::internal::{GenerationTaken, RoleAuth, Wake};
use http_body_util::{BodyExt, Full};
use hyper::{Method, body::Bytes};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde_json::{Value, json};
use types::{BranchRef, Generation, Lsn, Member, Membership, MembershipGeneration, NodeId};
use wire::{Scope, TokenSigner, TokenVerifier, auth::TokenKeys};

use self::fakes::{FakeComputes, FakeLauncher, FakeStorage};
use crate::{
    address::ProxyAddress,
    app::App,
    compute::{ComputeSettings, Computes},
    keys,
    store::{Store, memberships},
};

const ADMIN_KEY: &str = "dormouse_test";

/// A control plane that serves on a port of its own.
struct World {
    url: String,
    storage: Arc<FakeStorage>,
    computes: Arc<FakeComputes>,
    service_token: String,
    branch_token: String,
    verifier: TokenVerifier,
    client: Client<hyper_util::client::legacy::connect::HttpConnector, Full<Bytes>>,
}

impl World {
    async fn new() -> World {
        let token_keys = TokenKeys::generate().expect("keys");
        let signer = || TokenSigner::from_pem(&token_keys.private_pem).expect("signer");
        let (storage, fakes) = (Arc::new(FakeStorage::default()), Arc::new(FakeComputes::default()));
        let store = Store::in_memory().expect("store");
        let member = |node| Member { node: NodeId(node), address: format!("sk{node}:1") };
        let safekeepers = [1, 2, 3].map(member);
        store.call(move |db| memberships::configure(db, &safekeepers)).await.expect("safekeepers");
        let settings = ComputeSettings {
            runtime_dir: "/nonexistent/run".into(),
            page_cache_dir: "/nonexistent/cache".into(),
            postgres_bin_dir: "/nonexistent/bin".into(),
            shim_path: "/nonexistent/shim.so".into(),
            postgres_user: None,
            page_cache_bytes: 1,
            kept_pages_bytes: 1,
            sleeping_caches_bytes: 0,
            wake_timeout: Duration::from_secs(1),
        };
        let launcher = Arc::new(FakeLauncher(Arc::clone(&fakes)));
        let computes = Computes::new(store.clone(), Arc::clone(&storage) as _, launcher, signer(), settings);
        let app = Arc::new(App {
            store,
            storage: Arc::clone(&storage) as _,
            computes,
            address: ProxyAddress { domain: None, host: "localhost".into(), port: 5432 },
            admin_key_hash: keys::hash(ADMIN_KEY),
            verifier: TokenVerifier::from_pem(&token_keys.public_pem).expect("verifier"),
            safekeepers_changed: Arc::default(),
            gc_slack_seconds: 0,
        });
        tokio::spawn(crate::membership::run(Arc::clone(&app)));
        tokio::spawn(crate::leftovers::run(Arc::clone(&app), Duration::from_millis(50)));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let url = format!("http://{}", listener.local_addr().expect("address"));
        tokio::spawn(async move { axum::serve(listener, super::router(app)).await });
        let branch = BranchRef { project: "p".parse().expect("id"), branch: "b".parse().expect("id") };
        let minute = Duration::from_secs(60);
        World {
            url,
            storage,
            computes: fakes,
            service_token: signer().sign(Scope::Service, minute).expect("sign"),
            branch_token: signer().sign(Scope::Branch { branch }, minute).expect("sign"),
            verifier: TokenVerifier::from_pem(&token_keys.public_pem).expect("verifier"),
            client: Client::builder(TokioExecutor::new()).build_http(),
        }
    }

    async fn request(&self, method: Method, path: &str, token: Option<&str>, body: Value) -> (u16, Value) {
        let mut request = hyper::Request::builder().method(method).uri(format!("{}{path}", self.url));
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let body = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
        let response = self.client.request(request.body(Full::new(body)).expect("request")).await.expect("answer");
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.expect("body").to_bytes();
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    async fn api(&self, method: Method, path: &str, body: Value) -> (u16, Value) {
        self.request(method, &format!("/api/v2{path}"), Some(ADMIN_KEY), body).await
    }

    async fn get(&self, path: &str) -> Value {
        let (status, body) = self.api(Method::GET, path, Value::Null).await;
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        let (status, answer) = self.api(Method::POST, path, body).await;
        assert!(status == 200 || status == 201, "{path}: {status} {answer}");
        answer
    }

    async fn wake(&self, endpoint: &str) -> (u16, Value) {
        self.request(
            Method::POST,
            &format!("/internal/v1/endpoints/{endpoint}/wake"),
            Some(&self.service_token),
            json!({}),
        )
        .await
    }

    /// A project that is awake; its answer.
    async fn project(&self) -> Value {
        let made = self.post("/projects", json!({"project": {"name": "shop", "unknown": 1}, "more": true})).await;
        let (status, _) = self.wake(text(&made["endpoints"][0]["id"])).await;
        assert_eq!(status, 200);
        made
    }
}

fn text(value: &Value) -> &str {
    value.as_str().expect("text")
}

#[tokio::test]
async fn a_project_comes_with_everything() {
    let world = World::new().await;
    let made = world.project().await;
    let id = text(&made["project"]["id"]);
    assert_eq!(made["project"]["name"], "shop");
    assert_eq!(made["branch"]["name"], "main");
    assert_eq!(made["branch"]["default"], true);
    assert_eq!(made["roles"][0]["name"], "dormouse_owner");
    assert_eq!(made["databases"][0]["name"], "dormouse");
    assert_eq!(made["endpoints"][0]["type"], "read_write");
    let password = text(&made["roles"][0]["password"]);
    let uri = text(&made["connection_uris"][0]["connection_uri"]);
    assert!(uri.contains(password) && uri.contains("options=endpoint%3Dep-"), "{uri}");
    assert_eq!(world.get(&format!("/projects/{id}/connection_uri")).await["uri"], uri);
    let pooled = world.get(&format!("/projects/{id}/connection_uri?pooled=true&role_name=dormouse_owner")).await;
    assert!(text(&pooled["uri"]).ends_with("-pooler"));

    let ancestors = world.storage.branches.lock().values().cloned().collect::<Vec<_>>();
    assert_eq!(ancestors, [(crate::storage::template(), Lsn(0x1000))]);
    let spec = world.computes.specs.lock()[0].clone();
    let catalog = spec.catalog.expect("roles are made at the first start");
    assert_eq!(catalog.databases[0].owner, "dormouse_owner");
    assert!(catalog.roles[0].scram_verifier.as_deref().expect("verifier").starts_with("SCRAM-SHA-256$"));
    let actions = world.get(&format!("/projects/{id}/operations")).await;
    let finished = |action: &str| {
        let operations = actions["operations"].as_array().expect("list");
        operations.iter().any(|o| o["action"] == action && o["status"] == "finished")
    };
    assert!(finished("create_timeline"), "{actions}");
    let operation = text(&actions["operations"][0]["id"]).to_owned();
    assert_eq!(world.get(&format!("/projects/{id}/operations/{operation}")).await["operation"]["id"], operation);

    let (status, _) = world.api(Method::DELETE, &format!("/projects/{id}"), Value::Null).await;
    assert_eq!(status, 200);
    assert!(world.storage.branches.lock().is_empty() && world.computes.alive.lock().is_empty());
    let (status, error) = world.api(Method::GET, &format!("/projects/{id}"), Value::Null).await;
    assert_eq!(status, 404);
    assert!(error["message"].as_str().is_some_and(|m| m.contains(id)) && error["code"].is_string());
}

#[tokio::test]
async fn keys_and_tokens_are_checked() {
    let world = World::new().await;
    for token in [None, Some("wrong"), Some(""), Some(world.service_token.as_str())] {
        let (status, error) = world.request(Method::GET, "/api/v2/projects", token, Value::Null).await;
        assert_eq!(status, 401, "{token:?} {error}");
    }
    let path = "/internal/v1/generations";
    for (token, expected) in [(None, 401), (Some(ADMIN_KEY), 401), (Some(world.branch_token.as_str()), 403)] {
        let (status, _) = world.request(Method::POST, path, token, taking(1)).await;
        assert_eq!(status, expected);
    }
    let (status, _) = world.request(Method::GET, "/healthz", None, Value::Null).await;
    assert_eq!(status, 200);
    let mut last = Generation(0);
    for _ in 0..3 {
        let token = Some(world.service_token.as_str());
        let (_, taken) = world.request(Method::POST, path, token, taking(1)).await;
        let taken: GenerationTaken = serde_json::from_value(taken).expect("generation");
        assert!(taken.generation > last);
        last = taken.generation;
    }
}

#[tokio::test]
async fn bad_requests_are_refused() {
    let world = World::new().await;
    let made = world.project().await;
    let base = format!("/projects/{}", text(&made["project"]["id"]));
    let branches = format!("{base}/branches");
    let main = text(&made["branch"]["id"]).to_owned();
    for (path, body, expected) in [
        ("/projects".to_owned(), json!({"project": {"pg_version": 9}}), 400),
        ("/projects".to_owned(), json!({"project": {"name": ""}}), 400),
        ("/projects".to_owned(), json!({"project": {"branch": {"role_name": "pg_x"}}}), 400),
        ("/projects".to_owned(), json!([1]), 400),
        (branches.clone(), json!({"branch": {"parent_id": "br-none"}}), 404),
        (branches.clone(), json!({"branch": {"parent_id": "../x"}}), 400),
        (branches.clone(), json!({"branch": {"name": "main"}}), 409),
        (branches.clone(), json!({"branch": {"parent_lsn": "0/F0000000"}}), 400),
        (branches.clone(), json!({"branch": {"parent_lsn": "0/1"}}), 400),
        (branches.clone(), json!({"branch": {"parent_timestamp": "1999-01-01T00:00:00Z", "parent_lsn": "0/1"}}), 400),
        (branches.clone(), json!({"endpoints": [{"type": "read_only"}]}), 400),
        (format!("{base}/endpoints"), json!({"endpoint": {"branch_id": main}}), 409),
        (format!("{branches}/{main}/roles"), json!({"role": {"name": "dormouse_owner"}}), 409),
        (format!("{branches}/{main}/databases"), json!({"database": {"name": "d", "owner_name": "nobody"}}), 404),
        (format!("{base}/nothing"), json!({}), 404),
    ] {
        let (status, error) = world.api(Method::POST, &path, body.clone()).await;
        assert_eq!(status, expected, "{path} {body}: {error}");
        assert!(!text(&error["message"]).is_empty());
    }
    let (status, _) = world.api(Method::DELETE, &format!("{branches}/{main}"), Value::Null).await;
    assert_eq!(status, 422);
    let huge = json!({"project": {"name": "x".repeat(300_000)}});
    assert_eq!(world.api(Method::POST, "/projects", huge).await.0, 413);
    assert_eq!(
        world.get(&branches).await["branches"].as_array().expect("list").len(),
        1,
        "nothing is left of failures"
    );
}

#[tokio::test]
async fn branches_leave_their_parent_where_asked() {
    let world = World::new().await;
    let made = world.project().await;
    let base = format!("/projects/{}", text(&made["project"]["id"]));
    let branches = format!("{base}/branches");
    let endpoint = text(&made["endpoints"][0]["id"]).to_owned();
    let branch = async |body: Value| world.post(&branches, body).await;

    let listed = world.get(&branches).await;
    let main = &listed["branches"][0];
    assert_eq!(
        (&main["logical_size"], &main["stored_size"], &main["history_size"]),
        (&json!(4096), &json!(100), &json!(0x2000))
    );

    let at_head = branch(json!({"branch": {"name": "dev"}, "endpoints": [{"type": "read_write"}]})).await;
    assert_eq!(at_head["branch"]["parent_lsn"], "0/2000", "what the running compute has at a quorum");
    assert_eq!(at_head["roles"][0]["name"], "dormouse_owner");
    assert!(text(&at_head["connection_uris"][0]["connection_uri"]).contains(text(&at_head["endpoints"][0]["id"])));
    let dev_endpoint = text(&at_head["endpoints"][0]["id"]).to_owned();
    assert_eq!(world.wake(&dev_endpoint).await.0, 200);
    assert!(world.computes.specs.lock().last().expect("spec").catalog.is_none(), "its data has the roles already");

    let suspended = world.post(&format!("{base}/endpoints/{endpoint}/suspend"), Value::Null).await;
    assert_eq!(suspended["operations"][0]["action"], "suspend_compute");
    assert_eq!(suspended["endpoint"]["current_state"], "idle");
    assert_eq!(branch(json!({})).await["branch"]["parent_lsn"], "0/2800", "what the clean stop said");
    assert_eq!(world.storage.settled.load(Ordering::Relaxed), 0);

    assert_eq!(world.wake(&endpoint).await.0, 200);
    world.computes.alive.lock().clear();
    assert_eq!(branch(json!({})).await["branch"]["parent_lsn"], "0/3000", "what safekeepers say after a crash");
    branch(json!({})).await;
    assert_eq!(world.storage.settled.load(Ordering::Relaxed), 1, "asked once");

    // A position from before `dev` existed lies in main's history.
    let dev = text(&at_head["branch"]["id"]).to_owned();
    let old = branch(json!({"branch": {"parent_id": dev, "parent_lsn": "0/1800"}})).await;
    let id = text(&old["branch"]["id"]).parse().expect("id");
    let found = world.storage.branches.lock().iter().find(|(b, _)| b.branch == id).map(|(_, at)| at.clone());
    let (ancestor, lsn) = found.expect("made");
    assert_eq!((ancestor.branch.as_str(), lsn), (text(&made["branch"]["id"]), Lsn(0x1800)));
    let now = time::OffsetDateTime::now_utc().format(&time::format_description::well_known::Rfc3339).expect("time");
    let timed = branch(json!({"branch": {"parent_timestamp": now}})).await;
    assert_eq!(timed["branch"]["parent_lsn"], "0/3000", "what storage finds, but no further than the head");
    let early = json!({"branch": {"parent_timestamp": "2001-01-01T00:00:00Z"}});
    assert_eq!(world.api(Method::POST, &branches, early).await.0, 400, "before the project was made");

    assert_eq!(old["branch"]["parent_id"], made["branch"]["id"], "the parent is the one that has the position");
    let young = branch(json!({"branch": {"parent_id": dev, "name": "young"}})).await;
    let (status, error) = world.api(Method::DELETE, &format!("{branches}/{dev}"), Value::Null).await;
    assert_eq!((status, text(&error["code"])), (409, "BRANCH_HAS_CHILDREN"));
    let young = text(&young["branch"]["id"]);
    assert!(text(&error["message"]).contains(young), "{error}");
    assert_eq!(world.api(Method::DELETE, &format!("{branches}/{young}"), Value::Null).await.0, 200);
    assert_eq!(world.api(Method::DELETE, &format!("{branches}/{dev}"), Value::Null).await.0, 200);
    assert_eq!(world.wake(&dev_endpoint).await.0, 404);
}

#[tokio::test]
async fn history_has_a_window_and_leases_hold_positions_beyond_it() {
    let world = World::new().await;
    let made = world.project().await;
    let project = format!("/projects/{}", text(&made["project"]["id"]));
    let branches = format!("{project}/branches");
    let main = format!("{branches}/{}", text(&made["branch"]["id"]));
    assert_eq!(world.get(&project).await["project"]["history_retention_seconds"], 604_800);
    let shown = world.get(&format!("{main}/history?lsn=0/1800")).await;
    assert_eq!(shown["history"]["start_lsn"], "0/1000", "younger than the window");
    assert_eq!(shown["history"]["timestamp"], "2000-01-01T00:00:00.006144Z", "{shown}");
    let lease = json!({"lease": {"lsn": "0/1800", "seconds": 60}});
    let leased = world.post(&format!("{main}/leases"), lease).await;
    for bad in [json!({"lsn": "0/1800", "seconds": 0}), json!({"lsn": "0/1800", "timestamp": "2001-01-01T00:00:00Z"})] {
        let (status, _) = world.api(Method::POST, &format!("{main}/leases"), json!({"lease": bad})).await;
        assert_eq!(status, 400);
    }

    let none = json!({"project": {"history_retention_seconds": 0}});
    assert_eq!(world.api(Method::PATCH, &project, none).await.0, 200);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let at = |lsn: &str| json!({"branch": {"parent_lsn": lsn}});
    let (status, error) = world.api(Method::POST, &branches, at("0/1900")).await;
    let message = text(&error["message"]);
    assert!(status == 400 && message.contains("no history") && message.contains("0/1900"), "{error}");
    world.post(&branches, at("0/1800")).await;
    world.post(&branches, json!({})).await;
    let lease = format!("{main}/leases/{}", text(&leased["lease"]["id"]));
    assert_eq!(world.api(Method::DELETE, &lease, Value::Null).await.0, 200);
    assert_eq!(world.api(Method::DELETE, &lease, Value::Null).await.0, 404);
    assert_eq!(world.api(Method::POST, &branches, at("0/1800")).await.0, 400);
}

#[tokio::test]
async fn subscriptions_are_disabled_until_a_compute_of_the_new_timeline_was_ready() {
    let world = World::new().await;
    let made = world.project().await;
    let branches = format!("/projects/{}/branches", text(&made["project"]["id"]));
    let main = text(&made["branch"]["id"]);
    let main_endpoint = text(&made["endpoints"][0]["id"]);
    let told_to_disable = || world.computes.specs.lock().last().expect("spec").disable_subscriptions;
    assert!(!told_to_disable(), "a project's first branch has no ancestor's");
    // What the last start has written is seen by the next.
    let wake_anew = async |endpoint: &str, wanted: u16| {
        world.computes.alive.lock().clear();
        assert_eq!(world.wake(endpoint).await.0, wanted);
        for _ in 0..100 {
            let operations = world.get(&branches.replace("branches", "operations")).await;
            if operations["operations"].as_array().expect("list").iter().all(|o| o["status"] != "running") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the start is not recorded");
    };

    let child = world.post(&branches, json!({"branch": {}, "endpoints": [{"type": "read_write"}]})).await;
    let endpoint = text(&child["endpoints"][0]["id"]);
    world.computes.failing.store(true, Ordering::Relaxed);
    wake_anew(endpoint, 503).await;
    world.computes.failing.store(false, Ordering::Relaxed);
    wake_anew(endpoint, 200).await;
    assert!(told_to_disable(), "a start that failed may have disabled nothing");
    wake_anew(endpoint, 200).await;
    assert!(!told_to_disable(), "they are the child's own now");

    let restore = format!("{branches}/{main}/restore");
    let body = json!({"source_branch_id": main, "source_lsn": "0/1800", "preserve_under_name": "old"});
    let restored = world.post(&restore, body).await;
    wake_anew(main_endpoint, 200).await;
    assert!(told_to_disable(), "those of the state before the restore go on there");
    let old = json!({"endpoint": {"branch_id": restored["branch"]["parent_id"], "type": "read_write"}});
    let old = world.post(&branches.replace("branches", "endpoints"), old).await;
    wake_anew(text(&old["endpoint"]["id"]), 200).await;
    assert!(!told_to_disable());
    wake_anew(main_endpoint, 200).await;
    assert!(!told_to_disable());
}

#[tokio::test]
async fn a_restore_exchanges_timelines_and_a_detached_branch_stands_alone() {
    let world = World::new().await;
    let made = world.project().await;
    let project = format!("/projects/{}", text(&made["project"]["id"]));
    let branches = format!("{project}/branches");
    let (main, endpoint) = (text(&made["branch"]["id"]), text(&made["endpoints"][0]["id"]).to_owned());
    let child = world.post(&branches, json!({"branch": {"name": "child"}})).await;
    world.post(&format!("{branches}/{main}/leases"), json!({"lease": {"lsn": "0/1800"}})).await;
    let restore = format!("{branches}/{main}/restore");
    for (bad, wanted) in [
        (json!({"source_branch_id": main, "preserve_under_name": "old"}), 400),
        (json!({"source_branch_id": main, "source_lsn": "0/1800"}), 400),
        (json!({"source_branch_id": "br-none", "source_lsn": "0/1800", "preserve_under_name": "old"}), 404),
        (json!({"source_branch_id": main, "source_lsn": "0/1800", "preserve_under_name": "child"}), 409),
        (json!({"source_branch_id": main, "source_lsn": "1/1800", "preserve_under_name": "old"}), 400),
    ] {
        assert_eq!(world.api(Method::POST, &restore, bad.clone()).await.0, wanted, "{bad}");
    }
    let invalidations = async || {
        let role = format!("/internal/v1/endpoints/{endpoint}/roles/dormouse_owner");
        let (_, auth) = world.request(Method::GET, &role, Some(&world.service_token), Value::Null).await;
        serde_json::from_value::<RoleAuth>(auth).expect("role").query_cache.all
    };
    assert_eq!(invalidations().await, 0);
    let body = json!({"source_branch_id": main, "source_lsn": "0/1800", "preserve_under_name": "old"});
    let restored = world.post(&restore, body).await;
    assert_eq!(invalidations().await, 1, "answers that proxies have kept are of the old state");
    assert_eq!(restored["branch"]["id"], main);
    assert_eq!(restored["branch"]["parent_lsn"], "0/1800");
    assert_eq!(restored["operations"][0]["status"], "finished");
    assert!(world.computes.alive.lock().is_empty(), "it sleeps until somebody connects");
    let old = restored["branch"]["parent_id"].clone();
    let shown = world.get(&format!("{branches}/{}", text(&old))).await;
    assert_eq!((&shown["branch"]["name"], &shown["branch"]["default"]), (&json!("old"), &json!(false)));
    let moved = world.get(&format!("{branches}/{}", text(&child["branch"]["id"]))).await;
    assert_eq!(moved["branch"]["parent_id"], old, "children stay with the state that they left");
    let leases = world.get(&format!("{branches}/{}/leases", text(&old))).await;
    assert_eq!(leases["leases"].as_array().map(Vec::len), Some(1), "and so do leases");
    assert_eq!(world.wake(&endpoint).await.0, 200);
    let spec = world.computes.specs.lock().last().cloned().expect("spec");
    assert_eq!(spec.branch.branch.as_str(), text(&old), "the timeline is called after the row it was made for");
    assert_eq!(spec.branch_start_lsn, Lsn(0x1800));
    assert!(spec.catalog.is_some(), "roles and databases of now are brought to the state of then");

    // The old state is needed until the branch stands alone.
    let (status, _) = world.api(Method::DELETE, &format!("{branches}/{}", text(&old)), Value::Null).await;
    assert_eq!(status, 409);
    for id in [main, text(&child["branch"]["id"])] {
        let detached = world.post(&format!("{branches}/{id}/detach"), Value::Null).await;
        assert!(detached["branch"].get("parent_id").is_none(), "{detached}");
        assert_eq!(world.api(Method::POST, &format!("{branches}/{id}/detach"), Value::Null).await.0, 422);
    }
    assert_eq!(world.api(Method::DELETE, &format!("{branches}/{}", text(&old)), Value::Null).await.0, 200);
    // From another branch, without keeping what it was: its roles come along, the old timeline goes.
    let body = json!({"source_branch_id": child["branch"]["id"]});
    let restored = world.post(&restore, body).await;
    assert_eq!(restored["branch"]["parent_id"], child["branch"]["id"]);
    for _ in 0..100 {
        if world.storage.branches.lock().len() == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(world.storage.branches.lock().len(), 2, "the timelines of main and of its source");
    assert_eq!(world.api(Method::DELETE, &project, Value::Null).await.0, 200, "children go before parents");
    assert!(world.storage.branches.lock().is_empty());
}

#[tokio::test]
async fn a_follower_gets_a_token_that_reads_the_branchs_wal_and_nothing_else() {
    let world = World::new().await;
    let made = world.project().await;
    let (project, branch) = (text(&made["project"]["id"]), text(&made["branch"]["id"]));
    let path = format!("/projects/{project}/branches/{branch}/wal_reader");
    for bad in [0, 59, 366 * 86_400] {
        assert_eq!(world.api(Method::POST, &path, json!({"expires_in_seconds": bad})).await.0, 400, "{bad}");
    }
    let (status, reader) = world.api(Method::POST, &path, json!({"expires_in_seconds": 600})).await;
    assert_eq!(status, 201);
    // Safekeeper 2 gives out nothing.
    assert_eq!(reader["missing_safekeepers"], json!([2]));
    let conninfo = text(&reader["conninfo"]);
    let expected = format!("host=sk1,sk3 port=7101,7101 user={project}/{branch} password=");
    let token = conninfo.strip_prefix(&expected).expect(conninfo).split(' ').next().expect("token");
    let own = BranchRef { project: project.parse().expect("id"), branch: branch.parse().expect("id") };
    let claims = world.verifier.verify(token).expect("good");
    assert_eq!(claims.scope, Scope::WalReader { branch: own });
    let other = format!("/projects/{project}/branches/br-none/wal_reader");
    assert_eq!(world.api(Method::POST, &other, Value::Null).await.0, 404);
    let (status, _) = world.request(Method::POST, &format!("/api/v2{path}"), Some(token), Value::Null).await;
    assert_eq!(status, 401, "it is no API key");
    let (status, _) = world.request(Method::POST, "/internal/v1/generations", Some(token), taking(1)).await;
    assert_eq!(status, 403);
}

fn taking(pageserver: u64) -> Value {
    json!({"pageserver": pageserver, "address": format!("127.0.0.1:{pageserver}")})
}

#[tokio::test]
async fn a_project_is_given_to_another_pageserver() {
    let world = World::new().await;
    let made = world.project().await;
    let (project, endpoint) = (text(&made["project"]["id"]), text(&made["endpoints"][0]["id"]));
    let path = format!("/projects/{project}/take_over");
    assert_eq!(world.api(Method::POST, &path, json!({"pageserver": 2})).await.0, 404, "it has never started");
    let take = async |pageserver| {
        let path = "/internal/v1/generations";
        let (_, taken) = world.request(Method::POST, path, Some(&world.service_token), taking(pageserver)).await;
        serde_json::from_value::<GenerationTaken>(taken).expect("generation")
    };
    let (first, second) = (take(1).await, take(2).await);
    world.post(&path, json!({"pageserver": 2})).await;
    let (of, generation) = world.storage.taken_over.lock()[0].clone();
    assert!(of.as_str() == project && generation > first.generation && generation > second.generation);
    assert!(world.computes.alive.lock().is_empty(), "computes that read from the other one are put to sleep");
    assert_eq!(world.wake(endpoint).await.0, 200);
    assert_eq!(world.computes.specs.lock().last().expect("spec").pageserver, "127.0.0.1:2");
    assert_eq!(take(1).await.elsewhere, [of]);
    assert!(take(2).await.elsewhere.is_empty());
}

#[tokio::test]
async fn garbage_is_collected_with_the_window_and_the_leases() {
    let world = World::new().await;
    let made = world.project().await;
    let branches = format!("/projects/{}/branches", text(&made["project"]["id"]));
    let main = format!("{branches}/{}", text(&made["branch"]["id"]));
    world.post(&format!("{main}/leases"), json!({"lease": {"lsn": "0/1800"}})).await;
    let report = world.post(&format!("{main}/collect_garbage"), Value::Null).await;
    assert_eq!((&report["removed_layers"], &report["start_lsn"]), (&json!(2), &json!("0/3000")));
    let (branch, since_us, leases) = world.storage.collected.lock().pop().expect("asked");
    assert_eq!((branch.branch.as_str(), leases), (text(&made["branch"]["id"]), vec![Lsn(0x1800)]));
    let week_ago = time::OffsetDateTime::now_utc() - time::Duration::days(7);
    let since = time::macros::datetime!(2000-01-01 0:00 UTC) + time::Duration::microseconds(since_us);
    assert!((since - week_ago).abs() < time::Duration::minutes(1), "{since}");
}

#[tokio::test]
async fn a_branch_whose_wal_does_not_arrive_is_settled_again() {
    let world = World::new().await;
    let made = world.project().await;
    let base = format!("/projects/{}", text(&made["project"]["id"]));
    world.post(&format!("{base}/endpoints/{}/suspend", text(&made["endpoints"][0]["id"])), Value::Null).await;
    world.storage.forgetful.store(true, Ordering::Relaxed);
    world.post(&format!("{base}/branches"), json!({})).await;
    assert_eq!(world.storage.settled.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn concurrent_wakes_share_one_start_and_one_failure() {
    let world = World::new().await;
    let made = world.project().await;
    let base = format!("/projects/{}/endpoints", text(&made["project"]["id"]));
    let endpoint = text(&made["endpoints"][0]["id"]).to_owned();
    world.post(&format!("{base}/{endpoint}/suspend"), Value::Null).await;
    let started = world.computes.next.load(Ordering::Relaxed);
    let wakes = futures::future::join_all((0..20).map(|_| world.wake(&endpoint))).await;
    assert!(wakes.iter().all(|(status, _)| *status == 200));
    assert_eq!(world.computes.next.load(Ordering::Relaxed), started + 1);
    let wake: Wake = serde_json::from_value(world.wake(&endpoint).await.1).expect("wake");
    assert!(!wake.cold && wake.postgres_socket.ends_with(".s.PGSQL.5432"));

    // A dead compute is noticed by the next wake.
    world.computes.alive.lock().clear();
    let wake: Wake = serde_json::from_value(world.wake(&endpoint).await.1).expect("wake");
    assert!(wake.cold);

    world.post(&format!("{base}/{endpoint}/suspend"), Value::Null).await;
    world.computes.failing.store(true, Ordering::Relaxed);
    let started = world.computes.next.load(Ordering::Relaxed);
    let wakes = futures::future::join_all((0..20).map(|_| world.wake(&endpoint))).await;
    assert!(wakes.iter().all(|(status, error)| *status == 503 && text(&error["message"]).contains("no quorum")));
    let tries = world.computes.next.load(Ordering::Relaxed) - started;
    assert!(tries < 20, "{tries} starts for 20 wakes");
    world.computes.failing.store(false, Ordering::Relaxed);
    assert_eq!(world.wake(&endpoint).await.0, 200, "a failure is not remembered for later wakes");
}

#[tokio::test]
async fn idle_computes_sleep_and_disabled_ones_stay_asleep() {
    let world = World::new().await;
    let made = world.project().await;
    let path = format!("/projects/{}/endpoints/{}", text(&made["project"]["id"]), text(&made["endpoints"][0]["id"]));
    let endpoint = text(&made["endpoints"][0]["id"]).to_owned();
    assert_eq!(world.get(&path).await["endpoint"]["current_state"], "active");
    world.computes.idle_ms.store(10_000, Ordering::Relaxed);
    let (status, _) = world.api(Method::PATCH, &path, json!({"endpoint": {"suspend_timeout_seconds": 1}})).await;
    assert_eq!(status, 200);
    let mut asleep = false;
    for _ in 0..60 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        asleep = world.get(&path).await["endpoint"]["current_state"] == "idle";
        if asleep {
            break;
        }
    }
    assert!(asleep && world.computes.alive.lock().is_empty());

    let (status, _) = world.api(Method::PATCH, &path, json!({"endpoint": {"disabled": true}})).await;
    assert_eq!(status, 200);
    assert_eq!(world.wake(&endpoint).await.0, 403);
    let role = format!("/internal/v1/endpoints/{endpoint}/roles/dormouse_owner");
    let (_, auth) = world.request(Method::GET, &role, Some(&world.service_token), Value::Null).await;
    let auth: RoleAuth = serde_json::from_value(auth).expect("role");
    assert!(!auth.enabled && auth.scram_verifier.is_some());
    let missing = format!("/internal/v1/endpoints/{endpoint}/roles/nobody");
    assert_eq!(world.request(Method::GET, &missing, Some(&world.service_token), Value::Null).await.0, 404);
    assert!(world.computes.alive.lock().is_empty(), "looking at a role wakes nothing");
}

#[tokio::test]
async fn roles_and_databases_reach_postgres() {
    let world = World::new().await;
    let made = world.project().await;
    let (project, branch) = (text(&made["project"]["id"]), text(&made["branch"]["id"]));
    let base = format!("/projects/{project}/branches/{branch}");
    let role = world.post(&format!("{base}/roles"), json!({"role": {"name": "app"}})).await;
    assert_eq!(role["operations"][0]["status"], "finished");
    let applied = world.computes.applied.lock().last().cloned().expect("applied to the running compute");
    assert!(applied.roles.iter().any(|r| r.name == "app"));
    let password = world.get(&format!("{base}/roles/app/reveal_password")).await;
    assert_eq!(password["password"], role["role"]["password"]);
    assert!(world.get(&format!("{base}/roles/app")).await["role"].get("password").is_none());

    let endpoint = text(&made["endpoints"][0]["id"]).to_owned();
    world.post(&format!("/projects/{project}/endpoints/{endpoint}/suspend"), Value::Null).await;
    let reset = world.post(&format!("{base}/roles/app/reset_password"), Value::Null).await;
    assert_ne!(reset["role"]["password"], role["role"]["password"]);
    world.post(&format!("{base}/databases"), json!({"database": {"name": "orders", "owner_name": "app"}})).await;
    assert_eq!(world.api(Method::DELETE, &format!("{base}/roles/app"), Value::Null).await.0, 422, "owns a database");
    assert_eq!(world.api(Method::DELETE, &format!("{base}/databases/orders"), Value::Null).await.0, 200);
    assert_eq!(world.api(Method::DELETE, &format!("{base}/roles/app"), Value::Null).await.0, 200);
    assert_eq!(world.wake(&endpoint).await.0, 200);
    let catalog = world.computes.specs.lock().last().and_then(|spec| spec.catalog.clone()).expect("at the next wake");
    assert_eq!((catalog.drop_roles, catalog.drop_databases), (vec!["app".to_owned()], vec!["orders".to_owned()]));
    tokio::time::sleep(Duration::from_millis(100)).await;
    world.post(&format!("/projects/{project}/endpoints/{endpoint}/restart"), Value::Null).await;
    assert_eq!(world.wake(&endpoint).await.0, 200);
    assert!(world.computes.specs.lock().last().expect("spec").catalog.is_none(), "told once");
}

#[tokio::test]
async fn lists_have_pages_and_failures_leave_nothing() {
    let world = World::new().await;
    for number in 0..5 {
        world.post("/projects", json!({"project": {"name": format!("p{number}")}})).await;
    }
    let (mut names, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = world.get(&format!("/projects?limit=2&cursor={cursor}")).await;
        let rows = page["projects"].as_array().expect("list").clone();
        names.extend(rows.iter().map(|p| text(&p["name"]).to_owned()));
        match page["pagination"]["cursor"].as_str() {
            Some(next) => cursor = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(names, ["p0", "p1", "p2", "p3", "p4"]);
    assert_eq!(world.get("/projects?search=p3").await["projects"].as_array().expect("list").len(), 1);
    for bad in ["limit=0", "limit=100000", "cursor=x"] {
        assert_eq!(world.api(Method::GET, &format!("/projects?{bad}"), Value::Null).await.0, 400);
    }
    world.storage.failing.store(true, Ordering::Relaxed);
    let (status, error) = world.api(Method::POST, "/projects", json!({})).await;
    assert_eq!((status, text(&error["message"])), (503, "pageserver is away"));
    assert_eq!(world.get("/projects").await["projects"].as_array().expect("list").len(), 5);
}
