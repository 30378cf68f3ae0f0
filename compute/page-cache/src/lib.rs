//! The page cache that a compute's backends and its agent share.

mod owner;

pub use owner::{PageCache, PageCacheConfig, PageCacheStats};
