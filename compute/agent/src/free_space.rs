//! Pages of free space maps as storage has them: as of an earlier sleep, when the table may have been longer. PostgreSQL 15 does
//! not check that a block which its map offers exists, so what lies beyond the table's end is taken out. Pure.

use types::{BlockNumber, PAGE_BYTES};

/// Where the tree of a page starts: behind the page's header and `fp_next_slot` (`storage/fsm_internals.h`).
const NODES_AT: usize = 24 + 4;
/// `NodesPerPage`.
const NODES: usize = PAGE_BYTES - NODES_AT;
/// `NonLeafNodesPerPage`.
const INNER_NODES: usize = PAGE_BYTES / 2 - 1;
/// `SlotsPerFSMPage`.
const SLOTS: u32 = (NODES - INNER_NODES) as u32;

/// Takes the blocks from `table_blocks` on out of the map's page number `block`. Pages above the lowest level are left as they
/// are: Postgres itself puts right what they say too much.
pub fn cut(page: &mut [u8; PAGE_BYTES], block: BlockNumber, table_blocks: BlockNumber) {
    let Some(leaf) = leaf_number(block) else { return };
    let first = u64::from(leaf) * u64::from(SLOTS);
    let existing = u64::from(table_blocks).saturating_sub(first).min(u64::from(SLOTS)) as usize;
    let nodes = &mut page[NODES_AT..];
    let beyond = &mut nodes[INNER_NODES + existing..];
    if beyond.iter().all(|free| *free == 0) {
        return;
    }
    beyond.fill(0);
    // `fsm_rebuild_page`: each node is the larger of its children.
    for node in (0..INNER_NODES).rev() {
        let child = |index: usize| nodes.get(index).copied().unwrap_or(0);
        nodes[node] = child(2 * node + 1).max(child(2 * node + 2));
    }
}

/// The number among the pages of the lowest level; `None` for one above (`fsm_logical_to_physical`, backwards): the root comes
/// first, then each page of the middle level with its leaves behind it.
fn leaf_number(block: BlockNumber) -> Option<u32> {
    let behind_root = block.checked_sub(1)?;
    let (middle, place) = (behind_root / (SLOTS + 1), behind_root % (SLOTS + 1));
    Some(middle * SLOTS + place.checked_sub(1)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page whose slots all say 100, rebuilt.
    fn full_page() -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        page[NODES_AT..].fill(100);
        page
    }

    fn slots(page: &[u8; PAGE_BYTES]) -> usize {
        page[NODES_AT + INNER_NODES..].iter().filter(|free| **free > 0).count()
    }

    #[test]
    fn pages_of_the_lowest_level_are_found() {
        assert_eq!(SLOTS, 4069);
        let numbers: Vec<_> = [0, 1, 2, 3, 4070, 4071, 4072].into_iter().map(leaf_number).collect();
        assert_eq!(numbers, [None, None, Some(0), Some(1), Some(4068), None, Some(4069)]);
    }

    #[test]
    fn what_lies_beyond_the_end_is_not_offered() {
        for (table_blocks, left) in [(0, 0), (1, 1), (4000, 4000), (4069, 4069), (9000, 4069)] {
            let mut page = full_page();
            cut(&mut page, 2, table_blocks);
            assert_eq!(slots(&page), left, "{table_blocks}");
            assert_eq!(page[NODES_AT] > 0, left > 0, "the root says so");
        }
        let mut second = full_page();
        cut(&mut second, 3, 4070);
        assert_eq!(slots(&second), 1);
        // The only slot is the first: the way to it leads left everywhere.
        let on_the_way: Vec<_> = (0..NODES).filter(|node| second[NODES_AT + node] > 0).collect();
        assert_eq!(on_the_way, [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 2047, 4095]);
    }

    #[test]
    fn upper_pages_stay() {
        for block in [0, 1, 4071] {
            let mut page = full_page();
            cut(&mut page, block, 0);
            assert_eq!(page, full_page());
        }
    }
}
