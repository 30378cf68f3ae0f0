//! Endpoints that take clients from some addresses only, by each of the ways in.

mod support;

use std::time::Duration;

use reqwest::Client;
use serde_json::{Value, json};
use support::{Issuer, PASSWORD, Signer, World, said};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::sleep};
use tokio_postgres::{NoTls, config::SslMode};

/// What a client on loopback is told whose address is not allowed.
const REFUSED: &str = "28000 address 127.0.0.1 is not allowed to connect to endpoint \"ep-a\"";

fn allow(world: &World, networks: &[&str]) {
    let networks = networks.iter().map(|network| network.parse().expect("a network")).collect();
    *world.endpoint("ep-a").allowed_ips.lock() = networks;
}

async fn by_http(world: &World, connection: &str, token: Option<&str>) -> Result<(), String> {
    let mut request = Client::new().post(format!("http://{}/sql", world.http_address));
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    let body = json!({"query": "select 1"}).to_string();
    let response = request.header("Neon-Connection-String", connection).body(body).send().await.expect("an answer");
    if response.status().is_success() {
        return Ok(());
    }
    let error: Value = response.json().await.expect("JSON");
    Err(format!("{} {}", error["code"].as_str().expect("a code"), error["message"].as_str().expect("a message")))
}

/// One login by each way in.
async fn by_all_ways(world: &World, token: &str) -> Vec<Result<(), String>> {
    let connection = format!("postgresql://alice:{}@ep-a.localhost/postgres", PASSWORD.replace('$', "%24"));
    let in_websocket = |host| world.in_websocket(host, None, PASSWORD);
    vec![
        world.connect("endpoint=ep-a").await.map(|_| ()).map_err(said),
        world.connect("endpoint=ep-a-pooler").await.map(|_| ()).map_err(said),
        by_http(world, &connection, None).await,
        by_http(world, "postgresql://alice@ep-a.localhost/postgres", Some(token)).await,
        in_websocket("ep-a.localhost").await.map(|_| ()),
        in_websocket("ep-a-pooler.localhost").await.map(|_| ()),
    ]
}

#[tokio::test]
async fn only_allowed_addresses_come_in_by_any_way() {
    let world = World::start(&["--allow-cleartext", "--http-auth-cache", "0s"]).await;
    let signer = Signer::new("a", jsonwebtoken::Algorithm::EdDSA);
    let issuer = Issuer::start(&[&signer]).await;
    world.endpoint("ep-a").token_issuers.lock().insert("alice".to_owned(), vec![issuer.wanted()]);
    let token = signer.token("ann");
    for refusing in [&["192.0.2.0/24"][..], &["127.0.0.2/32", "::/0"]] {
        allow(&world, refusing);
        for (way, outcome) in by_all_ways(&world, &token).await.into_iter().enumerate() {
            assert_eq!(outcome, Err(REFUSED.to_owned()), "way {way}");
        }
    }
    assert_eq!(world.wakes(), 0, "who may not come in wakes nothing");
    // Who does not know the password does not learn of it.
    let refused = world.psql("options=endpoint=ep-a", "wrong", "SELECT 1").await.expect_err("a wrong password");
    assert!(refused.contains("password authentication failed"), "{refused}");
    for admitting in [&[][..], &["127.0.0.0/8"], &["192.0.2.0/24", "127.0.0.1/32"]] {
        allow(&world, admitting);
        for (way, outcome) in by_all_ways(&world, &token).await.into_iter().enumerate() {
            assert_eq!(outcome, Ok(()), "way {way} {admitting:?}");
        }
    }
}

#[tokio::test]
async fn a_change_counts_as_soon_as_a_new_password_does() {
    let world = World::start(&["--allow-cleartext", "--auth-cache", "2s"]).await;
    allow(&world, &["192.0.2.0/24"]);
    let connect = async || world.connect("endpoint=ep-a").await.map(|_| ()).map_err(said);
    assert_eq!(connect().await, Err(REFUSED.to_owned()));
    allow(&world, &["127.0.0.1/32"]);
    assert_eq!(connect().await, Ok(()), "an address that was added is asked for at once");
    allow(&world, &["192.0.2.0/24"]);
    assert_eq!(connect().await, Ok(()), "one that was taken away counts for as long as an old password");
    sleep(Duration::from_millis(2100)).await;
    assert_eq!(connect().await, Err(REFUSED.to_owned()));
}

#[tokio::test]
async fn behind_a_load_balancer_the_clients_own_address_counts() {
    let world = World::start(&["--proxy-protocol"]).await;
    allow(&world, &["192.0.2.0/24"]);
    let connect = async |address: [u8; 4]| {
        let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
        header.extend_from_slice(&address);
        header.extend_from_slice(&[127, 0, 0, 1, 0x30, 0x39, 0x15, 0x38]);
        let mut tcp = TcpStream::connect(world.address).await.expect("connected");
        tcp.write_all(&header).await.expect("written");
        let mut config = tokio_postgres::Config::new();
        config.user("alice").password(PASSWORD).dbname("postgres").options("endpoint=ep-a");
        config.ssl_mode(SslMode::Disable).connect_raw(tcp, NoTls).await.map(|_| ()).map_err(said)
    };
    assert_eq!(connect([192, 0, 2, 200]).await, Ok(()));
    let refused = "28000 address 198.51.100.7 is not allowed to connect to endpoint \"ep-a\"";
    assert_eq!(connect([198, 51, 100, 7]).await, Err(refused.to_owned()));
}
