//! Public REST types: JSON of Neon's API v2 where it has the same notion.
//!
//! Answers carry every field that Neon's clients require; requests tolerate fields that mean nothing here. Times are RFC 3339
//! in UTC, LSNs are Postgres's text form, sizes are bytes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use types::{BranchId, EndpointId, Lsn, NodeId, ProjectId};

pub use crate::internal::ApiError;

mod lsn_text {
    //! Postgres's `0/16B3748` for optional positions.
    use serde::{Deserialize, Deserializer, Serializer};
    use types::Lsn;

    pub fn serialize<S: Serializer>(lsn: &Option<Lsn>, serializer: S) -> Result<S::Ok, S::Error> {
        match lsn {
            Some(lsn) => serializer.collect_str(lsn),
            None => serializer.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Lsn>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.filter(|t| !t.is_empty()).map(|t| t.parse().map_err(serde::de::Error::custom)).transpose()
    }
}

/// A project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Project {
    /// Its id.
    pub id: ProjectId,
    /// Its owner's name for it.
    pub name: String,
    /// Where it runs; one region for now.
    pub region_id: String,
    /// What it runs on.
    pub platform_id: String,
    /// What starts its computes.
    pub provisioner: String,
    /// Postgres's major version.
    pub pg_version: u32,
    /// Host of the proxy.
    pub proxy_host: String,
    /// True: [`Role::password`] can be revealed later.
    pub store_passwords: bool,
    /// What new endpoints start with.
    pub default_endpoint_settings: EndpointDefaults,
    /// How far back in time branches may be made, seconds.
    pub history_retention_seconds: u64,
    /// Who may reach it.
    #[serde(default)]
    pub settings: ProjectSettings,
    /// Who made it.
    pub creation_source: String,
    /// Who owns it.
    pub owner_id: String,
    /// Metered use so far: seconds in which a compute was active.
    pub active_time_seconds: u64,
    /// Metered use so far.
    pub cpu_used_sec: u64,
    /// Metered use so far.
    pub compute_time_seconds: u64,
    /// Metered use so far.
    pub written_data_bytes: u64,
    /// Metered use so far.
    pub data_transfer_bytes: u64,
    /// Metered use so far.
    pub data_storage_bytes_hour: u64,
    /// When it was made.
    pub created_at: String,
    /// When it was last changed.
    pub updated_at: String,
}

/// What new endpoints of a project start with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointDefaults {
    /// See [`Endpoint::suspend_timeout_seconds`].
    #[serde(default)]
    pub suspend_timeout_seconds: Option<i64>,
}

/// Settings of a project.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProjectSettings {
    /// Where clients may come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_ips: Option<AllowedIps>,
}

/// Where clients may come from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllowedIps {
    /// Addresses and networks (CIDR), IPv4 and IPv6; empty: from anywhere.
    #[serde(default)]
    pub ips: Vec<String>,
    /// True: other branches than protected ones can be reached from anywhere.
    #[serde(default)]
    pub protected_branches_only: bool,
}

/// A branch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branch {
    /// Its id.
    pub id: BranchId,
    /// Its project.
    pub project_id: ProjectId,
    /// What it was made from; none for a project's first branch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_id: Option<BranchId>,
    /// Where it left its parent.
    #[serde(default, with = "lsn_text", skip_serializing_if = "Option::is_none")]
    pub parent_lsn: Option<Lsn>,
    /// The time that was asked for, when it was made as of a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_timestamp: Option<String>,
    /// Its owner's name for it.
    pub name: String,
    /// `init`, `ready` or `deleting`.
    pub current_state: String,
    /// The state it is changing to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_state: Option<String>,
    /// When it last changed its state.
    pub state_changed_at: String,
    /// Sum of its relations' sizes, bytes; in answers to `GET`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logical_size: Option<u64>,
    /// WAL of its own within the history that is kept, bytes; in answers to `GET`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history_size: Option<u64>,
    /// What it takes in the object store beside what it shares with its parent, bytes; in answers to `GET`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_size: Option<u64>,
    /// Who made it.
    pub creation_source: String,
    /// The project's default branch (Neon's older name of [`Branch::default`]).
    pub primary: bool,
    /// The project's default branch.
    pub default: bool,
    /// Deleting it is refused.
    pub protected: bool,
    /// Metered use so far.
    pub cpu_used_sec: u64,
    /// Metered use so far.
    pub compute_time_seconds: u64,
    /// Metered use so far.
    pub active_time_seconds: u64,
    /// Metered use so far.
    pub written_data_bytes: u64,
    /// Metered use so far.
    pub data_transfer_bytes: u64,
    /// When it was made.
    pub created_at: String,
    /// When it was last changed.
    pub updated_at: String,
}

