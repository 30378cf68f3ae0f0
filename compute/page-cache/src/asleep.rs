//! The list of a cache's pages while no compute uses it: beside the pages file, which stays as it is.

use types::{ForkNumber, PageTag, RelTag};

/// `DORMSLP` and the format's version.
const MAGIC: &[u8; 8] = b"DORMSLP1";
/// Name of a page, its slot, its checksum: seven words.
const ENTRY_BYTES: usize = 28;
/// Longest label.
const MAX_LABEL_BYTES: usize = 1024;

/// One page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Which.
    pub tag: PageTag,
    /// Where in the pages file.
    pub slot: u32,
    /// CRC32C of its bytes.
    pub crc: u32,
}

/// The list as it is stored. `label` says what the pages are of; it is not looked at here.
pub fn encode(label: &str, entries: &[Entry]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    let mut word = |value: u32| bytes.extend_from_slice(&value.to_le_bytes());
    word(label.len() as u32);
    word(entries.len() as u32);
    for Entry { tag: PageTag { rel, block }, slot, crc } in entries {
        [rel.spc, rel.db, rel.rel, rel.fork as u32, *block, *slot, *crc].into_iter().for_each(&mut word);
    }
    bytes.extend_from_slice(label.as_bytes());
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// Label and pages of a stored list; `None` when it is damaged.
pub fn decode(bytes: &[u8]) -> Option<(&str, Vec<Entry>)> {
    let (content, checksum) = bytes.split_last_chunk::<4>()?;
    if u32::from_le_bytes(*checksum) != crc32c::crc32c(content) {
        return None;
    }
    let rest = content.strip_prefix(MAGIC)?;
    let (label_bytes, rest) = rest.split_first_chunk::<4>()?;
    let (count, rest) = rest.split_first_chunk::<4>()?;
    let length = (u32::from_le_bytes(*count) as usize).checked_mul(ENTRY_BYTES)?;
    let (entries, label) = rest.split_at_checked(length)?;
    let whole = label.len() == u32::from_le_bytes(*label_bytes) as usize && label.len() <= MAX_LABEL_BYTES;
    let entries = entries.chunks_exact(ENTRY_BYTES).map(decode_entry).collect::<Option<_>>()?;
    std::str::from_utf8(label).ok().filter(|_| whole).map(|label| (label, entries))
}

fn decode_entry(bytes: &[u8]) -> Option<Entry> {
    let word = |index: usize| {
        let at = index * 4;
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    let fork = ForkNumber::try_from(u8::try_from(word(3)).ok()?).ok()?;
    let rel = RelTag { spc: word(0), db: word(1), rel: word(2), fork };
    Some(Entry { tag: PageTag { rel, block: word(4) }, slot: word(5), crc: word(6) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries() -> Vec<Entry> {
        let rel = RelTag { spc: 1663, db: 5, rel: 16384, fork: ForkNumber::Vm };
        (1..4).map(|slot| Entry { tag: PageTag { rel, block: slot * 100 }, slot, crc: !slot }).collect()
    }

    #[test]
    fn a_list_comes_back_and_a_damaged_one_does_not() {
        let bytes = encode("p/b@0/1000", &entries());
        assert_eq!(decode(&bytes), Some(("p/b@0/1000", entries())));
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0x10;
            assert_eq!(decode(&bad), None, "byte {at}");
            assert_eq!(decode(&bytes[..at]), None, "cut to {at}");
        }
    }
}
