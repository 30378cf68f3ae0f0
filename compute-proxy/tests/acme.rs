//! Certificates by ACME, from a real ACME server (Pebble), and what clients see of them.

mod support;

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use support::{PASSWORD, PebblePlace, World};
use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};
use tokio_rustls::TlsConnector;

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// For what takes a second or two, unless the machine has much else to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// Flags for certificates from there, with fast retries.
fn flags(place: &PebblePlace, more: &[&str]) -> Vec<String> {
    let ca = place.ca().display().to_string();
    let url = place.url();
    let flags = ["--domain", "db.example.com", "--acme", &url, "--acme-ca", &ca, "--acme-retry", "500ms"];
    flags.iter().chain(more).map(|flag| (*flag).to_owned()).collect()
}

async fn start(flags: &[String]) -> World {
    World::start(&flags.iter().map(String::as_str).collect::<Vec<_>>()).await
}

/// psql's answer over a connection that trusts this root and insists on the host's name.
async fn verified(world: &World, host: &str, root: &Path) -> Result<String, String> {
    let root = root.display();
    let strict = format!("host={host} sslmode=verify-full sslrootcert={root} channel_binding=require");
    world.psql(&strict, PASSWORD, "SELECT 'verified'").await
}

async fn until_verified(world: &World, host: &str, root: &Path) {
    let begun = Instant::now();
    loop {
        match verified(world, host, root).await {
            Ok(answer) => return assert_eq!(answer, "verified"),
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// The files in the directory for certificates that begin like this.
fn files(world: &World, prefix: &str) -> Vec<PathBuf> {
    let all = fs::read_dir(world.tls_dir.path()).expect("listed").flatten().map(|entry| entry.path());
    all.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))).collect()
}

/// The certificate in the one file that came by ACME.
fn current(world: &World) -> CertificateDer<'static> {
    let file = files(world, "acme-").into_iter().find(|path| path.extension().is_some_and(|end| end == "pem"));
    CertificateDer::from_pem_file(file.expect("a certificate")).expect("a certificate")
}

#[tokio::test]
async fn a_proxy_gets_a_certificate_by_itself_and_keeps_it() {
    let place = PebblePlace::new();
    let flags = flags(&place, &["--acme-name", "api.db.example.com,ep-a.db.example.com"]);
    let world = start(&flags).await;
    let host = "ep-a.db.example.com";
    // The server is not there yet: the self-made certificate serves.
    let self_made = world.tls_dir.path().join("ca.pem");
    assert_eq!(verified(&world, host, &self_made).await.as_deref(), Ok("verified"));

    let pebble = place.run(world.http_address.port(), YEAR).await;
    until_verified(&world, host, &pebble.root).await;
    assert!(verified(&world, host, &self_made).await.is_err(), "the self-made one is not used any more");
    assert!(verified(&world, "ep-b.db.example.com", &pebble.root).await.is_err(), "it has the names that were said");
    let root = reqwest::Certificate::from_pem(&fs::read(&pebble.root).expect("read")).expect("a certificate");
    let client = reqwest::Client::builder().tls_certs_only([root]).no_proxy();
    let client = client.resolve("api.db.example.com", world.http_address).build().expect("a client");
    let url = format!("https://api.db.example.com:{}/sql", world.http_address.port());
    client.get(url).send().await.expect("the port for HTTP has it too");

    let (account, all) = (files(&world, "acme-account-"), files(&world, "acme-"));
    assert_eq!((account.len(), all.len()), (1, 2), "an account and a certificate, {all:?}");
    for file in all {
        assert_eq!(fs::metadata(&file).expect("there").permissions().mode() & 0o777, 0o600, "{}", file.display());
    }

    // A restart while the server is down.
    let kept = current(&world);
    let root = pebble.root.clone();
    drop(pebble);
    world.shutdown.cancel();
    world.task.await.expect("no panic").expect("stopped");
    let arguments: Vec<&str> = flags.iter().map(String::as_str).collect();
    let world = World::start_in(world.tls_dir, &arguments).await;
    assert_eq!(verified(&world, host, &root).await.as_deref(), Ok("verified"));
    assert!(current(&world) == kept, "no other was asked for");
}

