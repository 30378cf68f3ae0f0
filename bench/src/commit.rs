//! Commits, beside a stock server that is as durable; and WAL into three safekeepers, beside three files.

use std::{
    io::Write,
    os::unix::fs::FileExt,
    path::Path,
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::Context;
use bytes::{Bytes, BytesMut};
use e2e::regress::Target;
use safekeeper::{Config, Server};
use safekeeper_client::{ProposerConfig, WalProposer};
use tokio_util::sync::CancellationToken;
use types::{BranchId, BranchRef, Lsn, Member, Membership, NodeId, ProjectId};
use wal::{
    RmgrId,
    encode::{RecordToWrite, encode_record},
};
use wire::{Scope, TokenSigner, auth::TokenKeys};

use crate::{
    Samples,
    peer::{Copies, Pair, median, pgbench},
};

const SETTINGS: &[(&str, &str)] = &[("shared_buffers", "48MB"), ("max_wal_size", "1GB"), ("wal_level", "replica")];
const START: Lsn = Lsn(0x0150_0028);
const MIB: usize = 1024 * 1024;
/// WAL that may be on the way before the bench waits for commits.
const AHEAD_BYTES: u64 = 16 * MIB as u64;

/// Commits `rounds` times `seconds` on both, in turn; then `wal_mib` of WAL.
pub async fn run(rounds: usize, seconds: u32, wal_mib: usize) -> anyhow::Result<()> {
    println!(
        "commit: one row per commit on a compute (three safekeepers) and on a stock server with ANY 1 of two pg_receivewal --synchronous"
    );
    let pair = Pair::start(SETTINGS, Copies::Two).await?;
    let targets = pair.targets();
    for target in &targets {
        e2e::stock::run(target.client("createdb")?.arg("commits"))?;
        e2e::stock::run(target.client("psql")?.args(["-qXc", "create table commits (a int)", "commits"]))?;
        pgbench(target, "commits", &["-i", "-q", "-s", "10"])?;
    }
    let (mut p50, mut p99, mut tps64, mut floors) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (duration, length) = (seconds.to_string(), Duration::from_secs(seconds.into()));
    for round in 1..=rounds {
        let mut seen = Vec::new();
        let without_sync = one_client(&targets[0], "off", length).await?.percentile_ms(50);
        let bare = bare_quorum(length)?.percentile_ms(50);
        for target in &targets {
            let alone = one_client(target, "on", length).await?;
            let tps = pgbench(target, "commits", &["-N", "-n", "-c", "64", "-j", "2", "-T", &duration])?;
            seen.push((alone.percentile_ms(50), alone.percentile_ms(99), tps));
        }
        let [(p50_stock, p99_stock, tps_stock), (p50_ours, p99_ours, tps_ours)] = seen[..] else { continue };
        println!(
            "round {round}: stock {p50_stock:.2}/{p99_stock:.2} ms, {tps_stock:.0} tps; dormouse {p50_ours:.2}/{p99_ours:.2} ms, {tps_ours:.0} tps"
        );
        println!(
            "round {round}: without waiting for a sync {without_sync:.2} ms, two of three bare files {bare:.2} ms"
        );
        floors.push((without_sync + bare) / p50_stock);
        p50.push(p50_ours / p50_stock);
        p99.push(p99_ours / p99_stock);
        tps64.push(tps_ours / tps_stock);
    }
    pair.stop().await?;
    let (mut speeds, mut ratios) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let wal = make_wal(wal_mib);
        let quorum = into_safekeepers(&wal).await?;
        let files = into_files(&wal)?;
        println!("WAL: three safekeepers {quorum:.0} MB/s, three files {files:.0} MB/s");
        speeds.push(quorum);
        ratios.push(quorum / files);
    }
    println!(
        "commit_p50_ratio={:.2} commit_floor_ratio={:.2} commit_p99_ratio={:.2} tps64_ratio={:.2} wal_mb_s={:.0} wal_ratio={:.2}",
        median(p50),
        median(floors),
        median(p99),
        median(tps64),
        median(speeds),
        median(ratios)
    );
    Ok(())
}

/// One session that inserts a row per transaction.
async fn one_client(target: &Target, synchronous_commit: &str, duration: Duration) -> anyhow::Result<Samples> {
    let mut config = tokio_postgres::Config::new();
    config.host_path(&target.host).user(e2e::stock::SUPERUSER).dbname("commits");
    let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    client.batch_execute(&format!("set synchronous_commit = {synchronous_commit}")).await?;
    let insert = client.prepare("insert into commits values ($1)").await?;
    let (mut samples, began, mut number) = (Vec::new(), Instant::now(), 0);
    while began.elapsed() < duration {
        let at = Instant::now();
        client.execute(&insert, &[&number]).await?;
        samples.push(at.elapsed());
        number += 1;
    }
    samples.sort();
    Ok(Samples(samples))
}

