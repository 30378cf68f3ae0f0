//! Between the control plane and the other services: JSON over HTTP below `/internal/v1`, with a token of scope `Service`.
//!
//! - `POST /internal/v1/generations` ([`TakeGeneration`] → [`GenerationTaken`]): a pageserver at its start.
//! - `GET /internal/v1/endpoints/{endpoint}/roles/{role}` (→ [`RoleAuth`]): a proxy checking a login. 404 when there is none.
//! - `POST /internal/v1/endpoints/{endpoint}/wake` (→ [`Wake`]): a proxy after a good login.
//!
//! Errors are [`ApiError`] with the fitting HTTP status.

use std::{collections::BTreeMap, path::PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use types::{BranchRef, EndpointId, Generation, Member, NodeId, ProjectId};

use crate::v2::QueryCacheSettings;

/// A pageserver asks for the number under which it will write.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TakeGeneration {
    /// Which pageserver.
    pub pageserver: NodeId,
    /// Where it is reached, as host:port.
    pub address: String,
}

/// Larger than any generation handed out before, durably so.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GenerationTaken {
    /// The number.
    pub generation: Generation,
    /// Projects that were given to other pageservers: it must not serve them.
    #[serde(default)]
    pub elsewhere: Vec<ProjectId>,
    /// The installation's safekeepers; of those that a branch has they tell themselves. Empty: those of the settings.
    #[serde(default)]
    pub safekeepers: Vec<Member>,
}

/// What a proxy needs to check a login without waking anything.
#[derive(Clone, Serialize, Deserialize)]
pub struct RoleAuth {
    /// The endpoint's branch.
    pub branch: BranchRef,
    /// `SCRAM-SHA-256$…`; `None`: the role exists but may not log in. Never logged.
    pub scram_verifier: Option<String>,
    /// False when the endpoint was disabled by its owner.
    pub enabled: bool,
    /// What proxies do with answers to queries over HTTP.
    #[serde(default)]
    pub query_cache: QueryCache,
    /// Whose JSON Web Tokens stand for this role's password; none by default.
    #[serde(default)]
    pub token_issuers: Vec<TokenIssuer>,
    /// Where clients may come from; empty: from anywhere.
    #[serde(default)]
    pub allowed_ips: Vec<IpNet>,
}

/// Who signs tokens, and what must stand in them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenIssuer {
    /// Where its public keys are, as a JSON Web Key Set.
    pub jwks_url: String,
    /// Must be among a token's `aud`; `None`: any, or none.
    #[serde(default)]
    pub audience: Option<String>,
    /// Must be a token's `iss`; `None`: any, or none.
    #[serde(default)]
    pub issuer: Option<String>,
}

/// How long answers to queries over HTTP are kept, and which are not to be used any more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueryCache {
    /// For queries that do not say themselves; `None`: their answers are not kept.
    #[serde(default)]
    pub settings: Option<QueryCacheSettings>,
    /// Grows when all answers are invalidated.
    #[serde(default)]
    pub all: u64,
    /// Grow when the answers with a tag are invalidated, by tag; tags that never were are not in it.
    #[serde(default)]
    pub tags: BTreeMap<String, u64>,
}

/// Where an awake endpoint takes connections.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Wake {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// Postgres's Unix socket: connect and say who you are, it trusts.
    pub postgres_socket: PathBuf,
    /// True when this call started the compute, false when it was awake.
    pub cold: bool,
}

/// Code of the 404 for an endpoint that does not exist; a 404 with any other code means that the role does not.
pub const ENDPOINT_NOT_FOUND: &str = "ENDPOINT_NOT_FOUND";

/// An error, as in Neon's API: `{"code": "...", "message": "..."}`.
#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Short and stable; empty when the HTTP status says it all.
    #[serde(default)]
    pub code: String,
    /// For people: what happened and what to do.
    pub message: String,
}
