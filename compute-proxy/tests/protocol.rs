//! Corners of the protocol that psql of Postgres 15 does not reach: TLS without asking first, newer protocol versions.

mod support;

use std::{net::SocketAddr, sync::Arc};

use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use support::World;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::TlsConnector;

fn startup(version: u32, pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut body = version.to_be_bytes().to_vec();
    for text in pairs.iter().flat_map(|(name, value)| [name, value]) {
        body.extend_from_slice(text.as_bytes());
        body.push(0);
    }
    body.push(0);
    let length = body.len() as u32 + 4;
    [&length.to_be_bytes()[..], &body].concat()
}

async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> (char, Vec<u8>) {
    let mut header = [0; 5];
    stream.read_exact(&mut header).await.expect("a header");
    let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]);
    let mut body = vec![0; length as usize - 4];
    stream.read_exact(&mut body).await.expect("a body");
    (header[0].into(), body)
}

fn connector(world: &World, alpn: &[&[u8]]) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(world.tls_dir.path().join("ca.pem")).expect("a certificate");
    roots.add(ca).expect("an authority");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = builder.expect("versions").with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    TlsConnector::from(Arc::new(config))
}

#[tokio::test]
async fn tls_may_come_first() {
    // Not below localhost: rustls takes no wildcard for a name of two labels.
    let world = World::start(&["--domain", "db.example.com"]).await;
    let name = || ServerName::try_from("ep-a.db.example.com").expect("a name");
    let tcp = TcpStream::connect(world.address).await.expect("connected");
    let mut stream = connector(&world, &[b"postgresql"]).connect(name(), tcp).await.expect("TLS");
    stream.write_all(&startup(3 << 16, &[("user", "alice")])).await.expect("written");
    let (kind, body) = read_message(&mut stream).await;
    assert_eq!((kind, &body[..]), ('R', &b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"[..]));

    let tcp = TcpStream::connect(world.address).await.expect("connected");
    let mut stream = connector(&world, &[]).connect(name(), tcp).await.expect("TLS");
    // The proxy may close before or after this is written.
    let _ = stream.write_all(&startup(3 << 16, &[("user", "alice")])).await;
    assert!(!matches!(stream.read(&mut [0; 1]).await, Ok(1..)), "Postgres's protocol must be named");
}

#[tokio::test]
async fn newer_protocols_are_negotiated_down() {
    let world = World::start(&[]).await;
    let mut stream = TcpStream::connect(world.address).await.expect("connected");
    // A client that tries everything: GSSAPI first, then none.
    stream.write_all(&[0, 0, 0, 8, 4, 210, 22, 48]).await.expect("written");
    assert_eq!(stream.read_u8().await.expect("an answer"), b'N');
    let pairs = [("user", "alice"), ("options", "endpoint=ep-a"), ("_pq_.grease", "1")];
    stream.write_all(&startup(3 << 16 | 9999, &pairs)).await.expect("written");
    let (kind, body) = read_message(&mut stream).await;
    assert_eq!((kind, &body[..]), ('v', &b"\0\x03\0\0\0\0\0\x01_pq_.grease\0"[..]));
    let (kind, body) = read_message(&mut stream).await;
    assert_eq!((kind, &body[..]), ('R', &b"\0\0\0\x0aSCRAM-SHA-256\0\0"[..]), "no channel binding without TLS");
}

#[tokio::test]
async fn bytes_before_tls_do_not_count_as_sent_inside() {
    let world = World::start(&[]).await;
    let mut stream = TcpStream::connect(world.address).await.expect("connected");
    let injected = startup(3 << 16, &[("user", "alice"), ("options", "endpoint=ep-a")]);
    stream.write_all(&[&[0, 0, 0, 8, 4, 210, 22, 47][..], &injected].concat()).await.expect("written");
    assert_eq!(stream.read_u8().await.expect("an answer"), b'S');
    let mut rest = Vec::new();
    // An alert of TLS, or nothing: never an answer to the injected packet.
    let _ = stream.read_to_end(&mut rest).await;
    assert_ne!(rest.first(), Some(&b'R'));
}

#[tokio::test]
async fn a_cancel_request_inside_tls_ends_in_order() {
    let world = World::start(&["--domain", "db.example.com"]).await;
    let name = ServerName::try_from("ep-a.db.example.com").expect("a name");
    let tcp = TcpStream::connect(world.address).await.expect("connected");
    let mut stream = connector(&world, &[b"postgresql"]).connect(name, tcp).await.expect("TLS");
    stream.write_all(&[0, 0, 0, 16, 4, 210, 22, 46, 0, 0, 0, 1, 0, 0, 0, 2]).await.expect("written");
    assert_eq!(stream.read(&mut [0; 1]).await.expect("no error of TLS"), 0);
}

/// Passes one connection on to `to`; the port, and all that came back once it has ended.
async fn tapped(to: SocketAddr) -> (u16, JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let port = listener.local_addr().expect("an address").port();
    let passing = tokio::spawn(async move {
        let (client, _) = listener.accept().await.expect("accepted");
        let (mut client_in, mut client_out) = client.into_split();
        let (mut proxy_in, mut proxy_out) = TcpStream::connect(to).await.expect("connected").into_split();
        tokio::spawn(async move { tokio::io::copy(&mut client_in, &mut proxy_out).await });
        let mut all = Vec::new();
        let mut buffer = [0; 16 * 1024];
        // Whoever closes first may do so with a reset.
        while let Ok(bytes @ 1..) = proxy_in.read(&mut buffer).await {
            all.extend_from_slice(&buffer[..bytes]);
            client_out.write_all(&buffer[..bytes]).await.expect("written");
        }
        all
    });
    (port, passing)
}

#[tokio::test]
async fn tls_records_are_no_longer_than_libpq_reads_at_once() {
    let world = World::start(&[]).await;
    for endpoint in ["ep-a", "ep-a-pooler"] {
        let (port, passing) = tapped(world.address).await;
        let rest = format!("port={port} sslmode=require options=endpoint={endpoint}");
        let said = world.psql(&rest, support::PASSWORD, "select repeat('x', 1000) from generate_series(1, 300)").await;
        assert_eq!(said.expect("rows").len(), 300 * 1001 - 1);
        let came = passing.await.expect("no panic");
        // Behind the answer that there is TLS: type, version, length, and so many bytes.
        let (mut rest, mut longest) = (came.strip_prefix(b"S").expect("TLS"), 0);
        while let [_, _, _, high, low, later @ ..] = rest {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            longest = longest.max(length);
            rest = later.get(length..).unwrap_or_default();
        }
        // With what encryption adds.
        assert!((8000..=8192 + 32).contains(&longest), "{endpoint}: {longest}");
    }
}
