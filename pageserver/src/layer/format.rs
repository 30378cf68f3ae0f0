//! The layer file: blocks of about 64 KiB, an index of them, a footer. Every byte is under one CRC32C or another.
//!
//! ```text
//! block*   LZ4 (or as it is, when that is not shorter); the entries in (key, LSN) order, each:
//!          key (18 bytes, big-endian) | LSN (u64) | length of the value (u32) | value
//! index    per block: first key (18) | first LSN (u64) | offset (u64) | stored length (u32) | plain length (u32) | CRC (u32)
//! footer   index offset (u64) | index length (u32) | index CRC (u32) | entries (u64) | version (u32) | magic (u32) | CRC (u32)
//! ```
//!
//! Numbers are little-endian unless said otherwise.

use bytes::{Buf, BufMut, Bytes};
use types::Lsn;

use crate::storage::{KEY_BYTES, Key, Value};

/// A block is closed when it has reached this many bytes before compression.
const BLOCK_TARGET_BYTES: usize = 64 * 1024;
/// Larger blocks are not believed (a single record may be large, but not so large).
const BLOCK_MAX_BYTES: usize = 1 << 30;
const FORMAT_VERSION: u32 = 1;
const MAGIC: u32 = u32::from_le_bytes(*b"DMLY");
const FOOTER_BYTES: usize = 36;
const INDEX_ENTRY_BYTES: usize = KEY_BYTES + 8 + 8 + 4 + 4 + 4;
const ENTRY_HEADER_BYTES: usize = KEY_BYTES + 8 + 4;

/// The file is not what was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct LayerDamage(pub String);

fn damage<T>(reason: impl Into<String>) -> Result<T, LayerDamage> {
    Err(LayerDamage(reason.into()))
}

/// Where a block is and how to check it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockHandle {
    /// Its first entry.
    pub first: (Key, Lsn),
    /// Where it starts in the file.
    pub offset: u64,
    /// Its length in the file.
    pub stored_bytes: u32,
    /// Its length once decompressed; equal to the above when it is stored as it is.
    pub plain_bytes: u32,
    crc: u32,
}

/// Makes a layer file in memory. Entries are added in strictly ascending (key, LSN) order.
#[derive(Default)]
pub struct LayerBuilder {
    file: Vec<u8>,
    block: Vec<u8>,
    block_first: Option<(Key, Lsn)>,
    first: Option<Key>,
    last: Option<(Key, Lsn)>,
    index: Vec<BlockHandle>,
    entries: u64,
}

/// A finished layer file.
pub struct BuiltLayer {
    /// The whole file.
    pub bytes: Bytes,
    /// Where the index starts.
    pub index_offset: u64,
    /// The smallest key.
    pub first_key: Key,
    /// The largest key.
    pub last_key: Key,
    /// How many values.
    pub entries: u64,
}

