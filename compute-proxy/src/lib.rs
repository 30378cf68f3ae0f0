//! Dormouse's front door: takes Postgres connections, checks logins, wakes computes and passes the bytes on.
//!
//! A connection goes through [`server`], then `session`, which drives the rest: [`handshake`] parses what the client
//! sends before it logs in, [`endpoint_name`] tells which endpoint it means, [`scram`] checks the password, `wake` and
//! `compute` get a session with Postgres, and `splice` passes bytes until one side has enough. Clients of `-pooler` hosts
//! share few sessions: `pooling`. Clients without TCP come in through `http`. Certificates come from files or through `acme`.

mod acme;
mod cancel;
mod coalesce;
mod compute;
mod config;
mod control;
mod end;
pub mod endpoint_name;
pub mod handshake;
mod http;
mod key_sets;
mod login;
mod login_limit;
mod messages;
mod open_files;
mod pooling;
pub mod proxy_protocol;
mod remembered_passwords;
mod roles;
pub mod scram;
pub mod server;
mod session;
mod splice;
mod tls;
pub mod token;
mod wake;

pub use acme::{AcmeConfig, AcmeConfigError, AcmeError};
pub use config::Config;
pub use server::{BindError, Server, run};
pub use tls::TlsError;