/// The least that a quorum of three files takes for a commit on this machine's disks: threads that write a commit's WAL over zeroes and sync,
/// until two have. The third goes on meanwhile, as a third safekeeper does.
fn bare_quorum(duration: Duration) -> anyhow::Result<Samples> {
    const WAL: [u8; 160] = [1; 160];
    let dir = tempfile::Builder::new().prefix("commit-").tempdir()?;
    let (done, acknowledged) = mpsc::channel();
    let mut files = Vec::new();
    for name in ["1", "2", "3"] {
        let file = std::fs::File::create(dir.path().join(name))?;
        file.write_all_at(&vec![0; 16 * MIB], 0)?;
        file.sync_all()?;
        let ((commit, commits), done) = (mpsc::channel::<u64>(), done.clone());
        std::thread::spawn(move || -> anyhow::Result<()> {
            for number in commits {
                file.write_all_at(&WAL, number * WAL.len() as u64 % (15 * MIB as u64))?;
                file.sync_data()?;
                done.send(number)?;
            }
            Ok(())
        });
        files.push(commit);
    }
    let (mut samples, began) = (Vec::new(), Instant::now());
    for number in (0u64..).take_while(|_| began.elapsed() < duration) {
        let at = Instant::now();
        files.iter().try_for_each(|file| file.send(number))?;
        let mut held = 0;
        while held < 2 {
            held += u32::from(acknowledged.recv_timeout(Duration::from_secs(10))? == number);
        }
        samples.push(at.elapsed());
    }
    samples.sort();
    Ok(Samples(samples))
}

/// Records of 8 KB in pieces of about a MiB, each ending with a whole record.
fn make_wal(mib: usize) -> Vec<Bytes> {
    let body: Vec<u8> = (0..8000u32).map(|i| (i * 31) as u8).collect();
    let (mut at, mut prev, mut pieces, mut piece) = (START, Lsn::INVALID, Vec::new(), BytesMut::new());
    while pieces.len() < mib {
        let record = RecordToWrite { xid: 0, rmgr: RmgrId(0), info: 0x20, main_data: &body, blocks: Vec::new() };
        let encoded = encode_record(at, prev, 1, &record);
        piece.extend_from_slice(&encoded.bytes);
        (at, prev) = (encoded.end_lsn, encoded.start_lsn);
        if piece.len() + 2 * body.len() > MIB {
            pieces.push(piece.split().freeze());
        }
    }
    pieces
}

/// MB/s into three safekeepers of this process, until a majority has synced all of it.
async fn into_safekeepers(wal: &[Bytes]) -> anyhow::Result<f64> {
    let dir = tempfile::Builder::new().prefix("commit-").tempdir()?;
    let keys = TokenKeys::generate()?;
    let token_public_key = dir.path().join("public.pem");
    std::fs::write(&token_public_key, &keys.public_pem)?;
    let branch = BranchRef { project: ProjectId::new("p")?, branch: BranchId::new("main")? };
    let token = TokenSigner::from_pem(&keys.private_pem)?.sign(Scope::Service, Duration::from_secs(3600))?;
    let (shutdown, mut safekeepers, mut tasks) = (CancellationToken::new(), Vec::new(), Vec::new());
    for id in 1..=3 {
        let mut config = Config::new(NodeId(id), dir.path().join(id.to_string()), token_public_key.clone());
        (config.listen, config.idle_seconds) = (([127, 0, 0, 1], 0).into(), 3600);
        let server = Server::bind(config).await?;
        safekeepers.push(Member { node: NodeId(id), address: server.local_addr().to_string() });
        tasks.push(tokio::spawn(server.run(shutdown.clone())));
    }
    let config = ProposerConfig {
        branch,
        membership: Membership::first(safekeepers),
        follows_membership: false,
        token,
        branch_start_lsn: START,
        system_identifier: Some(1),
    };
    let (proposer, _) = WalProposer::elect(config).await?;
    let (began, mut end) = (Instant::now(), START);
    for piece in wal {
        proposer.append(end, piece.clone())?;
        end += piece.len() as u64;
        proposer.wait_committed(Lsn(end.0.saturating_sub(AHEAD_BYTES))).await?;
    }
    proposer.wait_committed(end).await?;
    let speed = mb_per_second(wal, began);
    drop(proposer);
    shutdown.cancel();
    for task in tasks {
        task.await?;
    }
    Ok(speed)
}

/// MB/s into three files at once, each synced after every segment's worth.
fn into_files(wal: &[Bytes]) -> anyhow::Result<f64> {
    let dir = tempfile::Builder::new().prefix("commit-").tempdir()?;
    let began = Instant::now();
    std::thread::scope(|scope| {
        let writers: Vec<_> = (1..=3)
            .map(|id| dir.path().join(id.to_string()))
            .map(|path| scope.spawn(move || write(&path, wal)))
            .collect();
        writers.into_iter().try_for_each(|writer| writer.join().ok().context("a writer panicked")?)
    })?;
    Ok(mb_per_second(wal, began))
}

fn write(path: &Path, wal: &[Bytes]) -> anyhow::Result<()> {
    let mut file = std::fs::File::create(path)?;
    for segment in wal.chunks(16) {
        segment.iter().try_for_each(|piece| file.write_all(piece))?;
        file.sync_data()?;
    }
    Ok(())
}

fn mb_per_second(wal: &[Bytes], began: Instant) -> f64 {
    let bytes: usize = wal.iter().map(Bytes::len).sum();
    bytes as f64 / 1e6 / began.elapsed().as_secs_f64()
}
