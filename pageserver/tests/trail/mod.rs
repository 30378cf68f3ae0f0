//! WAL made record by record, and pages that grow by it: each record writes where the one before left off, so that one that is
//! missing, or that is applied twice or too early, shows.
#![allow(dead_code)]

use types::{Lsn, PAGE_BYTES, PageTag, XLOG_PAGE_BYTES};
use wal::{
    encode::{BlockToWrite, RecordToWrite, encode_record},
    v15::{
        rmgr,
        wal::{RECORD_HEADER_BYTES, bkpblock, page_header, record_crc},
        xlog,
    },
};

use crate::{faulty_store::Rng, reference::REL};

/// Pages that grow.
pub const TRAILS: usize = 3;
/// Of their page header.
const HEADER: usize = 24;

pub fn trail_tag(number: usize) -> PageTag {
    PageTag { rel: REL, block: 50 + number as u32 }
}

/// A page header, and all the rest in use.
pub fn fresh_page() -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    for at in [12, 14, 16] {
        page[at..at + 2].copy_from_slice(&(PAGE_BYTES as u16).to_le_bytes());
    }
    page[18..20].copy_from_slice(&(PAGE_BYTES as u16 | 4).to_le_bytes());
    page
}

/// WAL without a gap.
pub struct Wal {
    start: Lsn,
    bytes: Vec<u8>,
    /// Start of the last record.
    last: Lsn,
}

impl Wal {
    pub fn new(start: Lsn) -> Wal {
        Wal { start, bytes: Vec::new(), last: Lsn(8) }
    }

    pub fn end(&self) -> Lsn {
        self.start + self.bytes.len() as u64
    }

    pub fn since(&self, lsn: Lsn) -> &[u8] {
        &self.bytes[(lsn.0 - self.start.0) as usize..]
    }

    /// A small file of one byte, or none any more.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        let main_data = wal_redo::aux_file_main_data(path, content).expect("a path");
        self.append(&wal_redo::aux_file_record(&main_data));
    }

    pub fn image(&mut self, tag: PageTag, page: &[u8; PAGE_BYTES]) {
        let blocks = vec![BlockToWrite { tag, page }];
        self.append(&RecordToWrite { xid: 0, rmgr: rmgr::XLOG, info: xlog::FPI, main_data: &[], blocks });
    }

    fn append(&mut self, record: &RecordToWrite<'_>) {
        let encoded = encode_record(self.end(), self.last, 1, record);
        self.bytes.extend_from_slice(&encoded.bytes);
        self.last = encoded.start_lsn;
    }

    /// A generic record that overwrites a part of a page.
    fn overwrite(&mut self, tag: PageTag, offset: u16, content: &[u8]) {
        let mut raw = vec![0; RECORD_HEADER_BYTES];
        raw.extend_from_slice(&[0, tag.rel.fork as u8 | bkpblock::HAS_DATA]);
        raw.extend_from_slice(&(4 + content.len() as u16).to_le_bytes());
        for number in [tag.rel.spc, tag.rel.db, tag.rel.rel, tag.block] {
            raw.extend_from_slice(&number.to_le_bytes());
        }
        raw.extend_from_slice(&offset.to_le_bytes());
        raw.extend_from_slice(&(content.len() as u16).to_le_bytes());
        raw.extend_from_slice(content);
        // The header: length, xid, where the record before starts, info and resource manager, CRC.
        let length = (raw.len() as u32).to_le_bytes();
        raw[..4].copy_from_slice(&length);
        raw[8..16].copy_from_slice(&self.last.0.to_le_bytes());
        raw[17] = rmgr::GENERIC.0;
        let crc = record_crc(&raw).to_le_bytes();
        raw[20..24].copy_from_slice(&crc);
        let mut rest = raw.as_slice();
        while !rest.is_empty() {
            if self.end().page_offset() == 0 {
                let remaining = if rest.len() == raw.len() { 0 } else { rest.len() as u32 };
                self.bytes.extend_from_slice(&page_header(self.end(), remaining, 1));
            }
            if rest.len() == raw.len() {
                self.last = self.end();
            }
            let room = (XLOG_PAGE_BYTES - self.end().page_offset()) as usize;
            let (piece, left) = rest.split_at(room.min(rest.len()));
            self.bytes.extend_from_slice(piece);
            rest = left;
        }
        let padding = (self.end().align_up().0 - self.end().0) as usize;
        self.bytes.extend(std::iter::repeat_n(0, padding));
    }
}

/// What a branch's WAL does to the pages that grow.
#[derive(Default)]
pub struct Trails {
    steps: Vec<(Lsn, usize, Step)>,
}

enum Step {
    Fresh,
    Write { offset: usize, byte: u8 },
}

impl Trails {
    /// One more record for a page: the next two bytes, or a new start.
    pub fn step(&mut self, wal: &mut Wal, number: usize, rng: &mut Rng) {
        let step = match rng.below(300) {
            0 => {
                wal.image(trail_tag(number), &fresh_page());
                Step::Fresh
            }
            _ => {
                let offset = HEADER + 2 * (self.steps.len() % ((PAGE_BYTES - HEADER) / 2));
                let byte = rng.below(256) as u8;
                wal.overwrite(trail_tag(number), offset as u16, &[byte, !byte]);
                Step::Write { offset, byte }
            }
        };
        self.steps.push((wal.end(), number, step));
    }

    /// All that was done to a page up to `at`.
    pub fn apply(&self, number: usize, at: Lsn, page: &mut [u8; PAGE_BYTES]) {
        for (_, _, step) in self.steps.iter().filter(|(lsn, of, _)| *lsn <= at && *of == number) {
            match step {
                Step::Fresh => *page = fresh_page(),
                Step::Write { offset, byte } => page[*offset..offset + 2].copy_from_slice(&[*byte, !*byte]),
            }
        }
    }
}
