//! The formats of PostgreSQL's write-ahead log and control file, decoded and encoded. No IO.
//!
//! - [`record`]: a whole record, decoded ([`DecodedRecord`]).
//! - `stream`: WAL bytes in, whole records out ([`stream::WalStreamDecoder`]).
//! - `encode`: records that Dormouse itself writes (the term's opening checkpoint), laid out on WAL pages.
//! - `v15`: what may differ between major versions, for PostgreSQL 15.

pub mod record;

pub use record::{BlockRef, DecodedRecord, RmgrId};
