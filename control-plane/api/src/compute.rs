//! Between the control plane and a compute's agent.
//!
//! The control plane runs `dormouse compute` with a [`ComputeSpec`] as JSON on standard input (then end of file). The agent
//! prints one [`AgentEvent`] as a JSON line on standard output: ready or failed. From then on it serves HTTP on the Unix
//! socket `agent.sock` in its compute directory: `GET /status` ([`AgentStatus`]), `POST /stop`, `POST /apply`
//! ([`CatalogSpec`]), `POST /membership` ([`Membership`]). It outlives the control plane that started it.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};
use types::{BranchRef, EndpointId, Lsn, Membership, MembershipGeneration, NodeId, Term};

/// Everything an agent needs to start a compute.
#[derive(Clone, Serialize, Deserialize)]
pub struct ComputeSpec {
    /// The branch whose data it serves.
    pub branch: BranchRef,
    /// The endpoint it is started for.
    pub endpoint: EndpointId,
    /// Where the branch left its ancestor: its WAL begins here when no safekeeper has any of it yet.
    pub branch_start_lsn: Lsn,
    /// Made by the agent, owned by Postgres's user, removed at a clean stop. Holds `pgdata/`, `agent.sock` and Postgres's
    /// own socket. Its path must leave room for `/.s.PGSQL.5432` in the 107 bytes of a Unix socket address.
    pub compute_dir: PathBuf,
    /// Where pages that do not fit in memory are kept (dirty ones that Postgres evicted, and clean ones). On disk.
    pub page_cache_dir: PathBuf,
    /// The safekeepers of the branch.
    pub membership: Membership,
    /// `host:port` of the pageserver.
    pub pageserver: String,
    /// A token of scope `Branch`. Never logged.
    pub token: String,
    /// The directory of `postgres`.
    pub postgres_bin_dir: PathBuf,
    /// The shim's shared object.
    pub shim_path: PathBuf,
    /// The unprivileged user to run Postgres as when the agent is root.
    pub postgres_user: Option<String>,
    /// Settings for `postgresql.conf` beyond those that Dormouse itself needs.
    pub settings: BTreeMap<String, String>,
    /// Roles and databases that must exist before the compute is ready; `None` when the branch is known to have them.
    pub catalog: Option<CatalogSpec>,
    /// The branch's subscriptions, if it has any, are its ancestor's, which goes on with them: here they are disabled before
    /// one of their workers can run, and durably before the compute is ready.
    #[serde(default)]
    pub disable_subscriptions: bool,
    /// Limit of clean pages in the local page cache, bytes.
    pub page_cache_bytes: u64,
    /// Limit of evicted dirty pages that must be kept, bytes; over it statements fail with "disk full".
    pub kept_pages_bytes: u64,
    /// Limit of what page caches of sleeping computes take together in the directories beside `page_cache_dir`, bytes. 0: the
    /// cache is removed when the compute stops.
    #[serde(default)]
    pub sleeping_caches_bytes: u64,
}

/// Roles and databases as the control plane knows them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CatalogSpec {
    /// Roles, made or changed.
    pub roles: Vec<RoleSpec>,
    /// Databases, made if missing.
    pub databases: Vec<DatabaseSpec>,
    /// Roles to drop, after their objects were given to their databases' owners.
    pub drop_roles: Vec<String>,
    /// Databases to drop.
    pub drop_databases: Vec<String>,
}

/// A role.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleSpec {
    /// Its name.
    pub name: String,
    /// `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`; `None` leaves the password as it is. Never logged.
    pub scram_verifier: Option<String>,
}

impl std::fmt::Debug for RoleSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RoleSpec").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseSpec {
    /// Its name.
    pub name: String,
    /// The role that owns it.
    pub owner: String,
}

/// The one line an agent prints.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum AgentEvent {
    /// Postgres takes connections.
    Ready(ComputeReady),
    /// It did not start; the agent exits.
    Failed {
        /// Why, for people.
        error: String,
    },
}

/// A compute that takes connections.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ComputeReady {
    /// The agent's process id.
    pub agent_pid: u32,
    /// Postgres's Unix socket. Whoever can open it is trusted: its directory is private to Dormouse's user.
    pub postgres_socket: PathBuf,
    /// The agent's HTTP socket.
    pub agent_socket: PathBuf,
    /// The term it won.
    pub term: Term,
    /// Where its WAL begins.
    pub start_lsn: Lsn,
    /// How long the steps took, in microseconds, by name and in order.
    pub timings_us: Vec<(String, u64)>,
    /// How many subscriptions were disabled, see [`ComputeSpec::disable_subscriptions`].
    #[serde(default)]
    pub subscriptions_disabled: u64,
}

/// Answer of `GET /status`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Postgres is up.
    pub running: bool,
    /// The branch, for callers that found the socket lying around.
    pub branch: BranchRef,
    /// Everything up to here is held by a quorum.
    pub commit_lsn: Lsn,
    /// Milliseconds since the last activity: an active query, an open transaction, a replication connection, a new
    /// connection. 0 while there is any.
    pub idle_ms: u64,
    /// Client connections now.
    pub connections: u32,
    /// How far it has come with the branch's membership; `None` once it is fenced.
    #[serde(default)]
    pub membership: Option<MembershipProgress>,
    /// Why it is failing, when it is (fenced by a newer term, no quorum).
    pub problem: Option<String>,
}

/// How far a compute has come with its branch's membership.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MembershipProgress {
    /// The membership by which it counts.
    pub generation: MembershipGeneration,
    /// It has committed under it: a joint one may be completed.
    pub established: bool,
    /// Members that do not have everything that is committed.
    pub lagging: Vec<NodeId>,
}

/// Answer of `POST /stop`, once Postgres has ended. Errors (of every call) are [`crate::internal::ApiError`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopAnswer {
    /// Where the branch's WAL ends; a quorum holds it.
    pub commit_lsn: Lsn,
}