/// An endpoint: the name under which a branch's compute is reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its id.
    pub id: EndpointId,
    /// Host name to connect to. Without a domain of its own, an installation routes by
    /// `options=endpoint%3D<id>` instead: see `connection_uri`.
    pub host: String,
    /// Its project.
    pub project_id: ProjectId,
    /// Its branch.
    pub branch_id: BranchId,
    /// Its owner's name for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `read_write`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `init` (starting), `active` or `idle` (asleep).
    pub current_state: String,
    /// The state it is changing to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_state: Option<String>,
    /// Where it runs.
    pub region_id: String,
    /// Smallest size in compute units.
    pub autoscaling_limit_min_cu: f64,
    /// Largest size in compute units.
    pub autoscaling_limit_max_cu: f64,
    /// Settings for Postgres.
    pub settings: EndpointSettings,
    /// `-pooler` hosts work in any case; kept for clients that set it.
    pub pooler_enabled: bool,
    /// `transaction`.
    pub pooler_mode: String,
    /// True: nobody may log in.
    pub disabled: bool,
    /// Always false: SCRAM is asked for.
    pub passwordless_access: bool,
    /// Who made it.
    pub creation_source: String,
    /// Host of the proxy.
    pub proxy_host: String,
    /// Idle seconds before it sleeps; 0 is the default of 300, -1 never.
    pub suspend_timeout_seconds: i64,
    /// What starts its compute.
    pub provisioner: String,
    /// Last seen active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_active: Option<String>,
    /// When its compute was last started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<String>,
    /// When it last fell asleep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspended_at: Option<String>,
    /// When it was made.
    pub created_at: String,
    /// When it was last changed.
    pub updated_at: String,
}

/// Postgres settings of an endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointSettings {
    /// Lines for `postgresql.conf`.
    #[serde(default)]
    pub pg_settings: BTreeMap<String, String>,
    /// How long answers to queries over HTTP are kept; absent: only those that ask for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query_cache: Option<QueryCacheSettings>,
}

/// How long an answer is kept, in seconds, at most a day in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueryCacheSettings {
    /// So long it is used as it is.
    pub max_age: u32,
    /// So much longer it is used while a newer one is fetched.
    #[serde(default)]
    pub stale_while_revalidate: u32,
}

/// `POST …/endpoints/{endpoint}/query_cache/invalidate`: answers with these tags, or without any tag all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InvalidateQueryCache {
    /// The tags.
    #[serde(default)]
    pub tags: Option<Vec<String>>,
}

/// A role.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Role {
    /// Its branch.
    pub branch_id: BranchId,
    /// Its name.
    pub name: String,
    /// Only in answers that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
    /// Made by the system.
    pub protected: bool,
    /// When it was made.
    pub created_at: String,
    /// When it was last changed.
    pub updated_at: String,
}

impl std::fmt::Debug for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Role").field("branch_id", &self.branch_id).field("name", &self.name).finish_non_exhaustive()
    }
}

/// A database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Database {
    /// A number of the control plane's.
    pub id: i64,
    /// Its branch.
    pub branch_id: BranchId,
    /// Its name.
    pub name: String,
    /// The role that owns it.
    pub owner_name: String,
    /// When it was made.
    pub created_at: String,
    /// When it was last changed.
    pub updated_at: String,
}

