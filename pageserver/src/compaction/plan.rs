//! Which deltas to merge, and of which keys to make images. Pure.
//!
//! Keys are divided into *cells*, by cuts that the manifest names. Deltas of level 0 are memory as it was written out, over
//! all keys; from level 1 on a delta lies within one cell, and so do images. When there are enough deltas of level 0 they are
//! merged, cell by cell, together with the levels of the cell that are full, into the first level with room: like
//! carrying in a counter, so that a value is rewritten at most once for each level. When all levels of a cell are full, or
//! what its deltas hold is as much as an image of it, the cell gets an image: nothing older counts for new reads then.
//!
//! So a read looks at no more than [`MOST_DELTAS`] of each level and one image: [`MAX_LAYERS_VISITED`], whatever is written.

use std::collections::BTreeSet;

use types::Lsn;

use crate::{
    layer::{LayerKind, LayerMeta},
    storage::Key,
};

/// Most deltas of each level over a key since its newest image. Memory is not written out while level 0 is full.
pub const MOST_DELTAS: [usize; 4] = [4, 2, 2, 1];
/// Most layers that a read of one key in one branch looks at.
pub const MAX_LAYERS_VISITED: usize = 10;

/// Sizes that decide when it is time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanLimits {
    /// So many deltas of level 0 are merged. Default 3, at most [`MOST_DELTAS`]`[0]`.
    pub deltas_per_merge: usize,
    /// A cell's deltas call for an image when they have as many bytes as the last image, and at least so many. Default 32 MiB.
    pub image_min_bytes: u64,
    /// A cell is divided when its image is more than twice as large. Default 128 MiB.
    pub cell_bytes: u64,
}

impl Default for PlanLimits {
    fn default() -> PlanLimits {
        PlanLimits { deltas_per_merge: 3, image_min_bytes: 32 << 20, cell_bytes: 128 << 20 }
    }
}

/// What is known when the next job is chosen.
#[derive(Clone, Copy, Debug)]
pub struct PlanInput<'a> {
    /// All layers of the branch.
    pub layers: &'a [LayerMeta],
    /// Where cells begin, ascending, but for the first.
    pub cuts: &'a [Key],
    /// The layers hold everything up to here.
    pub lsn: Lsn,
    /// When it is time.
    pub limits: PlanLimits,
}

/// What to do next. Indexes are into [`PlanInput::layers`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Job {
    /// Put these deltas of level 0, and what the parts carry along, in place of themselves.
    Merge {
        /// Deltas of level 0.
        deltas: Vec<usize>,
        /// By ascending keys; together they are all keys.
        parts: Vec<MergePart>,
    },
    /// Make images of all keys of a cell.
    Image {
        /// The cell.
        cell: Cell,
        /// As of where.
        lsn: Lsn,
    },
}

/// One cell's part of a merge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergePart {
    /// The cell.
    pub cell: Cell,
    /// The cell's deltas of higher levels that are merged too.
    pub carried: Vec<usize>,
    /// The level of what comes out.
    pub level: u8,
}

/// A range of keys, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// The first key.
    pub first: Key,
    /// The last key.
    pub last: Key,
}

impl Cell {
    /// True when the layer has keys, or speaks for keys, in it.
    pub fn overlaps(&self, layer: &LayerMeta) -> bool {
        layer.first_key <= self.last && layer.last_key >= self.first
    }
}

/// The cells that cuts make.
pub fn cells(cuts: &[Key]) -> impl Iterator<Item = Cell> {
    let starts = std::iter::once(Key::MIN).chain(cuts.iter().copied());
    let ends = cuts.iter().filter_map(Key::previous).chain(std::iter::once(Key::MAX));
    starts.zip(ends).map(|(first, last)| Cell { first, last })
}

/// True while memory must not be written out, since level 0 is full.
pub fn is_full<'a>(layers: impl Iterator<Item = &'a LayerMeta>) -> bool {
    layers.filter(|layer| is_delta(layer) && layer.level == 0).count() >= MOST_DELTAS[0]
}