impl LayerBuilder {
    /// Adds an entry. Panics when it does not sort behind the one before: the caller's order is broken.
    pub fn add(&mut self, key: Key, lsn: Lsn, value: &Value) {
        assert!(self.last.is_none_or(|last| last < (key, lsn)), "layer entries out of order at {key} {lsn}");
        self.last = Some((key, lsn));
        self.first.get_or_insert(key);
        self.block_first.get_or_insert((key, lsn));
        self.block.put_slice(&key.encode());
        self.block.put_u64_le(lsn.0);
        let length_at = self.block.len();
        self.block.put_u32_le(0);
        value.encode_into(&mut self.block);
        let length = (self.block.len() - length_at - 4) as u32;
        self.block[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
        self.entries += 1;
        if self.block.len() >= BLOCK_TARGET_BYTES {
            self.close_block();
        }
    }

    /// Bytes of the finished blocks.
    pub fn bytes_so_far(&self) -> usize {
        self.file.len()
    }

    /// The file; `None` when nothing was added.
    pub fn finish(mut self) -> Option<BuiltLayer> {
        self.close_block();
        let (first_key, (last_key, _)) = (self.first?, self.last?);
        let index_offset = self.file.len() as u64;
        for block in &self.index {
            self.file.put_slice(&block.first.0.encode());
            self.file.put_u64_le(block.first.1.0);
            self.file.put_u64_le(block.offset);
            self.file.put_u32_le(block.stored_bytes);
            self.file.put_u32_le(block.plain_bytes);
            self.file.put_u32_le(block.crc);
        }
        let index = &self.file[index_offset as usize..];
        let (index_bytes, index_crc) = (index.len() as u32, crc32c::crc32c(index));
        let mut footer = Vec::with_capacity(FOOTER_BYTES);
        footer.put_u64_le(index_offset);
        footer.put_u32_le(index_bytes);
        footer.put_u32_le(index_crc);
        footer.put_u64_le(self.entries);
        footer.put_u32_le(FORMAT_VERSION);
        footer.put_u32_le(MAGIC);
        let crc = crc32c::crc32c(&footer);
        footer.put_u32_le(crc);
        self.file.extend_from_slice(&footer);
        Some(BuiltLayer { bytes: self.file.into(), index_offset, first_key, last_key, entries: self.entries })
    }

    fn close_block(&mut self) {
        let Some(first) = self.block_first.take() else { return };
        let compressed = lz4_flex::block::compress(&self.block);
        let stored = if compressed.len() < self.block.len() { &compressed } else { &self.block };
        self.index.push(BlockHandle {
            first,
            offset: self.file.len() as u64,
            stored_bytes: stored.len() as u32,
            plain_bytes: self.block.len() as u32,
            crc: crc32c::crc32c(stored),
        });
        self.file.extend_from_slice(stored);
        self.block.clear();
    }
}

/// A layer file's index.
#[derive(Debug)]
pub struct LayerIndex {
    /// The blocks in order; never empty.
    pub blocks: Vec<BlockHandle>,
    /// How many values the file holds.
    pub entries: u64,
}

impl LayerIndex {
    /// Reads the end of a file, from `index_offset` on.
    pub fn parse(tail: &[u8], index_offset: u64) -> Result<LayerIndex, LayerDamage> {
        let Some(index_bytes) = tail.len().checked_sub(FOOTER_BYTES) else { return damage("file is cut short") };
        let (index, mut footer) = tail.split_at(index_bytes);
        let crc = crc32c::crc32c(&footer[..FOOTER_BYTES - 4]);
        let (offset, length, index_crc) = (footer.get_u64_le(), footer.get_u32_le(), footer.get_u32_le());
        let (entries, version, magic, stored_crc) =
            (footer.get_u64_le(), footer.get_u32_le(), footer.get_u32_le(), footer.get_u32_le());
        if crc != stored_crc || magic != MAGIC {
            return damage("footer checksum mismatch");
        }
        if version != FORMAT_VERSION {
            return damage(format!("layer format {version}, this program reads {FORMAT_VERSION}"));
        }
        if offset != index_offset || length as usize != index_bytes || !index_bytes.is_multiple_of(INDEX_ENTRY_BYTES) {
            return damage("index is not where the manifest says");
        }
        if crc32c::crc32c(index) != index_crc {
            return damage("index checksum mismatch");
        }
        let blocks = index.chunks_exact(INDEX_ENTRY_BYTES).map(parse_index_entry).collect::<Result<Vec<_>, _>>()?;
        if blocks.is_empty() { damage("no blocks") } else { Ok(LayerIndex { blocks, entries }) }
    }

    /// The last block that may hold (key, LSN): the last whose first entry is not behind it.
    pub fn block_for(&self, key: Key, lsn: Lsn) -> Option<usize> {
        self.blocks.partition_point(|block| block.first <= (key, lsn)).checked_sub(1)
    }
}

fn parse_index_entry(mut bytes: &[u8]) -> Result<BlockHandle, LayerDamage> {
    let mut key = [0; KEY_BYTES];
    bytes.copy_to_slice(&mut key);
    let Some(key) = Key::decode(&key) else { return damage("unknown key in the index") };
    Ok(BlockHandle {
        first: (key, Lsn(bytes.get_u64_le())),
        offset: bytes.get_u64_le(),
        stored_bytes: bytes.get_u32_le(),
        plain_bytes: bytes.get_u32_le(),
        crc: bytes.get_u32_le(),
    })
}

/// A decompressed block.
pub struct Block {
    plain: Bytes,
    entries: Vec<BlockEntry>,
}

struct BlockEntry {
    key: Key,
    lsn: Lsn,
    value_at: u32,
    value_bytes: u32,
}

impl Block {
    /// Checks and decompresses.
    pub fn decode(stored: Bytes, handle: &BlockHandle) -> Result<Block, LayerDamage> {
        if stored.len() != handle.stored_bytes as usize || crc32c::crc32c(&stored) != handle.crc {
            return damage(format!("checksum mismatch in the block at {}", handle.offset));
        }
        let plain_bytes = handle.plain_bytes as usize;
        if plain_bytes > BLOCK_MAX_BYTES {
            return damage(format!("block at {} of {plain_bytes} bytes", handle.offset));
        }
        let plain = if handle.stored_bytes == handle.plain_bytes {
            stored
        } else {
            let plain = lz4_flex::block::decompress(&stored, plain_bytes);
            Bytes::from(plain.map_err(|e| LayerDamage(format!("block at {}: {e}", handle.offset)))?)
        };
        if plain.len() != plain_bytes {
            return damage(format!("block at {} has {} bytes, not {plain_bytes}", handle.offset, plain.len()));
        }
        let entries = parse_entries(&plain)?;
        Ok(Block { plain, entries })
    }

