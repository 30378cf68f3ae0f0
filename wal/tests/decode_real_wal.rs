//! The decoder against `pg_waldump`, on WAL that a stock server wrote.

mod support;

use std::fs;

use dormouse_wal::{DecodedRecord, OwnedRecord, WalDecodeError, WalStreamDecoder, v15::rmgr};
use support::{Cluster, WORKLOAD, program, segments, succeed};
use types::{Lsn, PageTag};

/// A record as far as `pg_waldump` shows it.
#[derive(Debug, PartialEq, Eq)]
struct Shown {
    rmgr: String,
    bytes_without_images: usize,
    bytes: usize,
    xid: u32,
    start: Lsn,
    prev: Lsn,
    /// Pages, each with whether it has an image.
    pages: Vec<(PageTag, bool)>,
}

#[test]
fn every_record_is_found_as_pg_waldump_finds_it() {
    let mut cluster = Cluster::init();
    cluster.configure(
        "wal_level = logical\nmax_prepared_transactions = 10\nwal_keep_size = 1GB\nmax_wal_size = 2GB\n\
         track_commit_timestamp = on\nshared_buffers = 16MB\nfsync = off",
    );
    cluster.start();
    cluster.sql(WORKLOAD);
    succeed(cluster.client("pgbench").args(["-i", "-q", "-s", "1", "postgres"]));
    succeed(cluster.client("pgbench").args(["-c", "4", "-j", "2", "-t", "200", "-n", "postgres"]));
    cluster.stop("fast");

    let files = segments(&cluster.wal_dir());
    let shown = waldump(&cluster, &files);
    assert!(shown.len() > 10_000, "{} records", shown.len());
    let start = shown[0].start;
    let (owned, end) = decode(&files, start);
    let decoded: Vec<_> = owned.iter().map(|record| record.decode().expect("a good record")).collect();
    assert!(matches!(end, WalDecodeError::EndOfWal { .. }), "{end}");
    for (decoded, shown) in decoded.iter().zip(&shown) {
        assert_eq!(&as_shown(decoded), shown);
    }
    assert_eq!(decoded.len(), shown.len());
    // Each record ends where the next one starts, but for a page header between them.
    for pair in decoded.windows(2) {
        assert_eq!(dormouse_wal::encode::record_start_at(pair[0].end_lsn), pair[1].start_lsn);
    }
    let kinds: std::collections::BTreeSet<_> = decoded.iter().map(|record| record.rmgr.0).collect();
    println!("{} records in {} segments, of resource managers {kinds:?}", decoded.len(), files.len());
    let images = decoded.iter().flat_map(|record| &record.blocks).filter_map(|block| block.image.as_ref());
    let compressions: std::collections::HashSet<_> = images.map(|image| format!("{:?}", image.compression)).collect();
    assert_eq!(compressions.len(), 4, "{compressions:?}");
}

/// Feeds the files in pieces of an awkward size.
fn decode(files: &[std::path::PathBuf], start: Lsn) -> (Vec<OwnedRecord>, WalDecodeError) {
    let mut decoder = WalStreamDecoder::new(start);
    let mut records = Vec::new();
    let first = start.segment_start();
    for (index, file) in files.iter().enumerate() {
        let bytes = fs::read(file).expect("a segment");
        let at = first + index as u64 * types::WAL_SEGMENT_BYTES;
        assert_eq!(file.file_name().expect("a name").to_str(), Some(at.segment_file_name().as_str()));
        let skipped = if index == 0 { start.segment_offset() as usize } else { 0 };
        let mut piece_at = at + skipped as u64;
        for piece in bytes[skipped..].chunks(12_345) {
            decoder.feed(piece_at, piece);
            piece_at += piece.len() as u64;
            loop {
                match decoder.poll_record() {
                    Ok(Some(record)) => records.push(record.to_owned()),
                    Ok(None) => break,
                    Err(error) => return (records, error),
                }
            }
        }
    }
    panic!("the WAL has no end")
}

fn as_shown(record: &DecodedRecord<'_>) -> Shown {
    let images: usize =
        record.blocks.iter().filter_map(|block| block.image.as_ref()).map(|image| image.bytes.len()).sum();
    Shown {
        rmgr: rmgr::name(record.rmgr).expect("a known resource manager").to_owned(),
        bytes_without_images: record.raw.len() - images,
        bytes: record.raw.len(),
        xid: record.xid,
        start: record.start_lsn,
        prev: record.prev_lsn,
        pages: record.blocks.iter().map(|block| (block.tag(), block.image.is_some())).collect(),
    }
}

fn waldump(cluster: &Cluster, files: &[std::path::PathBuf]) -> Vec<Shown> {
    let (first, last) = (&files[0], &files[files.len() - 1]);
    // It ends with an error, where the WAL ends.
    let output = program("pg_waldump").arg("-p").arg(cluster.wal_dir()).arg(first).arg(last).output().expect("it runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("invalid record length") || errors.is_empty(), "{errors}");
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().filter(|line| line.starts_with("rmgr: ")).map(parse_line).collect()
}

/// `rmgr: Heap  len (rec/tot): 54/ 54, tx: 1, lsn: 0/01, prev 0/01, desc: …, blkref #0: rel 1/2/3 fork vm blk 4 FPW`
fn parse_line(line: &str) -> Shown {
    let after = |key: &str| line.split_once(key).unwrap_or_else(|| panic!("{key} in {line}")).1.trim_start();
    let word = |key: &str| after(key).split([' ', ',', '/']).next().expect("a word").to_owned();
    let (without_images, rest) = after("len (rec/tot):").split_once('/').expect("two lengths");
    let bytes = rest.trim_start().split(',').next().expect("a length").parse().expect("a number");
    let lsn = |key: &str| after(key).split(',').next().expect("an LSN").parse().expect("an LSN");
    Shown {
        rmgr: word("rmgr:"),
        bytes_without_images: without_images.trim().parse().expect("a number"),
        bytes,
        xid: word("tx:").parse().expect("an xid"),
        start: lsn("lsn:"),
        prev: lsn(", prev"),
        pages: line.split(", blkref #").skip(1).map(parse_page).collect(),
    }
}

fn parse_page(text: &str) -> (PageTag, bool) {
    let words: Vec<&str> = text.split_whitespace().collect();
    let number = |text: &str| text.parse().expect("a number");
    let rel: Vec<u32> = words[2].split('/').map(number).collect();
    let fork = match words[3..] {
        ["fork", name, ..] => name,
        _ => "main",
    };
    let fork = types::ForkNumber::ALL
        .into_iter()
        .find(|known| known.suffix().trim_start_matches('_') == fork || (fork == "main" && known.suffix().is_empty()));
    let block = words.iter().position(|word| *word == "blk").map(|at| number(words[at + 1])).expect("a block");
    let rel = types::RelTag { spc: rel[0], db: rel[1], rel: rel[2], fork: fork.expect("a fork") };
    (PageTag { rel, block }, words.contains(&"FPW"))
}
