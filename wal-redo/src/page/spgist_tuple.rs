//! Tuples of SP-GiST pages and the pages' special area (`access/spgist_private.h`).

use types::BlockNumber;

use super::{
    cursor::Cursor,
    fault::Fault,
    index_tuple,
    page_ops::{Page, Place},
    tuple::item_pointer,
};

/// `sizeof(SpGistPageOpaqueData)`.
const OPAQUE_BYTES: usize = 8;
const PAGE_ID: u16 = 0xFF82;
/// Flag bits of a page.
pub(super) const LEAF: u16 = 1 << 2;
pub(super) const NULLS: u16 = 1 << 3;

/// `SGITHDRSZ`: an inner tuple's header.
const INNER_HEADER_BYTES: usize = 8;

/// What a tuple is (`tupstate`, the lowest two bits of every tuple).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Redirect = 1,
    Dead = 2,
    Placeholder = 3,
}

/// What dead tuples are made from (`spgxlogState`).
#[derive(Clone, Copy)]
pub(super) struct Origin {
    xid: u32,
    /// An index build needs no redirections: nobody scans the index yet.
    pub(super) is_build: bool,
}

impl Origin {
    pub(super) fn read(main: &mut Cursor<'_>) -> Result<Origin, Fault> {
        let origin = Origin { xid: main.u32()?, is_build: main.u8()? != 0 };
        main.skip(3)?;
        Ok(origin)
    }
}

/// `SpGistInitPage`.
pub(super) fn init(page: &mut Page<'_>, flags: u16) -> Result<(), Fault> {
    page.init(OPAQUE_BYTES);
    let special = page.special();
    page.set_u16_at(special, flags)?;
    page.set_u16_at(special + 6, PAGE_ID)
}

/// Changes a page's count of redirections or of placeholders.
pub(super) fn change_count(page: &mut Page<'_>, state: State, by: i16) -> Result<(), Fault> {
    let special = page.special_of(OPAQUE_BYTES)?;
    let at = match state {
        State::Redirect => special + 2,
        State::Placeholder => special + 4,
        State::Dead => return Ok(()),
    };
    let count = page.u16_at(at)?;
    page.set_u16_at(at, count.wrapping_add_signed(by))
}

/// The leaf tuple at the front of the data.
pub(super) fn take_leaf<'d>(data: &mut Cursor<'d>) -> Result<&'d [u8], Fault> {
    let bits = data.clone().u32()?;
    data.take((bits >> 2) as usize)
}

/// The inner tuple at the front of the data.
pub(super) fn take_inner<'d>(data: &mut Cursor<'d>) -> Result<&'d [u8], Fault> {
    let mut header = data.clone();
    header.skip(4)?;
    let bytes = header.u16()?;
    data.take(bytes.into())
}

/// A tuple that stands in for a removed one (`spgFormDeadTuple`); only a redirection leads somewhere.
fn dead_tuple(origin: Origin, state: State, target: (BlockNumber, u16)) -> [u8; 16] {
    let mut tuple = [0; 16];
    tuple[..4].copy_from_slice(&(state as u32 | 16 << 2).to_le_bytes());
    let ((block, number), xid) = if state == State::Redirect { (target, origin.xid) } else { ((u32::MAX, 0), 0) };
    tuple[6..12].copy_from_slice(&item_pointer(block, number));
    tuple[12..].copy_from_slice(&xid.to_le_bytes());
    tuple
}

/// Puts a tuple in the place of another.
pub(super) fn replace(page: &mut Page<'_>, number: u16, tuple: &[u8]) -> Result<(), Fault> {
    page.index_tuple_delete(number)?;
    page.add_item(tuple, Place::Shifting(number)).map(|_| ())
}

/// Puts a stand-in in the place of a tuple, and counts it.
pub(super) fn replace_by_dead(
    page: &mut Page<'_>,
    number: u16,
    origin: Origin,
    state: State,
    target: (BlockNumber, u16),
) -> Result<(), Fault> {
    replace(page, number, &dead_tuple(origin, state, target))?;
    change_count(page, state, 1)
}

/// Adds a tuple at the page's end, or in the place of a placeholder (`addOrReplaceTuple`).
pub(super) fn add_or_replace(page: &mut Page<'_>, tuple: &[u8], number: u16) -> Result<(), Fault> {
    if number <= page.max_offset() {
        if page.item(number)?[0] & 3 != State::Placeholder as u8 {
            return Err(format!("tuple {number}, which is to be replaced, is not a placeholder").into());
        }
        change_count(page, State::Placeholder, -1)?;
        page.index_tuple_delete(number)?;
    }
    page.add_item(tuple, Place::Shifting(number)).map(|_| ())
}

/// Puts stand-ins in the place of tuples: of one kind for the first that is named, of another for the rest
/// (`spgPageIndexMultiDelete`).
pub(super) fn multi_delete(
    page: &mut Page<'_>,
    origin: Origin,
    numbers: &[u16],
    (first_state, rest_state): (State, State),
    target: (BlockNumber, u16),
) -> Result<(), Fault> {
    let mut sorted = numbers.to_vec();
    sorted.sort_unstable();
    page.index_multi_delete(&sorted)?;
    for number in sorted {
        let state = if Some(&number) == numbers.first() { first_state } else { rest_state };
        page.add_item(&dead_tuple(origin, state, target), Place::Shifting(number))?;
        change_count(page, state, 1)?;
    }
    Ok(())
}

/// Sets the downlink of an inner tuple's node (`spgUpdateNodeLink`).
pub(super) fn set_node_link(
    page: &mut Page<'_>,
    number: u16,
    node: u16,
    target: (BlockNumber, u16),
) -> Result<(), Fault> {
    let range = page.item_range(number)?;
    let tuple = page.slice_mut(range)?;
    let bits = Cursor::new(tuple).u32()?;
    let (nodes, prefix_bytes) = (bits >> 3 & 0x1FFF, (bits >> 16) as usize);
    if u32::from(node) >= nodes {
        return Err(format!("inner tuple {number} has no node {node}").into());
    }
    let mut at = INNER_HEADER_BYTES + prefix_bytes;
    let outside = "an inner tuple's nodes are longer than itself";
    for _ in 0..node {
        at += index_tuple::size(tuple.get(at..).ok_or(outside)?)?;
    }
    let pointer = tuple.get_mut(at..at + index_tuple::TID_BYTES).ok_or(outside)?;
    pointer.copy_from_slice(&item_pointer(target.0, target.1));
    Ok(())
}

/// Sets a leaf tuple's link to the next of its chain (`SGLT_SET_NEXTOFFSET`).
pub(super) fn set_next(page: &mut Page<'_>, number: u16, next: u16) -> Result<(), Fault> {
    let at = page.item_range(number)?.start + 4;
    let info = page.u16_at(at)?;
    page.set_u16_at(at, info & 0xC000 | next & 0x3FFF)
}

/// Makes a placeholder of a redirection, in place.
pub(super) fn redirect_to_placeholder(page: &mut Page<'_>, number: u16) -> Result<(), Fault> {
    let at = page.item_range(number)?.start;
    let bits = page.u32_at(at)?;
    page.set_u32_at(at, bits & !3 | State::Placeholder as u32)?;
    page.write(at + 6, &item_pointer(u32::MAX, 0))?;
    change_count(page, State::Redirect, -1)?;
    change_count(page, State::Placeholder, 1)
}