    /// How many entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True without entries (which no builder writes).
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Index of the first entry not before (key, LSN).
    pub fn lower_bound(&self, key: Key, lsn: Lsn) -> usize {
        self.entries.partition_point(|entry| (entry.key, entry.lsn) < (key, lsn))
    }

    /// Index of the first entry behind (key, LSN).
    pub fn upper_bound(&self, key: Key, lsn: Lsn) -> usize {
        self.entries.partition_point(|entry| (entry.key, entry.lsn) <= (key, lsn))
    }

    /// Where the entry stands.
    pub fn position(&self, index: usize) -> (Key, Lsn) {
        (self.entries[index].key, self.entries[index].lsn)
    }

    /// The entry's value.
    pub fn value(&self, index: usize) -> Result<Value, LayerDamage> {
        let entry = &self.entries[index];
        let start = entry.value_at as usize;
        let encoded = self.plain.slice(start..start + entry.value_bytes as usize);
        Value::decode(encoded).ok_or_else(|| LayerDamage(format!("unknown value of {} at {}", entry.key, entry.lsn)))
    }

    /// About how much memory it takes.
    pub fn weight(&self) -> usize {
        self.plain.len() + self.entries.len() * size_of::<BlockEntry>()
    }
}

fn parse_entries(plain: &Bytes) -> Result<Vec<BlockEntry>, LayerDamage> {
    let mut entries = Vec::new();
    let mut at = 0;
    while at < plain.len() {
        let mut header = &plain[at..];
        if header.len() < ENTRY_HEADER_BYTES {
            return damage("an entry is cut short");
        }
        let mut key = [0; KEY_BYTES];
        header.copy_to_slice(&mut key);
        let Some(key) = Key::decode(&key) else { return damage("unknown key") };
        let lsn = Lsn(header.get_u64_le());
        let value_bytes = header.get_u32_le();
        at += ENTRY_HEADER_BYTES;
        if plain.len() - at < value_bytes as usize {
            return damage("a value is cut short");
        }
        entries.push(BlockEntry { key, lsn, value_at: at as u32, value_bytes });
        at += value_bytes as usize;
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Kind, StoredRecord};

    fn sample() -> Vec<(Key, Lsn, Value)> {
        let mut entries = Vec::new();
        for block in 0..60u32 {
            let key = Key { block, ..Key::of(Kind::RelPage) };
            let page: Vec<u8> = (0..4000u32).map(|i| (i.wrapping_mul(block + 7) >> 3) as u8).collect();
            entries.push((key, Lsn(8), Value::Image(page.into())));
            let record = StoredRecord { will_init: false, start_lsn: Lsn(16), raw: Bytes::from(vec![block as u8; 40]) };
            entries.push((key, Lsn(24), Value::Record(record)));
        }
        entries.push((Key::MAX, Lsn(32), Value::Tombstone));
        entries
    }

    fn build(entries: &[(Key, Lsn, Value)]) -> BuiltLayer {
        let mut builder = LayerBuilder::default();
        entries.iter().for_each(|(key, lsn, value)| builder.add(*key, *lsn, value));
        builder.finish().expect("not empty")
    }

    fn read(bytes: &Bytes, index_offset: u64) -> Result<Vec<(Key, Lsn, Value)>, LayerDamage> {
        let index = LayerIndex::parse(&bytes[index_offset as usize..], index_offset)?;
        let mut entries = Vec::new();
        for handle in &index.blocks {
            let stored = bytes.slice(handle.offset as usize..handle.offset as usize + handle.stored_bytes as usize);
            let block = Block::decode(stored, handle)?;
            for i in 0..block.len() {
                let (key, lsn) = block.position(i);
                entries.push((key, lsn, block.value(i)?));
            }
        }
        assert_eq!(entries.len() as u64, index.entries);
        Ok(entries)
    }

    #[test]
    fn what_was_added_is_read() {
        let entries = sample();
        let built = build(&entries);
        assert_eq!(read(&built.bytes, built.index_offset), Ok(entries));
        assert!(LayerBuilder::default().finish().is_none());
    }

    #[test]
    fn every_flipped_byte_is_found() {
        let built = build(&sample());
        assert!(
            LayerIndex::parse(&built.bytes[built.index_offset as usize..], built.index_offset)
                .expect("good")
                .blocks
                .len()
                > 2
        );
        for at in 0..built.bytes.len() {
            let mut damaged = built.bytes.to_vec();
            damaged[at] ^= 0x10;
            assert!(read(&damaged.into(), built.index_offset).is_err(), "byte {at}");
        }
        for cut in [1, 35, 36, 100] {
            let short = built.bytes.slice(..built.bytes.len() - cut);
            assert!(
                LayerIndex::parse(&short[(built.index_offset as usize).min(short.len())..], built.index_offset)
                    .is_err()
            );
        }
    }
}
