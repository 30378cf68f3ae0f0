//! The agent's side of the shim: what Postgres's file calls ask for, served on a Unix socket.

mod backend;
mod environment;
mod readahead;
mod server;

pub use backend::{BackendError, ShimBackend};
pub use environment::{required_settings, shim_environment};
pub use page_cache::{PageCache, PageCacheConfig, PageCacheStats};
pub use server::ShimServer;