/// Whose JSON Web Tokens stand for the passwords of which roles, over HTTP and WebSocket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jwks {
    /// A UUID.
    pub id: String,
    /// Its project.
    pub project_id: ProjectId,
    /// The only branch that it counts for; all of the project's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch_id: Option<BranchId>,
    /// Where the issuer's public keys are.
    pub jwks_url: String,
    /// Its owner's name for the issuer.
    pub provider_name: String,
    /// Must be among a token's `aud`; any or none will do when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwt_audience: Option<String>,
    /// Must be a token's `iss`; any or none will do when absent. Not in Neon's API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwt_issuer: Option<String>,
    /// Roles that a token may take.
    pub role_names: Vec<String>,
    /// When it was made.
    pub created_at: String,
    /// When it was last changed.
    pub updated_at: String,
}

/// `POST /projects/{id}/jwks`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct JwksFields {
    /// `https://…`, or `http://…`.
    pub jwks_url: String,
    /// The host of `jwks_url` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider_name: Option<String>,
    /// See [`Jwks::branch_id`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch_id: Option<String>,
    /// See [`Jwks::jwt_audience`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwt_audience: Option<String>,
    /// See [`Jwks::jwt_issuer`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwt_issuer: Option<String>,
    /// `authenticator`, `authenticated` and `anonymous` by default. The roles themselves are not made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role_names: Option<Vec<String>>,
}

/// `{"jwks": …}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JwksEnvelope {
    /// What was made.
    pub jwks: Jwks,
    /// Nothing.
    #[serde(default)]
    pub operations: Vec<Operation>,
}

/// A project's issuers of tokens, in order of creation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JwksList {
    /// The issuers.
    pub jwks: Vec<Jwks>,
}

/// Something the control plane did or does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// A UUID.
    pub id: String,
    /// Its project.
    pub project_id: ProjectId,
    /// Its branch, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch_id: Option<BranchId>,
    /// Its endpoint, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint_id: Option<EndpointId>,
    /// `create_timeline`, `delete_timeline`, `timeline_restore`, `detach_parent_branch`, `start_compute`, `suspend_compute`,
    /// `apply_config`.
    pub action: String,
    /// `running`, `finished` or `failed`.
    pub status: String,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// How often it failed.
    pub failures_count: u32,
    /// How long it took, milliseconds.
    pub total_duration_ms: u64,
    /// When it was begun.
    pub created_at: String,
    /// When it last changed its status.
    pub updated_at: String,
}

/// How to connect.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionUri {
    /// With the password in it.
    pub connection_uri: String,
    /// The same in parts.
    pub connection_parameters: ConnectionParameters,
}

/// A [`ConnectionUri`]'s parts.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionParameters {
    /// Database.
    pub database: String,
    /// Never logged.
    pub password: String,
    /// Role.
    pub role: String,
    /// Host of direct connections.
    pub host: String,
    /// Host of pooled connections.
    pub pooler_host: String,
}

/// Where to go on in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pagination {
    /// Hand it back as `cursor`.
    pub cursor: String,
}

/// `POST /projects`, `PATCH /projects/{id}`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ProjectRequest {
    /// The project.
    #[serde(default)]
    pub project: ProjectFields,
}

/// What may be said about a project.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ProjectFields {
    /// Its name; its id by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Only 15 is offered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pg_version: Option<u32>,
    /// Its first branch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<FirstBranchFields>,
    /// What new endpoints start with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_endpoint_settings: Option<EndpointDefaults>,
    /// See [`Project::history_retention_seconds`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history_retention_seconds: Option<u64>,
    /// See [`Project::settings`]; what is not in it stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<ProjectSettings>,
    /// False: its compute is started by the first connection, not at once. Only when it is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_compute: Option<bool>,
}

/// `POST /projects/{id}/take_over`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TakeOverRequest {
    /// The number of the pageserver that is to serve the project; it must run.
    pub pageserver: u64,
}

/// What may be said about a project's first branch.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct FirstBranchFields {
    /// `main` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `<database>_owner` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role_name: Option<String>,
    /// `dormouse` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database_name: Option<String>,
}

/// `POST /projects/{id}/branches`, `PATCH .../branches/{id}`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct BranchRequest {
    /// The branch.
    #[serde(default)]
    pub branch: BranchFields,
    /// Endpoints to make for it.
    #[serde(default)]
    pub endpoints: Vec<EndpointFields>,
}