/// The most urgent thing to do; `None` when nothing is. Call again when that is done.
pub fn next_job(input: &PlanInput<'_>) -> Option<Job> {
    let states: Vec<CellState> = cells(input.cuts).map(|cell| CellState::of(cell, input)).collect();
    let is_level_0 = |index: &usize| is_delta(&input.layers[*index]) && input.layers[*index].level == 0;
    let level_0: Vec<usize> = (0..input.layers.len()).filter(is_level_0).collect();
    let merge = level_0.len() >= input.limits.deltas_per_merge.clamp(1, MOST_DELTAS[0]);
    if merge && let Some(full) = states.iter().find(|state| state.first_level_with_room().is_none()) {
        return Some(Job::Image { cell: full.cell, lsn: input.lsn });
    }
    if merge {
        let parts = states.iter().filter_map(CellState::merge_part).collect();
        return Some(Job::Merge { deltas: level_0, parts });
    }
    let due = states.iter().find(|state| state.is_image_due(&input.limits))?;
    Some(Job::Image { cell: due.cell, lsn: input.lsn })
}

/// Where to divide a cell that has just got images of these ranges and sizes: nowhere when it is not too large. No cut goes
/// through a delta that counts since the image.
pub fn cuts_after_image(images: &[LayerMeta], layers: &[LayerMeta], limits: &PlanLimits) -> Vec<Key> {
    let total: u64 = images.iter().map(|image| image.size_bytes).sum();
    if total <= 2 * limits.cell_bytes {
        return Vec::new();
    }
    let mut cuts = Vec::new();
    let mut bytes = 0;
    for image in images {
        let divides = |layer: &LayerMeta| {
            let counts = is_delta(layer) && layer.level > 0 && layer.end_lsn > image.end_lsn;
            counts && layer.first_key < image.first_key && layer.last_key >= image.first_key
        };
        if bytes >= limits.cell_bytes && !layers.iter().any(divides) {
            cuts.push(image.first_key);
            bytes = 0;
        }
        bytes += image.size_bytes;
    }
    cuts
}

fn is_delta(layer: &LayerMeta) -> bool {
    layer.kind == LayerKind::Delta
}

/// What counts for new reads of a cell.
struct CellState {
    cell: Cell,
    image_bytes: u64,
    /// By level; deltas that hold something behind the newest image. Of level 0, none.
    deltas: [Vec<usize>; MOST_DELTAS.len()],
    /// How many positions apart they are: files of one merge count once.
    runs: [usize; MOST_DELTAS.len()],
    delta_bytes: u64,
}

impl CellState {
    fn of(cell: Cell, input: &PlanInput<'_>) -> CellState {
        let (image_lsn, image_bytes) = newest_image(cell, input.layers);
        let mut state =
            CellState { cell, image_bytes, deltas: Default::default(), runs: Default::default(), delta_bytes: 0 };
        let mut runs: [BTreeSet<(Lsn, Lsn)>; MOST_DELTAS.len()] = Default::default();
        for (index, layer) in input.layers.iter().enumerate() {
            let counts = is_delta(layer) && layer.level > 0 && layer.end_lsn > image_lsn && cell.overlaps(layer);
            let level = usize::from(layer.level).min(MOST_DELTAS.len() - 1);
            if counts {
                state.deltas[level].push(index);
                runs[level].insert((layer.start_lsn, layer.end_lsn));
                state.delta_bytes += layer.size_bytes;
            }
        }
        state.runs = runs.map(|runs| runs.len());
        state
    }

    fn first_level_with_room(&self) -> Option<usize> {
        (1..MOST_DELTAS.len()).find(|level| self.runs[*level] < MOST_DELTAS[*level])
    }

    fn merge_part(&self) -> Option<MergePart> {
        let level = self.first_level_with_room()?;
        let carried = self.deltas[1..level].iter().flatten().copied().collect();
        Some(MergePart { cell: self.cell, carried, level: level as u8 })
    }

    fn is_image_due(&self, limits: &PlanLimits) -> bool {
        self.delta_bytes >= self.image_bytes.max(limits.image_min_bytes)
    }
}

/// The position and size of the newest images that speak for the whole cell; nothing when there are none.
fn newest_image(cell: Cell, layers: &[LayerMeta]) -> (Lsn, u64) {
    let images = || layers.iter().filter(|layer| layer.kind == LayerKind::Image && cell.overlaps(layer));
    let lsns: BTreeSet<Lsn> = images().map(|image| image.end_lsn).collect();
    let whole = |lsn: &Lsn| {
        let mut parts: Vec<&LayerMeta> = images().filter(|image| image.end_lsn == *lsn).collect();
        parts.sort_unstable_by_key(|image| image.first_key);
        super::gc::cover(parts.into_iter(), cell.first, cell.last)
    };
    let newest = lsns.into_iter().rev().find(whole).unwrap_or(Lsn::INVALID);
    (newest, images().filter(|image| image.end_lsn == newest).map(|image| image.size_bytes).sum())
}

#[cfg(test)]
mod tests;
