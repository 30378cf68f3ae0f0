//! The library preloaded into a stock `postgres`: relation files come from the shared page cache and the agent, a WAL sync
//! is a quorum's. `README.md` follows one request through these files.
//!
//! Postgres forks and handles signals anywhere: no threads, and outside directory listings no allocation.

#![cfg_attr(test, allow(dead_code, reason = "tests of a program's own calls must not go through the hooks"))]

mod agent;
mod dirs;
mod fds;
#[cfg(not(test))]
mod hooks;
mod kept_files;
mod orphan;
mod path;
mod postgres;
mod readahead;
mod real;
mod relation;
mod runtime;
mod wal_ahead;
