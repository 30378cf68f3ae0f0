//! The client against a scripted server.

use std::net::SocketAddr;

use tokio::net::TcpListener;
use types::{BranchId, ForkNumber, ProjectId};
use wire::{
    FrameReader, FrameWriter, Hello, HelloReply,
    pageserver::{Request, Response},
};

use super::*;

fn branch() -> BranchRef {
    BranchRef { project: ProjectId::new("p").expect("id"), branch: BranchId::new("b").expect("id") }
}

fn rel(rel: u32) -> RelTag {
    RelTag { spc: 1663, db: 1, rel, fork: ForkNumber::Main }
}

const NOW: ReadLsn = ReadLsn { request: Lsn::MAX, not_modified_since: Lsn(0) };

/// Each connection answers `per_connection` requests in pairs, the second of a pair first, and closes.
async fn serve(per_connection: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (read, write) = socket.into_split();
            let (mut reader, mut writer) = (FrameReader::new(read), FrameWriter::new(write));
            let hello = reader.recv::<Hello>().await.expect("hello").expect("hello");
            let reply =
                if hello.token == "good" { HelloReply::Welcome } else { HelloReply::Denied("bad token".to_owned()) };
            writer.send(&reply).await.expect("send");
            let mut held: Option<Response> = None;
            for _ in 0..per_connection {
                let Ok(Some(request)) = reader.recv::<Request>().await else { break };
                let RequestBody::RelSize { rel, .. } = request.body else { panic!("unexpected request") };
                let response = Response { id: request.id, body: Ok(ResponseBody::RelSize(Some(rel.rel))) };
                match held.take() {
                    None => held = Some(response),
                    Some(first) => {
                        writer.send(&response).await.expect("send");
                        writer.send(&first).await.expect("send");
                    }
                }
            }
        }
    });
    address
}

#[tokio::test]
async fn answers_out_of_order_find_their_askers() {
    let client = PageserverClient::new(serve(4).await.to_string(), "good".to_owned());
    let branch = branch();
    let (a, b) = tokio::join!(client.rel_size(&branch, rel(1), NOW), client.rel_size(&branch, rel(2), NOW));
    assert_eq!((a.expect("a"), b.expect("b")), (Some(1), Some(2)));
}

#[tokio::test]
async fn a_lost_connection_is_replaced() {
    let client = PageserverClient::new(serve(2).await.to_string(), "good".to_owned());
    let branch = branch();
    for round in 0..3 {
        let (a, b) = tokio::join!(client.rel_size(&branch, rel(1), NOW), client.rel_size(&branch, rel(2), NOW));
        assert_eq!((a.expect("a"), b.expect("b")), (Some(1), Some(2)), "round {round}");
    }
}

#[tokio::test]
async fn errors_say_what_to_do() {
    let address = serve(2).await.to_string();
    let denied = PageserverClient::new(address, "bad".to_owned()).branch_info(&branch()).await.expect_err("denied");
    assert!(matches!(&denied, ClientError::Pageserver(e) if e.kind == ErrorKind::Denied), "{denied}");
    assert!(!denied.is_retryable());
    let nobody = PageserverClient::new("127.0.0.1:1".to_owned(), "x".to_owned());
    let error = nobody.branch_info(&branch()).await.expect_err("nobody listens");
    assert!(error.is_retryable() && error.to_string().contains("127.0.0.1:1"), "{error}");
}