#[tokio::test]
async fn a_wildcard_is_proved_by_dns() {
    let place = PebblePlace::new();
    let pebble = place.run(1, YEAR).await;
    let hook = place.dns_hook().display().to_string();
    let world = start(&flags(&place, &["--acme-dns-hook", &hook])).await;
    for host in ["ep-a.db.example.com", "ep-b-pooler.db.example.com"] {
        until_verified(&world, host, &pebble.root).await;
    }
    let calls = fs::read_to_string(place.calls()).expect("called");
    let record = "_acme-challenge.db.example.com.";
    let wanted = ["present", "present", "cleanup", "cleanup"].map(|action| format!("{action} {record}"));
    assert_eq!(calls.lines().collect::<Vec<_>>(), wanted, "for the domain and for its wildcard");
}

#[tokio::test]
async fn a_certificate_is_renewed_and_outlives_its_server() {
    let lifetime = Duration::from_secs(30);
    let place = PebblePlace::new();
    let world = start(&flags(&place, &["--acme-name", "ep-a.db.example.com"])).await;
    let pebble = place.run(world.http_address.port(), lifetime).await;
    let host = "ep-a.db.example.com";
    until_verified(&world, host, &pebble.root).await;
    let (first, begun) = (current(&world), Instant::now());
    while current(&world) == first {
        assert!(begun.elapsed() < lifetime, "it was not renewed");
        sleep(Duration::from_millis(100)).await;
    }
    assert!(begun.elapsed() > lifetime / 2, "it was renewed too early: {:?}", begun.elapsed());
    assert_eq!(verified(&world, host, &pebble.root).await.as_deref(), Ok("verified"));

    // Only a door that nobody opens is left of the server when the next renewal is due.
    let (second, root) = (current(&world), pebble.root.clone());
    drop(pebble);
    let tries = Arc::new(AtomicUsize::new(0));
    let door = tokio::spawn(count_connections(place.address(), tries.clone()));
    let begun = Instant::now();
    while tries.load(Ordering::SeqCst) < 2 {
        assert!(begun.elapsed() < lifetime, "nobody asked for another one");
        sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(verified(&world, host, &root).await.as_deref(), Ok("verified"), "the old one stays in use");
    assert!(current(&world) == second);

    // The server is back, and has forgotten the account.
    door.abort();
    let _ = door.await;
    let pebble = place.run(world.http_address.port(), YEAR).await;
    until_verified(&world, host, &pebble.root).await;
}

async fn count_connections(address: String, count: Arc<AtomicUsize>) {
    let listener = loop {
        match TcpListener::bind(&address).await {
            Ok(listener) => break listener,
            Err(error) if error.kind() == ErrorKind::AddrInUse => sleep(Duration::from_millis(20)).await,
            Err(error) => panic!("{error}"),
        }
    };
    while listener.accept().await.is_ok() {
        count.fetch_add(1, Ordering::SeqCst);
    }
}

/// A handshake as an ACME server does it.
async fn look_for_proof(world: &World, host: &'static str) -> std::io::Result<()> {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(world.tls_dir.path().join("ca.pem")).expect("a certificate");
    roots.add(ca).expect("an authority");
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"acme-tls/1".to_vec()];
    let tcp = TcpStream::connect(world.http_address).await?;
    let name = ServerName::try_from(host).expect("a name");
    TlsConnector::from(Arc::new(config)).connect(name, tcp).await.map(|_| ())
}

#[tokio::test]
async fn nobody_else_can_ask_for_a_proof() {
    let place = PebblePlace::new();
    let with = start(&flags(&place, &["--acme-name", "ep-a.db.example.com"])).await;
    let error = look_for_proof(&with, "ep-a.db.example.com").await.expect_err("no proof is asked for");
    assert!(error.to_string().contains("AccessDenied"), "{error}");
    let without = World::start(&["--domain", "db.example.com"]).await;
    let error = look_for_proof(&without, "ep-a.db.example.com").await.expect_err("there is no ACME");
    assert!(error.to_string().contains("NoApplicationProtocol"), "{error}");
}
