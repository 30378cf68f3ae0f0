//! The layer file: blocks of about 16 KiB, an index of them, a footer. Every byte is under one CRC32C or another.
//!
//! ```text
//! block*   zstd (or as it is, when that is not shorter); the entries in (key, LSN) order, each:
//!          bytes of the key shared with the entry before (u8) | the key's other bytes (18 in all, big-endian)
//!          | LSN (varint; zigzag of the difference from the entry before) | length of the value (varint) | value
//! index    per block: first key (18) | first LSN (u64) | offset (u64) | stored length (u32) | plain length (u32) | CRC (u32)
//!          | largest depth of a record in it (u8)
//! footer   index offset (u64) | index length (u32) | index CRC (u32) | entries (u64) | version (u32) | magic (u32) | CRC (u32)
//! ```
//!
//! Numbers are little-endian unless said otherwise. Varints are of seven bits a byte, the lowest first.

use std::cell::RefCell;

use bytes::{Buf, BufMut, Bytes};
use types::Lsn;

use crate::storage::{KEY_BYTES, Key, Value};

/// A block is closed when it has reached this many bytes before compression.
const BLOCK_TARGET_BYTES: usize = 16 * 1024;
/// Larger blocks are not believed (a single record may be large, but not so large).
const BLOCK_MAX_BYTES: usize = 1 << 30;
const FORMAT_VERSION: u32 = 2;
const MAGIC: u32 = u32::from_le_bytes(*b"DMLY");
const FOOTER_BYTES: usize = 36;
const INDEX_ENTRY_BYTES: usize = KEY_BYTES + 8 + 8 + 4 + 4 + 4 + 1;

thread_local! {
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
    static COMPRESSOR: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
}

/// How hard blocks are compressed. A reader need not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Effort {
    /// For files that are soon merged into others.
    Little,
    /// For files that stay. Beyond zstd's level 1 it gets slower much faster than the blocks get smaller.
    #[default]
    Usual,
}

impl Effort {
    fn zstd_level(self) -> i32 {
        match self {
            Effort::Little => -3,
            Effort::Usual => 1,
        }
    }
}

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
    /// No record in it has a larger [`StoredRecord::depth`](crate::storage::StoredRecord::depth).
    pub max_depth: u8,
    crc: u32,
}

/// Makes a layer file in memory. Entries are added in strictly ascending (key, LSN) order.
#[derive(Default)]
pub struct LayerBuilder {
    effort: Effort,
    file: Vec<u8>,
    block: Vec<u8>,
    block_first: Option<(Key, Lsn)>,
    block_depth: u8,
    value: Vec<u8>,
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
    /// The smallest and the largest key; `None` without entries.
    pub keys: Option<(Key, Key)>,
    /// How many values.
    pub entries: u64,
}

impl LayerBuilder {
    /// One that compresses so hard.
    pub fn with_effort(effort: Effort) -> LayerBuilder {
        LayerBuilder { effort, ..LayerBuilder::default() }
    }

    /// Adds an entry. Panics when it does not sort behind the one before: the caller's order is broken.
    pub fn add(&mut self, key: Key, lsn: Lsn, value: &Value) {
        let mut encoded = std::mem::take(&mut self.value);
        encoded.clear();
        value.encode_into(&mut encoded);
        self.add_encoded(key, lsn, &encoded);
        self.value = encoded;
    }

    /// Adds an entry whose value is already encoded. Panics as [`LayerBuilder::add`] does.
    pub fn add_encoded(&mut self, key: Key, lsn: Lsn, value: &[u8]) {
        assert!(self.last.is_none_or(|last| last < (key, lsn)), "layer entries out of order at {key} {lsn}");
        let before = self.last.filter(|_| self.block_first.is_some());
        self.last = Some((key, lsn));
        self.first.get_or_insert(key);
        self.block_first.get_or_insert((key, lsn));
        put_position(&mut self.block, before, (key, lsn));
        put_varint(&mut self.block, value.len() as u64);
        self.block.put_slice(value);
        self.block_depth = self.block_depth.max(Value::encoded_depth(value));
        self.entries += 1;
        if self.block.len() >= BLOCK_TARGET_BYTES {
            self.close_block();
        }
    }

    /// Adds everything of another, which begins behind the last entry. Panics when it does not.
    pub fn append(&mut self, mut other: LayerBuilder) {
        self.close_block();
        other.close_block();
        let Some(first) = other.index.first() else { return };
        assert!(self.last.is_none_or(|last| last < first.first), "layers joined out of order at {}", first.first.0);
        let offset = self.file.len() as u64;
        self.file.append(&mut other.file);
        self.index.extend(other.index.into_iter().map(|block| BlockHandle { offset: block.offset + offset, ..block }));
        self.first = self.first.or(other.first);
        self.last = other.last;
        self.entries += other.entries;
    }

