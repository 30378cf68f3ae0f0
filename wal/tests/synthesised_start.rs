//! A stock server starts on WAL that holds nothing but a shutdown checkpoint of our making.

mod support;

use std::fs;

use dormouse_wal::{
    ControlFile, WalStreamDecoder,
    checkpoint::shutdown_record,
    encode::{BlockToWrite, EncodedRecord, RecordToWrite, encode_record, record_start_at, segment_with},
    v15::{rmgr, xlog},
};
use support::{Cluster, program, segments, succeed};
use types::{Lsn, PAGE_BYTES, PageTag, RelTag, WAL_SEGMENT_BYTES, XLOG_PAGE_BYTES};

#[test]
fn pg_control_is_read_and_written_byte_for_byte() {
    let cluster = Cluster::init();
    let bytes = fs::read(cluster.data().join("global/pg_control")).expect("pg_control");
    let control = ControlFile::parse(&bytes).expect("valid");
    assert!(control.is_shut_down());
    assert_eq!(control.to_bytes().as_slice(), bytes);
    assert_eq!({ control.checkpoint().redo }, control.checkpoint_lsn().0);
    let mut damaged = bytes.clone();
    damaged[40] ^= 1;
    assert!(ControlFile::parse(&damaged).is_err());
    assert!(ControlFile::parse(&bytes[..200]).is_err());
}

/// Starts a copy of a stopped cluster at `end_of_wal`, far from where its own WAL ended, and uses it.
fn start_at(original: &Cluster, end_of_wal: Lsn) {
    let mut cluster = original.copy();
    for file in segments(&cluster.wal_dir()) {
        fs::remove_file(file).expect("removed");
    }
    let bytes = fs::read(cluster.data().join("global/pg_control")).expect("pg_control");
    let mut control = ControlFile::parse(&bytes).expect("valid");
    let system_identifier = control.system_identifier();
    let checkpoint = control.checkpoint().for_shutdown_at(record_start_at(end_of_wal));
    let encoded = encode_record(end_of_wal, Lsn(end_of_wal.0 - 64), system_identifier, &shutdown_record(&checkpoint));
    control.set_shutdown_at(encoded.start_lsn, &checkpoint);
    cluster.write("global/pg_control", &control.to_bytes());
    for (name, mut content) in segment_with(&encoded, system_identifier) {
        content.resize(WAL_SEGMENT_BYTES as usize, 0);
        cluster.write(&format!("pg_wal/{name}"), &content);
    }
    let described = succeed(program("pg_controldata").arg(cluster.data()));
    assert!(described.contains("shut down"), "{described}");
    assert!(described.contains(&format!("Latest checkpoint location:           {}", encoded.start_lsn)), "{described}");
    assert!(!described.contains("WARNING"), "{described}");

    cluster.start();
    assert!(!cluster.log().contains("recovery"), "{}", cluster.log());
    assert_eq!(cluster.sql("SELECT sum(a) FROM t").trim(), "500500");
    cluster.sql("INSERT INTO t VALUES (1); CREATE TABLE after_start AS SELECT generate_series(1, 5000) a");
    assert_eq!(cluster.sql("SELECT sum(a) FROM t").trim(), "500501");
    cluster.stop("immediate");
    // What the server wrote continues the record.
    let mut decoder = WalStreamDecoder::new(end_of_wal);
    let mut count = 0;
    let mut at = end_of_wal;
    'wal: for file in segments(&cluster.wal_dir()) {
        let bytes = fs::read(&file).expect("a segment");
        let name = file.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
        if name < at.segment_file_name() {
            continue;
        }
        let rest = &bytes[at.segment_offset() as usize..];
        decoder.feed(at, rest);
        at += rest.len() as u64;
        loop {
            match decoder.poll_record() {
                Ok(Some(record)) if count == 0 => {
                    assert_eq!((record.start_lsn, record.end_lsn), (encoded.start_lsn, encoded.end_lsn));
                    count = 1;
                }
                Ok(Some(_)) => count += 1,
                Ok(None) => break,
                Err(_) => break 'wal,
            }
        }
    }
    assert!(count > 10, "only {count} records behind {end_of_wal}");
    cluster.start();
    assert_eq!(cluster.sql("SELECT sum(a) FROM t").trim(), "500501");
    cluster.stop("fast");
}

