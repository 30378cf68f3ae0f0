//! Redo of SP-GiST indexes (`access/spgist/spgxlog.c`, structs in `access/spgxlog.h`).

use types::BlockNumber;
use wal::{BlockRef, DecodedRecord};

use super::{
    PageLsn,
    cursor::Cursor,
    fault::Fault,
    page_ops::Page,
    spgist_tuple::{
        LEAF, NULLS, Origin, State, add_or_replace, change_count, init, multi_delete, redirect_to_placeholder, replace,
        replace_by_dead, set_next, set_node_link, take_inner, take_leaf,
    },
};

const ADD_LEAF: u8 = 0x10;
const MOVE_LEAFS: u8 = 0x20;
const ADD_NODE: u8 = 0x30;
const SPLIT_TUPLE: u8 = 0x40;
const PICKSPLIT: u8 = 0x50;
const VACUUM_LEAF: u8 = 0x60;
const VACUUM_ROOT: u8 = 0x70;
const VACUUM_REDIRECT: u8 = 0x80;

/// Where stand-ins that lead nowhere point to.
const NOWHERE: (BlockNumber, u16) = (BlockNumber::MAX, 0);

/// Applies the record to the page of this block reference.
pub(super) fn redo(page: &mut Page<'_>, record: &DecodedRecord<'_>, block: &BlockRef<'_>) -> Result<PageLsn, Fault> {
    match (record.rmgr_info(), block.id) {
        (ADD_LEAF, id) => add_leaf(page, record, id)?,
        (MOVE_LEAFS, id) => move_leaves(page, record, id)?,
        (ADD_NODE, id) => add_node(page, record, id)?,
        (SPLIT_TUPLE, id) => split_tuple(page, record, id)?,
        (PICKSPLIT, id) => PickSplit::read(record)?.redo(page, id)?,
        (VACUUM_LEAF, 0) => vacuum_leaf(page, record)?,
        (VACUUM_ROOT, 0) => vacuum_root(page, record)?,
        (VACUUM_REDIRECT, 0) => vacuum_redirect(page, record)?,
        (_operation, id) => return Err(unused(id)),
    }
    Ok(PageLsn::Set)
}

fn unused(id: u8) -> Fault {
    format!("an SP-GiST record that has no use for its block {id}").into()
}

fn block_number(record: &DecodedRecord<'_>, id: u8) -> Result<BlockNumber, Fault> {
    record.block(id).map(|block| block.block).ok_or_else(|| format!("an SP-GiST record without its block {id}").into())
}

fn leaf_flags(stores_nulls: bool) -> u16 {
    if stores_nulls { LEAF | NULLS } else { LEAF }
}

/// `spgxlogAddLeaf`: block 0 is the leaf's page, block 1 its parent's.
fn add_leaf(page: &mut Page<'_>, record: &DecodedRecord<'_>, id: u8) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (new_page, stores_nulls) = (main.u8()? != 0, main.u8()? != 0);
    let (leaf_number, head_number) = (main.u16()?, main.u16()?);
    let (parent_number, node) = (main.u16()?, main.u16()?);
    let leaf = take_leaf(&mut main)?;
    match id {
        0 => {
            if new_page {
                init(page, leaf_flags(stores_nulls))?;
            }
            if leaf_number == head_number {
                // It takes the place of a dead tuple.
                return replace(page, leaf_number, leaf);
            }
            add_or_replace(page, leaf, leaf_number)?;
            if head_number == 0 { Ok(()) } else { set_next(page, head_number, leaf_number) }
        }
        1 => set_node_link(page, parent_number, node, (block_number(record, 0)?, leaf_number)),
        other => Err(unused(other)),
    }
}

