//! Arbitrary records over arbitrary pages: an error or some page, never a panic, and never much memory. `PROPTEST_CASES=1000000`
//! for a long run.

use dormouse_wal_redo::{SlruKind, changes, checkpoint, redo_page, redo_slru_page, restore_image};
use peak_alloc::PeakAlloc;
use proptest::{collection::vec, prelude::*, sample::select};
use types::{ForkNumber, Lsn, PAGE_BYTES, PageTag, RelTag};
use wal::{
    BlockRef, CheckPoint, DecodedRecord, RmgrId, WalStreamDecoder, decode_record,
    record::{BlockImage, ImageCompression},
};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// What one case may take at most beyond what it began with, in both tests together: more than any page or record of a case needs,
/// far less than a length that is believed too soon would ask for.
const CASE_MAX_BYTES: usize = 2 << 20;

const REL: RelTag = RelTag { spc: 1663, db: 5, rel: 16384, fork: ForkNumber::Main };

/// Small numbers are what counts, lengths and offsets mostly mean: half of all bytes are small.
fn data(limit: usize) -> impl Strategy<Value = Vec<u8>> {
    vec(prop_oneof![0u8..8, any::<u8>()], 0..limit)
}

/// What a [`DecodedRecord`] borrows.
#[derive(Clone, Debug)]
struct Record {
    rmgr: u8,
    info: u8,
    xid: u32,
    blocks: Vec<Block>,
    main_data: Vec<u8>,
}

/// A block reference without its bytes, and the bytes.
#[derive(Clone, Debug)]
struct Block {
    reference: BlockRef<'static>,
    image: Option<(BlockImage<'static>, Vec<u8>)>,
    data: Vec<u8>,
}

impl Record {
    fn borrowed(&self) -> DecodedRecord<'_> {
        DecodedRecord {
            start_lsn: Lsn(0x100),
            end_lsn: Lsn(0x200),
            prev_lsn: Lsn(0x80),
            xid: self.xid,
            rmgr: RmgrId(self.rmgr),
            info: self.info,
            blocks: self.blocks.iter().map(Block::borrowed).collect(),
            main_data: &self.main_data,
            origin: None,
            raw: &[],
        }
    }
}

impl Block {
    fn borrowed(&self) -> BlockRef<'_> {
        let image = self.image.as_ref().map(|(image, bytes)| BlockImage { bytes, ..*image });
        BlockRef { image, data: &self.data, ..self.reference }
    }
}

fn image() -> impl Strategy<Value = (BlockImage<'static>, Vec<u8>)> {
    let compression =
        select(vec![ImageCompression::None, ImageCompression::Pglz, ImageCompression::Lz4, ImageCompression::Zstd]);
    (data(600), 0u16..9000, 0u16..9000, any::<bool>(), compression).prop_map(
        |(bytes, hole_offset, hole_length, apply, compression)| {
            (BlockImage { bytes: &[], hole_offset, hole_length, apply, compression }, bytes)
        },
    )
}

fn block(id: u8) -> impl Strategy<Value = Block> {
    let fork = prop_oneof![9 => Just(ForkNumber::Main), 1 => Just(ForkNumber::Vm)];
    (fork, 0u32..4, any::<bool>(), prop::option::weighted(0.1, image()), data(300)).prop_map(
        move |(fork, block, will_init, image, data)| {
            let rel = REL.with_fork(fork);
            let has_data = !data.is_empty();
            let reference = BlockRef { id, rel, block, will_init, image: None, has_data, data: &[] };
            Block { reference, image, data }
        },
    )
}

fn record() -> impl Strategy<Value = Record> {
    let blocks = (block(0), block(1), block(2), block(3)).prop_map(|(a, b, c, d)| vec![a, b, c, d]);
    (0u8..24, any::<u8>(), any::<u32>(), blocks, 0usize..5, data(200)).prop_map(
        |(rmgr, info, xid, mut blocks, count, main_data)| {
            blocks.truncate(count);
            Record { rmgr, info, xid, blocks, main_data }
        },
    )
}

/// A header of any sort, plausible line pointers more often than not, any content.
fn page() -> impl Strategy<Value = Box<[u8; PAGE_BYTES]>> {
    let header = (0u16..300, 0u16..8300, select(vec![8192u16, 8184, 8176, 0, 77]), any::<u64>());
    (header, vec(any::<u32>(), 0..40), prop_oneof![Just(0u8), any::<u8>()]).prop_map(
        |((lower, upper, special, seed), pointers, fill)| {
            let mut page = Box::new([fill; PAGE_BYTES]);
            page[0..8].copy_from_slice(&seed.to_le_bytes());
            for (at, value) in [(12, lower), (14, upper), (16, special), (18, 0x2004)] {
                page[at..at + 2].copy_from_slice(&value.to_le_bytes());
            }
            for (index, pointer) in pointers.into_iter().enumerate() {
                page[24 + index * 4..28 + index * 4].copy_from_slice(&pointer.to_le_bytes());
            }
            page
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn redo_of_anything_on_anything(record in record(), page in page()) {
        let before = begin_case();
        let record = record.borrowed();
        // Whatever comes of it.
        drop(changes(&record));
        let mut counters = CheckPoint::from_bytes(&[1; 88]).expect("88 bytes");
        checkpoint::advance(&mut counters, &record);
        for block in &record.blocks {
            drop(redo_page(&mut page.clone(), &block.tag(), &record));
            drop(restore_image(block, &mut page.clone()));
        }
        for number in 0..2 {
            let tag = PageTag { rel: REL.with_fork(ForkNumber::Vm), block: number };
            drop(redo_page(&mut page.clone(), &tag, &record));
            for slru in SlruKind::ALL {
                drop(redo_slru_page(&mut page.clone(), slru, number, &record));
            }
        }
        prop_assert!(peak_since(before) < CASE_MAX_BYTES);
    }

    #[test]
    fn decoding_of_anything(bytes in vec(prop_oneof![0u8..8, any::<u8>(), 250u8..], 24..400), pieces in 1usize..5) {
        let before = begin_case();
        let mut bytes = bytes;
        let length = bytes.len() as u32;
        bytes[0..4].copy_from_slice(&length.to_le_bytes());
        if let Ok(record) = decode_record(Lsn(0x100), Lsn(0x200), &bytes) {
            drop(changes(&record));
        }
        let start = Lsn(0x0100_0028);
        let mut decoder = WalStreamDecoder::new(start);
        for piece in bytes.chunks(bytes.len().div_ceil(pieces)) {
            decoder.feed(decoder.fed_until(), piece);
            while let Ok(Some(record)) = decoder.poll_record() {
                drop(changes(&record));
            }
        }
        prop_assert!(peak_since(before) < CASE_MAX_BYTES);
    }
}

/// Bytes in use now; from here on the peak counts.
fn begin_case() -> usize {
    MEMORY.reset_peak_usage();
    MEMORY.current_usage()
}

fn peak_since(before: usize) -> usize {
    MEMORY.peak_usage().saturating_sub(before)
}

/// `PROPTEST_CASES` for a long run.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(20_000)
}
