//! Where records end in WAL that goes from one safekeeper to another.

use safekeeper_protocol::RecordScanner;
use types::Lsn;
use wal::stream::WalStreamDecoder;

/// Decodes WAL, checksums included.
#[derive(Debug)]
pub(super) struct WalScanner {
    decoder: WalStreamDecoder,
    boundary: Lsn,
}

impl RecordScanner for WalScanner {
    fn starting_at(start: Lsn) -> WalScanner {
        WalScanner { decoder: WalStreamDecoder::new(start), boundary: start }
    }

    fn feed(&mut self, wal: &[u8]) -> Result<Lsn, String> {
        self.decoder.feed(self.decoder.fed_until(), wal);
        while self.decoder.poll_record().map_err(|error| error.to_string())?.is_some() {}
        // A segment switch ends with its segment, whose rest may not be here yet: it counts with the bytes.
        if self.decoder.position() <= self.decoder.fed_until() {
            self.boundary = self.decoder.position();
        }
        Ok(self.boundary)
    }
}

#[cfg(test)]
mod tests {
    use types::WAL_SEGMENT_BYTES;
    use wal::{
        RmgrId,
        encode::{RecordToWrite, encode_record},
    };

    use super::*;

    const START: Lsn = Lsn(0x0150_0028);

    /// Some records, and where each ends.
    fn records(sizes: &[usize]) -> (Vec<u8>, Vec<Lsn>) {
        let (mut bytes, mut ends, mut at, mut prev) = (Vec::new(), Vec::new(), START, Lsn::INVALID);
        for size in sizes {
            let body = vec![7; *size];
            let record = RecordToWrite { xid: 0, rmgr: RmgrId(0), info: 0x20, main_data: &body, blocks: Vec::new() };
            let encoded = encode_record(at, prev, 1, &record);
            bytes.extend_from_slice(&encoded.bytes);
            (at, prev) = (encoded.end_lsn, encoded.start_lsn);
            ends.push(at);
        }
        (bytes, ends)
    }

    #[test]
    fn ends_of_records_are_found_wherever_the_bytes_are_cut() {
        let (bytes, ends) = records(&[10, 30_000, 200, 1, 9000]);
        for cut in [1, 7, 1000, 8192, 100_000] {
            let mut scanner = WalScanner::starting_at(START);
            let mut fed = START;
            for part in bytes.chunks(cut) {
                fed += part.len() as u64;
                let expected = ends.iter().copied().filter(|end| *end <= fed).max().unwrap_or(START);
                assert_eq!(scanner.feed(part), Ok(expected), "parts of {cut}, at {fed}");
            }
        }
    }

    #[test]
    fn damage_is_found() {
        let (mut bytes, _) = records(&[100, 100]);
        bytes[180] ^= 4;
        assert!(WalScanner::starting_at(START).feed(&bytes).expect_err("damaged").contains("checksum"));
    }

    #[test]
    fn a_switch_counts_once_its_segment_is_whole() {
        let switch = RecordToWrite { xid: 0, rmgr: RmgrId(0), info: 0x40, main_data: &[], blocks: Vec::new() };
        let encoded = encode_record(START, Lsn::INVALID, 1, &switch);
        let mut bytes = encoded.bytes.to_vec();
        let mut scanner = WalScanner::starting_at(START);
        let segment_end = START.segment_start() + WAL_SEGMENT_BYTES;
        let rest = (segment_end.0 - START.0) as usize - bytes.len();
        assert_eq!(scanner.feed(&bytes), Ok(START));
        bytes = vec![0; rest];
        let (last, most) = bytes.split_last().expect("a rest");
        assert_eq!(scanner.feed(most), Ok(START));
        assert_eq!(scanner.feed(&[*last]), Ok(segment_end));
    }
}
