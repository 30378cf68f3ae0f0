//! Message framing of protocol 3, as far as it goes without looking inside: a type byte, a length, a body.

use crate::Violation;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 5;

/// The largest message that Postgres takes (`PQ_LARGE_MESSAGE_LIMIT`): MaxAllocSize less one.
const MESSAGE_MAX_BYTES: usize = 0x3fff_ffff - 1;

/// A message's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Type.
    pub kind: u8,
    /// Bytes of the whole message, header included.
    pub bytes: usize,
}

/// Reads a header; `None`: not all of it is there. Errors on a length that Postgres would not take either.
pub fn header(input: &[u8]) -> Result<Option<Header>, Violation> {
    let Some(&[kind, a, b, c, d]) = input.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if !(4..=MESSAGE_MAX_BYTES).contains(&length) {
        return Err(Violation::Length);
    }
    Ok(Some(Header { kind, bytes: length + 1 }))
}

/// Appends a message.
pub fn write(output: &mut Vec<u8>, kind: u8, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = output.len();
    output.extend_from_slice(&[kind, 0, 0, 0, 0]);
    fill(output);
    let length = (output.len() - start - 1) as u32;
    output[start + 1..start + HEADER_BYTES].copy_from_slice(&length.to_be_bytes());
}

/// Splits a zero-terminated string off the front.
pub fn take_string<'a>(body: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = body.iter().position(|byte| *byte == 0)?;
    let (text, rest) = body.split_at(end);
    *body = &rest[1..];
    Some(text)
}

/// Fields of an `ErrorResponse` or `NoticeResponse`: type and text.
pub fn error_fields(mut body: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let (kind, rest) = body.split_first().filter(|(kind, _)| **kind != 0)?;
        body = rest;
        Some((*kind, take_string(&mut body)?))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut output = Vec::new();
        write(&mut output, b'Q', |body| body.extend_from_slice(b"select 1\0"));
        assert_eq!(header(&output), Ok(Some(Header { kind: b'Q', bytes: output.len() })));
        assert_eq!(header(&output[..4]), Ok(None));
        assert_eq!(header(b"Q\0\0\0\x03"), Err(Violation::Length));
        assert_eq!(header(b"Q\xff\xff\xff\xff"), Err(Violation::Length));
        let fields: Vec<_> = error_fields(b"SERROR\0C42601\0\0").collect();
        assert_eq!(fields, [(b'S', &b"ERROR"[..]), (b'C', &b"42601"[..])]);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes: Vec<u8>) {
            let _ = header(&bytes);
            error_fields(&bytes).count();
            let _ = take_string(&mut &bytes[..]);
        }
    }
}
