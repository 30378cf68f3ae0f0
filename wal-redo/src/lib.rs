//! WAL redo as a library: which stored things a record changes, and how it changes each page. No IO, no panics.
//!
//! - [`changes`]: what a record touches ([`Change`]), for the pageserver to file it under the right keys.
//! - `redo_page`, `redo_slru_page`: apply a record to one page.
//! - `checkpoint`: the counters of the `CheckPoint` struct, kept up to date record by record.

mod change;
mod page;

pub use change::{Change, SlruKind};
pub use page::{RecordName, RedoError, redo_page, restore_image};

/// Prefix of the logical messages in which the agent keeps files; the path follows it.
pub const AUX_FILE_PREFIX: &str = "dormouse-file:";
