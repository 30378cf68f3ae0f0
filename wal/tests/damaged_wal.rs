//! Damaged and cut WAL: the decoder reports it and never panics, and never takes a damaged record for a whole one.

use std::convert::Infallible;

use dormouse_wal::{
    ForEachError, OwnedRecord, WalDecodeError, WalStreamDecoder,
    encode::{BlockToWrite, RecordToWrite, encode_record, record_start_at},
    v15::{rmgr, xlog},
};
use proptest::prelude::*;
use types::{Lsn, PAGE_BYTES, PageTag, RelTag, WAL_SEGMENT_BYTES, XLOG_PAGE_BYTES};

const SYSTEM: u64 = 42;
const BEGIN: Lsn = Lsn(3 * WAL_SEGMENT_BYTES - 40_000);

/// WAL with short records, long ones and page images, over a segment's end. Returns where each record ends.
fn wal() -> (Vec<u8>, Vec<Lsn>) {
    let page = [0x5A; PAGE_BYTES];
    let rel = RelTag { spc: 1663, db: 5, rel: 16_384, fork: types::ForkNumber::Main };
    let mut bytes = Vec::new();
    let mut ends = Vec::new();
    let (mut at, mut prev) = (BEGIN, Lsn(BEGIN.0 - 40));
    for index in 0..60usize {
        let main_data = vec![index as u8; index * index % 3000];
        let block = BlockToWrite { tag: PageTag { rel, block: index as u32 }, page: &page };
        let blocks = if index % 7 == 3 { vec![block, block] } else { Vec::new() };
        let (rmgr, info) = if index % 5 == 0 { (rmgr::XLOG, xlog::FPI) } else { (rmgr::LOGICALMSG, 0) };
        let record = RecordToWrite { xid: index as u32, rmgr, info, main_data: &main_data, blocks };
        let encoded = encode_record(at, prev, SYSTEM, &record);
        bytes.extend_from_slice(&encoded.bytes);
        (at, prev) = (encoded.end_lsn, encoded.start_lsn);
        ends.push(at);
    }
    (bytes, ends)
}

/// Feeds these bytes and takes all records that there are, by both ways of asking, which must agree.
fn drain(decoder: &mut WalStreamDecoder, bytes: &[u8]) -> (Vec<OwnedRecord>, Option<WalDecodeError>) {
    let mut other = decoder.clone();
    let (mut records, mut other_records) = (Vec::new(), Vec::new());
    decoder.feed(decoder.fed_until(), bytes);
    let error = loop {
        match decoder.poll_record() {
            Ok(Some(record)) => records.push(record.to_owned()),
            Ok(None) => break None,
            Err(error) => break Some(error),
        }
    };
    let other_end = other.feed_each(other.fed_until(), bytes, |record| {
        other_records.push(record.to_owned());
        Ok::<(), Infallible>(())
    });
    assert_eq!(other_end, error.clone().map_or(Ok(()), |error| Err(ForEachError::Decode(error))));
    assert_eq!(other_records, records);
    assert_eq!(other.position(), decoder.position());
    if error.is_none() {
        assert_eq!(other.fed_until(), decoder.fed_until());
    }
    (records, error)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pieces_of_any_size_give_the_same_records(sizes in prop::collection::vec(1usize..20_000, 1..40)) {
        let (bytes, ends) = wal();
        let mut decoder = WalStreamDecoder::new(BEGIN);
        let mut found = Vec::new();
        let (mut rest, mut sizes) = (bytes.as_slice(), sizes.iter().cycle());
        while !rest.is_empty() {
            let (piece, left) = rest.split_at((*sizes.next().expect("endless")).min(rest.len()));
            rest = left;
            let (records, error) = drain(&mut decoder, piece);
            prop_assert_eq!(error, None);
            found.extend(records.into_iter().map(|record| record.end_lsn));
        }
        prop_assert_eq!(found, ends);
    }

    #[test]
    fn a_changed_byte_never_makes_a_wrong_record(at in 0usize..190_000, with in 1u8..) {
        let (mut bytes, ends) = wal();
        let whole = drain(&mut WalStreamDecoder::new(BEGIN), &bytes).0;
        let at = at % bytes.len();
        bytes[at] ^= with;
        // Damage in the last records may look like records that are not whole yet, damage in padding like none.
        let (records, _) = drain(&mut WalStreamDecoder::new(BEGIN), &bytes);
        let whole_before = ends.iter().filter(|end| end.0 <= BEGIN.0 + at as u64).count();
        prop_assert!(records.len() >= whole_before);
        for (record, true_record) in records.iter().zip(&whole) {
            prop_assert_eq!(&record.raw, &true_record.raw);
            prop_assert_eq!(record.end_lsn, true_record.end_lsn);
        }
    }

    #[test]
    fn a_tail_that_is_not_written_yet_is_read_again(cut in 0usize..190_000) {
        let (bytes, ends) = wal();
        let cut = cut % bytes.len();
        let mut partly = bytes.clone();
        partly[cut..].fill(0);
        let mut decoder = WalStreamDecoder::new(BEGIN);
        let (first, error) = drain(&mut decoder, &partly);
        prop_assert!(error.is_some() || first.len() == ends.len());
        let whole_before = ends.iter().filter(|end| end.0 <= BEGIN.0 + cut as u64).count();
        prop_assert!(first.len() >= whole_before);
        decoder.rewind();
        let position = decoder.position();
        prop_assert_eq!(decoder.fed_until(), position);
        let (second, error) = drain(&mut decoder, &bytes[(position.0 - BEGIN.0) as usize..]);
        prop_assert_eq!(error, None);
        prop_assert_eq!(first.len() + second.len(), ends.len());
    }

    #[test]
    fn any_bytes_are_survived(start in 8u64..100_000, bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
        let mut decoder = WalStreamDecoder::new(Lsn(start));
        drain(&mut decoder, &bytes);
        let _ = dormouse_wal::decode_record(Lsn(start), Lsn(start + 8), &bytes);
    }

    /// Headers that say anything, behind a length that is right.
    #[test]
    fn any_record_headers_are_survived(mut bytes in prop::collection::vec(any::<u8>(), 24..600)) {
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        if let Ok(record) = dormouse_wal::decode_record(Lsn(64), Lsn(128), &bytes) {
            let images = record.blocks.iter().filter_map(|block| block.image.as_ref());
            for image in images {
                prop_assert!(usize::from(image.hole_offset) + usize::from(image.hole_length) <= PAGE_BYTES);
            }
        }
    }
}

