//! The agent's side of the shim: what Postgres's file calls ask for, served on a Unix socket.

mod backend;

pub use backend::{BackendError, ShimBackend};