/// What may be said about a branch.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct BranchFields {
    /// Its name; its id by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The project's default branch by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_id: Option<String>,
    /// The parent's newest state by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_lsn: Option<String>,
    /// A time (RFC 3339) instead of an LSN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_timestamp: Option<String>,
    /// Refuse to delete it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protected: Option<bool>,
}

/// `POST .../branches/{id}/restore`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// Whose state it gets; may be the branch itself.
    pub source_branch_id: String,
    /// As of this position; the source's newest state by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_lsn: Option<String>,
    /// A time (RFC 3339) instead of a position.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_timestamp: Option<String>,
    /// Keep what the branch was as a branch of this name. Needed when the source is the branch itself or it has children.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preserve_under_name: Option<String>,
}

/// `POST .../branches/{id}/collect_garbage`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GarbageCollected {
    /// The oldest position that is readable now, but for those that children and leases keep.
    #[serde(with = "lsn_text")]
    pub start_lsn: Option<Lsn>,
    /// Layers that are not part of the branch any more.
    pub removed_layers: u64,
    /// Their size in the object store, bytes.
    pub removed_bytes: u64,
}

/// `POST /projects/{id}/endpoints`, `PATCH .../endpoints/{id}`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct EndpointRequest {
    /// The endpoint.
    #[serde(default)]
    pub endpoint: EndpointFields,
}

/// What may be said about an endpoint.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct EndpointFields {
    /// Its branch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch_id: Option<String>,
    /// `read_write` by default, and all there is.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// See [`Endpoint::suspend_timeout_seconds`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend_timeout_seconds: Option<i64>,
    /// See [`Endpoint::disabled`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disabled: Option<bool>,
    /// Settings for Postgres.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<EndpointSettings>,
}

/// `POST .../branches/{id}/roles`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RoleRequest {
    /// The role.
    pub role: RoleFields,
}

/// What is said about a role.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RoleFields {
    /// Its name.
    pub name: String,
}

/// `POST .../branches/{id}/databases`, `PATCH .../databases/{name}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DatabaseRequest {
    /// The database.
    pub database: DatabaseFields,
}

/// What is said about a database.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DatabaseFields {
    /// Its name.
    pub name: String,
    /// The role that owns it.
    pub owner_name: String,
}

/// Answer of `POST /projects`.
#[derive(Clone, Serialize, Deserialize)]
pub struct ProjectCreated {
    /// The project.
    pub project: Project,
    /// How to connect to its first branch.
    pub connection_uris: Vec<ConnectionUri>,
    /// Its roles, with passwords.
    pub roles: Vec<Role>,
    /// Its databases.
    pub databases: Vec<Database>,
    /// What was done, and what still runs.
    pub operations: Vec<Operation>,
    /// Its first branch.
    pub branch: Branch,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// Answer of `POST /projects/{id}/branches`.
#[derive(Clone, Serialize, Deserialize)]
pub struct BranchCreated {
    /// The branch.
    pub branch: Branch,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
    /// What was done.
    pub operations: Vec<Operation>,
    /// Its roles, as its parent's.
    pub roles: Vec<Role>,
    /// Its databases, as its parent's.
    pub databases: Vec<Database>,
    /// How to connect, when an endpoint was made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub connection_uris: Vec<ConnectionUri>,
}

/// `{"project": …}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProjectEnvelope {
    /// The project.
    pub project: Project,
    /// What was done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub operations: Vec<Operation>,
}

/// A page of projects.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProjectList {
    /// The projects.
    pub projects: Vec<Project>,
    /// Absent at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pagination: Option<Pagination>,
}

/// `{"branch": …}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BranchEnvelope {
    /// The branch.
    pub branch: Branch,
    /// What was done.
    #[serde(default)]
    pub operations: Vec<Operation>,
}

/// A page of branches.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BranchList {
    /// The branches.
    pub branches: Vec<Branch>,
    /// Absent at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pagination: Option<Pagination>,
}

