//! Immutable files of sorted values: their format, and reading them block by block.
//!
//! A *delta* layer holds every value that a branch got for a range of keys in `(start_lsn, end_lsn]`. An *image* layer holds
//! the state, as of its LSN, of every key in its range that the branch itself ever changed (gone ones as tombstones, where
//! an ancestor may have them): a search in the branch need not look behind it.

mod format;
mod merge;
mod reader;
mod set;

pub use format::{Block, BlockHandle, BuiltLayer, Effort, LayerBuilder, LayerDamage, LayerIndex, StoredBlock};
pub use merge::{MergeStream, Merged};
pub use reader::{Found, Layer, Wanted};
pub use set::{LayerSet, SearchPath, Segment};

use serde::{Deserialize, Serialize};
use types::Lsn;

use crate::storage::Key;

/// Which sort of layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerKind {
    /// All changes of a range of LSNs.
    Delta,
    /// The state as of one LSN.
    Image,
}

/// What a manifest says about a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerMeta {
    /// The object's name below the branch's `layers/`.
    pub name: String,
    /// Which sort.
    pub kind: LayerKind,
    /// How often a delta's content was merged: 0 as memory was written out, over all keys; above that it holds a range
    /// of keys. Of an image, 0.
    pub level: u8,
    /// A delta holds nothing before this; an image speaks for all keys from here on.
    pub first_key: Key,
    /// A delta holds nothing behind this; an image speaks for all keys up to here.
    pub last_key: Key,
    /// A delta holds what came after this; of an image, equal to `end_lsn`.
    pub start_lsn: Lsn,
    /// A delta holds what came up to here; an image is as of here.
    pub end_lsn: Lsn,
    /// The object's length.
    pub size_bytes: u64,
    /// Where its block index starts.
    pub index_offset: u64,
    /// How many values it holds.
    pub entries: u64,
}

impl LayerMeta {
    /// True when the key lies between the first and the last one in it.
    pub fn covers(&self, key: &Key) -> bool {
        (self.first_key..=self.last_key).contains(key)
    }
}
