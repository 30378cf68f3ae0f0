//! Real computes, a process each, on real safekeepers and a pageserver.

mod backpressure;
mod free_space;
mod lifetime;
mod offload;
mod replication;
mod rotten;
mod subscriptions;
mod warm_cache;
mod world;