    /// Adds a block of another file as it is stored there. Panics when it does not sort behind the entry before.
    pub fn add_block(&mut self, block: &StoredBlock) {
        let first = block.handle.first;
        assert!(self.last.is_none_or(|last| last < first), "layer blocks out of order at {}", first.0);
        self.close_block();
        let offset = self.file.len() as u64;
        self.file.extend_from_slice(&block.stored);
        self.index.push(BlockHandle { offset, ..block.handle.clone() });
        self.first.get_or_insert(first.0);
        self.last = block.block.last().or(Some(first));
        self.entries += block.block.len() as u64;
    }

    /// True when no block is begun, so that another file's block may follow without leaving a short one behind.
    pub fn is_between_blocks(&self) -> bool {
        self.block_first.is_none()
    }

    /// Bytes of the finished blocks.
    pub fn bytes_so_far(&self) -> usize {
        self.file.len()
    }

    /// The key that was added last.
    pub fn last_key(&self) -> Option<Key> {
        self.last.map(|(key, _)| key)
    }

    /// The file, which may be one without entries.
    pub fn finish(mut self) -> BuiltLayer {
        self.close_block();
        let keys = self.first.zip(self.last.map(|(key, _)| key));
        let index_offset = self.file.len() as u64;
        for block in &self.index {
            self.file.put_slice(&block.first.0.encode());
            self.file.put_u64_le(block.first.1.0);
            self.file.put_u64_le(block.offset);
            self.file.put_u32_le(block.stored_bytes);
            self.file.put_u32_le(block.plain_bytes);
            self.file.put_u32_le(block.crc);
            self.file.put_u8(block.max_depth);
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
        BuiltLayer { bytes: self.file.into(), index_offset, keys, entries: self.entries }
    }

    fn close_block(&mut self) {
        let Some(first) = self.block_first.take() else { return };
        let offset = self.file.len();
        let stored_bytes = append_compressed(&self.block, &mut self.file, self.effort);
        self.index.push(BlockHandle {
            first,
            offset: offset as u64,
            stored_bytes: stored_bytes as u32,
            plain_bytes: self.block.len() as u32,
            max_depth: std::mem::take(&mut self.block_depth),
            crc: crc32c::crc32c(&self.file[offset..]),
        });
        self.block.clear();
    }
}

/// Appends the block to the file, compressed if that makes it shorter; answers how many bytes that took.
fn append_compressed(block: &[u8], file: &mut Vec<u8>, effort: Effort) -> usize {
    let offset = file.len();
    let compressed = COMPRESSOR.with_borrow_mut(|slot| {
        if slot.is_none() {
            *slot = zstd::bulk::Compressor::new(effort.zstd_level()).ok();
        }
        // With room for one byte less than the block, what would not be shorter fails.
        file.resize(offset + block.len() - 1, 0);
        let compressor = slot.as_mut()?;
        compressor.set_compression_level(effort.zstd_level()).ok()?;
        compressor.compress_to_buffer(block, &mut file[offset..]).ok()
    });
    match compressed {
        Some(bytes) => file.truncate(offset + bytes),
        None => {
            file.truncate(offset);
            file.extend_from_slice(block);
        }
    }
    file.len() - offset
}

fn decompress(stored: &[u8], plain_bytes: usize) -> std::io::Result<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|slot| {
        let decompressor = match slot {
            Some(decompressor) => decompressor,
            None => slot.insert(zstd::bulk::Decompressor::new()?),
        };
        decompressor.decompress(stored, plain_bytes)
    })
}

fn put_position(out: &mut Vec<u8>, before: Option<(Key, Lsn)>, (key, lsn): (Key, Lsn)) {
    let encoded = key.encode();
    let (shared, lsn_before) = match before {
        Some((key_before, lsn_before)) => {
            let known = key_before.encode();
            (encoded.iter().zip(&known).take_while(|(a, b)| a == b).count(), lsn_before)
        }
        None => (0, Lsn(0)),
    };
    out.put_u8(shared as u8);
    out.put_slice(&encoded[shared..]);
    let difference = lsn.0.wrapping_sub(lsn_before.0) as i64;
    put_varint(out, ((difference << 1) ^ (difference >> 63)) as u64);
}

fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.put_u8(number as u8 | 0x80);
        number >>= 7;
    }
    out.put_u8(number as u8);
}

fn take_varint(from: &mut &[u8]) -> Result<u64, LayerDamage> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let Some((byte, rest)) = from.split_first() else { return damage("a number is cut short") };
        *from = rest;
        number |= u64::from(byte & 0x7F) << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    damage("a number is too long")
}

/// A layer file's index.
#[derive(Debug)]
pub struct LayerIndex {
    /// The blocks in order; none in a file without entries.
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
        if blocks.is_empty() && entries > 0 {
            return damage("no blocks");
        }
        Ok(LayerIndex { blocks, entries })
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
        max_depth: bytes.get_u8(),
    })
}

