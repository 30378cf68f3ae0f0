//! WAL by Postgres's own replication protocol: with `psql` and `pg_receivewal`, and, where these can't look closely enough, message by
//! message.

mod harness;

use std::{
    path::Path,
    process::{Child, Command, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use object_store::{ObjectStore, local::LocalFileSystem};
use safekeeper_client::{WalProposer, delete_branch, node_status};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep},
};
use types::{Lsn, WAL_SEGMENT_BYTES};
use wire::Scope;

use harness::{Cluster, START, SYSTEM, branch, within};

/// A follower's token for the cluster's branch.
fn reader_token(cluster: &Cluster) -> String {
    cluster.token(Scope::WalReader { branch: cluster.branch.clone() })
}

/// How libpq reaches these safekeepers.
fn conninfo(cluster: &Cluster, indexes: &[usize], token: &str) -> String {
    let hosts = vec!["127.0.0.1"; indexes.len()].join(",");
    let ports: Vec<String> = indexes.iter().map(|index| cluster.replication_port(*index).to_string()).collect();
    let user = &cluster.branch;
    format!("host={hosts} port={} user={user} password={token} sslmode=prefer", ports.join(","))
}

/// `psql` with one replication command: what it prints, errors with their SQLSTATE.
async fn psql(conninfo: &str, command: &str) -> Output {
    let mut psql = Command::new(e2e::pg_bin_dir().join("psql"));
    psql.args(["-X", "-A", "-t", "-v", "VERBOSITY=verbose", "-c", command]);
    psql.arg(format!("{conninfo} replication=true dbname=x connect_timeout=10"));
    psql.env("HOME", "/").stdin(Stdio::null());
    tokio::task::spawn_blocking(move || psql.output()).await.expect("task").expect("psql")
}