#[test]
fn a_caller_that_stops_goes_on_behind_the_record_that_it_failed_on() {
    let (bytes, ends) = wal();
    let mut decoder = WalStreamDecoder::new(BEGIN);
    let mut found = Vec::new();
    loop {
        let rest = &bytes[(decoder.fed_until().0 - BEGIN.0) as usize..];
        let outcome = decoder.feed_each(decoder.fed_until(), rest, |record| Err::<(), Lsn>(record.end_lsn));
        match outcome {
            Err(ForEachError::Stopped(end)) => found.push(end),
            Err(ForEachError::Decode(error)) => panic!("{error}"),
            Ok(()) => break,
        }
    }
    assert_eq!(found, ends);
}

#[test]
fn zeroes_are_the_end_of_wal() {
    let mut decoder = WalStreamDecoder::new(Lsn(0x2000));
    decoder.feed(Lsn(0x2000), &[0; 8192]);
    assert_eq!(decoder.poll_record().expect_err("no WAL"), WalDecodeError::EndOfWal { at: Lsn(0x2000) });
    assert_eq!(decoder.poll_record().expect_err("still"), WalDecodeError::EndOfWal { at: Lsn(0x2000) });
}

#[test]
fn bytes_for_another_place_are_refused() {
    let mut decoder = WalStreamDecoder::new(Lsn(0x2000));
    decoder.feed(Lsn(0x2008), &[0; 8]);
    assert!(matches!(decoder.poll_record(), Err(WalDecodeError::Invalid { .. })));
}

#[test]
fn records_are_found_from_any_page_on() {
    let (bytes, ends) = wal();
    let whole = drain(&mut WalStreamDecoder::new(BEGIN), &bytes).0;
    let end = BEGIN.0 + bytes.len() as u64;
    let mut joined = 0;
    for page in (BEGIN.0.next_multiple_of(XLOG_PAGE_BYTES)..end).step_by(XLOG_PAGE_BYTES as usize).map(Lsn) {
        let rest = &bytes[(page.0 - BEGIN.0) as usize..];
        let expected: Vec<_> = whole.iter().filter(|record| record.start_lsn > page).collect();
        let mut decoder = WalStreamDecoder::at_page(page);
        // Cut within what is passed over, and read again.
        decoder.feed(page, &rest[..rest.len().min(100)]);
        assert!(decoder.poll_record().expect("valid").is_none());
        decoder.rewind();
        let read = (decoder.fed_until().0 - page.0) as usize;
        let (found, error) = drain(&mut decoder, &rest[read..]);
        assert_eq!(error, None, "from {page}");
        assert!(found.iter().eq(expected), "from {page}");
        assert_eq!(decoder.position(), ends[ends.len() - 1]);
        let in_record = whole.iter().any(|record| record.start_lsn < page && record.end_lsn > page);
        joined += usize::from(in_record);
        // Without being told that it may, it does not start inside a record.
        assert_eq!(drain(&mut WalStreamDecoder::new(page), rest).1.is_some(), in_record, "from {page}");
    }
    assert!(joined >= 5, "{joined}");
}

#[test]
fn a_switch_skips_to_the_next_segment() {
    let begin = Lsn(WAL_SEGMENT_BYTES + 0x100);
    let switch = RecordToWrite { xid: 0, rmgr: rmgr::XLOG, info: xlog::SWITCH, main_data: &[], blocks: Vec::new() };
    let noop = RecordToWrite { info: xlog::NOOP, ..switch.clone() };
    let first = encode_record(begin, Lsn(8), SYSTEM, &switch);
    let next_segment = Lsn(2 * WAL_SEGMENT_BYTES);
    let second = encode_record(next_segment, first.start_lsn, SYSTEM, &noop);
    let mut decoder = WalStreamDecoder::new(begin);
    decoder.feed(begin, &first.bytes);
    let record = decoder.poll_record().expect("valid").expect("whole").to_owned();
    assert_eq!((record.end_lsn, decoder.position()), (next_segment, next_segment));
    // Whatever stands in the rest of the segment is not looked at.
    while decoder.fed_until() < next_segment {
        let left = (next_segment.0 - decoder.fed_until().0).min(1_000_000);
        decoder.feed(decoder.fed_until(), &vec![0xEE; left as usize]);
        assert!(decoder.poll_record().expect("valid").is_none());
    }
    decoder.feed(next_segment, &second.bytes);
    let record = decoder.poll_record().expect("valid").expect("whole").to_owned();
    assert_eq!(record.start_lsn, record_start_at(next_segment));
    assert_eq!(decoder.last_record_start(), Some(record.start_lsn));
}
