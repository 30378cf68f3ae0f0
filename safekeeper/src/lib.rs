//! A safekeeper: keeps the tail of every branch's WAL durably, acknowledges it to computes, streams what is committed.
//!
//! The rules are `safekeeper-protocol`'s; this crate is their disk and their sockets.

mod branch;
mod config;
mod connection;
mod health;
mod offload;
mod registry;
mod replication;
mod server;
mod storage;
mod wal_source;

pub use config::{Config, ReplicationConfig};
pub use replication::ReplicationError;
pub use server::{Server, ServerError, USUAL_THREADS, run};