/// How far a branch's history reaches, and a point in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchHistory {
    /// The branch.
    pub branch_id: BranchId,
    /// Its project's window, seconds.
    pub history_retention_seconds: u64,
    /// The oldest position of which a branch can be made.
    #[serde(with = "lsn_text")]
    pub start_lsn: Option<Lsn>,
    /// The end of its WAL.
    #[serde(with = "lsn_text")]
    pub end_lsn: Option<Lsn>,
    /// When the last commit before [`BranchHistory::end_lsn`] was; absent when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_timestamp: Option<String>,
    /// The position asked for, or that of the time asked for; the end when neither was.
    #[serde(with = "lsn_text")]
    pub lsn: Option<Lsn>,
    /// When the last commit at or before [`BranchHistory::lsn`] was; absent when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<String>,
    /// The branch that wrote it: this one or one that it comes from.
    pub lsn_branch_id: BranchId,
}

/// `{"history": …}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BranchHistoryEnvelope {
    /// The history.
    pub history: BranchHistory,
}

/// Keeps a position though it falls out of the history window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// A UUID.
    pub id: String,
    /// The branch that wrote the position: the one asked about or one that it comes from.
    pub branch_id: BranchId,
    /// The position.
    #[serde(with = "lsn_text")]
    pub lsn: Option<Lsn>,
    /// Until when it is kept.
    pub expires_at: String,
}

/// `POST .../branches/{id}/leases`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LeaseRequest {
    /// The lease.
    #[serde(default)]
    pub lease: LeaseFields,
}

/// What may be said about a lease.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LeaseFields {
    /// The position; the branch's newest by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lsn: Option<String>,
    /// A time (RFC 3339) instead of a position.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<String>,
    /// How long it holds; 3600 by default, 30 days at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u64>,
}

/// `{"lease": …}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LeaseEnvelope {
    /// The lease.
    pub lease: Lease,
}

/// `POST .../branches/{id}/wal_reader`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct WalReaderRequest {
    /// How long the token is good; 90 days by default, a minute at least, 365 days at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in_seconds: Option<u64>,
}

/// How to follow a branch's WAL straight from its safekeepers, by Postgres's own physical replication protocol. Dormouse's own; Neon's API
/// has no such notion.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WalReader {
    /// For libpq: a standby's `primary_conninfo`, or `pg_receivewal -d`. Holds a token that reads this branch's WAL and nothing else; it can't be
    /// taken back.
    pub conninfo: String,
    /// Until when the token is good.
    pub expires_at: String,
    /// Safekeepers of the branch that are not in `conninfo`: they did not say where they give out WAL, or do not.
    #[serde(default)]
    pub missing_safekeepers: Vec<NodeId>,
}

/// A branch's leases.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LeaseList {
    /// By position.
    pub leases: Vec<Lease>,
}

/// `{"endpoint": …}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EndpointEnvelope {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// What was done, or still runs.
    #[serde(default)]
    pub operations: Vec<Operation>,
}

/// Endpoints.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EndpointList {
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// `{"role": …}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RoleEnvelope {
    /// The role.
    pub role: Role,
    /// What was done.
    #[serde(default)]
    pub operations: Vec<Operation>,
}

/// Roles.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RoleList {
    /// The roles.
    pub roles: Vec<Role>,
}

/// Answer of `GET .../roles/{name}/reveal_password`.
#[derive(Clone, Serialize, Deserialize)]
pub struct RolePassword {
    /// Never logged.
    pub password: String,
}

/// `{"database": …}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DatabaseEnvelope {
    /// The database.
    pub database: Database,
    /// What was done.
    #[serde(default)]
    pub operations: Vec<Operation>,
}

/// Databases.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DatabaseList {
    /// The databases.
    pub databases: Vec<Database>,
}

/// `{"operation": …}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OperationEnvelope {
    /// The operation.
    pub operation: Operation,
}

/// A page of operations, newest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OperationList {
    /// The operations.
    pub operations: Vec<Operation>,
    /// Absent at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pagination: Option<Pagination>,
}

/// Answer of `GET /projects/{id}/connection_uri`.
#[derive(Clone, Serialize, Deserialize)]
pub struct UriAnswer {
    /// With the password in it.
    pub uri: String,
}
