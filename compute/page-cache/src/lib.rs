//! The page cache that a compute's backends and its agent share: an index in shared memory, pages in a plain file.
//!
//! The shim links this crate into `postgres`: [`Shared`] and everything below it allocate nothing, start no threads and
//! make raw system calls only. [`PageCache`] is the agent's handle.

mod asleep;
mod layout;
mod lock;
mod owner;
mod page;
mod pages;
pub mod protocol;
mod rels;
mod shared;
mod sys;
#[cfg(test)]
mod tests;

pub use asleep::decode as decode_asleep;
pub use owner::{PageCache, PageCacheConfig, PageCacheStats};
pub use page::{Keep, PageOrigin, is_zero, keep_for, normal_insert_lsn};
pub use rels::{RelState, WaitingReset};
pub use shared::Shared;
pub use sys::Errno;
pub use types;

/// A page's bytes.
pub type Page = [u8; types::PAGE_BYTES];