#[test]
fn a_server_starts_anywhere_in_the_wal() {
    let mut cluster = Cluster::init();
    cluster.configure(
        "fsync = off\nfull_page_writes = off\nwal_recycle = off\nwal_init_zero = off\nshared_buffers = 16MB",
    );
    cluster.start();
    cluster.sql("CREATE TABLE t AS SELECT generate_series(1, 1000) a");
    cluster.stop("fast");
    let segment = 9 * WAL_SEGMENT_BYTES;
    let positions = [
        ("in the middle of a page", segment + 3 * XLOG_PAGE_BYTES + 512),
        ("not on a multiple of 8, which is rounded up", segment + 3 * XLOG_PAGE_BYTES + 515),
        ("at the start of a page", segment + 7 * XLOG_PAGE_BYTES),
        ("at the start of a segment", segment),
        ("so that the record ends with its page", segment + 6 * XLOG_PAGE_BYTES - 120),
        ("so that the record goes on in the next page", segment + 5 * XLOG_PAGE_BYTES - 40),
        ("so that its header does", segment + 5 * XLOG_PAGE_BYTES - 8),
        ("so that the record goes on in the next segment", segment + WAL_SEGMENT_BYTES - 40),
        ("so that the record ends with its segment", segment + WAL_SEGMENT_BYTES - 120),
        ("beyond 4 GiB", 0x5_0000_1230),
    ];
    for (where_, position) in positions {
        println!("{where_}");
        start_at(&cluster, Lsn(position));
    }
}

#[test]
fn pg_waldump_reads_what_is_encoded() {
    let cluster = Cluster::empty();
    let dir = cluster.data().parent().expect("a parent").to_owned();
    let system_identifier = 0x1234_5678_9ABC_DEF0;
    let page = [0xA5; PAGE_BYTES];
    let long = vec![7; 100_000];
    let rel = RelTag { spc: 1663, db: 5, rel: 16_384, fork: types::ForkNumber::Fsm };
    let tag = |block| PageTag { rel, block };
    let block = |number| BlockToWrite { tag: tag(number), page: &page };
    let plain = |info, main_data, blocks| RecordToWrite { xid: 0, rmgr: rmgr::XLOG, info, main_data, blocks };
    let records = [
        plain(xlog::NOOP, b"", vec![]),
        plain(xlog::FPI, b"", vec![block(0), block(77)]),
        plain(xlog::NOOP, &long, vec![]),
        plain(xlog::RESTORE_POINT, &[0; 72], vec![]),
    ];
    // pg_waldump looks for the first record from the start of the page.
    let begin = Lsn(2 * WAL_SEGMENT_BYTES - XLOG_PAGE_BYTES);
    let whole = chain(begin, system_identifier, &records);
    for (name, mut content) in segment_with(&whole, system_identifier) {
        content.resize(WAL_SEGMENT_BYTES as usize, 0);
        fs::write(dir.join(name), content).expect("written");
    }
    let mut command = program("pg_waldump");
    let shown =
        command.arg("-p").arg(&dir).args(["-s", &begin.to_string()]).args(["-n", "4"]).output().expect("it runs");
    let text = String::from_utf8_lossy(&shown.stdout);
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("rmgr: ")).collect();
    assert_eq!(lines.len(), 4, "{text} {}", String::from_utf8_lossy(&shown.stderr));
    assert!(lines[1].contains("rel 1663/5/16384 fork fsm blk 77 FPW"), "{}", lines[1]);
    assert!(lines[3].contains("RESTORE_POINT"), "{}", lines[3]);

    let mut decoder = WalStreamDecoder::new(begin);
    for piece in whole.bytes.chunks(999) {
        decoder.feed(decoder.fed_until(), piece);
    }
    for (index, written) in records.iter().enumerate() {
        let record = decoder.poll_record().expect("valid").expect("whole");
        assert_eq!((record.rmgr, record.info), (written.rmgr, written.info), "record {index}");
        assert_eq!(record.main_data, written.main_data);
        let tags: Vec<_> = record.blocks.iter().map(|block| block.tag()).collect();
        assert_eq!(tags, written.blocks.iter().map(|block| block.tag).collect::<Vec<_>>());
        assert!(record.blocks.iter().all(|block| block.applies_image()));
    }
    assert!(matches!(decoder.poll_record(), Ok(None)));
    assert_eq!(decoder.position(), whole.end_lsn);
}

/// Records one behind the other.
fn chain(begin: Lsn, system_identifier: u64, records: &[RecordToWrite<'_>]) -> EncodedRecord {
    let mut bytes = Vec::new();
    let (mut at, mut prev) = (begin, Lsn(begin.0 - 40));
    for record in records {
        let encoded = encode_record(at, prev, system_identifier, record);
        assert_eq!(encoded.begin + encoded.bytes.len() as u64, encoded.end_lsn);
        bytes.extend_from_slice(&encoded.bytes);
        (at, prev) = (encoded.end_lsn, encoded.start_lsn);
    }
    EncodedRecord { start_lsn: record_start_at(begin), end_lsn: at, begin, bytes: bytes.into() }
}