/// A block as it is stored in a file, and what is in it.
pub struct StoredBlock {
    /// Where it is.
    pub handle: BlockHandle,
    /// Its bytes there.
    pub stored: Bytes,
    /// Its entries.
    pub block: Block,
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
            let plain = decompress(&stored, plain_bytes);
            Bytes::from(plain.map_err(|e| LayerDamage(format!("block at {}: {e}", handle.offset)))?)
        };
        if plain.len() != plain_bytes {
            return damage(format!("block at {} has {} bytes, not {plain_bytes}", handle.offset, plain.len()));
        }
        let entries = parse_entries(&plain, handle.first)?;
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

    /// Where the last entry stands.
    pub fn last(&self) -> Option<(Key, Lsn)> {
        self.entries.last().map(|entry| (entry.key, entry.lsn))
    }

    /// The entry's value.
    pub fn value(&self, index: usize) -> Result<Value, LayerDamage> {
        let entry = &self.entries[index];
        Value::decode(self.encoded_value(index))
            .ok_or_else(|| LayerDamage(format!("unknown value of {} at {}", entry.key, entry.lsn)))
    }

    /// The entry's value as it is stored.
    pub fn encoded_value(&self, index: usize) -> Bytes {
        let entry = &self.entries[index];
        let start = entry.value_at as usize;
        self.plain.slice(start..start + entry.value_bytes as usize)
    }

    /// About how much memory it takes.
    pub fn weight(&self) -> usize {
        self.plain.len() + self.entries.len() * size_of::<BlockEntry>()
    }
}

fn parse_entries(plain: &[u8], first: (Key, Lsn)) -> Result<Vec<BlockEntry>, LayerDamage> {
    let mut entries = Vec::new();
    let mut from = plain;
    let (mut key_bytes, mut lsn) = ([0; KEY_BYTES], Lsn(0));
    while let Some((shared, rest)) = from.split_first() {
        from = rest;
        let Some(own_bytes) = KEY_BYTES.checked_sub(usize::from(*shared)) else { return damage("a key is too long") };
        let Some((own, rest)) = from.split_at_checked(own_bytes) else { return damage("a key is cut short") };
        key_bytes[usize::from(*shared)..].copy_from_slice(own);
        from = rest;
        let Some(key) = Key::decode(&key_bytes) else { return damage("unknown key") };
        let zigzag = take_varint(&mut from)?;
        lsn = Lsn(lsn.0.wrapping_add((zigzag >> 1) ^ (zigzag & 1).wrapping_neg()));
        let value_bytes = take_varint(&mut from)? as usize;
        let value_at = plain.len() - from.len();
        let Some(rest) = from.get(value_bytes..) else { return damage("a value is cut short") };
        from = rest;
        entries.push(BlockEntry { key, lsn, value_at: value_at as u32, value_bytes: value_bytes as u32 });
    }
    match entries.first() {
        Some(entry) if (entry.key, entry.lsn) == first => Ok(entries),
        _other => damage("a block does not begin as the index says"),
    }
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
            let record = StoredRecord {
                will_init: false,
                depth: 1,
                start_lsn: Lsn(16),
                raw: Bytes::from(vec![block as u8; 40]),
            };
            entries.push((key, Lsn(24), Value::Record(record)));
        }
        entries.push((Key::MAX, Lsn(32), Value::Tombstone));
        entries
    }

    fn build(entries: &[(Key, Lsn, Value)]) -> BuiltLayer {
        let mut builder = LayerBuilder::default();
        entries.iter().for_each(|(key, lsn, value)| builder.add(*key, *lsn, value));
        builder.finish()
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
        let empty = build(&[]);
        assert_eq!(read(&empty.bytes, empty.index_offset), Ok(Vec::new()));
        assert_eq!(empty.keys, None);
    }

    #[test]
    fn layers_joined_read_as_one() {
        let entries = sample();
        let mut joined = LayerBuilder::default();
        for part in [&entries[..0], &entries[..50], &entries[50..50], &entries[50..]] {
            let mut builder = LayerBuilder::with_effort(Effort::Little);
            part.iter().for_each(|(key, lsn, value)| builder.add(*key, *lsn, value));
            joined.append(builder);
        }
        let built = joined.finish();
        assert_eq!(built.keys, build(&entries).keys);
        assert_eq!(read(&built.bytes, built.index_offset), Ok(entries));
    }

    #[test]
    fn blocks_are_taken_over_as_they_are() {
        let entries = sample();
        let built = build(&entries);
        let index = LayerIndex::parse(&built.bytes[built.index_offset as usize..], built.index_offset).expect("good");
        let mut again = LayerBuilder::default();
        let head = (Key::MIN, Lsn(1), Value::rel_size(1));
        again.add(head.0, head.1, &head.2);
        for handle in index.blocks {
            let stored =
                built.bytes.slice(handle.offset as usize..handle.offset as usize + handle.stored_bytes as usize);
            let block = Block::decode(stored.clone(), &handle).expect("good");
            again.add_block(&StoredBlock { handle, stored, block });
            assert!(again.is_between_blocks());
        }
        let again = again.finish();
        let all: Vec<_> = std::iter::once(head).chain(entries).collect();
        assert_eq!(again.keys, Some((Key::MIN, Key::MAX)));
        assert_eq!(read(&again.bytes, again.index_offset), Ok(all));
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
