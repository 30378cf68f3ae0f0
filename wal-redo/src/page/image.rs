//! Full-page images, restored as `RestoreBlockImage` in `access/transam/xlogreader.c` does.

use std::borrow::Cow;

use types::PAGE_BYTES;
use wal::record::{BlockImage, ImageCompression};

use super::{fault::Fault, pglz};

/// Puts the image's bytes into the page; the hole becomes zeroes.
pub(super) fn restore(image: &BlockImage<'_>, page: &mut [u8; PAGE_BYTES]) -> Result<(), Fault> {
    let (hole_offset, hole_length) = (usize::from(image.hole_offset), usize::from(image.hole_length));
    let hole_end = hole_offset + hole_length;
    if hole_end > PAGE_BYTES {
        return Err(format!("its hole {hole_offset}..{hole_end} is not inside the page").into());
    }
    let stored = unpack(image, PAGE_BYTES - hole_length)?;
    page[..hole_offset].copy_from_slice(&stored[..hole_offset]);
    page[hole_offset..hole_end].fill(0);
    page[hole_end..].copy_from_slice(&stored[hole_offset..]);
    Ok(())
}

/// The image's `expected` bytes, uncompressed.
fn unpack<'a>(image: &BlockImage<'a>, expected: usize) -> Result<Cow<'a, [u8]>, Fault> {
    let packed = image.bytes;
    let mut unpacked = Vec::new();
    let bytes = match image.compression {
        ImageCompression::None => packed.len(),
        ImageCompression::Pglz => {
            unpacked = pglz::decompress(packed, expected)?;
            unpacked.len()
        }
        ImageCompression::Lz4 => {
            unpacked.resize(expected, 0);
            lz4_flex::block::decompress_into(packed, &mut unpacked).map_err(|error| format!("lz4: {error}"))?
        }
        ImageCompression::Zstd => {
            unpacked.resize(expected, 0);
            zstd::bulk::decompress_to_buffer(packed, &mut unpacked[..]).map_err(|error| format!("zstd: {error}"))?
        }
    };
    if bytes != expected {
        return Err(format!("it holds {bytes} bytes instead of {expected}").into());
    }
    Ok(if image.compression == ImageCompression::None { Cow::Borrowed(packed) } else { Cow::Owned(unpacked) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(bytes: &[u8], hole: (u16, u16), compression: ImageCompression) -> BlockImage<'_> {
        BlockImage { bytes, hole_offset: hole.0, hole_length: hole.1, apply: true, compression }
    }

    #[test]
    fn every_compression_gives_the_page_back() {
        let body: Vec<u8> = (0..8000u32).map(|i| (i / 7) as u8).collect();
        let lz4 = lz4_flex::block::compress(&body);
        let zstd = zstd::bulk::compress(&body, 3).expect("compresses");
        for (bytes, compression) in
            [(body.clone(), ImageCompression::None), (lz4, ImageCompression::Lz4), (zstd, ImageCompression::Zstd)]
        {
            let mut page = [0xAA; PAGE_BYTES];
            restore(&image(&bytes, (100, 192), compression), &mut page).expect("restores");
            assert_eq!(&page[..100], &body[..100], "{compression:?}");
            assert!(page[100..292].iter().all(|byte| *byte == 0));
            assert_eq!(&page[292..], &body[100..]);
        }
    }

    #[test]
    fn damaged_images_are_errors() {
        let mut page = [0; PAGE_BYTES];
        for compression in
            [ImageCompression::None, ImageCompression::Pglz, ImageCompression::Lz4, ImageCompression::Zstd]
        {
            assert!(restore(&image(&[0xFF; 100], (0, 0), compression), &mut page).is_err(), "{compression:?}");
            assert!(restore(&image(&[], (8000, 500), compression), &mut page).is_err());
        }
    }
}