/// `spgxlogMoveLeafs`: block 0 is the page they leave, block 1 the one they go to, block 2 the parent's.
fn move_leaves(page: &mut Page<'_>, record: &DecodedRecord<'_>, id: u8) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let moves = main.u16()?;
    let (new_page, replaces_dead, stores_nulls) = (main.u8()? != 0, main.u8()? != 0, main.u8()? != 0);
    main.skip(1)?;
    let (parent_number, node) = (main.u16()?, main.u16()?);
    main.skip(2)?;
    let origin = Origin::read(&mut main)?;
    let insertions = if replaces_dead { 1 } else { usize::from(moves) + 1 };
    let deleted = main.u16s(moves.into())?;
    let inserted = main.u16s(insertions)?;
    let last = inserted.last().copied().ok_or("leaves move, but none is inserted")?;
    let target = (block_number(record, 1)?, last);
    match id {
        0 => {
            let first = if origin.is_build { State::Placeholder } else { State::Redirect };
            multi_delete(page, origin, &deleted, (first, State::Placeholder), target)
        }
        1 => {
            if new_page {
                init(page, leaf_flags(stores_nulls))?;
            }
            inserted.iter().try_for_each(|number| add_or_replace(page, take_leaf(&mut main)?, *number))
        }
        2 => set_node_link(page, parent_number, node, target),
        other => Err(unused(other)),
    }
}

/// `spgxlogAddNode`: an inner tuple grows, in place (block 0 only) or by moving to another page (block 1).
fn add_node(page: &mut Page<'_>, record: &DecodedRecord<'_>, id: u8) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (number, new_number, new_page, parent_block) = (main.u16()?, main.u16()?, main.u8()? != 0, main.u8()?);
    let (parent_number, node) = (main.u16()?, main.u16()?);
    main.skip(2)?;
    let origin = Origin::read(&mut main)?;
    let tuple = take_inner(&mut main)?;
    let Some(new_block) = record.block(1) else {
        return if id == 0 { replace(page, number, tuple) } else { Err(unused(id)) };
    };
    let target = (new_block.block, new_number);
    match id {
        0 => {
            let state = if origin.is_build { State::Placeholder } else { State::Redirect };
            replace_by_dead(page, number, origin, state, target)?;
        }
        1 => {
            if new_page {
                init(page, 0)?;
            }
            add_or_replace(page, tuple, new_number)?;
        }
        2 => {}
        other => return Err(unused(other)),
    }
    if parent_block == id { set_node_link(page, parent_number, node, target) } else { Ok(()) }
}

/// `spgxlogSplitTuple`: an inner tuple's prefix is split; block 1 is the lower half's page, if another.
fn split_tuple(page: &mut Page<'_>, record: &DecodedRecord<'_>, id: u8) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (prefix_number, postfix_number) = (main.u16()?, main.u16()?);
    let (new_page, same_page) = (main.u8()? != 0, main.u8()? != 0);
    let prefix = take_inner(&mut main)?;
    let postfix = take_inner(&mut main)?;
    match id {
        0 => {
            replace(page, prefix_number, prefix)?;
            if same_page { add_or_replace(page, postfix, postfix_number) } else { Ok(()) }
        }
        1 if !same_page => {
            if new_page {
                init(page, 0)?;
            }
            add_or_replace(page, postfix, postfix_number)
        }
        other => Err(unused(other)),
    }
}

/// `spgxlogPickSplit`: leaves are distributed below a new inner tuple.
struct PickSplit<'r> {
    init_source: bool,
    init_target: bool,
    init_inner: bool,
    inner_number: u16,
    inner_block: BlockNumber,
    stores_nulls: bool,
    inner_is_parent: bool,
    parent_number: u16,
    node: u16,
    origin: Origin,
    deleted: Vec<u16>,
    /// Of each new leaf: its offset number, and whether it goes to the target page instead of the source.
    inserted: Vec<(u16, bool)>,
    inner: &'r [u8],
    leaves: Cursor<'r>,
}

