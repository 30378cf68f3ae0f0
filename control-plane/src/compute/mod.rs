//! Computes: started, watched, put to sleep.
//!
//! - [`manager`]: wakes and suspends; one turn at a time for each branch.
//! - [`launcher`]: the boundary to agents, and the real thing that starts processes.
//! - [`idle`]: when a compute may sleep (pure).

pub mod agent_http;
pub mod idle;
pub mod launcher;
pub mod manager;
mod watch;

pub use launcher::{AgentProcess, ComputeLauncher, Launching, ProcessLauncher};
pub use manager::{ComputeSettings, Computes, SuspendReason};
