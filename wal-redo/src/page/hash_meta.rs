//! The meta page of a hash index (`HashMetaPageData` in `access/hash.h`).

use types::{BlockNumber, PAGE_BYTES};

use super::{
    fault::Fault,
    page_ops::{HEADER_BYTES, Page},
};

const HASH_MAGIC: u32 = 0x0644_0640;
const HASH_VERSION: u32 = 4;
/// `HASH_MAX_SPLITPOINTS`.
const MAX_SPLITPOINTS: u32 = 98;
/// `HASH_MAX_BITMAPS`.
const MAX_BITMAPS: u32 = 1024;
/// `HashGetMaxBitmapSize`: the page without header and special area.
const BITMAP_SPACE_BYTES: u16 = (PAGE_BYTES - HEADER_BYTES - 16) as u16;
/// `HASH_SPLITPOINT_GROUPS_WITH_ONE_PHASE`.
const ONE_PHASE_GROUPS: u32 = 10;

const AT_TUPLES: usize = HEADER_BYTES + 8;
const AT_FILL_FACTOR: usize = HEADER_BYTES + 16;
const AT_MAX_BUCKET: usize = HEADER_BYTES + 24;
const AT_HIGH_MASK: usize = HEADER_BYTES + 28;
const AT_LOW_MASK: usize = HEADER_BYTES + 32;
const AT_OVERFLOW_POINT: usize = HEADER_BYTES + 36;
const AT_FIRST_FREE: usize = HEADER_BYTES + 40;
const AT_MAPS: usize = HEADER_BYTES + 44;
const AT_PROCEDURE: usize = HEADER_BYTES + 48;
const AT_SPARES: usize = HEADER_BYTES + 52;
const AT_MAP_BLOCKS: usize = AT_SPARES + MAX_SPLITPOINTS as usize * 4;
const END: usize = (AT_MAP_BLOCKS + MAX_BITMAPS as usize * 4).next_multiple_of(8);

/// Fills in a fresh meta page (`_hash_init_metabuffer`).
pub(super) fn init(page: &mut Page<'_>, tuples: f64, procedure: u32, fill_factor: u16) -> Result<(), Fault> {
    let wanted = tuples / f64::from(fill_factor);
    let buckets = if wanted <= 2.0 {
        2
    } else if wanted >= f64::from(0x4000_0000) {
        0x4000_0000
    } else {
        total_buckets(spare_index(wanted as u32))
    };
    let spare = spare_index(buckets);
    page.set_u32_at(HEADER_BYTES, HASH_MAGIC)?;
    page.set_u32_at(HEADER_BYTES + 4, HASH_VERSION)?;
    let map_bytes_log2 = BITMAP_SPACE_BYTES.ilog2() as u16;
    for (index, number) in [fill_factor, BITMAP_SPACE_BYTES, 1 << map_bytes_log2, map_bytes_log2 + 3].iter().enumerate()
    {
        page.set_u16_at(AT_FILL_FACTOR + index * 2, *number)?;
    }
    let high_mask = (buckets + 1).next_power_of_two() - 1;
    set_max_bucket(page, buckets - 1)?;
    set_masks(page, high_mask >> 1, high_mask)?;
    page.set_u32_at(AT_PROCEDURE, procedure)?;
    set_splitpoint(page, spare, 1)?;
    page.set_lower(END);
    Ok(())
}

/// `_hash_spareindex`: the splitpoint phase in which a bucket is allocated.
fn spare_index(buckets: u32) -> u32 {
    let group = if buckets < 2 { 0 } else { (buckets - 1).ilog2() + 1 };
    if group < ONE_PHASE_GROUPS {
        return group;
    }
    ONE_PHASE_GROUPS + ((group - ONE_PHASE_GROUPS) << 2) + ((buckets - 1) >> (group - 3) & 3)
}

/// `_hash_get_totalbuckets`: buckets that exist after a splitpoint phase.
fn total_buckets(phase: u32) -> u32 {
    if phase < ONE_PHASE_GROUPS {
        return 1 << phase;
    }
    let group = ONE_PHASE_GROUPS + ((phase - ONE_PHASE_GROUPS) >> 2);
    let before = 1u32 << (group - 1);
    before + (before >> 2) * (((phase - ONE_PHASE_GROUPS) & 3) + 1)
}

/// The bitmap page that a new index gets right behind its first buckets.
pub(super) fn add_first_bitmap(page: &mut Page<'_>) -> Result<(), Fault> {
    let buckets = page.u32_at(AT_MAX_BUCKET)?.wrapping_add(1);
    add_bitmap(page, buckets.wrapping_add(1))
}

fn add_bitmap(page: &mut Page<'_>, block: BlockNumber) -> Result<(), Fault> {
    let maps = page.u32_at(AT_MAPS)?;
    if maps >= MAX_BITMAPS {
        return Err("more bitmap pages than a hash index can have".into());
    }
    page.set_u32_at(AT_MAP_BLOCKS + maps as usize * 4, block)?;
    page.set_u32_at(AT_MAPS, maps + 1)
}

/// An overflow page was added: a recycled one when its bit was found, else a new one, perhaps with a new bitmap page.
pub(super) fn add_overflow_page(
    page: &mut Page<'_>,
    first_free: u32,
    bit_found: bool,
    new_bitmap: Option<BlockNumber>,
) -> Result<(), Fault> {
    set_first_free(page, first_free)?;
    if bit_found {
        return Ok(());
    }
    let spare_at = spare_at(page.u32_at(AT_OVERFLOW_POINT)?)?;
    let mut spares = page.u32_at(spare_at)?.wrapping_add(1);
    if let Some(block) = new_bitmap {
        add_bitmap(page, block)?;
        spares = spares.wrapping_add(1);
    }
    page.set_u32_at(spare_at, spares)
}

fn spare_at(splitpoint: u32) -> Result<usize, Fault> {
    if splitpoint >= MAX_SPLITPOINTS {
        return Err(format!("splitpoint {splitpoint} is more than a hash index can have").into());
    }
    Ok(AT_SPARES + splitpoint as usize * 4)
}

pub(super) fn set_splitpoint(page: &mut Page<'_>, splitpoint: u32, spares: u32) -> Result<(), Fault> {
    page.set_u32_at(spare_at(splitpoint)?, spares)?;
    page.set_u32_at(AT_OVERFLOW_POINT, splitpoint)
}

pub(super) fn set_first_free(page: &mut Page<'_>, first_free: u32) -> Result<(), Fault> {
    page.set_u32_at(AT_FIRST_FREE, first_free)
}

pub(super) fn set_max_bucket(page: &mut Page<'_>, bucket: u32) -> Result<(), Fault> {
    page.set_u32_at(AT_MAX_BUCKET, bucket)
}

pub(super) fn set_masks(page: &mut Page<'_>, low: u32, high: u32) -> Result<(), Fault> {
    page.set_u32_at(AT_LOW_MASK, low)?;
    page.set_u32_at(AT_HIGH_MASK, high)
}

/// Sets `hashm_ntuples` to a double as it stands in the record.
pub(super) fn set_tuple_count(page: &mut Page<'_>, count: &[u8]) -> Result<(), Fault> {
    page.write(AT_TUPLES, count)
}

/// Adds to `hashm_ntuples`.
pub(super) fn change_tuple_count(page: &mut Page<'_>, by: f64) -> Result<(), Fault> {
    let bytes: [u8; 8] = page.slice(AT_TUPLES..AT_TUPLES + 8)?.try_into().expect("eight bytes");
    page.write(AT_TUPLES, &(f64::from_le_bytes(bytes) + by).to_le_bytes())
}
