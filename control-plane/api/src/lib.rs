//! What the control plane says to agents and proxies (`compute`, `internal`), and its public REST types (`v2`).

pub mod compute;
pub mod internal;
pub mod safekeepers;
pub mod v2;
