//! The formats of PostgreSQL's write-ahead log and control file, decoded and encoded. No IO.
//!
//! - [`record`]: a whole record, decoded ([`DecodedRecord`]).
//! - [`stream`]: WAL bytes in, whole records out ([`stream::WalStreamDecoder`]).
//! - [`encode`]: records that Dormouse itself writes (the term's opening checkpoint), laid out on WAL pages.
//! - [`checkpoint`], [`control_file`]: the `CheckPoint` struct and `pg_control`.
//! - [`v15`]: what may differ between major versions, for PostgreSQL 15.

#[cfg(not(target_endian = "little"))]
compile_error!("WAL is in the machine's byte order, and only little-endian machines are supported");

pub mod checkpoint;
pub mod control_file;
mod decode;
pub mod encode;
pub mod record;
pub mod stream;
pub mod v15;

pub use checkpoint::CheckPoint;
pub use control_file::ControlFile;
pub use decode::{decode_into, decode_record};
pub use record::{BlockRef, Blocks, DecodedRecord, OwnedRecord, RmgrId};
pub use stream::{ForEachError, WalDecodeError, WalStreamDecoder};