async fn refused(conninfo: &str, command: &str) -> String {
    let output = psql(conninfo, command).await;
    assert!(!output.status.success(), "{command} was done");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn answered(conninfo: &str, command: &str) -> String {
    let output = psql(conninfo, command).await;
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A client that speaks the protocol by hand.
struct Raw {
    stream: TcpStream,
}

/// What a stream of WAL says.
#[derive(Debug, PartialEq)]
enum Said {
    Wal { begin: Lsn, wal: Vec<u8> },
    Keepalive { end: Lsn, asks: bool },
    Done,
    Error(String),
    Closed,
}

impl Raw {
    /// Sends a start-up packet.
    async fn begin(port: u16, parameters: &[(&str, &str)]) -> Raw {
        let mut body = 196_608u32.to_be_bytes().to_vec();
        for text in parameters.iter().flat_map(|(name, value)| [name, value]) {
            body.extend_from_slice(text.as_bytes());
            body.push(0);
        }
        body.push(0);
        let mut raw = Raw { stream: TcpStream::connect(("127.0.0.1", port)).await.expect("connect") };
        let length = (body.len() as u32 + 4).to_be_bytes();
        raw.stream.write_all(&[&length[..], &body].concat()).await.expect("send");
        raw
    }

    /// Logs in.
    async fn log_in(cluster: &Cluster, index: usize, token: &str) -> Raw {
        let user = cluster.branch.to_string();
        let mut raw = Raw::begin(cluster.replication_port(index), &[("user", &user), ("replication", "true")]).await;
        assert_eq!(raw.message().await.expect("answer"), (b'R', vec![0, 0, 0, 3]), "a password is asked for");
        raw.send(b'p', &[token.as_bytes(), &[0]].concat()).await;
        raw.until(b'Z').await;
        raw
    }

    async fn send(&mut self, kind: u8, body: &[u8]) {
        let length = (body.len() as u32 + 4).to_be_bytes();
        self.stream.write_all(&[&[kind][..], &length, body].concat()).await.expect("send");
    }

    /// The next message; `None` when there is none any more.
    async fn message(&mut self) -> Option<(u8, Vec<u8>)> {
        let read = async {
            let kind = self.stream.read_u8().await?;
            let mut body = vec![0; self.stream.read_u32().await? as usize - 4];
            self.stream.read_exact(&mut body).await?;
            Ok::<_, std::io::Error>((kind, body))
        };
        within(read).await.ok()
    }

    /// Messages up to one of this type.
    async fn until(&mut self, kind: u8) -> Vec<(u8, Vec<u8>)> {
        let mut messages = Vec::new();
        loop {
            let message = self.message().await.expect("the connection ended");
            messages.push(message);
            if messages.last().is_some_and(|(last, _)| *last == kind) {
                return messages;
            }
        }
    }

    async fn query(&mut self, text: &str) {
        self.send(b'Q', &[text.as_bytes(), &[0]].concat()).await;
    }

    async fn start(&mut self, from: Lsn) {
        self.query(&format!("START_REPLICATION {from} TIMELINE 1")).await;
        assert_eq!(self.message().await.expect("answer"), (b'W', vec![0, 0, 0]));
    }

    async fn said(&mut self) -> Said {
        let Some((kind, body)) = self.message().await else { return Said::Closed };
        let word = |at: usize| Lsn(u64::from_be_bytes(*body[at..].first_chunk().expect("word")));
        match (kind, body.first()) {
            (b'd', Some(b'w')) => Said::Wal { begin: word(1), wal: body[25..].to_vec() },
            (b'd', Some(b'k')) => Said::Keepalive { end: word(1), asks: body[17] != 0 },
            (b'c', _) => Said::Done,
            (b'E', _) => Said::Error(String::from_utf8_lossy(&body).replace('\0', " ")),
            other => panic!("unexpected {other:?}"),
        }
    }

    /// WAL from here up to there.
    async fn wal(&mut self, from: Lsn, to: Lsn) -> Vec<u8> {
        let mut bytes = Vec::new();
        while from + (bytes.len() as u64) < to {
            match self.said().await {
                Said::Wal { begin, wal } => {
                    assert_eq!(begin, from + bytes.len() as u64, "WAL follows on WAL");
                    bytes.extend_from_slice(&wal);
                }
                Said::Keepalive { .. } => {}
                other => panic!("{other:?} in place of WAL"),
            }
        }
        assert_eq!(from + bytes.len() as u64, to);
        bytes
    }

    /// Says that everything up to `lsn` is durable; `asks` for an answer.
    async fn feedback(&mut self, lsn: Lsn, asks: bool) {
        let lsn = lsn.0.to_be_bytes();
        self.send(b'd', &[&b"r"[..], &lsn, &lsn, &lsn, &[0; 8], &[u8::from(asks)]].concat()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_is_sent_the_branch_from_its_segments_start_and_what_comes() {
    let cluster = Cluster::never_idle(3).await;
    let mut compute = cluster.elect().await;
    let end = compute.commit(200, 3000).await;
    cluster.until(0, |status| status.commit_lsn == end).await;
    let mut raw = Raw::log_in(&cluster, 0, &reader_token(&cluster)).await;
    raw.query("IDENTIFY_SYSTEM").await;
    let row = raw.until(b'Z').await.into_iter().find(|(kind, _)| *kind == b'D').expect("a row").1;
    let mut expected = vec![0, 4];
    for text in [SYSTEM.to_string(), "1".to_owned(), end.to_string()] {
        expected.extend_from_slice(&(text.len() as u32).to_be_bytes());
        expected.extend_from_slice(text.as_bytes());
    }
    expected.extend_from_slice(&[0xFF; 4]);
    assert_eq!(row, expected);

    raw.start(START.segment_start()).await;
    let before = raw.wal(START.segment_start(), START).await;
    let long = wal::v15::wal::page_header(START.segment_start(), 0, SYSTEM);
    assert_eq!(before[..long.len()], long);
    assert!(before[long.len()..START.page_start().segment_offset() as usize].iter().all(|byte| *byte == 0));
    assert!(raw.wal(START, end).await == compute.written, "all of the branch's WAL, byte by byte");

    let next = compute.commit(3, 100).await;
    let written = compute.written.len();
    assert!(raw.wal(end, next).await == compute.written[written - (next.0 - end.0) as usize..]);
    raw.feedback(next, true).await;
    assert_eq!(raw.said().await, Said::Keepalive { end: next, asks: false });
    // Enough; then something else.
    raw.send(b'c', &[]).await;
    let messages = raw.until(b'Z').await;
    let kinds: Vec<u8> = messages.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, *b"cCCZ");
    raw.query("SHOW wal_segment_size").await;
    assert!(raw.until(b'Z').await.iter().any(|(kind, body)| *kind == b'D' && body.ends_with(b"16MB")));
    raw.start(end).await;
    assert_eq!(raw.wal(end, next).await.len() as u64, next.0 - end.0);
    raw.send(b'X', &[]).await;
    assert_eq!(raw.said().await, Said::Closed);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_committed_is_sent() {
    let mut cluster = Cluster::never_idle(3).await;
    let mut compute = cluster.elect().await;
    let end = compute.commit(3, 100).await;
    cluster.until(0, |status| status.commit_lsn == end).await;
    let mut raw = Raw::log_in(&cluster, 0, &reader_token(&cluster)).await;
    raw.start(START).await;
    raw.wal(START, end).await;
    cluster.stop(1).await;
    cluster.stop(2).await;
    let uncommitted = compute.write(100).expect("append");
    cluster.until(0, |status| status.flush_lsn == uncommitted).await;
    raw.feedback(end, true).await;
    assert_eq!(raw.said().await, Said::Keepalive { end, asks: false }, "one of three has it");
    cluster.run(1).await;
    within(compute.proposer.wait_committed(uncommitted)).await.expect("commit");
    assert_eq!(raw.wal(end, uncommitted).await.len() as u64, uncommitted.0 - end.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_opens_its_branch_for_reading_and_nothing_else() {
    let cluster = Cluster::never_idle(3).await;
    let mut compute = cluster.elect().await;
    let end = compute.commit(3, 100).await;
    cluster.until(0, |status| status.commit_lsn == end).await;
    let identified = format!("{SYSTEM}|1|{end}|");
    let own = cluster.branch.clone();
    for scope in [Scope::WalReader { branch: own.clone() }, Scope::Branch { branch: own.clone() }, Scope::Service] {
        assert_eq!(answered(&conninfo(&cluster, &[0], &cluster.token(scope)), "IDENTIFY_SYSTEM").await, identified);
    }
    let others = [
        Scope::WalReader { branch: branch("other") },
        Scope::Branch { branch: branch("other") },
        Scope::Project { project: own.project.clone() },
    ];
    let others = others.map(|scope| cluster.token(scope)).into_iter().chain(["nonsense".to_owned()]);
    for token in others {
        // A wrong password says so at once: the next host would say the same.
        let said = refused(&conninfo(&cluster, &[0, 1], &token), "IDENTIFY_SYSTEM").await;
        assert!(said.contains("FATAL") && !said.contains(&SYSTEM.to_string()), "{said}");
    }
    let mut raw = Raw::begin(cluster.replication_port(0), &[("user", &own.to_string()), ("replication", "true")]).await;
    raw.message().await.expect("a password is asked for");
    raw.send(b'p', b"nonsense\0").await;
    assert!(matches!(raw.said().await, Said::Error(said) if said.contains("28P01")));
    assert_eq!(raw.said().await, Said::Closed);

    // The safekeepers' own protocol takes it for nothing at all.
    let token = reader_token(&cluster);
    let mut config = cluster.proposer_config();
    config.token = token.clone();
    let refused = within(WalProposer::elect(config)).await;
    assert!(matches!(refused, Err(safekeeper_client::ElectError::Denied(_))));
    for asked in [
        safekeeper_client::branch_status(&cluster.address(0), &token, &own).await.err(),
        delete_branch(&cluster.address(0), &token, &own).await.err(),
        node_status(&cluster.address(0), &token).await.err(),
    ] {
        assert!(matches!(asked, Some(safekeeper_client::AdminError::Denied(_))), "{asked:?}");
    }
    let (read, write) = TcpStream::connect(cluster.address(0)).await.expect("connect").into_split();
    let mut writer = wire::FrameWriter::new(write);
    writer.send(&wire::Hello { version: wire::PROTOCOL_VERSION, token }).await.expect("send");
    let body = safekeeper_protocol::message::RequestBody::Read { from: START };
    writer.send(&safekeeper_protocol::message::Request { branch: own, body }).await.expect("send");
    let answer = within(wire::FrameReader::new(read).recv::<wire::HelloReply>()).await;
    assert!(matches!(answer, Ok(Some(wire::HelloReply::Denied(_)))));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_to_be_had_is_refused_with_the_reason() {
    let cluster = Cluster::never_idle(1).await;
    let mut compute = cluster.elect().await;
    let end = compute.commit(3, 100).await;
    let to = conninfo(&cluster, &[0], &reader_token(&cluster));
    for (command, state, word) in [
        ("CREATE_REPLICATION_SLOT s PHYSICAL", "0A000", "HINT"),
        ("DROP_REPLICATION_SLOT s", "0A000", "HINT"),
        ("START_REPLICATION SLOT s 0/0 TIMELINE 1", "0A000", "primary_slot_name"),
        ("START_REPLICATION SLOT s LOGICAL 0/0", "0A000", "HINT"),
        ("BASE_BACKUP", "0A000", "endpoint"),
        ("SELECT 1", "0A000", "endpoint"),
        ("TIMELINE_HISTORY 2", "58P01", "timeline 2"),
        ("START_REPLICATION 0/1000000 TIMELINE 2", "22023", "timeline 2"),
        ("START_REPLICATION 0/0 TIMELINE 1", "58P01", "000000010000000000000000 has already been removed"),
        ("START_REPLICATION 1/0 TIMELINE 1", "22023", "ahead"),
        ("SHOW no_such_thing", "42704", "no_such_thing"),
        ("NONSENSE", "42601", "syntax"),
    ] {
        let said = refused(&to, command).await;
        assert!(said.contains(state) && said.contains(word), "{command}: {said}");
    }
    assert_eq!(answered(&to, "SHOW wal_segment_size").await, "16MB");
    assert_eq!(answered(&to, "SHOW data_directory_mode").await, "0700");
    assert_eq!(answered(&to, "READ_REPLICATION_SLOT s").await, "||");
    assert_eq!(answered(&to, "IDENTIFY_SYSTEM").await, format!("{SYSTEM}|1|{end}|"));

    let port = cluster.replication_port(0);
    let user = cluster.branch.to_string();
    for (parameters, state) in [
        (vec![("user", user.as_str())], "0A000"),
        (vec![("user", user.as_str()), ("replication", "database")], "0A000"),
        (vec![("user", "postgres"), ("replication", "true")], "28000"),
        (vec![("user", "p/../x"), ("replication", "true")], "28000"),
    ] {
        let mut raw = Raw::begin(port, &parameters).await;
        assert!(matches!(raw.said().await, Said::Error(said) if said.contains(state)), "{parameters:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_too_many_bytes_are_hung_up_on() {
    let cluster = Cluster::never_idle(1).await;
    let mut compute = cluster.elect().await;
    compute.commit(3, 100).await;
    let port = cluster.replication_port(0);
    for bytes in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 64], &[0xFF; 64], b"\x00\x00\x00\x08\x00\x02\x00\x00", b"\0\0\0\x05x"]
    {
        let mut raw = Raw { stream: TcpStream::connect(("127.0.0.1", port)).await.expect("connect") };
        raw.stream.write_all(bytes).await.expect("send");
        let mut answer = Vec::new();
        // Either way to end will do: with bytes unread, the kernel resets the connection.
        let _ = within(raw.stream.read_to_end(&mut answer)).await;
        assert!(answer.is_empty() || answer[0] == b'E', "{answer:?}");
    }
    let token = reader_token(&cluster);
    for (kind, length) in [(b'Q', 20_000u32), (b'Q', 3), (b'Q', u32::MAX), (b'd', 0)] {
        let mut raw = Raw::log_in(&cluster, 0, &token).await;
        raw.stream.write_all(&[&[kind][..], &length.to_be_bytes(), &[0; 100]].concat()).await.expect("send");
        assert!(raw.message().await.is_none(), "a message of {length} bytes");
    }
    // It is as well as before.
    Raw::log_in(&cluster, 0, &token).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_silent_is_asked_and_cut_and_so_is_who_does_not_read() {
    let mut cluster = Cluster::never_idle(0).await;
    cluster.replication.replication_timeout_seconds = 2;
    cluster.join().await;
    cluster.membership = types::Membership::first(vec![cluster.member(0)]);
    let mut compute = cluster.elect().await;
    let end = compute.commit(3, 100).await;
    let token = reader_token(&cluster);
    let mut raw = Raw::log_in(&cluster, 0, &token).await;
    raw.start(end).await;
    let began = Instant::now();
    assert_eq!(raw.said().await, Said::Keepalive { end, asks: true });
    raw.feedback(end, false).await;
    assert_eq!(raw.said().await, Said::Keepalive { end, asks: true }, "asked again after the answer");
    assert_eq!(raw.said().await, Said::Closed);
    assert!(began.elapsed() > Duration::from_millis(2900), "cut after {:?}", began.elapsed());

    // Feedback comes, but nothing is read: more WAL than any socket's buffers hold.
    let mut raw = Raw::log_in(&cluster, 0, &token).await;
    raw.query(&format!("START_REPLICATION {START}")).await;
    for _ in 0..32 {
        compute.commit(1, 1 << 20).await;
    }
    let cut = async {
        loop {
            let lsn = end.0.to_be_bytes();
            let status = [&b"d\0\0\0\x26r"[..], &lsn, &lsn, &lsn, &[0; 8], &[0]].concat();
            if raw.stream.write_all(&status).await.is_err() {
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
    };
    within(cut).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn there_are_no_more_connections_than_allowed_and_a_stop_ends_them() {
    let mut cluster = Cluster::never_idle(0).await;
    cluster.replication.replication_connections = 1;
    cluster.join().await;
    cluster.join().await;
    cluster.membership = types::Membership::first(vec![cluster.member(0), cluster.member(1)]);
    let mut compute = cluster.elect().await;
    let end = compute.commit(3, 100).await;
    cluster.until(1, |status| status.commit_lsn == end).await;
    let token = reader_token(&cluster);
    let mut raw = Raw::log_in(&cluster, 0, &token).await;
    raw.start(end).await;
    let said = refused(&conninfo(&cluster, &[0], &token), "IDENTIFY_SYSTEM").await;
    assert!(said.contains("there are 1 connections"), "{said}");
    let identified = answered(&conninfo(&cluster, &[0, 1], &token), "IDENTIFY_SYSTEM").await;
    assert!(identified.starts_with(&SYSTEM.to_string()), "the next host takes it");
    cluster.stop(0).await;
    assert!(matches!(raw.said().await, Said::Error(said) if said.contains("57P01")));
    assert_eq!(raw.said().await, Said::Closed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_ends_with_its_token() {
    let cluster = Cluster::never_idle(1).await;
    let mut compute = cluster.elect().await;
    let end = compute.commit(3, 100).await;
    let scope = Scope::WalReader { branch: cluster.branch.clone() };
    let mut raw = Raw::log_in(&cluster, 0, &cluster.token_for(scope, Duration::from_secs(3))).await;
    raw.start(end).await;
    assert!(matches!(raw.said().await, Said::Error(said) if said.contains("28000") && said.contains("expired")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_branch_is_an_error_and_a_rotten_one_sends_clients_on() {
    let mut cluster = Cluster::never_idle(3).await;
    let mut compute = cluster.elect().await;
    let end = compute.commit(3, 100).await;
    for index in 0..3 {
        cluster.until(index, |status| status.commit_lsn == end).await;
    }
    let token = reader_token(&cluster);
    // Safekeeper 1 can't read its files.
    cluster.stop(0).await;
    std::fs::write(cluster.branch_dir(0).join("control"), [0xEE; 4096]).expect("damage");
    cluster.run(0).await;
    let said = refused(&conninfo(&cluster, &[0], &token), "IDENTIFY_SYSTEM").await;
    assert!(said.contains("can't be used"), "{said}");
    let identified = answered(&conninfo(&cluster, &[0, 1, 2], &token), "IDENTIFY_SYSTEM").await;
    assert_eq!(identified, format!("{SYSTEM}|1|{end}|"), "the next host takes it");

    let mut raw = Raw::log_in(&cluster, 1, &token).await;
    raw.start(end).await;
    let service = cluster.token(Scope::Service);
    delete_branch(&cluster.address(1), &service, &cluster.branch).await.expect("delete");
    assert!(matches!(raw.said().await, Said::Error(said) if said.contains("has been deleted")));
    let said = refused(&conninfo(&cluster, &[1], &token), "IDENTIFY_SYSTEM").await;
    assert!(said.contains("has been deleted"), "{said}");
    // One that has never been heard of leaves nothing behind.
    let scope = Scope::WalReader { branch: branch("none") };
    let none = conninfo(&cluster, &[2], &cluster.token(scope)).replace("user=p/main", "user=p/none");
    let said = refused(&none, "IDENTIFY_SYSTEM").await;
    assert!(said.contains("none of the branch's WAL yet"), "{said}");
    assert!(!cluster.data_dir(2).join("p/none").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_system_identifier_is_never_made_up() {
    let cluster = Cluster::never_idle(1).await;
    let mut config = cluster.proposer_config();
    config.system_identifier = None;
    let (proposer, _) = within(WalProposer::elect(config)).await.expect("elect");
    let mut compute = harness::Compute::of(proposer);
    compute.commit(3, 100).await;
    let to = conninfo(&cluster, &[0], &reader_token(&cluster));
    let said = refused(&to, "IDENTIFY_SYSTEM").await;
    assert!(said.contains("does not know the branch's system identifier"), "{said}");
    // It stands in the WAL once there is a segment's first page.
    let mut last = compute.end;
    while last.segment_number() == START.segment_number() {
        last = compute.commit(1, 1 << 20).await;
    }
    assert_eq!(answered(&to, "IDENTIFY_SYSTEM").await, format!("{SYSTEM}|1|{last}|"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_identifier_that_a_compute_tells_later_is_remembered() {
    let mut cluster = Cluster::never_idle(1).await;
    let mut config = cluster.proposer_config();
    config.system_identifier = None;
    let (proposer, _) = within(WalProposer::elect(config)).await.expect("elect");
    let mut compute = harness::Compute::of(proposer);
    compute.proposer.identify(SYSTEM).expect("leads");
    let end = compute.commit(3, 100).await;
    compute.proposer.clone().finish().await;
    drop(compute.proposer);
    cluster.stop(0).await;
    cluster.run(0).await;
    let to = conninfo(&cluster, &[0], &reader_token(&cluster));
    assert_eq!(answered(&to, "IDENTIFY_SYSTEM").await, format!("{SYSTEM}|1|{end}|"));
}

#[tokio::test(flavor = "multi_thread")]
async fn wal_that_is_not_here_any_more_comes_from_the_object_store_until_it_is_gone() {
    let dir = tempfile::tempdir().expect("dir");
    let store: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(dir.path()).expect("store"));
    let cluster = Cluster::offloading(3, store).await;
    let mut compute = cluster.elect().await;
    let mut end = compute.end;
    while end.segment_number() < START.segment_number() + 2 {
        end = compute.commit(1, 1 << 20).await;
    }
    let written = std::mem::take(&mut compute.written);
    compute.proposer.clone().finish().await;
    drop(compute.proposer);
    cluster.until(0, |status| status.log_start_lsn == end).await;
    assert_eq!(cluster.wal_bytes(0), 0, "nothing is left here");
    let token = reader_token(&cluster);
    let mut raw = Raw::log_in(&cluster, 0, &token).await;
    raw.start(START.segment_start()).await;
    raw.wal(START.segment_start(), START).await;
    assert!(raw.wal(START, end).await == written);

    cluster.remove_branch(&cluster.branch).await;
    let mut raw = Raw::log_in(&cluster, 0, &token).await;
    let second = Lsn(START.segment_start().0 + WAL_SEGMENT_BYTES);
    raw.start(second).await;
    let said = raw.said().await;
    let removed = format!("{} has already been removed", second.segment_file_name());
    assert!(matches!(&said, Said::Error(said) if said.contains("58P01") && said.contains(&removed)), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pg_receivewal_follows_the_safekeepers_while_one_after_the_other_is_down() {
    let mut cluster = Cluster::never_idle(3).await;
    let mut compute = cluster.elect().await;
    compute.commit(10, 1000).await;
    let archive = tempfile::tempdir().expect("dir");
    let mut receiver = receive(&conninfo(&cluster, &[0, 1, 2], &reader_token(&cluster)), archive.path());
    for round in 0..6 {
        let down = round % 3;
        cluster.stop(down).await;
        let mut end = compute.commit(40, 100_000).await;
        if round == 5 {
            // A segment is closed when the next one begins.
            while end.segment_offset() < 1000 {
                end = compute.commit(1, 1000).await;
            }
        }
        assert!(archived(archive.path(), end, &compute.written, &mut receiver).await, "round {round}");
        cluster.run(down).await;
        cluster.until(down, |status| status.commit_lsn == end).await;
    }
    let pid = nix::unistd::Pid::from_raw(receiver.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("signal");
    let status = tokio::task::spawn_blocking(move || receiver.wait()).await.expect("task").expect("wait");
    assert!(status.success(), "{status} after CopyDone");
    assert!(archive.path().join(START.segment_file_name()).exists(), "a whole segment has been closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_certificate_nobody_is_let_in_without_tls() {
    let files = tempfile::tempdir().expect("dir");
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("certificate");
    let (cert, key) = (files.path().join("cert.pem"), files.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).expect("write");
    std::fs::write(&key, made.signing_key.serialize_pem()).expect("write");
    let mut cluster = Cluster::never_idle(0).await;
    cluster.replication.replication_tls_cert = Some(cert.clone());
    cluster.replication.replication_tls_key = Some(key);
    cluster.join().await;
    cluster.membership = types::Membership::first(vec![cluster.member(0)]);
    let mut compute = cluster.elect().await;
    let mut end = compute.commit(3, 100).await;
    let told = node_status(&cluster.address(0), &cluster.token(Scope::Service)).await.expect("status");
    let address = format!("127.0.0.1:{}", cluster.replication_port(0));
    assert_eq!(told.replication.map(|told| (told.address, told.tls)), Some((address, true)));
    let to = conninfo(&cluster, &[0], &reader_token(&cluster));
    let said = refused(&to.replace("sslmode=prefer", "sslmode=disable"), "IDENTIFY_SYSTEM").await;
    assert!(said.contains("TLS only"), "{said}");
    let verified = format!("sslmode=verify-full sslrootcert={}", cert.display());
    let to = to.replace("host=127.0.0.1", "host=localhost hostaddr=127.0.0.1").replace("sslmode=prefer", &verified);
    assert_eq!(answered(&to, "IDENTIFY_SYSTEM").await, format!("{SYSTEM}|1|{end}|"));

    let archive = tempfile::tempdir().expect("dir");
    let mut receiver = receive(&to, archive.path());
    for _ in 0..3 {
        end = compute.commit(20, 100_000).await;
        assert!(archived(archive.path(), end, &compute.written, &mut receiver).await);
    }
    let _ = receiver.kill();
    let _ = receiver.wait();
}

/// A running `pg_receivewal` that tries again at once when a connection ends.
fn receive(conninfo: &str, archive: &Path) -> Child {
    let mut command = Command::new(e2e::pg_bin_dir().join("pg_receivewal"));
    command.args(["-d", conninfo, "--synchronous", "-s", "1", "-D"]).arg(archive).env("HOME", "/");
    let log = std::fs::File::create(archive.join("log")).expect("log");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("pg_receivewal")
}

/// Waits until an archive has the branch's WAL up to a position, byte by byte.
async fn archived(archive: &Path, end: Lsn, written: &[u8], receiver: &mut Child) -> bool {
    let has_it = || {
        let mut bytes = Vec::new();
        for number in START.segment_number()..=Lsn(end.0 - 1).segment_number() {
            let name = Lsn(number * WAL_SEGMENT_BYTES).segment_file_name();
            let whole = std::fs::read(archive.join(&name));
            bytes.extend(whole.or_else(|_| std::fs::read(archive.join(format!("{name}.partial")))).unwrap_or_default());
        }
        let begin = START.segment_offset() as usize;
        bytes.get(begin..begin + written.len()) == Some(written)
    };
    let began = Instant::now();
    while !has_it() {
        let log = || std::fs::read_to_string(archive.join("log")).unwrap_or_default();
        assert!(receiver.try_wait().expect("wait").is_none(), "pg_receivewal has ended: {}", log());
        if began.elapsed() > Duration::from_secs(60) {
            eprintln!("{}", log());
            return false;
        }
        sleep(Duration::from_millis(100)).await;
    }
    true
}
