//! Identifiers and positions that every Dormouse crate speaks in.
//!
//! No call takes two integers that could be swapped: positions, terms, generations, ids and relation names are newtypes.

mod id;
mod lsn;
mod membership;
mod rel;

pub use id::{BranchId, BranchRef, EndpointId, Generation, IdError, NodeId, ProjectId, Term};
pub use lsn::{Lsn, LsnParseError, WAL_SEGMENT_BYTES, XLOG_PAGE_BYTES};
pub use membership::{Member, Membership, MembershipError, MembershipGeneration};
pub use rel::{BlockNumber, ForkNumber, Oid, PageTag, RelTag, UnknownFork, oids};

/// Bytes in a relation page (`BLCKSZ` of a stock build).
pub const PAGE_BYTES: usize = 8192;

/// Blocks in one segment file of a relation (`RELSEG_SIZE` of a stock build: 1 GiB).
pub const REL_SEGMENT_BLOCKS: u32 = 131_072;
