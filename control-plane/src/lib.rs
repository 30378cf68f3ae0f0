//! The control plane: projects, branches, endpoints, and the computes behind them.
//!
//! A request comes in through `http`, is checked and carried out by `projects`, `branching`, `endpoint_rules` or the compute
//! manager, and leaves its traces in `store`. Storage and agents are behind the traits [`storage::Storage`] and
//! [`compute::ComputeLauncher`].

pub mod address;
mod allowed_ips;
pub mod app;
mod branching;
pub mod compute;
pub mod config;
mod endpoint_rules;
mod followers;
mod garbage;
mod history;
pub mod host;
pub mod http;
pub mod keys;
mod leftovers;
mod membership;
mod names;
mod placement;
mod problem;
mod projects;
mod restoring;
mod server;
mod sizes;
pub mod storage;
pub mod store;

pub use config::Config;
pub use problem::Problem;
pub use server::{Server, run};
