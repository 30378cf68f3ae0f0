//! WAL redo as a library: which stored things a record changes, and how it changes each page. No IO, no panics.
//!
//! - [`changes`]: what a record touches ([`Change`]), for the pageserver to file it under the right keys.
//! - [`redo_page`], [`redo_slru_page`]: apply a record to one page.
//! - [`checkpoint`]: the counters of the `CheckPoint` struct, kept up to date record by record.

#![doc = include_str!("../RECORDS.md")]

mod aux_file;
mod change;
mod changes;
pub mod checkpoint;
mod page;
mod slru;
mod state_changes;
#[cfg(test)]
mod test_record;

pub use aux_file::{AuxPathError, aux_file_main_data, aux_file_record};
pub use change::{Change, SlruKind};
pub use changes::{ChangeList, UnknownRecord, changes, each_change};
pub use page::{RecordName, RedoError, redo_page, restore_image};
pub use slru::{
    SLRU_PAGES_PER_SEGMENT, SlruRedoError, commit_ts_changes, redo_slru_page, tracks_commit_ts, truncation_removes,
};

/// Prefix of the logical messages in which the agent keeps files; the path follows it.
pub const AUX_FILE_PREFIX: &str = "dormouse-file:";
