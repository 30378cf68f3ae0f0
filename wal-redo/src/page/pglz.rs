//! Decompression of `pglz`, Postgres's own LZ format (`common/pg_lzcompress.c`).
//!
//! A control byte precedes up to eight items, lowest bit first: 0 is a literal byte; 1 is a back reference of two
//! bytes (4 bits of length less 3, 12 bits of distance) and, when the length is 18, a third with more length.

use super::fault::Fault;

/// Length from which on a third byte adds to it.
const LONG_MATCH: usize = 18;

/// Decompresses to exactly this many bytes.
pub(super) fn decompress(packed: &[u8], expected: usize) -> Result<Vec<u8>, Fault> {
    let mut out = Vec::with_capacity(expected);
    let mut input = packed.iter().copied();
    while out.len() < expected {
        let Some(mut control) = input.next() else { break };
        for _ in 0..8 {
            if out.len() >= expected {
                break;
            }
            let Some(first) = input.next() else { break };
            if control & 1 == 0 {
                out.push(first);
            } else {
                let second = input.next().ok_or("pglz: it ends inside of a back reference")?;
                let mut len = usize::from(first & 0x0F) + 3;
                let distance = usize::from(first & 0xF0) << 4 | usize::from(second);
                if len == LONG_MATCH {
                    len += usize::from(input.next().ok_or("pglz: it ends inside of a back reference")?);
                }
                copy_back(&mut out, distance, len, expected)?;
            }
            control >>= 1;
        }
    }
    if out.len() != expected || input.next().is_some() {
        return Err("pglz: not the length it should have".into());
    }
    Ok(out)
}

/// Repeats what was written `distance` bytes ago; a match may overlap what it writes.
fn copy_back(out: &mut Vec<u8>, distance: usize, len: usize, expected: usize) -> Result<(), Fault> {
    let start = out.len().checked_sub(distance).filter(|_| distance != 0);
    let start = start.ok_or("pglz: a back reference before the start")?;
    // Like Postgres, stop at the end of the output: a last match may reach beyond it.
    let len = len.min(expected - out.len());
    for at in start..start + len {
        out.push(out[at]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::decompress;

    #[test]
    fn literals_and_overlapping_matches() {
        // Three literals, then a match of distance 3 and length 18 + 2.
        let packed = [0b0000_1000, b'a', b'b', b'c', 0x0F, 3, 2];
        let text = decompress(&packed, 23).expect("decompresses");
        assert_eq!(text, "abc".repeat(8).as_bytes()[..23]);
    }

    #[test]
    fn damage_is_an_error() {
        for packed in [&[1, 0x00, 1][..], &[0, b'a'], &[1, 0x0F], &[0, b'a', b'b', b'c', b'd'], &[2, b'a', 0x00, 0]] {
            assert!(decompress(packed, 3).is_err(), "{packed:?}");
        }
    }
}