impl<'r> PickSplit<'r> {
    fn read(record: &'r DecodedRecord<'_>) -> Result<PickSplit<'r>, Fault> {
        let mut main = Cursor::new(record.main_data);
        main.skip(2)?; // isRootSplit: then there is no block 0.
        let (deletions, insertions) = (main.u16()?, main.u16()?);
        let (init_source, init_target) = (main.u8()? != 0, main.u8()? != 0);
        let inner_number = main.u16()?;
        let (init_inner, stores_nulls, inner_is_parent) = (main.u8()? != 0, main.u8()? != 0, main.u8()? != 0);
        main.skip(1)?;
        let (parent_number, node) = (main.u16()?, main.u16()?);
        main.skip(2)?;
        let origin = Origin::read(&mut main)?;
        let deleted = main.u16s(deletions.into())?;
        let numbers = main.u16s(insertions.into())?;
        let to_target = main.take(insertions.into())?.iter().map(|selector| *selector != 0);
        Ok(PickSplit {
            init_source,
            init_target,
            init_inner,
            inner_number,
            inner_block: block_number(record, 2)?,
            stores_nulls,
            inner_is_parent,
            parent_number,
            node,
            origin,
            deleted,
            inserted: numbers.into_iter().zip(to_target).collect(),
            inner: take_inner(&mut main)?,
            leaves: main,
        })
    }

    /// Block 0 is the leaves' old page, 1 a second one for them, 2 the new inner tuple's, 3 its parent's if another.
    fn redo(self, page: &mut Page<'_>, id: u8) -> Result<(), Fault> {
        let target = (self.inner_block, self.inner_number);
        match id {
            0 if self.init_source => init(page, leaf_flags(self.stores_nulls))?,
            0 if self.origin.is_build => {
                let states = (State::Placeholder, State::Placeholder);
                multi_delete(page, self.origin, &self.deleted, states, NOWHERE)?;
            }
            0 => multi_delete(page, self.origin, &self.deleted, (State::Redirect, State::Placeholder), target)?,
            1 if self.init_target => init(page, leaf_flags(self.stores_nulls))?,
            1 => {}
            2 => {
                if self.init_inner {
                    init(page, if self.stores_nulls { NULLS } else { 0 })?;
                }
                add_or_replace(page, self.inner, self.inner_number)?;
                let links = self.inner_is_parent;
                return if links { set_node_link(page, self.parent_number, self.node, target) } else { Ok(()) };
            }
            3 => return set_node_link(page, self.parent_number, self.node, target),
            other => return Err(unused(other)),
        }
        let mut leaves = self.leaves;
        for (number, to_target) in self.inserted {
            let leaf = take_leaf(&mut leaves)?;
            if to_target == (id == 1) {
                add_or_replace(page, leaf, number)?;
            }
        }
        Ok(())
    }
}

/// `spgxlogVacuumLeaf`: dead leaves of a chain go, live ones take the place of its head, the chain is linked anew.
fn vacuum_leaf(page: &mut Page<'_>, record: &DecodedRecord<'_>) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (dead, placeholders, moves, chained) = (main.u16()?, main.u16()?, main.u16()?, main.u16()?);
    let origin = Origin::read(&mut main)?;
    let dead = main.u16s(dead.into())?;
    let placeholders = main.u16s(placeholders.into())?;
    let (move_from, move_to) = (main.u16s(moves.into())?, main.u16s(moves.into())?);
    let (chain_from, chain_to) = (main.u16s(chained.into())?, main.u16s(chained.into())?);
    let both = |state: State| (state, state);
    multi_delete(page, origin, &dead, both(State::Dead), NOWHERE)?;
    multi_delete(page, origin, &placeholders, both(State::Placeholder), NOWHERE)?;
    for (from, to) in move_from.iter().zip(&move_to) {
        let (source, target) = (page.item_id(*from)?, page.item_id(*to)?);
        page.set_item_id(*from, target)?;
        page.set_item_id(*to, source)?;
    }
    multi_delete(page, origin, &move_from, both(State::Placeholder), NOWHERE)?;
    chain_from.iter().zip(&chain_to).try_for_each(|(from, to)| set_next(page, *from, *to))
}

/// `spgxlogVacuumRoot`: a root that is a leaf has no chains, its items simply go.
fn vacuum_root(page: &mut Page<'_>, record: &DecodedRecord<'_>) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let count = main.u16()?;
    main.skip(2)?;
    Origin::read(&mut main)?;
    page.index_multi_delete(&main.u16s(count.into())?)
}

/// `spgxlogVacuumRedirect`: redirections nobody needs any more become placeholders; those at the page's end go.
fn vacuum_redirect(page: &mut Page<'_>, record: &DecodedRecord<'_>) -> Result<(), Fault> {
    let mut main = Cursor::new(record.main_data);
    let (count, first_placeholder) = (main.u16()?, main.u16()?);
    main.skip(4)?; // newestRedirectXid
    for number in main.u16s(count.into())? {
        redirect_to_placeholder(page, number)?;
    }
    if first_placeholder == 0 {
        return Ok(());
    }
    let removed: Vec<u16> = (first_placeholder..=page.max_offset()).collect();
    change_count(page, State::Placeholder, -(removed.len() as i16))?;
    page.index_multi_delete(&removed)
}
